"""Kernels of the forward pass.

The coarse part gives every query block the state of an online softmax over the pairs that are not
selected: maximum R, denominator z, numerator a. A work item goes on from there over its selected
key blocks; the first item of a block starts from the coarse state, further ones from nothing, and
blocks with several items are merged. Logits are to base 2 inside the kernels.
"""

import triton
import triton.language as tl

from .primitives import (
    LOWEST,
    add_gathered,
    as_rows,
    coarse_logits,
    empty_sums,
    is_real,
    load_summaries,
    load_tokens,
    of_gathered,
    of_own,
    store_tokens,
    tile_product,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def unselected_pairs(BLOCKS, head, rows, columns, row_counts, column_counts, n_blocks):
    """Tile `[rows, columns]`: live pairs of blocks that are left to the coarse part."""
    inside = (rows < n_blocks)[:, None] & (columns < n_blocks)[None, :]
    at = BLOCKS + head * n_blocks * n_blocks + rows[:, None] * n_blocks + columns[None, :]
    chosen = tl.load(at, mask=inside, other=1) != 0
    return inside & (row_counts > 0)[:, None] & (column_counts > 0)[None, :] & (chosen == 0)


@triton.jit
def coarse_kernel(
    QUERY_MEANS,
    KEY_MEANS,
    VALUE_SUMS,
    COUNTS,
    BLOCKS,
    LARGEST,
    DENOMINATOR,
    NUMERATOR,
    scale_log2,
    n_blocks,
    heads,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """R and z `[G, R]`, a `[G, R, D_PAD]` of a strip of query blocks."""
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    counts = COUNTS + head // heads * n_blocks
    rows = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    row_counts = tl.load(counts + rows, mask=rows < n_blocks, other=0)
    query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, n_blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        sizes = tl.load(counts + columns, mask=columns < n_blocks, other=0)
        pairs = unselected_pairs(BLOCKS, head, rows, columns, row_counts, sizes, n_blocks)
        keys = load_summaries(KEY_MEANS, head, columns, n_blocks, D_PAD)
        logits = tl.where(pairs, coarse_logits(query, keys, scale_log2), LOWEST)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.where(pairs, tl.exp2(logits - new_largest[:, None]), 0.0)
        sizes = sizes.to(tl.float32)
        denominator = denominator * rescale + tl.sum(weights * sizes[None, :], 1)
        values = load_summaries(VALUE_SUMS, head, columns, n_blocks, D_PAD)
        numerator = tl.dot(weights, values, numerator * rescale[:, None], input_precision="ieee")
        largest = new_largest
    to = head * n_blocks + rows
    tl.store(LARGEST + to, largest, mask=rows < n_blocks)
    tl.store(DENOMINATOR + to, denominator, mask=rows < n_blocks)
    to = to[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    tl.store(NUMERATOR + to, numerator, mask=(rows < n_blocks)[:, None])


@triton.jit
def _store_results(
    OUTPUT,
    LSE,
    head,
    tokens,
    sums,
    denominator,
    largest,
    real,
    length,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Output 0 and log-sum-exp +inf at padding and where nothing is attended to; NaN stays."""
    some = real & (denominator != 0.0)
    denominator = tl.where(some, denominator, 1.0)
    output = tl.where(some[:, None], sums / denominator[:, None], 0.0)
    lse = tl.where(some, (largest + tl.log2(denominator)) * LN_2, float("inf"))
    inside = tokens < length
    store_tokens(OUTPUT, head * length * D, tokens, output, inside, D, D_PAD)
    tl.store(LSE + head * length + tokens, lse, mask=inside)


@triton.jit
def exact_kernel(
    QUERY,
    KEY,
    VALUE,
    MASK,
    SIZES,
    STARTS,
    LISTS,
    FIRST_ITEMS,
    ITEMS,
    ITEM_COUNTS,
    LARGEST,
    DENOMINATOR,
    NUMERATOR,
    OUTPUT,
    LSE,
    PART_SUMS,
    PART_STATES,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    scale_log2,
    length,
    n_blocks,
    heads,
    capacity,
    max_items,
    HAS_MASK: tl.constexpr,
    HAS_COARSE: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per work item: M queries against up to `ITEM_BLOCKS` gathered key blocks, `GROUP`
    of them at a time.
    """
    head = (tl.program_id(0) // max_items).to(tl.int64)
    item = tl.program_id(0) % max_items
    if item >= tl.load(ITEM_COUNTS + head):
        return
    row = tl.load(ITEMS + head * max_items + item)
    line = head * n_blocks + row
    part = item - tl.load(FIRST_ITEMS + line)
    size = tl.load(SIZES + line)
    begin = part * ITEM_BLOCKS
    end = tl.minimum(begin + ITEM_BLOCKS, size)
    columns = LISTS + head * capacity + tl.load(STARTS + line)

    sample, of_sample = head // heads, head % heads
    tokens = row * M + tl.arange(0, M)
    real = is_real(MASK, sample, tokens, length, tokens >= 0, HAS_MASK)
    start = sample * query_batch + of_sample * query_head
    query = load_tokens(QUERY, start, tokens, query_token, real, D, D_PAD)
    key_start = sample * key_batch + of_sample * key_head
    value_start = sample * value_batch + of_sample * value_head

    channels = tl.arange(0, D_PAD)
    largest = tl.full([M], LOWEST, tl.float32)
    denominator = tl.zeros([M], tl.float32)
    sums = empty_sums(M, D_PAD, SWAPPED)
    if HAS_COARSE:  # noqa: SIM102 (known when compiling; the other is not)
        if part == 0:
            largest = tl.zeros([M], tl.float32) + tl.load(LARGEST + line)
            denominator += tl.load(DENOMINATOR + line)
            numerator = tl.load(NUMERATOR + line * D_PAD + channels)
            sums += of_gathered(numerator, SWAPPED)

    slots = tl.arange(0, GROUP * M) // M
    within = tl.arange(0, GROUP * M) % M
    for first in range(begin, end, GROUP):
        listed = first + slots < end
        gathered = tl.load(columns + first + slots, mask=listed, other=0) * M + within
        seen = is_real(MASK, sample, gathered, length, listed, HAS_MASK)
        keys = load_tokens(KEY, key_start, gathered, key_token, seen, D, D_PAD)
        values = load_tokens(VALUE, value_start, gathered, value_token, seen, D, D_PAD)
        logits = tile_product(query, keys, SWAPPED, WIDEN, PRECISION) * scale_log2
        hidden = of_gathered(seen, SWAPPED) == 0
        logits = tl.where(hidden, LOWEST, logits)
        new_largest = tl.maximum(largest, tl.max(logits, 0 if SWAPPED else 1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.exp2(logits - of_own(new_largest, SWAPPED))
        weights = tl.where(hidden, 0.0, weights)
        denominator = denominator * rescale + tl.sum(weights, 0 if SWAPPED else 1)
        sums = sums * of_own(rescale, SWAPPED)
        weights = weights.to(values.dtype)
        sums = add_gathered(sums, weights, values, SWAPPED, WIDEN, PRECISION)
        largest = new_largest

    rows = as_rows(sums, SWAPPED)
    if size <= ITEM_BLOCKS:
        _store_results(
            OUTPUT, LSE, head, tokens, rows, denominator, largest, real, length, D, D_PAD
        )
    else:
        slot = (head * max_items + item) * M + tl.arange(0, M)
        tl.store(PART_SUMS + slot[:, None] * D_PAD + channels[None, :], rows)
        tl.store(PART_STATES + 2 * slot, largest)
        tl.store(PART_STATES + 2 * slot + 1, denominator)


@triton.jit
def merge_kernel(
    MASK,
    SIZES,
    FIRST_ITEMS,
    OUTPUT,
    LSE,
    PART_SUMS,
    PART_STATES,
    length,
    n_blocks,
    heads,
    max_items,
    HAS_MASK: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr,
):
    """One program per query block: merge its items, in their order, where it has several."""
    head = (tl.program_id(0) // n_blocks).to(tl.int64)
    row = tl.program_id(0) % n_blocks
    size = tl.load(SIZES + head * n_blocks + row)
    if size <= ITEM_BLOCKS:
        return
    tokens = row * M + tl.arange(0, M)
    real = is_real(MASK, head // heads, tokens, length, tokens >= 0, HAS_MASK)
    first = head * max_items + tl.load(FIRST_ITEMS + head * n_blocks + row)
    largest = tl.full([M], LOWEST, tl.float32)
    denominator = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D_PAD], tl.float32)
    channels = tl.arange(0, D_PAD)
    for part in range(0, tl.cdiv(size, ITEM_BLOCKS)):
        slot = (first + part) * M + tl.arange(0, M)
        part_largest = tl.load(PART_STATES + 2 * slot)
        new_largest = tl.maximum(largest, part_largest)
        rescale = tl.exp2(largest - new_largest)
        weight = tl.exp2(part_largest - new_largest)
        denominator = denominator * rescale + weight * tl.load(PART_STATES + 2 * slot + 1)
        part_sums = tl.load(PART_SUMS + slot[:, None] * D_PAD + channels[None, :])
        sums = sums * rescale[:, None] + weight[:, None] * part_sums
        largest = new_largest
    _store_results(OUTPUT, LSE, head, tokens, sums, denominator, largest, real, length, D, D_PAD)
