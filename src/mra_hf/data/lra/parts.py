"""The form that every task of the Long Range Arena comes in: three data sets and their facts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import Dataset, Features, Value

try:  # datasets 4 has a type for lists
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
        max_length: the longest sequence, in tokens.
        labels: names of the classes.
        masks_zero: whether id 0 is never attended, padding or not; if False, nothing is hidden.
        grid: (height, width) of images, which are read row by row; None for texts.
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


def features(*columns: str) -> Features:
    """The features of rows with these columns of ids, and a label."""
    ids = {name: ListOf(Value("int16")) for name in columns}
    return Features({**ids, "label": Value("int8")})


def generated(draw_shards: Callable, shards: int, num_proc: int | None, **arguments) -> Dataset:
    """Rows that `draw_shards(shards=[0, 1, ...], **arguments)` yields, read from the cache of
    datasets if they were drawn before.

    Args:
        draw_shards: a generator function whose rows depend on its arguments only.
        shards: how many there are.
        num_proc: processes to share them out to.
        arguments: a `version` among them makes the cache forget rows drawn by another one.
    """
    return Dataset.from_generator(
        draw_shards,
        features=features("input_ids"),
        gen_kwargs={"shards": list(range(shards)), **arguments},
        num_proc=min(num_proc, shards) if num_proc and num_proc > 1 else None,
    )


def rows(
    ids: Sequence, labels: Sequence[int], n_classes: int, where: str, **other: Sequence
) -> Dataset:
    """A data set with the columns `input_ids`, those of `other`, and `label`.

    Raises:
        ValueError: there are no rows, or a label is no class; the message says `where`.
    """
    if not len(labels):
        raise ValueError(f"{where} holds no rows.")
    if not 0 <= min(labels) <= max(labels) < n_classes:
        raise ValueError(
            f"{where} has labels from {min(labels)} to {max(labels)}, "
            f"and there are {n_classes} classes from 0 on."
        )
    columns = {"input_ids": ids, **other}
    return Dataset.from_dict({**columns, "label": list(labels)}, features=features(*columns))
