"""The selected pairs as lists, cut into work items.

Direction 0 has a list of key blocks for every bundle of `QUERY_BLOCKS` adjacent query blocks (one
or two), direction 1 a list of query blocks for every square block of keys, which has `PER_BLOCK`
key blocks; all are ascending. The bundle or square block that a list belongs to is its owner, and
the blocks that it consists of are the parts of the owner. An entry is a block. Where an owner has
several parts, its list is the union of theirs, and an entry also says which of them are paired with
the block: block << parts, plus 1 << i for part i.

A list of more than `ITEM_BLOCKS` entries is cut into several items, so that a query block that
attends to everything does not hold up the grid. Every owner has at least one item, and all sizes
follow from shapes and budgets: nothing is read back by the host. There is room for R owners in
both directions; those beyond the last bundle have empty lists and no item.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..implementations import BLOCK_SIZE
from . import launching
from .call import KernelCall
from .distance_bias import PairBias
from .primitives import SIZES, block_sizes, of_gathered, of_own


@triton.jit
def _selected(
    BLOCKS, COUNTS,
    head, sample, own, other, n_blocks, direction,
    PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile `[own, other]` bool of the pairs that are selected and live: own query blocks and other
    key blocks, or, in direction 1, own key blocks and other query blocks.
    """
    n_key_blocks = n_blocks * PER_BLOCK
    start = BLOCKS + head * n_blocks * n_key_blocks
    counts = COUNTS + sample * n_key_blocks
    if direction == 0:
        inside = (own < n_blocks)[:, None] & (other < n_key_blocks)[None, :]
        at = start + own[:, None] * n_key_blocks + other[None, :]
        chosen = tl.load(at, mask=inside, other=0)
        own_real = block_sizes(counts, own, n_blocks, PER_BLOCK)
        other_real = tl.load(counts + other, mask=other < n_key_blocks, other=0)
    else:
        inside = (own < n_key_blocks)[:, None] & (other < n_blocks)[None, :]
        at = start + other[None, :] * n_key_blocks + own[:, None]
        chosen = tl.load(at, mask=inside, other=0)
        own_real = tl.load(counts + own, mask=own < n_key_blocks, other=0)
        other_real = block_sizes(counts, other, n_blocks, PER_BLOCK)
    return (chosen != 0) & (own_real > 0)[:, None] & (other_real > 0)[None, :]


@triton.jit
def _selectors(
    BLOCKS, COUNTS,
    head, sample, own, other, n_blocks, direction,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile `[own, other]` int32: 0 where no pair is listed; bit i stands for part i of an owner."""
    parts = tl.where(direction == 0, QUERY_BLOCKS, PER_BLOCK)
    first = own * parts
    bits = tl.zeros([own.shape[0], other.shape[0]], tl.int32)
    for part in range(parts):
        selected = _selected(
            BLOCKS, COUNTS, head, sample, first + part, other, n_blocks, direction, PER_BLOCK
        )
        bits += selected.to(tl.int32) << part
    return bits


@triton.jit
def listed_blocks(entries, PARTS: tl.constexpr):
    """The blocks that entries of the lists of owners of so many parts stand for."""
    if PARTS > 1:
        return entries >> PARTS
    else:
        return entries


@triton.jit
def visible_pairs(entries, seen, PARTS: tl.constexpr, SIZE: tl.constexpr, SWAPPED: tl.constexpr):
    """Which pairs of a tile count, in a shape that broadcasts to it: those of gathered tokens that
    are seen, and, for each of the `SIZE` tokens of a part of the owner, those of blocks that are
    paired with it. Entries and whether they are seen are given per gathered token.
    """
    visible = of_gathered(seen, SWAPPED)
    if PARTS > 1:
        bits = of_own(1 << (tl.arange(0, PARTS * SIZE) // SIZE), SWAPPED)
        visible = visible & ((of_gathered(entries, SWAPPED) & bits) != 0)
    return visible


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    BLOCKS, COUNTS, SIZES,
    all_heads, n_blocks, heads,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Sizes of the lists `[2, G, R]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    sample = head // heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    total = tl.zeros([OWN], tl.int32)
    for start in range(0, tl.where(direction == 0, n_blocks * PER_BLOCK, n_blocks), OTHER):
        other = start + tl.arange(0, OTHER)
        bits = _selectors(
            BLOCKS, COUNTS, head, sample, own, other, n_blocks, direction, QUERY_BLOCKS, PER_BLOCK
        )
        total += tl.sum((bits != 0).to(tl.int32), 1)
    tl.store(SIZES + line * n_blocks + own, total, mask=own < n_blocks)


@triton.jit(do_not_specialize=SIZES)
def plan_kernel(
    SIZES, STARTS, FIRST_ITEMS, ITEMS, ITEM_COUNTS,
    all_heads, n_blocks, query_items, key_items,
    QUERY_BLOCKS: tl.constexpr, R_PAD: tl.constexpr, QUERY_ITEM_BLOCKS: tl.constexpr,
    KEY_ITEM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per (direction, head): where lists begin, and the owner of every item."""
    line = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, R_PAD)
    inside = own < n_blocks
    sizes = tl.load(SIZES + line * n_blocks + own, mask=inside, other=0)
    tl.store(STARTS + line * n_blocks + own, tl.cumsum(sizes, 0) - sizes, mask=inside)
    item_blocks = tl.where(line < all_heads, QUERY_ITEM_BLOCKS, KEY_ITEM_BLOCKS)
    items = tl.maximum(tl.cdiv(sizes, item_blocks), 1)
    owners = tl.where(line < all_heads, tl.cdiv(n_blocks, QUERY_BLOCKS), n_blocks)
    items = tl.where(own < owners, items, 0)
    first = tl.cumsum(items, 0) - items
    tl.store(FIRST_ITEMS + line * n_blocks + own, first, mask=inside)
    tl.store(ITEM_COUNTS + line, tl.sum(items, 0))
    # The items of direction 0 come first, `query_items` of each head.
    start = tl.minimum(line, all_heads) * query_items + tl.maximum(line - all_heads, 0) * key_items
    for part in range(0, tl.max(items, 0)):
        tl.store(ITEMS + start + first + part, own, mask=part < items)


