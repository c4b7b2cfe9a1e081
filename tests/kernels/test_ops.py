"""The operators as torch sees them: schemas, compile, checkpointing, autocast, refusals."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    assert_all_equal,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from mra_attention import BlockSelection, mra2_attention, mra2_attention_matrix, ops, select_blocks
from mra_attention.selection import SELECTION_RULES
from pairwise import pairwise

BUDGETS = (2, 8)  # some blocks, and all of them


def transpose_storage(x):
    """The same values laid out as `[B, N, H, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class SelfAttention(nn.Module):
    """Projections around the operator, `[B, N, 32]` to `[B, N, 32]`, two heads."""

    def __init__(self, **arguments):
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.merge = nn.Linear(32, 32)
        self.arguments = arguments

    def forward(self, hidden, mask=None):
        batch, length, width = hidden.shape
        heads = self.project(hidden).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        output = mra2_attention(*heads.unbind(0), mask, **self.arguments)
        return self.merge(output.transpose(1, 2).reshape(batch, length, width))


def make_module(impl, **arguments):
    torch.manual_seed(0)
    return SelfAttention(impl=impl.name, **arguments).to(impl.device)


def make_hidden(impl, batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 32, generator=generator).to(impl.device)


# -- schemas, fakes, autograd registration


@pairwise(
    mask_kind=["none", "holes"],
    block_budget=[None, 5],
    rule=SELECTION_RULES,
)
def test_opcheck_accepts_the_select_operator(mask_kind, block_budget, rule):
    query, key, *_ = make_inputs(2, 2, 70, 8)
    mask = make_mask(mask_kind, 2, 70)
    for q, k in ((query, key), (transpose_storage(query), transpose_storage(key))):
        torch.library.opcheck(ops.mra2_select, (q, k, mask, 2, block_budget, 32, 1, 1, rule, 0.3))


@pairwise(
    mask_kind=["none", "holes"],
    choice=["all", "some"],
    layout=["contiguous", "transposed"],
    mode=MODES,
)
def test_opcheck_accepts_the_forward_and_backward_operators(mask_kind, choice, layout, mode):
    *inputs, grad = make_inputs(2, 2, 70, 8)
    mask = make_mask(mask_kind, 2, 70)
    if layout == "transposed":
        *inputs, grad = (transpose_storage(x) for x in (*inputs, grad))
    blocks = None if choice == "all" else select_blocks(*inputs[:2], mask, block_budget=4).blocks
    settings = (mask, blocks, 0.3, mode == "sparse", 32)
    results = ops.mra2_forward(*inputs, *settings)
    torch.library.opcheck(ops.mra2_backward, (grad, *inputs, *results, *settings))
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_opcheck_accepts_other_dtypes(dtype):
    inputs = [x.requires_grad_() for x in make_inputs(1, 1, 70, 8, dtype=dtype)[:3]]
    blocks = select_blocks(*inputs[:2], block_budget=4).blocks
    for choice in (None, blocks):
        torch.library.opcheck(
            ops.mra2_forward,
            (*inputs, None, choice, 0.3, False, 32),
            test_utils=("test_schema", "test_faketensor"),
        )


@pairwise(mask_kind=MASK_KINDS, choice=["all", "some"], budget=[1, 3, 100], mode=MODES)
def test_the_forward_operator_returns_the_log_sum_exp_and_infinity_at_padding(
    mask_kind, choice, budget, mode
):
    query, key, value, _ = make_inputs(2, 2, 70, 8, dtype=torch.float64)
    mask = make_mask(mask_kind, 2, 70)
    blocks = select_blocks(query, key, mask, block_budget=budget).blocks
    output, lse = ops.mra2_forward(
        query, key, value, mask, None if choice == "all" else blocks, 0.3, mode == "sparse", 32
    )
    real = torch.ones(2, 1, 70, dtype=torch.bool) if mask is None else mask[:, None]
    selected = BlockSelection(torch.ones_like(blocks) if choice == "all" else blocks, 32)
    matrix = mra2_attention_matrix(
        query, key, mask, selection=selected, scale=0.3, approx_mode=mode
    )
    # inside the choice, matrix = exp(logit - lse)
    logits = 0.3 * query @ key.mT
    inside = selected.blocks.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, :70, :70]
    inside = inside & real[:, :, None, :] & real[..., None]
    expected = (logits - lse[..., None]).exp()
    torch.testing.assert_close(expected[inside], matrix[inside], rtol=0, atol=1e-12)
    empty = ~(matrix > 0).any(-1)
    assert torch.equal(lse == torch.inf, empty)
    assert not output[empty].any()


# -- torch.compile


def train(step, parameters, batches):
    """Three steps of SGD on the mean square; returns the losses."""
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for hidden, mask in batches:
        loss = step(hidden, mask).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_trains_as_eager(impl, batches, arguments, **compile_arguments):
    torch._dynamo.reset()
    eager, compiled = make_module(impl, **arguments), make_module(impl, **arguments)
    start = [parameter.detach().clone() for parameter in eager.parameters()]
    step = torch.compile(compiled, fullgraph=True, **compile_arguments)
    expected = train(eager, eager.parameters(), batches)
    torch.testing.assert_close(
        train(step, compiled.parameters(), batches), expected, rtol=0, atol=1e-5
    )
    for before, x, y in zip(start, compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        assert not torch.equal(before, y)


@pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")),
    reason="inductor needs a C++ compiler",
)
def test_a_module_compiled_by_inductor_trains_as_eager(fast):
    batches = [(make_hidden(fast, 2, 100), fast.mask("right", 2, 100))] * 3
    assert_trains_as_eager(fast, batches, {"block_per_row": 2})


@pairwise(budget=BUDGETS, mode=MODES)
def test_a_compiled_graph_holds_the_operators(budget, mode):
    """Not the reference, which is for exported graphs and costs as dense attention."""
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    attention = torch.compile(mra2_attention, backend=backend, fullgraph=True)
    query, key, value, _ = make_inputs(1, 1, 100, 16)
    attention(query, key, value, block_per_row=budget, approx_mode=mode)
    ours = {target.split(".")[1] for target in targets if "mra2" in target}
    assert ours == ({"mra2_forward"} if budget == 8 else {"mra2_select", "mra2_forward"})


@pairwise(masked=[False, True], budget=BUDGETS, mode=MODES)
def test_a_compiled_module_trains_as_eager_at_changing_lengths(masked, budget, mode, fast):
    batches = [
        (make_hidden(fast, 2, length), fast.mask("holes", 2, length) if masked else None)
        for length in (100, 33, 70)
    ]
    arguments = {"block_per_row": budget, "approx_mode": mode, "initial_prior_first_n_blocks": 1}
    assert_trains_as_eager(fast, batches, arguments, backend="aot_eager", dynamic=True)


# -- checkpointing


@pairwise(use_reentrant=[False, True], budget=BUDGETS, mode=MODES)
def test_checkpointing_changes_nothing(use_reentrant, budget, mode, impl):
    *inputs, grad = impl.inputs(2, 2, 100, 16)
    attention = impl.attention(impl.mask("holes", 2, 100), block_per_row=budget, approx_mode=mode)
    expected = outputs_and_gradients(attention, *inputs, grad)
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = checkpoint(attention, *inputs, use_reentrant=use_reentrant)
    output.backward(grad)
    assert_all_equal((output, *(x.grad for x in inputs)), expected)


# -- autocast


@pairwise(
    recompute=["never", "reentrant", "not reentrant"],
    backward_inside=[False, True],
    budget=BUDGETS,
    mode=MODES,
)
def test_autocast_gives_what_explicitly_cast_inputs_give(
    recompute, backward_inside, budget, mode, impl
):
    *inputs, grad = impl.inputs(2, 2, 100, 16)
    grad = grad.bfloat16()
    attention = impl.attention(impl.mask("holes", 2, 100), block_per_row=budget, approx_mode=mode)

    def cast_first(*inputs):
        return attention(*(x.bfloat16() for x in inputs))

    expected = outputs_and_gradients(cast_first, *inputs, grad)
    assert expected[0].dtype == torch.bfloat16 and expected[1].dtype == torch.float32

    inputs = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast(impl.device, torch.bfloat16):
        if recompute == "never":
            output = attention(*inputs)
        else:
            output = checkpoint(attention, *inputs, use_reentrant=recompute == "reentrant")
        if backward_inside:
            output.backward(grad)
    if not backward_inside:
        output.backward(grad)
    assert output.dtype == torch.bfloat16
    assert_all_equal((output, *(x.grad for x in inputs)), expected)


def test_autocast_leaves_cast_inputs_alone(impl):
    for dtype in {torch.bfloat16, impl.finest_dtype} - {torch.float32}:
        inputs = impl.inputs(2, 2, 100, 16, dtype=dtype)
        expected = impl.attend(inputs, block_per_row=2)
        with torch.autocast(impl.device, torch.bfloat16):
            assert_all_equal(impl.attend(inputs, block_per_row=2), expected)


bfloat16_autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("rule", SELECTION_RULES)
def test_the_select_operator_ignores_autocast(rule):
    query, key, *_ = make_inputs(2, 2, 500, 16)
    arguments = (query, key, make_mask("holes", 2, 500), 3, None, 32, 0, 0, rule, 0.25)
    expected = ops.mra2_select(*arguments)
    with bfloat16_autocast():
        assert torch.equal(ops.mra2_select(*arguments), expected)


def test_the_public_choice_under_autocast_is_that_of_cast_inputs():
    query, key, *_ = make_inputs(2, 2, 500, 16)
    expected = select_blocks(query.bfloat16(), key.bfloat16(), block_per_row=3)
    with bfloat16_autocast():
        assert torch.equal(select_blocks(query, key, block_per_row=3).blocks, expected.blocks)


@pytest.mark.parametrize("choice", ["all", "some"])
def test_the_backward_operator_ignores_autocast(choice):
    *inputs, grad = make_inputs(2, 2, 150, 8)
    blocks = None if choice == "all" else select_blocks(*inputs[:2], block_per_row=2).blocks
    settings = (None, blocks, 0.3, False, 32)
    results = ops.mra2_forward(*inputs, *settings)
    expected = ops.mra2_backward(grad, *inputs, *results, *settings)[:3]
    with bfloat16_autocast():
        assert_all_equal(
            (results[0], *ops.mra2_backward(grad, *inputs, *results, *settings)[:3]),
            (ops.mra2_forward(*inputs, *settings)[0], *expected),
        )


# -- refusals


@pytest.mark.parametrize("budget", BUDGETS)
def test_double_backward_names_the_reference(budget, fast):
    query, key, value, _ = (x.requires_grad_() for x in fast.inputs(1, 1, 100, 16))
    output = fast.attention(block_per_row=budget)(query, key, value)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match='impl="reference"'):
        grad.sum().backward()


def test_reference_has_a_second_derivative_as_the_refusal_promises():
    inputs = [x.requires_grad_() for x in make_inputs(1, 1, 6, 2, dtype=torch.float64)[:3]]

    def attention(*inputs):
        return mra2_attention(*inputs, block_size=2, block_per_row=1, impl="reference")

    assert torch.autograd.gradgradcheck(attention, inputs)


@pytest.mark.parametrize("budget", BUDGETS)
def test_vmap_names_the_remedy(budget, fast):
    inputs = [torch.stack([x, x + 1]) for x in fast.inputs(1, 1, 100, 16)[:3]]
    with pytest.raises(RuntimeError, match="batch dimension of query, key and value"):
        torch.vmap(fast.attention(block_per_row=budget))(*inputs)


def test_vmap_works_with_the_reference_as_the_refusal_promises():
    inputs = [torch.stack([x, x.flip(2)]) for x in make_inputs(2, 2, 100, 8)[:3]]

    def attention(*inputs):
        return mra2_attention(*inputs, block_per_row=2, impl="reference")

    outputs = torch.vmap(attention)(*inputs)
    for i in range(2):
        expected = attention(*(x[i] for x in inputs))
        torch.testing.assert_close(outputs[i], expected, rtol=0, atol=1e-5)


def test_forward_mode_differentiation_is_refused_instead_of_seeing_zero(fast):
    q, k, v, _ = fast.inputs(1, 1, 70, 16)
    direction = (torch.ones_like(q),)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: fast.attention(block_per_row=1)(x, k, v), (q,), direction)
    _, tangent = torch.func.jvp(
        lambda x: mra2_attention(x, k, v, block_per_row=1, impl="reference"), (q,), direction
    )
    assert tangent.abs().max() > 0
