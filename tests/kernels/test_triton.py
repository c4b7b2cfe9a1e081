"""What only the Triton kernels have: forms, work items, tiles, scratch, launches; on a GPU, or on a
CPU in Triton's interpreter. What they share with the other implementations is in
`test_agreement.py` and `test_properties.py`.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    INTERPRETED,
    MODES,
    NAMES,
    REFERENCE,
    Implementation,
    assert_all_close,
    assert_all_equal,
)
from triton_cases import (
    BEYOND_A_TILE,
    TOLERANCES,
    TRITON,
    assert_right,
    needs_triton,
    only_on_a_gpu,
)

from mra_attention import BlockSelection, implementations, ops, select_blocks
from mra_attention.triton_impl import launching
from pairwise import pairwise

pytestmark = needs_triton


@pytest.fixture
def tiles(table, two_query_blocks):
    """Let one query block or two own a tile, and change entries of the table."""
    return lambda query_blocks, **entries: {1: table, 2: two_query_blocks}[query_blocks](**entries)


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
def test_what_padding_and_scratch_hold_reaches_no_result(query_blocks, tiles, monkeypatch):
    from mra_attention.triton_impl.call import KernelCall

    tiles(query_blocks, item_blocks=1)
    inputs = TRITON.inputs(1, 1, 150, 16)
    mask = TRITON.mask("holes", 1, 150)
    expected = TRITON.attend(inputs, mask, block_per_row=2)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    original = KernelCall.empty

    def filled(self, shape, dtype=torch.float32):
        x = original(self, shape, dtype)
        return x.fill_(torch.nan) if dtype.is_floating_point else x.fill_(-1)

    monkeypatch.setattr(KernelCall, "empty", filled)
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
    grads = ops.mra2_backward(grad, query, key, value, *results, *settings)
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
