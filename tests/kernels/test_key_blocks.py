"""Key blocks narrower than query blocks: what is chosen, what it means, and that implementations
agree on it.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    INTERPRETED,
    MASK_KINDS,
    MODES,
    Implementation,
    assert_agrees,
    assert_all_close,
    attend_with_bias,
    dense_attention,
    few_examples,
    make_bias,
    make_inputs,
    make_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_attention import BlockSelection, mra2_attention, mra2_attention_matrix, select_blocks
from mra_attention.implementations import FAST
from mra_attention.selection import SELECTION_RULES
from pairwise import pairwise

WIDTHS = (8, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pairwise(
    length=[1, 33, 150] if INTERPRETED else [1, 31, 33, 100, 257, 500],
    dim=[16, 40] if INTERPRETED else [16, 40, 64, 128],
    width=WIDTHS,
    mask_kind=MASK_KINDS,
    mode=MODES,
    dtype=DTYPES,
)
def test_agrees_with_reference(length, dim, width, mask_kind, mode, dtype, fast):
    inputs, mask = fast.inputs(2, 2, length, dim, dtype=dtype), fast.mask(mask_kind, 2, length)
    choice = {"block_per_row": 2, "key_block_size": width, "selection": "mass"}
    assert_agrees(fast, inputs, mask, approx_mode=mode, **choice)


@pairwise(sizes=[(32, 4), (32, 1), (16, 8), (64, 16), (60, 20)], mask_kind=MASK_KINDS, mode=MODES)
def test_agrees_with_reference_at_other_sizes(sizes, mask_kind, mode, general_fast):
    inputs = general_fast.inputs(2, 2, 257, 16, dtype=torch.float64)
    mask = general_fast.mask(mask_kind, 2, 257)
    choice = {"block_per_row": 2, "block_size": sizes[0], "key_block_size": sizes[1]}
    assert_agrees(general_fast, inputs, mask, approx_mode=mode, **choice)


@pairwise(
    width=WIDTHS,
    mask_kind=MASK_KINDS,
    mode=MODES,
    first=[0, 1],
    rule=SELECTION_RULES[::2] if INTERPRETED else SELECTION_RULES,
)
def test_agrees_with_reference_with_a_distance_bias(width, mask_kind, mode, first, rule, fast):
    inputs = fast.inputs(2, 2, 150, 16, dtype=fast.finest_dtype)
    mask, bias = fast.mask(mask_kind, 2, 150), fast.bias(2, 3)
    settings = {"key_block_size": width, "block_per_row": 4, "approx_mode": mode}
    settings |= {"initial_prior_first_n_blocks": first, "initial_prior_diagonal_n_blocks": 1}
    selection = select_blocks(
        *inputs[:2],
        mask,
        distance_bias=bias,
        selection=rule,
        **{name: x for name, x in settings.items() if name != "approx_mode"},
    )
    results, expected = (
        attend_with_bias(impl, inputs, bias, mask, selection=selection, **settings)
        for impl in (fast, Implementation("reference", fast.device))
    )
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=5e-5)


@pairwise(width=WIDTHS, mask_kind=MASK_KINDS, rule=SELECTION_RULES, prior=[0, 1])
def test_chooses_what_the_reference_chooses(width, mask_kind, rule, prior, fast):
    """Each implementation for itself, from inputs whose scores are far apart or equal."""
    inputs = fast.inputs(2, 2, 200, 16, dtype=fast.finest_dtype)
    inputs[1][:, :, 64:128] = inputs[1][:, :, :64]  # ties
    mask = fast.mask(mask_kind, 2, 200)
    choice = {"key_block_size": width, "selection": rule, "block_per_row": 3}
    choice |= {"initial_prior_first_n_blocks": prior, "initial_prior_diagonal_n_blocks": prior}
    expected = Implementation("reference", fast.device).attend(inputs, mask, **choice)
    results = fast.attend(inputs, mask, **choice)
    assert_all_close(results, expected, 1e-10 if fast.is_general else 5e-5)


@pairwise(width=WIDTHS, mask_kind=MASK_KINDS, mode=MODES, dtype=DTYPES)
def test_rows_of_every_number_of_key_blocks_agree_with_reference(
    width, mask_kind, mode, dtype, fast
):
    """Row x has 0 to all of the key blocks, in no order."""
    inputs, mask = fast.inputs(2, 2, 490, 16, dtype=dtype), fast.mask(mask_kind, 2, 490)
    per_row = torch.arange(16)[:, None] * (5 if width == 8 else 2) + 1
    order = torch.rand(2, 2, 16, 512 // width, generator=torch.Generator().manual_seed(1))
    blocks = order.argsort(-1).argsort(-1) < per_row - 1
    selection = BlockSelection(blocks.to(fast.device), 32, width)
    assert_agrees(fast, inputs, mask, selection=selection, key_block_size=width, approx_mode=mode)


@pairwise(width=WIDTHS, mask_kind=MASK_KINDS, mode=MODES)
def test_full_budget_is_dense_attention(width, mask_kind, mode, fast):
    inputs, mask = fast.inputs(2, 2, 100, 16), fast.mask(mask_kind, 2, 100)
    choice = {"key_block_size": width, "block_per_row": 4, "approx_mode": mode}
    output = fast.attention(mask, **choice)(*inputs[:3])
    torch.testing.assert_close(output, dense_attention(*inputs[:3], mask), rtol=0, atol=1e-5)
    selection = select_blocks(*inputs[:2], mask, key_block_size=width, block_per_row=4)
    output = fast.attention(mask, selection=selection, key_block_size=width)(*inputs[:3])
    torch.testing.assert_close(output, dense_attention(*inputs[:3], mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_trailing_padding_and_neighbours_change_nothing(width, fast):
    inputs = fast.inputs(2, 2, 150, 16)
    choice = {"key_block_size": width, "block_per_row": 2, "selection": "mass"}
    alone = fast.attend([x[:1, :, :100] for x in inputs], **choice)
    mask = fast.mask("none", 2, 150)
    mask = torch.ones(2, 150, dtype=torch.bool, device=fast.device)
    mask[0, 100:] = False
    beside = list(inputs)
    for i in range(3):
        beside[i] = inputs[i].clone()
        beside[i][0, :, 100:] = torch.nan
    together = [x[:1, :, :100] for x in fast.attend(beside, mask, **choice)]
    assert_all_close(together, alone, 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_two_runs_have_the_same_bits(width, fast):
    inputs, mask = fast.inputs(2, 2, 200, 16), fast.mask("holes", 2, 200)
    choice = {"key_block_size": width, "block_per_row": 3, "selection": "mass"}
    first, second = (fast.attend(inputs, mask, **choice) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


# -- the definition


def best_pairs(logits, live, live_keys, budget, rule, first, diagonal, per_block, sizes):
    """The pairs of one head, by a plain sort. `sizes` are the real tokens of blocks and key
    blocks.
    """
    rows = [x for x, is_live in enumerate(live) if is_live]
    columns = [y for y, is_live in enumerate(live_keys) if is_live]
    leading = rows[:first]
    scores = logits.clone()
    for x in rows:
        of_row = logits[x, columns]
        if rule == "row_normalized":
            scores[x] -= of_row.max()
        elif rule == "mass":
            weights = of_row.double().exp() * torch.tensor([float(sizes[1][y]) for y in columns])
            scores[x, columns] = (sizes[0][x] * weights / weights.sum()).float()

    def rank(pair):
        x, y = pair
        block = y // per_block
        prior = {x, block} & set(leading) or (diagonal > 0 and abs(x - block) <= diagonal // 2)
        return not prior, -float(scores[x, y]), abs(x - block), x, y

    return set(sorted(((x, y) for x in rows for y in columns), key=rank)[:budget])


@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 70),
    sizes=st.sampled_from([(8, 2), (8, 4), (8, 8), (12, 4)]),
    rule=st.sampled_from(["row_normalized", "global", "mass"]),
    priors=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    budget=st.integers(1, 12),
    kind=st.sampled_from(MASK_KINDS[:4]),
)
@settings(few_examples, max_examples=150)
def test_choice_is_that_of_a_plain_sort(seed, length, sizes, rule, priors, budget, kind):
    block_size, width = sizes
    query, key, *_ = make_inputs(1, 1, length, 4, dtype=torch.float64, seed=seed)
    mask = make_mask(kind, 1, length)
    real = torch.ones(length, dtype=torch.bool) if mask is None else mask[0]
    n_blocks, per_block = -(-length // block_size), block_size // width

    def means(x, size):
        parts = list(zip(x[0, 0].split(size), real.split(size), strict=True))
        counts = [int(r.sum()) for _, r in parts]
        rows = [tokens[r].sum(0) / max(1, int(r.sum())) for tokens, r in parts]
        missing = n_blocks * block_size // size - len(rows)
        return torch.stack(rows + [torch.zeros(4).double()] * missing), counts + [0] * missing

    (query_means, sizes_of_queries), (key_means, sizes_of_keys) = (
        means(query, block_size),
        means(key, width),
    )
    logits = (query_means @ key_means.T / 2).float()
    live, live_keys = [n > 0 for n in sizes_of_queries], [n > 0 for n in sizes_of_keys]
    pairs = min(budget * per_block, sum(live) * sum(live_keys))
    expected = best_pairs(
        logits, live, live_keys, pairs, rule, *priors, per_block, (sizes_of_queries, sizes_of_keys)
    )
    selection = select_blocks(
        query,
        key,
        mask,
        block_budget=budget,
        block_size=block_size,
        key_block_size=width,
        initial_prior_first_n_blocks=priors[0],
        initial_prior_diagonal_n_blocks=priors[1],
        selection=rule,
    )
    assert selection.blocks.shape == (1, 1, n_blocks, n_blocks * per_block)
    assert (selection.block_size, selection.key_block_size) == sizes
    assert set(map(tuple, selection.blocks[0, 0].nonzero().tolist())) == expected


@pytest.mark.parametrize("mode", MODES)
@given(length=st.integers(33, 160), budget=st.integers(1, 9), kind=st.sampled_from(MASK_KINDS[:4]))
@settings(few_examples, max_examples=10)
def test_matrix_holds_token_logits_inside_the_choice_and_means_outside(mode, length, budget, kind):
    query, key, *_ = make_inputs(1, 1, length, 8, dtype=torch.float64)
    mask = make_mask(kind, 1, length)
    choice = {"block_budget": budget, "key_block_size": 8, "approx_mode": mode}
    matrix = mra2_attention_matrix(query, key, mask, **choice)[0, 0]
    choice.pop("approx_mode")
    blocks = select_blocks(query, key, mask, **choice).blocks[0, 0]
    real = torch.ones(length, dtype=torch.bool) if mask is None else mask[0]

    def means(x, size):
        """Each real token's mean of its block."""
        block = torch.arange(length)[real] // size
        one_hot = torch.nn.functional.one_hot(block).double()
        return one_hot @ (one_hot.T @ x / one_hot.sum(0).clamp_min(1)[:, None]), block

    query, key = query[0, 0, real], key[0, 0, real]
    (query_means, x), (key_means, y) = means(query, 32), means(key, 8)
    outside = query_means @ key_means.T
    if mode == "sparse":
        outside = torch.full_like(outside, -torch.inf)
    logits = torch.where(blocks[x][:, y], query @ key.T, outside) * 8**-0.5
    expected = logits.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(matrix[real][:, real], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", (4, *WIDTHS, 32))
def test_budgets_count_squares(width):
    query, key, *_ = make_inputs(1, 2, 512, 8)
    selection = select_blocks(query, key, block_per_row=3, key_block_size=width)
    assert (selection.counts * width == 3 * 16 * 32).all()
    selection = select_blocks(query, key, block_budget=5, key_block_size=width)
    assert (selection.counts * width == 5 * 32).all()


def test_a_diagonal_prior_of_1_keeps_the_block_of_each_row():
    query, key, *_ = make_inputs(1, 2, 256, 8)
    choice = {"block_per_row": 2, "key_block_size": 8, "selection": "mass"}
    blocks = select_blocks(query, key, initial_prior_diagonal_n_blocks=1, **choice).blocks
    own = torch.eye(8, dtype=torch.bool).repeat_interleave(4, 1)
    assert blocks[..., own].all()
    assert not select_blocks(query, key, **choice).blocks[..., own].all()


def test_mass_of_narrow_keys_errs_less_than_squares_at_the_same_number_of_entries():
    """A few keys that many queries look at: what attention heads are like."""
    query, key, value, _ = make_inputs(1, 4, 512, 32, dtype=torch.float64)
    sought = torch.randn(1, 4, 1, 32, dtype=torch.float64)
    query, key = query + 2 * sought, key.clone()
    key[:, :, 37::101] += 2 * sought
    exact = dense_attention(query, key, value)
    errors = []
    for width in (32, 16, 8):
        choice = {"block_per_row": 2, "key_block_size": width, "selection": "mass"}
        near = mra2_attention(query, key, value, **choice)
        errors.append(float((near - exact).norm() / exact.norm()))
    assert errors[2] < 0.8 * errors[1] < 0.8 * errors[0], errors


# -- refusals


@pytest.mark.parametrize("width", (0, 3, 64, 33, True, 8.0))
def test_other_widths_are_refused(width):
    inputs = make_inputs(1, 1, 64, 8)[:3]
    with pytest.raises(ValueError, match="key_block_size must"):
        mra2_attention(*inputs, key_block_size=width)


def test_a_selection_of_other_key_blocks_is_refused():
    inputs = make_inputs(1, 1, 64, 8)[:3]
    selection = select_blocks(*inputs[:2], key_block_size=8, block_per_row=1)
    with pytest.raises(ValueError, match="pass key_block_size=8"):
        mra2_attention(*inputs, selection=selection)


@pytest.mark.parametrize("name", [name for name in FAST if name != "torch"])
def test_an_implementation_says_which_widths_it_takes(name):
    inputs = make_inputs(1, 1, 64, 32)[:3]
    with pytest.raises(ValueError, match=r"key_block_size|not available|triton"):
        mra2_attention(*inputs, key_block_size=4, impl=name)


def test_a_distance_bias_is_that_of_squares():
    """Key blocks of one square have one bias: that of the squares' distance."""
    query, key, *_ = make_inputs(1, 1, 96, 8, dtype=torch.float64)
    bias = make_bias(1, 3, dtype=torch.float64)
    with_bias, without = (
        mra2_attention_matrix(
            query, key, key_block_size=8, block_budget=1, distance_bias=x, selection=selection
        )[0, 0]
        for selection in [select_blocks(query, key, key_block_size=8, block_budget=1)]
        for x in (bias, None)
    )
    block = torch.arange(96) // 32
    expected = without * bias[0][(block[:, None] - block).abs()].exp()
    torch.testing.assert_close(with_bias, expected / expected.sum(-1, keepdim=True))
