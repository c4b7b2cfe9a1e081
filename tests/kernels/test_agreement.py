"""The fast path gives what the reference gives, outputs and gradients, for one BlockSelection."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    MASK_KINDS,
    MODES,
    NAMES,
    assert_all_close,
    assert_as_good_as_eager,
    dense_attention,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)

from mra_attention import BlockSelection, mra2_attention, select_blocks, torch_impl
from mra_attention.torch_impl import scratch
from mra_attention.torch_impl.dense import flash_is_available

LENGTHS = (1, 31, 33, 100, 257, 1000)
DIMS = (8, 32, 64, 80, 128)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
HALF_TYPES = (torch.bfloat16, torch.float16)
IMPLS = ("reference", "torch")


@pytest.fixture
def without_flash(monkeypatch):
    """The fast path without aten's private flash operator, as on other devices."""
    monkeypatch.setattr(torch_impl, "flash_is_available", lambda device_type: False)


def attend(impl, inputs, mask=None, **arguments):
    def attention(query, key, value):
        return mra2_attention(query, key, value, mask, impl=impl, **arguments)

    return outputs_and_gradients(attention, *inputs)


def assert_agreement(inputs, mask, mode, **choice):
    """Both implementations agree on the blocks chosen by `choice`."""
    selection = select_blocks(*inputs[:2], mask, **choice)
    arguments = {"approx_mode": mode, "selection": selection, "block_size": selection.block_size}
    fast = attend("torch", inputs, mask, **arguments)
    expected = attend("reference", inputs, mask, **arguments)
    assert_all_close(fast, expected, TOLERANCES[inputs[0].dtype])


