"""Block sums and means in one pass over query, key and value."""

import torch
import triton
import triton.language as tl

from ..implementations import Summaries
from . import launching
from .call import KernelCall, summary_shapes
from .primitives import SIZES, is_real, load_tokens


@triton.jit
def _key_block_sums(rows, PER_BLOCK: tl.constexpr, M: tl.constexpr, D_PAD: tl.constexpr):
    """Sums of the rows `[M, D_PAD]` of a block over its key blocks: `[PER_BLOCK, D_PAD]`, or
    `[D_PAD]` where the block is one.
    """
    if PER_BLOCK == 1:
        return tl.sum(rows, 0)
    else:
        return tl.sum(tl.reshape(rows, [PER_BLOCK, M // PER_BLOCK, D_PAD]), 1)


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    QUERY, KEY, VALUE, MASK, QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head,
    value_token, length, n_blocks, heads,
    HAS_MASK: tl.constexpr, PER_BLOCK: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """One program per block: means of queries `[G, R, D_PAD]`, means of keys and sums of values
    `[G, C, D_PAD]`, in float32, and real tokens of key blocks `[B, C]`.
    """
    program = tl.program_id(0)
    head = (program // n_blocks).to(tl.int64)
    block = program % n_blocks
    sample, of_sample = head // heads, head % heads
    tokens = block * M + tl.arange(0, M)
    real = is_real(MASK, sample, tokens, length, tokens >= 0, HAS_MASK)
    count = tl.sum(real.to(tl.int32), 0)
    size = tl.maximum(count, 1).to(tl.float32)
    channels = tl.arange(0, D_PAD)
    to = (head * n_blocks + block) * D_PAD + channels
    key_counts, key_size, to_key, key_blocks = count, size, to, block
    if PER_BLOCK > 1:
        key_blocks = block * PER_BLOCK + tl.arange(0, PER_BLOCK)
        key_counts = tl.sum(tl.reshape(real.to(tl.int32), [PER_BLOCK, M // PER_BLOCK]), 1)
        key_size = tl.maximum(key_counts, 1).to(tl.float32)[:, None]
        to_key = (head * n_blocks * PER_BLOCK + key_blocks)[:, None] * D_PAD + channels[None, :]

    start = sample * query_batch + of_sample * query_head
    rows = load_tokens(QUERY, start, tokens, query_token, real, D, D_PAD).to(tl.float32)
    tl.store(QUERY_MEANS + to, tl.sum(rows, 0) / size)
    start = sample * key_batch + of_sample * key_head
    rows = load_tokens(KEY, start, tokens, key_token, real, D, D_PAD).to(tl.float32)
    tl.store(KEY_MEANS + to_key, _key_block_sums(rows, PER_BLOCK, M, D_PAD) / key_size)
    start = sample * value_batch + of_sample * value_head
    rows = load_tokens(VALUE, start, tokens, value_token, real, D, D_PAD).to(tl.float32)
    tl.store(VALUE_SUMS + to_key, _key_block_sums(rows, PER_BLOCK, M, D_PAD))
    is_first = of_sample + 0 * key_blocks == 0  # in the shape of the counts
    tl.store(COUNTS + sample * n_blocks * PER_BLOCK + key_blocks, key_counts, mask=is_first)


def pool(call: KernelCall) -> Summaries:
    """Means of query and key and sums of value, over the real tokens of each of their blocks."""
    vectors_shape, counts_shape = summary_shapes(call.shape, call.key_block_size)
    summaries = Summaries(call.empty(vectors_shape), call.empty(counts_shape, torch.int32))
    launching.launch(
        pool_kernel,
        call.all_heads * call.n_blocks,
        **call.inputs,
        **call.tokens,
        **call.as_operands(summaries),
        PER_BLOCK=call.per_block,
    )
    return summaries
