"""The gradient of the distance bias: the gradients of all logits, summed by distance.

The exact part left the sum of every listed pair (`backward.py`). The coarse part computes its
gradients of the logits again, along the diagonals: with x from the first block that is not global
on, and d the distances of a program, its pairs are (x, x + d) and (x + d, x). Every sum is made by
one program, in one order.
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
from .primitives import SIZES, first_biased, load_summaries


@triton.jit
def _coarse_gradients(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, counts, BLOCKS, bias, biased_from, SMALLEST, GRAD_SUMS,
    DELTA_SUMS, head, of_sample, rows, columns, scale_log2, n_blocks, D_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile `[rows, columns]`: gradients of the coarse logits."""
    inside = rows < n_blocks
    row_counts = tl.load(counts + rows, mask=inside, other=0)
    sizes = tl.load(counts + columns, mask=columns < n_blocks, other=0)
    pairs = unselected_pairs(BLOCKS, head, rows, columns, row_counts, sizes, n_blocks)
    smallest = tl.load(SMALLEST + head * n_blocks + rows, mask=inside, other=0.0)
    delta = tl.load(DELTA_SUMS + head * n_blocks + rows, mask=inside, other=0.0)
    query = load_summaries(QUERY_MEANS, head, rows, n_blocks, D_PAD)
    keys = load_summaries(KEY_MEANS, head, columns, n_blocks, D_PAD)
    grad = load_summaries(GRAD_SUMS, head, rows, n_blocks, D_PAD)
    values = load_summaries(VALUE_SUMS, head, columns, n_blocks, D_PAD)
    _, gradients = weights_and_gradients(
        query, keys, grad, values, sizes, smallest, delta, pairs, scale_log2, bias, biased_from,
        of_sample, rows, columns, n_blocks, True, PRECISION,
    )  # fmt: skip
    return gradients


@triton.jit(do_not_specialize=SIZES)
def bias_gradient_kernel(
    QUERY_MEANS, KEY_MEANS, VALUE_SUMS, COUNTS, BLOCKS, BIAS, BIASED_FROM, SMALLEST, GRAD_SUMS,
    DELTA_SUMS, SIZES, STARTS, PAIR_SUMS, PAIR_DISTANCES, GRAD_BIAS,
    scale_log2, n_blocks, heads, capacity,
    HAS_COARSE: tl.constexpr, HAS_BIAS: tl.constexpr, DISTANCES: tl.constexpr,
    ENTRIES: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head and `DISTANCES` distances: their gradients in `[G, R]`."""
    strips = tl.cdiv(n_blocks, DISTANCES)
    head = (tl.program_id(0) // strips).to(tl.int64)
    sample, of_sample = head // heads, head % heads
    nearest = (tl.program_id(0) % strips) * DISTANCES
    distances = nearest + tl.arange(0, DISTANCES)

    last = head * n_blocks + n_blocks - 1
    total = tl.minimum(tl.load(STARTS + last) + tl.load(SIZES + last), capacity)
    exact = tl.zeros([ENTRIES, DISTANCES], tl.float32)
    for first in range(0, total, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        at = head * capacity + entries
        of_entries = tl.load(PAIR_DISTANCES + at, mask=entries < total, other=-1)
        pair_sums = tl.load(PAIR_SUMS + at, mask=entries < total, other=0.0)
        exact += tl.where(of_entries[:, None] == distances[None, :], pair_sums[:, None], 0.0)
    sums = tl.sum(exact, 0)

    if HAS_COARSE:
        # Row i and column j of a tile are always at distance `nearest` + j - i.
        near, far = tl.arange(0, DISTANCES), tl.arange(0, 2 * DISTANCES)
        upper = tl.zeros([DISTANCES, 2 * DISTANCES], tl.float32)
        lower = tl.zeros([2 * DISTANCES, DISTANCES], tl.float32)
        counts = COUNTS + sample * n_blocks
        biased_from = first_biased(BIASED_FROM, sample, HAS_BIAS)
        for start in range(biased_from, n_blocks - nearest, DISTANCES):
            upper += _coarse_gradients(
                QUERY_MEANS, KEY_MEANS, VALUE_SUMS, counts, BLOCKS, BIAS, biased_from, SMALLEST,
                GRAD_SUMS, DELTA_SUMS, head, of_sample, start + near, start + nearest + far,
                scale_log2, n_blocks, D_PAD, PRECISION,
            )  # fmt: skip
            lower += _coarse_gradients(
                QUERY_MEANS, KEY_MEANS, VALUE_SUMS, counts, BLOCKS, BIAS, biased_from, SMALLEST,
                GRAD_SUMS, DELTA_SUMS, head, of_sample, start + nearest + far, start + near,
                scale_log2, n_blocks, D_PAD, PRECISION,
            )  # fmt: skip
        apart = far[None, :] - near[:, None]
        both = upper + tl.where(nearest + apart > 0, tl.trans(lower), 0.0)
        wanted = tl.arange(0, DISTANCES)[None, None, :] == apart[:, :, None]
        sums += tl.sum(tl.sum(tl.where(wanted, both[:, :, None], 0.0), 0), 0)
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
    """The gradient of the bias, `[H, R]`; None where there is no bias. `lists` are those of key
    blocks, in whose order `pairs` are.
    """
    if not bias.is_given:
        return None
    grad_bias = call.empty((call.batch, call.heads, call.n_blocks))
    distances = 16
    launching.launch(
        bias_gradient_kernel,
        call.strips(distances),
        **of_pairs(call, summaries, blocks, bias),
        **row_sums.arguments,
        SIZES=lists.sizes,
        STARTS=lists.starts,
        PAIR_SUMS=pairs.sums,
        PAIR_DISTANCES=pairs.distances,
        GRAD_BIAS=grad_bias,
        scale_log2=call.scale_log2,
        capacity=lists.capacity,
        HAS_COARSE=call.has_coarse,
        DISTANCES=distances,
        ENTRIES=128,
        num_warps=8,
        num_stages=1,
    )
    return grad_bias.sum(0)
