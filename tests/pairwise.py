"""Parametrization by pairwise choices: a few cases in which every two values occur together.

A defect mostly needs one value, or two together, to show. Of axes with 6, 5, 5 and 2 values the
whole product has 300 cases; about 30 hold every pair of values of any two axes.
"""

import itertools

import pytest
import torch


def covering(*axes: list) -> list[tuple]:
    """Return rows with one value of each axis; every pair of values of two axes is in some row.

    Greedy and deterministic: a row starts with the first pair that is missing, and each other axis
    takes the value that adds most missing pairs to the row, the least used of those that tie.
    """
    sizes = [len(axis) for axis in axes]
    if len(axes) == 1:
        return [(value,) for value in axes[0]]
    missing = {
        ((i, a), (j, b)): None  # a dict, for its order
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }
    used = [[0] * size for size in sizes]
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for i in sorted(set(range(len(axes))) - set(row), key=lambda i: -sizes[i]):
            gains = [
                sum(tuple(sorted(((i, value), entry))) in missing for entry in row.items())
                for value in range(sizes[i])
            ]
            scores = [(gain, -times) for gain, times in zip(gains, used[i], strict=True)]
            row[i] = scores.index(max(scores))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        for i, value in row.items():
            used[i][value] += 1
        rows.append(tuple(axes[i][row[i]] for i in range(len(axes))))
    return rows


def pairwise(**axes) -> pytest.MarkDecorator:
    """Return the mark that parametrizes a test by `covering` rows of the named axes."""
    rows = covering(*(list(values) for values in axes.values()))
    return pytest.mark.parametrize(",".join(axes), rows, ids=identifier)


def identifier(value) -> str | None:
    """A name for a dtype or a dict of settings; None leaves it to pytest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return "-".join(f"{name}={setting}" for name, setting in value.items()) or "default"
    return None