def assert_half_agreement(inputs, mask, mode, **choice):
    """The fast path in a half type errs no more than the reference in the same type does."""
    selection = select_blocks(*inputs[:2], mask, **choice)
    arguments = {"approx_mode": mode, "selection": selection}
    fast = attend("torch", inputs, mask, **arguments)
    eager = attend("reference", inputs, mask, **arguments)
    exact = attend("reference", [x.double() for x in inputs], mask, **arguments)
    for results in zip(fast, eager, exact, strict=True):
        assert_as_good_as_eager(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_path_agrees_with_reference_in_float32(length, dim, mask_kind, mode):
    mask = make_mask(mask_kind, 2, length)
    assert_agreement(make_inputs(2, 1, length, dim), mask, mode, block_per_row=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_path_agrees_with_reference_in_float64(length, mask_kind, mode):
    inputs = make_inputs(2, 2, length, 16, dtype=torch.float64)
    assert_agreement(inputs, make_mask(mask_kind, 2, length), mode, block_per_row=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("length, dim", [(1, 64), (33, 8), (257, 64), (257, 80), (300, 128)])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["bfloat16", "float16"])
def test_fast_path_errs_no_more_than_reference_in_half_types(dtype, length, dim, mask_kind, mode):
    inputs = make_inputs(2, 2, length, dim, dtype=dtype)
    assert_half_agreement(inputs, make_mask(mask_kind, 2, length), mode, block_per_row=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize(
    "choice",
    [
        {"initial_prior_first_n_blocks": 1},
        {"initial_prior_diagonal_n_blocks": 2},
        {"initial_prior_first_n_blocks": 2, "initial_prior_diagonal_n_blocks": 1},
        {"block_budget": 1},
        {"block_budget": 13},
        {"block_budget": 10**6},
        {"selection": "global"},
    ],
    ids=lambda choice: "-".join(f"{name}={given}" for name, given in choice.items()),
)
def test_fast_path_agrees_with_reference_for_every_choice(choice, mask_kind, mode):
    inputs = make_inputs(3, 2, 257, 16, dtype=torch.float64)
    choice = {"block_per_row": 4} | choice
    assert_agreement(inputs, make_mask(mask_kind, 3, 257), mode, **choice)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_both_paths_spend_every_budget_alike(mask_kind, mode):
    inputs = make_inputs(2, 2, 100, 8, dtype=torch.float64)  # 4 block rows
    mask = make_mask(mask_kind, 2, 100)
    budgets = [{"block_per_row": n} for n in range(1, 6)]
    budgets += [{"block_budget": n} for n in (1, 8, 14, 15, 16, 17)]
    for budget in budgets:
        expected = attend("reference", inputs, mask, approx_mode=mode, **budget)
        for impl in ("torch", "auto"):
            given = attend(impl, inputs, mask, approx_mode=mode, **budget)
            assert_all_close(given, expected, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_fast_path_agrees_when_rows_have_no_block_or_all_blocks(mode):
    inputs = make_inputs(1, 1, 150, 16, dtype=torch.float64)
    blocks = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    blocks[..., 1, :] = True
    blocks[..., 3, 2] = True
    mask = make_mask("holes", 1, 150)  # block 1 holds no real token
    for some_mask in (None, mask):
        arguments = {"approx_mode": mode, "selection": BlockSelection(blocks, 32)}
        fast = attend("torch", inputs, some_mask, **arguments)
        assert_all_close(fast, attend("reference", inputs, some_mask, **arguments), 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_fast_path_agrees_when_gathered_keys_come_in_several_pieces(mode, monkeypatch):
    monkeypatch.setattr(torch_impl, "_GATHER_BYTES", 2**13)
    inputs = make_inputs(2, 2, 257, 16, dtype=torch.float64)
    assert_agreement(inputs, make_mask("right", 2, 257), mode, block_per_row=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_fast_path_agrees_with_reference_at_other_block_sizes(block_size, mode):
    inputs = make_inputs(2, 2, 257, 16, dtype=torch.float64)
    mask = make_mask("holes", 2, 257)
    assert_agreement(inputs, mask, mode, block_per_row=2, block_size=block_size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_transposed_inputs_and_gradients_give_the_same_result(mask_kind, mode):
    inputs = make_inputs(2, 3, 100, 32)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not transposed[0].is_contiguous()
    mask = make_mask(mask_kind, 2, 100)
    for impl in IMPLS:
        for budget in (2, 8):
            arguments = {"approx_mode": mode, "block_per_row": budget}
            expected = attend(impl, inputs, mask, **arguments)
            assert_all_close(attend(impl, transposed, mask, **arguments), expected, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [2, 8])
def test_an_expanded_gradient_is_accepted(budget, mode):
    *inputs, _ = make_inputs(2, 2, 100, 32)
    expanded = torch.ones(()).expand(inputs[0].shape)  # what `output.sum().backward()` passes
    arguments = {"approx_mode": mode, "block_per_row": budget}
    fast = attend("torch", [*inputs, expanded], **arguments)
    expected = attend("torch", [*inputs, expanded.contiguous()], **arguments)
    assert_all_close(fast, expected, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("length", [1, 33, 100, 257])
@pytest.mark.parametrize("impl", IMPLS)
def test_full_budget_is_dense_attention(impl, length, mask_kind, mode):
    inputs = make_inputs(2, 2, length, 16)
    mask = make_mask(mask_kind, 2, length)

    def dense(query, key, value):
        return dense_attention(query, key, value, mask)

    expected = outputs_and_gradients(dense, *inputs)
    n_blocks = (length + 31) // 32
    everything = select_blocks(*inputs[:2], mask, block_per_row=n_blocks)
    for choice in (
        {"block_per_row": n_blocks},
        {"block_budget": n_blocks**2},
        {"selection": everything},
    ):
        given = attend(impl, inputs, mask, approx_mode=mode, **choice)
        assert_all_close(given, expected, 1e-5)


@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["bfloat16", "float16"])
def test_full_budget_in_half_types_errs_no_more_than_reference(dtype, mask_kind):
    inputs = make_inputs(2, 2, 100, 64, dtype=dtype)
    mask = make_mask(mask_kind, 2, 100)
    fast, eager = attend("torch", inputs, mask), attend("reference", inputs, mask)
    exact = attend("reference", [x.double() for x in inputs], mask)
    for results in zip(fast, eager, exact, strict=True):
        assert_as_good_as_eager(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("length, dim", [(1, 64), (33, 8), (100, 80), (257, 32)])
def test_path_without_flash_agrees_with_reference(length, dim, mask_kind, mode, without_flash):
    mask = make_mask(mask_kind, 2, length)
    for dtype in TOLERANCES:
        inputs = make_inputs(2, 2, length, dim, dtype=dtype)
        assert_agreement(inputs, mask, mode, block_per_row=2)
        arguments = {"approx_mode": mode, "block_per_row": 9}  # dense
        fast = attend("torch", inputs, mask, **arguments)
        assert_all_close(fast, attend("reference", inputs, mask, **arguments), TOLERANCES[dtype])


@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["bfloat16", "float16"])
def test_path_without_flash_errs_no_more_than_reference(dtype, mask_kind, without_flash):
    inputs = make_inputs(2, 2, 257, 64, dtype=dtype)
    assert_half_agreement(inputs, make_mask(mask_kind, 2, 257), "full", block_per_row=2)


def test_flash_is_available_here():
    assert flash_is_available("cpu")
    assert not flash_is_available("cuda")


@pytest.mark.parametrize("seed", range(5))
def test_sorted_scatter_adds_what_index_add_adds(seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 9, (40,), generator=generator)
    source = torch.randn(40, 4, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(11, 4, 3, generator=generator, dtype=torch.float64)
    given, expected = start.clone(), start.clone()
    torch_impl.add_sorted_blocks_(given, index, source)
    torch_impl.add_blocks_(expected, index, source)
    assert not torch.equal(expected, start)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_the_sorted_scatter_agree_with_reference(
    mode, without_flash, monkeypatch
):
    monkeypatch.setattr(torch_impl, "add_blocks_", torch_impl.add_sorted_blocks_)
    inputs = make_inputs(2, 2, 257, 16, dtype=torch.float64)
    assert_agreement(inputs, make_mask("holes", 2, 257), mode, block_per_row=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_fast_path_agrees_with_reference_on_a_gpu(mask_kind, mode):
    inputs = [x.cuda() for x in make_inputs(2, 2, 257, 64, dtype=torch.float64)]
    mask = make_mask(mask_kind, 2, 257)
    assert_agreement(inputs, None if mask is None else mask.cuda(), mode, block_per_row=2)


def test_comparison_sees_a_wrong_gradient():
    results = make_inputs(1, 1, 4, 4)
    for i, name in enumerate(NAMES):
        wrong = [x + 1e-3 * (i == j) for j, x in enumerate(results)]
        with pytest.raises(AssertionError, match=name):
            assert_all_close(wrong, results, 1e-5)


def sharp_inputs(dtype):
    """Three times larger logits: what is rounded too early shows in the gradients."""
    query, key, value, grad = make_inputs(2, 2, 257, 80)
    return [x.to(dtype) for x in (3 * query, 3 * key, value, grad)]


def relative_errors(given, inputs, **choice):
    exact = attend("reference", [x.double() for x in inputs], **choice)
    return [
        (x.double() - truth).norm() / truth.norm() for x, truth in zip(given, exact, strict=True)
    ]


@pytest.mark.parametrize("block_per_row", [2, 16])
def test_float16_loses_no_digits_to_sharp_logits(block_per_row):
    inputs = sharp_inputs(torch.float16)
    choice = {"selection": select_blocks(*inputs[:2], block_per_row=block_per_row)}
    fast, eager = (
        relative_errors(attend(impl, inputs, **choice), inputs, **choice)
        for impl in ("torch", "reference")
    )
    for ours, theirs in zip(fast, eager, strict=True):
        assert ours <= 1.02 * theirs


@pytest.mark.parametrize("block_per_row", [2, 16])
def test_bfloat16_errs_no_more_than_dense_attention_in_bfloat16(block_per_row):
    """On a CPU bfloat16 operands are multiplied as such, as dense attention does."""
    inputs = sharp_inputs(torch.bfloat16)
    choice = {"selection": select_blocks(*inputs[:2], block_per_row=block_per_row)}
    ours = relative_errors(attend("torch", inputs, **choice), inputs, **choice)
    everything = {"selection": select_blocks(*inputs[:2], block_per_row=9)}
    dense = outputs_and_gradients(F.scaled_dot_product_attention, *inputs)
    for error, theirs in zip(ours, relative_errors(dense, inputs, **everything), strict=True):
        # The exact and the coarse part are rounded one after the other: at most twice as often.
        assert error <= 1.5 * theirs


def test_a_ready_selection_stands_for_its_own_budget_and_priors():
    inputs = make_inputs(2, 2, 200, 16)
    choice = {"block_budget": 9, "initial_prior_first_n_blocks": 1}
    selection = select_blocks(*inputs[:2], **choice)
    for impl in IMPLS:
        chosen = attend(impl, inputs, selection=selection)
        for beside in (choice, {"block_per_row": 1}):
            again = attend(impl, inputs, selection=selection, **beside)
            assert all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))


def test_what_a_buffer_held_before_changes_nothing():
    """Buffers are kept between calls: NaN in all of them must not reach any result."""
    mask = make_mask("right", 2, 257)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(2, 2, 257, 16, dtype=dtype)
        first = attend("torch", inputs, mask, block_per_row=2)
        buffers = scratch._kept.buffers.values()
        assert len(buffers) > 5
        for buffer in buffers:
            buffer.fill_(torch.nan)
        assert_all_close(attend("torch", inputs, mask, block_per_row=2), first, 0)


def test_buffers_of_an_inference_serve_a_training_step_and_other_threads():
    inputs = make_inputs(1, 2, 300, 16)
    expected = attend("torch", inputs, block_per_row=2)

    def in_a_new_thread(results):
        with torch.inference_mode():
            results.append(mra2_attention(*inputs[:3], block_per_row=2, impl="torch"))
        results.extend(attend("torch", inputs, block_per_row=2))

    results = [[] for _ in range(4)]
    threads = [threading.Thread(target=in_a_new_thread, args=(x,)) for x in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, [expected[0], *expected])
