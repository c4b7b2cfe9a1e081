"""The selected pairs as lists, cut into work items.

Direction 0 has a list of key blocks for every bundle of `QUERY_BLOCKS` adjacent query blocks (one
or two), direction 1 a list of query blocks for every key block; all are ascending. The bundle or
key block that a list belongs to is its owner. An entry is a block. The list of a bundle of two is
the union of their lists, and its entries also say which of the two selected the key block:
4 * block + 1 (the first), + 2 (the second) or + 3 (both).

A list of more than `ITEM_BLOCKS` entries is cut into several items, so that a query block that
attends to everything does not hold up the grid. Every owner has at least one item, and all sizes
follow from shapes and budgets: nothing is read back by the host. There is room for R owners in
both directions; those beyond the last bundle have empty lists and no item.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..implementations import BLOCK_SIZE
from . import launching
from .call import KernelCall
from .distance_bias import PairBias
from .primitives import SIZES, of_gathered, of_own


@triton.jit
def _selected(
    BLOCKS, COUNTS,
    head, sample, own, other, n_blocks, direction,
):  # fmt: skip
    """Tile `[own, other]` bool of the pairs that are selected and live."""
    inside = (own < n_blocks)[:, None] & (other < n_blocks)[None, :]
    start = BLOCKS + head * n_blocks * n_blocks
    if direction == 0:
        chosen = tl.load(start + own[:, None] * n_blocks + other[None, :], mask=inside, other=0)
    else:
        chosen = tl.load(start + other[None, :] * n_blocks + own[:, None], mask=inside, other=0)
    own_real = tl.load(COUNTS + sample * n_blocks + own, mask=own < n_blocks, other=0)
    other_real = tl.load(COUNTS + sample * n_blocks + other, mask=other < n_blocks, other=0)
    return (chosen != 0) & (own_real > 0)[:, None] & (other_real > 0)[None, :]


@triton.jit
def _selectors(
    BLOCKS, COUNTS,
    head, sample, own, other, n_blocks, direction,
    QUERY_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Tile `[own, other]` int32: 0 where no pair is listed; bit i stands for query block i of a
    bundle.
    """
    first = own
    if direction == 0:
        first = own * QUERY_BLOCKS
    bits = _selected(BLOCKS, COUNTS, head, sample, first, other, n_blocks, direction).to(tl.int32)
    if QUERY_BLOCKS == 2:  # noqa: SIM102 (known when compiling; the other is not)
        if direction == 0:
            second = _selected(BLOCKS, COUNTS, head, sample, first + 1, other, n_blocks, direction)
            bits += 2 * second.to(tl.int32)
    return bits


@triton.jit
def listed_blocks(entries, QUERY_BLOCKS: tl.constexpr):
    """The key blocks that entries of direction 0 stand for."""
    if QUERY_BLOCKS == 2:
        return entries // 4
    else:
        return entries


