"""The compiled CPU kernels: threads, memory, dtypes and strides, and what happens without them."""

from __future__ import annotations

import _ctypes
import subprocess
import sys
import threading

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    Implementation,
    assert_all_equal,
    attend_with_bias,
    make_inputs,
    make_mask,
)

from mra_attention import implementations, mra2_attention, native_impl, torch_impl
from mra_attention.native_impl import library
from mra_attention.selection import SELECTION_RULES

NATIVE = Implementation("native", is_general=False)
PROBLEM = implementations.native_problem()

needs_native = pytest.mark.skipif(PROBLEM is not None, reason=f'impl="native" {PROBLEM}')


@pytest.fixture(params=[] if PROBLEM else library.instruction_sets())
def each_instruction_set(request):
    with native_impl.instruction_set(request.param):
        yield request.param


def selection_settings(**changes):
    return {
        **{"summaries": None, "block_size": 32, "block_per_row": 3, "block_budget": None},
        **{"initial_prior_first_n_blocks": 0, "initial_prior_diagonal_n_blocks": 0},
        **{"rule": "row_normalized", "scale": 0.3, "distance_bias": None, "key_block_size": 32},
        **changes,
    }


# -- selection


@needs_native
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": "global"},
        {"block_budget": 7},
        {"initial_prior_first_n_blocks": 1},
        {"initial_prior_first_n_blocks": 2, "block_budget": 9},  # more priors than the budget
        {"initial_prior_diagonal_n_blocks": 3},
        {"initial_prior_diagonal_n_blocks": 1, "initial_prior_first_n_blocks": 1},
        {"distance_bias": "drawn", "initial_prior_first_n_blocks": 1},
        {"rule": "mass"},
        {"rule": "mass", "key_block_size": 8, "distance_bias": "drawn"},
        {"rule": "mass", "key_block_size": 16, "initial_prior_diagonal_n_blocks": 1},
        {"rule": "mass", "key_block_size": 8, "block_budget": 10**15},
        {"key_block_size": 8, "initial_prior_first_n_blocks": 2, "block_budget": 9},
        {"key_block_size": 16, "rule": "global", "distance_bias": "drawn"},
    ],
)
def test_it_selects_what_torch_selects(changes, mask_kind, each_instruction_set):
    query, key, *_ = make_inputs(2, 3, 530, 40)
    mask = make_mask(mask_kind, 2, 530)
    if "distance_bias" in changes:
        changes = changes | {"distance_bias": NATIVE.bias(3, 17)}
    settings = selection_settings(**changes)
    chosen = native_impl.select(query, key, mask, **settings)
    assert torch.equal(chosen, torch_impl.select(query, key, mask, **settings))


@needs_native
@pytest.mark.parametrize("width", [8, 16])
def test_a_budget_just_below_the_live_pairs_is_kept(width):
    """The live pairs are no multiple of the pairs of a square: 33 tokens are 5 key blocks of 8."""
    query, key, *_ = make_inputs(1, 2, 33, 16)
    for budget in (1, 2, 3):
        settings = selection_settings(block_budget=budget, key_block_size=width)
        chosen = native_impl.select(query, key, None, **settings)
        assert torch.equal(chosen, torch_impl.select(query, key, None, **settings))


