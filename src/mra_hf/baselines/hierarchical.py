"""H-Transformer-1D (Zhu and Soricut 2021): multi-resolution attention in which only the
distance from the diagonal decides the resolution of a block.

This is the method as its paper describes it. The package of that name computes something else: it
adds levels without restoring their maxima, counts coarse keys once in the denominator, and lacks
the coarsest level.
"""

import torch
from torch import Tensor


def h_transformer(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """Blocks of `size` tokens on the diagonal are exact. Each further level pools pairs of tokens,
    and neighbouring blocks of `size` pooled tokens attend to each other.

    Raises:
        ValueError: the length is not `size` times a power of two.
    """
    length = query.shape[2]
    n_blocks = length // size
    if length % size or n_blocks & (n_blocks - 1):
        raise ValueError(
            f"the length must be the size (block) times a power of two, got {length} and {size}."
        )
    logits = _blocks(query, size) @ _blocks(key, size).mT * scale
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    output = (weights @ _blocks(value, size)).flatten(2, 3)
    total = weights.sum(-1, keepdim=True).flatten(2, 3)
    top = top.flatten(2, 3)
    level = 1
    while length // level > size:
        # Each block attends to the other one of its pair; a token here stands for `level` tokens.
        logits = _blocks(query, size) @ _siblings(_blocks(key, size)).mT * scale
        level_top = logits.amax(-1, keepdim=True)
        weights = (logits - level_top).exp()
        level_output = (weights @ _siblings(_blocks(value, size))).flatten(2, 3)
        level_total = level * weights.sum(-1, keepdim=True).flatten(2, 3)
        level_output, level_total, level_top = (
            x.repeat_interleave(level, dim=2)
            for x in (level_output, level_total, level_top.flatten(2, 3))
        )
        new_top = torch.maximum(top, level_top)
        old, new = (top - new_top).exp(), (level_top - new_top).exp()
        output = output * old + level_output * new
        total = total * old + level_total * new
        top = new_top
        query, key = (x.unflatten(2, (-1, 2)).mean(3) for x in (query, key))
        value = value.unflatten(2, (-1, 2)).sum(3)
        level *= 2
    return output / total


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.unflatten(2, (-1, size))


def _siblings(blocks: Tensor) -> Tensor:
    """The blocks with the two of each pair swapped."""
    return blocks.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)
