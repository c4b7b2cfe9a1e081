"""The best that a sparse and a low-rank matrix can do, whatever it costs (ICML 2022 paper, section
3): both are made from the softmax matrix itself.
"""

import torch
from torch import Tensor

from mra_hf.baselines.measures import attention_weights


def optimal_sparse(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """The largest `size * N` entries of the softmax matrix of a head, rows summing to one again.

    A row without any gives zeros.
    """
    return _of_each_head(query, key, value, scale, lambda weights: largest_entries(weights, size))


def truncated_svd(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """The best approximation of the softmax matrix of rank `size` (Eckart and Young 1936)."""
    return _of_each_head(query, key, value, scale, lambda weights: of_rank(weights, size))


def largest_entries(weights: Tensor, per_row: int) -> Tensor:
    """`weights` `[N, N]` without all but its largest `per_row * N` entries, rows normalised."""
    kept = min(weights.numel(), per_row * weights.shape[0])
    chosen = weights.flatten().topk(kept).indices
    sparse = torch.zeros_like(weights).flatten()
    sparse[chosen] = weights.flatten()[chosen]
    sparse = sparse.view_as(weights)
    sums = sparse.sum(-1, keepdim=True)
    return torch.where(sums > 0, sparse / sums, 0.0)


def of_rank(weights: Tensor, rank: int) -> Tensor:
    """The matrix of rank `rank` nearest to `weights` `[N, N]`."""
    left, singular, right = torch.linalg.svd(weights, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def _of_each_head(query, key, value, scale, approximate) -> Tensor:
    output = torch.empty_like(value)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:2])).tolist():
        place = tuple(at)
        weights = attention_weights(query[place][None, None], key[place][None, None], scale)[0, 0]
        output[place] = approximate(weights) @ value[place]
    return output
