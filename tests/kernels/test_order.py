"""Orders of tokens: grids in patches, hashed queries and keys, and the way back."""

import functools

import pytest
import torch
from attention_cases import MASK_KINDS, dense_attention, make_inputs, make_mask

from mra_attention import mra2_attention
from mra_attention.order import (
    attend_in_order,
    hash_order,
    inverse_order,
    patch_order,
    random_directions,
)
from pairwise import pairwise


def test_patches_of_a_grid_become_blocks():
    order = patch_order(32, 32)
    for height, width in ((0, 0), (3, 7), (4, 8), (17, 30)):
        place = ((height // 4) * 4 + width // 8) * 32 + (height % 4) * 8 + width % 8
        assert order[place] == height * 32 + width
    grid = torch.arange(8 * 6).view(8, 6)
    blocks = grid.flatten()[patch_order(8, 6, (2, 3))].view(-1, 6)
    assert blocks[0].tolist() == [0, 1, 2, 6, 7, 8] and blocks[1].tolist() == [3, 4, 5, 9, 10, 11]


def test_orders_are_undone():
    order = torch.stack([torch.randperm(20) for _ in range(6)]).view(2, 3, 20)
    x = torch.randn(2, 3, 20)
    there = x.gather(-1, order)
    assert torch.equal(there.gather(-1, inverse_order(order)), x)


@pytest.mark.parametrize("mask_kind", MASK_KINDS)
def test_softmax_attention_does_not_care(mask_kind):
    mask = make_mask(mask_kind, 2, 90)
    query, key, value, _ = make_inputs(2, 3, 90, 8, dtype=torch.float64)
    expected = dense_attention(query, key, value, mask)
    orders = {
        "query_order": hash_order(query, mask, n_buckets=8),
        "key_order": hash_order(key, mask, n_buckets=4),
    }
    output = attend_in_order(dense_attention, query, key, value, mask, **orders)
    torch.testing.assert_close(output, expected)
    if mask is not None:
        for order in orders.values():
            ordered = mask[:, None].expand(order.shape).gather(-1, order)
            assert (ordered.int().diff(dim=-1) <= 0).all(), "padding is last"


def test_one_bucket_for_all_changes_nothing():
    query, key, value, _ = make_inputs(2, 2, 130, 16)
    alike = torch.ones(2, 2, 130, 16)
    order = hash_order(alike, n_buckets=2)
    attention = functools.partial(mra2_attention, block_per_row=2)
    output = attend_in_order(attention, query, key, value, query_order=order, key_order=order)
    assert torch.equal(output, attention(query, key, value))


def test_hashing_finds_what_a_shuffle_has_torn_apart():
    generator = torch.Generator().manual_seed(0)
    length, dim = 512, 32
    topics = torch.randn(16, dim, generator=generator)
    of_token = torch.arange(length) // 32
    centre = topics[of_token][None, None].expand(1, 2, -1, -1)
    noise = torch.randn(3, 1, 2, length, dim, generator=generator)
    query, key = 2.5 * (centre + 0.3 * noise[:2])
    value = centre + noise[2]
    attention = functools.partial(mra2_attention, block_per_row=2)

    def error(query, key, value, **orders):
        exact = dense_attention(query, key, value)
        if orders:
            output = attend_in_order(attention, query, key, value, **orders)
        else:
            output = attention(query, key, value)
        return ((output - exact).norm() / exact.norm()).item()

    shuffle = torch.randperm(length, generator=generator)
    torn = [x[:, :, shuffle] for x in (query, key, value)]
    directions = random_directions(dim, 16, generator)
    hashed = {
        name: hash_order(x, n_buckets=32, directions=directions)
        for name, x in (("query_order", torn[0]), ("key_order", torn[1]))
    }
    in_order, shuffled, found = error(query, key, value), error(*torn), error(*torn, **hashed)
    assert in_order < 0.2 * shuffled
    assert found < 0.75 * shuffled, "part of it comes back"


@pairwise(mask_kind=MASK_KINDS, per_head=[False, True])
def test_any_order_may_have_padding_anywhere(mask_kind, per_head):
    mask = make_mask(mask_kind, 2, 96)
    query, key, value, _ = make_inputs(2, 3, 96, 8, dtype=torch.float64)
    query_order, key_order = patch_order(12, 8, (4, 4)), torch.randperm(96)
    if per_head:
        query_order, key_order = query_order.expand(2, 3, -1), key_order.expand(2, 3, -1)
    output = attend_in_order(
        dense_attention, query, key, value, mask, query_order=query_order, key_order=key_order
    )
    torch.testing.assert_close(output, dense_attention(query, key, value, mask))


def attend(x, query_order, key_order):
    orders = {"query_order": query_order, "key_order": key_order}
    return attend_in_order(mra2_attention, x, x, x, **orders)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: patch_order(30, 32), "height must be a multiple of its side of the patch, 4"),
        (lambda x: patch_order(32, 4), "width must be a multiple"),
        (lambda x: hash_order(x, n_buckets=3), "n_buckets must be even"),
        (lambda x: hash_order(x, directions=torch.ones(3, 8)), "directions must be"),
        (lambda x: patch_order(32, 32, (4,)), "patch must be .height, width., got .4,."),
        (
            lambda x: attend(x, torch.arange(5), torch.arange(64)),
            "query_order must be a tensor",
        ),
        (
            lambda x: attend(x, torch.arange(64), torch.zeros(64, dtype=torch.long)),
            "key_order must hold every position from 0 to 63 once",
        ),
        (
            lambda x: attend(x, torch.arange(64) + 1, torch.arange(64)),
            "query_order must hold every",
        ),
        (lambda x: attend(x, torch.arange(64.0), torch.arange(64)), "query_order must hold every"),
    ],
)
def test_wrong_orders_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 2, 64, 8))
