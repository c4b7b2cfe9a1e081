"""Methods that replace the N x N matrix by a product of thin ones: Performer and Linformer."""

import torch
from torch import Tensor


def performer(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """`size` positive orthogonal random features (Choromanski et al. 2021, FAVOR+).

    The published comparisons divide queries and keys by the root of the head dim twice; here once.
    """
    directions = _orthogonal_directions(size, query.shape[-1], seed).to(query)

    def log_features(x: Tensor) -> Tensor:
        x = x * scale**0.5
        return x @ directions.T - 0.5 * (x * x).sum(-1, keepdim=True)

    # A factor for each row of the queries, and one for all keys of a head, cancel in the quotient.
    log_query, log_key = log_features(query), log_features(key)
    query_features = (log_query - log_query.amax(-1, keepdim=True)).exp()
    key_features = (log_key - log_key.amax((-2, -1), keepdim=True)).exp()
    numerator = query_features @ (key_features.mT @ value)
    denominator = query_features @ key_features.sum(-2).unsqueeze(-1)
    return numerator / denominator.clamp_min(torch.finfo(query.dtype).tiny)


def _orthogonal_directions(count: int, dim: int, seed: int) -> Tensor:
    """`[count, dim]`, orthogonal within each `dim` rows, with the lengths of Gaussian vectors."""
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

    The projection is learned in a Linformer. Drawn at random, as in the paper's Table 7, it is not
    an approximation of anything, which that table shows.

    Args:
        projection: `[size, N]`, in place of a random one.
    """
    if projection is None:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(size, key.shape[2], generator=generator) / size**0.5
    projection = projection.to(query)
    return torch.softmax(query @ (projection @ key).mT * scale, dim=-1) @ (projection @ value)
