"""The definition of MRA-2 and MRA-2-s, for reading: O(N^2) memory, any device, autograd by torch.

MRA-2 is softmax attention whose logit for a token pair (i, j) is

    scale * q_i . k_j                            if the pair of their blocks (x, y) is selected,
    scale * mean(q in x) . mean(k in y)          otherwise.

Blocks x hold `block_size` queries, blocks y `key_block_size` keys.

MRA-2-s leaves the second kind out. (ICML 2022, section 4, R = {32, 1}.)

A distance bias adds b_|x - y| to both, y counted in blocks of `block_size`: it is the same for all
token pairs of a block pair, so that the low resolution loses nothing of it.
"""

import torch
from torch import Tensor

from .blocks import (
    bias_of_pairs,
    block_means,
    compute_dtype,
    first_tokens,
    mask_to_blocks,
    repeat_columns,
    to_blocks,
    upsample,
)


def attention_matrix(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor,
    distance_bias: Tensor | None = None,
    *,
    scale: float,
    sparse: bool,
    block_size: int,
    key_block_size: int | None = None,
    initial_prior_first_n_blocks: int = 0,
) -> Tensor:
    """Return the row-normalised matrix A-hat `[B, H, N, N]`, float32 (float64 for float64).

    Args:
        query, key: `[B, H, N, D]`.
        token_mask: `[B, N]` bool, or None when every token is real.
        blocks: `[B, H, R, C]` bool, the pairs in high resolution, C = R * M / W; R may exceed
            ceil(N / block_size).
        distance_bias: `[H, K]`, or None for 0; see `blocks.bias_of_pairs`.
        scale: factor of the logits.
        sparse: True for MRA-2-s.
        block_size: M, queries per block.
        key_block_size: W, keys per block; None is M.
        initial_prior_first_n_blocks: live block rows and columns that take no bias.

    Rows of padding, and rows that have nothing to attend to, are zero.
    """
    batch, length = query.shape[0], query.shape[2]
    n_blocks, n_key_blocks = blocks.shape[-2:]
    key_block_size = key_block_size or block_size
    dtype, device = compute_dtype(query.dtype), query.device
    real_queries = mask_to_blocks(
        token_mask, batch, length, block_size, n_blocks, device
    )  # [B, R, M]
    real_keys = mask_to_blocks(
        token_mask, batch, length, key_block_size, n_key_blocks, device
    )  # [B, C, W]
    query_blocks = to_blocks(query.to(dtype), token_mask, block_size, n_blocks)  # [B, H, R, M, D]
    key_blocks = to_blocks(
        key.to(dtype), token_mask, key_block_size, n_key_blocks
    )  # [B, H, C, W, D]

    exact = scale * query_blocks.flatten(2, 3) @ key_blocks.flatten(2, 3).mT  # [B, H, R * M, C * W]
    high = upsample(blocks, block_size, key_block_size)
    if distance_bias is not None:
        bias = bias_of_pairs(
            distance_bias.to(dtype), real_queries.any(-1), initial_prior_first_n_blocks
        )  # [B, H, R, R]
        exact = exact + upsample(bias, block_size)
    if sparse:
        logits = exact.masked_fill(~high, -torch.inf)
    else:
        query_means = block_means(query_blocks, real_queries.sum(-1))
        key_means = block_means(key_blocks, real_keys.sum(-1))
        coarse = scale * query_means @ key_means.mT  # [B, H, R, C]
        if distance_bias is not None:
            coarse = coarse + repeat_columns(bias, block_size // key_block_size)
        logits = torch.where(high, exact, upsample(coarse, block_size, key_block_size))

    return softmax_over_real(logits, real_queries.flatten(1), length)


def softmax_over_real(logits: Tensor, real_tokens: Tensor, length: int) -> Tensor:
    """Softmax over real keys: logits `[B, H, P, P]` and real tokens `[B, P]` bool of a padded
    length P -> `[B, H, N, N]`. Rows of padding, and rows without a finite logit, are zero.
    """
    logits = logits.masked_fill(~real_tokens[:, None, None, :], -torch.inf)
    logits = first_tokens(first_tokens(logits, 2, length), 3, length)
    real_tokens = first_tokens(real_tokens, 1, length)
    nothing = (logits == -torch.inf).all(-1, keepdim=True) | ~real_tokens[:, None, :, None]
    return torch.softmax(logits.masked_fill(nothing, 0), dim=-1).masked_fill(nothing, 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor,
    distance_bias: Tensor | None = None,
    **settings,
) -> Tensor:
    """Return A-hat @ value, `[B, H, N, D]` in the dtype of `value`. Arguments and settings as in
    `attention_matrix`.
    """
    matrix = attention_matrix(query, key, token_mask, blocks, distance_bias, **settings)
    return apply_matrix(matrix, value, token_mask)


def apply_matrix(matrix: Tensor, value: Tensor, token_mask: Tensor | None) -> Tensor:
    """A-hat `[B, H, N, N]` times value, `[B, H, N, D]` in the dtype of `value`; 0 at padding."""
    real_value = value.to(matrix.dtype)
    if token_mask is None:
        return (matrix @ real_value).to(value.dtype)
    padding = ~token_mask[:, None, :, None]
    # Filled before and after: NaN in padding reaches no real token, forward or backward.
    output = matrix @ real_value.masked_fill(padding, 0)
    return output.masked_fill(padding, 0).to(value.dtype)
