"""ListOps: nested operations on digits, made here by the rules of the Long Range Arena.

Trees are drawn node by node: above depth 10 a node is an operator with probability 1/4 and 2 to 10
arguments, else a digit. Trees of more than 500 and fewer than 2000 symbols are kept. The symbols of
a tree are its operators with their opening brackets, its digits and its closing brackets.
"""

import random
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
from datasets import Dataset

from mra_attention.checks import check_int
from mra_hf.data.lra.parts import PARTS, LraData, generated
from mra_hf.data.samples import check_amounts

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(median(values)),
    "SM": lambda values: sum(values) % 10,
}
#: Symbols in the order of their ids, which begin at 1.
SYMBOLS = (*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
_OPERATOR = 11  # id of the first operator
_CLOSING = len(SYMBOLS)
_OPERATOR_PROBABILITY = 0.25
#: Trees that one generator draws; each shard is seeded by itself.
_SHARD = 500
#: Raise it when the same seed gives other trees: the cache then forgets the old ones.
_VERSION = 1


class _TooLongError(Exception):
    pass


def listops(
    *,
    seed: int = 0,
    train: int = 96_000,
    dev: int = 2000,
    test: int = 2000,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    num_proc: int | None = None,
) -> LraData:
    """Make the task, about a millisecond a tree; later calls read it from the cache of datasets.

    Args:
        seed: of all draws; the trees do not depend on `num_proc`.
        train, dev, test: trees of each part.
        min_length, max_length: the number of symbols of a tree lies between, both excluded.
        max_depth: of a tree.
        max_arguments: of an operator.
        num_proc: processes that draw.

    Raises:
        ValueError: a number out of range, or trees that are too rare to be drawn.
    """
    sizes = dict(zip(PARTS, (train, dev, test), strict=True))
    for name, size in sizes.items():
        check_int(name, size, 1)
    check_amounts(seed=seed, num_proc=num_proc)
    check_int("min_length", min_length, 1)
    check_int("max_length", max_length, min_length + 2)
    check_int("max_depth", max_depth, 2)
    check_int("max_arguments", max_arguments, 2)
    total = sum(sizes.values())
    shards = -(-total // _SHARD) + 1  # one more, as some trees are drawn twice
    rules = (min_length, max_length, max_depth, max_arguments)
    trees = generated(_shards, shards, num_proc, seed=seed, rules=rules, version=_VERSION)
    different = _different(trees)
    if len(different) < total:
        raise ValueError(
            f"train, dev and test ask for {total} trees, "
            f"and of {len(trees)} that were drawn only {len(different)} differ; "
            "ask for fewer, or allow longer ones (max_length)."
        )
    parts, first = {}, 0
    for name, size in sizes.items():
        parts[name] = trees.select(different[first : first + size])
        first += size
    return LraData(
        **parts,
        vocab_size=len(SYMBOLS) + 1,
        max_length=max_length,
        labels=tuple(map(str, range(10))),
        split=f"made here by seed {seed}: {train}, {dev} and {test} different trees",
    )


def _different(trees: Dataset) -> list[int]:
    """Rows of the trees that were not drawn before."""
    first_rows: dict[bytes, int] = {}
    for row, ids in enumerate(trees.with_format("numpy")["input_ids"]):
        first_rows.setdefault(np.asarray(ids).tobytes(), row)
    return list(first_rows.values())


def _shards(
    shards: list[int], seed: int, rules: tuple[int, int, int, int], version: int
) -> Iterator[dict]:
    """Rows of some shards; the cache reads `version`."""
    min_length, max_length, max_depth, max_arguments = rules
    for shard in shards:
        draw = random.Random(f"{seed}-{shard}")
        kept = tries = 0
        while kept < _SHARD:
            tries += 1
            if tries > 10_000 and kept < tries / 10_000:
                raise ValueError(
                    f"hardly any tree has more than {min_length} and fewer than {max_length} "
                    f"symbols with max_depth={max_depth} and max_arguments={max_arguments}; "
                    "lower min_length or raise the others."
                )
            ids: list[int] = []
            try:
                value = _draw_node(draw, ids, 1, max_depth, max_arguments, max_length)
            except _TooLongError:
                continue
            if min_length < len(ids) < max_length:
                kept += 1
                yield {"input_ids": ids, "label": value}


def _draw_node(
    draw: random.Random, ids: list[int], depth: int, max_depth: int, max_arguments, max_length
) -> int:
    """Append the symbols of a node, and return its value."""
    if len(ids) >= max_length:  # the tree would be dropped in the end
        raise _TooLongError
    if depth == max_depth or draw.random() > _OPERATOR_PROBABILITY:
        digit = draw.randrange(10)
        ids.append(digit + 1)
        return digit
    count = draw.randint(2, max_arguments)
    number = draw.randrange(len(OPERATORS))
    ids.append(_OPERATOR + number)
    rest = (max_depth, max_arguments, max_length)
    values = [_draw_node(draw, ids, depth + 1, *rest) for _ in range(count)]
    ids.append(_CLOSING)
    return tuple(OPERATORS.values())[number](values)


def root_operators(rows: Dataset) -> np.ndarray:
    """The first symbol of each tree, all that a classifier knows which reads no further."""
    return np.array([ids[0] for ids in rows["input_ids"]])
