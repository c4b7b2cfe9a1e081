"""The best sparse and the best low-rank approximation, at any cost (ICML 2022 paper, section 3).

Both are computed from the softmax matrix itself.
"""

import torch
from torch import Tensor

from mra_hf.baselines.measures import attention_weights


def optimal_sparse(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """The largest `size * N` entries of the softmax matrix of a head, with rows normalised again.

    A row without such an entry gives zeros.
    """
    return _per_head(query, key, value, scale, lambda weights: largest_entries(weights, size))


def truncated_svd(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """The best approximation of the softmax matrix of rank `size` (Eckart and Young 1936)."""
    return _per_head(query, key, value, scale, lambda weights: low_rank(weights, size))


def largest_entries(weights: Tensor, per_row: int) -> Tensor:
    """`weights` `[N, N]` with only its largest `per_row * N` entries, rows normalised."""
    entries = weights.flatten()
    kept = entries.topk(min(weights.numel(), per_row * weights.shape[0])).indices
    sparse = torch.zeros_like(entries)
    sparse[kept] = entries[kept]
    sparse = sparse.view_as(weights)
    sums = sparse.sum(-1, keepdim=True)
    return torch.where(sums > 0, sparse / sums, 0.0)


def low_rank(weights: Tensor, rank: int) -> Tensor:
    """The matrix of this rank that is nearest to `weights` `[N, N]`."""
    left, singular, right = torch.linalg.svd(weights, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def _per_head(query, key, value, scale, approximate) -> Tensor:
    """`approximate(softmax matrix [N, N]) @ value`, one head at a time."""
    output = torch.empty_like(value)
    for sample, head in torch.cartesian_prod(*map(torch.arange, query.shape[:2])).tolist():
        at = (sample, head)
        weights = attention_weights(query[at][None, None], key[at][None, None], scale)[0, 0]
        output[at] = approximate(weights) @ value[at]
    return output
