"""What must hold of MRA-2 in every implementation: padding, order, limits, determinism."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    INTERPRETED,
    MASK_KINDS,
    MODES,
    REFERENCE,
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

from mra_attention import mra2_attention_matrix, select_blocks
from mra_attention.selection import SELECTION_RULES
from pairwise import pairwise

TOLERANCE = 1e-5
BUDGETS = (2, 8)  # some blocks, and all of them at the lengths below

lengths = st.integers(1, 70 if INTERPRETED else 130)
kinds_of_padding = st.sampled_from(MASK_KINDS[1:])
budgets = st.sampled_from([1, 2, 3, 8])
modes = st.sampled_from(MODES)


def real_tokens(mask, inputs):
    """The mask as `[B, 1, N, 1]`, all True for None."""
    x = inputs[0]
    mask = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
    return mask[:, None, :, None]


def mean_of_real_values(value, real):
    """Zero at padding."""
    return (value * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1) * real


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- what surrounds a sample does not matter


def surrounded(inputs, mask, before, after):
    """Inputs and mask with that many tokens of padding, which hold large values, at either side."""

    def extend(x):
        x = torch.nn.functional.pad(x, (0, 0, before, 0), value=50.0)
        return torch.nn.functional.pad(x, (0, 0, 0, after), value=-50.0)

    return [extend(x) for x in inputs], torch.nn.functional.pad(mask, (before, after))


@given(length=lengths, after=st.integers(1, 100), kind=kinds_of_padding, budget=budgets, mode=modes)
@settings(few_examples, max_examples=3 if INTERPRETED else 40)
def test_trailing_padding_changes_nothing(impl, length, after, kind, budget, mode):
    inputs, mask = impl.inputs(2, 2, length, 16), impl.mask(kind, 2, length)
    arguments = {"approx_mode": mode, "block_per_row": budget}
    longer, longer_mask = surrounded(inputs, mask, 0, after)
    result = impl.attend(longer, longer_mask, **arguments)
    expected = impl.attend(inputs, mask, **arguments)
    assert_all_close([x[:, :, :length] for x in result], expected, TOLERANCE)
    if kind == "right":
        unpadded = [x[:1, :, : mask[0].sum()] for x in inputs]
        alone = impl.attend(unpadded, **arguments)
        assert_all_close([x[:1, :, : mask[0].sum()] for x in result], alone, TOLERANCE)


@given(
    length=lengths, n_blocks=st.integers(1, 3), kind=kinds_of_padding, budget=budgets, mode=modes
)
@settings(few_examples, max_examples=3 if INTERPRETED else 40)
def test_leading_padding_by_whole_blocks_changes_nothing(
    impl, length, n_blocks, kind, budget, mode
):
    inputs, mask = impl.inputs(2, 2, length, 16), impl.mask(kind, 2, length)
    arguments = {"approx_mode": mode, "block_per_row": budget}
    arguments |= {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    longer, longer_mask = surrounded(inputs, mask, 32 * n_blocks, 0)
    result = impl.attend(longer, longer_mask, **arguments)
    expected = impl.attend(inputs, mask, **arguments)
    assert_all_close([x[:, :, 32 * n_blocks :] for x in result], expected, TOLERANCE)


@pairwise(mask_kind=MASK_KINDS, budget=BUDGETS, mode=MODES)
def test_batch_neighbours_change_nothing(mask_kind, budget, mode, impl):
    inputs, mask = impl.inputs(3, 2, 100, 16), impl.mask(mask_kind, 3, 100)
    arguments = {"approx_mode": mode, "block_per_row": budget}
    together = impl.attend(inputs, mask, **arguments)
    for i in range(3):
        sample = slice(i, i + 1)
        sample_mask = None if mask is None else mask[sample]
        alone = impl.attend([x[sample] for x in inputs], sample_mask, **arguments)
        assert_all_close([x[sample] for x in together], alone, TOLERANCE)


@pairwise(mask_kind=["none", "holes", "empty sample"], mode=MODES)
def test_permuted_batch_and_heads_permute_the_result(mask_kind, mode, impl):
    inputs, mask = impl.inputs(3, 3, 100, 16), impl.mask(mask_kind, 3, 100)
    samples, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])

    def permute(tensors):
        return [x[samples][:, heads] for x in tensors]

    arguments = {"approx_mode": mode, "block_per_row": 2}
    expected = permute(impl.attend(inputs, mask, **arguments))
    permuted_mask = None if mask is None else mask[samples]
    assert_all_close(impl.attend(permute(inputs), permuted_mask, **arguments), expected, TOLERANCE)


@pairwise(mask_kind=MASK_KINDS, budget=BUDGETS, mode=MODES)
def test_transposed_inputs_and_gradients_give_the_same_result(mask_kind, budget, mode, impl):
    inputs, mask = impl.inputs(2, 3, 100, 32), impl.mask(mask_kind, 2, 100)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not transposed[0].is_contiguous()
    arguments = {"approx_mode": mode, "block_per_row": budget}
    expected = impl.attend(inputs, mask, **arguments)
    assert_all_close(impl.attend(transposed, mask, **arguments), expected, 1e-6)


@pairwise(budget=BUDGETS, mode=MODES)
def test_an_expanded_gradient_is_accepted(budget, mode, impl):
    *inputs, _ = impl.inputs(2, 2, 100, 32)
    expanded = inputs[0].new_ones(()).expand(inputs[0].shape)  # of `output.sum().backward()`
    arguments = {"approx_mode": mode, "block_per_row": budget}
    result = impl.attend([*inputs, expanded], **arguments)
    expected = impl.attend([*inputs, expanded.contiguous()], **arguments)
    assert_all_close(result, expected, 1e-6)


# -- limits


@pairwise(length=[1, 33, 100, 150], mask_kind=MASK_KINDS, mode=MODES)
def test_full_budget_is_dense_attention(length, mask_kind, mode, impl):
    inputs, mask = impl.inputs(2, 1, length, 16), impl.mask(mask_kind, 2, length)

    def dense(query, key, value):
        return dense_attention(query, key, value, mask)

    expected = outputs_and_gradients(dense, *inputs)
    n_blocks = (length + 31) // 32
    everything = select_blocks(*inputs[:2], mask, block_per_row=n_blocks)
    for choice in (
        {"block_per_row": n_blocks},
        {"block_budget": n_blocks**2},
        {"selection": everything},
    ):
        assert_all_close(impl.attend(inputs, mask, approx_mode=mode, **choice), expected, TOLERANCE)


@pairwise(mask_kind=MASK_KINDS, budget=[1, 8])
def test_constant_query_and_key_give_the_mean_of_real_values(mask_kind, budget, impl):
    inputs, mask = impl.inputs(2, 2, 100, 16), impl.mask(mask_kind, 2, 100)
    value, constant = inputs[2], torch.full_like(inputs[2], 0.7)
    output = impl.attention(mask, block_per_row=budget)(constant, constant, value)
    expected = mean_of_real_values(value, real_tokens(mask, inputs))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def assert_no_real_row_is_empty(query, key, mask, impl):
    """One pair for each row, and nothing else: rows of values of 1 are 1."""
    settings = {"block_per_row": 1, "approx_mode": "sparse"}
    output = impl.attention(mask, **settings)(query, key, torch.ones_like(query))
    real = real_tokens(mask, [query]).to(output.dtype)
    torch.testing.assert_close(output, real.expand_as(output), rtol=0, atol=1e-5)


@given(
    length=st.integers(1, 100 if INTERPRETED else 300),
    kind=st.sampled_from(MASK_KINDS),
    seed=st.integers(0, 999),
)
@few_examples
def test_no_real_row_is_empty_when_the_budget_allows_one_pair_each(impl, length, kind, seed):
    query, key, *_ = impl.inputs(2, 2, length, 16, seed=seed)
    assert_no_real_row_is_empty(query, key, impl.mask(kind, 2, length), impl)


@pairwise(
    constants=[(0.3, 0.21), (0.7, 0.7), (-2.1, 1.3), "vectors"],
    length=[33, 100, 257, 700],
    mask_kind=MASK_KINDS,
)
def test_no_real_row_is_empty_with_constant_query_and_key(constants, length, mask_kind, impl):
    """Blocks of different sizes must tie exactly, or rounding decides which rows go without."""
    if constants == "vectors":
        query, key = (x[:1, :1, :1].expand(2, 2, length, 16) for x in impl.inputs(1, 1, 1, 16)[:2])
    else:
        like = impl.inputs(2, 2, length, 16)[0]
        query, key = (torch.full_like(like, constant) for constant in constants)
    assert_no_real_row_is_empty(query, key, impl.mask(mask_kind, 2, length), impl)


def test_sparse_rows_without_a_block_are_zero(impl):
    inputs = impl.inputs(1, 1, 128, 16)
    selection = select_blocks(*inputs[:2], block_budget=1)
    results = impl.attend(inputs, selection=selection, approx_mode="sparse")
    row, column = selection.blocks[0, 0].nonzero()[0].tolist()
    for x, block in zip(results, (row, row, column, column), strict=True):
        inside = torch.zeros(128, dtype=torch.bool)
        inside[32 * block : 32 * block + 32] = True
        assert x[:, :, inside].any() and not x[:, :, ~inside].any()


@pairwise(mask_kind=MASK_KINDS, budget=BUDGETS, mode=MODES)
def test_huge_logits_stay_finite(mask_kind, budget, mode, impl):
    inputs, mask = impl.inputs(2, 2, 150, 16, amplitude=100.0), impl.mask(mask_kind, 2, 150)
    logits = inputs[0] @ inputs[1].mT / 4
    assert logits.max() > 1e4 and logits.min() < -1e4
    results = impl.attend(inputs, mask, block_per_row=budget, approx_mode=mode)
    assert all(x.isfinite().all() for x in results)
    assert results[0].abs().max() <= inputs[2].abs().max() * (1 + 1e-5)
    one = impl.attention(mask)(*inputs[:2], torch.ones_like(inputs[2]))
    torch.testing.assert_close(one, real_tokens(mask, inputs).expand_as(one).float())


@pairwise(mask_kind=MASK_KINDS, sign=[-1, 1], budget=[1, 8])
def test_equal_huge_logits_give_the_mean_of_real_values(mask_kind, sign, budget, impl):
    inputs, mask = impl.inputs(2, 2, 70, 16), impl.mask(mask_kind, 2, 70)
    *_, value, grad = inputs
    query = torch.full_like(value, 50.0)  # logits of 1e4, and of 0 at padding that is not hidden
    results = impl.attend([query, sign * query, value, grad], mask, block_per_row=budget)
    assert all(x.isfinite().all() for x in results)
    expected = mean_of_real_values(value, real_tokens(mask, inputs))
    torch.testing.assert_close(results[0], expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_huge_logits_agree_with_reference_in_float64(mode, general_fast):
    inputs = general_fast.inputs(2, 2, 200, 16, amplitude=100.0, dtype=torch.float64)
    mask = general_fast.mask("holes", 2, 200)
    selection = select_blocks(*inputs[:2], mask, block_per_row=2)
    results, expected = (
        x.attend(inputs, mask, selection=selection, approx_mode=mode)
        for x in (general_fast, REFERENCE)
    )
    assert_all_close(results, expected, 1e-9)


# -- padding


def filled(inputs, mask, content):
    """Query, key and value with `content` at padding; the gradient as it is."""
    padding = ~mask[:, None, :, None]
    return [*(x.masked_fill(padding, content) for x in inputs[:3]), inputs[3]]


@pairwise(
    mask_kind=MASK_KINDS[1:],
    poison=[float("nan"), float("inf"), -float("inf")],
    budget=BUDGETS,
    mode=MODES,
)
def test_padding_that_holds_nan_or_inf_does_not_leak(mask_kind, poison, budget, mode, impl):
    inputs, mask = impl.inputs(2, 2, 150, 16), impl.mask(mask_kind, 2, 150)
    arguments = {"block_per_row": budget, "approx_mode": mode}
    assert_all_equal(
        impl.attend(filled(inputs, mask, poison), mask, **arguments),
        impl.attend(filled(inputs, mask, 0), mask, **arguments),
    )


@pairwise(dtype=[torch.float16, torch.bfloat16], mode=MODES)
def test_padding_that_holds_inf_does_not_leak_in_half_types(dtype, mode, impl):
    inputs, mask = impl.inputs(2, 2, 100, 16, dtype=dtype), impl.mask("holes", 2, 100)
    arguments = {"block_per_row": 2, "approx_mode": mode}
    assert_all_equal(
        impl.attend(filled(inputs, mask, float("inf")), mask, **arguments),
        impl.attend(filled(inputs, mask, 0), mask, **arguments),
    )


@pairwise(
    mask_kind=MASK_KINDS[1:], poison=[1e30, float("nan"), float("inf")], budget=BUDGETS, mode=MODES
)
def test_the_gradient_that_arrives_at_padding_is_ignored(mask_kind, poison, budget, mode, impl):
    *inputs, grad = impl.inputs(2, 2, 150, 16)
    mask = impl.mask(mask_kind, 2, 150)
    arguments = {"block_per_row": budget, "approx_mode": mode}
    padding = ~mask[:, None, :, None]
    expected = impl.attend([*inputs, grad.masked_fill(padding, 0)], mask, **arguments)
    poisoned = grad.masked_fill(padding, poison)
    assert_all_equal(impl.attend([*inputs, poisoned], mask, **arguments), expected)


@pairwise(
    mask_kind=MASK_KINDS[1:], dtype=[torch.float32, torch.bfloat16], budget=BUDGETS, mode=MODES
)
def test_padded_tokens_give_and_get_exact_zeros(mask_kind, dtype, budget, mode, impl):
    inputs, mask = impl.inputs(2, 2, 150, 16, dtype=dtype), impl.mask(mask_kind, 2, 150)
    results = impl.attend(inputs, mask, block_per_row=budget, approx_mode=mode)
    real = real_tokens(mask, inputs).expand_as(inputs[0])
    for x in results:
        assert not x[~real].any()
        assert x[real].any() and x.isfinite().all()


@pairwise(length=[1, 33, 300], mode=MODES)
def test_a_batch_of_empty_samples_gives_zeros(length, mode, impl):
    inputs = impl.inputs(2, 2, length, 16)
    mask = inputs[0].new_zeros(2, length, dtype=torch.bool)
    results = impl.attend(inputs, mask, block_per_row=2, approx_mode=mode)
    assert not any(x.any() for x in results)


def test_an_integer_mask_means_what_the_bool_mask_means(impl):
    inputs, mask = impl.inputs(2, 2, 100, 16), impl.mask("holes", 2, 100)
    expected = impl.attend(inputs, mask, block_per_row=2)
    for other in (mask.long(), mask.to(torch.uint8), mask.int() * -3):
        assert_all_equal(impl.attend(inputs, other, block_per_row=2), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_mask_of_ones_is_no_mask(budget, impl):
    inputs = impl.inputs(2, 2, 100, 16)
    mask = inputs[0].new_ones(2, 100, dtype=torch.bool)
    arguments = {"block_per_row": budget}
    expected = impl.attend(inputs, **arguments)
    assert_all_close(impl.attend(inputs, mask, **arguments), expected, TOLERANCE)


@pairwise(shape=[(0, 2), (2, 0)], mode=MODES)
def test_an_empty_batch_gives_an_empty_result(shape, mode, impl):
    query = torch.ones(*shape, 40, 16, requires_grad=True, device=impl.device)
    mask = torch.ones(shape[0], 40, dtype=torch.bool, device=impl.device)
    for some_mask in (None, mask):
        output = impl.attention(some_mask, approx_mode=mode)(query, query, query)
        output.sum().backward()
        assert output.shape == query.shape == query.grad.shape


# -- determinism


@pairwise(threads=[1, 2], dtype=[torch.float32, torch.bfloat16], mode=MODES)
def test_two_runs_give_the_same_bits(threads, dtype, mode, impl, set_threads):
    set_threads(threads)
    length = 100 if INTERPRETED else 500
    inputs, mask = impl.inputs(2, 3, length, 32, dtype=dtype), impl.mask("holes", 2, length)
    for budget in (3, 16):
        arguments = {"block_per_row": budget, "approx_mode": mode}
        first = impl.attend(inputs, mask, **arguments)
        for _ in range(1 if INTERPRETED else 3):
            assert_all_equal(impl.attend(inputs, mask, **arguments), first)


def test_a_ready_selection_stands_for_its_own_budget_and_priors(impl):
    inputs = impl.inputs(2, 2, 200, 16)
    choice = {"block_budget": 9, "initial_prior_first_n_blocks": 1}
    selection = select_blocks(*inputs[:2], **choice)
    expected = impl.attend(inputs, selection=selection)
    for beside in (choice, {"block_per_row": 1}):
        assert_all_equal(impl.attend(inputs, selection=selection, **beside), expected)


# -- derivatives


@pairwise(budget=[3, 100], mode=MODES)
def test_gradients_are_those_of_finite_differences(budget, mode, general_impl):
    inputs = general_impl.inputs(2, 1, 11, 3, dtype=torch.float64, amplitude=1.5)[:3]
    mask = torch.ones(2, 11, dtype=torch.bool, device=general_impl.device)
    mask[0, [2, 9]] = False
    mask[1, 4:9] = False
    selection = select_blocks(*inputs[:2], mask, block_size=4, block_budget=budget)
    attention = general_impl.attention(mask, selection=selection, block_size=4, approx_mode=mode)
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_dense_path_are_those_of_finite_differences(mode, general_fast):
    inputs = general_fast.inputs(2, 1, 7, 3, dtype=torch.float64)[:3]
    attention = general_fast.attention(general_fast.mask("right", 2, 7), approx_mode=mode)
    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in inputs])


# -- block size, scale, matrix


@pairwise(block_size=[1, 8, 16, 64], mask_kind=["none", "holes"], mode=MODES)
def test_other_block_sizes_reach_dense_attention(block_size, mask_kind, mode, general_impl):
    inputs, mask = general_impl.inputs(2, 2, 70, 8), general_impl.mask(mask_kind, 2, 70)
    expected = outputs_and_gradients(
        lambda query, key, value: dense_attention(query, key, value, mask), *inputs
    )
    selection = select_blocks(*inputs[:2], mask, block_size=block_size, block_per_row=70)
    arguments = {"block_size": block_size, "approx_mode": mode}
    for choice in ({"block_per_row": 70}, {"selection": selection}):
        results = general_impl.attend(inputs, mask, **choice, **arguments)
        assert_all_close(results, expected, TOLERANCE)


def test_one_token_per_block_is_dense_attention_at_any_budget(general_impl):
    inputs, mask = general_impl.inputs(2, 2, 40, 8), general_impl.mask("holes", 2, 40)
    expected = outputs_and_gradients(
        lambda query, key, value: dense_attention(query, key, value, mask), *inputs
    )
    result = general_impl.attend(inputs, mask, block_size=1, block_per_row=2)
    assert_all_close(result, expected, TOLERANCE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_scale_multiplies_the_logits_and_defaults_to_the_root_of_the_head_dim(budget, impl):
    inputs = impl.inputs(2, 2, 100, 16)
    default = impl.attend(inputs, block_per_row=budget)
    assert_all_equal(impl.attend(inputs, block_per_row=budget, scale=0.25), default)
    for scale in (0.1, -1):
        scaled = impl.attend(inputs, block_per_row=budget, scale=scale)
        query, *others = inputs
        output, grad_query, *grads = impl.attend([4 * scale * query, *others], block_per_row=budget)
        assert_all_close(scaled, (output, 4 * scale * grad_query, *grads), TOLERANCE)
        assert (scaled[0] - default[0]).abs().max() > 1e-2


@pairwise(mask_kind=MASK_KINDS, rule=SELECTION_RULES, mode=MODES)
def test_the_matrix_times_value_is_the_output(mask_kind, rule, mode, impl):
    inputs, mask = impl.inputs(2, 2, 150, 16), impl.mask(mask_kind, 2, 150)
    arguments = {"block_budget": 13, "approx_mode": mode, "selection": rule}
    matrix = mra2_attention_matrix(*inputs[:2], mask, **arguments)
    output = impl.attention(mask, **arguments)(*inputs[:3])
    torch.testing.assert_close(matrix @ inputs[2], output, rtol=0, atol=1e-5)


@pairwise(mask_kind=MASK_KINDS, rule=SELECTION_RULES, mode=MODES)
def test_matrix_rows_sum_to_one(mask_kind, rule, mode):
    inputs, mask = make_inputs(2, 2, 200, 16), make_mask(mask_kind, 2, 200)
    # 40 of 49 pairs leave no row without a pair
    arguments = {"block_budget": 40, "approx_mode": mode, "selection": rule}
    matrix = mra2_attention_matrix(*inputs[:2], mask, **arguments)
    real = real_tokens(mask, inputs)
    assert (matrix >= 0).all()
    assert not (matrix * ~real.mT).any()
    sums = matrix.sum(-1, keepdim=True)
    torch.testing.assert_close(sums, real.expand_as(sums).float(), rtol=0, atol=1e-5)


def test_matrix_is_float32_for_half_types_and_float64_for_float64():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        query, key, *_ = make_inputs(1, 1, 40, 8, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert mra2_attention_matrix(query, key).dtype == wide
        with torch.autocast("cpu", torch.bfloat16):
            assert mra2_attention_matrix(query, key).dtype == wide


@pytest.mark.parametrize("mode", MODES)
@given(length=st.integers(33, 160), budget=st.integers(1, 25), kind=st.sampled_from(MASK_KINDS))
@settings(few_examples, max_examples=10)
def test_matrix_holds_token_logits_inside_the_choice_and_block_means_outside(
    mode, length, budget, kind
):
    """The definition, read off the matrix: log-ratios inside a row are differences of logits."""
    query, key, *_ = make_inputs(1, 1, length, 8, dtype=torch.float64)
    mask = make_mask(kind if kind != "empty sample" else "none", 1, length)
    selection = select_blocks(query, key, mask, block_budget=budget)
    matrix = mra2_attention_matrix(query, key, mask, selection=selection, approx_mode=mode)[0, 0]
    real = real_tokens(mask, [query])[0, 0, :, 0]
    block = torch.arange(length) // 32
    one_hot = torch.nn.functional.one_hot(block).double() * real[:, None]  # [N, R]
    to_mean = (one_hot @ (one_hot / one_hot.sum(0).clamp_min(1)).T)[real][:, real]
    query, key = query[0, 0, real], key[0, 0, real]
    inside = selection.blocks[0, 0][block[real][:, None], block[real]]
    outside = (to_mean @ query) @ (to_mean @ key).T
    if mode == "sparse":
        outside = torch.full_like(outside, -torch.inf)
    logits = torch.where(inside, query @ key.T, outside) * 8**-0.5
    expected = torch.softmax(logits, -1).nan_to_num(0.0)
    torch.testing.assert_close(matrix[real][:, real], expected, rtol=0, atol=1e-12)
