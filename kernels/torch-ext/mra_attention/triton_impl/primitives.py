"""What the kernels share: tiles, products, and which tokens are real.

A tile holds the logits of the M tokens of its owner (one block or two adjacent ones) against T
gathered tokens. In the plain form it is `[M, T]` and the owner's accumulators are `[M, D]`. In the
swapped form they are `[T, M]` and `[D, M]`, so that every product has the 64 rows or more that the
tensor cores of sm_90 need. A block has `PER_BLOCK` key blocks.

`WIDEN` turns operands into float32 first, because Triton's interpreter multiplies the bit patterns
of bfloat16. Head dims are padded to `D_PAD`, a power of 2.
"""

import triton
import triton.language as tl

#: Parameters that follow from the inputs' shapes and the budget. If Triton specialized on them, it
#: would compile further machine code for multiples of 16, which few numbers of blocks are.
SIZES = (
    "length",
    "n_blocks",
    "heads",
    "all_heads",
    "capacity",
    "max_items",
    "query_items",
    "key_items",
    "first_blocks",
    "block_per_row",
    "block_budget",
    "half_diagonal",
    "level",
    "levels",
    "shift",
)

#: Below every logit that can occur; finite, so that differences of two of them are 0, not NaN.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(sums, a, b, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def tile_product(
    own, gathered, SWAPPED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr
):
    """Products of own `[M, D]` with gathered `[T, D]` tokens, as a tile."""
    if SWAPPED:
        return product(gathered, tl.trans(own), WIDEN, PRECISION)
    else:
        return product(own, tl.trans(gathered), WIDEN, PRECISION)


