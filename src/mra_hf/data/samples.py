"""How many rows of a data set are used, and which: limits, samples and splits drawn from a seed."""

import numpy as np

from mra_attention.checks import check_int


def check_amounts(**amounts: int | None) -> None:
    """Refuse an amount that is neither None nor a positive integer; a `seed` may be 0.

    Raises:
        ValueError: the message names the argument.
    """
    for name, amount in amounts.items():
        if amount is not None:
            check_int(name, amount, 0 if name == "seed" else 1)


def sample_rows(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Indices `[limit]` of rows drawn from `count`, ascending; all of them without a limit."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def split_rows(count: int, shares: tuple[float, float], seed: int) -> dict[str, np.ndarray]:
    """Indices of `count` rows, drawn into "dev", "test" and "train", each ascending.

    Args:
        count: rows, at least 10.
        shares: of dev and test, at least one row each; the rest is train.
        seed: of the draw.
    """
    check_int("rows", count, 10)
    order = np.random.default_rng(seed).permutation(count)
    dev, test = (max(1, round(share * count)) for share in shares)
    return {
        "dev": np.sort(order[:dev]),
        "test": np.sort(order[dev : dev + test]),
        "train": np.sort(order[dev + test :]),
    }
