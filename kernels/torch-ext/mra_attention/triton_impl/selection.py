"""Selection: coarse scores, and the best pairs of every head by radix select.

The order is that of `choose_blocks`: prior pairs, then the score, then the tie rank, as one integer
key per pair. No two keys are equal, so the budget-th largest key separates the pairs to select from
the others. It is found digit by digit from histograms (integer atomics only, so two runs agree).
Three digits mostly suffice; the launches for further ones, which exact ties need, leave at once.
Scores are stored, or computed again by every pass where the matrix would be large.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..implementations import Summaries
from ..selection import choose_blocks
from . import launching
from .call import KernelCall
from .distance_bias import PairBias
from .primitives import LOWEST, SIZES, block_sizes, first_biased, load_bias, load_summaries

DIGIT_BITS = 11
_BITS = tl.constexpr(DIGIT_BITS)
_DIGITS = tl.constexpr(2**DIGIT_BITS)
#: Block rows that a program ranks.
_STRIP_ROWS = 16


@triton.jit(do_not_specialize=SIZES)
def flag_kernel(
    COUNTS, FLAGS, BUDGETS,
    n_blocks, first_blocks, block_per_row, block_budget,
    PER_BLOCK: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """One program per sample: 1 for live key blocks, 2 more in the first live blocks; pairs to
    choose.
    """
    sample = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, R_PAD)
    inside = blocks < n_blocks
    counts = COUNTS + sample * n_blocks * PER_BLOCK
    live = (block_sizes(counts, blocks, n_blocks, PER_BLOCK) > 0).to(tl.int32)
    first = (live == 1) & (tl.cumsum(live, 0) <= first_blocks)
    columns = tl.zeros([], tl.int64)
    for part in tl.static_range(PER_BLOCK):
        key_blocks = blocks * PER_BLOCK + part
        live_keys = (tl.load(counts + key_blocks, mask=inside, other=0) > 0).to(tl.int32)
        flags = live_keys * (1 + 2 * first.to(tl.int32))
        tl.store(FLAGS + sample * n_blocks * PER_BLOCK + key_blocks, flags, mask=inside)
        columns += tl.sum(live_keys, 0)
    rows = tl.sum(live, 0).to(tl.int64)
    budget = rows * block_per_row
    if block_budget >= 0:
        budget = rows * 0 + block_budget
    tl.store(BUDGETS + sample, tl.minimum(budget * PER_BLOCK, rows * columns))


class Candidates(NamedTuple):
    """The blocks whose pairs may be selected, and how many pairs are.

    Attributes:
        flags: `[B, C]` int32: 0 for a key block without a real token, 1 for a live one, 3 for one
            in the first live blocks, which a prior selects.
        budgets: `[B]` int64, pairs to select per head.
        largest_budget: bound of the budgets.
        first_n_blocks, diagonal_n_blocks: the priors.
    """

    flags: Tensor
    budgets: Tensor
    largest_budget: int
    first_n_blocks: int
    diagonal_n_blocks: int


def flag_blocks(
    call: KernelCall,
    counts: Tensor,
    *,
    block_per_row: int,
    block_budget: int | None,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
) -> Candidates:
    """The candidates, from the real tokens of the key blocks, `[B, C]` int32."""
    rows = call.n_blocks
    budget = rows * block_per_row if block_budget is None else block_budget
    candidates = Candidates(
        flags=call.empty((call.batch, call.n_key_blocks), torch.int32),
        budgets=call.empty((call.batch,), torch.int64),
        largest_budget=call.per_block * min(budget, rows**2),
        first_n_blocks=initial_prior_first_n_blocks,
        diagonal_n_blocks=initial_prior_diagonal_n_blocks,
    )
    launching.launch(
        flag_kernel,
        call.batch,
        COUNTS=counts,
        FLAGS=candidates.flags,
        BUDGETS=candidates.budgets,
        n_blocks=rows,
        first_blocks=initial_prior_first_n_blocks,
        # More than R squares per row, or R * R per head, select everything.
        block_per_row=min(block_per_row, rows),
        block_budget=-1 if block_budget is None else min(block_budget, rows**2),
        PER_BLOCK=call.per_block,
        R_PAD=launching.next_power_of_2(rows),
    )
    return candidates


@triton.jit
def _row_flags(flags, rows, n_blocks, PER_BLOCK: tl.constexpr):
    """Flags of blocks from those of the key blocks of a sample: any live one makes a block live."""
    row_flags = tl.load(flags + rows * PER_BLOCK, mask=rows < n_blocks, other=0)
    for part in tl.static_range(1, PER_BLOCK):
        row_flags |= tl.load(flags + rows * PER_BLOCK + part, mask=rows < n_blocks, other=0)
    return row_flags


@triton.jit
def _logits(
    query, KEY_MEANS, BIAS, biased_from, scale, head, of_sample, rows, columns, n_blocks,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of means `[rows, columns]`; with a bias, scaled and biased. Always by the same
    instructions, so that passes that compute them anew see the same bits.

    Without a bias the scale comes when the largest of a row is subtracted: a product of the two
    would be fused with the subtraction, and the largest less itself would not be 0. With one, the
    product is fused with the bias, which leaves the subtraction a rounded number.
    """
    keys = load_summaries(KEY_MEANS, head, columns, n_blocks * PER_BLOCK, D_PAD)
    products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if HAS_BIAS:
        rows, columns = rows[:, None], columns[None, :] // PER_BLOCK
        bias = load_bias(BIAS, biased_from, of_sample, rows, columns, n_blocks)
        return tl.fma(products, scale, bias)
    else:
        return products


