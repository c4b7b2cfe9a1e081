"""The selected pairs as lists, cut into work items.

Direction 0 has a list of key blocks for every query block, direction 1 a list of query blocks for
every key block, both ascending. A list of more than `ITEM_BLOCKS` blocks is cut into several items,
so that a query block that attends to everything does not hold up the grid. Every block has at least
one item, and all sizes follow from shapes and budgets: nothing is read back by the host.
"""

import triton
import triton.language as tl


@triton.jit
def _selected(
    BLOCKS,
    COUNTS,
    head,
    sample,
    own,
    other,
    n_blocks,
    direction,
):
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
def count_kernel(
    BLOCKS,
    COUNTS,
    SIZES,
    all_heads,
    n_blocks,
    heads,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Sizes of the lists `[2, G, R]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    total = tl.zeros([OWN], tl.int32)
    for start in range(0, n_blocks, OTHER):
        other = start + tl.arange(0, OTHER)
        chosen = _selected(BLOCKS, COUNTS, head, head // heads, own, other, n_blocks, direction)
        total += tl.sum(chosen.to(tl.int32), 1)
    tl.store(SIZES + line * n_blocks + own, total, mask=own < n_blocks)


@triton.jit
def plan_kernel(
    SIZES,
    STARTS,
    FIRST_ITEMS,
    ITEMS,
    ITEM_COUNTS,
    n_blocks,
    max_items,
    R_PAD: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr,
):
    """One program per (direction, head): where lists begin, and the block of every item."""
    line = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, R_PAD)
    inside = own < n_blocks
    sizes = tl.load(SIZES + line * n_blocks + own, mask=inside, other=0)
    tl.store(STARTS + line * n_blocks + own, tl.cumsum(sizes, 0) - sizes, mask=inside)
    items = tl.maximum(tl.cdiv(sizes, ITEM_BLOCKS), 1)
    items = tl.where(inside, items, 0)
    first = tl.cumsum(items, 0) - items
    tl.store(FIRST_ITEMS + line * n_blocks + own, first, mask=inside)
    tl.store(ITEM_COUNTS + line, tl.sum(items, 0))
    for part in range(0, tl.max(items, 0)):
        tl.store(ITEMS + line * max_items + first + part, own, mask=part < items)


@triton.jit
def fill_kernel(
    BLOCKS,
    COUNTS,
    STARTS,
    LISTS,
    all_heads,
    n_blocks,
    heads,
    capacity,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Write the lists `[2, G, capacity]`."""
    strips = tl.cdiv(n_blocks, OWN)
    line = (tl.program_id(0) // strips).to(tl.int64)
    direction, head = line // all_heads, line % all_heads
    own = (tl.program_id(0) % strips) * OWN + tl.arange(0, OWN)
    at = tl.load(STARTS + line * n_blocks + own, mask=own < n_blocks, other=0)
    for start in range(0, n_blocks, OTHER):
        other = start + tl.arange(0, OTHER)
        chosen = _selected(BLOCKS, COUNTS, head, head // heads, own, other, n_blocks, direction)
        ones = chosen.to(tl.int32)
        slots = at[:, None] + tl.cumsum(ones, 1) - ones
        values = tl.broadcast_to(other[None, :], slots.shape)
        # More pairs than `capacity` would be a caller's mistake; it must not write elsewhere.
        tl.store(LISTS + line * capacity + slots, values, mask=chosen & (slots < capacity))
        at += tl.sum(ones, 1)
