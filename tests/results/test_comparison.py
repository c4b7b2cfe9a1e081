"""The paired bootstrap: its interval holds what it should, and notices a real difference."""

import numpy as np
import pytest

from mra_hf.results.comparison import paired_bootstrap


def test_the_interval_is_that_of_the_normal_approximation():
    generator = np.random.default_rng(1)
    first, second = generator.random(800) < 0.7, generator.random(800) < 0.6
    result = paired_bootstrap(first, second)
    differences = first.astype(float) - second
    half = 1.96 * differences.std() / 800**0.5
    assert result.difference == pytest.approx(differences.mean())
    assert result.low == pytest.approx(differences.mean() - half, abs=0.004)
    assert result.high == pytest.approx(differences.mean() + half, abs=0.004)
    assert result.is_certain and result.n_examples == 800


def test_equal_models_are_not_told_apart():
    generator = np.random.default_rng(2)
    certain = 0
    for _ in range(40):
        rights = generator.random((2, 200)) < 0.7
        certain += paired_bootstrap(*rights, draws=500).is_certain
    assert certain <= 6, "about one in twenty by chance"


def test_pairs_make_a_small_difference_visible():
    base = np.arange(600) % 5 != 0
    better = base | (np.arange(600) % 50 == 0)
    result = paired_bootstrap(better, base)
    assert result.difference == pytest.approx(0.02) and result.is_certain


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="the same examples, got 3 and 2"):
        paired_bootstrap(np.ones(3), np.ones(2))
