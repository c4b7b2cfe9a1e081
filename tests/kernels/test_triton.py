"""The Triton kernels against the definition: on a card, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    NAMES,
    Attention,
    assert_exports_no_operator_of_ours,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)
from torch.utils.checkpoint import checkpoint
from triton_cases import (
    BEYOND_A_TILE,
    DEVICE,
    INTERPRETED,
    TOLERANCES,
    assert_right,
    mask_on_device,
    needs_a_place,
    on_device,
    only_on_a_card,
    run,
)

from mra_attention import BlockSelection, mra2_attention, ops, select_blocks
from mra_attention.triton_impl import launching

pytestmark = needs_a_place


@pytest.mark.parametrize("form_name", ["plain", "swapped"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_dtype_mode_and_form(dtype, mode, form_name, form):
    form(form_name)
    inputs = on_device(make_inputs(1, 2, 150, 64, dtype=dtype))
    assert_right(inputs, mask_on_device("holes", 1, 150), block_per_row=2, approx_mode=mode)


@pytest.mark.parametrize("length", [1, 31, 33, 100, 256])
def test_ragged_lengths(length):
    assert_right(on_device(make_inputs(1, 1, length, 32)), None, block_per_row=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_masks(mask_kind, mode):
    inputs = on_device(make_inputs(2, 1, 100, 16))
    mask = mask_on_device(mask_kind, 2, 100)
    results = assert_right(inputs, mask, block_per_row=1, approx_mode=mode)
    if mask is not None:
        for result in results:
            assert not result.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("dim", [16, 40, 80, 128])
def test_head_dims(dim):
    assert_right(on_device(make_inputs(1, 1, 70, dim)), None, block_per_row=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("item_blocks", [1, 2, 3])
def test_blocks_with_several_work_items(item_blocks, mode, table):
    """The first row and column are selected whole: their lists are cut, in both directions."""
    table(item_blocks=item_blocks)
    inputs = on_device(make_inputs(1, 1, 200, 16))
    mask = mask_on_device("right", 1, 200)
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3}
    assert_right(inputs, mask, block_per_row=4, approx_mode=mode, **priors)


@pytest.mark.parametrize("mode", MODES)
def test_more_blocks_than_a_tile(mode, table):
    table(item_blocks=4)
    inputs = on_device(make_inputs(1, 1, BEYOND_A_TILE[0], 16))
    mask = mask_on_device("holes", 1, BEYOND_A_TILE[0])
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    assert_right(inputs, mask, block_per_row=5, approx_mode=mode, **priors)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_any_block_and_with_all(mode):
    blocks = torch.zeros(1, 2, 4, 4, dtype=torch.bool, device=DEVICE)
    blocks[:, 0, 1] = True
    blocks[:, 1, :, 2] = True
    chosen = BlockSelection(blocks, 32)
    inputs = on_device(make_inputs(1, 2, 110, 16))
    assert_right(inputs, None, selection=chosen, approx_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_transposed_inputs_and_gradient(mode):
    inputs = on_device(make_inputs(2, 2, 70, 32))
    expected = run("triton", inputs, block_per_row=1, approx_mode=mode)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    for x, y in zip(
        run("triton", turned, block_per_row=1, approx_mode=mode), expected, strict=True
    ):
        assert torch.equal(x, y)


def test_offsets_beyond_2_31_elements():
    """Two samples that lie 2^31 elements apart in one buffer."""
    try:
        buffer = torch.empty(2**31 + 2**16, dtype=torch.float16, device=DEVICE)
    except (RuntimeError, MemoryError):
        pytest.skip("4 GiB of (mostly untouched) memory cannot be had here")
    inputs = on_device(make_inputs(2, 1, 40, 16, dtype=torch.float16))
    apart = []
    for i, x in enumerate(inputs[:3]):
        view = buffer[1024 * i :].as_strided((2, 1, 40, 16), (2**31, 640, 16, 1))
        apart.append(view.copy_(x))
    expected = run("triton", inputs, block_per_row=1)
    for x, y in zip(run("triton", [*apart, inputs[3]], block_per_row=1), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("query_blocks", [1, 2])
def test_what_padding_and_scratch_hold_reaches_no_result(
    query_blocks, table, two_query_blocks, monkeypatch
):
    from mra_attention.triton_impl.call import KernelCall

    (table if query_blocks == 1 else two_query_blocks)(item_blocks=1)
    inputs = on_device(make_inputs(1, 1, 150, 16))
    mask = mask_on_device("holes", 1, 150)
    expected = run("triton", inputs, mask, block_per_row=2)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    original = KernelCall.empty

    def filled(self, shape, dtype=torch.float32):
        x = original(self, shape, dtype)
        return x.fill_(torch.nan) if dtype.is_floating_point else x.fill_(-1)

    monkeypatch.setattr(KernelCall, "empty", filled)
    for x, y in zip(run("triton", dirty, mask, block_per_row=2), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("place", NAMES[1:])
def test_nan_in_a_real_token_is_not_hidden(place, table):
    """As by the definition: the row of a query, every row of a sample for a key or value."""
    table(item_blocks=1)
    inputs = on_device(make_inputs(2, 1, 100, 16))
    chosen = select_blocks(*inputs[:2], block_per_row=2)
    inputs[NAMES.index(place) - 1][0, 0, 70, 3] = torch.nan
    given, expected = (run(impl, inputs, selection=chosen) for impl in ("triton", "reference"))
    assert torch.equal(given[0].isnan(), expected[0].isnan()) and given[0].isnan().any()
    for x, y in zip(given, expected, strict=True):  # a gradient spreads over the rest of its block
        assert not (y.isnan() & ~x.isnan()).any()


def test_two_runs_give_the_same_bits(table):
    table(item_blocks=2, topk_up_to_rows=0)
    inputs = on_device(make_inputs(1, 2, 150, 32, dtype=torch.bfloat16))
    first, second = (run("triton", inputs, block_per_row=2) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


# -- guarantees, as in test_properties.py


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (0, 60), (32, 0), (64, 17)])
def test_padding_around_changes_nothing(before, after, mode):
    inputs = make_inputs(2, 1, 70, 16)
    mask = make_mask("holes", 2, 70)
    arguments = {"approx_mode": mode, "block_per_row": 2, "initial_prior_first_n_blocks": 1}
    expected = run("triton", on_device(inputs), mask.to(DEVICE), **arguments)
    around = [torch.nn.functional.pad(x, (0, 0, before, after), value=50.0) for x in inputs]
    mask = torch.nn.functional.pad(mask, (before, after)).to(DEVICE)
    given = run("triton", on_device(around), mask, **arguments)
    for x, y in zip(given, expected, strict=True):
        assert torch.equal(x[:, :, before : before + 70], y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_batch_neighbours_change_nothing(mask_kind, mode):
    inputs, mask = on_device(make_inputs(3, 2, 100, 16)), mask_on_device(mask_kind, 3, 100)
    together = run("triton", inputs, mask, approx_mode=mode, block_per_row=2)
    for i in range(3):
        some = slice(i, i + 1)
        alone_mask = None if mask is None else mask[some]
        alone = run(
            "triton", [x[some] for x in inputs], alone_mask, approx_mode=mode, block_per_row=2
        )
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[some], y)


def test_under_autocast_inputs_are_those_cast_by_hand():
    query, key, value, grad = on_device(make_inputs(1, 2, 100, 16))
    cast = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    expected = mra2_attention(*cast, block_per_row=2, impl="triton")
    expected_grads = torch.autograd.grad(expected, cast, grad.bfloat16())
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = mra2_attention(*inputs, block_per_row=2, impl="triton")
        grads = torch.autograd.grad(output, inputs, grad.bfloat16())
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    for x, y in zip(grads, expected_grads, strict=True):
        assert torch.equal(x, y.float())


# -- operators


def settings_of_operators(mask, blocks):
    return (mask, blocks, 0.3, False, 32, "triton", 6)


def test_opcheck():
    query, key, value, grad = on_device(make_inputs(1, 1, 70, 16))
    mask = mask_on_device("right", 1, 70)
    numbers = (2, None, 32, 1, 1, "row_normalized", 0.3, "triton")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mra2_summarize, (query, key, value, mask), test_utils=utilities)
    summaries = ops.mra2_summarize(query, key, value, mask)
    numbers += summaries
    torch.library.opcheck(ops.mra2_select, (query, key, mask, *numbers), test_utils=utilities)
    blocks = ops.mra2_select(query, key, mask, *numbers)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    settings = (*settings_of_operators(mask, blocks), *summaries)
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings), test_utils=utilities)
    results = [x.detach() for x in ops.mra2_forward(*inputs, *settings)]
    inputs = [x.detach() for x in inputs]
    arguments = (grad, *inputs, *results, *settings)
    torch.library.opcheck(ops.mra2_backward, arguments, test_utils=utilities)


def test_summaries_are_computed_once_and_change_nothing(monkeypatch):
    """For selection, forward and backward of a call; an operator without them computes its own."""
    query, key, value, grad = on_device(make_inputs(2, 2, 130, 40))
    mask = mask_on_device("holes", 2, 130)
    launched = []
    launch = launching.launch

    def counted(kernel, *arguments, **settings):
        launched.append(kernel.__name__ if INTERPRETED else kernel.fn.__name__)
        return launch(kernel, *arguments, **settings)

    monkeypatch.setattr(launching, "launch", counted)
    given = run("triton", (query, key, value, grad), mask, block_per_row=2)
    assert launched.count("pool_kernel") == 1

    numbers = (2, None, 32, 0, 0, "row_normalized", 40**-0.5, "triton")
    blocks = ops.mra2_select(query, key, mask, *numbers)
    settings = (mask, blocks, 40**-0.5, False, 32, "triton", 10)
    results = ops.mra2_forward(query, key, value, *settings)
    grads = ops.mra2_backward(grad, query, key, value, *results, *settings)
    assert launched.count("pool_kernel") == 4
    for name, x, y in zip(NAMES, given, (results[0], *grads), strict=True):
        assert torch.equal(x, y), name


def test_compiles_as_one_graph_and_checkpoints():
    inputs = on_device(make_inputs(1, 1, 70, 16, dtype=torch.bfloat16))
    expected = run("triton", inputs, block_per_row=1)

    def attention(query, key, value):
        return mra2_attention(query, key, value, block_per_row=1, impl="triton")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

    def checkpointed(*args):
        return checkpoint(attention, *args, use_reentrant=False)

    for function in (compiled, checkpointed):
        for x, y in zip(outputs_and_gradients(function, *inputs), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_module_gives_what_the_kernels_give(mode):
    """Also at other batch sizes and lengths; the kernels themselves are not in its graph."""
    module = Attention(block_per_row=2, approx_mode=mode, impl="triton")
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    names = ("query", "key", "value")
    program = torch.export.export(
        module,
        (*on_device(make_inputs(2, 1, 70, 16))[:3], mask_on_device("right", 2, 70)),
        dynamic_shapes={
            **dict.fromkeys(names, dynamic),
            "mask": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},
        },
    )
    assert_exports_no_operator_of_ours(program)
    for batch, length in ((2, 70), (1, 129)):
        inputs = on_device(make_inputs(batch, 1, length, 16))[:3]
        mask = mask_on_device("holes", batch, length)
        given, expected = program.module()(*inputs, mask), module(*inputs, mask)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_full_budget_is_dense_attention():
    inputs = on_device(make_inputs(1, 1, 60, 16))
    given = run("triton", inputs, block_per_row=2)
    dense = outputs_and_gradients(torch.nn.functional.scaled_dot_product_attention, *inputs)
    for x, y in zip(given, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# -- on a card only


@only_on_a_card
@pytest.mark.parametrize("length", [4096, 8192])  # five and six digits
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_backward_are_captured_in_a_cuda_graph(mode, length):
    inputs = [x.requires_grad_() for x in on_device(make_inputs(1, 4, length, 64))[:3]]

    def step():
        output = mra2_attention(*inputs, block_per_row=8, approx_mode=mode, impl="triton")
        return output, *torch.autograd.grad(output, inputs, torch.ones_like(output))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


@only_on_a_card
@pytest.mark.parametrize("length", [513, 4096, 33000])
def test_long_sequences(length):
    """Selections agree in 99.9 % of the blocks; results by that of the torch path."""
    inputs = on_device(make_inputs(1, 2, length, 64))
    settings = (None, 4, None, 32, 0, 0, "row_normalized", 64**-0.5)
    chosen = BlockSelection(ops.mra2_select(*inputs[:2], *settings), 32)
    given = select_blocks(*inputs[:2], block_per_row=4).blocks
    both = (given & chosen.blocks).sum()
    assert both >= 0.999 * chosen.blocks.sum()
    results = run("triton", inputs, selection=chosen)
    expected = run("torch", [x.double() for x in inputs], selection=chosen)
    for x, y in zip(results, expected, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


@only_on_a_card
def test_auto_takes_the_torch_path_where_triton_is_missing(monkeypatch):
    from mra_attention import implementations

    inputs = on_device(make_inputs(1, 2, 200, 64))
    assert implementations.resolve_impl("auto", inputs[0], 32) == "triton"
    monkeypatch.setattr(implementations, "_IS_INSTALLED", False)
    assert implementations.resolve_impl("auto", inputs[0], 32) == "torch"
    given = run("auto", inputs, block_per_row=2)
    expected = run("reference", inputs, block_per_row=2)
    for x, y in zip(given, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@only_on_a_card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_kernels_run_on_the_device_of_the_tensors():
    inputs = make_inputs(1, 2, 200, 64)
    results = []
    for device in ("cuda:0", "cuda:1"):  # whichever is current
        results.append([x.cpu() for x in run("triton", [x.to(device) for x in inputs])])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