@triton.jit
def _scores(logits, largest, scale, HAS_BIAS: tl.constexpr):
    """Scores `[rows, columns]` of what `_logits` returned and the largest of every row."""
    if HAS_BIAS:
        return logits - largest[:, None]
    else:
        return (logits - largest[:, None]) * scale


@triton.jit
def _load_queries(QUERY_MEANS, head, rows, n_blocks, D_PAD: tl.constexpr, NEGATIVE: tl.constexpr):
    """Means of queries, with the sign of the scale, whose size is what kernels are given."""
    query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
    if NEGATIVE:
        query = -query
    return query


@triton.jit(do_not_specialize=SIZES)
def score_kernel(
    QUERY_MEANS, KEY_MEANS, FLAGS, BIAS, BIASED_FROM, ROW_LARGEST, SCORES,
    scale, n_blocks, heads,
    NORMALIZED: tl.constexpr, STORED: tl.constexpr, HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """The largest logit of every row over live columns (0 where not NORMALIZED), as `_logits`
    returns it, and the scores `[G, R, C]` where they are to be stored.
    """
    n_key_blocks = n_blocks * PER_BLOCK
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    flags = FLAGS + head // heads * n_key_blocks
    rows = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    query = _load_queries(QUERY_MEANS, head, rows, n_blocks, D_PAD, NEGATIVE)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    largest = tl.zeros([ROWS], tl.float32)
    if NORMALIZED:
        largest += LOWEST
        for start in range(0, n_key_blocks, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            live = tl.load(flags + columns, mask=columns < n_key_blocks, other=0) > 0
            logits = _logits(
                query, KEY_MEANS, BIAS, biased_from, scale, head, head % heads, rows, columns,
                n_blocks, HAS_BIAS, PER_BLOCK, D_PAD, PRECISION,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.where(live[None, :], logits, LOWEST), 1))
    line = head * n_blocks + rows
    tl.store(ROW_LARGEST + line, largest, mask=rows < n_blocks)
    if STORED:
        for start in range(0, n_key_blocks, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = (rows < n_blocks)[:, None] & (columns < n_key_blocks)[None, :]
            logits = _logits(
                query, KEY_MEANS, BIAS, biased_from, scale, head, head % heads, rows, columns,
                n_blocks, HAS_BIAS, PER_BLOCK, D_PAD, PRECISION,
            )  # fmt: skip
            scores = _scores(logits, largest, scale, HAS_BIAS)
            tl.store(SCORES + line[:, None] * n_key_blocks + columns[None, :], scores, mask=inside)


class Ranking(NamedTuple):
    """The scores of all pairs of candidates.

    Attributes:
        call, candidates: what was ranked.
        scores: `[G, R, C]` float32, or `[1]` where they are not stored.
        is_stored: whether they are.
        arguments: of all kernels that read scores; the same tiles and precision for all, so that
            kernels that compute scores anew see the same bits.
    """

    call: KernelCall
    candidates: Candidates
    scores: Tensor
    is_stored: bool
    arguments: dict


def score_pairs(
    call: KernelCall,
    summaries: Summaries,
    candidates: Candidates,
    bias: PairBias,
    *,
    row_normalized: bool,
) -> Ranking:
    """Score all pairs, less the largest score of a row where `row_normalized`."""
    rows = call.n_blocks
    is_stored = call.length < launching.table().recompute_from_length
    operands = call.as_operands(summaries)
    row_largest = call.empty((call.all_heads, rows))
    scores = call.empty((call.all_heads, rows, call.n_key_blocks) if is_stored else (1,))
    arguments = {
        "QUERY_MEANS": operands["QUERY_MEANS"],
        "KEY_MEANS": operands["KEY_MEANS"],
        "FLAGS": candidates.flags,
        **bias.arguments,
        "ROW_LARGEST": row_largest,
        "SCORES": scores,
        "scale": abs(call.scale),
        "STORED": is_stored,
        "NEGATIVE": call.scale < 0,
        "ROWS": _STRIP_ROWS,
        "COLUMNS": 16 if call.padded_dim == 128 else 32,
        **call.coarse_products(),
        "num_warps": 8,
    }
    programs = call.strips(_STRIP_ROWS)
    launching.launch(score_kernel, programs, **arguments, NORMALIZED=row_normalized)
    return Ranking(call, candidates, scores, is_stored, arguments)


@triton.jit
def _sort_keys(
    query, largest, row_flags, KEY_MEANS, BIAS, biased_from, SCORES, flags, scale, head, of_sample,
    rows, columns, n_blocks, half_diagonal, TIE_BITS: tl.constexpr, STORED: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys of a tile `[rows, columns]`, -1 where a pair is not live."""
    n_key_blocks = n_blocks * PER_BLOCK
    column_flags = tl.load(flags + columns, mask=columns < n_key_blocks, other=0)
    live = (row_flags > 0)[:, None] & (column_flags > 0)[None, :]
    if STORED:
        at = SCORES + (head * n_blocks + rows)[:, None] * n_key_blocks + columns[None, :]
        scores = tl.load(at, mask=live, other=0.0)
    else:
        logits = _logits(
            query, KEY_MEANS, BIAS, biased_from, scale, head, of_sample, rows, columns, n_blocks,
            HAS_BIAS, PER_BLOCK, D_PAD, PRECISION,
        )  # fmt: skip
        scores = _scores(logits, largest, scale, HAS_BIAS)
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 ranks as 0
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits.to(tl.int64) + 2147483648, (bits ^ -1).to(tl.int64))
    squares = columns[None, :] // PER_BLOCK
    distance = tl.abs(rows[:, None] - squares)
    later = (squares > rows[:, None]).to(tl.int32)
    tie_rank = 2 * (distance * n_blocks + rows[:, None]) + later
    if PER_BLOCK > 1:
        tie_rank = tie_rank * PER_BLOCK + columns[None, :] % PER_BLOCK
    best_tie: tl.constexpr = (1 << TIE_BITS) - 1
    prior = (row_flags > 1)[:, None] | (column_flags > 1)[None, :] | (distance <= half_diagonal)
    key = (ordered << TIE_BITS) + (best_tie - tie_rank)
    key += prior.to(tl.int64) << (TIE_BITS + 32)
    return tl.where(live, key, -1)


@triton.jit
def _narrow(prefix, wanted, HISTOGRAM):
    """Go from the digits found so far to one more: that of the `wanted`-th largest key among those
    that share the prefix, and how many are wanted among those that share this digit too. 0 stands
    for all of them: digits that follow are 0 then.
    """
    digits = tl.arange(0, _DIGITS)
    sizes = tl.load(HISTOGRAM + digits)
    larger = tl.sum(sizes, 0) - tl.cumsum(sizes, 0)
    hit = (larger < wanted) & (larger + sizes >= wanted)
    digit = tl.sum(tl.where(hit, digits, 0), 0).to(tl.int64)
    wanted -= tl.sum(tl.where(hit, larger, 0), 0)
    with_digit = tl.sum(tl.where(hit, sizes, 0), 0)
    return (prefix << _BITS) + digit, tl.where(wanted == with_digit, 0, wanted)


@triton.jit(do_not_specialize=SIZES)
def digit_kernel(
    QUERY_MEANS, KEY_MEANS, FLAGS, BIAS, BIASED_FROM, ROW_LARGEST, SCORES, BUDGETS, PREFIXES,
    WANTED, HISTOGRAMS,
    scale, n_blocks, heads, all_heads, half_diagonal, level, shift,
    TIE_BITS: tl.constexpr, STORED: tl.constexpr, HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Histogram of one digit over the keys that share the digits above it.

    `PREFIXES` and `WANTED` are `[levels, G]`, `HISTOGRAMS` `[levels, G, digits]`, zeros.
    """
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    wanted = tl.load(BUDGETS + head // heads)
    prefix = wanted * 0
    if level > 0:
        before = (level - 1) * all_heads + head
        prefix, wanted = tl.load(PREFIXES + before), tl.load(WANTED + before)
        prefix, wanted = _narrow(prefix, wanted, HISTOGRAMS + before * _DIGITS)
    line = level * all_heads + head
    tl.store(PREFIXES + line, prefix, mask=strip == 0)
    tl.store(WANTED + line, wanted, mask=strip == 0)
    n_key_blocks = n_blocks * PER_BLOCK
    flags = FLAGS + head // heads * n_key_blocks
    rows = strip * ROWS + tl.arange(0, ROWS)
    row_flags = _row_flags(flags, rows, n_blocks, PER_BLOCK)
    query = _load_queries(QUERY_MEANS, head, rows, n_blocks, D_PAD, NEGATIVE)
    largest = tl.load(ROW_LARGEST + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    sizes = tl.zeros([_DIGITS], tl.int32)
    for start in range(0, tl.where(wanted > 0, n_key_blocks, 0), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = _sort_keys(
            query, largest, row_flags, KEY_MEANS, BIAS, biased_from, SCORES, flags, scale, head,
            head % heads, rows, columns, n_blocks, half_diagonal, TIE_BITS, STORED, HAS_BIAS,
            PER_BLOCK, D_PAD, PRECISION,
        )  # fmt: skip
        counted = (key >= 0) & ((key >> shift >> _BITS) == prefix)
        digit = ((key >> shift) & (_DIGITS - 1)).to(tl.int32)
        digit = tl.reshape(digit, [ROWS * COLUMNS])
        sizes += tl.histogram(digit, _DIGITS, mask=tl.reshape(counted, [ROWS * COLUMNS]))
    to = HISTOGRAMS + line * _DIGITS + tl.arange(0, _DIGITS)
    tl.atomic_add(to, sizes, mask=sizes > 0)


@triton.jit(do_not_specialize=SIZES)
def mark_kernel(
    QUERY_MEANS, KEY_MEANS, FLAGS, BIAS, BIASED_FROM, ROW_LARGEST, SCORES, PREFIXES, WANTED,
    HISTOGRAMS, BLOCKS,
    scale, n_blocks, heads, all_heads, half_diagonal, levels,
    TIE_BITS: tl.constexpr, STORED: tl.constexpr, HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Write `[G, R, C]`: 1 where the key of a pair is at least the one that was found."""
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    last = (levels - 1) * all_heads + head
    before = HISTOGRAMS + last * _DIGITS
    lowest, _ = _narrow(tl.load(PREFIXES + last), tl.load(WANTED + last), before)
    n_key_blocks = n_blocks * PER_BLOCK
    flags = FLAGS + head // heads * n_key_blocks
    rows = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    row_flags = _row_flags(flags, rows, n_blocks, PER_BLOCK)
    query = _load_queries(QUERY_MEANS, head, rows, n_blocks, D_PAD, NEGATIVE)
    largest = tl.load(ROW_LARGEST + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    for start in range(0, n_key_blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        key = _sort_keys(
            query, largest, row_flags, KEY_MEANS, BIAS, biased_from, SCORES, flags, scale, head,
            head % heads, rows, columns, n_blocks, half_diagonal, TIE_BITS, STORED, HAS_BIAS,
            PER_BLOCK, D_PAD, PRECISION,
        )  # fmt: skip
        inside = (rows < n_blocks)[:, None] & (columns < n_key_blocks)[None, :]
        to = BLOCKS + (head * n_blocks + rows)[:, None] * n_key_blocks + columns[None, :]
        tl.store(to, ((key >= 0) & (key >= lowest)).to(tl.int8), mask=inside)


def choose_by_radix(ranking: Ranking) -> Tensor:
    """The best pairs, `[B, H, R, C]` bool: a launch per digit, and one that marks them."""
    call, candidates = ranking.call, ranking.candidates
    rows, programs = call.n_blocks, call.strips(_STRIP_ROWS)
    tie_bits = (2 * rows**2 * call.per_block - 1).bit_length()
    levels = launching.ceil_div(1 + 32 + tie_bits, DIGIT_BITS)
    # Whole digits, so that the first ones hold as much of the score as they can.
    tie_bits = min(levels * DIGIT_BITS, 63) - (1 + 32)
    prefixes, remaining = call.empty((2, levels, call.all_heads), torch.int64)
    diagonal = candidates.diagonal_n_blocks
    arguments = {
        **ranking.arguments,
        "PREFIXES": prefixes,
        "WANTED": remaining,
        "HISTOGRAMS": call.empty((levels, call.all_heads, 2**DIGIT_BITS), torch.int32).zero_(),
        "all_heads": call.all_heads,
        "half_diagonal": diagonal // 2 if diagonal else -1,
        "TIE_BITS": tie_bits,
        "HAS_BIAS": ranking.arguments["HAS_BIAS"] and not ranking.is_stored,
    }
    for level in range(levels):
        launching.launch(
            digit_kernel,
            programs,
            **arguments,
            BUDGETS=candidates.budgets,
            level=level,
            shift=DIGIT_BITS * (levels - 1 - level),
        )
    blocks = call.empty((call.batch, call.heads, rows, call.n_key_blocks), torch.int8)
    launching.launch(mark_kernel, programs, **arguments, BLOCKS=blocks, levels=levels)
    return blocks.view(torch.bool)


def choose_by_topk(ranking: Ranking) -> Tensor:
    """The same from stored scores by `torch.topk`, which is faster for few blocks."""
    call, candidates = ranking.call, ranking.candidates
    live_keys = candidates.flags > 0
    return choose_blocks(
        ranking.scores.view(call.batch, call.heads, call.n_blocks, call.n_key_blocks),
        live_keys.view(call.batch, call.n_blocks, call.per_block).any(-1),
        candidates.budgets,
        live_keys=live_keys,
        per_block=call.per_block,
        largest_budget=candidates.largest_budget,
        initial_prior_first_n_blocks=candidates.first_n_blocks,
        initial_prior_diagonal_n_blocks=candidates.diagonal_n_blocks,
    )
