"""Dense attention, the error of an approximation of it, and the entropy of its rows."""

import torch
from torch import Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention `[B, H, N, D]`, the reference for all errors."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The softmax matrix `[B, H, N, N]`."""
    return torch.softmax(query @ key.mT * scale, dim=-1)


def relative_errors(output: Tensor, exact: Tensor) -> Tensor:
    """||output - exact|| / ||exact|| in the Frobenius norm for each head, `[B, H]`.

    Tables and figures show the mean of these ratios (ICML 2022 paper, section 5.1).
    """
    return (output - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))


def row_entropies(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean entropy of the rows of the softmax matrix in nats, for each head: `[B, H]`."""
    entropies = torch.empty(query.shape[:2])
    for instance in range(query.shape[0]):  # one instance at a time: the matrices are N x N
        log_weights = torch.log_softmax(query[instance] @ key[instance].mT * scale, dim=-1)
        entropies[instance] = -(log_weights.exp() * log_weights).sum(-1).mean(-1)
    return entropies
