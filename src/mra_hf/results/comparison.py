"""Is one model better than another on the same examples? A paired bootstrap."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedDifference:
    """How two models differ in accuracy on the same examples.

    Args:
        difference: accuracy of the first model minus accuracy of the second.
        low: lower end of the 95 % interval.
        high: its upper end.
        n_examples: examples that both models answered.
    """

    difference: float
    low: float
    high: float
    n_examples: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    first_right: np.ndarray, second_right: np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> PairedDifference:
    """95 % interval of the difference in accuracy, by drawing examples with replacement (Efron and
    Tibshirani 1993, section 13.3: percentiles).

    Args:
        first_right: `[examples]`, whether the first model is right.
        second_right: the same for the second model, examples in the same order.
        draws: how many samples of the examples are drawn.
        seed: of the draws.

    Raises:
        ValueError: no examples, or different numbers of them.
    """
    if len(first_right) == 0 or len(first_right) != len(second_right):
        raise ValueError(
            f"both models need answers to the same examples, got {len(first_right)} and "
            f"{len(second_right)}."
        )
    differences = np.asarray(first_right, dtype=float) - np.asarray(second_right, dtype=float)
    generator = np.random.default_rng(seed)
    n = len(differences)
    means = np.array([differences[generator.integers(0, n, n)].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedDifference(float(differences.mean()), float(low), float(high), n)