@needs_native
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("rule", list(library.RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_are_broken_as_by_torch(dtype, rule, width, each_instruction_set):
    """Repeated text: most scores are equal."""
    query, key, *_ = (x.repeat(1, 1, 9, 1).to(dtype) for x in make_inputs(1, 2, 64, 24))
    settings = selection_settings(block_per_row=2, rule=rule, key_block_size=width)
    chosen = native_impl.select(query, key, None, **settings)
    assert torch.equal(chosen, torch_impl.select(query, key, None, **settings))


@needs_native
@pytest.mark.parametrize("size", [1.0, 30.0, 95.0, 1e4, torch.inf, torch.nan])
def test_masses_that_vanish_are_ranked_as_by_torch(size, each_instruction_set):
    """Subnormal masses count, those that are 0 tie, and a row without a softmax has none."""
    query, key, *_ = make_inputs(1, 2, 320, 16)
    query[:, :, :, 0], key[:, :, :, 0] = 1.0, 0.0
    key[:, 0, 40, 0], key[:, 1, 190:200, 0] = 8 * size, 10.0  # 8 keys to a block
    settings = selection_settings(rule="mass", key_block_size=8, scale=1.0)
    for budget in (1, 3, 20, 60):
        settings["block_budget"] = budget
        chosen = native_impl.select(query, key, None, **settings)
        assert torch.equal(chosen, torch_impl.select(query, key, None, **settings))


@needs_native
def test_rules_that_it_does_not_rank_by_are_torchs():
    inputs = make_inputs(1, 2, 300, 16)
    for rule in SELECTION_RULES:
        settings = {"block_per_row": 2, "selection": rule}
        expected = Implementation("torch").attend(inputs, **settings)
        for x, y in zip(NATIVE.attend(inputs, **settings), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# -- the same bits


@needs_native
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choice", [{}, {"key_block_size": 8, "selection": "mass"}])
def test_the_number_of_threads_changes_no_bit(choice, mode, each_instruction_set):
    inputs, bias = make_inputs(2, 3, 300, 32), NATIVE.bias(3, 10)
    choice = choice | {"block_per_row": 3, "approx_mode": mode}
    mask, threads = make_mask("holes", 2, 300), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(attend_with_bias(NATIVE, inputs, bias, mask, **choice))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_native
def test_threads_of_its_own_where_torch_offers_none(monkeypatch):
    """As on torch 2.9, which has no `torch_parallel_for`."""
    inputs = make_inputs(2, 3, 200, 16)
    expected = NATIVE.attend(inputs, block_per_row=2)
    threads = torch.get_num_threads()
    library.load().mra_set_parallel_for(None)
    try:
        torch.set_num_threads(3)
        assert_all_equal(NATIVE.attend(inputs, block_per_row=2), expected)
    finally:
        torch.set_num_threads(threads)
        library.load.cache_clear()
        library.load()  # hands over torch's threads


@needs_native
def test_two_python_threads_at_once():
    inputs = [make_inputs(1, 4, 260, 32, seed=seed) for seed in range(4)]
    expected = [NATIVE.attend(x, block_per_row=2) for x in inputs]
    results = [None] * len(inputs)

    def work(number):
        for _ in range(5):
            results[number] = NATIVE.attend(inputs[number], block_per_row=2)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, wanted in zip(results, expected, strict=True):
        assert_all_equal(result, wanted)


@needs_native
@pytest.mark.parametrize("width", [8, 16, 32])
def test_strides_change_no_bit(width):
    inputs, choice = make_inputs(2, 3, 150, 32), {"block_per_row": 2, "key_block_size": width}
    expected = NATIVE.attend(inputs, **choice)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    dims_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    one_sample = [x[:1].expand(2, -1, -1, -1) for x in inputs]
    assert_all_equal(NATIVE.attend(heads_last, **choice), expected)
    assert_all_equal(NATIVE.attend(dims_first, **choice), expected)
    same = NATIVE.attend([x.contiguous() for x in one_sample], **choice)
    assert_all_equal(NATIVE.attend(one_sample, **choice), same)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened_and_rounded_as_by_torch(dtype):
    """Every finite number, and where rounding is delicate."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    value = every[every.isfinite()][: 32 * 1984].view(1, 1, -1, 64)
    zeros = torch.zeros_like(value)
    output = mra2_attention(
        zeros, zeros, value.clone(), block_per_row=10**6, approx_mode="sparse", impl="native"
    )
    expected = value.float().mean(2, keepdim=True).expand_as(value)
    torch.testing.assert_close(output.float(), expected.to(dtype).float(), rtol=1e-2, atol=1e-2)
    # One key per query: the gradient of its value is the gradient of the output, rounded.
    exact = torch.randn(1, 1, 1, 64) * torch.logspace(-9, 4, 64)
    leaf = torch.zeros(1, 1, 1, 64, dtype=dtype).requires_grad_()
    grads = native_impl.backward(
        exact, leaf, leaf, leaf, torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1), None, None,
        summaries=None, scale=1.0, sparse=False, block_size=32, largest_budget=None,
        distance_bias=None, initial_prior_first_n_blocks=0, key_block_size=32,
    )  # fmt: skip
    assert torch.equal(grads[2], exact.to(dtype))


# -- refusals


def test_a_missing_library_is_said_and_auto_takes_torch(monkeypatch):
    def missing():
        raise ImportError("the compiled CPU kernels were not built")

    monkeypatch.setattr(library, "load", missing)
    inputs = make_inputs(1, 1, 64, 16)
    assert implementations.resolve_impl("auto", inputs[0], 32) == "torch"
    with pytest.raises(ValueError, match="the compiled CPU kernels were not built"):
        mra2_attention(*inputs[:3], impl="native")


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "takes float32, bfloat16 and float16, got torch.float64"),
        ({"dim": 257}, "takes head dims up to 256, got 257"),
        ({"block_size": 16}, "takes block_size=32, got 16"),
        ({"key_block_size": 4}, r"takes key_block_size of \(8, 16, 32\), got 4"),
    ],
)
def test_what_it_does_not_cover_is_refused_by_name(changes, message):
    query = torch.zeros(1, 1, 40, changes.get("dim", 8), dtype=changes.get("dtype"))
    size = changes.get("block_size", 32)
    width = changes.get("key_block_size", size)
    with pytest.raises(ValueError, match=message):
        mra2_attention(query, query, query, impl="native", block_size=size, key_block_size=width)
    assert implementations.resolve_impl("auto", query, size, width) == "torch"


@needs_native
def test_auto_takes_it_on_a_cpu():
    assert implementations.resolve_impl("auto", torch.zeros(1, 1, 1, 64), 32) == "native"


@needs_native
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key", torch.zeros(1, 2, 40, 9)),
        ("value", torch.zeros(1, 2, 40, 8, dtype=torch.float64)),
        ("blocks", torch.ones(1, 2, 2, 3, dtype=torch.bool)),
        ("blocks", torch.ones(1, 2, 2, 2, dtype=torch.uint8)),
        ("token_mask", torch.ones(1, 41, dtype=torch.bool)),
        ("distance_bias", torch.zeros(2, 3)),
        ("key_block_size", 4),
        ("key_block_size", 16),  # C is twice that of the blocks
    ],
)
def test_nothing_of_another_shape_or_dtype_reaches_the_library(name, wrong, monkeypatch):
    monkeypatch.setattr(library, "run", lambda *_: pytest.fail("the library was called"))
    x = torch.zeros(1, 2, 40, 8)
    tensors = {"query": x, "key": x, "value": x, "token_mask": None}
    tensors["blocks"] = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    settings = {"summaries": None, "scale": 1.0, "sparse": False, "block_size": 32}
    settings |= {"largest_budget": None, "initial_prior_first_n_blocks": 0, "distance_bias": None}
    settings |= {"key_block_size": 32}
    target = settings if name in settings else tensors
    target[name] = wrong
    named = "blocks" if name == "key_block_size" and wrong == 16 else name
    with pytest.raises(ValueError, match=f"{named} must be"):
        native_impl.forward(*tensors.values(), **settings)


@needs_native
def test_an_instruction_set_that_is_not_here_is_refused():
    with (
        pytest.raises(ValueError, match="must be an instruction set of this machine"),
        native_impl.instruction_set("avx1024"),
    ):
        pass


@needs_native
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(library, "Call", library._Tensor)
    with pytest.raises(ImportError, match="another version"):
        library.load.__wrapped__()


@needs_native
def test_memory_does_not_grow():
    resource = pytest.importorskip("resource")
    inputs = make_inputs(2, 3, 400, 32)
    for number in range(150):
        NATIVE.attend(inputs, block_per_row=2)
        if number == 30:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 8 * 2**10  # kB; one call takes about 3 MB


@needs_native
def test_growing_lengths_do_not_pile_up_buffers():
    resource = pytest.importorskip("resource")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for length in range(4000, 6000, 50):
            x = torch.zeros(1, 1, length, 64)
            mra2_attention(x, x, x, block_per_row=1, impl="native")
            if length == 4000:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finally:
        torch.set_num_threads(threads)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 60 * 2**10  # kB; one call takes about 10 MB


def test_a_library_without_our_functions_is_no_library(monkeypatch):
    monkeypatch.setattr(library, "find", lambda: _ctypes.__file__)
    with pytest.raises(ImportError, match="cannot be loaded"):
        library.load.__wrapped__()


IN_WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from mra_attention import mra2_attention

class Attended(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, number):
        x = torch.randn(1, 4, 200, 16, generator=torch.Generator().manual_seed(number))
        return mra2_attention(x, x, x, block_per_row=2, impl="native")

if __name__ == "__main__":
    here = [Attended()[number] for number in range(2)]  # torch's threads have started
    loader = DataLoader(Attended(), None, num_workers=2, multiprocessing_context=sys.argv[1])
    assert all(torch.equal(x, y) for x, y in zip(loader, here, strict=True))
"""


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_same(method, tmp_path):
    script = tmp_path / "in_workers.py"
    script.write_text(IN_WORKERS, encoding="utf-8")
    subprocess.run([sys.executable, script, method], timeout=200, check=True)


@needs_native
def test_inference_mode_computes_the_same():
    inputs = make_inputs(1, 2, 100, 16)[:3]
    expected = mra2_attention(*inputs, block_per_row=2, impl="native")
    with torch.inference_mode():
        assert torch.equal(mra2_attention(*inputs, block_per_row=2, impl="native"), expected)
