"""The general scheme (ICML 2022, Algorithms 1 and 2): any chain of scales, without an N x N buffer.

With the scales s_0 > s_1 > ... > s_k, each dividing the one before, the matrix is first covered by
blocks of side s_0. On every level the best blocks are cut into blocks of the next scale. What is
left in the end covers every entry once, and each block contributes the product of its means. The
state of an online softmax (maximum, denominator, numerator) is carried from coarse rows to finer
ones. Below, G = B * H and f is the ratio of two scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import CHUNK_BYTES, compute_dtype
from .scheme import Level, Scheme, levels_of
from .selection import RULES, best_keys, score_dtype, sort_keys


def attention(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, scheme: Scheme
) -> Tensor:
    """`[B, H, N, D]` in the dtype of `value`; gradients by autograd, the choice of blocks fixed."""
    batch, heads, _, dim = query.shape
    levels = levels_of(scheme, query, token_mask)
    state = _State(batch * heads, levels[0].n_blocks, dim, compute_dtype(value.dtype), query.device)
    coarse, is_last = levels[0], len(levels) == 1
    live = (coarse.counts > 0)[:, None, :, None] & (coarse.counts > 0)[:, None, None, :]
    live = live.expand(-1, heads, -1, -1)
    cut = torch.zeros_like(live)
    if not is_last:
        cut = scheme.select_first(query.detach(), key.detach(), token_mask)
    if is_last or not scheme.sparse:
        logits = scheme.scale * coarse.means(query) @ coarse.means(key).mT
        state.add_all(
            logits.flatten(0, 1),
            (live & ~cut).flatten(0, 1),
            _per_head(coarse.counts, heads),
            coarse.means(value).flatten(0, 1),
        )
    if not is_last:
        width = min(scheme.block_budgets[0], coarse.n_blocks**2)
        # uint8, so that the indices of True come first.
        is_cut, indices = cut.flatten(2).flatten(0, 1).to(torch.uint8).topk(width, dim=-1)
        pairs = _Pairs(indices // coarse.n_blocks, indices % coarse.n_blocks, is_cut > 0)
    for number, level in enumerate(levels[1:], 1):
        is_last = number == len(levels) - 1
        children = _Children(levels[number - 1], level, pairs, heads)
        state.refine(children.factor)
        members = children.live
        if not is_last:
            budget = scheme.block_budgets[number]
            pairs, cut = _choose(children, query, key, scheme, budget, level)
            members = members & ~cut
        if is_last or not scheme.sparse:
            of_query, of_key, of_value = (level.means(x).flatten(0, 1) for x in (query, key, value))
            state.add_pairs(children, members, of_query, of_key, of_value, scheme.scale)
    return _finish(state, levels[-1], query.shape, token_mask, value.dtype)


@dataclass
class _Pairs:
    """Block pairs that are cut, `[G, m]` each: row, column, and whether there is a pair at all."""

    row: Tensor
    column: Tensor
    real: Tensor


class _Children:
    """The blocks that pairs are cut into, f rows and f columns of each pair.

    Attributes:
        factor: f.
        row, column: `[G, m, f]` int64, blocks of the finer scale.
        column_counts: `[G, m, f]`, real tokens of the columns.
        live: `[G, m, f, f]` bool, True where row and column hold a real token.
    """

    def __init__(self, parent: Level, level: Level, pairs: _Pairs, heads: int):
        self.factor = parent.size // level.size
        self.n_parents, self.n_blocks = parent.n_blocks, level.n_blocks
        self.pairs = pairs
        within = torch.arange(self.factor, device=pairs.row.device)
        self.row = pairs.row[..., None] * self.factor + within
        self.column = pairs.column[..., None] * self.factor + within
        counts = _per_head(level.counts, heads)
        self.column_counts = self._gather(counts, pairs.column)
        live_rows = self._gather(counts, pairs.row) > 0
        self.live = live_rows[..., None] & (self.column_counts > 0)[..., None, :]
        self.live = self.live & pairs.real[..., None, None]

    def rows(self, x: Tensor, chunk: slice) -> Tensor:
        """The rows of a chunk of pairs: `[G, R, D]` -> `[G, m, f, D]`."""
        return self._gather(x, self.pairs.row[:, chunk])

    def columns(self, x: Tensor, chunk: slice) -> Tensor:
        """The columns of a chunk of pairs: `[G, R, D]` -> `[G, m, f, D]`."""
        return self._gather(x, self.pairs.column[:, chunk])

    def chunks(self, dim: int) -> list[slice]:
        """Chunks of pairs to work on in turn; on any device but a CPU one chunk holds all."""
        groups, pairs, factor = self.row.shape
        if self.row.device.type != "cpu" or torch.compiler.is_compiling():
            return [slice(None)]
        size = max(1, CHUNK_BYTES // max(1, 4 * groups * factor * max(dim, factor)))
        return [slice(first, first + size) for first in range(0, pairs, size)]

    def _gather(self, x: Tensor, parents: Tensor) -> Tensor:
        """The blocks of `parents` `[G, m]`: `[G, R, ...]` -> `[G, m, f, ...]`."""
        groups = x.shape[0]
        first = torch.arange(groups, device=x.device)[:, None] * self.n_parents
        blocks = x.reshape(groups * self.n_parents, self.factor, *x.shape[2:])
        gathered = blocks.index_select(0, (first + parents).flatten())
        return gathered.unflatten(0, parents.shape)


class _State:
    """State of the online softmax of every block row: maximum and denominator `[G, R]`, numerator
    `[G, R, D]`.
    """

    def __init__(self, groups: int, rows: int, dim: int, dtype: torch.dtype, device):
        self.lowest = torch.finfo(dtype).min / 4  # the difference of two logits stays finite
        self.largest = torch.full((groups, rows), self.lowest, dtype=dtype, device=device)
        self.denominator = torch.zeros(groups, rows, dtype=dtype, device=device)
        self.numerator = torch.zeros(groups, rows, dim, dtype=dtype, device=device)

    def refine(self, factor: int) -> None:
        """Go to the rows of the next scale: repeat each row `factor` times."""
        self.largest = self.largest.repeat_interleave(factor, 1)
        self.denominator = self.denominator.repeat_interleave(factor, 1)
        self.numerator = self.numerator.repeat_interleave(factor, 1)

    def add_all(self, logits: Tensor, members: Tensor, counts: Tensor, values: Tensor) -> None:
        """Add the members among all pairs: logits `[G, R, R]`, counts `[G, R]`, means of values
        `[G, R, D]`.
        """
        logits = logits.masked_fill(~members, self.lowest)
        self._raise(logits.detach().amax(-1))
        weights = torch.exp(logits - self.largest[..., None]) * members
        weights = weights * counts[:, None, :]
        self.denominator = self.denominator + weights.sum(-1)
        self.numerator = self.numerator + weights @ values

    def add_pairs(self, children: _Children, members, query, key, value, scale: float) -> None:
        """Add the members among the children, `[G, m, f, f]` bool; query, key and value are block
        means, `[G, R, D]`.
        """
        chunks = children.chunks(query.shape[-1])
        all_logits = []
        largest = torch.full_like(self.largest, self.lowest)
        for chunk in chunks:
            logits = scale * children.rows(query, chunk) @ children.columns(key, chunk).mT
            logits = logits.masked_fill(~members[:, chunk], self.lowest)
            row = children.row[:, chunk].flatten(1)
            largest.scatter_reduce_(1, row, logits.detach().amax(-1).flatten(1), "amax")
            all_logits.append(logits)
        self._raise(largest)
        for chunk, logits in zip(chunks, all_logits, strict=True):
            row = children.row[:, chunk].flatten(1)  # [G, m f]
            row_largest = self.largest.gather(1, row).view(logits.shape[:-1])
            weights = torch.exp(logits - row_largest[..., None]) * members[:, chunk]
            weights = weights * children.column_counts[:, chunk, None, :]
            sums = (weights @ children.columns(value, chunk)).flatten(1, 2)
            # In place: `_raise` has just made these tensors.
            self.denominator.scatter_add_(1, row, weights.sum(-1).flatten(1))
            self.numerator.scatter_add_(1, row[..., None].expand_as(sums), sums)

    def _raise(self, largest: Tensor) -> None:
        """Raise the maximum. It cancels in the end and has no gradient."""
        largest = torch.maximum(self.largest, largest)
        rescale = torch.exp(self.largest - largest)
        self.denominator = self.denominator * rescale
        self.numerator = self.numerator * rescale[..., None]
        self.largest = largest


def _choose(
    children: _Children, query: Tensor, key: Tensor, scheme: Scheme, budget: int, level: Level
) -> tuple[_Pairs, Tensor]:
    """The best `budget` children per head, as pairs and as a mask `[G, m, f, f]` bool."""
    with torch.no_grad():
        dtype = score_dtype(query)
        row_means = children.rows(level.means(query, dtype).flatten(0, 1), slice(None))
        column_means = children.columns(level.means(key, dtype).flatten(0, 1), slice(None))
        scores = (row_means @ column_means.mT * scheme.scale).float()
        row = children.row[..., :, None].expand(scores.shape)
        column = children.column[..., None, :].expand(scores.shape)
        if RULES[scheme.rule].row_normalized:
            live_scores = scores.masked_fill(~children.live, -torch.inf)
            largest = scores.new_full((scores.shape[0], children.n_blocks), -torch.inf)
            flat_row = children.row.flatten(1)
            largest.scatter_reduce_(1, flat_row, live_scores.amax(-1).flatten(1), "amax")
            scores = scores - largest.gather(1, flat_row).view(*scores.shape[:-1], 1)
        keys = sort_keys(scores, row, column, children.n_blocks)
        keys = torch.where(children.live, keys, -1).flatten(1)
        real, indices = best_keys(keys, budget)
        cut = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, indices, real)
        row, column = (x.flatten(1).gather(1, indices) for x in (row, column))
        return _Pairs(row, column, real), cut.view(children.live.shape)


def _finish(
    state: _State, level: Level, shape: torch.Size, token_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Divide, and spread rows of the last scale over their tokens `[B, H, N, D]`; 0 at padding and
    where there is nothing to attend to.
    """
    attends = state.denominator > 0
    denominator = torch.where(attends, state.denominator, 1)
    output = torch.where(attends[..., None], state.numerator / denominator[..., None], 0)
    output = output.repeat_interleave(level.size, 1)[:, : shape[2]].unflatten(0, shape[:2])
    if token_mask is not None:
        output = output.masked_fill(~token_mask[:, None, :, None], 0)
    return output.to(dtype)


def _per_head(counts: Tensor, heads: int) -> Tensor:
    """`[B, R]` -> `[G, R]`."""
    return counts[:, None].expand(-1, heads, -1).flatten(0, 1)
