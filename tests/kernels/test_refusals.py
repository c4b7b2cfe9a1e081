"""Wrong calls of the operator: the error names the argument and the remedy."""

import pytest
import torch

from mra_attention import BlockSelection, mra2_attention, mra2_attention_matrix, select_blocks


def qkv(**changes):
    """Arguments of a good call, `[2, 2, 40, 8]`, with some replaced."""
    good = {name: torch.zeros(2, 2, 40, 8) for name in ("query", "key", "value")}
    return good | changes


def mask(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


CHOSEN = BlockSelection(mask(2, 2, 2, 2), 32)
NUMBERS = BlockSelection(mask(2, 2, 2, 2, dtype=torch.long), 32)

#: An argument of the operator, its wrong value, and what the message contains besides its name.
ARGUMENTS = [
    ("query", [[1.0]], "torch.Tensor", "list"),
    ("query", zeros(2, 40, 16), "[batch, heads, tokens, head_dim]", "split"),
    ("query", zeros(2, 2, 40, 8).to_sparse(), "to_dense()"),
    ("key", zeros(2, 2, 41, 8), "self-attention"),
    ("key", zeros(2, 2, 40, 8, device="meta"), "meta", "move"),
    ("value", zeros(2, 1, 40, 8), "grouped key heads"),
    ("value", zeros(2, 2, 40, 4), "(2, 2, 40, 8)"),
    ("value", zeros(2, 2, 40, 8, dtype=torch.bfloat16), "bfloat16", "one dtype"),
    ("attention_mask", [[1] * 40] * 2, "list"),
    ("attention_mask", mask(2, 40, dtype=torch.float32), "mask.bool()"),
    ("attention_mask", mask(2, 1, 40, 40), "2-D"),
    ("attention_mask", mask(2, 41), "(2, 40)"),
    ("attention_mask", mask(1, 40), "(2, 40)"),
    ("attention_mask", mask(2, 40, device="meta"), "move"),
    ("block_per_row", 0, "at least 1", "0"),
    ("block_per_row", 2.0, "integer", "2.0"),
    ("block_per_row", True, "integer", "True"),
    ("block_budget", 0, "at least 1"),
    ("block_budget", "all", "'all'"),
    ("block_size", 0, "at least 1"),
    ("block_size", 10000, "at most"),
    ("approx_mode", "both", '"full"', '"sparse"'),
    ("impl", "cuda", '"reference"', '"torch"'),
    ("initial_prior_first_n_blocks", -1, "at least 0"),
    ("initial_prior_diagonal_n_blocks", 1.5, "integer"),
    ("selection", "best", '"global"', "select_blocks"),
    ("selection", BlockSelection(mask(2, 2, 3, 3), 32), "select_blocks"),
    ("selection", NUMBERS, "bool"),
    ("selection", BlockSelection([[1]], 32), "selection.blocks", "select_blocks"),
    ("scale", float("inf"), "finite"),
    ("scale", torch.tensor(1.0), "Python number"),
]

#: name -> a call, and what its message contains, case-sensitive
CALLS = {
    "no tokens": (
        lambda: mra2_attention(*[zeros(2, 2, 0, 8)] * 3),
        ("query", "at least one token"),
    ),
    "integer tensors": (
        lambda: mra2_attention(*[zeros(2, 2, 40, 8, dtype=torch.long)] * 3),
        ("query", "float32", "cast"),
    ),
    "selection of another block size": (
        lambda: mra2_attention(**qkv(), selection=CHOSEN, block_size=20),
        ("block_size=32",),
    ),
    "select_blocks with a selection": (
        lambda: select_blocks(*[zeros(2, 2, 40, 8)] * 2, selection=CHOSEN),
        ("selection", "mra2_attention"),
    ),
    "matrix of an unknown mode": (
        lambda: mra2_attention_matrix(*[zeros(1, 1, 40, 8)] * 2, approx_mode="dense"),
        ("approx_mode", '"full"'),
    ),
    "too many block rows": (
        lambda: select_blocks(*[zeros(1, 1, 23171, 1)] * 2, block_size=1),
        ("block rows", "raise block_size"),
    ),
}


def assert_refused(call, *words):
    with pytest.raises(ValueError) as raised:
        call()
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"


@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: f"{row[0]}: {row[-1]}")
def test_a_wrong_argument_is_refused_in_words(row):
    name, value, *words = row
    assert_refused(lambda: mra2_attention(**qkv(**{name: value})), name, *words)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_refused_in_words(name):
    call, words = CALLS[name]
    assert_refused(call, *words)


def test_the_good_call_behind_the_table_passes():
    mra2_attention(**qkv(), selection=CHOSEN)
