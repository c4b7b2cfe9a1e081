"""Row reductions and the exact part of the backward pass.

With L the merged log-sum-exp, delta the row sums of dO * O and W_x the smallest L of query block x,

    w_i = exp(W_x - L_i)    G_x = sum_i w_i dO_i    g_x = sum_i w_i delta_i

are for the coarse part (`coarse.py`), whose logits in row x are at most W_x. Query gradients go
over lists of key blocks, key and value gradients over lists of query blocks. There are no atomics,
so two runs give the same bits. Logits are to base 2 inside the kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .block_lists import OwnerLists, listed_blocks, visible_pairs
from .call import KernelCall
from .coarse import CoarseGradients, RowSums
from .distance_bias import PairBias
from .primitives import (
    LOG2_E,
    SIZES,
    add_bias,
    add_gathered,
    as_rows,
    empty_sums,
    first_biased,
    is_real,
    load_bias,
    load_own_summaries,
    load_tokens,
    of_gathered,
    of_own,
    store_tokens,
    tile_product,
)


@triton.jit(do_not_specialize=SIZES)
def reduce_rows_kernel(
    GRAD, OUTPUT, LSE, MASK, DELTA, SMALLEST, GRAD_SUMS, DELTA_SUMS,
    length, n_blocks, heads,
    HAS_MASK: tl.constexpr, HAS_COARSE: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """delta `[G, N]`; W and g `[G, R]`, G `[G, R, D_PAD]` of a query block."""
    head = (tl.program_id(0) // n_blocks).to(tl.int64)
    row = tl.program_id(0) % n_blocks
    tokens = row * M + tl.arange(0, M)
    real = is_real(MASK, head // heads, tokens, length, tokens >= 0, HAS_MASK)
    start = head * length * D
    grad = load_tokens(GRAD, start, tokens, D, real, D, D_PAD).to(tl.float32)
    output = load_tokens(OUTPUT, start, tokens, D, real, D, D_PAD).to(tl.float32)
    delta = tl.sum(grad * output, 1)
    tl.store(DELTA + head * length + tokens, delta, mask=tokens < length)
    if HAS_COARSE:
        lse = tl.load(LSE + head * length + tokens, mask=real, other=float("inf")) * LOG2_E
        attends = lse != float("inf")  # true for a NaN, which has to reach the gradients
        smallest = tl.min(lse, 0)
        smallest = tl.where(smallest < float("inf"), smallest, 0.0)
        weights = tl.where(attends, tl.exp2(smallest - lse), 0.0)
        line = head * n_blocks + row
        tl.store(SMALLEST + line, smallest)
        tl.store(DELTA_SUMS + line, tl.sum(weights * delta, 0))
        sums = tl.sum(weights[:, None] * grad, 0)
        tl.store(GRAD_SUMS + line * D_PAD + tl.arange(0, D_PAD), sums)


class Upstream(NamedTuple):
    """The gradient of the output `[B, H, N, D]`, log-sum-exp and delta `[B, H, N]`."""

    grad: Tensor
    lse: Tensor
    delta: Tensor

    def of_pairs(self, call: KernelCall) -> dict:
        """Arguments of kernels that go through selected pairs."""
        return {
            "GRAD": self.grad,
            "LSE": self.lse,
            "DELTA": self.delta,
            "scale": call.scale,
            "scale_log2": call.scale_log2,
            "HAS_COARSE": call.has_coarse,
        }


def reduce_rows(
    call: KernelCall, grad_output: Tensor, output: Tensor, lse: Tensor
) -> tuple[Upstream, RowSums]:
    """The gradient with delta, and sums over query blocks; unwritten if there is no coarse part."""
    rows = (call.all_heads, call.n_blocks)
    upstream = Upstream(grad_output.contiguous(), lse.contiguous(), call.empty(call.shape[:3]))
    smallest, grad_sums = call.empty((2, *rows))
    row_sums = RowSums(smallest, grad_sums, call.empty((*rows, call.padded_dim)))
    launching.launch(
        reduce_rows_kernel,
        call.all_heads * call.n_blocks,
        **call.tokens,
        GRAD=upstream.grad,
        OUTPUT=output.contiguous(),
        LSE=upstream.lse,
        DELTA=upstream.delta,
        SMALLEST=row_sums.smallest,
        GRAD_SUMS=row_sums.grad_sums,
        DELTA_SUMS=row_sums.delta_sums,
        HAS_COARSE=call.has_coarse,
    )
    return upstream, row_sums


@triton.jit
def _store_gradient(
    RESULT, COARSE,
    head, own, sums, real, length, n_parts,
    HAS_COARSE: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """Add what the coarse part gives every token of a part of an owner, and store; 0 at padding. A
    part has `SIZE` tokens, and a head `n_parts` of them.
    """
    if HAS_COARSE:
        sums += load_own_summaries(COARSE, head, own, n_parts, PARTS, SIZE, D_PAD)
    sums = tl.where(real[:, None], sums, 0.0)
    tokens = own * PARTS * SIZE + tl.arange(0, PARTS * SIZE)
    store_tokens(RESULT, head * length * D, tokens, sums, tokens < length, D, D_PAD)


@triton.jit
def _store_pair_sums(
    PAIR_SUMS, PAIR_DISTANCES,
    columns, list_start, first, end, own, biased_from, grad_logits,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """Sums of a tile over the token pairs of each of its block pairs, and their distances; -1 for
    global pairs.
    """
    ENTRIES: tl.constexpr = GROUP * PER_BLOCK
    slots = first + tl.arange(0, ENTRIES)
    listed = slots < end
    entries = tl.load(columns + slots, mask=listed, other=0)
    squares = listed_blocks(entries, QUERY_BLOCKS) // PER_BLOCK
    for i in tl.static_range(QUERY_BLOCKS):
        of_block = grad_logits
        if QUERY_BLOCKS == 2:
            of_block = tl.where(of_own(tl.arange(0, 2 * M) // M == i, SWAPPED), grad_logits, 0.0)
        sums = tl.sum(of_block, 1 if SWAPPED else 0)
        sums = tl.sum(tl.reshape(sums, [ENTRIES, M // PER_BLOCK]), 1)
        row = own * QUERY_BLOCKS + i
        distances = tl.where(tl.minimum(squares, row) >= biased_from, tl.abs(squares - row), -1)
        to = (list_start + slots) * QUERY_BLOCKS + i
        tl.store(PAIR_SUMS + to, sums, mask=listed)
        tl.store(PAIR_DISTANCES + to, distances, mask=listed)


class PairGradients(NamedTuple):
    """Of every listed pair, the sum of the gradients of its logits, float32, and its distance,
    int32; -1 for global pairs. Both `[G, capacity, query blocks of an owner]`, in the order of the
    lists of query blocks; a query block that did not select what its neighbour did has 0.
    """

    sums: Tensor
    distances: Tensor


@triton.jit(do_not_specialize=SIZES)
def exact_query_kernel(
    QUERY, KEY, VALUE, MASK, GRAD, LSE, DELTA, SIZES, STARTS, LISTS, FIRST_ITEMS, ITEMS,
    ITEM_COUNTS, BIAS, BIASED_FROM, COARSE_QUERY, GRAD_QUERY, PAIR_SUMS, PAIR_DISTANCES, PART_SUMS,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head,
    value_token, scale, scale_log2, length, n_blocks, heads, capacity, max_items,
    HAS_MASK: tl.constexpr, HAS_COARSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, ITEM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, SWAPPED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per work item of a bundle of query blocks: its query gradients, and with a bias,
    the sums of the gradients of the logits of every pair.
    """
    OWN: tl.constexpr = QUERY_BLOCKS * M
    KEYS: tl.constexpr = M // PER_BLOCK
    head = (tl.program_id(0) // max_items).to(tl.int64)
    item = tl.program_id(0) % max_items
    if item >= tl.load(ITEM_COUNTS + head):
        return
    own = tl.load(ITEMS + head * max_items + item)
    line = head * n_blocks + own
    size = tl.load(SIZES + line)
    begin = (item - tl.load(FIRST_ITEMS + line)) * ITEM_BLOCKS
    end = tl.minimum(begin + ITEM_BLOCKS, size)
    list_start = head * capacity + tl.load(STARTS + line)
    columns = LISTS + list_start

    sample, of_sample = head // heads, head % heads
    tokens = own * OWN + tl.arange(0, OWN)
    real = is_real(MASK, sample, tokens, length, tokens >= 0, HAS_MASK)
    start = sample * query_batch + of_sample * query_head
    query = load_tokens(QUERY, start, tokens, query_token, real, D, D_PAD)
    grad = load_tokens(GRAD, head * length * D, tokens, D, real, D, D_PAD)
    lse = tl.load(LSE + head * length + tokens, mask=real, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + head * length + tokens, mask=real, other=0.0)
    key_start = sample * key_batch + of_sample * key_head
    value_start = sample * value_batch + of_sample * value_head
    biased_from = first_biased(BIASED_FROM, sample, HAS_BIAS)

    sums = empty_sums(OWN, D_PAD, SWAPPED)
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
        weights = tl.exp2(logits - of_own(lse, SWAPPED))
        visible = visible_pairs(entries, seen, QUERY_BLOCKS, M, SWAPPED)
        weights = tl.where(visible, weights, 0.0)
        products = tile_product(grad, values, SWAPPED, WIDEN, PRECISION)
        grad_logits = weights * (products - of_own(delta, SWAPPED))
        if HAS_BIAS:
            _store_pair_sums(
                PAIR_SUMS, PAIR_DISTANCES, columns, list_start, first, end, own, biased_from,
                grad_logits, QUERY_BLOCKS, PER_BLOCK, GROUP, M, SWAPPED,
            )  # fmt: skip
        grad_logits = grad_logits.to(keys.dtype)
        sums = add_gathered(sums, grad_logits, keys, SWAPPED, WIDEN, PRECISION)

    rows = as_rows(sums, SWAPPED) * scale
    if size <= ITEM_BLOCKS:
        _store_gradient(
            GRAD_QUERY,
            COARSE_QUERY,
            head,
            own,
            rows,
            real,
            length,
            n_blocks,
            HAS_COARSE,
            QUERY_BLOCKS,
            M,
            D,
            D_PAD,
        )
    else:
        slot = (head * max_items + item) * OWN + tl.arange(0, OWN)
        tl.store(PART_SUMS + slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :], rows)


