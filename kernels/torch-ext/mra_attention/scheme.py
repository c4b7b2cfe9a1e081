"""What both forms of the general scheme share: its settings, and blocks of one scale.

`multiresolution_reference` defines the scheme, `multiresolution` computes it without an N x N
buffer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import (
    block_means,
    count_blocks,
    count_exported_blocks,
    is_exporting,
    mask_to_blocks,
    to_blocks,
)
from .selection import select


@dataclass(frozen=True)
class Scheme:
    """Checked settings of `multiresolution_attention`.

    Attributes:
        resolutions: scales s_0 > ... > s_k, each dividing the one before.
        block_budgets: block pairs per head that are cut on levels 0 to k - 1.
        initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks: priors of level 0.
        rule: a name in `SCHEME_RULES`.
        scale: factor of the logits.
        sparse: only blocks of the scale s_k contribute.
    """

    resolutions: tuple[int, ...]
    block_budgets: tuple[int, ...]
    initial_prior_first_n_blocks: int
    initial_prior_diagonal_n_blocks: int
    rule: str
    scale: float
    sparse: bool

    def padded_length(self, length: int) -> int:
        """`length` rounded up to whole blocks of scale s_0."""
        count = count_exported_blocks if is_exporting() else count_blocks
        return count(length, self.resolutions[0]) * self.resolutions[0]

    def select_first(self, query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor:
        """Return the blocks of scale s_0 that are cut, `[B, H, R, R]` bool."""
        return select(
            query,
            key,
            token_mask,
            block_per_row=1,
            block_budget=self.block_budgets[0],
            block_size=self.resolutions[0],
            initial_prior_first_n_blocks=self.initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=self.initial_prior_diagonal_n_blocks,
            rule=self.rule,
            scale=self.scale,
            traceable=is_exporting(),
            reads_mask=not torch.compiler.is_compiling(),
        )


class Level:
    """Blocks of one scale: R = padded length / scale.

    Attributes:
        size: the scale, tokens per block.
        n_blocks: R.
        tokens: `[B, R * size]` bool, True at real tokens.
        counts: `[B, R]` real tokens of each block.
    """

    def __init__(
        self, size: int, padded: int, token_mask: Tensor | None, shape: torch.Size, device
    ):
        self.size, self.n_blocks, self.token_mask = size, padded // size, token_mask
        real = mask_to_blocks(token_mask, shape[0], shape[2], size, self.n_blocks, device)
        self.tokens, self.counts = real.flatten(1), real.sum(-1)

    def means(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Means over the real tokens of the blocks: `[B, H, N, D]` -> `[B, H, R, D]`."""
        blocks = to_blocks(x, self.token_mask, self.size, self.n_blocks)
        return block_means(blocks, self.counts, dtype)


def levels_of(scheme: Scheme, x: Tensor, token_mask: Tensor | None) -> list[Level]:
    """One level per scale, from the coarsest on, for inputs such as `x` `[B, H, N, D]`."""
    padded = scheme.padded_length(x.shape[2])
    return [Level(size, padded, token_mask, x.shape, x.device) for size in scheme.resolutions]


def fit_scales(resolutions: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Shrink scales that exceed `length` tokens to the fewest whole blocks of the next scale.

    The result of the scheme stays the same: what is cut off such a block holds no token.
    """
    fitted: list[int] = []
    for size in reversed(resolutions):
        finer = fitted[-1] if fitted else 1
        fitted.append(min(size, count_blocks(length, finer) * finer))
    return tuple(reversed(fitted))
