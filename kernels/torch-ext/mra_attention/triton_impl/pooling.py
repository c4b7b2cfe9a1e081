"""Block sums and means in one pass over query, key and value."""

import torch
import triton
import triton.language as tl

from ..implementations import Summaries
from . import launching
from .call import KernelCall, summary_shapes
from .primitives import SIZES, is_real, load_tokens


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    QUERY, KEY, VALUE, MASK, QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head,
    value_token, length, n_blocks, heads,
    HAS_MASK: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One program per block: means `[G, R, D_PAD]`, sums, and real tokens `[B, R]`, in float32."""
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

    start = sample * query_batch + of_sample * query_head
    rows = load_tokens(QUERY, start, tokens, query_token, real, D, D_PAD).to(tl.float32)
    tl.store(QUERY_MEANS + to, tl.sum(rows, 0) / size)
    start = sample * key_batch + of_sample * key_head
    rows = load_tokens(KEY, start, tokens, key_token, real, D, D_PAD).to(tl.float32)
    tl.store(KEY_MEANS + to, tl.sum(rows, 0) / size)
    start = sample * value_batch + of_sample * value_head
    rows = load_tokens(VALUE, start, tokens, value_token, real, D, D_PAD).to(tl.float32)
    tl.store(VALUE_SUMS + to, tl.sum(rows, 0))
    tl.store(COUNTS + sample * n_blocks + block, count, mask=of_sample == 0)


def pool(call: KernelCall) -> Summaries:
    """Means of query and key and sums of value, over the real tokens of every block."""
    vectors_shape, counts_shape = summary_shapes(call.shape)
    summaries = Summaries(call.empty(vectors_shape), call.empty(counts_shape, torch.int32))
    query_means, key_means, value_sums = summaries.vectors
    launching.launch(
        pool_kernel,
        call.all_heads * call.n_blocks,
        **call.inputs,
        **call.tokens,
        QUERY_MEANS=query_means,
        KEY_MEANS=key_means,
        VALUE_SUMS=value_sums,
        COUNTS=summaries.counts,
    )
    return summaries