def query_gradient(
    call: KernelCall,
    lists: OwnerLists,
    bias: PairBias,
    upstream: Upstream,
    coarse: CoarseGradients,
) -> tuple[Tensor, PairGradients]:
    """The gradient of the query, `[B, H, N, D]`, and of the logits of listed pairs, unwritten if
    there is no bias.
    """
    grad_query = call.empty(call.shape, call.dtype)
    of_pairs = (call.all_heads, lists.capacity if bias.is_given else 0, lists.own_blocks)
    pairs = PairGradients(call.empty(of_pairs), call.empty(of_pairs, torch.int32))
    parts = lists.empty_parts(call, call.padded_dim)
    launching.launch(
        exact_query_kernel,
        call.all_heads * lists.max_items,
        **lists.of_items(call, "query_gradient", bias),
        **upstream.of_pairs(call),
        COARSE_QUERY=coarse.query,
        GRAD_QUERY=grad_query,
        PAIR_SUMS=pairs.sums,
        PAIR_DISTANCES=pairs.distances,
        PART_SUMS=parts,
        QUERY_BLOCKS=lists.own_blocks,
    )
    if lists.may_split:
        _merge(call, lists, grad_query, parts, coarse.query)
    return grad_query, pairs


@triton.jit(do_not_specialize=SIZES)
def exact_key_kernel(
    QUERY, KEY, VALUE, MASK, GRAD, LSE, DELTA, SIZES, STARTS, LISTS, FIRST_ITEMS, ITEMS,
    ITEM_COUNTS, BIAS, BIASED_FROM, COARSE_KEY, COARSE_VALUE, GRAD_KEY, GRAD_VALUE, PART_KEYS,
    PART_VALUES,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head,
    value_token, scale, scale_log2, length, n_blocks, heads, capacity, max_items,
    HAS_MASK: tl.constexpr, HAS_COARSE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PER_BLOCK: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, SWAPPED: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per work item of a square block of keys: its key and value gradients. Queries
    that only some of its key blocks are paired with are multiplied with all of it, and hidden.
    """
    head = (tl.program_id(0) // max_items).to(tl.int64)
    item = tl.program_id(0) % max_items
    if item >= tl.load(ITEM_COUNTS + head):
        return
    column = tl.load(ITEMS + head * max_items + item)
    line = head * n_blocks + column
    size = tl.load(SIZES + line)
    begin = (item - tl.load(FIRST_ITEMS + line)) * ITEM_BLOCKS
    end = tl.minimum(begin + ITEM_BLOCKS, size)
    rows = LISTS + head * capacity + tl.load(STARTS + line)

    sample, of_sample = head // heads, head % heads
    tokens = column * M + tl.arange(0, M)
    real = is_real(MASK, sample, tokens, length, tokens >= 0, HAS_MASK)
    start = sample * key_batch + of_sample * key_head
    keys = load_tokens(KEY, start, tokens, key_token, real, D, D_PAD)
    start = sample * value_batch + of_sample * value_head
    values = load_tokens(VALUE, start, tokens, value_token, real, D, D_PAD)
    query_start = sample * query_batch + of_sample * query_head
    biased_from = first_biased(BIASED_FROM, sample, HAS_BIAS)

    key_sums = empty_sums(M, D_PAD, SWAPPED)
    value_sums = empty_sums(M, D_PAD, SWAPPED)
    slots = tl.arange(0, GROUP * M) // M
    within = tl.arange(0, GROUP * M) % M
    for first in range(begin, end, GROUP):
        listed = first + slots < end
        entries = tl.load(rows + first + slots, mask=listed, other=0)
        blocks = listed_blocks(entries, PER_BLOCK)
        gathered = blocks * M + within
        seen = is_real(MASK, sample, gathered, length, listed, HAS_MASK)
        query = load_tokens(QUERY, query_start, gathered, query_token, seen, D, D_PAD)
        grad = load_tokens(GRAD, head * length * D, gathered, D, seen, D, D_PAD)
        at = head * length + gathered
        lse = tl.load(LSE + at, mask=seen, other=float("inf")) * LOG2_E
        if HAS_BIAS:  # here it takes fewer registers than on the logits
            lse -= load_bias(BIAS, biased_from, of_sample, blocks, column, n_blocks) * LOG2_E
        delta = tl.load(DELTA + at, mask=seen, other=0.0)
        logits = tile_product(keys, query, SWAPPED, WIDEN, PRECISION) * scale_log2
        weights = tl.exp2(logits - of_gathered(lse, SWAPPED))
        if PER_BLOCK > 1:
            visible = visible_pairs(entries, seen, PER_BLOCK, M // PER_BLOCK, SWAPPED)
            weights = tl.where(visible, weights, 0.0)
        products = tile_product(values, grad, SWAPPED, WIDEN, PRECISION)
        grad_logits = (weights * (products - of_gathered(delta, SWAPPED))).to(query.dtype)
        weights = weights.to(grad.dtype)
        value_sums = add_gathered(value_sums, weights, grad, SWAPPED, WIDEN, PRECISION)
        key_sums = add_gathered(key_sums, grad_logits, query, SWAPPED, WIDEN, PRECISION)

    key_rows = as_rows(key_sums, SWAPPED) * scale
    value_rows = as_rows(value_sums, SWAPPED)
    if size <= ITEM_BLOCKS:
        _store_gradient(
            GRAD_KEY,
            COARSE_KEY,
            head,
            column,
            key_rows,
            real,
            length,
            n_blocks * PER_BLOCK,
            HAS_COARSE,
            PER_BLOCK,
            M // PER_BLOCK,
            D,
            D_PAD,
        )
        _store_gradient(
            GRAD_VALUE,
            COARSE_VALUE,
            head,
            column,
            value_rows,
            real,
            length,
            n_blocks * PER_BLOCK,
            HAS_COARSE,
            PER_BLOCK,
            M // PER_BLOCK,
            D,
            D_PAD,
        )
    else:
        slot = (head * max_items + item) * M + tl.arange(0, M)
        to = slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
        tl.store(PART_KEYS + to, key_rows)
        tl.store(PART_VALUES + to, value_rows)


def key_gradients(
    call: KernelCall,
    lists: OwnerLists,
    bias: PairBias,
    upstream: Upstream,
    coarse: CoarseGradients,
) -> tuple[Tensor, Tensor]:
    """The gradients of key and value, `[B, H, N, D]`."""
    grad_key, grad_value = (call.empty(call.shape, call.dtype) for _ in range(2))
    part_keys, part_values = (lists.empty_parts(call, call.padded_dim) for _ in range(2))
    launching.launch(
        exact_key_kernel,
        call.all_heads * lists.max_items,
        **lists.of_items(call, "key_gradient", bias),
        **upstream.of_pairs(call),
        COARSE_KEY=coarse.key,
        COARSE_VALUE=coarse.value,
        GRAD_KEY=grad_key,
        GRAD_VALUE=grad_value,
        PART_KEYS=part_keys,
        PART_VALUES=part_values,
    )
    if lists.may_split:
        _merge(call, lists, grad_key, part_keys, coarse.key)
        _merge(call, lists, grad_value, part_values, coarse.value)
    return grad_key, grad_value


@triton.jit(do_not_specialize=SIZES)
def merge_gradient_kernel(
    MASK, SIZES, FIRST_ITEMS, COARSE, RESULT, PART_SUMS,
    length, n_blocks, heads, max_items,
    HAS_MASK: tl.constexpr, HAS_COARSE: tl.constexpr, OWN_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ITEM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per owner of a list, a bundle of query blocks or a square block of keys: add its
    items, in their order, where it has several.
    """
    OWN: tl.constexpr = OWN_BLOCKS * M
    owners = tl.cdiv(n_blocks, OWN_BLOCKS)
    head = (tl.program_id(0) // owners).to(tl.int64)
    own = tl.program_id(0) % owners
    size = tl.load(SIZES + head * n_blocks + own)
    if size <= ITEM_BLOCKS:
        return
    tokens = own * OWN + tl.arange(0, OWN)
    real = is_real(MASK, head // heads, tokens, length, tokens >= 0, HAS_MASK)
    first = head * max_items + tl.load(FIRST_ITEMS + head * n_blocks + own)
    sums = tl.zeros([OWN, D_PAD], tl.float32)
    for part in range(0, tl.cdiv(size, ITEM_BLOCKS)):
        slot = (first + part) * OWN + tl.arange(0, OWN)
        sums += tl.load(PART_SUMS + slot[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :])
    _store_gradient(
        RESULT,
        COARSE,
        head,
        own,
        sums,
        real,
        length,
        n_blocks * (PARTS // OWN_BLOCKS),
        HAS_COARSE,
        PARTS,
        OWN // PARTS,
        D,
        D_PAD,
    )


def _merge(
    call: KernelCall, lists: OwnerLists, result: Tensor, parts: Tensor, coarse: Tensor
) -> None:
    """Write the gradients of owners with several items."""
    launching.launch(
        merge_gradient_kernel,
        call.all_heads * lists.owners,
        **lists.of_owners(call),
        COARSE=coarse,
        RESULT=result,
        PART_SUMS=parts,
        HAS_COARSE=call.has_coarse,
        OWN_BLOCKS=lists.own_blocks,
        PARTS=lists.parts,
        num_warps=8 if call.padded_dim == 128 else 4,  # which spills nothing
    )
