"""The paper's statements on its frame, held against random input."""

import itertools
import math
import random

import pytest
import torch

from mra_hf.analysis import frame
from mra_hf.analysis.frame import Component

SIZE = 16


@pytest.fixture(params=range(4))
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def random_logits(size=SIZE, dim=4):
    query, key = torch.randn(2, size, dim, dtype=torch.float64)
    return query @ key.T


def random_tiles(seed, size=SIZE, scales=(8, 4, 1)):
    """A tiling by blocks of the given scales: some blocks of every scale are cut into the next."""
    draw = random.Random(seed)
    blocks = range(size // scales[0])
    tiles = [Component(scales[0], row, column) for row in blocks for column in blocks]
    for scale, finer in itertools.pairwise(scales):
        cut = [tile for tile in tiles if tile.scale == scale and draw.random() < 0.4]
        tiles = [tile for tile in tiles if tile not in cut]
        parts = range(scale // finer)
        for tile in cut:
            first = (tile.row * scale // finer, tile.column * scale // finer)
            tiles += [Component(finer, first[0] + a, first[1] + b) for a in parts for b in parts]
    return tiles


def approximation(logits, tiles):
    """exp of the mean logit of every tile."""
    return frame.combine([logits[tile.support].mean().exp().item() for tile in tiles], tiles, SIZE)


def test_the_frame_at_8_has_85_components_and_the_haar_basis_64():
    members = list(frame.components(8))
    assert len(members) == len(set(members)) == 85 == (4 * 8**2 - 1) // 3
    norms = [frame.combine([1], [member], 8).norm().item() ** 2 for member in members]
    assert norms == pytest.approx([member.scale**2 for member in members])
    # The Haar basis of the same grid is orthonormal: 64 functions, whose transform is a rotation.
    basis = torch.stack([frame.haar_2d(e.view(8, 8)).flatten() for e in torch.eye(64).double()])
    torch.testing.assert_close(basis @ basis.T, torch.eye(64).double())
    # Each detail has the support of a component of scale 2 or more, three to a component.
    supports = {}
    for row in basis.T:
        places = row.view(8, 8).nonzero()
        low, high = places.amin(0), places.amax(0)
        side = (high - low + 1).tolist()
        assert side[0] == side[1] and len(places) == side[0] ** 2
        key = Component(side[0], *(low // side[0]).tolist())
        supports[key] = supports.get(key, 0) + 1
    assert supports.pop(Component(8, 0, 0)) == 4, "with the constant"
    assert set(supports.values()) == {3}
    assert set(supports) == {member for member in members if member.scale in (2, 4)}


def test_components_tile_the_matrix_and_are_nested_or_disjoint():
    members = list(frame.components(8))
    for scale in (1, 2, 4, 8):
        of_scale = [member for member in members if member.scale == scale]
        assert torch.equal(
            frame.combine([1] * len(of_scale), of_scale, 8), torch.ones(8, 8).double()
        )
    draw = random.Random(0)
    for _ in range(200):
        first, second = (frame.combine([1], [draw.choice(members)], 8) for _ in range(2))
        assert (first * second).sum() in (0, min(first.sum(), second.sum()))


def test_exact_coefficients_add_up_to_means_of_the_smallest_support(seed):
    matrix = random_logits().exp()
    selected = random.Random(seed).sample(list(frame.components(SIZE)), 60)
    coefficients = frame.exact_coefficients(matrix, selected)
    result = frame.combine(coefficients, selected, SIZE)
    torch.testing.assert_close(result, frame.smallest_support_means(matrix, selected))
    # Each is the least-squares coefficient of what the coarser ones leave.
    for component, coefficient in zip(selected, coefficients, strict=True):
        coarser = [(a, c) for a, c in zip(coefficients, selected, strict=True)]
        coarser = [(a, c) for a, c in coarser if c.scale > component.scale]
        left = matrix - frame.combine([a for a, _ in coarser], [c for _, c in coarser], SIZE)
        assert coefficient == pytest.approx(left[component.support].mean().item())


def test_a_component_covered_by_finer_ones_changes_nothing(seed):
    matrix = random_logits().exp()
    parts = [Component(4, 2 + a, b) for a in (0, 1) for b in (0, 1)]
    others = random.Random(seed).sample(list(frame.components(SIZE)), 20)
    others = list(dict.fromkeys(others + parts))
    covered = Component(8, 1, 0)
    with_it = list(dict.fromkeys([*others, covered]))
    without = [component for component in others if component != covered]
    for selected in (with_it, without):
        found = frame.combine(frame.exact_coefficients(matrix, selected), selected, SIZE)
        if selected is with_it:
            expected = found
    torch.testing.assert_close(found, expected)


def test_haar_inverts_and_keeps_norms(seed):
    matrix = random_logits()
    coefficients = frame.haar_2d(matrix)
    torch.testing.assert_close(frame.inverse_haar_2d(coefficients), matrix)
    assert coefficients.norm().item() == pytest.approx(matrix.norm().item())
    # What is dropped is the error.
    kept = torch.where(coefficients.abs() > coefficients.abs().median(), coefficients, 0)
    error = (frame.inverse_haar_2d(kept) - matrix).norm()
    assert error.item() == pytest.approx((coefficients - kept).norm().item())


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_wavelet_transform_is_an_isometry(seed, levels):
    signal = torch.randn(SIZE, dtype=torch.float64)
    details, sums = [], signal
    for _ in range(levels):
        details.append(frame.haar_details(sums))
        sums = frame.haar_sums(sums)
    energy = sums.norm() ** 2 + sum(detail.norm() ** 2 for detail in details)
    assert energy.item() == pytest.approx((signal.norm() ** 2).item())


def test_the_lemma_bounds_the_gap_of_jensen(seed):
    largest = 0.0
    for _ in range(300):
        logits = random_logits(4) * random.Random(seed).choice([0.1, 1, 3])
        mean = logits.mean().exp()
        gap = logits.exp().mean() - mean
        bound = frame.jensen_factor(logits.max() - logits.min()) * mean
        assert -1e-12 * mean <= gap <= bound * (1 + 1e-9)
        largest = max(largest, (gap / bound).item())
    assert largest > 0.01, "it says something"
    constant = torch.full((4, 4), 0.7, dtype=torch.float64)
    assert frame.jensen_factor(constant.max() - constant.min()) == 0


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_norms_bound_the_range_of_logits(seed, p):
    for _ in range(50):
        query, key = torch.randn(2, 4, 3, dtype=torch.float64)
        logits = query @ key.T
        bound = frame.range_from_norms(query, key, p)
        assert logits.max() - logits.min() <= bound * (1 + 1e-12)


def test_conjugates_are_checked():
    assert [frame.conjugate(p) for p in (1, 2, 4, math.inf)] == [math.inf, 2, 4 / 3, 1]
    with pytest.raises(ValueError, match=r"p must be 1 or more, got 0\.5"):
        frame.conjugate(0.5)


@pytest.mark.parametrize(("block_size", "budget"), [(4, 1), (4, 5), (4, 16), (8, 2), (2, 30)])
def test_the_proposition_bounds_two_scales(seed, block_size, budget):
    logits = random_logits()
    matrix = logits.exp()
    means = frame.block_means(logits, block_size).exp()
    finest = means.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    threshold = means.flatten().sort(descending=True).values[budget - 1]
    refined = finest >= threshold
    error = (torch.where(refined, matrix, finest) - matrix).norm() / matrix.norm()
    bound = frame.two_scale_error_bound(logits, block_size, budget)
    assert error <= bound * (1 + 1e-9) + 1e-12
    if budget == (SIZE // block_size) ** 2:
        assert bound == 0


def test_the_bound_holds_on_any_tiling_and_is_sharper_than_the_proposition(seed):
    logits = random_logits()
    for draw in range(20):
        tiles = random_tiles(seed * 100 + draw)
        cover = frame.combine([1] * len(tiles), tiles, SIZE)
        assert torch.equal(cover, torch.ones_like(cover)), "the tiles do not overlap"
        error = (approximation(logits, tiles) - logits.exp()).norm() / logits.exp().norm()
        bound = frame.tile_error_bound(logits, tiles)
        assert 0 < error <= bound * (1 + 1e-9)
    means = frame.block_means(logits, 4)
    order = means.flatten().argsort(descending=True)
    refined = {(place.item() // 4, place.item() % 4) for place in order[:5]}
    tiles = [Component(4, r, c) for r in range(4) for c in range(4) if (r, c) not in refined]
    tiles += [
        Component(1, 4 * r + a, 4 * c + b) for r, c in refined for a in range(4) for b in range(4)
    ]
    assert frame.tile_error_bound(logits, tiles) <= frame.two_scale_error_bound(logits, 4, 5)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_details_of_logits_are_bounded_by_those_of_queries(seed, p):
    query, key = torch.randn(2, SIZE, 4, dtype=torch.float64)
    q = frame.conjugate(p)
    for rows, columns in ((query, key), (key, query)):
        details, logits = rows, rows @ columns.T
        for _ in range(3):  # the same holds on every level of the sums
            logit_details, row_details = frame.haar_details(logits), frame.haar_details(details)
            bound = torch.linalg.vector_norm(row_details, p, dim=-1).sum()
            bound = bound * torch.linalg.vector_norm(columns, q, dim=-1)
            assert (logit_details.abs().sum(0) <= bound * (1 + 1e-12)).all()
            details, logits = frame.haar_sums(details), frame.haar_sums(logits)


@pytest.mark.parametrize("call", [frame.haar_2d, frame.inverse_haar_2d])
def test_sides_that_are_no_power_of_two_are_refused(call):
    with pytest.raises(ValueError, match="power of 2, got 12"):
        call(torch.zeros(12, 12))
    with pytest.raises(ValueError, match="power of 2, got 12"):
        list(frame.components(12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frame.two_scale_error_bound(x, 4, 0), "budget must be an integer of at least 1"),
        (lambda x: frame.two_scale_error_bound(x, 4, 17), "budget must be at most 16"),
        (lambda x: frame.two_scale_error_bound(x, 5, 1), "block_size must divide the side 16"),
        (lambda x: frame.exact_coefficients(x, [Component(4, 4, 0)]), "is no component"),
        (lambda x: frame.smallest_support_means(x, [Component(3, 0, 0)]), "is no component"),
        (lambda x: frame.combine([1], [Component(4, 0, -1)], 16), "is no component"),
        (lambda x: frame.tile_error_bound(x, [Component(8, 0, 0)]), "cover every entry"),
    ],
)
def test_components_and_budgets_beyond_the_matrix_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_logits())


@pytest.mark.parametrize(("block_size", "budget"), [(4, 1), (4, 5), (8, 3), (2, 40), (4, 16)])
def test_the_proposition_is_the_formula_of_the_paper(seed, block_size, budget):
    logits = random_logits()
    side = range(0, SIZE, block_size)
    blocks = [logits[r : r + block_size, c : c + block_size] for r in side for c in side]
    ranked = sorted(blocks, key=lambda block: -block.mean().item())
    delta = ranked[budget - 1].mean().exp()
    spread = max((b.max() - b.min() for b in ranked[budget:]), default=torch.tensor(0.0))
    factor = 1 + (2 * spread).exp() - 2 * spread.exp()
    left = SIZE**2 - budget * block_size**2
    expected = (left * factor * delta**2 / logits.exp().square().sum()).sqrt()
    torch.testing.assert_close(frame.two_scale_error_bound(logits, block_size, budget), expected)


def test_the_range_from_norms_is_the_formula_of_the_paper():
    query = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    # The largest norm is 5, the largest difference of two queries 5 too.
    assert frame.range_from_norms(query, key) == pytest.approx(2 * 5 * 5)
    assert frame.range_from_norms(query, key, p=1) == pytest.approx(2 * 7 * 4)
