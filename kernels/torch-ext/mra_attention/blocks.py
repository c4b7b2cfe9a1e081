"""Blocks of tokens: the few definitions that every implementation shares.

A sequence of N tokens is cut from position 0 into R = ceil(N / M) blocks of M tokens. Tokens that
are
padding, and the tail that completes the last block, count as not real: they become zeros and are
never counted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all arithmetic: float64 for float64 inputs, float32 for everything
    narrower.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def count_blocks(length: int, block_size: int) -> int:
    """Return R, the number of blocks that hold `length` tokens."""
    return (length + block_size - 1) // block_size


def to_blocks(x: Tensor, token_mask: Tensor | None, block_size: int, n_blocks: int) -> Tensor:
    """Cut `[B, H, N, D]` into `[B, H, R, M, D]`; what is not a real token becomes zero, even NaN.

    `token_mask` is `[B, N]` bool or None (all real). A view where nothing has to be filled.
    """
    if token_mask is not None:
        x = x.masked_fill(~token_mask[:, None, :, None], 0)
    missing = n_blocks * block_size - x.shape[2]
    if not isinstance(missing, int) or missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (n_blocks, block_size))


def mask_to_blocks(
    token_mask: Tensor | None,
    batch: int,
    length: int,
    block_size: int,
    n_blocks: int,
    device: torch.device,
) -> Tensor:
    """Return `[B, R, M]` bool: True where a block holds a real token."""
    if token_mask is None:
        token_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    return F.pad(token_mask, (0, n_blocks * block_size - length)).unflatten(
        1, (n_blocks, block_size)
    )


def block_means(blocks: Tensor, counts: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Mean over the real tokens of each block, 0 where there is none.

    `blocks` is `[B, H, R, M, D]`, `counts` `[B, R]`; returns `[B, H, R, D]` in `dtype` (default:
    the compute dtype).
    """
    dtype = dtype or compute_dtype(blocks.dtype)
    return blocks.sum(3, dtype=dtype) / counts.clamp_min(1)[:, None, :, None].to(dtype)
