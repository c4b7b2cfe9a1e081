"""The operator as a graph of standard operators. Its code runs without being traced, too, so that
most is tested that way; tracing takes seconds.
"""

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    Attention,
    assert_exports_no_operator_of_ours,
    make_bias,
    make_inputs,
    make_mask,
)

from mra_attention import exported, mra2_attention, select_blocks
from mra_attention.selection import SELECTION_RULES
from pairwise import pairwise

PRIORS = [{}, {"initial_prior_first_n_blocks": 1}, {"initial_prior_diagonal_n_blocks": 3}]
BUDGETS = [{"block_per_row": 1}, {"block_per_row": 3}, {"block_per_row": 8}, {"block_budget": 5}]
DEFAULTS = {
    "block_per_row": 8,
    "block_budget": None,
    "initial_prior_first_n_blocks": 0,
    "initial_prior_diagonal_n_blocks": 0,
}


def graph(
    query, key, value, mask, bias=None, *, approx_mode="full", selection="row_normalized", **s
):
    """What an exported graph computes, with the arguments of `mra2_attention`."""
    settings = DEFAULTS | {"block_size": 32, "scale": query.shape[-1] ** -0.5} | s
    settings["key_block_size"] = settings.get("key_block_size") or settings["block_size"]
    modes = {"rule": selection, "sparse": approx_mode == "sparse"}
    return exported.attention(query, key, value, mask, bias, **settings, **modes)