@triton.jit(do_not_specialize=SIZES)
def fill_kernel(
    BLOCKS, COUNTS, STARTS, LISTS,
    all_heads, n_blocks, heads, capacity,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Write the lists `[2, G, capacity]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    sample = head // heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    at = tl.load(STARTS + line * n_blocks + own, mask=own < n_blocks, other=0)
    for start in range(0, tl.where(direction == 0, n_blocks * PER_BLOCK, n_blocks), OTHER):
        other = start + tl.arange(0, OTHER)
        bits = _selectors(
            BLOCKS, COUNTS, head, sample, own, other, n_blocks, direction, QUERY_BLOCKS, PER_BLOCK
        )
        ones = (bits != 0).to(tl.int32)
        slots = at[:, None] + tl.cumsum(ones, 1) - ones
        entries = tl.broadcast_to(other[None, :], slots.shape)
        if QUERY_BLOCKS * PER_BLOCK > 1:
            parts = tl.where(direction == 0, QUERY_BLOCKS, PER_BLOCK)
            entries = tl.where(parts > 1, (entries << parts) + bits, entries)
        # More pairs than `capacity` would be a caller's mistake; it must not write elsewhere.
        tl.store(LISTS + line * capacity + slots, entries, mask=(ones != 0) & (slots < capacity))
        at += tl.sum(ones, 1)


class OwnerLists(NamedTuple):
    """The lists of one direction.

    Attributes:
        sizes, starts: `[G, R]` int32, entries of every list, and where they begin in `entries`.
        entries: `[G, capacity]` int32.
        first_items: `[G, R]` int32, the first item of every owner.
        items: `[G * max_items]` int32, the owner of every item.
        item_counts: `[G]` int32.
        own_blocks: blocks of an owner.
        parts: parts of an owner: its query blocks, or the key blocks of its block.
        owners, max_items: owners of a head, and its items at most.
        capacity, item_blocks: entries of a head and of an item, at most.
        may_split: whether an owner may have several items.
    """

    sizes: Tensor
    starts: Tensor
    entries: Tensor
    first_items: Tensor
    items: Tensor
    item_counts: Tensor
    own_blocks: int
    parts: int
    owners: int
    max_items: int
    capacity: int
    item_blocks: int
    may_split: bool

    def of_items(self, call: KernelCall, kernel: str, bias: PairBias) -> dict:
        """Arguments and launch configuration of a kernel that runs over work items."""
        config = call.config_of(kernel)
        # A bias takes registers that gradients do not leave; swapped tiles need their 64 rows.
        halved = bias.is_given and kernel != "forward" and not config.swapped
        stages = config.num_stages
        is_wide = call.padded_dim >= 64 and call.dtype.itemsize == 2
        if kernel == "forward" and call.key_block_size == 16 and is_wide:
            # With two stages they spill on sm_80.
            stages = 3 if launching.architecture(call.device) == "sm_80" else stages
        return {
            **self.of_owners(call),
            **call.inputs,
            **bias.arguments,
            "PER_BLOCK": call.per_block,
            "STARTS": self.starts,
            "LISTS": self.entries,
            "ITEMS": self.items,
            "ITEM_COUNTS": self.item_counts,
            "capacity": self.capacity,
            "GROUP": 1 if halved else config.group,
            "SWAPPED": config.swapped,
            "WIDEN": launching.is_interpreted() and call.dtype == torch.bfloat16,
            "PRECISION": launching.float32_precision(),
            "num_warps": config.num_warps,
            "num_stages": stages,
        }

    def of_owners(self, call: KernelCall) -> dict:
        """Arguments of a kernel that visits the owners."""
        return {
            **call.tokens,
            "SIZES": self.sizes,
            "FIRST_ITEMS": self.first_items,
            "max_items": self.max_items,
            "ITEM_BLOCKS": self.item_blocks,
        }

    def empty_parts(self, call: KernelCall, channels: int) -> Tensor:
        """Room for the partial results of owners with several items, `[G, items, own tokens,
        channels]`.
        """
        items = self.max_items if self.may_split else 0
        return call.empty((call.all_heads, items, self.own_blocks * BLOCK_SIZE, channels))


class BlockLists(NamedTuple):
    """Direction 0, and direction 1 where it was asked for."""

    by_query: OwnerLists
    by_key: OwnerLists | None = None


def build_lists(
    call: KernelCall,
    counts: Tensor,
    blocks: Tensor,
    *,
    directions: int,
    query_blocks: int,
    largest_budget: int | None,
) -> BlockLists:
    """List the selected pairs in the first one or both directions.

    Args:
        counts: real tokens of the key blocks, `[B, C]` int32.
        blocks: the selection, `[B, H, R, C]` int8.
        query_blocks: adjacent query blocks that own a list of direction 0.
        largest_budget: bound of the pairs selected per head; None for any number.
    """
    rows, lines = call.n_blocks, (directions, call.all_heads)
    # A union of lists is no longer than their sum, so that `capacity` bounds it too.
    capacity = rows * call.n_key_blocks
    if largest_budget is not None:
        capacity = min(largest_budget, capacity)
    own_blocks, parts = (query_blocks, 1)[:directions], (query_blocks, call.per_block)[:directions]
    owners = [launching.ceil_div(rows, n) for n in own_blocks]
    item_blocks, max_items, may_split = [], [], []
    for n, per_block in zip(owners, (call.per_block, 1), strict=False):
        most = min(capacity, rows**2 * per_block)
        # Longer items where so much may be selected that partial sums would outgrow the inputs.
        longest = launching.next_power_of_2(launching.ceil_div(most, 4 * rows))
        shortest = launching.table().item_blocks * per_block
        item_blocks.append(max(shortest, longest if rows > 64 else 1))
        max_items.append(n + most // item_blocks[-1])
        may_split.append(rows * per_block > item_blocks[-1])
    sizes, starts, first_items = call.empty((3, *lines, rows), torch.int32)
    entries = call.empty((*lines, max(1, capacity)), torch.int32)
    items = call.empty((call.all_heads * sum(max_items),), torch.int32)
    item_counts = call.empty(lines, torch.int32)

    # With wider tiles, narrow key blocks spill.
    tile = {"OWN": 32, "OTHER": 64 if call.per_block == 1 else 32, "num_warps": 8}
    pairs = {"BLOCKS": blocks, "COUNTS": counts, "heads": call.heads, **tile}
    pairs |= {"QUERY_BLOCKS": query_blocks, "PER_BLOCK": call.per_block}
    heads = {"all_heads": call.all_heads, "n_blocks": rows}
    strips = directions * call.strips(tile["OWN"])
    launching.launch(count_kernel, strips, **pairs, **heads, SIZES=sizes)
    launching.launch(
        plan_kernel,
        directions * call.all_heads,
        **heads,
        SIZES=sizes,
        STARTS=starts,
        FIRST_ITEMS=first_items,
        ITEMS=items,
        ITEM_COUNTS=item_counts,
        query_items=max_items[0],
        key_items=max_items[-1],
        QUERY_BLOCKS=query_blocks,
        R_PAD=launching.next_power_of_2(rows),
        QUERY_ITEM_BLOCKS=item_blocks[0],
        KEY_ITEM_BLOCKS=item_blocks[-1],
    )
    launching.launch(
        fill_kernel, strips, **pairs, **heads, STARTS=starts, LISTS=entries, capacity=capacity
    )

    items = items.split([call.all_heads * n for n in max_items])
    tensors = zip(sizes, starts, entries, first_items, items, item_counts, strict=True)
    numbers = zip(own_blocks, parts, owners, max_items, strict=True)
    limits = zip(itertools.repeat(capacity), item_blocks, may_split, strict=False)
    lists = zip(tensors, numbers, limits, strict=True)
    return BlockLists(*(OwnerLists._make((*x, *n, *limit)) for x, n, limit in lists))
