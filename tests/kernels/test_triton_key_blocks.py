"""Triton: key blocks narrower than query blocks, in what only the Triton kernels have. Lists and
selection are in `test_triton_selection.py`.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import MODES, assert_all_equal
from triton_cases import (
    TOLERANCES,
    TRITON,
    assert_right,
    assert_right_with_bias,
    needs_triton,
)

from mra_attention import BlockSelection, ops, select_blocks
from pairwise import pairwise

pytestmark = needs_triton

WIDTHS = (16, 8)


def choose(inputs, mask, width, **settings):
    """What the comparisons take: a selection, and the size of its key blocks."""
    selection = select_blocks(*inputs[:2], mask, key_block_size=width, **settings)
    return {"selection": selection, "key_block_size": width}


@pairwise(
    width=WIDTHS,
    dtype=TOLERANCES,
    mode=MODES,
    form_name=["plain", "swapped"],
    query_blocks=[1, 2],
)
def test_every_dtype_mode_and_form(width, dtype, mode, form_name, query_blocks, form, tiles):
    form(form_name)
    tiles(query_blocks)
    inputs, mask = TRITON.inputs(1, 2, 150, 64, dtype=dtype), TRITON.mask("holes", 1, 150)
    choice = choose(inputs, mask, width, block_per_row=2)
    assert_right(inputs, mask, approx_mode=mode, **choice)


@pairwise(
    width=WIDTHS,
    item_blocks=[1, 2, 3],
    mode=MODES,
    query_blocks=[1, 2],
    form_name=["plain", "swapped"],
)
def test_a_bias_with_several_work_items(
    width, item_blocks, mode, query_blocks, form_name, form, tiles
):
    """The first row and column are selected whole: their lists are cut, in both directions."""
    form(form_name)
    tiles(query_blocks, item_blocks=item_blocks)
    inputs, mask = TRITON.inputs(1, 1, 200, 16), TRITON.mask("right", 1, 200)
    bias = TRITON.bias(1, 7)
    settings = {"initial_prior_first_n_blocks": 1, "block_per_row": 4, "distance_bias": bias}
    choice = choose(inputs, mask, width, **settings)
    assert_right_with_bias(inputs, bias, mask, first=1, approx_mode=mode, **choice)


@pairwise(width=WIDTHS, length=[33, 530], mask_kind=["none", "holes"])
def test_the_gradient_of_every_distance_is_there(width, length, mask_kind):
    """All of it coarse: the parts of a square are summed at its distance."""
    rows = -(-length // 32)
    shape = (1, 1, rows, rows * 32 // width)
    nothing = torch.zeros(shape, dtype=torch.bool, device=TRITON.device)
    settings = {"selection": BlockSelection(nothing, 32, width), "key_block_size": width}
    inputs, mask = TRITON.inputs(1, 1, length, 16), TRITON.mask(mask_kind, 1, length)
    assert_right_with_bias(inputs, TRITON.bias(1, rows), mask, first=0, **settings)


@pytest.mark.parametrize("width", WIDTHS)
def test_queries_that_look_at_one_part_of_a_block_reach_that_part_only(width):
    """Each key block of a square has other query blocks: hidden pairs give no gradient."""
    rows, per_block = 5, 32 // width
    row, column = torch.arange(rows)[:, None], torch.arange(rows * per_block)
    blocks = (row == (column + column // per_block) % rows)[None, None].to(TRITON.device)
    inputs = TRITON.inputs(1, 1, 32 * rows, 16)
    selection = BlockSelection(blocks, 32, width)
    for mode in MODES:
        assert_right(inputs, selection=selection, key_block_size=width, approx_mode=mode)
    inputs[3][:, :, 32:] = 0  # gradients of the first query block only
    *_, grad_key, grad_value = TRITON.attend(
        inputs, selection=selection, key_block_size=width, approx_mode="sparse"
    )
    seen = blocks[0, 0, 0].repeat_interleave(width)
    for grad in (grad_key, grad_value):
        assert torch.equal(grad[0, 0].ne(0).any(-1), seen)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_padding_and_scratch_hold_reaches_no_result(width, tiles, fill_scratch):
    tiles(1, item_blocks=1)
    inputs, mask = TRITON.inputs(1, 1, 150, 16), TRITON.mask("holes", 1, 150)
    settings = {"block_per_row": 2, "key_block_size": width}
    expected = TRITON.attend(inputs, mask, **settings)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    fill_scratch()
    assert_all_equal(TRITON.attend(dirty, mask, **settings), expected)


def test_opcheck():
    query, key, value, grad = TRITON.inputs(1, 1, 70, 16)
    mask = TRITON.mask("right", 1, 70)
    bias = TRITON.bias(1, 3)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mra2_summarize, (query, key, value, mask, 8), test_utils=utilities)
    summaries = ops.mra2_summarize(query, key, value, mask, 8)
    numbers = (2, None, 32, 1, 1, "row_normalized", 0.3, "triton", *summaries, bias, 8)
    torch.library.opcheck(ops.mra2_select, (query, key, mask, *numbers), test_utils=utilities)
    blocks = ops.mra2_select(query, key, mask, *numbers)
    assert blocks.shape == (1, 1, 3, 12)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    settings = (mask, blocks, 0.3, False, 32, "triton", 24, *summaries, bias, 1, 8)
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings), test_utils=utilities)
    results = [x.detach() for x in ops.mra2_forward(*inputs, *settings)]
    inputs = [x.detach() for x in inputs]
    arguments = (grad, *inputs, *results, *settings)
    torch.library.opcheck(ops.mra2_backward, arguments, test_utils=utilities)
