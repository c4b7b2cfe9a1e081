"""What must hold of MRA-2 whatever its implementation: padding, order, limits, determinism."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    assert_all_close,
    assert_all_equal,
    dense_attention,
    few_examples,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_attention import (
    mra2_attention,
    mra2_attention_matrix,
    select_blocks,
    torch_impl,
)

for_impls = pytest.mark.parametrize("impl", ["reference", "torch"])
for_modes = pytest.mark.parametrize("mode", MODES)
TOLERANCE = 1e-5


def attend(inputs, mask=None, **arguments):
    def attention(query, key, value):
        return mra2_attention(query, key, value, mask, **arguments)

    return outputs_and_gradients(attention, *inputs)


def real_tokens(mask, batch, length):
    """The mask as `[B, 1, N, 1]`, all True for None."""
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    return mask[:, None, :, None]


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# -- what surrounds a sample does not matter


def surrounded(inputs, mask, before, after):
    """Inputs and mask with that many tokens of padding, which hold large values, at either side."""

    def extend(x):
        batch, heads, _, dim = x.shape
        left = torch.full((batch, heads, before, dim), 50.0, dtype=x.dtype)
        right = torch.full((batch, heads, after, dim), -50.0, dtype=x.dtype)
        return torch.cat([left, x, right], 2)

    return [extend(x) for x in inputs], torch.nn.functional.pad(mask, (before, after))


@for_modes
@for_impls
@given(
    length=st.integers(1, 130),
    after=st.integers(1, 100),
    kind=st.sampled_from(MASK_KINDS[1:]),
    budget=st.sampled_from([1, 2, 3, 8]),
)
@few_examples
def test_trailing_padding_changes_nothing(impl, mode, length, after, kind, budget):
    inputs, mask = make_inputs(2, 2, length, 8), make_mask(kind, 2, length)
    arguments = {"impl": impl, "approx_mode": mode, "block_per_row": budget}
    expected = attend(inputs, mask, **arguments)
    longer, longer_mask = surrounded(inputs, mask, 0, after)
    result = attend(longer, longer_mask, **arguments)
    assert_all_close([x[:, :, :length] for x in result], expected, TOLERANCE)
    if kind == "right":
        unpadded = [x[:1, :, : mask[0].sum()] for x in inputs]
        alone = attend(unpadded, **arguments)
        assert_all_close([x[:1, :, : mask[0].sum()] for x in result], alone, TOLERANCE)


@for_modes
@for_impls
@given(
    length=st.integers(1, 130),
    n_blocks=st.integers(1, 3),
    kind=st.sampled_from(MASK_KINDS[1:]),
    budget=st.sampled_from([1, 2, 3, 8]),
)
@few_examples
def test_leading_padding_by_whole_blocks_changes_nothing(
    impl, mode, length, n_blocks, kind, budget
):
    inputs, mask = make_inputs(2, 2, length, 8), make_mask(kind, 2, length)
    arguments = {"impl": impl, "approx_mode": mode, "block_per_row": budget}
    arguments |= {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    longer, longer_mask = surrounded(inputs, mask, 32 * n_blocks, 0)
    result = attend(longer, longer_mask, **arguments)
    expected = attend(inputs, mask, **arguments)
    assert_all_close([x[:, :, 32 * n_blocks :] for x in result], expected, TOLERANCE)


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [2, 8])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_batch_neighbours_change_nothing(mask_kind, budget, impl, mode):
    inputs, mask = make_inputs(3, 2, 200, 16), make_mask(mask_kind, 3, 200)
    arguments = {"impl": impl, "approx_mode": mode, "block_per_row": budget}
    together = attend(inputs, mask, **arguments)
    for i in range(3):
        sample = slice(i, i + 1)
        sample_mask = None if mask is None else mask[sample]
        alone = attend([x[sample] for x in inputs], sample_mask, **arguments)
        assert_all_close([x[sample] for x in together], alone, TOLERANCE)


@for_modes
@for_impls
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_permuted_batch_and_heads_permute_the_result(mask_kind, impl, mode):
    inputs, mask = make_inputs(3, 4, 200, 16), make_mask(mask_kind, 3, 200)
    samples, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])

    def permute(tensors):
        return [x[samples][:, heads] for x in tensors]

    arguments = {"impl": impl, "approx_mode": mode, "block_per_row": 2}
    expected = permute(attend(inputs, mask, **arguments))
    permuted_mask = None if mask is None else mask[samples]
    assert_all_close(attend(permute(inputs), permuted_mask, **arguments), expected, TOLERANCE)


# -- limits


@for_impls
@pytest.mark.parametrize("budget", [1, 8])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_constant_query_and_key_give_the_mean_of_real_values(mask_kind, budget, impl):
    *_, value, _ = make_inputs(2, 2, 150, 8)
    constant = torch.full_like(value, 0.7)
    mask = make_mask(mask_kind, 2, 150)
    real = real_tokens(mask, 2, 150)
    mean = (value * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
    output = mra2_attention(constant, constant, value, mask, block_per_row=budget, impl=impl)
    torch.testing.assert_close(output, mean * real, rtol=0, atol=1e-5)


@for_impls
@given(length=st.integers(1, 300), kind=st.sampled_from(MASK_KINDS), seed=st.integers(0, 999))
@few_examples
def test_no_real_row_is_empty_when_the_budget_allows_one_pair_each(impl, length, kind, seed):
    query, key, value, _ = make_inputs(2, 2, length, 8, seed=seed)
    mask = make_mask(kind, 2, length)
    output = mra2_attention(
        query,
        key,
        torch.ones_like(value),
        mask,
        block_per_row=1,
        approx_mode="sparse",
        impl=impl,
    )
    real = real_tokens(mask, 2, length).to(output.dtype)
    torch.testing.assert_close(output, real.expand_as(output), rtol=0, atol=1e-5)


@for_impls
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
@pytest.mark.parametrize("length", [33, 100, 257, 700])
@pytest.mark.parametrize("constants", [(0.3, 0.21), (0.7, 0.7), (-2.1, 1.3), "vectors"])
def test_no_real_row_is_empty_with_constant_query_and_key(constants, length, mask_kind, impl):
    """Blocks of different sizes must tie exactly, or rounding decides which rows go without."""
    value = torch.ones(2, 2, length, 8)
    if constants == "vectors":
        query, key = (torch.randn(1, 1, 1, 8).expand_as(value) for _ in range(2))
    else:
        query, key = (torch.full_like(value, constant) for constant in constants)
    mask = make_mask(mask_kind, 2, length)
    arguments = {"block_per_row": 1, "approx_mode": "sparse", "impl": impl}
    output = mra2_attention(query, key, value, mask, **arguments)
    real = real_tokens(mask, 2, length).to(output.dtype)
    torch.testing.assert_close(output, real.expand_as(output), rtol=0, atol=1e-5)


@for_impls
def test_sparse_rows_without_a_block_are_zero(impl):
    inputs = make_inputs(1, 1, 128, 8)
    chosen = select_blocks(*inputs[:2], block_budget=1)
    results = attend(inputs, selection=chosen, approx_mode="sparse", impl=impl)
    row, column = chosen.blocks[0, 0].nonzero()[0].tolist()
    for x, block in zip(results, (row, row, column, column), strict=True):
        inside = torch.zeros(128, dtype=torch.bool)
        inside[32 * block : 32 * block + 32] = True
        assert x[:, :, inside].any() and not x[:, :, ~inside].any()


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [2, 8])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_huge_logits_stay_finite(mask_kind, budget, impl, mode):
    inputs = make_inputs(2, 2, 200, 16, amplitude=100.0)
    logits = inputs[0] @ inputs[1].mT / 4
    assert logits.max() > 1e4 and logits.min() < -1e4
    mask = make_mask(mask_kind, 2, 200)
    results = attend(inputs, mask, block_per_row=budget, approx_mode=mode, impl=impl)
    assert all(x.isfinite().all() for x in results)
    assert results[0].abs().max() <= inputs[2].abs().max() * (1 + 1e-5)
    real = real_tokens(mask, 2, 200)[:, 0, :, 0]
    one = attend([*inputs[:2], torch.ones_like(inputs[2]), inputs[3]], mask, impl=impl)[0]
    torch.testing.assert_close(one[..., 0], real[:, None].expand(-1, 2, -1).float())


@for_impls
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_equal_huge_logits_give_the_mean_of_real_values(mask_kind, sign, flash, impl, monkeypatch):
    if not flash:
        monkeypatch.setattr(torch_impl, "flash_is_available", lambda device_type: False)
    *_, value, grad = make_inputs(2, 2, 70, 16)
    query = torch.full_like(value, 50.0)  # logits of 1e4, and of 0 at padding that is not hidden
    mask = make_mask(mask_kind, 2, 70)
    real = real_tokens(mask, 2, 70)
    mean = (value * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
    for budget in (1, 8):
        results = attend([query, sign * query, value, grad], mask, block_per_row=budget, impl=impl)
        assert all(x.isfinite().all() for x in results)
        torch.testing.assert_close(results[0], mean * real, rtol=0, atol=1e-2)


@for_modes
def test_huge_logits_agree_with_reference_in_float64(mode):
    inputs = make_inputs(2, 2, 200, 16, amplitude=100.0, dtype=torch.float64)
    mask = make_mask("holes", 2, 200)
    chosen = select_blocks(*inputs[:2], mask, block_per_row=2)
    fast, expected = (
        attend(inputs, mask, selection=chosen, approx_mode=mode, impl=impl)
        for impl in ("torch", "reference")
    )
    assert_all_close(fast, expected, 1e-9)


# -- padding


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [2, 8])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mask_kind", MASK_KINDS[1:])
def test_padding_that_holds_nan_or_inf_does_not_leak(mask_kind, poison, budget, impl, mode):
    inputs, mask = make_inputs(2, 2, 200, 16), make_mask(mask_kind, 2, 200)
    arguments = {"block_per_row": budget, "approx_mode": mode, "impl": impl}
    padding = ~mask[:, None, :, None]
    clean = [x.masked_fill(padding, 0) for x in inputs]
    poisoned = [x.masked_fill(padding, poison) for x in inputs[:3]]
    assert_all_equal(
        attend([*poisoned, inputs[3]], mask, **arguments),
        attend([*clean[:3], inputs[3]], mask, **arguments),
    )


@for_modes
@for_impls
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_padding_that_holds_inf_does_not_leak_in_half_types(dtype, impl, mode):
    inputs, mask = make_inputs(2, 2, 200, 16, dtype=dtype), make_mask("holes", 2, 200)
    arguments = {"block_per_row": 2, "approx_mode": mode, "impl": impl}
    padding = ~mask[:, None, :, None]
    clean = [x.masked_fill(padding, 0) for x in inputs]
    poisoned = [x.masked_fill(padding, float("inf")) for x in inputs[:3]]
    assert_all_equal(
        attend([*poisoned, inputs[3]], mask, **arguments),
        attend([*clean[:3], inputs[3]], mask, **arguments),
    )


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [2, 8])
@pytest.mark.parametrize("mask_kind", MASK_KINDS[1:])
def test_the_gradient_that_arrives_at_padding_is_ignored(mask_kind, budget, impl, mode):
    *inputs, grad = make_inputs(2, 2, 200, 16)
    mask = make_mask(mask_kind, 2, 200)
    arguments = {"block_per_row": budget, "approx_mode": mode, "impl": impl}
    padding = ~mask[:, None, :, None]
    expected = attend([*inputs, grad.masked_fill(padding, 0)], mask, **arguments)
    for poison in (1e30, float("nan"), float("inf")):
        poisoned = grad.masked_fill(padding, poison)
        assert_all_equal(attend([*inputs, poisoned], mask, **arguments), expected)


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mask_kind", MASK_KINDS[1:])
def test_padded_tokens_give_and_get_exact_zeros(mask_kind, dtype, budget, impl, mode):
    inputs, mask = make_inputs(2, 2, 200, 16, dtype=dtype), make_mask(mask_kind, 2, 200)
    results = attend(inputs, mask, block_per_row=budget, approx_mode=mode, impl=impl)
    real = real_tokens(mask, 2, 200).expand_as(inputs[0])
    for x in results:
        assert not x[~real].any()
        assert x[real].any() and x.isfinite().all()


@for_modes
@for_impls
@pytest.mark.parametrize("length", [1, 33, 300])
def test_a_batch_of_empty_samples_gives_zeros(length, impl, mode):
    inputs, mask = make_inputs(2, 2, length, 8), torch.zeros(2, length, dtype=torch.bool)
    results = attend(inputs, mask, block_per_row=2, approx_mode=mode, impl=impl)
    assert not any(x.any() for x in results)


@for_impls
def test_an_integer_mask_means_what_the_bool_mask_means(impl):
    inputs, mask = make_inputs(2, 2, 200, 8), make_mask("holes", 2, 200)
    expected = attend(inputs, mask, block_per_row=2, impl=impl)
    for other in (mask.long(), mask.to(torch.uint8), mask.int() * -3):
        assert_all_equal(attend(inputs, other, block_per_row=2, impl=impl), expected)


@for_impls
def test_a_mask_of_ones_is_no_mask(impl):
    inputs, mask = make_inputs(2, 2, 200, 8), torch.ones(2, 200, dtype=torch.bool)
    for budget in (2, 8):
        arguments = {"block_per_row": budget, "impl": impl}
        assert_all_close(attend(inputs, mask, **arguments), attend(inputs, **arguments), TOLERANCE)


@for_modes
@for_impls
@pytest.mark.parametrize("batch, heads", [(0, 2), (2, 0)])
def test_an_empty_batch_gives_an_empty_result(batch, heads, impl, mode):
    query = torch.ones(batch, heads, 40, 8, requires_grad=True)
    mask = torch.ones(batch, 40, dtype=torch.bool)
    for some_mask in (None, mask):
        output = mra2_attention(query, query, query, some_mask, approx_mode=mode, impl=impl)
        output.sum().backward()
        assert output.shape == query.shape == query.grad.shape


# -- determinism


@for_modes
@for_impls
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_give_the_same_bits(dtype, threads, impl, mode):
    inputs, mask = make_inputs(2, 3, 500, 32, dtype=dtype), make_mask("holes", 2, 500)
    for budget in (3, 16):
        arguments = {"block_per_row": budget, "approx_mode": mode, "impl": impl}
        first = attend(inputs, mask, **arguments)
        for _ in range(3):
            assert_all_equal(attend(inputs, mask, **arguments), first)


# -- derivatives


@for_modes
@for_impls
@pytest.mark.parametrize("budget", [3, 100])
def test_gradients_are_those_of_finite_differences(budget, impl, mode):
    inputs = [
        x.requires_grad_() for x in make_inputs(2, 1, 11, 3, dtype=torch.float64, amplitude=1.5)[:3]
    ]
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, [2, 9]] = False
    mask[1, 4:9] = False
    chosen = select_blocks(*inputs[:2], mask, block_size=4, block_budget=budget)
    attention = functools.partial(
        mra2_attention,
        attention_mask=mask,
        selection=chosen,
        block_size=4,
        approx_mode=mode,
        impl=impl,
    )
    assert torch.autograd.gradcheck(attention, inputs)


@for_modes
def test_gradients_of_the_dense_path_are_those_of_finite_differences(mode):
    inputs = [x.requires_grad_() for x in make_inputs(2, 1, 7, 3, dtype=torch.float64)[:3]]
    attention = functools.partial(
        mra2_attention, attention_mask=make_mask("right", 2, 7), approx_mode=mode, impl="torch"
    )
    assert torch.autograd.gradcheck(attention, inputs)


# -- block size, scale, matrix


@for_modes
@for_impls
@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
@pytest.mark.parametrize("mask_kind", ["none", "holes"])
def test_other_block_sizes_reach_dense_attention(mask_kind, block_size, impl, mode):
    inputs, mask = make_inputs(2, 2, 70, 8), make_mask(mask_kind, 2, 70)
    expected = outputs_and_gradients(
        lambda query, key, value: dense_attention(query, key, value, mask), *inputs
    )
    chosen = select_blocks(*inputs[:2], mask, block_size=block_size, block_per_row=70)
    arguments = {"block_size": block_size, "approx_mode": mode, "impl": impl}
    for choice in ({"block_per_row": 70}, {"selection": chosen}):
        assert_all_close(attend(inputs, mask, **choice, **arguments), expected, TOLERANCE)


@for_impls
def test_one_token_per_block_is_dense_attention_at_any_budget(impl):
    inputs, mask = make_inputs(2, 2, 40, 8), make_mask("holes", 2, 40)
    expected = outputs_and_gradients(
        lambda query, key, value: dense_attention(query, key, value, mask), *inputs
    )
    result = attend(inputs, mask, block_size=1, block_per_row=2, impl=impl)
    assert_all_close(result, expected, TOLERANCE)


@for_impls
@pytest.mark.parametrize("budget", [2, 8])
def test_scale_multiplies_the_logits_and_defaults_to_the_root_of_the_head_dim(budget, impl):
    query, key, value, grad = make_inputs(2, 2, 200, 16, dtype=torch.float64)
    arguments = {"block_per_row": budget, "impl": impl}
    default = attend([query, key, value, grad], **arguments)
    assert_all_equal(attend([query, key, value, grad], scale=0.25, **arguments), default)
    scaled = mra2_attention(query, key, value, scale=0.1, **arguments)
    expected = mra2_attention(query * 0.4, key, value, **arguments)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-10)
    assert (scaled - default[0]).abs().max() > 1e-2
    backwards = mra2_attention(query, key, value, scale=-1, **arguments)
    expected = mra2_attention(-4 * query, key, value, **arguments)
    torch.testing.assert_close(backwards, expected, rtol=0, atol=1e-10)


@for_modes
@pytest.mark.parametrize("rule", ["row_normalized", "global", "refined"])
@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_matrix_rows_sum_to_one_and_the_matrix_times_value_is_the_output(mask_kind, rule, mode):
    query, key, value, _ = make_inputs(2, 2, 200, 16)
    mask = make_mask(mask_kind, 2, 200)
    # 40 of 49 pairs leave no row without a pair
    arguments = {"block_budget": 40, "approx_mode": mode, "selection": rule}
    matrix = mra2_attention_matrix(query, key, mask, **arguments)
    real = real_tokens(mask, 2, 200)
    assert (matrix >= 0).all()
    assert not (matrix * ~real.mT).any()
    sums = matrix.sum(-1, keepdim=True)
    torch.testing.assert_close(sums, real.expand_as(sums).float(), rtol=0, atol=1e-5)
    for impl in ("reference", "torch"):
        output = mra2_attention(query, key, value, mask, impl=impl, **arguments)
        torch.testing.assert_close(matrix @ value, output, rtol=0, atol=1e-5)


def test_matrix_is_float32_for_half_types_and_float64_for_float64():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        query, key, *_ = make_inputs(1, 1, 40, 8, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert mra2_attention_matrix(query, key).dtype == wide
        with torch.autocast("cpu", torch.bfloat16):
            assert mra2_attention_matrix(query, key).dtype == wide


@for_modes
@given(length=st.integers(33, 160), budget=st.integers(1, 25), kind=st.sampled_from(MASK_KINDS))
@settings(few_examples, max_examples=10)
def test_matrix_holds_token_logits_inside_the_choice_and_block_means_outside(
    mode, length, budget, kind
):
    """The definition, read off the matrix: log-ratios inside a row are differences of logits."""
    query, key, *_ = make_inputs(1, 1, length, 8, dtype=torch.float64)
    mask = make_mask(kind if kind != "empty sample" else "none", 1, length)
    chosen = select_blocks(query, key, mask, block_budget=budget)
    matrix = mra2_attention_matrix(query, key, mask, selection=chosen, approx_mode=mode)[0, 0]
    real = real_tokens(mask, 1, length)[0, 0, :, 0]
    block = torch.arange(length) // 32
    one_hot = torch.nn.functional.one_hot(block).double() * real[:, None]  # [N, R]
    to_mean = (one_hot @ (one_hot / one_hot.sum(0).clamp_min(1)).T)[real][:, real]
    query, key = query[0, 0, real], key[0, 0, real]
    inside = chosen.blocks[0, 0][block[real][:, None], block[real]]
    outside = (to_mean @ query) @ (to_mean @ key).T
    if mode == "sparse":
        outside = torch.full_like(outside, -torch.inf)
    logits = torch.where(inside, query @ key.T, outside) * 8**-0.5
    expected = torch.softmax(logits, -1).nan_to_num(0.0)
    torch.testing.assert_close(matrix[real][:, real], expected, rtol=0, atol=1e-12)
