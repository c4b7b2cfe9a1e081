"""The implementations that the tests of the operator run on, and fixtures of the Triton tests."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from attention_cases import REFERENCE, Implementation
from triton_cases import TRITON, needs_triton

from mra_attention.implementations import native_problem
from mra_attention.native_impl import library

# Kernels of another machine, emulated: kernels/emulate_native.py.
if _tested_library := os.environ.get("MRA_HF_TEST_LIBRARY"):
    library.find = lambda: Path(_tested_library)
if _tested_program := os.environ.get("MRA_HF_TEST_PROGRAM"):
    from native_program import Program

    library.run = Program(_tested_program).run
    library.instruction_sets = lambda: ["base"]


def native_implementations():
    """The compiled CPU kernels on each instruction set of this machine."""
    problem = native_problem()
    if problem is not None:
        skip = pytest.mark.skip(reason=f'impl="native" {problem}')
        return [pytest.param(Implementation("native", is_general=False), id="native", marks=skip)]
    return [
        pytest.param(
            Implementation("native", is_general=False, instruction_set=name), id=f"native-{name}"
        )
        for name in library.instruction_sets()
    ]


#: Every property is tested with each of these; one more implementation is one more row.
IMPLEMENTATIONS = [
    pytest.param(REFERENCE, id="reference"),
    pytest.param(Implementation("torch"), id="torch"),
    *native_implementations(),
    pytest.param(TRITON, id="triton", marks=needs_triton),
]
FAST = [row for row in IMPLEMENTATIONS if row.values[0] is not REFERENCE]


def general(rows):
    return [row for row in rows if row.values[0].is_general]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Run a test of the compiled CPU kernels on its instruction set."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [x.instruction_set for x in params if isinstance(x, Implementation)]
    if not any(names):
        return (yield)
    from mra_attention.native_impl import instruction_set

    with instruction_set(names[0]):
        return (yield)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def impl(request):
    """Each implementation."""
    return request.param


@pytest.fixture(scope="session", params=general(IMPLEMENTATIONS))
def general_impl(request):
    """Each implementation that takes float64, every head dim and every block size."""
    return request.param


@pytest.fixture(scope="session", params=FAST)
def fast(request):
    """Each implementation besides the reference."""
    return request.param


@pytest.fixture(scope="session", params=general(FAST))
def general_fast(request):
    """Each implementation besides the reference that takes float64, every head dim and size."""
    return request.param


@pytest.fixture
def table(monkeypatch):
    """Change entries of the table of launch configurations: `table(item_blocks=1)`."""
    from mra_attention.triton_impl import launching

    shipped = launching.table()

    def change(**entries):
        monkeypatch.setattr(launching, "table", lambda: dataclasses.replace(shipped, **entries))

    return change


@pytest.fixture
def two_query_blocks(table):
    """Let two query blocks own a tile, in all kernels that can or in those that are named."""
    from mra_attention.triton_impl import launching

    configs = launching.table().configs

    def change(*kernels, **entries):
        kernels = kernels or ("forward", "query_gradient")
        changed = {
            key: dataclasses.replace(config, query_blocks=2)
            for key, config in configs.items()
            if key[1] in kernels
        }
        table(configs=configs | changed, **entries)

    return change


@pytest.fixture
def tiles(table, two_query_blocks):
    """Let one query block or two own a tile, and change entries of the table."""
    return lambda query_blocks, **entries: {1: table, 2: two_query_blocks}[query_blocks](**entries)


@pytest.fixture
def fill_scratch(monkeypatch):
    """From the call on, memory that kernels are to write holds NaN, or -1."""
    from mra_attention.triton_impl.call import KernelCall

    original = KernelCall.empty

    def filled(self, shape, dtype=torch.float32):
        x = original(self, shape, dtype)
        return x.fill_(torch.nan) if dtype.is_floating_point else x.fill_(-1)

    return lambda: monkeypatch.setattr(KernelCall, "empty", filled)


@pytest.fixture
def form(monkeypatch):
    """Use the configurations of the architecture that has the wanted form."""
    from mra_attention.triton_impl import launching

    def choose(name):
        architecture = {"plain": "sm_80", "swapped": "sm_90"}[name]
        monkeypatch.setattr(launching, "architecture", lambda device: architecture)

    return choose
