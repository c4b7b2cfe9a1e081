"""Triton: two query blocks a tile, the lists of selected pairs, and the selection."""

from __future__ import annotations

import pytest
import torch
from attention_cases import MASK_KINDS, MODES
from triton_cases import BEYOND_A_TILE, TRITON, assert_right, needs_triton

from mra_attention import BlockSelection, selection
from pairwise import pairwise

pytestmark = needs_triton

#: Keys in a key block.
WIDTHS = (32, 16, 8)


# -- two query blocks a tile


@pytest.mark.parametrize("length", [1, 31, 33, 64, 65, 100, 256])
def test_two_query_blocks_at_ragged_lengths(length, two_query_blocks):
    """Also where the last bundle has one block, and where that is the only one."""
    two_query_blocks()
    assert_right(TRITON.inputs(2, 1, length, 40), None, block_per_row=2)


@pairwise(mask_kind=MASK_KINDS, mode=MODES)
def test_two_query_blocks_with_masks(mask_kind, mode, two_query_blocks):
    two_query_blocks()
    inputs = TRITON.inputs(2, 1, 100, 16)
    mask = TRITON.mask(mask_kind, 2, 100)
    results = assert_right(inputs, mask, block_per_row=1, approx_mode=mode)
    if mask is not None:
        for result in results:
            assert not result.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("kernel", ["forward", "query_gradient"])
def test_two_query_blocks_in_one_pass_only(kernel, two_query_blocks):
    two_query_blocks(kernel, item_blocks=2)
    inputs = TRITON.inputs(1, 2, 150, 16)
    assert_right(inputs, TRITON.mask("holes", 1, 150), block_per_row=3)


@pytest.mark.parametrize("mode", MODES)
def test_a_bundle_may_select_nothing_or_for_one_of_its_blocks_only(mode, two_query_blocks):
    two_query_blocks(item_blocks=2)
    blocks = torch.zeros(1, 3, 5, 5, dtype=torch.bool, device=TRITON.device)
    blocks[:, 0, 1] = True  # all of it for the second of a bundle, nothing for the first
    blocks[:, 1, 2] = True
    blocks[:, 2, :, 2] = True
    inputs = TRITON.inputs(1, 3, 140, 16)
    assert_right(inputs, None, selection=BlockSelection(blocks, 32), approx_mode=mode)


