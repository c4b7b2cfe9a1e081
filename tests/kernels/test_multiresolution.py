"""The general scheme: against the reference, the reference against the paper's listing, and both
against what they must become at the ends.
"""

import itertools

import pytest
import torch
from attention_cases import (
    MASK_KINDS,
    MODES,
    assert_all_close,
    dense_attention,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)

from mra_attention import mra2_attention, multiresolution_attention
from mra_attention.checks import check_scheme
from mra_attention.multiresolution import attention as batched_attention
from pairwise import pairwise
from tensor_sizes import LargestTensor

#: Scales and budgets: two to four scales, one alone, a last scale above 1.
CHAINS = (
    ((16, 4, 1), (9, 40)),
    ((32, 8, 2), (5, 30)),
    ((64, 16, 4, 1), (3, 20, 50)),
    ((8, 2), (20,)),
    ((16,), ()),
    ((24, 8, 1), (4, 10)),
    ((16, 4, 1), (1, 1)),
)


def both(resolutions, block_budgets, mask=None, **settings):
    settings |= {"resolutions": resolutions, "block_budgets": block_budgets}
    return [
        lambda *qkv, impl=impl: multiresolution_attention(*qkv, mask, impl=impl, **settings)
        for impl in ("torch", "reference")
    ]


@pairwise(chain=CHAINS, length=[1, 47, 128], mode=MODES, mask_kind=MASK_KINDS)
def test_the_batched_form_is_the_reference(chain, length, mode, mask_kind):
    mask = make_mask(mask_kind, 2, length)
    inputs = make_inputs(2, 3, length, 8, dtype=torch.float64, seed=length)
    fast, reference = both(*chain, mask, approx_mode=mode)
    assert_all_close(
        outputs_and_gradients(fast, *inputs), outputs_and_gradients(reference, *inputs), 1e-12
    )


@pairwise(
    settings=[
        {"selection": "global"},
        {"initial_prior_first_n_blocks": 1},
        {"initial_prior_diagonal_n_blocks": 3, "selection": "global"},
        {"scale": 0.7},
    ],
    mask_kind=["none", "holes"],
)
def test_settings_mean_the_same_in_both(settings, mask_kind):
    mask = make_mask(mask_kind, 2, 100)
    inputs = make_inputs(2, 3, 100, 8, dtype=torch.float64)
    fast, reference = both((16, 4, 1), (12, 60), mask, **settings)
    actual, expected = (outputs_and_gradients(call, *inputs) for call in (fast, reference))
    assert_all_close(actual, expected, 1e-12)
    default, _ = both((16, 4, 1), (12, 60), mask)
    assert not torch.allclose(default(*inputs[:3]), actual[0]), "the setting does something"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 6e-3)]
)
def test_every_dtype(dtype, tolerance):
    inputs = make_inputs(2, 2, 100, 16, dtype=dtype)
    fast, reference = both((16, 4, 1), (12, 60))
    exact = [x.double() for x in inputs]
    actual = outputs_and_gradients(fast, *inputs)
    assert {x.dtype for x in actual} == {dtype}
    # The blocks of the rounded inputs: the reference chooses from the same numbers.
    expected = [x.to(dtype) for x in outputs_and_gradients(reference, *exact)]
    assert_all_close(actual, expected, tolerance)


