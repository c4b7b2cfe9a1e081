"""What only the Triton kernels have: forms, work items, tiles, scratch, launches; on a GPU, or on a
CPU in Triton's interpreter. What they share with the other implementations is in
`test_agreement.py` and `test_properties.py`.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    INTERPRETED,
    MASK_KINDS,
    MODES,
    NAMES,
    REFERENCE,
    Implementation,
    assert_all_close,
    assert_all_equal,
    attend_with_bias,
)
from triton_cases import (
    BEYOND_A_TILE,
    TOLERANCES,
    TRITON,
    assert_right,
    assert_right_with_bias,
    needs_triton,
    only_on_a_gpu,
)

from mra_attention import BlockSelection, blocks, implementations, ops, select_blocks
from mra_attention.triton_impl import launching
from pairwise import pairwise

pytestmark = needs_triton


@pairwise(dtype=TOLERANCES, mode=MODES, form_name=["plain", "swapped"], query_blocks=[1, 2])
def test_every_dtype_mode_and_form(dtype, mode, form_name, query_blocks, form, tiles):
    form(form_name)
    tiles(query_blocks)
    inputs = TRITON.inputs(1, 2, 150, 64, dtype=dtype)
    assert_right(inputs, TRITON.mask("holes", 1, 150), block_per_row=2, approx_mode=mode)


@pairwise(item_blocks=[1, 2, 3], mode=MODES, query_blocks=[1, 2], form_name=["plain", "swapped"])
def test_blocks_with_several_work_items(item_blocks, mode, query_blocks, form_name, form, tiles):
    """The first row and column are selected whole: their lists are cut, in both directions."""
    form(form_name)
    tiles(query_blocks, item_blocks=item_blocks)
    inputs = TRITON.inputs(1, 1, 200, 16)
    mask = TRITON.mask("right", 1, 200)
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3}
    assert_right(inputs, mask, block_per_row=4, approx_mode=mode, **priors)


@pytest.mark.parametrize(("mode", "query_blocks"), [("full", 1), ("sparse", 1), ("full", 2)])
def test_more_blocks_than_a_tile(mode, query_blocks, tiles):
    tiles(query_blocks, item_blocks=4)
    inputs = TRITON.inputs(1, 1, BEYOND_A_TILE[0], 16)
    mask = TRITON.mask("holes", 1, BEYOND_A_TILE[0])
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    assert_right(inputs, mask, block_per_row=5, approx_mode=mode, **priors)


def test_offsets_beyond_2_31_elements():
    """Two samples that lie 2^31 elements apart in one buffer."""
    try:
        buffer = torch.empty(2**31 + 2**16, dtype=torch.float16, device=TRITON.device)
    except (RuntimeError, MemoryError):
        pytest.skip("4 GiB of (mostly untouched) memory cannot be had here")
    inputs = TRITON.inputs(2, 1, 40, 16, dtype=torch.float16)
    apart = []
    for i, x in enumerate(inputs[:3]):
        view = buffer[1024 * i :].as_strided((2, 1, 40, 16), (2**31, 640, 16, 1))
        apart.append(view.copy_(x))
    expected = TRITON.attend(inputs, block_per_row=1)
    assert_all_equal(TRITON.attend([*apart, inputs[3]], block_per_row=1), expected)


@pytest.mark.parametrize("query_blocks", [1, 2])
def test_what_padding_and_scratch_hold_reaches_no_result(query_blocks, tiles, fill_scratch):
    tiles(query_blocks, item_blocks=1)
    inputs = TRITON.inputs(1, 1, 150, 16)
    mask = TRITON.mask("holes", 1, 150)
    expected = TRITON.attend(inputs, mask, block_per_row=2)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    fill_scratch()
    assert_all_equal(TRITON.attend(dirty, mask, block_per_row=2), expected)


@pytest.mark.parametrize("name", NAMES[1:])
def test_nan_in_a_real_token_passes_through_merged_work_items(name, table):
    table(item_blocks=1)
    inputs = TRITON.inputs(2, 1, 100, 16)
    selection = select_blocks(*inputs[:2], block_per_row=2)
    inputs[NAMES.index(name) - 1][0, 0, 70, 3] = torch.nan
    results, expected = (impl.attend(inputs, selection=selection) for impl in (TRITON, REFERENCE))
    assert torch.equal(results[0].isnan(), expected[0].isnan()) and results[0].isnan().any()


def test_two_runs_of_the_radix_selection_give_the_same_bits(table):
    table(item_blocks=2, topk_up_to_rows=0)
    inputs = TRITON.inputs(1, 2, 150, 32, dtype=torch.bfloat16)
    first, second = (TRITON.attend(inputs, block_per_row=2) for _ in range(2))
    assert_all_equal(first, second)


# -- distance bias


@pairwise(dtype=TOLERANCES, mode=MODES, form_name=["plain", "swapped"], query_blocks=[1, 2])
def test_a_bias_in_every_dtype_mode_and_form(dtype, mode, form_name, query_blocks, form, tiles):
    form(form_name)
    tiles(query_blocks)
    inputs = TRITON.inputs(1, 2, 150, 64, dtype=dtype)
    mask = TRITON.mask("holes", 1, 150)
    assert_right_with_bias(inputs, TRITON.bias(2, 5), mask, block_per_row=2, approx_mode=mode)


@pairwise(item_blocks=[1, 2, 3], mode=MODES, query_blocks=[1, 2], form_name=["plain", "swapped"])
def test_a_bias_with_several_work_items(item_blocks, mode, query_blocks, form_name, form, tiles):
    form(form_name)
    tiles(query_blocks, item_blocks=item_blocks)
    inputs = TRITON.inputs(1, 1, 200, 16)
    mask = TRITON.mask("right", 1, 200)
    settings = {"first": 1, "block_per_row": 4, "approx_mode": mode}
    assert_right_with_bias(inputs, TRITON.bias(1, 7), mask, **settings)


@pairwise(
    length=[1, 33, 65, 200], mask_kind=MASK_KINDS, mode=MODES, first=[0, 1, 2], query_blocks=[1, 2]
)
def test_a_bias_at_ragged_lengths_and_with_masks(
    length, mask_kind, mode, first, query_blocks, tiles
):
    """Global blocks are the first live ones, wherever padding lies."""
    tiles(query_blocks)
    inputs = TRITON.inputs(2, 1, length, 16)
    mask = TRITON.mask(mask_kind, 2, length)
    settings = {"first": first, "block_per_row": 2, "approx_mode": mode}
    assert_right_with_bias(inputs, TRITON.bias(1, 7), mask, **settings)


def test_a_bias_of_more_blocks_than_a_tile(table):
    """And of more selected pairs than are summed at a time."""
    table(item_blocks=4)
    inputs = TRITON.inputs(1, 1, 1100, 16)
    mask = TRITON.mask("holes", 1, 1100)
    assert_right_with_bias(inputs, TRITON.bias(1, 35), mask, first=1, block_per_row=5)


@pytest.mark.parametrize("length", [33, 512, 545])
def test_the_gradient_of_every_distance_is_there(length):
    """Where the last tile of block rows is full, and where it is not; all of it coarse."""
    rows = blocks.count_blocks(length, 32)
    nothing = torch.zeros(1, 1, rows, rows, dtype=torch.bool, device=TRITON.device)
    inputs = TRITON.inputs(1, 1, length, 16)
    settings = {"first": 0, "selection": BlockSelection(nothing, 32)}
    assert_right_with_bias(inputs, TRITON.bias(1, rows), None, **settings)


@pytest.mark.parametrize("distances", [1, 3, 4, 9])
def test_a_bias_of_fewer_or_more_distances_than_blocks(distances):
    """Its last column is for all larger distances, and sums their gradients."""
    inputs = TRITON.inputs(1, 2, 100, 16)
    bias = TRITON.bias(4, 2 * distances)[::2, 1::2]  # not contiguous
    results = assert_right_with_bias(inputs, bias, None, first=1, block_per_row=2)
    assert not results[4][:, 4:].any()


def test_every_live_pair_with_a_bias():
    """More per row than there are blocks: no selection is made, and lists have room for all."""
    inputs = TRITON.inputs(2, 1, 130, 16)
    mask = TRITON.mask("left", 2, 130)
    bias = TRITON.bias(1, 5)
    settings = {"block_per_row": 8, "initial_prior_first_n_blocks": 1}
    results = attend_with_bias(TRITON, inputs, bias, mask, **settings)
    expected = attend_with_bias(REFERENCE, inputs, bias, mask, **settings)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_blocks", [1, 2])
def test_with_a_bias_what_padding_and_scratch_hold_reaches_no_result(
    query_blocks, tiles, fill_scratch
):
    tiles(query_blocks, item_blocks=1)
    inputs = TRITON.inputs(1, 1, 150, 16)
    mask = TRITON.mask("holes", 1, 150)
    bias = TRITON.bias(1, 5)
    settings = {"block_per_row": 2, "initial_prior_first_n_blocks": 1}
    expected = attend_with_bias(TRITON, inputs, bias, mask, **settings)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    fill_scratch()
    results = attend_with_bias(TRITON, dirty, bias, mask, **settings)
    assert all(map(torch.equal, results, expected))


def test_two_runs_with_a_bias_give_the_same_bits(table):
    table(item_blocks=2, topk_up_to_rows=0, recompute_from_length=0)
    inputs = TRITON.inputs(2, 1, 100, 32, dtype=torch.bfloat16)
    bias, settings = TRITON.bias(1, 4), {"block_per_row": 2, "initial_prior_first_n_blocks": 1}
    first, second = (attend_with_bias(TRITON, inputs, bias, **settings) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_kernels_for_the_bias_are_launched_where_there_is_one(monkeypatch):
    inputs = TRITON.inputs(1, 1, 100, 16)
    launched = []
    launch = launching.launch

    def counted(kernel, *arguments, **settings):
        launched.append(kernel.__name__ if INTERPRETED else kernel.fn.__name__)
        return launch(kernel, *arguments, **settings)

    monkeypatch.setattr(launching, "launch", counted)
    TRITON.attend(inputs, block_per_row=2)
    without = launched[:]
    launched.clear()
    attend_with_bias(TRITON, inputs, TRITON.bias(1, 4), block_per_row=2)
    of_bias = ("biased_from_kernel", "diagonal_kernel", "bias_gradient_kernel")
    assert [launched.count(name) for name in of_bias] == [3, 1, 1]
    assert [name for name in launched if name not in of_bias] == without


# -- operators


def test_opcheck():
    query, key, value, grad = TRITON.inputs(1, 1, 70, 16)
    mask = TRITON.mask("right", 1, 70)
    numbers = (2, None, 32, 1, 1, "row_normalized", 0.3, "triton")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mra2_summarize, (query, key, value, mask), test_utils=utilities)
    summaries = ops.mra2_summarize(query, key, value, mask)
    numbers += summaries
    torch.library.opcheck(ops.mra2_select, (query, key, mask, *numbers), test_utils=utilities)
    blocks = ops.mra2_select(query, key, mask, *numbers)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    settings = (mask, blocks, 0.3, False, 32, "triton", 6, *summaries)
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings), test_utils=utilities)
    results = [x.detach() for x in ops.mra2_forward(*inputs, *settings)]
    inputs = [x.detach() for x in inputs]
    arguments = (grad, *inputs, *results, *settings)
    torch.library.opcheck(ops.mra2_backward, arguments, test_utils=utilities)


def test_opcheck_with_a_distance_bias():
    query, key, value, grad = TRITON.inputs(1, 1, 70, 16)
    mask = TRITON.mask("left", 1, 70)
    bias = TRITON.bias(1, 3)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    numbers = (2, None, 32, 1, 0, "row_normalized", 0.3, "triton", None, None, bias)
    torch.library.opcheck(ops.mra2_select, (query, key, mask, *numbers), test_utils=utilities)
    blocks = ops.mra2_select(query, key, mask, *numbers)
    settings = (mask, blocks, 0.3, False, 32, "triton", 6, None, None)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with_bias = (*inputs, *settings, bias.requires_grad_(), 1)
    torch.library.opcheck(ops.mra2_forward, with_bias, test_utils=utilities)
    results = [x.detach() for x in ops.mra2_forward(*with_bias)]
    inputs = [x.detach() for x in inputs]
    arguments = (grad, *inputs, *results, *settings, bias.detach(), 1)
    torch.library.opcheck(ops.mra2_backward, arguments, test_utils=utilities)


def test_summaries_are_computed_once_and_change_nothing(monkeypatch):
    """For selection, forward and backward of a call; an operator without them computes its own."""
    query, key, value, grad = TRITON.inputs(2, 2, 130, 40)
    mask = TRITON.mask("holes", 2, 130)
    launched = []
    launch = launching.launch

    def counted(kernel, *arguments, **settings):
        launched.append(kernel.__name__ if INTERPRETED else kernel.fn.__name__)
        return launch(kernel, *arguments, **settings)

    monkeypatch.setattr(launching, "launch", counted)
    expected = TRITON.attend((query, key, value, grad), mask, block_per_row=2)
    assert launched.count("pool_kernel") == 1

    numbers = (2, None, 32, 0, 0, "row_normalized", 40**-0.5, "triton")
    blocks = ops.mra2_select(query, key, mask, *numbers)
    settings = (mask, blocks, 40**-0.5, False, 32, "triton", 10)
    results = ops.mra2_forward(query, key, value, *settings)
    *grads, _ = ops.mra2_backward(grad, query, key, value, *results, *settings)
    assert launched.count("pool_kernel") == 4
    assert_all_equal((results[0], *grads), expected)


# -- on a GPU only


@only_on_a_gpu
@pytest.mark.parametrize("length", [513, 4096, 33000])
def test_long_sequences(length):
    """Selections agree in 99.9 % of the blocks; results are compared with the torch path."""
    inputs = TRITON.inputs(1, 2, length, 64)
    settings = (None, 4, None, 32, 0, 0, "row_normalized", 64**-0.5)
    selection = BlockSelection(ops.mra2_select(*inputs[:2], *settings), 32)
    both = (select_blocks(*inputs[:2], block_per_row=4).blocks & selection.blocks).sum()
    assert both >= 0.999 * selection.blocks.sum()
    results = TRITON.attend(inputs, selection=selection)
    expected = Implementation("torch").attend([x.double() for x in inputs], selection=selection)
    for x, y in zip(results, expected, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


@only_on_a_gpu
def test_auto_takes_the_torch_path_where_triton_is_missing(monkeypatch):
    inputs = TRITON.inputs(1, 2, 200, 64)
    assert implementations.resolve_impl("auto", inputs[0], 32) == "triton"
    monkeypatch.setattr(implementations, "_IS_INSTALLED", False)
    assert implementations.resolve_impl("auto", inputs[0], 32) == "torch"
    results = Implementation("auto").attend(inputs, block_per_row=2)
    assert_all_close(results, REFERENCE.attend(inputs, block_per_row=2), 1e-4)


@only_on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_the_device_of_the_tensors():
    inputs = TRITON.inputs(1, 2, 200, 64)
    results = []
    for device in ("cuda:0", "cuda:1"):  # whichever is current
        results.append([x.cpu() for x in TRITON.attend([x.to(device) for x in inputs])])
    assert_all_equal(*results)
