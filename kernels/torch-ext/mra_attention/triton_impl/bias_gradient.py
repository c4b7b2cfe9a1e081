"""The gradient of the distance bias: the gradients of all logits, summed by distance.

The exact part left the sum of every listed pair (`backward.py`). The coarse part computes its
gradients of the logits again, tile by tile along the diagonals of the matrix of squares, whose
tiles lie at the same distances. Global pairs are left out. Every sum is made by one program, in one
order.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..implementations import Summaries
from . import launching
from .backward import PairGradients
from .block_lists import OwnerLists
from .call import KernelCall
from .coarse import RowSums, of_pairs, unselected_pairs, weights_and_gradients
from .distance_bias import PairBias
from .primitives import SIZES, block_sizes, first_biased, load_summaries

#: Block rows and columns, in squares, of a tile.
_SIDE = 16


@triton.jit(do_not_specialize=SIZES)
def diagonal_kernel(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS, BLOCKS, BIAS, BIASED_FROM, SMALLEST, GRAD_SUMS,
    DELTA_SUMS, DIAGONALS,
    scale_log2, n_blocks, heads,
    HAS_BIAS: tl.constexpr, PER_BLOCK: tl.constexpr, SIDE: tl.constexpr, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head, side of the main diagonal, and diagonal of tiles on it, from the main
    one on: sums over the diagonals in the tiles, `[G, 2, diagonals, 2 * SIDE]`.

    Number `SIDE + i` is of the distance that is i more than the distance of the tiles. The main
    diagonal of tiles belongs to the upper side and is folded.
    """
    diagonals = tl.cdiv(n_blocks, SIDE)
    line = (tl.program_id(0) // diagonals).to(tl.int64)
    head, is_lower = line // 2, (line % 2).to(tl.int32)
    apart = (tl.program_id(0) % diagonals) * SIDE
    sample, of_sample = head // heads, head % heads
    n_key_blocks = n_blocks * PER_BLOCK
    counts = COUNTS + sample * n_key_blocks
    biased_from = first_biased(BIASED_FROM, sample, HAS_BIAS)
    within = tl.arange(0, SIDE)
    sums = tl.zeros([SIDE, SIDE], tl.float32)
    end = tl.where((is_lower == 1) & (apart == 0), 0, n_blocks - apart)
    for start in range(biased_from, end, SIDE):
        rows = start + is_lower * apart + within
        squares = start + (1 - is_lower) * apart + within
        for part in range(PER_BLOCK):  # the same part of each square, so that distances are theirs
            columns = squares * PER_BLOCK + part
            # Rows are loaded again for each part, which takes fewer registers than keeping them.
            row_counts = block_sizes(counts, rows, n_blocks, PER_BLOCK)
            sizes = tl.load(counts + columns, mask=columns < n_key_blocks, other=0)
            pairs = unselected_pairs(
                BLOCKS, head, rows, columns, row_counts, sizes, n_blocks, PER_BLOCK
            )
            smallest = tl.load(SMALLEST + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
            delta = tl.load(DELTA_SUMS + head * n_blocks + rows, mask=rows < n_blocks, other=0.0)
            query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
            keys = load_summaries(KEY_MEANS, head, columns, n_key_blocks, D_PAD)
            grad = load_summaries(GRAD_SUMS, head, rows, n_blocks, D_PAD)
            values = load_summaries(VALUE_SUMS, head, columns, n_key_blocks, D_PAD)
            _, grad_logits = weights_and_gradients(
                query, keys, grad, values, sizes, smallest, delta, pairs, scale_log2, BIAS,
                biased_from, of_sample, rows, columns, n_blocks, HAS_BIAS, PER_BLOCK, PRECISION,
            )  # fmt: skip
            sums += grad_logits
    further = (within[None, :] - within[:, None]) * (1 - 2 * is_lower)
    further = tl.where(apart == 0, tl.abs(further), further)
    numbers = tl.arange(0, 2 * SIDE)
    wanted = further[:, :, None] + SIDE == numbers[None, None, :]
    sums = tl.sum(tl.sum(tl.where(wanted, sums[:, :, None], 0.0), 0), 0)
    to = DIAGONALS + tl.program_id(0).to(tl.int64) * (2 * SIDE)
    tl.store(to + numbers, sums)


@triton.jit(do_not_specialize=SIZES)
def bias_gradient_kernel(
    DIAGONALS, SIZES, STARTS, PAIR_SUMS, PAIR_DISTANCES, GRAD_BIAS,
    n_blocks, capacity,
    HAS_COARSE: tl.constexpr, QUERY_BLOCKS: tl.constexpr, SIDE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program per head and `SIDE` distances: their gradients, in `[G, R]`."""
    strips = tl.cdiv(n_blocks, SIDE)
    head = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    within = tl.arange(0, SIDE)
    distances = strip * SIDE + within
    last = head * n_blocks + n_blocks - 1
    total = tl.minimum(tl.load(STARTS + last) + tl.load(SIZES + last), capacity) * QUERY_BLOCKS
    sums = tl.zeros([ENTRIES, SIDE], tl.float32)
    for first in range(0, total, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        at = head * capacity * QUERY_BLOCKS + entries
        of_entries = tl.load(PAIR_DISTANCES + at, mask=entries < total, other=-1)
        pair_sums = tl.load(PAIR_SUMS + at, mask=entries < total, other=0.0)
        sums += tl.where(of_entries[:, None] == distances[None, :], pair_sums[:, None], 0.0)
    sums = tl.sum(sums, 0)
    if HAS_COARSE:
        for side in tl.static_range(2):
            at = DIAGONALS + ((2 * head + side) * strips + strip) * (2 * SIDE) + within
            sums += tl.load(at + SIDE)
            # The tiles of the next diagonal also hold distances that are less than their own.
            sums += tl.load(at + 2 * SIDE, mask=distances + SIDE < strips * SIDE, other=0.0)
    tl.store(GRAD_BIAS + head * n_blocks + distances, sums, mask=distances < n_blocks)


def bias_gradient(
    call: KernelCall,
    summaries: Summaries,
    blocks: Tensor,
    bias: PairBias,
    row_sums: RowSums,
    lists: OwnerLists,
    pairs: PairGradients,
) -> Tensor | None:
    """The gradient of the bias, `[H, R]`; None where there is no bias. `lists` are those of query
    blocks, in whose order `pairs` are.
    """
    if not bias.is_given:
        return None
    strips = call.strips(_SIDE)
    diagonals = call.empty((2 * strips if call.has_coarse else 0, 2 * _SIDE))
    grad_bias = call.empty((call.batch, call.heads, call.n_blocks))
    if call.has_coarse:
        arguments = of_pairs(call, summaries, blocks, bias)
        if call.padded_dim == 128 or call.per_block > 1:
            arguments["PRECISION"] = "ieee"  # the others spill
        launching.launch(
            diagonal_kernel,
            2 * strips,
            **arguments,
            **row_sums.arguments,
            DIAGONALS=diagonals,
            scale_log2=call.scale_log2,
            SIDE=_SIDE,
            # Narrow key blocks spill with 8 and that many channels.
            num_warps=4 if call.per_block > 1 and call.padded_dim == 128 else 8,
            num_stages=1,
        )
    launching.launch(
        bias_gradient_kernel,
        strips,
        DIAGONALS=diagonals,
        SIZES=lists.sizes,
        STARTS=lists.starts,
        PAIR_SUMS=pairs.sums,
        PAIR_DISTANCES=pairs.distances,
        GRAD_BIAS=grad_bias,
        n_blocks=call.n_blocks,
        capacity=lists.capacity,
        HAS_COARSE=call.has_coarse,
        QUERY_BLOCKS=lists.own_blocks,
        SIDE=_SIDE,
        ENTRIES=128,
    )
    return grad_bias.sum(0)
