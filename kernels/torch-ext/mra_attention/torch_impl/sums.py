"""Sums in a fixed order: two runs give the same bits on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_by_distance(pairs: Tensor) -> Tensor:
    """`[H, R, R]` summed over the pairs (x, y) at each distance abs(x - y): `[H, R]`, in order."""
    heads, rows, _ = pairs.shape
    # Rows of the mirrored matrix, each shifted by one more: column R - 1 + x - y.
    shifted = F.pad(pairs.flip(-1), (0, rows)).flatten(1)[:, :-rows].view(heads, rows, -1)
    by_offset = shifted.sum(1)
    sums = by_offset[:, rows - 1 :].clone()
    sums[:, 1:] += by_offset[:, : rows - 1].flip(-1)
    return sums


def add_blocks_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`target[index[i]] += source[i]` in a fixed order, on every device: two runs give the same
    bits.
    """
    if target.device.type == "cpu":
        target.index_add_(0, index, source)  # sequential on a CPU
    else:
        add_sorted_blocks_(target, index, source)


def add_sorted_blocks_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`add_blocks_` without atomics: one sum per run of equal indices, after a stable sort."""
    index, order = index.sort(stable=True)
    targets, lengths = index.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(source[order].flatten(1), "sum", lengths=lengths)
    target[targets] += sums.view(-1, *target.shape[1:])
