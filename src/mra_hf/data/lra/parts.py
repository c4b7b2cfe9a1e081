"""What every task of the Long Range Arena comes as, and how rows are divided among its parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Value

from mra_attention.checks import check_int

try:  # datasets 4 has lists of its own
    from datasets import List as ListOf
except ImportError:
    from datasets import Sequence as ListOf

PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class LraData:
    """A task.

    Attributes:
        train, dev, test: rows of `input_ids` (in pairs `input_ids_2` too) and `label`.
        vocab_size: ids are smaller; 0 is padding.
        max_length: places of a model for it.
        labels: names of the classes.
        masks_zero: whether id 0 is never attended, padding or not; else nothing is hidden.
        grid: (height, width) of images read row by row.
        two_tower: whether rows are pairs.
        split: in words, where the three parts come from.
    """

    train: Dataset
    dev: Dataset
    test: Dataset
    vocab_size: int
    max_length: int
    labels: tuple[str, ...]
    split: str
    masks_zero: bool = True
    grid: tuple[int, int] | None = None
    two_tower: bool = False

    def part(self, name: str) -> Dataset:
        """`train`, `dev` or `test`."""
        return getattr(self, name)


def features(*columns: str) -> Features:
    """Of rows with these columns of ids, and a label."""
    ids = {name: ListOf(Value("int16")) for name in columns}
    return Features({**ids, "label": Value("int8")})


def rows(
    ids: Sequence, labels: Sequence[int], n_classes: int, where: str, **other: Sequence
) -> Dataset:
    """Rows of `input_ids`, of the other columns, and of labels.

    Raises:
        ValueError: there are none, or a label that is no class; it says `where`.
    """
    if not len(labels):
        raise ValueError(f"{where} holds no rows.")
    if not 0 <= min(labels) <= max(labels) < n_classes:
        raise ValueError(
            f"{where} has labels from {min(labels)} to {max(labels)}, and there are {n_classes} "
            "classes from 0 on."
        )
    columns = {"input_ids": ids, **other}
    return Dataset.from_dict({**columns, "label": list(labels)}, features=features(*columns))


def drawn(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Places of `limit` among `count` rows at random, in their order; all without a limit."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def check_amounts(**amounts: int | None) -> None:
    """Raise a `ValueError` unless every amount is a positive integer, or None, and a seed not
    negative.
    """
    for name, amount in amounts.items():
        if amount is not None:
            check_int(name, amount, 0 if name == "seed" else 1)


def divided(count: int, shares: tuple[float, float], seed: int) -> dict[str, np.ndarray]:
    """Places 0 to `count` - 1 by part at random: shares of dev and test, the rest train."""
    check_int("rows", count, 10)
    order = np.random.default_rng(seed).permutation(count)
    dev, test = (max(1, round(share * count)) for share in shares)
    return {
        "dev": np.sort(order[:dev]),
        "test": np.sort(order[dev : dev + test]),
        "train": np.sort(order[dev + test :]),
    }
