"""The Triton kernels against the definition: on a card, or on a CPU in Triton's interpreter.

`test_triton_interpreted.py` runs this file in a process with TRITON_INTERPRET=1; by itself it needs
a CUDA or ROCm device. Shapes are small: the interpreter takes about 10 ms per program.
"""

from __future__ import annotations

import dataclasses
import os

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

from mra_attention import BlockSelection, mra2_attention, ops, select_blocks, selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_A_CARD = torch.cuda.is_available() and not INTERPRETED
#: Largest relative error (norms) of outputs and gradients.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or ON_A_CARD),
        reason="no CUDA or ROCm device (the interpreter's run is in test_triton_interpreted.py)",
    ),
]
only_on_a_card = pytest.mark.skipif(not ON_A_CARD, reason="needs a CUDA or ROCm device")


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


def on_device(inputs):
    return [x.to(DEVICE) for x in inputs]


def mask_on_device(kind, batch, length):
    mask = make_mask(kind, batch, length)
    return None if mask is None else mask.to(DEVICE)


def run(impl, inputs, mask=None, **arguments):
    def attention(query, key, value):
        return mra2_attention(query, key, value, mask, impl=impl, **arguments)

    return outputs_and_gradients(attention, *inputs)


def assert_right(inputs, mask, tolerance=None, **arguments):
    """Outputs and gradients agree with the definition in float64, for one selection."""
    tolerance = tolerance or TOLERANCES[inputs[0].dtype]
    if "selection" not in arguments:
        settings = {
            name: arguments.pop(name)
            for name in list(arguments)
            if name.startswith(("block_per_row", "block_budget", "initial_prior"))
        }
        arguments["selection"] = select_blocks(*inputs[:2], mask, **settings)
    given = run("triton", inputs, mask, **arguments)
    expected = run("reference", [x.double() for x in inputs], mask, **arguments)
    for name, x, y in zip(NAMES, given, expected, strict=True):
        assert x.dtype == inputs[0].dtype and x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = (x.double() - y).norm() / y.norm().clamp_min(1.0)
        assert error <= tolerance, f"{name} is off by {error:.1e}"
    return given


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


