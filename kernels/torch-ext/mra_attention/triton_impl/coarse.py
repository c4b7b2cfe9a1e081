"""The coarse part, forward and backward: kernels that multiply block summaries.

It covers the live pairs that are not selected. With c_y real tokens in key block y, V_y the sum of
their values and S the coarse logits, every query block x gets the state of an online softmax,

    R_x = max_y S_xy        z_x = sum_y exp(S_xy - R_x) c_y        a_x = sum_y exp(S_xy - R_x) V_y

from which its queries go on over the selected pairs (`forward.py`), and backward, with W, G and g
as in `backward.py`,

    E_xy = exp(S_xy - W_x)  dS_xy = E_xy (G_x . V_y - c_y g_x)    dV_y = sum_x E_xy G_x

The bias of a pair is part of S_xy. Logits are to base 2 inside the kernels.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..implementations import Summaries
from . import launching
from .call import KernelCall
from .distance_bias import PairBias
from .primitives import (
    LOWEST,
    SIZES,
    block_sizes,
    coarse_logits,
    first_biased,
    load_summaries,
)


@triton.jit
def unselected_pairs(
    BLOCKS, head, rows, columns, row_counts, column_counts, n_blocks, PER_BLOCK: tl.constexpr
):
    """Tile `[rows, columns]`: live pairs of a block and a key block that are left to the coarse
    part.
    """
    n_key_blocks = n_blocks * PER_BLOCK
    inside = (rows < n_blocks)[:, None] & (columns < n_key_blocks)[None, :]
    at = BLOCKS + head * n_blocks * n_key_blocks + rows[:, None] * n_key_blocks + columns[None, :]
    chosen = tl.load(at, mask=inside, other=1) != 0
    return inside & (row_counts > 0)[:, None] & (column_counts > 0)[None, :] & (chosen == 0)


@triton.jit(do_not_specialize=SIZES)
def coarse_kernel(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS, BLOCKS, BIAS, BIASED_FROM, LARGEST, DENOMINATOR,
    NUMERATOR,
    scale_log2, n_blocks, heads,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R and z `[G, R]`, a `[G, R, D_PAD]` of a strip of query blocks."""
    n_key_blocks = n_blocks * PER_BLOCK
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    counts = COUNTS + head // heads * n_key_blocks
    rows = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    row_counts = block_sizes(counts, rows, n_blocks, PER_BLOCK)
    query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, n_key_blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        sizes = tl.load(counts + columns, mask=columns < n_key_blocks, other=0)
        pairs = unselected_pairs(
            BLOCKS, head, rows, columns, row_counts, sizes, n_blocks, PER_BLOCK
        )
        keys = load_summaries(KEY_MEANS, head, columns, n_key_blocks, D_PAD)
        logits = coarse_logits(
            query, keys, scale_log2, BIAS, biased_from, head % heads, rows, columns, n_blocks,
            HAS_BIAS, PER_BLOCK, PRECISION,
        )  # fmt: skip
        logits = tl.where(pairs, logits, LOWEST)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.where(pairs, tl.exp2(logits - new_largest[:, None]), 0.0)
        sizes = sizes.to(tl.float32)
        denominator = denominator * rescale + tl.sum(weights * sizes[None, :], 1)
        values = load_summaries(VALUE_SUMS, head, columns, n_key_blocks, D_PAD)
        numerator = tl.dot(weights, values, numerator * rescale[:, None], input_precision=PRECISION)
        largest = new_largest
    to = head * n_blocks + rows
    tl.store(LARGEST + to, largest, mask=rows < n_blocks)
    tl.store(DENOMINATOR + to, denominator, mask=rows < n_blocks)
    to = to[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    tl.store(NUMERATOR + to, numerator, mask=(rows < n_blocks)[:, None])


class CoarseState(NamedTuple):
    """Where the softmax of every query block starts: R and z `[G, R]`, a `[G, R, D_PAD]`."""

    largest: Tensor
    denominator: Tensor
    numerator: Tensor


def coarse_state(
    call: KernelCall, summaries: Summaries, blocks: Tensor, bias: PairBias
) -> CoarseState:
    """The state for a selection `[B, H, R, C]` int8; unwritten if there is no coarse part."""
    rows = (call.all_heads, call.n_blocks)
    largest, denominator = call.empty((2, *rows))
    state = CoarseState(largest, denominator, call.empty((*rows, call.padded_dim)))
    if call.has_coarse:
        tile = _tile_of_rows(call)
        launching.launch(
            coarse_kernel,
            call.strips(tile["ROWS"]),
            **of_pairs(call, summaries, blocks, bias),
            LARGEST=state.largest,
            DENOMINATOR=state.denominator,
            NUMERATOR=state.numerator,
            scale_log2=call.scale_log2,
            **tile,
        )
    return state


def of_pairs(call: KernelCall, summaries: Summaries, blocks: Tensor, bias: PairBias) -> dict:
    """Arguments that all kernels of the coarse part share."""
    return {
        **call.as_operands(summaries),
        "BLOCKS": blocks,
        **bias.arguments,
        **call.coarse_products(),
    }


def _tile_of_rows(call: KernelCall) -> dict:
    """Configuration of kernels whose programs have a strip of rows and visit all columns: the
    largest tiles whose IEEE products keep everything in registers.
    """
    rows, stages = (32, 2) if call.padded_dim == 64 else (16, 1)
    return {"ROWS": rows, "COLUMNS": 16, "num_warps": 8, "num_stages": stages}


@triton.jit
def weights_and_gradients(
    query, keys, grad, values, sizes, smallest, delta, pairs, scale_log2, BIAS, biased_from,
    of_sample, rows, columns, n_blocks, HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """E and the gradients of the logits, tiles `[rows, columns]`; 0 where not of `pairs`."""
    logits = coarse_logits(
        query, keys, scale_log2, BIAS, biased_from, of_sample, rows, columns, n_blocks,
        HAS_BIAS, PER_BLOCK, PRECISION,
    )  # fmt: skip
    weights = tl.where(pairs, tl.exp2(logits - smallest[:, None]), 0.0)
    products = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    return weights, weights * (products - sizes.to(tl.float32)[None, :] * delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def coarse_query_kernel(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS, BLOCKS, BIAS, BIASED_FROM, SMALLEST, GRAD_SUMS,
    DELTA_SUMS, COARSE_QUERY,
    scale, scale_log2, n_blocks, heads,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient that every query of a block gets from the coarse part, `[G, R, D_PAD]`."""
    n_key_blocks = n_blocks * PER_BLOCK
    strips = tl.cdiv(n_blocks, ROWS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    counts = COUNTS + head // heads * n_key_blocks
    rows = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_blocks
    row_counts = block_sizes(counts, rows, n_blocks, PER_BLOCK)
    query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
    grad = load_summaries(GRAD_SUMS, head, rows, n_blocks, D_PAD)
    smallest = tl.load(SMALLEST + head * n_blocks + rows, mask=inside, other=0.0)
    delta = tl.load(DELTA_SUMS + head * n_blocks + rows, mask=inside, other=0.0)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    sums = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(0, n_key_blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        sizes = tl.load(counts + columns, mask=columns < n_key_blocks, other=0)
        pairs = unselected_pairs(
            BLOCKS, head, rows, columns, row_counts, sizes, n_blocks, PER_BLOCK
        )
        keys = load_summaries(KEY_MEANS, head, columns, n_key_blocks, D_PAD)
        values = load_summaries(VALUE_SUMS, head, columns, n_key_blocks, D_PAD)
        _, grad_logits = weights_and_gradients(
            query, keys, grad, values, sizes, smallest, delta, pairs, scale_log2, BIAS, biased_from,
            head % heads, rows, columns, n_blocks, HAS_BIAS, PER_BLOCK, PRECISION,
        )  # fmt: skip
        sums = tl.dot(grad_logits, keys, sums, input_precision=PRECISION)
    sums *= (scale / tl.maximum(row_counts, 1).to(tl.float32))[:, None]
    to = (head * n_blocks + rows)[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    tl.store(COARSE_QUERY + to, sums, mask=inside[:, None])


@triton.jit(do_not_specialize=SIZES)
def coarse_key_kernel(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS, BLOCKS, BIAS, BIASED_FROM, SMALLEST, GRAD_SUMS,
    DELTA_SUMS, COARSE_KEY, COARSE_VALUE,
    scale, scale_log2, n_blocks, heads,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients that every key and value of a key block get from the coarse part,
    `[G, C, D_PAD]`.
    """
    n_key_blocks = n_blocks * PER_BLOCK
    strips = tl.cdiv(n_key_blocks, COLUMNS)
    head = (tl.program_id(0) // strips).to(tl.int64)
    counts = COUNTS + head // heads * n_key_blocks
    columns = (tl.program_id(0) % strips) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_key_blocks
    sizes = tl.load(counts + columns, mask=inside, other=0)
    keys = load_summaries(KEY_MEANS, head, columns, n_key_blocks, D_PAD)
    values = load_summaries(VALUE_SUMS, head, columns, n_key_blocks, D_PAD)
    biased_from = first_biased(BIASED_FROM, head // heads, HAS_BIAS)
    key_sums = tl.zeros([COLUMNS, D_PAD], tl.float32)
    value_sums = tl.zeros([COLUMNS, D_PAD], tl.float32)
    for start in range(0, n_blocks, ROWS):
        rows = start + tl.arange(0, ROWS)
        row_counts = block_sizes(counts, rows, n_blocks, PER_BLOCK)
        smallest = tl.load(SMALLEST + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
        delta = tl.load(DELTA_SUMS + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
        query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
        grad = load_summaries(GRAD_SUMS, head, rows, n_blocks, D_PAD)
        pairs = unselected_pairs(
            BLOCKS, head, rows, columns, row_counts, sizes, n_blocks, PER_BLOCK
        )
        weights, grad_logits = weights_and_gradients(
            query, keys, grad, values, sizes, smallest, delta, pairs, scale_log2, BIAS, biased_from,
            head % heads, rows, columns, n_blocks, HAS_BIAS, PER_BLOCK, PRECISION,
        )  # fmt: skip
        value_sums = tl.dot(tl.trans(weights), grad, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(tl.trans(grad_logits), query, key_sums, input_precision=PRECISION)
    key_sums *= (scale / tl.maximum(sizes, 1).to(tl.float32))[:, None]
    to = (head * n_key_blocks + columns)[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    tl.store(COARSE_KEY + to, key_sums, mask=inside[:, None])
    tl.store(COARSE_VALUE + to, value_sums, mask=inside[:, None])


class RowSums(NamedTuple):
    """What reaches the coarse part from the queries of a block: W and g `[G, R]`, G `[G, R, D_PAD]`
    of `backward.py`.
    """

    smallest: Tensor
    delta_sums: Tensor
    grad_sums: Tensor

    @property
    def arguments(self) -> dict:
        """Arguments of all kernels of the coarse part that go backward."""
        return {
            "SMALLEST": self.smallest,
            "DELTA_SUMS": self.delta_sums,
            "GRAD_SUMS": self.grad_sums,
        }


class CoarseGradients(NamedTuple):
    """What every query of a block gets from the coarse part, `[G, R, D_PAD]`, and every key and
    value of a key block, `[G, C, D_PAD]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def coarse_gradients(
    call: KernelCall, summaries: Summaries, blocks: Tensor, bias: PairBias, row_sums: RowSums
) -> CoarseGradients:
    """The gradients for a selection `[B, H, R, C]` int8; unwritten if there is no coarse part."""
    sizes = (call.n_blocks, call.n_key_blocks, call.n_key_blocks)
    grads = CoarseGradients(*(call.empty((call.all_heads, n, call.padded_dim)) for n in sizes))
    if call.has_coarse:
        arguments = {
            **of_pairs(call, summaries, blocks, bias),
            **row_sums.arguments,
            "scale": call.scale,
            "scale_log2": call.scale_log2,
        }
        tile = _tile_of_rows(call)
        of_query = dict(arguments)
        is_tight = bias.is_given and call.padded_dim == 128
        if is_tight:
            if call.per_block > 1:
                of_query["PRECISION"] = "ieee"  # three products spill at any number of warps
            else:
                tile["num_warps"] = 4  # more registers for each thread
        launching.launch(
            coarse_query_kernel,
            call.strips(tile["ROWS"]),
            **of_query,
            COARSE_QUERY=grads.query,
            **tile,
        )
        if call.padded_dim == 128:
            arguments["PRECISION"] = "ieee"  # three products of that width spill at any tile
        side = 32 if call.padded_dim == 64 and arguments["PRECISION"] == "ieee" else 16
        few_warps = call.padded_dim == 16 or (bias.is_given and side == 32)
        few_warps |= is_tight and call.per_block > 1
        launching.launch(
            coarse_key_kernel,
            call.key_strips(side),
            **arguments,
            COARSE_KEY=grads.key,
            COARSE_VALUE=grads.value,
            ROWS=side,
            COLUMNS=side,
            num_warps=4 if few_warps else 8,
            num_stages=1,
        )
    return grads
