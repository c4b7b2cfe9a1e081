"""Fixtures of the Triton tests."""

from __future__ import annotations

import dataclasses

import pytest


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
def form(monkeypatch):
    """Use the configurations of the architecture that has the wanted form."""
    from mra_attention.triton_impl import launching

    def choose(name):
        architecture = {"plain": "sm_80", "swapped": "sm_90"}[name]
        monkeypatch.setattr(launching, "architecture", lambda device: architecture)

    return choose