#: Tokens of more block rows than any kernel takes at once: 70 and 130 of them.
BEYOND_A_TILE = (2235, 4141)


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
    from mra_attention.triton_impl.problem import Call

    (table if query_blocks == 1 else two_query_blocks)(item_blocks=1)
    inputs = on_device(make_inputs(1, 1, 150, 16))
    mask = mask_on_device("holes", 1, 150)
    expected = run("triton", inputs, mask, block_per_row=2)
    dirty = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    original = Call.empty

    def filled(self, shape, dtype=torch.float32):
        x = original(self, shape, dtype)
        return x.fill_(torch.nan) if dtype.is_floating_point else x.fill_(-1)

    monkeypatch.setattr(Call, "empty", filled)
    for x, y in zip(run("triton", dirty, mask, block_per_row=2), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("place", NAMES[1:])
def test_nan_in_a_real_token_is_not_hidden(place, table):
    """As by the definition: the row of a query, every row of a sample for a key or value."""
    table(item_blocks=1)
    inputs = on_device(make_inputs(2, 1, 100, 16))
    chosen = select_blocks(*inputs[:2], block_per_row=4)
    inputs[NAMES.index(place) - 1][0, 0, 70, 3] = torch.nan
    given, expected = (
        mra2_attention(*inputs[:3], selection=chosen, impl=impl) for impl in ("triton", "reference")
    )
    assert torch.equal(given.isnan(), expected.isnan()) and given.isnan().any()


def test_two_runs_give_the_same_bits(table):
    table(item_blocks=2, topk_up_to_rows=0)
    inputs = on_device(make_inputs(1, 2, 150, 32, dtype=torch.bfloat16))
    first, second = (run("triton", inputs, block_per_row=2) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


# -- two query blocks a tile


@pytest.mark.parametrize("form_name", ["plain", "swapped"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_two_query_blocks_in_every_dtype_mode_and_form(
    dtype, mode, form_name, form, two_query_blocks
):
    form(form_name)
    two_query_blocks()
    inputs = on_device(make_inputs(1, 2, 150, 64, dtype=dtype))
    assert_right(inputs, mask_on_device("holes", 1, 150), block_per_row=2, approx_mode=mode)


@pytest.mark.parametrize("length", [1, 31, 33, 64, 65, 100, 256])
def test_two_query_blocks_at_ragged_lengths(length, two_query_blocks):
    """Also where the last bundle has one block, and where that is the only one."""
    two_query_blocks()
    assert_right(on_device(make_inputs(2, 1, length, 40)), None, block_per_row=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_two_query_blocks_with_masks(mask_kind, mode, two_query_blocks):
    two_query_blocks()
    inputs = on_device(make_inputs(2, 1, 100, 16))
    mask = mask_on_device(mask_kind, 2, 100)
    results = assert_right(inputs, mask, block_per_row=1, approx_mode=mode)
    if mask is not None:
        for result in results:
            assert not result.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("form_name", ["plain", "swapped"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("item_blocks", [1, 3])
def test_two_query_blocks_with_several_work_items(
    item_blocks, mode, form_name, form, two_query_blocks
):
    """The first row is selected whole, so that the list of the first bundle is cut; 7 blocks."""
    form(form_name)
    two_query_blocks(item_blocks=item_blocks)
    inputs = on_device(make_inputs(1, 1, 200, 16))
    mask = mask_on_device("right", 1, 200)
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3}
    assert_right(inputs, mask, block_per_row=4, approx_mode=mode, **priors)


@pytest.mark.parametrize("kernel", ["forward", "query_gradient"])
def test_two_query_blocks_in_one_pass_alone(kernel, two_query_blocks):
    two_query_blocks(kernel, item_blocks=2)
    inputs = on_device(make_inputs(1, 2, 150, 16))
    assert_right(inputs, mask_on_device("holes", 1, 150), block_per_row=3)


def test_two_query_blocks_among_more_blocks_than_a_tile(two_query_blocks):
    two_query_blocks(item_blocks=4)
    inputs = on_device(make_inputs(1, 1, BEYOND_A_TILE[0], 16))
    mask = mask_on_device("holes", 1, BEYOND_A_TILE[0])
    assert_right(inputs, mask, block_per_row=3, initial_prior_first_n_blocks=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_may_select_nothing_or_for_one_of_its_blocks_alone(mode, two_query_blocks):
    two_query_blocks(item_blocks=2)
    blocks = torch.zeros(1, 3, 5, 5, dtype=torch.bool, device=DEVICE)
    blocks[:, 0, 1] = True  # all of it for the second of a bundle, nothing for the first
    blocks[:, 1, 2] = True
    blocks[:, 2, :, 2] = True
    inputs = on_device(make_inputs(1, 3, 140, 16))
    assert_right(inputs, None, selection=BlockSelection(blocks, 32), approx_mode=mode)


@pytest.mark.parametrize("query_blocks", [1, 2])
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_lists_hold_the_pairs_that_each_bundle_selected(rows, query_blocks):
    """And the items cut them into pieces, in order; owners beyond the last bundle have none."""
    from mra_attention.triton_impl.problem import Call, Lists, as_bytes

    query, key, *_ = on_device(make_inputs(1, 2, 32 * rows - 5, 16))
    mask = torch.ones(1, query.shape[2], dtype=torch.bool, device=DEVICE)
    mask[:, 32:64] = False  # a block that no list may name
    generator = torch.Generator().manual_seed(0)
    blocks = (torch.rand(1, 2, rows, rows, generator=generator) < 0.2).to(DEVICE)
    call = Call(query, key, None, mask)
    settings = {"directions": 2, "query_blocks": query_blocks}
    lists = Lists(call, as_bytes(call, blocks), None, **settings)
    live = mask.view(-1)[::32][:rows].cpu()
    chosen = blocks[0].cpu() & live[:, None] & live[None, :]
    for direction in (0, 1):
        pairs = chosen if direction == 0 else chosen.mT
        bundle = (query_blocks, 1)[direction]
        sizes, starts, entries, first_items, items, counts = (
            x.cpu().tolist() for x in lists.of(direction)
        )
        most = lists.max_items[direction]
        for head in range(2):
            wanted_items = []
            for own in range(rows):
                of_own = pairs[head, own * bundle : (own + 1) * bundle]
                wanted = of_own.any(0).nonzero().flatten().tolist()
                if bundle == 2:
                    weights = torch.tensor([1, 2])[: len(of_own), None]
                    bits = (of_own * weights).sum(0)
                    wanted = [4 * block + bits[block].item() for block in wanted]
                start = starts[head][own]
                assert entries[head][start : start + sizes[head][own]] == wanted
                if own * bundle < rows:
                    assert first_items[head][own] == len(wanted_items)
                    wanted_items += [own] * max(1, -(-len(wanted) // lists.item_blocks))
            assert counts[head] == len(wanted_items) <= most
            assert items[head * most : head * most + counts[head]] == wanted_items


# -- selection

SELECTIONS = {
    "plain": {},
    "priors": {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3},
    "wide prior": {"initial_prior_diagonal_n_blocks": 5},
    "global": {"rule": "global"},
    "budget": {"block_budget": 7},
    "everything": {"block_budget": 1000},
}


@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_by_every_route_is_that_of_torch(name, mask_kind, table):
    """Given the same scores all routes choose the same pairs, and those of the torch path, whose
    scores come from float64 means, here too.
    """
    from mra_attention import triton_impl

    inputs = on_device(make_inputs(2, 1, 200, 32, seed=3))[:2]
    mask = mask_on_device(mask_kind, 2, 200)
    settings = {
        "block_per_row": 2,
        "block_budget": None,
        "initial_prior_first_n_blocks": 0,
        "initial_prior_diagonal_n_blocks": 0,
        "rule": "row_normalized",
        "scale": 0.2,
        **SELECTIONS[name],
    }
    wanted = selection.select(*inputs, mask, block_size=32, **settings)
    for entries in (
        {"topk_up_to_rows": 1000},
        {"topk_up_to_rows": 0},
        {"topk_up_to_rows": 0, "recompute_from_length": 0},
    ):
        table(**entries)
        assert torch.equal(triton_impl.select(*inputs, mask, **settings), wanted), entries


@pytest.mark.parametrize("length", BEYOND_A_TILE)
def test_selection_among_more_blocks_than_a_tile(length, table):
    """By radix, with stored and with recomputed scores, as by top-k; and nearly as in torch."""
    from mra_attention import triton_impl

    inputs = on_device(make_inputs(2, 1, length, 16, seed=5))[:2]
    mask = mask_on_device("right", 2, length)
    settings = {
        "block_per_row": 4,
        "block_budget": None,
        "initial_prior_first_n_blocks": 1,
        "initial_prior_diagonal_n_blocks": 1,
        "rule": "row_normalized",
        "scale": 0.25,
    }
    table(topk_up_to_rows=1000)
    by_topk = triton_impl.select(*inputs, mask, **settings)
    for entries in ({"topk_up_to_rows": 0}, {"topk_up_to_rows": 0, "recompute_from_length": 0}):
        table(**entries)
        assert torch.equal(triton_impl.select(*inputs, mask, **settings), by_topk), entries
    wanted = selection.select(*inputs, mask, block_size=32, **settings)
    assert torch.equal(by_topk.sum((1, 2, 3)), wanted.sum((1, 2, 3)))
    assert (by_topk & wanted).sum() >= 0.999 * wanted.sum()


def test_radix_ranks_equal_scores_like_choose_blocks(table):
    from mra_attention import triton_impl
    from mra_attention.triton_impl.problem import Call

    inputs = on_device(make_inputs(2, 2, 150, 16))[:2]
    mask = mask_on_device("right", 2, 150)
    numbers = {"block_per_row": 2, "block_budget": None}
    priors = {"initial_prior_first_n_blocks": 0, "initial_prior_diagonal_n_blocks": 0}
    ranking = triton_impl.Ranking(Call(*inputs, None, mask), **numbers, **priors)
    ranking.score(normalized=True, scale=0.2)
    values = torch.tensor([0.0, -0.0, -1.5, 2.0**-140, -torch.inf], device=DEVICE)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(0, len(values), ranking.scores.shape, generator=generator)
        ranking.scores.copy_(values[picks.to(DEVICE)])
        assert torch.equal(ranking.choose_by_radix(), ranking.choose_by_topk())


# -- operators


def settings_of_operators(mask, blocks):
    return (mask, blocks, 0.3, False, 32, "triton", 6)


def test_opcheck():
    query, key, value, grad = on_device(make_inputs(1, 1, 70, 16))
    mask = mask_on_device("right", 1, 70)
    numbers = (2, None, 32, 1, 1, "row_normalized", 0.3, "triton")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mra2_select, (query, key, mask, *numbers), test_utils=utilities)
    blocks = ops.mra2_select(query, key, mask, *numbers)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    settings = settings_of_operators(mask, blocks)
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings), test_utils=utilities)
    results = [x.detach() for x in ops.mra2_forward(*inputs, *settings)]
    inputs = [x.detach() for x in inputs]
    arguments = (grad, *inputs, *results, *settings)
    torch.library.opcheck(ops.mra2_backward, arguments, test_utils=utilities)


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
@pytest.mark.parametrize("length", [4096, 8192])  # top-k and radix select
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
