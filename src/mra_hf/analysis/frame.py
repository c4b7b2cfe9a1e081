"""The frame of the paper, for study: exact coefficients, the Haar basis, and the error bounds.

A component `(scale, row, column)` is the n x n matrix that is 1 on block (row, column) of side
`scale` and 0 elsewhere (MRA paper, ICML 2022). Components of one scale tile the matrix; components
of different scales are nested or disjoint. This module is written for reading and for tests: its
matrices are dense n x n; use float64. With P the logits, A = exp(P) is approximated *without*
normalising its rows, as in the paper's statements.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mra_attention.checks import check_int


class Component(NamedTuple):
    """A component of the frame, 1 on its block and 0 elsewhere.

    Args:
        scale: side of the block, in tokens.
        row: number of its block row, from 0.
        column: number of its block column, from 0.
    """

    scale: int
    row: int
    column: int

    @property
    def support(self) -> tuple[slice, slice]:
        """The rows and columns of its block, as slices."""
        rows, columns = self.row * self.scale, self.column * self.scale
        return slice(rows, rows + self.scale), slice(columns, columns + self.scale)


def components(size: int) -> Iterator[Component]:
    """All components of scales 1, 2, 4, ..., `size`: (4 size^2 - 1) / 3 of them.

    Raises:
        ValueError: `size` is not a power of 2.
    """
    _check_power_of_2(size)
    scale = size
    while scale:
        blocks = range(size // scale)
        yield from (Component(scale, row, column) for row in blocks for column in blocks)
        scale //= 2


def exact_coefficients(matrix: Tensor, members: Sequence[Component]) -> list[float]:
    """The coefficient of each component, in the order given (eq. 2): from coarse to fine, the mean
    over its block of the residual that the coarser components leave of the matrix.

    Args:
        matrix: `[n, n]`.
        members: distinct components, in any order.

    Raises:
        ValueError: a component that does not belong to a matrix of this side.
    """
    _check_components(members, matrix.shape[0])
    residual = matrix.clone()
    coefficients: dict[Component, float] = {}
    for scale in sorted({component.scale for component in members}, reverse=True):
        # Components of one scale do not overlap, so their order does not matter.
        for component in members:
            if component.scale == scale:
                coefficients[component] = residual[component.support].mean().item()
                residual[component.support] -= coefficients[component]
    return [coefficients[component] for component in members]


def combine(coefficients: Sequence[float], members: Sequence[Component], size: int) -> Tensor:
    """The sum of components times their coefficients, `[size, size]` float64.

    Raises:
        ValueError: a component that does not belong to a matrix of this side, or another number of
            coefficients than components.
    """
    _check_components(members, size)
    result = torch.zeros(size, size, dtype=torch.float64)
    for coefficient, component in zip(coefficients, members, strict=True):
        result[component.support] += coefficient
    return result


def smallest_support_means(matrix: Tensor, members: Sequence[Component]) -> Tensor:
    """Every entry replaced by the mean of `matrix` over the smallest component that covers it, 0
    where none does. The components times their `exact_coefficients` add up to this matrix.

    Raises:
        ValueError: a component that does not belong to a matrix of this side.
    """
    _check_components(members, matrix.shape[0])
    result = torch.zeros_like(matrix)
    for component in sorted(members, key=lambda component: -component.scale):
        result[component.support] = matrix[component.support].mean()
    return result


def block_means(matrix: Tensor, scale: int) -> Tensor:
    """Means over blocks of side `scale`: `[n, n]` -> `[n / scale, n / scale]`."""
    blocks = matrix.shape[0] // scale
    return matrix.reshape(blocks, scale, blocks, scale).mean((1, 3))


def block_ranges(matrix: Tensor, scale: int) -> Tensor:
    """Largest minus smallest entry in blocks of side `scale`, `[n / scale, n / scale]`."""
    blocks = matrix.shape[0] // scale
    tiles = matrix.reshape(blocks, scale, blocks, scale)
    return tiles.amax((1, 3)) - tiles.amin((1, 3))


def jensen_factor(value_range: Tensor) -> Tensor:
    """C_r = (e^(r/2) - 1)^2 of the paper's lemma: if the logits of a block lie within r of each
    other, the mean of their exponentials exceeds mu, the exponential of their mean, by at most
    C_r mu.
    """
    return (torch.exp(value_range / 2) - 1) ** 2


def range_from_norms(query: Tensor, key: Tensor, p: float = 2.0) -> float:
    """A bound on the range of `query @ key.T` from norms (after the lemma): 2 beta_1 beta_2, where
    beta_1 is the largest p-norm of a row, beta_2 the largest q-norm of a difference of two rows of
    `query` or of two rows of `key`, and 1/p + 1/q = 1.

    Args:
        query, key: `[block, d]`.
        p: 1 or more, infinity allowed.
    """
    q = conjugate(p)
    largest = max(torch.linalg.vector_norm(x, p, dim=-1).max().item() for x in (query, key))
    differences = ((x[:, None] - x[None, :]) for x in (query, key))
    return (
        2 * largest * max(torch.linalg.vector_norm(x, q, dim=-1).max().item() for x in differences)
    )


def conjugate(p: float) -> float:
    """q with 1/p + 1/q = 1.

    Raises:
        ValueError: p below 1.
    """
    if not p >= 1:
        raise ValueError(f"p must be 1 or more, got {p!r}.")
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1)


def tile_error_bound(logits: Tensor, tiles: Sequence[Component]) -> Tensor:
    """A bound on the relative error of approximating A = exp(P) by mu on every tile.

    sqrt(sum over tiles of s^2 C_2r mu^2) / ||A||_F, where r is the range of the logits within the
    tile: the paper's proposition, sharpened to these tiles and extended to several scales.

    Args:
        logits: P `[n, n]`.
        tiles: components that cover every entry once.

    Raises:
        ValueError: components that do not cover every entry once.
    """
    _check_components(tiles, logits.shape[0])
    if sum(tile.scale**2 for tile in tiles) != logits.numel():
        raise ValueError("tiles must cover every entry of the logits once.")
    total = logits.new_zeros(())
    for tile in tiles:
        block = logits[tile.support]
        spread = block.max() - block.min()
        total = total + tile.scale**2 * jensen_factor(2 * spread) * torch.exp(2 * block.mean())
    return (total / torch.exp(2 * logits).sum()).sqrt()


def two_scale_error_bound(logits: Tensor, block_size: int, budget: int) -> Tensor:
    """The paper's proposition for the scales {block_size, 1}: a bound on ||A-hat - A|| / ||A||.

    sqrt((n^2 - m b^2) C_2r delta^2 / sum exp(2 P)), where delta is the m-th largest mu and r the
    largest range of logits in a block that is not refined. It holds if blocks are ranked by mu
    (`selection="global"`, no priors).

    Args:
        logits: P `[n, n]`, n divisible by `block_size`.
        budget: m, refined blocks, from 1 to all (n / b)^2.

    Raises:
        ValueError: a budget out of range, or a side that `block_size` does not divide.
    """
    size = logits.shape[0]
    check_int("block_size", block_size, 1, size)
    if size % block_size:
        raise ValueError(f"block_size must divide the side {size}, got {block_size}.")
    check_int("budget", budget, 1, (size // block_size) ** 2)
    means = block_means(logits, block_size).flatten()
    order = means.argsort(descending=True)
    delta = means[order[budget - 1]].exp()
    ranges = block_ranges(logits, block_size).flatten()[order[budget:]]
    spread = ranges.max() if ranges.numel() else logits.new_zeros(())
    coarse_entries = size**2 - budget * block_size**2
    return (
        coarse_entries * jensen_factor(2 * spread) * delta**2 / torch.exp(2 * logits).sum()
    ).sqrt()


def haar_2d(matrix: Tensor) -> Tensor:
    """The orthonormal square Haar transform of `[n, n]`, n a power of 2 (details of all levels).

    A step maps each cell (a b; c d) to (a+b+c+d)/2 and three details; the next step works on the
    quarter that holds the sums. The result holds the constant at [0, 0] and the details of each
    level in the three quarters around the coarser levels.

    Raises:
        ValueError: not square, or the side not a power of 2.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}.")
    _check_power_of_2(matrix.shape[0])
    result = matrix.clone()
    size = matrix.shape[0]
    while size > 1:
        result[:size, :size] = _haar_rows(_haar_rows(result[:size, :size]).T).T
        size //= 2
    return result


