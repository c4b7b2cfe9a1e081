"""Which block pairs are chosen: budget, priors, score, ties; always over the whole matrix of a
head. The yardstick sorts all pairs in plain Python.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import MASK_KINDS, few_examples, make_inputs, make_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_attention import select_blocks, selection
from pairwise import pairwise

#: Rules whose score is the coarse logit, which tests can compute.
LOGIT_RULES = tuple(
    name for name, rule in selection.RULES.items() if rule.score is selection.coarse_logits
)
M = 4  # tokens per block wherever whole matrices of pairs are drawn


def best_pairs(scores, live, budget, *, first=0, diagonal=0):
    """The definition: sort the live pairs of one head by prior, score, distance, row, column."""
    rows = [i for i, is_live in enumerate(live) if is_live]
    leading = set(rows[:first])

    def rank(pair):
        x, y = pair
        prior = {x, y} & leading or (diagonal > 0 and abs(x - y) <= diagonal // 2)
        return not prior, -scores[x][y], abs(x - y), x, y

    return set(sorted(((x, y) for x in rows for y in rows), key=rank)[:budget])


def chosen_pairs(blocks):
    """The pairs of one head, `[R, R]` bool, as a set."""
    return set(map(tuple, blocks.nonzero().tolist()))


def choose(scores, live, budget, largest_budget=None, **priors):
    """`selection.choose_blocks` for one head."""
    names = {"first": "initial_prior_first_n_blocks", "diagonal": "initial_prior_diagonal_n_blocks"}
    blocks = selection.choose_blocks(
        torch.as_tensor(scores)[None, None],
        torch.as_tensor(live)[None],
        torch.tensor([budget]),
        largest_budget=largest_budget,
        **{names[name]: n for name, n in priors.items()},
    )
    return chosen_pairs(blocks[0, 0])


def from_scores(scores):
    """Query and key whose coarse logits at scale 1 are `scores` `[R, R]`: constant blocks."""
    key = torch.eye(len(scores), dtype=scores.dtype).repeat_interleave(M, 0)
    return scores.repeat_interleave(M, 0)[None, None], key[None, None]


def select_one_head(scores, mask=None, **choice):
    query, key = from_scores(torch.as_tensor(scores, dtype=torch.float64))
    selected = select_blocks(query, key, mask, block_size=M, scale=1.0, **choice)
    return chosen_pairs(selected.blocks[0, 0])


@st.composite
def ranked_matrices(draw):
    """Scores with many ties, live blocks, a budget and priors."""
    rows = draw(st.integers(1, 6))
    few_values = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 3.0])
    scores = draw(st.lists(few_values, min_size=rows**2, max_size=rows**2))
    dead = draw(st.sets(st.integers(0, rows - 1), max_size=3))
    live = [i not in dead for i in range(rows)]
    scores = torch.tensor(scores).view(rows, rows)
    priors = {"first": draw(st.integers(0, 2)), "diagonal": draw(st.integers(0, 3))}
    return scores, live, draw(st.integers(1, rows**2)), priors


@given(ranked_matrices())
@settings(few_examples, max_examples=400)
def test_choice_is_that_of_sorting_by_prior_score_distance_row_column(case):
    scores, live, budget, priors = case
    expected = best_pairs(scores.tolist(), live, budget, **priors)
    clamped = min(budget, sum(live) ** 2)
    for largest_budget in (budget, scores.numel(), None):
        assert choose(scores, live, clamped, largest_budget, **priors) == expected


@given(ranked_matrices(), st.sampled_from(LOGIT_RULES))
@settings(few_examples, max_examples=300)
def test_public_choice_is_that_of_sorting_the_coarse_logits(case, rule):
    scores, live, budget, priors = case
    mask = torch.tensor(live).repeat_interleave(M)[None]
    mask[:, 1::M] = False  # a hole in every block changes no mean of equal tokens
    logits = scores.tolist()
    if rule == "row_normalized":
        for row in logits:
            best = max((s for s, is_live in zip(row, live, strict=True) if is_live), default=0)
            row[:] = [s - best for s in row]
    selected = select_one_head(
        scores,
        mask,
        block_budget=budget,
        selection=rule,
        initial_prior_first_n_blocks=priors["first"],
        initial_prior_diagonal_n_blocks=priors["diagonal"],
    )
    assert selected == best_pairs(logits, live, budget, **priors)


def test_coarse_logits_are_products_of_means_over_real_tokens():
    query, key, *_ = make_inputs(2, 2, 100, 8, dtype=torch.float64)
    mask = make_mask("holes", 2, 100)
    scores, live, _ = selection.coarse_scores(
        query, key, mask, block_size=M, n_blocks=25, scale=0.7, rule="global"
    )
    for sample in range(2):
        for x in range(25):
            for y in range(25):
                real_x, real_y = (mask[sample, M * i : M * i + M] for i in (x, y))
                if not (real_x.any() and real_y.any()):
                    assert not (live[sample, x] and live[sample, y])
                    continue
                assert live[sample, x] and live[sample, y]
                mean_query = query[sample, :, M * x : M * x + M][:, real_x].mean(1)
                mean_key = key[sample, :, M * y : M * y + M][:, real_y].mean(1)
                expected = (0.7 * (mean_query * mean_key).sum(-1)).float()
                assert torch.allclose(scores[sample, :, x, y], expected, rtol=2e-7, atol=0)


def live_blocks(mask):
    """`[3, 9]`, True where a block of 32 of 257 tokens holds a real one."""
    everything = torch.ones(3, 257, dtype=torch.bool) if mask is None else mask
    return torch.nn.functional.pad(everything, (0, 31)).view(3, 9, 32).any(-1)


@pairwise(
    mask_kind=MASK_KINDS,
    choice=[
        *({"block_per_row": n} for n in (1, 2, 4, 9, 50)),
        *({"block_per_row": 3, "block_budget": n} for n in (1, 5, 20, 81, 1000)),
    ],
)
def test_budgets_count_pairs_per_head_or_live_row_and_are_clamped_to_live_pairs(mask_kind, choice):
    query, key, *_ = make_inputs(3, 2, 257, 8)
    mask = make_mask(mask_kind, 3, 257)
    selected = select_blocks(query, key, mask, **choice)
    for counts, live in zip(
        selected.counts.tolist(), live_blocks(mask).sum(1).tolist(), strict=True
    ):
        budget = choice.get("block_budget", live * choice["block_per_row"])
        assert counts == [min(budget, live**2)] * 2


@pairwise(mask_kind=MASK_KINDS, rule=LOGIT_RULES)
def test_pairs_without_a_real_token_are_never_chosen(mask_kind, rule):
    query, key, *_ = make_inputs(3, 2, 257, 8)
    mask = make_mask(mask_kind, 3, 257)
    live = live_blocks(mask)
    for choice in ({"block_per_row": 2}, {"block_per_row": 9}, {"block_budget": 80}):
        priors = {"initial_prior_first_n_blocks": 2, "initial_prior_diagonal_n_blocks": 3}
        blocks = select_blocks(query, key, mask, selection=rule, **choice, **priors).blocks
        assert not (blocks & ~live[:, None, :, None]).any()
        assert not (blocks & ~live[:, None, None, :]).any()


def test_priors_are_chosen_first_however_low_they_score():
    scores = torch.full((5, 5), 1e6)
    scores[0], scores[:, 0] = -1e30, -1e30
    scores.fill_diagonal_(-1e30)
    first = {(x, y) for x in range(5) for y in range(5) if x == 0 or y == 0}
    diagonal = {(x, x) for x in range(5)}
    rule = {"selection": "global"}
    selected = select_one_head(scores, block_budget=9, initial_prior_first_n_blocks=1, **rule)
    assert selected == first
    selected = select_one_head(scores, block_budget=5, initial_prior_diagonal_n_blocks=1, **rule)
    assert selected == diagonal
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    selected = select_one_head(scores, block_budget=14, **priors, **rule)
    assert selected == first | diagonal | {(1, 2)}


def test_priors_compete_by_score_when_the_budget_cuts_inside_them():
    scores = torch.zeros(5, 5)
    scores[0] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    scores[1:, 1:] = 100.0
    selected = select_one_head(
        scores, block_budget=3, initial_prior_first_n_blocks=1, selection="global"
    )
    assert selected == {(0, 1), (0, 3), (0, 4)}


@pytest.mark.parametrize("n", range(6))
def test_diagonal_prior_reaches_half_its_width_to_each_side(n):
    scores = -torch.arange(36.0).view(6, 6).flip(0, 1)
    band = {(x, y) for x in range(6) for y in range(6) if n and abs(x - y) <= n // 2}
    budget = max(len(band), 1)
    selected = select_one_head(scores, block_budget=budget, initial_prior_diagonal_n_blocks=n)
    assert (selected == band) == (n > 0)


def test_equal_scores_go_to_the_diagonal_then_the_lowest_row_then_the_lowest_column():
    order = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)]
    for budget in range(1, 10):
        assert select_one_head(torch.zeros(3, 3), block_budget=budget) == set(order[:budget])


@given(st.integers(0, 10**6), st.integers(1, 200), st.sampled_from(MASK_KINDS))
@few_examples
def test_every_live_row_keeps_its_best_pair_when_the_budget_allows_one_each(seed, length, kind):
    query, key, *_ = make_inputs(2, 2, length, 8, seed=seed)
    mask = make_mask(kind, 2, length)
    n_blocks = -(-length // 16)
    scores, live, _ = selection.coarse_scores(
        query, key, mask, block_size=16, n_blocks=n_blocks, scale=8**-0.5, rule="row_normalized"
    )
    best = scores.masked_fill(~live[:, None, None, :], -torch.inf).argmax(-1, keepdim=True)
    selected = select_blocks(query, key, mask, block_per_row=1, block_size=16).blocks
    keeps_best = selected.gather(-1, best)[..., 0]  # [B, H, R]
    assert torch.equal(keeps_best, live[:, None].expand_as(keeps_best))


def test_global_rule_ranks_the_whole_matrix_and_may_leave_a_row_empty():
    scores = torch.tensor([[9.0, 8.0, 7.0], [3.0, 2.0, 1.0], [0.0, -1.0, -2.0]])
    assert select_one_head(scores, block_budget=3, selection="global") == {(0, 0), (0, 1), (0, 2)}
    by_row = select_one_head(scores, block_budget=3, selection="row_normalized")
    assert by_row == {(0, 0), (1, 0), (2, 0)}


def test_what_the_scheme_and_triton_rank_by_is_the_coarse_logit():
    """They compute it themselves, so a row that says more would be ranked by something else."""
    for name, rule in selection.RULES.items():
        if rule.scheme or "triton" in rule.kernels:
            assert rule.score is selection.coarse_logits and rule.sub_blocks == 1, name


@pairwise(mask_kind=MASK_KINDS, block_size=[4, 2, 7, 1])
def test_refined_mass_of_parts_of_one_token_is_that_of_softmax(mask_kind, block_size):
    query, key, *_ = make_inputs(2, 2, 61, 8)
    mask = make_mask(mask_kind, 2, 61)
    n_blocks = -(-61 // block_size)
    mass, live, _ = selection.coarse_scores(
        query, key, mask, block_size=block_size, n_blocks=n_blocks, scale=0.3, rule="refined"
    )
    real = torch.ones(2, 61, dtype=torch.bool) if mask is None else mask.bool()
    if block_size == 7:  # not cut: a part is a block, its mean stands for its tokens
        counts = torch.nn.functional.pad(real, (0, 2)).unflatten(1, (9, 7)).sum(-1)
        parts, weights = (
            torch.nn.functional.pad(x * real[:, None, :, None], (0, 0, 0, 2))
            .unflatten(2, (9, 7))
            .sum(3)
            / counts.clamp_min(1)[:, None, :, None]
            for x in (query, key)
        )
        logits = (0.3 * parts @ weights.mT).exp() * counts[:, None, None]
        share = logits / logits.sum(-1, keepdim=True).clamp_min(1e-30)
        expected = share * counts[:, None, :, None]
    else:
        logits = (0.3 * query @ key.mT).masked_fill(~real[:, None, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num() * real[:, None, :, None]
        rows = n_blocks * block_size - 61
        weights = torch.nn.functional.pad(weights, (0, rows, 0, rows))
        cut = weights.unflatten(3, (n_blocks, block_size)).unflatten(2, (n_blocks, block_size))
        expected = cut.sum((3, 5))
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(live, mass.sum((1, 3)) > 0)


def test_refined_strips_do_not_matter(monkeypatch):
    query, key, *_ = make_inputs(2, 3, 700, 8)
    mask = make_mask("holes", 2, 700)
    whole = select_blocks(query, key, mask, block_per_row=3, selection="refined").blocks
    monkeypatch.setattr(selection, "_SUB_BLOCK_SCORES", 1)
    again = select_blocks(query, key, mask, block_per_row=3, selection="refined").blocks
    assert torch.equal(whole, again)


def test_refined_finds_the_pair_whose_few_large_logits_the_mean_hides():
    query, key = torch.zeros(1, 1, 96, 4), torch.zeros(1, 1, 96, 4)
    query[..., 0] = 1
    key[:, :, 32:40, 0] = 6  # a quarter of the second block, mean 1.5
    key[:, :, 64:96, 0] = 2  # the whole third one
    settings = {"block_budget": 3, "scale": 1.0}
    coarse = select_blocks(query, key, **settings).blocks[0, 0]
    refined = select_blocks(query, key, selection="refined", **settings).blocks[0, 0]
    assert chosen_pairs(coarse) == {(row, 2) for row in range(3)}
    assert chosen_pairs(refined) == {(row, 1) for row in range(3)}


@pytest.mark.parametrize("rule", LOGIT_RULES)
def test_coarse_logits_that_are_equal_in_float32_tie_in_every_input_type(rule):
    query, key = from_scores(torch.zeros(2, 2, dtype=torch.float64))
    query[..., :M, 0] = 1.0
    query[..., :M, 1] = 1.0 + 1e-9  # larger only in float64
    selected = select_blocks(
        query, key, block_size=M, scale=1.0, block_budget=1, selection=rule
    ).blocks[0, 0]
    assert chosen_pairs(selected) == {(0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_every_size_and_sign_are_ranked(dtype):
    values = [-torch.inf, -3e38, -1.5, -1e-30, 0.0, 1e-38, 1e-30, 2.0, 3e38]
    for shift in range(9):
        scores = torch.tensor(values, dtype=dtype).roll(shift).view(3, 3)
        for budget in range(1, 10):
            expected = best_pairs(scores.tolist(), [True] * 3, budget)
            assert choose(scores, [True] * 3, budget, budget) == expected


def test_ties_stay_exact_at_many_block_rows():
    rows, budget = 300, 301
    selected = choose(torch.zeros(rows, rows), [True] * rows, budget, budget)
    assert selected == {(x, x) for x in range(rows)} | {(0, 1)}


@pytest.mark.parametrize("rule", LOGIT_RULES)
def test_same_inputs_give_the_same_choice(rule):
    query, key, *_ = make_inputs(2, 4, 1000, 16)
    query, key = query.round(), key.round()  # ties
    first, *others = (
        select_blocks(query, key, block_per_row=3, selection=rule).blocks for _ in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


def test_choice_carries_no_gradient():
    query, key = (x.requires_grad_() for x in make_inputs(1, 1, 100, 8)[:2])
    assert not select_blocks(query, key).blocks.requires_grad


@pairwise(
    length=[2, 31, 32, 33, 64, 100, 257],
    mask_kind=MASK_KINDS,
    rule=LOGIT_RULES,
    block_budget=[None, 7],
)
def test_traceable_choice_is_the_normal_one_and_nothing_beyond(
    length, mask_kind, rule, block_budget
):
    query, key, *_ = make_inputs(2, 2, length, 8)
    mask = make_mask(mask_kind, 2, length)
    settings = {"block_per_row": 3, "block_budget": block_budget, "block_size": 32}
    settings |= {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 2}
    settings |= {"rule": rule, "scale": 0.5}
    normal = selection.select(query, key, mask, **settings)
    traceable = selection.select(query, key, mask, **settings, traceable=True)
    padded = torch.nn.functional.pad(normal, (0, 1, 0, 1))  # a block that holds no token
    assert normal.shape[-1] == -(-length // 32) and torch.equal(traceable, padded)
