"""The bias on the distance of blocks, in every implementation: both resolutions, and selection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    INTERPRETED,
    MASK_KINDS,
    MODES,
    REFERENCE,
    Implementation,
    assert_all_close,
    assert_all_equal,
    assert_as_good_as_eager,
    assert_exports_no_operator_of_ours,
    attend_with_bias,
    dense_attention,
    make_bias,
    make_inputs,
    make_mask,
)
from torch.utils.checkpoint import checkpoint

from mra_attention import (
    BlockSelection,
    mra2_attention,
    mra2_attention_matrix,
    multiresolution_attention,
    multiresolution_attention_matrix,
    ops,
    select_blocks,
)
from mra_attention.selection import SELECTION_RULES
from pairwise import pairwise

LENGTHS = [1, 31, 33, 100, 150] if INTERPRETED else [1, 31, 33, 100, 257, 500]


def assert_close(actual, expected, tolerance):
    assert_all_close(actual[:4], expected[:4], tolerance)
    x, y = actual[4], expected[4]
    assert x.shape == y.shape and x.isfinite().all()
    error, largest = (x - y).abs().max().item(), y.abs().max().item()
    assert error <= tolerance * max(1.0, largest), f"grad_bias is off by {error:.1e}"


def of_pairs(bias, length, first=0, mask=None):
    """The bias of all token pairs, `[B or 1, H, N, N]`, by the words of the definition."""
    block = torch.arange(length) // 32
    distance = (block[:, None] - block).abs().clamp_max(bias.shape[1] - 1)
    biases = bias[:, distance][None]
    if first == 0:
        return biases
    mask = torch.ones(1, length, dtype=torch.bool) if mask is None else mask.cpu()
    samples = []
    for sample in mask:
        live = sorted(set(block[sample].tolist()))[:first]
        is_global = torch.isin(block, torch.tensor(live, dtype=torch.long))
        samples.append(biases[0].masked_fill(is_global[:, None] | is_global, 0))
    return torch.stack(samples)


# -- agreement


@pairwise(
    length=LENGTHS,
    distances=[1, 3, 40],
    mask_kind=MASK_KINDS,
    mode=MODES,
    first=[0, 1, 2],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_agrees_with_reference(length, distances, mask_kind, mode, first, dtype, fast):
    inputs = fast.inputs(2, 2, length, 16, dtype=dtype)
    bias, mask = fast.bias(2, distances), fast.mask(mask_kind, 2, length)
    settings = {"initial_prior_first_n_blocks": first}
    selection = select_blocks(*inputs[:2], mask, block_per_row=2, distance_bias=bias, **settings)
    settings |= {"selection": selection, "approx_mode": mode}
    results = attend_with_bias(fast, inputs, bias, mask, **settings)
    wide = [x.double() for x in inputs]
    exact = attend_with_bias(REFERENCE, wide, bias.double(), mask, **settings)
    if dtype == torch.float32:
        assert_close(results, [x.float() for x in exact], 2e-5)
        return
    eager = attend_with_bias(REFERENCE, inputs, bias, mask, **settings)
    for tensors in zip(results[:4], eager[:4], exact[:4], strict=True):
        assert_as_good_as_eager(*tensors)
    # The gradient of the bias is float32, from operands in the dtype of the inputs.
    error, largest = (results[4] - exact[4]).abs().max(), exact[4].abs().max().clamp_min(1.0)
    assert results[4].dtype == torch.float32 and error <= 4 * torch.finfo(dtype).eps * largest


@pairwise(
    length=[1, 31, 33, 100, 257, 1000],
    distances=[1, 3, 40],
    mask_kind=MASK_KINDS,
    mode=MODES,
    choice=[
        {},
        {"initial_prior_first_n_blocks": 1},
        {"initial_prior_first_n_blocks": 2, "initial_prior_diagonal_n_blocks": 1},
        {"block_budget": 5},
        {"block_per_row": 99},
        *({"selection": rule} for rule in SELECTION_RULES),
    ],
)
def test_agrees_with_reference_in_float64(length, distances, mask_kind, mode, choice, general_fast):
    """Each implementation chooses for itself, by scores with the bias."""
    inputs = general_fast.inputs(2, 2, length, 16, dtype=torch.float64)
    bias, mask = make_bias(2, distances, dtype=torch.float64), make_mask(mask_kind, 2, length)
    settings = {"block_per_row": 3, "approx_mode": mode} | choice
    results = attend_with_bias(general_fast, inputs, bias, mask, **settings)
    assert_close(results, attend_with_bias(REFERENCE, inputs, bias, mask, **settings), 1e-10)


@pairwise(mode=MODES, block_size=[8, 16, 64])
def test_agrees_with_reference_at_other_block_sizes(mode, block_size, general_fast):
    inputs = general_fast.inputs(2, 2, 257, 16, dtype=torch.float64)
    bias, mask = make_bias(2, 4, dtype=torch.float64), make_mask("holes", 2, 257)
    settings = {"block_per_row": 2, "approx_mode": mode, "block_size": block_size}
    results = attend_with_bias(general_fast, inputs, bias, mask, **settings)
    assert_close(results, attend_with_bias(REFERENCE, inputs, bias, mask, **settings), 1e-10)


def test_chunks_of_samples_and_heads_add_up(monkeypatch, general_fast):
    from mra_attention import blocks

    inputs = general_fast.inputs(3, 4, 200, 16, dtype=torch.float64)
    bias, mask = make_bias(4, 5, dtype=torch.float64), make_mask("left", 3, 200)
    settings = {"block_per_row": 2, "initial_prior_first_n_blocks": 1}
    expected = attend_with_bias(REFERENCE, inputs, bias, mask, **settings)
    monkeypatch.setattr(blocks, "THREAD_BYTES", 4 * 200 * 16 * 2)  # two heads at a time
    assert_close(attend_with_bias(general_fast, inputs, bias, mask, **settings), expected, 1e-10)


def test_the_gradient_is_that_of_finite_differences():
    *inputs, _ = make_inputs(1, 2, 100, 8, dtype=torch.float64)
    selection = select_blocks(*inputs[:2], block_per_row=2)

    def attention(query, bias):
        settings = {"selection": selection, "initial_prior_first_n_blocks": 1}
        return mra2_attention(query, *inputs[1:], distance_bias=bias, impl="reference", **settings)[
            ..., ::9, :
        ]

    bias = make_bias(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(attention, (inputs[0].requires_grad_(), bias))


# -- what it means


@pairwise(length=[31, 100, 150], mask_kind=MASK_KINDS, mode=MODES, first=[0, 1])
def test_full_budget_is_dense_attention_with_the_bias_as_mask(length, mask_kind, mode, first, impl):
    inputs, mask = impl.inputs(2, 2, length, 16), impl.mask(mask_kind, 2, length)
    bias = impl.bias(2, 3)
    settings = {"block_per_row": 8, "initial_prior_first_n_blocks": first, "approx_mode": mode}
    results = attend_with_bias(impl, inputs, bias, mask, **settings)

    *tensors, grad_output = inputs
    tensors = [x.detach().requires_grad_() for x in (*tensors, bias)]
    logits_mask = of_pairs(tensors[3].cpu(), length, first, mask).to(impl.device)
    if mask is None:
        output = F.scaled_dot_product_attention(*tensors[:3], attn_mask=logits_mask)
    else:
        visible = (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        logits_mask = logits_mask.expand(2, -1, -1, -1).masked_fill(~visible, -torch.inf)
        output = F.scaled_dot_product_attention(*tensors[:3], attn_mask=logits_mask)
        output = output * mask[:, None, :, None]
    expected = (output.detach(), *torch.autograd.grad(output, tensors, grad_output))
    assert_close(results, expected, 2e-5)


@pairwise(mode=MODES, budget=[2, 8], mask_kind=MASK_KINDS)
def test_a_constant_changes_nothing(mode, budget, mask_kind, impl):
    inputs, mask = impl.inputs(2, 2, 150, 16), impl.mask(mask_kind, 2, 150)
    settings = {"approx_mode": mode, "block_per_row": budget}
    expected = impl.attend(inputs, mask, **settings)
    constant = torch.full((2, 1), 3.0, device=impl.device)
    results = attend_with_bias(impl, inputs, constant, mask, **settings)
    assert_all_close(results[:4], expected, 1e-5)
    assert results[4].abs().max() < 1e-4  # a softmax does not see a constant
    bias = impl.bias(2, 3)
    expected = attend_with_bias(impl, inputs, bias, mask, **settings)
    assert_close(attend_with_bias(impl, inputs, bias + 3, mask, **settings), expected, 1e-5)


@pairwise(n_blocks=[1, 2], mask_kind=MASK_KINDS[1:], mode=MODES)
def test_the_first_live_blocks_are_global(n_blocks, mask_kind, mode, impl):
    """Whole blocks of padding in front move them along."""
    inputs, mask = impl.inputs(2, 2, 120, 16), impl.mask(mask_kind, 2, 120)
    bias = impl.bias(2, 3)
    settings = {"approx_mode": mode, "block_per_row": 4, "initial_prior_first_n_blocks": 1}
    expected = attend_with_bias(impl, inputs, bias, mask, **settings)
    longer = [F.pad(x, (0, 0, 32 * n_blocks, 0), value=50.0) for x in inputs]
    results = attend_with_bias(impl, longer, bias, F.pad(mask, (32 * n_blocks, 0)), **settings)
    results = [*(x[:, :, 32 * n_blocks :] for x in results[:4]), results[4]]
    assert_close(results, expected, 1e-5)


def test_a_closed_distance_is_hidden_and_a_global_block_is_not(impl):
    query, key, value, _ = impl.inputs(1, 1, 128, 16)
    bias = torch.tensor([[0.0, -200.0]], device=impl.device)
    value = torch.zeros_like(value)
    value[:, :, 96:] = 1.0  # what the last block says
    seen = mra2_attention(query, key, value, block_per_row=4, distance_bias=bias, impl=impl.name)
    assert seen[:, :, :96].abs().max() == 0
    seen = mra2_attention(
        query, key, value, block_per_row=4, distance_bias=bias, impl=impl.name,
        initial_prior_first_n_blocks=1,
    )  # fmt: skip
    assert (seen[:, :, :32] > 0).all() and seen[:, :, 32:96].abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_matrix_is_what_attention_applies(mode):
    *inputs, _ = make_inputs(2, 2, 150, 16, dtype=torch.float64)
    settings = {"approx_mode": mode, "block_per_row": 2, "distance_bias": make_bias(2, 3)}
    matrix = mra2_attention_matrix(*inputs[:2], **settings)
    output = mra2_attention(*inputs, **settings)
    torch.testing.assert_close(matrix @ inputs[2], output, rtol=0, atol=1e-12)


# -- selection


@pairwise(rule=SELECTION_RULES, mask_kind=MASK_KINDS, first=[0, 1], distances=[1, 3, 9])
def test_scores_hold_the_bias(rule, mask_kind, first, distances, general_impl):
    """The choice from queries and keys with two more channels, whose products are the bias."""
    length, mask = 200, make_mask(mask_kind, 1, 200)
    query, key, *_ = make_inputs(1, 1, length, 8, dtype=torch.float64)
    bias = make_bias(1, distances, dtype=torch.float64)
    pairs = of_pairs(bias, length, first, mask)[0, 0]
    places = torch.arange(length) // 32
    hot = F.one_hot(places, 7).double()  # one channel per block
    block_pairs = pairs[::32][:, ::32]
    wide_query = torch.cat([query, (hot @ F.pad(block_pairs, (0, 0)))[None, None]], -1)
    wide_key = torch.cat([key, hot[None, None]], -1)
    settings = {"block_budget": 9, "selection": rule, "initial_prior_first_n_blocks": first}
    chosen = select_blocks(query, key, mask, distance_bias=bias, scale=1.0, **settings)
    expected = select_blocks(wide_query, wide_key, mask, scale=1.0, **settings)
    assert torch.equal(chosen.blocks, expected.blocks)


def test_a_closed_distance_is_not_selected(impl):
    query, key, *_ = impl.inputs(2, 2, 320, 16)
    bias = torch.tensor([[0.0, 0.0, -1e4]] * 2, device=impl.device)
    blocks = select_blocks(query, key, block_per_row=2, distance_bias=bias).blocks
    distance = (torch.arange(10)[:, None] - torch.arange(10)).abs().to(blocks.device)
    assert blocks.sum() == 2 * 2 * 20 and not blocks[..., distance > 1].any()


# -- bits


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_have_the_same_bits(mode, impl):
    inputs, mask = impl.inputs(3, 2, 150, 16), impl.mask("holes", 3, 150)
    bias = impl.bias(2, 3)
    settings = {"approx_mode": mode, "block_per_row": 2, "initial_prior_first_n_blocks": 1}
    first, second = (attend_with_bias(impl, inputs, bias, mask, **settings) for _ in range(2))
    assert_all_equal(first[:4], second[:4])
    assert torch.equal(first[4], second[4])


def test_the_number_of_threads_changes_no_bit():
    inputs = make_inputs(2, 3, 300, 16)
    bias = make_bias(3, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(attend_with_bias(Implementation("torch"), inputs, bias, block_per_row=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][4], results[1][4])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype_is_cast(dtype, impl):
    inputs = impl.inputs(1, 2, 100, 16)
    bias = impl.bias(2, 3).to(dtype)
    result = attend_with_bias(impl, inputs, bias, block_per_row=2)
    expected = attend_with_bias(impl, inputs, bias.float(), block_per_row=2)
    assert result[4].dtype == dtype
    assert_all_equal(result[:4], expected[:4])


# -- torch's machinery


@pairwise(
    mask_kind=["none", "holes"],
    choice=["all", "some"],
    mode=MODES,
    first=[0, 1],
)
def test_opcheck_accepts_the_operators(mask_kind, choice, mode, first):
    *inputs, grad = make_inputs(2, 2, 70, 8)
    mask, bias = make_mask(mask_kind, 2, 70), make_bias(2, 3)
    numbers = (2, 4, 32, first, 0, "row_normalized", 0.3, "torch", None, None, bias)
    torch.library.opcheck(ops.mra2_select, (*inputs[:2], mask, *numbers))
    blocks = None if choice == "all" else ops.mra2_select(*inputs[:2], mask, *numbers)
    settings = (mask, blocks, 0.3, mode == "sparse", 32, "torch", None, None, None)
    results = ops.mra2_forward(*inputs, *settings, bias, first)
    arguments = (grad, *inputs, *results, *settings, bias, first)
    torch.library.opcheck(ops.mra2_backward, arguments)
    *inputs, bias = (x.detach().requires_grad_() for x in (*inputs, bias))
    torch.library.opcheck(ops.mra2_forward, (*inputs, *settings, bias, first))


class _Biased(torch.nn.Module):
    """Attention with a parameter that is a bias."""

    def __init__(self, bias, **settings):
        super().__init__()
        self.bias, self.settings = torch.nn.Parameter(bias), settings

    def forward(self, query, key, value, mask=None):
        return mra2_attention(query, key, value, mask, distance_bias=self.bias, **self.settings)


@pytest.mark.parametrize("budget", [2, 8])
def test_a_compiled_module_trains_as_eager(budget, fast):
    inputs, mask = fast.inputs(2, 2, 100, 16), fast.mask("holes", 2, 100)
    settings = {"block_per_row": budget, "impl": fast.name, "initial_prior_first_n_blocks": 1}
    module = _Biased(fast.bias(2, 3), **settings)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def train(call):
        module.zero_grad()
        tensors = [x.detach().requires_grad_() for x in inputs[:3]]
        output = call(*tensors, mask)
        output.backward(inputs[3])
        return output.detach(), *(x.grad for x in (*tensors, module.bias))

    assert_close(train(compiled), train(module), 1e-6)


@pytest.mark.parametrize("masked", [True, False])
def test_an_exported_module_equals_eager_at_every_length(masked):
    module = _Biased(make_bias(2, 3), block_per_row=2, initial_prior_first_n_blocks=1)
    *inputs, _ = make_inputs(2, 2, 100, 16)
    mask = make_mask("right", 2, 100) if masked else None
    dims = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {0: dims[0], 2: dims[1]} for name in ("query", "key", "value")}
    shapes["mask"] = dict(enumerate(dims)) if masked else None
    program = torch.export.export(module, (*inputs, mask), dynamic_shapes=shapes)
    assert_exports_no_operator_of_ours(program)
    for length in (2, 33, 250):
        *inputs, _ = make_inputs(3, 2, length, 16)
        mask = make_mask("right", 3, length) if masked else None
        expected = module(*inputs, mask)
        torch.testing.assert_close(program.module()(*inputs, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant, impl):
    inputs = impl.inputs(1, 2, 100, 16)
    bias = impl.bias(2, 3)
    expected = attend_with_bias(impl, inputs, bias, block_per_row=2)
    tensors = [x.detach().requires_grad_() for x in (*inputs[:3], bias)]

    def attention(query, key, value, bias):
        settings = {"block_per_row": 2, "impl": impl.name}
        return mra2_attention(query, key, value, distance_bias=bias, **settings)

    output = checkpoint(attention, *tensors, use_reentrant=use_reentrant)
    results = (output.detach(), *torch.autograd.grad(output, tensors, inputs[3])) if not (
        use_reentrant
    ) else _backward(output, tensors, inputs[3])  # fmt: skip
    assert_close(results, expected, 0.0)


def _backward(output, tensors, grad_output):
    output.backward(grad_output)
    return output.detach(), *(x.grad for x in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_cast_inputs_give(dtype, impl):
    inputs, bias = impl.inputs(1, 2, 100, 16), impl.bias(2, 3)
    cast = [x.to(dtype) for x in inputs]
    expected = attend_with_bias(impl, cast, bias, block_per_row=2)
    tensors = [x.detach().requires_grad_() for x in (*inputs[:3], bias)]
    with torch.autocast(impl.device, dtype=dtype):
        output = mra2_attention(
            *tensors[:3], distance_bias=tensors[3], block_per_row=2, impl=impl.name
        )
        output.backward(cast[3])
    assert torch.equal(output, expected[0])
    assert torch.equal(tensors[3].grad, expected[4])
    for x, y in zip(tensors[:3], expected[1:4], strict=True):
        assert torch.equal(x.grad.to(dtype), y)


# -- what is refused

_REFUSED = {
    "a list": ([[0.0]], "distance_bias must be a torch.Tensor"),
    "one dimension": (torch.zeros(2), r"distance_bias must be \[heads, distances\] = \(2, K\)"),
    "another number of heads": (torch.zeros(3, 4), r"= \(2, K\).*got \(3, 4\)"),
    "no column": (torch.zeros(2, 0), "K of at least 1"),
    "integers": (torch.zeros(2, 4, dtype=torch.long), "distance_bias must be floating-point"),
    "another device": (torch.zeros(2, 4, device="meta"), "distance_bias is on meta"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_a_wrong_bias_is_refused_in_words(case):
    bias, message = _REFUSED[case]
    *inputs, _ = make_inputs(1, 2, 70, 8)
    for call in (
        lambda: mra2_attention(*inputs, distance_bias=bias),
        lambda: mra2_attention_matrix(*inputs[:2], distance_bias=bias),
        lambda: select_blocks(*inputs[:2], distance_bias=bias),
        lambda: multiresolution_attention(
            *inputs, resolutions=(32, 1), block_budgets=(4,), distance_bias=bias
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_chains_of_scales_take_no_bias_and_two_scales_do():
    *inputs, _ = make_inputs(1, 2, 70, 8)
    chain = {"resolutions": (16, 4, 1), "block_budgets": (4, 4), "distance_bias": make_bias(2, 3)}
    for function, tensors in (
        (multiresolution_attention, inputs),
        (multiresolution_attention_matrix, inputs[:2]),
    ):
        with pytest.raises(ValueError, match="distance_bias is for two scales that end in 1"):
            function(*tensors, **chain)
        chain_of_two = chain | {"resolutions": (32, 1), "block_budgets": (4,)}
        expected = (
            mra2_attention if function is multiresolution_attention else mra2_attention_matrix
        )(*tensors, block_budget=4, distance_bias=chain["distance_bias"])
        assert torch.equal(function(*tensors, **chain_of_two), expected)


def test_no_bias_is_a_bias_of_zero(impl):
    inputs = impl.inputs(2, 2, 150, 16)
    zero = torch.zeros(2, 1, device=impl.device)
    expected = impl.attend(inputs, block_per_row=2)
    assert_all_close(attend_with_bias(impl, inputs, zero, block_per_row=2)[:4], expected, 1e-6)
    assert torch.allclose(
        dense_attention(*inputs[:3]),
        mra2_attention(*inputs[:3], block_per_row=9, distance_bias=zero, impl=impl.name),
        atol=1e-5,
    )


def test_a_ready_selection_keeps_its_global_blocks():
    *inputs, _ = make_inputs(1, 2, 130, 8, dtype=torch.float64)
    blocks = torch.zeros(1, 2, 5, 5, dtype=torch.bool)
    settings = {"selection": BlockSelection(blocks, 32), "distance_bias": make_bias(2, 3)}
    with_global = mra2_attention(*inputs, **settings, initial_prior_first_n_blocks=1)
    assert not torch.allclose(with_global, mra2_attention(*inputs, **settings))