@triton.jit
def add_gathered(
    sums,
    weights,
    gathered,
    SWAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add gathered tokens `[T, D]`, weighted by a tile, to the accumulator of own tokens."""
    if SWAPPED:
        return add_product(sums, tl.trans(gathered), weights, WIDEN, PRECISION)
    else:
        return add_product(sums, weights, gathered, WIDEN, PRECISION)


@triton.jit
def of_own(x, SWAPPED: tl.constexpr):
    """One number per own token `[M]`, to be combined with a tile or with an accumulator."""
    if SWAPPED:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def of_gathered(x, SWAPPED: tl.constexpr):
    """One number per gathered token `[T]`, or per channel `[D]` of an accumulator."""
    if SWAPPED:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def empty_sums(M: tl.constexpr, D_PAD: tl.constexpr, SWAPPED: tl.constexpr):
    if SWAPPED:
        return tl.zeros([D_PAD, M], tl.float32)
    else:
        return tl.zeros([M, D_PAD], tl.float32)


@triton.jit
def as_rows(sums, SWAPPED: tl.constexpr):
    """An accumulator as `[M, D]`."""
    if SWAPPED:
        return tl.trans(sums)
    else:
        return sums


@triton.jit
def is_real(MASK, sample, tokens, length, allowed, HAS_MASK: tl.constexpr):
    """Which of the allowed tokens lie in the sequence and are not padding."""
    real = allowed & (tokens < length)
    if HAS_MASK:
        flags = tl.load(MASK + sample.to(tl.int64) * length + tokens, mask=real, other=0)
        real = real & (flags != 0)
    return real


@triton.jit
def load_tokens(
    X,
    start, tokens, token_stride, real,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Rows `[T, D_PAD]` of a tensor whose last dimension is dense; 0 where not real.

    `start` is the int64 offset of the (sample, head).
    """
    channels = tl.arange(0, D_PAD)
    at = X + start + tokens.to(tl.int64)[:, None] * token_stride + channels[None, :]
    if D == D_PAD:
        return tl.load(at, mask=real[:, None], other=0.0)
    else:
        return tl.load(at, mask=real[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def store_tokens(
    X,
    start, tokens, values, inside,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Store `[M, D_PAD]` to a contiguous `[..., N, D]` tensor."""
    channels = tl.arange(0, D_PAD)
    at = X + start + tokens.to(tl.int64)[:, None] * D + channels[None, :]
    kept = inside[:, None] & (channels < D)[None, :]
    tl.store(at, values.to(X.dtype.element_ty), mask=kept)


@triton.jit
def load_summaries(X, head, blocks, n_blocks, D_PAD: tl.constexpr):
    """Rows `[T, D_PAD]` of block sums or means `[G, R, D_PAD]`; 0 beyond the last block."""
    rows = head.to(tl.int64) * n_blocks + blocks
    at = X + rows[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    return tl.load(at, mask=(blocks < n_blocks)[:, None], other=0.0)


@triton.jit
def block_sizes(counts, blocks, n_blocks, PER_BLOCK: tl.constexpr):
    """Real tokens of blocks, from the `counts` of the key blocks of a sample; 0 beyond the last."""
    sizes = tl.load(counts + blocks * PER_BLOCK, mask=blocks < n_blocks, other=0)
    for part in tl.static_range(1, PER_BLOCK):
        sizes += tl.load(counts + blocks * PER_BLOCK + part, mask=blocks < n_blocks, other=0)
    return sizes


@triton.jit
def load_own_summaries(
    X, head, own, n_blocks, OWN_BLOCKS: tl.constexpr, M: tl.constexpr, D_PAD: tl.constexpr
):
    """The summary of its block of M tokens for every token of owner `own`, which consists of
    `OWN_BLOCKS` of the `n_blocks`: `[OWN_BLOCKS * M, D_PAD]`, or `[1, D_PAD]` for one block.
    """
    if OWN_BLOCKS == 1:
        at = X + (head.to(tl.int64) * n_blocks + own) * D_PAD + tl.arange(0, D_PAD)
        return tl.load(at)[None, :]
    else:
        blocks = own * OWN_BLOCKS + tl.arange(0, OWN_BLOCKS * M) // M
        return load_summaries(X, head, blocks, n_blocks, D_PAD)


@triton.jit
def first_biased(BIASED_FROM, sample, HAS_BIAS: tl.constexpr):
    """The first block whose pairs with later blocks take a bias."""
    if HAS_BIAS:
        return tl.load(BIASED_FROM + sample)
    else:
        return 0


@triton.jit
def load_bias(BIAS, biased_from, of_sample, rows, columns, n_blocks):
    """The bias of pairs of blocks, whose shapes broadcast; 0 for global pairs and beyond the last
    block.
    """
    biased = (tl.minimum(rows, columns) >= biased_from) & (tl.maximum(rows, columns) < n_blocks)
    at = BIAS + of_sample * n_blocks + tl.abs(rows - columns)
    return tl.load(at, mask=biased, other=0.0)


@triton.jit
def add_bias(
    logits, BIAS, biased_from, of_sample, own, gathered, n_blocks,
    OWN_BLOCKS: tl.constexpr, M: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Add the bias to a tile of logits to base 2; `gathered` are the blocks, not the key blocks, of
    gathered tokens.
    """
    bias = load_bias(BIAS, biased_from, of_sample, own * OWN_BLOCKS, gathered, n_blocks) * LOG2_E
    bias = of_gathered(bias, SWAPPED)
    if OWN_BLOCKS == 2:
        second = load_bias(BIAS, biased_from, of_sample, own * 2 + 1, gathered, n_blocks) * LOG2_E
        is_second = of_own(tl.arange(0, 2 * M) >= M, SWAPPED)
        bias = tl.where(is_second, of_gathered(second, SWAPPED), bias)
    return logits + bias


@triton.jit
def coarse_logits(
    query, keys, factor, BIAS, biased_from, of_sample, rows, columns, n_blocks,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[blocks, key blocks]` to base 2 from means in float32, always by the same
    instructions: passes that compute them anew must see the same bits.
    """
    products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if HAS_BIAS:
        rows, columns = rows[:, None], columns[None, :] // PER_BLOCK
        bias = load_bias(BIAS, biased_from, of_sample, rows, columns, n_blocks)
        return tl.fma(products, factor, bias * LOG2_E)
    else:
        return products * factor