def inverse_haar_2d(coefficients: Tensor) -> Tensor:
    """The matrix with these `haar_2d` coefficients."""
    _check_power_of_2(coefficients.shape[0])
    result = coefficients.clone()
    size = 2
    while size <= coefficients.shape[0]:
        result[:size, :size] = _inverse_haar_rows(_inverse_haar_rows(result[:size, :size].T).T)
        size *= 2
    return result


def haar_details(x: Tensor) -> Tensor:
    """Details of one Haar step along the rows: (x[2i] - x[2i + 1]) / sqrt(2), `[n, ...]` ->
    `[n / 2, ...]`.
    """
    return (x[0::2] - x[1::2]) / math.sqrt(2)


def haar_sums(x: Tensor) -> Tensor:
    """Sums of one Haar step along the rows: (x[2i] + x[2i + 1]) / sqrt(2)."""
    return (x[0::2] + x[1::2]) / math.sqrt(2)


def _haar_rows(x: Tensor) -> Tensor:
    return torch.cat([haar_sums(x), haar_details(x)])


def _inverse_haar_rows(x: Tensor) -> Tensor:
    sums, details = x.chunk(2)
    pairs = torch.stack([sums + details, sums - details], 1) / math.sqrt(2)
    return pairs.flatten(0, 1)


def _check_components(members: Sequence[Component], size: int) -> None:
    for component in members:
        scale, row, column = component
        if scale < 1 or size % scale or not (0 <= row < size // scale > column >= 0):
            raise ValueError(
                f"{component} is no component of a matrix of side {size}: "
                "the scale must divide it, and row and column count its blocks from 0."
            )


def _check_power_of_2(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise ValueError(f"the side must be a power of 2, got {size}.")