@pairwise(rows=[1, 7, 70], query_blocks=[1, 2], width=WIDTHS)
def test_lists_hold_the_pairs_that_each_owner_selected(rows, query_blocks, width):
    """And the items cut them into pieces, in order; owners beyond the last bundle have none."""
    from mra_attention.triton_impl.block_lists import build_lists
    from mra_attention.triton_impl.call import KernelCall
    from mra_attention.triton_impl.pooling import pool

    query, key, *_ = TRITON.inputs(1, 2, 32 * rows - 5, 16)
    mask = torch.ones(1, query.shape[2], dtype=torch.bool, device=TRITON.device)
    mask[:, 32:64] = False  # a block that no list may name
    mask[:, 72:80] = False  # a part of the next one
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, rows, rows * 32 // width)
    blocks = (torch.rand(shape, generator=generator) < 0.2 * width / 32).to(TRITON.device)
    call = KernelCall(query, key, key, mask, key_block_size=width)
    settings = {"directions": 2, "query_blocks": query_blocks, "largest_budget": None}
    lists = build_lists(call, pool(call).counts, call.as_bytes(blocks), **settings)
    live, live_keys = (mask.view(-1)[::size].cpu() for size in (32, width))
    live_keys = torch.nn.functional.pad(live_keys, (0, shape[-1] - len(live_keys)))
    selected = blocks[0].cpu() & live[:, None] & live_keys[None, :]
    for of_direction, pairs in ((lists.by_query, selected), (lists.by_key, selected.mT)):
        parts, most = of_direction.parts, of_direction.max_items
        sizes, starts, entries, first_items, items, counts = (
            x.cpu().tolist() for x in of_direction[:6]
        )
        for head in range(2):
            wanted_items = []
            for own in range(rows):
                of_own = pairs[head, own * parts : (own + 1) * parts]
                expected = of_own.any(0).nonzero().flatten().tolist()
                if parts > 1:
                    weights = 2 ** torch.arange(len(of_own))[:, None]
                    bits = (of_own * weights).sum(0)
                    expected = [(block << parts) + bits[block].item() for block in expected]
                start = starts[head][own]
                assert entries[head][start : start + sizes[head][own]] == expected
                if own * parts < pairs.shape[1]:
                    assert first_items[head][own] == len(wanted_items)
                    wanted_items += [own] * max(1, -(-len(expected) // of_direction.item_blocks))
            assert counts[head] == len(wanted_items) <= most
            assert items[head * most : head * most + counts[head]] == wanted_items


# -- selection

DEFAULTS = {
    **{"block_size": 32, "block_per_row": 2, "block_budget": None, "rule": "row_normalized"},
    **{"initial_prior_first_n_blocks": 0, "initial_prior_diagonal_n_blocks": 0, "scale": 0.2},
    **{"distance_bias": None, "key_block_size": 32},
}
SELECTIONS = {
    "plain": {},
    "priors": {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3},
    "wide prior": {"initial_prior_diagonal_n_blocks": 5},
    "global": {"rule": "global"},
    "budget": {"block_budget": 7},
    "fewer than rows": {"block_budget": 3},
    "negative scale": {"scale": -0.2},
    "everything": {"block_budget": 1000},
}
#: With a distance bias, which is made where there is a device for it.
BIASED = {
    "bias": {},
    "bias and priors": {"initial_prior_first_n_blocks": 2},
    "bias, global": {"rule": "global"},
    "bias, negative scale": {"scale": -0.2},
}


@pairwise(name=[*SELECTIONS, *BIASED], mask_kind=MASK_KINDS, width=WIDTHS)
def test_selection_by_every_route_is_that_of_torch(name, mask_kind, width, table):
    """Given the same scores all routes choose the same pairs, and those of the torch path, whose
    scores come from float64 means, here too.
    """
    from mra_attention import triton_impl

    inputs = TRITON.inputs(2, 1, 200, 32, seed=3)[:2]
    mask = TRITON.mask(mask_kind, 2, 200)
    settings = DEFAULTS | (SELECTIONS | BIASED)[name] | {"key_block_size": width}
    if name in BIASED:
        settings["distance_bias"] = TRITON.bias(1, 7)
    expected = selection.select(*inputs, mask, **settings)
    for entries in (
        {"topk_up_to_rows": 1000},
        {"topk_up_to_rows": 0},
        {"topk_up_to_rows": 0, "recompute_from_length": 0},
    ):
        table(**entries)
        actual = triton_impl.select(*inputs, mask, summaries=None, **settings)
        assert torch.equal(actual, expected), entries


@pairwise(length=BEYOND_A_TILE, biased=[False, True], width=[32, 8])
def test_selection_among_more_blocks_than_a_tile(length, biased, width, table):
    """By radix, with stored and with recomputed scores, as by top-k; and nearly as in torch."""
    from mra_attention import triton_impl

    inputs = TRITON.inputs(2, 1, length, 16, seed=5)[:2]
    mask = TRITON.mask("right", 2, length)
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 1}
    settings = DEFAULTS | {"block_per_row": 4, "scale": 0.25, "key_block_size": width} | priors
    if biased:
        settings["distance_bias"] = TRITON.bias(1, -(-length // 32))
    table(topk_up_to_rows=1000)
    by_topk = triton_impl.select(*inputs, mask, summaries=None, **settings)
    for entries in ({"topk_up_to_rows": 0}, {"topk_up_to_rows": 0, "recompute_from_length": 0}):
        table(**entries)
        actual = triton_impl.select(*inputs, mask, summaries=None, **settings)
        assert torch.equal(actual, by_topk), entries
    expected = selection.select(*inputs, mask, **settings)
    assert torch.equal(by_topk.sum((1, 2, 3)), expected.sum((1, 2, 3)))
    assert (by_topk & expected).sum() >= 0.999 * expected.sum()


@pytest.mark.parametrize("width", WIDTHS)
def test_radix_ranks_equal_scores_like_choose_blocks(width):
    from mra_attention.triton_impl import selection as kernels
    from mra_attention.triton_impl.call import KernelCall
    from mra_attention.triton_impl.distance_bias import pair_bias
    from mra_attention.triton_impl.pooling import pool

    inputs = TRITON.inputs(2, 2, 150, 16)[:2]
    mask = TRITON.mask("right", 2, 150)
    numbers = {"block_per_row": 2, "block_budget": None}
    priors = {"initial_prior_first_n_blocks": 0, "initial_prior_diagonal_n_blocks": 0}
    call = KernelCall(*inputs, inputs[1], mask, key_block_size=width, scale=0.2)
    summaries = pool(call)
    candidates = kernels.flag_blocks(call, summaries.counts, **numbers, **priors)
    bias = pair_bias(call, summaries, None, 0)
    ranking = kernels.score_pairs(call, summaries, candidates, bias, row_normalized=True)
    values = torch.tensor([0.0, -0.0, -1.5, 2.0**-140, -torch.inf], device=TRITON.device)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(0, len(values), ranking.scores.shape, generator=generator)
        ranking.scores.copy_(values[picks.to(TRITON.device)])
        assert torch.equal(kernels.choose_by_radix(ranking), kernels.choose_by_topk(ranking))


@pairwise(
    rule=["row_normalized", "global"],
    first=[0, 1],
    recompute_from_length=[0, 10**6],
    width=[32, 8],
)
def test_scores_that_differ_by_their_bias_only_tie_where_it_is_equal(
    rule, first, recompute_from_length, width, table
):
    """Constant inputs, whose products are exact: pairs at one distance have one score."""
    from mra_attention import triton_impl

    query, key, *_ = TRITON.inputs(1, 2, 384, 16)
    query, key = (x[:, :, :1].round().expand_as(x) for x in (query, key))
    mask = torch.arange(384, device=TRITON.device)[None] >= 64  # whole blocks, whose means agree
    bias = TRITON.bias(2, 12)
    bias[:, 2:6] = bias[:, 2:3]
    settings = DEFAULTS | {"rule": rule, "distance_bias": bias, "block_budget": 37, "scale": 0.25}
    settings |= {"initial_prior_first_n_blocks": first, "key_block_size": width}
    expected = selection.select(query, key, mask, **settings)
    table(topk_up_to_rows=0, recompute_from_length=recompute_from_length)
    actual = triton_impl.select(query, key, mask, summaries=None, **settings)
    assert torch.equal(actual, expected)


def test_digits_after_the_one_that_decides_are_not_counted(table, monkeypatch):
    """Two digits tell the keys of drawn inputs apart; those of constant inputs take all four."""
    from mra_attention import triton_impl
    from mra_attention.triton_impl import launching
    from mra_attention.triton_impl import selection as selection_kernels

    launch, histograms = launching.launch, []

    def recorded(kernel, programs, **arguments):
        if kernel is selection_kernels.digit_kernel:
            histograms.append(arguments["HISTOGRAMS"])
        return launch(kernel, programs, **arguments)

    settings = DEFAULTS | {"summaries": None}
    query, key, *_ = TRITON.inputs(2, 2, 200, 16)
    for inputs, last in (((query, key), 2), ((query[:, :, :1].expand_as(query), key * 0), 4)):
        table(topk_up_to_rows=1000)
        expected = triton_impl.select(*inputs, None, **settings)
        table(topk_up_to_rows=0)
        with monkeypatch.context() as patch:
            patch.setattr(launching, "launch", recorded)
            assert torch.equal(triton_impl.select(*inputs, None, **settings), expected)
        counted = histograms[-1].sum(-1).cpu()  # [levels, G]
        assert counted.shape == (4, 4) and (counted[0] == 49).all()
        if last == 2:  # the first digit holds prior, sign, exponent and a bit of the mantissa
            assert (histograms[-last][0] > 0).sum(-1).min() > 5
        assert (counted[:last] > 0).any(1).all() and (counted[last:] == 0).all()
