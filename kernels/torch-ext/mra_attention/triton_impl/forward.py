"""The exact part of the forward pass.

A work item goes over its selected key blocks with an online softmax. The first item of a bundle of
query blocks starts from the states that the coarse part gives them (`coarse.py`), further ones from
nothing, and bundles with several items are merged. Logits are to base 2 inside the kernels.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .block_lists import OwnerLists, listed_blocks, visible_pairs
from .call import KernelCall
from .coarse import CoarseState
from .distance_bias import PairBias
from .primitives import (
    LOWEST,
    SIZES,
    add_bias,
    add_gathered,
    as_rows,
    empty_sums,
    first_biased,
    is_real,
    load_own_summaries,
    load_tokens,
    of_own,
    store_tokens,
    tile_product,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _store_results(
    OUTPUT, LSE,
    head, tokens, sums, denominator, largest, real, length,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Output 0 and log-sum-exp +inf at padding and where nothing is attended to; NaN stays."""
    some = real & (denominator != 0.0)
    denominator = tl.where(some, denominator, 1.0)
    output = tl.where(some[:, None], sums / denominator[:, None], 0.0)
    lse = tl.where(some, (largest + tl.log2(denominator)) * LN_2, float("inf"))
    inside = tokens < length
    store_tokens(OUTPUT, head * length * D, tokens, output, inside, D, D_PAD)
    tl.store(LSE + head * length + tokens, lse, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def exact_kernel(
    QUERY, KEY, VALUE, MASK, SIZES, STARTS, LISTS, FIRST_ITEMS, ITEMS, ITEM_COUNTS, LARGEST,
    DENOMINATOR, NUMERATOR, BIAS, BIASED_FROM, OUTPUT, LSE, PART_SUMS, PART_STATES,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head,
    value_token, scale_log2, length, n_blocks, heads, capacity, max_items,
    HAS_MASK: tl.constexpr, HAS_COARSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, ITEM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, SWAPPED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per work item: the queries of a bundle against up to `ITEM_BLOCKS` gathered key
    blocks, as many at a time as hold the keys of `GROUP` blocks.
    """
    OWN: tl.constexpr = QUERY_BLOCKS * M
    KEYS: tl.constexpr = M // PER_BLOCK
    head = (tl.program_id(0) // max_items).to(tl.int64)
    item = tl.program_id(0) % max_items
    if item >= tl.load(ITEM_COUNTS + head):
        return
    own = tl.load(ITEMS + head * max_items + item)
    line = head * n_blocks + own
    part = item - tl.load(FIRST_ITEMS + line)
    size = tl.load(SIZES + line)
    begin = part * ITEM_BLOCKS
    end = tl.minimum(begin + ITEM_BLOCKS, size)
    columns = LISTS + head * capacity + tl.load(STARTS + line)

    sample, of_sample = head // heads, head % heads
    tokens = own * OWN + tl.arange(0, OWN)
    real = is_real(MASK, sample, tokens, length, tokens >= 0, HAS_MASK)
    start = sample * query_batch + of_sample * query_head
    query = load_tokens(QUERY, start, tokens, query_token, real, D, D_PAD)
    key_start = sample * key_batch + of_sample * key_head
    value_start = sample * value_batch + of_sample * value_head
    biased_from = first_biased(BIASED_FROM, sample, HAS_BIAS)

    largest = tl.full([OWN], LOWEST, tl.float32)
    denominator = tl.zeros([OWN], tl.float32)
    sums = empty_sums(OWN, D_PAD, SWAPPED)
    if HAS_COARSE:  # noqa: SIM102 (known when compiling; the other is not)
        if part == 0:
            rows = tokens // M
            at = head * n_blocks + rows
            largest = tl.load(LARGEST + at, mask=rows < n_blocks, other=LOWEST)
            denominator = tl.load(DENOMINATOR + at, mask=rows < n_blocks, other=0.0)
            numerator = load_own_summaries(NUMERATOR, head, own, n_blocks, QUERY_BLOCKS, M, D_PAD)
            sums += tl.trans(numerator) if SWAPPED else numerator

    slots = tl.arange(0, GROUP * M) // KEYS
    within = tl.arange(0, GROUP * M) % KEYS
    for first in range(begin, end, GROUP * PER_BLOCK):
        listed = first + slots < end
        entries = tl.load(columns + first + slots, mask=listed, other=0)
        blocks = listed_blocks(entries, QUERY_BLOCKS)
        gathered = blocks * KEYS + within
        seen = is_real(MASK, sample, gathered, length, listed, HAS_MASK)
        keys = load_tokens(KEY, key_start, gathered, key_token, seen, D, D_PAD)
        values = load_tokens(VALUE, value_start, gathered, value_token, seen, D, D_PAD)
        logits = tile_product(query, keys, SWAPPED, WIDEN, PRECISION) * scale_log2
        if HAS_BIAS:
            logits = add_bias(
                logits, BIAS, biased_from, of_sample, own, blocks // PER_BLOCK, n_blocks,
                QUERY_BLOCKS, M, SWAPPED,
            )  # fmt: skip
        visible = visible_pairs(entries, seen, QUERY_BLOCKS, M, SWAPPED)
        logits = tl.where(visible, logits, LOWEST)
        new_largest = tl.maximum(largest, tl.max(logits, 0 if SWAPPED else 1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.exp2(logits - of_own(new_largest, SWAPPED))
        weights = tl.where(visible, weights, 0.0)
        denominator = denominator * rescale + tl.sum(weights, 0 if SWAPPED else 1)
        sums = sums * of_own(rescale, SWAPPED)
        weights = weights.to(values.dtype)
        sums = add_gathered(sums, weights, values, SWAPPED, WIDEN, PRECISION)
        largest = new_largest

    sums = as_rows(sums, SWAPPED)
    if size <= ITEM_BLOCKS:
        _store_results(
            OUTPUT, LSE, head, tokens, sums, denominator, largest, real, length, D, D_PAD
        )
    else:
        slot = (head * max_items + item) * OWN + tl.arange(0, OWN)
        tl.store(PART_SUMS + slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :], sums)
        tl.store(PART_STATES + 2 * slot, largest)
        tl.store(PART_STATES + 2 * slot + 1, denominator)


class Parts(NamedTuple):
    """Results of the items of bundles that have several: weighted sums of values `[G, items, own
    tokens, D_PAD]`, and maximum and denominator of the softmax `[G, items, own tokens, 2]`.
    """

    sums: Tensor
    states: Tensor


def attend(
    call: KernelCall, lists: OwnerLists, state: CoarseState, bias: PairBias
) -> tuple[Tensor, Tensor]:
    """Go on from `state` over the listed key blocks: output `[B, H, N, D]` and log-sum-exp
    `[B, H, N]`.
    """
    output, lse = call.empty(call.shape, call.dtype), call.empty(call.shape[:3])
    parts = Parts(lists.empty_parts(call, call.padded_dim), lists.empty_parts(call, 2))
    launching.launch(
        exact_kernel,
        call.all_heads * lists.max_items,
        **lists.of_items(call, "forward", bias),
        LARGEST=state.largest,
        DENOMINATOR=state.denominator,
        NUMERATOR=state.numerator,
        OUTPUT=output,
        LSE=lse,
        PART_SUMS=parts.sums,
        PART_STATES=parts.states,
        scale_log2=call.scale_log2,
        HAS_COARSE=call.has_coarse,
        QUERY_BLOCKS=lists.own_blocks,
    )
    if lists.may_split:
        _merge(call, lists, output, lse, parts)
    return output, lse


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    MASK, SIZES, FIRST_ITEMS, OUTPUT, LSE, PART_SUMS, PART_STATES,
    length, n_blocks, heads, max_items,
    HAS_MASK: tl.constexpr, QUERY_BLOCKS: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, ITEM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per bundle: merge its items, in their order, where it has several."""
    OWN: tl.constexpr = QUERY_BLOCKS * M
    bundles = tl.cdiv(n_blocks, QUERY_BLOCKS)
    head = (tl.program_id(0) // bundles).to(tl.int64)
    own = tl.program_id(0) % bundles
    size = tl.load(SIZES + head * n_blocks + own)
    if size <= ITEM_BLOCKS:
        return
    tokens = own * OWN + tl.arange(0, OWN)
    real = is_real(MASK, head // heads, tokens, length, tokens >= 0, HAS_MASK)
    first = head * max_items + tl.load(FIRST_ITEMS + head * n_blocks + own)
    largest = tl.full([OWN], LOWEST, tl.float32)
    denominator = tl.zeros([OWN], tl.float32)
    sums = tl.zeros([OWN, D_PAD], tl.float32)
    channels = tl.arange(0, D_PAD)
    for part in range(0, tl.cdiv(size, ITEM_BLOCKS)):
        slot = (first + part) * OWN + tl.arange(0, OWN)
        part_largest = tl.load(PART_STATES + 2 * slot)
        new_largest = tl.maximum(largest, part_largest)
        rescale = tl.exp2(largest - new_largest)
        weight = tl.exp2(part_largest - new_largest)
        denominator = denominator * rescale + weight * tl.load(PART_STATES + 2 * slot + 1)
        part_sums = tl.load(PART_SUMS + slot[:, None] * D_PAD + channels[None, :])
        sums = sums * rescale[:, None] + weight[:, None] * part_sums
        largest = new_largest
    _store_results(OUTPUT, LSE, head, tokens, sums, denominator, largest, real, length, D, D_PAD)


def _merge(call: KernelCall, lists: OwnerLists, output: Tensor, lse: Tensor, parts: Parts) -> None:
    """Write the results of bundles with several items."""
    launching.launch(
        merge_kernel,
        call.all_heads * lists.owners,
        **lists.of_owners(call),
        OUTPUT=output,
        LSE=lse,
        PART_SUMS=parts.sums,
        PART_STATES=parts.states,
        QUERY_BLOCKS=lists.own_blocks,
    )
