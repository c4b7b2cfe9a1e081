"""Attention as a product of thin matrices: linear attention, Performer and Linformer.

Queries, keys and values are `[B, H, N, D]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Added to the denominators of linear attention, as in its authors' code.
_EPSILON = 1e-6


def linear(query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Kernelized attention with ELU + 1 (Katharopoulos et al. 2020, the Linear Transformer).

    Args:
        query, key, value: `[B, H, N, D]`.
        token_mask: `[B, N]` bool or None; padding is not attended to.
    """
    query, key = (F.elu(x) + 1 for x in (query, key))
    key = _masked(key, token_mask, 0)
    numerator = query @ (key.mT @ _masked(value, token_mask, 0))
    return numerator / (query @ key.sum(-2).unsqueeze(-1) + _EPSILON)


def performer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    size: int,
    seed: int = 0,
    token_mask: Tensor | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    """`size` positive orthogonal random features (Choromanski et al. 2021, FAVOR+).

    The published comparisons divide queries and keys by the square root of the head dim twice and
    count padding in the denominator; this function does neither.

    Args:
        query, key, value: `[B, H, N, D]`.
        scale: factor of the logits.
        size: number of features.
        seed: of the features.
        token_mask: `[B, N]` bool or None; padding is not attended to.
        directions: `[features, D]` from `orthogonal_directions`; replaces size and seed.
    """
    if directions is None:
        directions = orthogonal_directions(size, query.shape[-1], seed).to(query)

    def log_features(x: Tensor) -> Tensor:
        x = x * scale**0.5
        return x @ directions.T - 0.5 * (x * x).sum(-1, keepdim=True)

    # One factor per query row, and one for all keys of a head, cancel in the quotient.
    log_query = log_features(query)
    log_key = _masked(log_features(key), token_mask, torch.finfo(query.dtype).min / 2)
    query_features = (log_query - log_query.amax(-1, keepdim=True)).exp()
    key_features = (log_key - log_key.amax((-2, -1), keepdim=True)).exp()
    key_features = _masked(key_features, token_mask, 0)
    numerator = query_features @ (key_features.mT @ _masked(value, token_mask, 0))
    denominator = query_features @ key_features.sum(-2).unsqueeze(-1)
    return numerator / denominator.clamp_min(torch.finfo(query.dtype).tiny)


def orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """`[count, dim]`, orthogonal in groups of `dim` rows, with the norms of Gaussian vectors."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // dim)):
        gaussian = torch.randn(dim, dim, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    lengths = torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths


def linformer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    size: int,
    seed: int = 0,
    projection: Tensor | None = None,
) -> Tensor:
    """Keys and values projected to `size` rows (Wang et al. 2020).

    A Linformer learns the projection. A random one, as in the MRA paper's Table 7, approximates
    nothing, as that table shows.

    Args:
        query, key, value: `[B, H, N, D]`, zero at padding.
        scale: factor of the logits.
        size: rows of a random projection.
        seed: of a random projection.
        projection: `[size, N]` or `[H, size, N]`; replaces size and seed.
    """
    if projection is None:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(size, key.shape[2], generator=generator) / size**0.5
    projection = projection.to(query)
    return torch.softmax(query @ (projection @ key).mT * scale, dim=-1) @ (projection @ value)


def _masked(x: Tensor, token_mask: Tensor | None, value: float) -> Tensor:
    return x if token_mask is None else x.masked_fill(~token_mask[:, None, :, None], value)