def listing(query, key, resolutions, block_budgets, rule):
    """Algorithm 1 of the paper for one head, block by block, with the order of ties of
    `select_blocks`: the members of J as (scale, row, column) -> logit.
    """

    def logit(scale, row, column):
        own = query[row * scale : (row + 1) * scale].mean(0)
        return (own @ key[column * scale : (column + 1) * scale].mean(0)).item()

    blocks = range(len(query) // resolutions[0])
    members = {
        (resolutions[0], row, column): logit(resolutions[0], row, column)
        for row, column in itertools.product(blocks, blocks)
    }
    n_logits = len(members)
    for (scale, finer), budget in zip(itertools.pairwise(resolutions), block_budgets, strict=True):
        candidates = [block for block in members if block[0] == scale]
        row_largest = {
            block[1]: max(members[other] for other in candidates if other[1] == block[1])
            for block in candidates
        }

        def rank(block, row_largest=row_largest):
            _, row, column = block
            less = row_largest[row] if rule == "row_normalized" else 0
            return (-round(members[block] - less, 6), abs(row - column), row, column)

        for block in sorted(candidates, key=rank)[:budget]:
            del members[block]
            parts = range(scale // finer)
            for a, b in itertools.product(parts, parts):
                child = (block[1] * len(parts) + a, block[2] * len(parts) + b)
                members[(finer, *child)] = logit(finer, *child)
                n_logits += 1
    return members, n_logits


@pairwise(
    chain=[((8, 2, 1), (5, 20)), ((16, 4, 1), (2, 9)), ((8, 4, 2, 1), (4, 9, 12)), ((16, 2), (3,))],
    rule=["row_normalized", "global"],
)
def test_the_reference_is_the_listing_of_the_paper(chain, rule):
    (resolutions, block_budgets), size = chain, 32
    query, key, value, _ = (x[0, 0] for x in make_inputs(1, 1, size, 4, dtype=torch.float64))
    members, n_logits = listing(query, key, resolutions, block_budgets, rule)
    first = (size // resolutions[0]) ** 2
    steps = [coarse // fine for coarse, fine in itertools.pairwise(resolutions)]
    cut = list(zip(block_budgets, steps, strict=True))
    assert n_logits == first + sum(m * step**2 for m, step in cut)
    assert len(members) == first + sum(m * (step**2 - 1) for m, step in cut)
    matrix, covered = torch.zeros(2, size, size, dtype=torch.float64)
    for (scale, row, column), logit in members.items():
        place = slice(row * scale, (row + 1) * scale), slice(column * scale, (column + 1) * scale)
        matrix[place] += torch.tensor(logit, dtype=torch.float64).exp()
        covered[place] += 1
    assert (covered == 1).all(), "J covers every entry once"
    expected = matrix @ value / matrix.sum(-1, keepdim=True)
    for call in both(resolutions, block_budgets, selection=rule, scale=1.0):
        output = call(*(x[None, None] for x in (query, key, value)))[0, 0]
        torch.testing.assert_close(output, expected)


@pairwise(length=[64, 150], mode=MODES, mask_kind=["none", "holes", "empty sample"])
def test_two_scales_are_mra_2(length, mode, mask_kind):
    mask = make_mask(mask_kind, 2, length)
    inputs = make_inputs(2, 2, length, 16)
    settings = {"approx_mode": mode, "initial_prior_diagonal_n_blocks": 1}

    def mra2(*qkv):
        return mra2_attention(*qkv, mask, block_budget=7, **settings)

    def scheme(*qkv):
        return multiresolution_attention(
            *qkv, mask, resolutions=(32, 1), block_budgets=(7,), **settings
        )

    def general(query, key, value):
        checked = {"selection": "row_normalized", "initial_prior_first_n_blocks": 0, "scale": None}
        checked = check_scheme(query, (32, 1), (7,), **checked, **settings)
        return batched_attention(query, key, value, mask, checked)

    expected = outputs_and_gradients(mra2, *inputs)
    for actual, required in zip(outputs_and_gradients(scheme, *inputs), expected, strict=True):
        assert torch.equal(actual, required), "the same call"
    assert_all_close(outputs_and_gradients(general, *inputs), expected, 1e-5)


@pytest.mark.parametrize("priors", [(1, 0), (0, 3), (1, 1)])
def test_priors_are_those_of_the_coarsest_scale(priors):
    """A budget that the priors fill, and what is cut is cut to the end: MRA-2 of that scale."""
    first, diagonal = priors
    settings = {"initial_prior_first_n_blocks": first, "initial_prior_diagonal_n_blocks": diagonal}
    rows = 5
    cut = {
        (r, c)
        for r in range(rows)
        for c in range(rows)
        if r < first or c < first or (diagonal and abs(r - c) <= diagonal // 2)
    }
    query, key, value, _ = make_inputs(2, 2, 16 * rows, 8, dtype=torch.float64)
    expected = mra2_attention(
        query, key, value, block_budget=len(cut), block_size=16, impl="reference", **settings
    )
    for call in both((16, 4, 1), (len(cut), 16 * len(cut)), **settings):
        torch.testing.assert_close(call(query, key, value), expected)


@pairwise(resolutions=[(16, 4, 1), (32, 2, 1), (4, 1)], mask_kind=MASK_KINDS)
def test_full_budgets_are_softmax_attention(resolutions, mask_kind):
    mask = make_mask(mask_kind, 2, 75)
    inputs = make_inputs(2, 2, 75, 8, dtype=torch.float64)
    budgets = [10**9] * (len(resolutions) - 1)
    for call in both(resolutions, budgets, mask):
        assert_all_close(
            outputs_and_gradients(call, *inputs),
            outputs_and_gradients(lambda *qkv: dense_attention(*qkv, mask), *inputs),
            1e-12,
        )


def test_one_scale_of_the_whole_length_averages_the_values():
    query, key, value, _ = make_inputs(1, 2, 40, 8, dtype=torch.float64)
    for call in both((40,), ()):
        expected = value.mean(2, keepdim=True).expand_as(value)
        torch.testing.assert_close(call(query, key, value), expected)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_padding_reaches_nothing(impl):
    mask = make_mask("holes", 2, 90)
    inputs = make_inputs(2, 2, 90, 8)
    hidden = ~mask[:, None, :, None]

    def call(*qkv):
        return multiresolution_attention(
            *qkv, mask, resolutions=(16, 4, 1), block_budgets=(9, 40), impl=impl
        )

    clean = outputs_and_gradients(call, *inputs)
    dirty = [x.masked_fill(hidden, torch.nan) for x in inputs[:3]]
    given = outputs_and_gradients(call, *dirty, inputs[3])
    for x, y in zip(given, clean, strict=True):
        torch.testing.assert_close(x, y)
        assert (x[hidden.expand_as(x)] == 0).all()


def test_nothing_is_as_large_as_the_matrix_and_a_third_scale_keeps_it_linear():
    sizes = {}
    for length in (4096, 16384):
        inputs = make_inputs(1, 1, length, 8)
        rows = length // 32
        call, _ = both((1024, 32, 1), (2 * rows // 32, 4 * rows))
        with LargestTensor() as largest:
            outputs_and_gradients(call, *inputs)
        sizes[length] = largest.elements
        assert largest.elements < length**2 / 8
    assert sizes[16384] <= 4 * sizes[4096], "four times the tokens, four times the memory"


@pytest.mark.parametrize(
    ("resolutions", "block_budgets"),
    [((4096, 1), (1,)), ((4096, 64, 1), (5, 3)), ((4096, 16, 4), (1, 9)), ((2048,), ())],
)
def test_scales_above_the_length_cost_nothing(resolutions, block_budgets):
    mask = make_mask("holes", 2, 50)
    inputs = make_inputs(2, 2, 50, 8, dtype=torch.float64)
    fast, reference = both(resolutions, block_budgets, mask)
    with LargestTensor() as largest:
        given = outputs_and_gradients(fast, *inputs)
    assert largest.elements <= 4 * 64**2 * 8
    assert_all_close(given, outputs_and_gradients(reference, *inputs), 1e-12)


@pairwise(mode=MODES, mask_kind=["none", "right"])
def test_three_scales_compile_without_a_graph_break(mode, mask_kind):
    mask = make_mask(mask_kind, 2, 100)
    call, _ = both((16, 4, 1), (9, 40), mask, approx_mode=mode)
    inputs = make_inputs(2, 3, 100, 8)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_all_close(
        outputs_and_gradients(compiled, *inputs), outputs_and_gradients(call, *inputs), 1e-6
    )


@pytest.mark.parametrize("mask_kind", [pytest.param("none", marks=pytest.mark.slow), "right"])
def test_three_scales_are_exported_for_any_batch_and_length(mask_kind):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, mask):
            scales = {"resolutions": (16, 4, 1), "block_budgets": (9, 40)}
            return multiresolution_attention(query, key, value, mask, **scales)

    any_size = torch.export.Dim.DYNAMIC
    of_tensor = {0: any_size, 2: any_size}
    of_mask = None if mask_kind == "none" else {0: any_size, 1: any_size}

    def arguments(batch, length):
        return (*make_inputs(batch, 3, length, 8)[:3], make_mask(mask_kind, batch, length))

    program = torch.export.export(
        Attention(), arguments(2, 100), dynamic_shapes=(*[of_tensor] * 3, of_mask)
    ).module()
    for batch, length in ((2, 100), (1, 3), (3, 301)):
        given = arguments(batch, length)
        torch.testing.assert_close(program(*given), Attention()(*given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolutions": (1, 4)}, "coarse to fine"),
        ({"resolutions": (16, 3, 1), "block_budgets": (1, 1)}, "dividing the one before"),
        ({"resolutions": ()}, "at least one scale"),
        ({"resolutions": 16}, "resolutions must be a sequence"),
        ({"resolutions": (16.0, 1)}, r"resolutions\[0\] must be an integer"),
        ({"block_budgets": (4,)}, "one number for every scale but the last, 2 for"),
        ({"block_budgets": (4, 0)}, r"block_budgets\[1\] must be an integer of at least 1"),
        ({"approx_mode": "low"}, "approx_mode must be one of"),
        ({"selection": "best"}, "selection must be one of"),
        ({"impl": "triton"}, "impl must be one of"),
        ({"scale": "1"}, "scale must be a finite"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    query, key, value, _ = make_inputs(1, 1, 64, 8)
    chosen = {"resolutions": (16, 4, 1), "block_budgets": (4, 16)} | settings
    with pytest.raises(ValueError, match=message):
        multiresolution_attention(query, key, value, **chosen)


def test_more_blocks_than_can_be_ranked_are_refused():
    x = torch.zeros(1, 1, 60_000, 1)
    with pytest.raises(ValueError, match="make resolutions coarser"):
        multiresolution_attention(x, x, x, resolutions=(8, 2, 1), block_budgets=(4, 16))
