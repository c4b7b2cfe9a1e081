"""The distance bias as kernels take it: one number per head and distance in blocks.

It is added to the logits of all token pairs of two blocks (x, y), unless the pair is global: x or y
is one of the first n live blocks. Those blocks, and dead ones before them, are the blocks below one
number per sample, which a kernel finds. Key blocks have the bias of the block they are part of.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..implementations import Summaries
from . import launching
from .call import KernelCall
from .primitives import SIZES, block_sizes


@triton.jit(do_not_specialize=SIZES)
def biased_from_kernel(
    COUNTS, BIASED_FROM,
    n_blocks, first_blocks,
    PER_BLOCK: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """One program per sample: the number of blocks before live block `first_blocks`, from 0."""
    sample = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, R_PAD)
    inside = blocks < n_blocks
    live = block_sizes(COUNTS + sample * n_blocks * PER_BLOCK, blocks, n_blocks, PER_BLOCK) > 0
    before = inside & (tl.cumsum(live.to(tl.int32), 0) <= first_blocks)
    tl.store(BIASED_FROM + sample, tl.sum(before.to(tl.int32), 0))


class PairBias(NamedTuple):
    """The bias of block pairs.

    Attributes:
        by_distance: `[H, R]` float32; something else where no bias is given.
        biased_from: `[B]` int32, the first block whose pairs with later blocks take a bias.
        is_given: whether there is a bias.
    """

    by_distance: Tensor
    biased_from: Tensor
    is_given: bool

    @property
    def arguments(self) -> dict:
        """Arguments of all kernels that compute logits."""
        return {
            "BIAS": self.by_distance,
            "BIASED_FROM": self.biased_from,
            "HAS_BIAS": self.is_given,
        }


def pair_bias(
    call: KernelCall,
    summaries: Summaries,
    distance_bias: Tensor | None,
    initial_prior_first_n_blocks: int,
) -> PairBias:
    """The bias of the pairs of a call."""
    counts = summaries.counts
    if distance_bias is None:
        return PairBias(summaries.vectors, counts, False)  # of the same types, and never read
    bias = PairBias(distance_bias.contiguous(), call.empty((call.batch,), counts.dtype), True)
    launching.launch(
        biased_from_kernel,
        call.batch,
        COUNTS=counts,
        BIASED_FROM=bias.biased_from,
        n_blocks=call.n_blocks,
        first_blocks=initial_prior_first_n_blocks,
        PER_BLOCK=call.per_block,
        R_PAD=launching.next_power_of_2(call.n_blocks),
    )
    return bias