@triton.jit
def visible_pairs(
    entries, seen, QUERY_BLOCKS: tl.constexpr, M: tl.constexpr, SWAPPED: tl.constexpr
):
    """Which pairs of a tile of direction 0 count, in a shape that broadcasts to it: those of keys
    that are seen, and, for each query of a bundle, those that its own block selected. Both are
    given per gathered token.
    """
    visible = of_gathered(seen, SWAPPED)
    if QUERY_BLOCKS == 2:
        bits = of_own(1 + tl.arange(0, 2 * M) // M, SWAPPED)
        visible = visible & ((of_gathered(entries, SWAPPED) & bits) != 0)
    return visible


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    BLOCKS, COUNTS, SIZES,
    all_heads, n_blocks, heads,
    QUERY_BLOCKS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Sizes of the lists `[2, G, R]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    sample = head // heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    total = tl.zeros([OWN], tl.int32)
    for start in range(0, n_blocks, OTHER):
        other = start + tl.arange(0, OTHER)
        bits = _selectors(
            BLOCKS, COUNTS, head, sample, own, other, n_blocks, direction, QUERY_BLOCKS
        )
        total += tl.sum((bits != 0).to(tl.int32), 1)
    tl.store(SIZES + line * n_blocks + own, total, mask=own < n_blocks)


@triton.jit(do_not_specialize=SIZES)
def plan_kernel(
    SIZES, STARTS, FIRST_ITEMS, ITEMS, ITEM_COUNTS,
    all_heads, n_blocks, query_items, key_items,
    QUERY_BLOCKS: tl.constexpr, R_PAD: tl.constexpr, ITEM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per (direction, head): where lists begin, and the owner of every item."""
    line = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, R_PAD)
    inside = own < n_blocks
    sizes = tl.load(SIZES + line * n_blocks + own, mask=inside, other=0)
    tl.store(STARTS + line * n_blocks + own, tl.cumsum(sizes, 0) - sizes, mask=inside)
    items = tl.maximum(tl.cdiv(sizes, ITEM_BLOCKS), 1)
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
    QUERY_BLOCKS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Write the lists `[2, G, capacity]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    sample = head // heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    at = tl.load(STARTS + line * n_blocks + own, mask=own < n_blocks, other=0)
    for start in range(0, n_blocks, OTHER):
        other = start + tl.arange(0, OTHER)
        bits = _selectors(
            BLOCKS, COUNTS, head, sample, own, other, n_blocks, direction, QUERY_BLOCKS
        )
        ones = (bits != 0).to(tl.int32)
        slots = at[:, None] + tl.cumsum(ones, 1) - ones
        entries = tl.broadcast_to(other[None, :], slots.shape)
        if QUERY_BLOCKS == 2:  # noqa: SIM102 (known when compiling; the other is not)
            if direction == 0:
                entries = 4 * entries + bits
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
        return {
            **self.of_owners(call),
            **call.inputs,
            **bias.arguments,
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
            "num_stages": config.num_stages,
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
        counts: real tokens of the blocks, `[B, R]` int32.
        blocks: the selection, `[B, H, R, R]` int8.
        query_blocks: adjacent query blocks that own a list of direction 0.
        largest_budget: bound of the pairs selected per head; None for any number.
    """
    rows, lines = call.n_blocks, (directions, call.all_heads)
    # A union of lists is no longer than their sum, so that `capacity` bounds it too.
    capacity = rows**2 if largest_budget is None else min(largest_budget, rows**2)
    # Longer items where so much may be selected that partial sums would outgrow the inputs.
    longest = launching.next_power_of_2(launching.ceil_div(capacity, 4 * rows))
    item_blocks = max(launching.table().item_blocks, longest if rows > 64 else 1)
    own_blocks = (query_blocks, 1)[:directions]
    owners = [launching.ceil_div(rows, n) for n in own_blocks]
    max_items = [n + capacity // item_blocks for n in owners]
    sizes, starts, first_items = call.empty((3, *lines, rows), torch.int32)
    entries = call.empty((*lines, max(1, capacity)), torch.int32)
    items = call.empty((call.all_heads * sum(max_items),), torch.int32)
    item_counts = call.empty(lines, torch.int32)

    tile = {"QUERY_BLOCKS": query_blocks, "OWN": 32, "OTHER": 64, "num_warps": 8}
    pairs = {"BLOCKS": blocks, "COUNTS": counts, "heads": call.heads, **tile}
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
        ITEM_BLOCKS=item_blocks,
    )
    launching.launch(
        fill_kernel, strips, **pairs, **heads, STARTS=starts, LISTS=entries, capacity=capacity
    )

    items = items.split([call.all_heads * n for n in max_items])
    tensors = zip(sizes, starts, entries, first_items, items, item_counts, strict=True)
    numbers = zip(own_blocks, owners, max_items, strict=True)
    shared = (capacity, item_blocks, rows > item_blocks)
    return BlockLists(*(OwnerLists(*x, *n, *shared) for x, n in zip(tensors, numbers, strict=True)))