@pairwise(
    budget=BUDGETS,
    priors=PRIORS,
    key_block_size=[None, 8],
    mask_kind=MASK_KINDS,
    approx_mode=MODES,
    biased=[False, True],
    selection=SELECTION_RULES,
    dtype=[torch.float32, torch.float64, torch.bfloat16],
)
def test_the_graph_computes_what_torch_computes(
    budget, priors, key_block_size, mask_kind, approx_mode, biased, selection, dtype
):
    settings = {**budget, **priors, "key_block_size": key_block_size, "selection": selection}
    settings["approx_mode"] = approx_mode
    bias = make_bias(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    bias = bias if biased else None
    for length in (1, 2, 31, 32, 33, 257, 600):
        inputs = make_inputs(2, 2, length, 16, seed=length, dtype=dtype)[:3]
        mask = make_mask(mask_kind, 2, length)
        expected = mra2_attention(*inputs, mask, distance_bias=bias, impl="torch", **settings)
        output = graph(*inputs, mask, bias, **settings)
        assert output.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("block_size", [16, 64])
def test_other_block_sizes_are_exported(block_size):
    settings = {"block_size": block_size, "block_per_row": 2}
    inputs = make_inputs(1, 2, 300, 16)[:3]
    expected = mra2_attention(*inputs, impl="torch", **settings)
    torch.testing.assert_close(graph(*inputs, None, **settings), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key_block_size", [32, 8])
@pytest.mark.parametrize("budget", [{"block_per_row": 2}, {"block_budget": 7}])
@pytest.mark.parametrize("priors", PRIORS)
def test_equal_scores_are_chosen_in_the_order_of_torch(priors, budget, key_block_size):
    """Constant queries and keys: every pair scores the same, and the tie rank alone decides."""
    ones = torch.ones(1, 1, 290, 8)
    sizes = {"block_size": 32, "key_block_size": key_block_size}
    chosen = select_blocks(ones, ones, **budget, **priors, **sizes).blocks
    value = torch.randn(1, 1, 290, 8, generator=torch.Generator().manual_seed(1))
    expected = mra2_attention(ones, ones, value, impl="torch", **budget, **priors, **sizes)
    output = graph(ones, ones, value, None, **budget, **priors, **sizes)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)

    rows, columns = 11, 11 * (32 // key_block_size)
    live = torch.arange(rows)[None] < 10
    live_keys = live.repeat_interleave(32 // key_block_size, 1)
    if key_block_size == 8:
        live_keys = torch.arange(columns)[None] < 37
    pairs = int(chosen.sum())
    first = priors.get("initial_prior_first_n_blocks", 0)
    diagonal = priors.get("initial_prior_diagonal_n_blocks", 0)
    scores = torch.zeros(1, 1, rows, columns)
    selected, _ = exported._choose(
        scores, live, live_keys, torch.tensor([pairs]), pairs, first, diagonal
    )
    assert torch.equal(selected[:, :, :10, : chosen.shape[-1]], chosen)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_chosen_pair_is_in_one_item(size):
    """However unevenly the rows share the budget: some get nothing, one gets all it can."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 12, 12, generator=generator) * 0.01
    scores[0, 0, 4] += 10
    scores[1, 2, :, :2] += 10
    live = torch.arange(12)[None] < torch.tensor([[11], [7]])
    budget = torch.tensor([33, 21])
    selected, pairs = exported._choose(scores, live, live, budget, 33, 0, 0)
    assert selected.sum((-2, -1)).tolist() == [[33] * 3, [21] * 3]
    items = exported._cut_into_items(selected, pairs, size)
    found = torch.zeros_like(selected, dtype=torch.long)
    for b, h, t, s in items.used.nonzero():
        found[b, h, items.row[b, h, t], items.column[b, h, t, s]] += 1
    assert torch.equal(found, selected.long())


def test_the_gradients_are_those_of_torch():
    inputs = [x.requires_grad_() for x in make_inputs(1, 2, 200, 16, dtype=torch.float64)[:3]]
    bias = make_bias(2, 3, dtype=torch.float64).requires_grad_()
    settings = {"block_per_row": 2}
    weights = torch.randn(1, 2, 200, 16, dtype=torch.float64)
    expected = mra2_attention(*inputs, distance_bias=bias, impl="torch", **settings)
    expected = torch.autograd.grad((expected * weights).sum(), [*inputs, bias])
    output = graph(*inputs, None, bias, **settings)
    for gradient, other in zip(
        torch.autograd.grad((output * weights).sum(), [*inputs, bias]), expected, strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-8)


def test_nothing_that_is_not_a_number_leaves_the_padding():
    inputs = make_inputs(2, 2, 100, 16)[:3]
    mask = make_mask("holes", 2, 100)
    for x in inputs:
        x.transpose(1, 2)[~mask] = torch.nan
    assert graph(*inputs, mask, block_per_row=1).isfinite().all()


# -- traced


@pytest.mark.parametrize(
    ("settings", "masked", "named"),
    [
        ({"block_per_row": 2}, True, True),
        ({"block_budget": 5, "approx_mode": "sparse", "key_block_size": 8}, False, False),
        (
            {"block_per_row": 6, "selection": "refined"}
            | {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 2},
            True,
            False,
        ),
    ],
)
def test_a_graph_takes_every_batch_and_length(settings, masked, named):
    """Every size of a named range must be allowed; of a dynamic one, torch may rule some out."""
    module = Attention(**settings)
    dims = (torch.export.Dim.DYNAMIC,) * 2
    if named:
        dims = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", min=2, max=4096)
    dynamic = dict(zip((0, 2), dims, strict=True))
    of_mask = dict(enumerate(dims)) if masked else None
    program = torch.export.export(
        module,
        (*make_inputs(3, 2, 70, 16)[:3], make_mask("right", 3, 70) if masked else None),
        dynamic_shapes=dict.fromkeys(("query", "key", "value"), dynamic) | {"mask": of_mask},
    )
    assert_exports_no_operator_of_ours(program)
    run = program.module()
    sizes = (*((2, length) for length in (2, 31, 32, 33, 64, 100, 257)), (1, 100), (5, 33))
    for batch, length in sizes:
        inputs = make_inputs(batch, 2, length, 16, seed=length)[:3]
        mask = make_mask("holes", batch, length) if masked else None
        expected = mra2_attention(*inputs, mask, impl="torch", **settings)
        torch.testing.assert_close(run(*inputs, mask), expected, rtol=0, atol=1e-5)


def test_no_tensor_of_a_graph_is_a_matrix_of_tokens():
    """The coarse matrix holds one entry for 1024 token pairs, all else grows with the budget."""
    tokens = 2**14
    inputs = make_inputs(1, 1, tokens, 8)[:3]
    program = torch.export.export(Attention(block_per_row=2), tuple(inputs))
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    sizes = [value.numel() for value in values if isinstance(value, torch.Tensor)]
    assert tokens**2 // 1024 <= max(sizes) < tokens**2 // 64


def test_a_ready_selection_is_exported_as_the_reference():
    inputs = make_inputs(1, 2, 100, 16)[:3]
    module = Attention(selection=select_blocks(*inputs[:2], block_per_row=1))
    program = torch.export.export(module, tuple(inputs))
    assert_exports_no_operator_of_ours(program)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_torch_writes_the_operator_as_onnx(tmp_path):
    """By itself, too, with sizes of different names; `mra-hf export` is the faster way."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = {"block_per_row": 2, "key_block_size": 8, "initial_prior_first_n_blocks": 1}
    module = Attention(**settings).eval()
    inputs = make_inputs(2, 2, 100, 16)[:3]
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {0: batch, 2: tokens} for name in ("query", "key", "value")}
    shapes["mask"] = {0: batch, 1: tokens}
    example = (*inputs, make_mask("right", 2, 100))
    file = tmp_path / "operator.onnx"
    torch.onnx.export(module, example, file, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size, length in ((1, 2), (3, 290)):
        given = (*make_inputs(size, 2, length, 16)[:3], make_mask("holes", size, length))
        feed = {x.name: y.numpy() for x, y in zip(session.get_inputs(), given, strict=True)}
        output = torch.from_numpy(session.run(None, feed)[0])
        expected = mra2_attention(*given, impl="torch", **settings)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
