"""The covering choices: complete, small and always the same."""

import itertools

import pytest

from pairwise import covering

AXES = {
    "two": (2, 3),
    "equal": (3, 3, 3, 3),
    "unequal": (6, 5, 5, 2),
    "many": (2, 2, 2, 2, 2, 2),
    "with one value": (4, 1, 2),
}


def pairs(row):
    return set(itertools.combinations(enumerate(row), 2))


@pytest.mark.parametrize("sizes", AXES.values(), ids=AXES)
def test_every_pair_of_values_occurs_in_few_rows(sizes):
    axes = [range(size) for size in sizes]
    rows = covering(*axes)
    expected = set().union(*map(pairs, itertools.product(*axes)))
    assert set().union(*map(pairs, rows)) == expected
    largest, second = sorted(sizes, reverse=True)[:2]
    assert largest * second <= len(rows) <= 1.5 * largest * second + 2
    assert rows == covering(*axes)


def test_one_axis_is_itself_and_values_need_no_hash():
    assert covering([{"a": 1}, None]) == [({"a": 1},), (None,)]
    assert len(covering([{}, {"a": 1}], [[], None])) == 4
