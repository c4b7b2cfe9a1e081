"""What only the torch implementation has: aten's flash operator, scatters, kept buffers."""

from __future__ import annotations

import threading

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    REFERENCE,
    Implementation,
    assert_agrees,
    assert_all_close,
    make_inputs,
    make_mask,
)

from mra_attention import mra2_attention, torch_impl
from mra_attention.torch_impl import sums
from mra_attention.torch_impl.dense import flash_is_available
from mra_attention.torch_impl.scratch import _free
from pairwise import pairwise

TORCH = Implementation("torch")


@pytest.fixture
def without_flash(monkeypatch):
    """The path without aten's private flash operator, as on other devices."""
    monkeypatch.setattr(torch_impl, "flash_is_available", lambda device_type: False)


def test_flash_is_available_here():
    assert flash_is_available("cpu")
    assert not flash_is_available("cuda")


@pairwise(
    size=[(1, 64), (33, 8), (100, 80), (257, 64)],
    budget=[2, 9],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    mask_kind=MASK_KINDS,
    mode=MODES,
)
def test_path_without_flash_agrees_with_reference(
    size, budget, dtype, mask_kind, mode, without_flash
):
    length, dim = size
    inputs, mask = make_inputs(2, 2, length, dim, dtype=dtype), make_mask(mask_kind, 2, length)
    assert_agrees(TORCH, inputs, mask, approx_mode=mode, block_per_row=budget)


@pairwise(mask_kind=MASK_KINDS, sign=[-1, 1], budget=[1, 8])
def test_equal_huge_logits_without_flash_stay_finite(mask_kind, sign, budget, without_flash):
    inputs, mask = make_inputs(2, 2, 70, 16), make_mask(mask_kind, 2, 70)
    inputs[0] = torch.full_like(inputs[0], 50.0)
    inputs[1] = sign * inputs[0]
    results = TORCH.attend(inputs, mask, block_per_row=budget)
    assert all(x.isfinite().all() for x in results)
    expected = REFERENCE.attend(inputs, mask, block_per_row=budget)
    torch.testing.assert_close(results[0], expected[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_agrees_when_gathered_keys_come_in_several_chunks(mode, monkeypatch):
    monkeypatch.setattr(torch_impl, "_GATHER_BYTES", 2**13)
    inputs, mask = make_inputs(2, 2, 257, 16, dtype=torch.float64), make_mask("right", 2, 257)
    assert_agrees(TORCH, inputs, mask, approx_mode=mode, block_per_row=3)


@pytest.mark.parametrize("seed", range(5))
def test_sorted_scatter_adds_what_index_add_adds(seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 9, (40,), generator=generator)
    source = torch.randn(40, 4, 3, generator=generator, dtype=torch.float64)
    start = torch.randn(11, 4, 3, generator=generator, dtype=torch.float64)
    result, expected = start.clone(), start.clone()
    sums.add_sorted_blocks_(result, index, source)
    sums.add_blocks_(expected, index, source)
    assert not torch.equal(expected, start)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_the_sorted_scatter_agree(mode, without_flash, monkeypatch):
    monkeypatch.setattr(torch_impl, "add_blocks_", sums.add_sorted_blocks_)
    inputs, mask = make_inputs(2, 2, 257, 16, dtype=torch.float64), make_mask("holes", 2, 257)
    assert_agrees(TORCH, inputs, mask, approx_mode=mode, block_per_row=3)


def test_what_a_buffer_held_before_changes_nothing():
    """Buffers are kept between calls: NaN in all of them must not reach any result."""
    mask = make_mask("right", 2, 257)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(2, 2, 257, 16, dtype=dtype)
        first = TORCH.attend(inputs, mask, block_per_row=2)
        buffers = [buffer for kept in _free for buffer in kept.values()]
        assert len(buffers) > 5
        for buffer in buffers:
            buffer.fill_(torch.nan)
        assert_all_close(TORCH.attend(inputs, mask, block_per_row=2), first, 0)


def test_buffers_of_an_inference_serve_a_training_step_and_other_threads():
    inputs = make_inputs(1, 2, 300, 16)
    expected = TORCH.attend(inputs, block_per_row=2)

    def in_a_new_thread(results):
        with torch.inference_mode():
            results.append(mra2_attention(*inputs[:3], block_per_row=2, impl="torch"))
        results.extend(TORCH.attend(inputs, block_per_row=2))

    results = [[] for _ in range(4)]
    threads = [threading.Thread(target=in_a_new_thread, args=(x,)) for x in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, [expected[0], *expected])
