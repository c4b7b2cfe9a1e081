"""The general scheme (ICML 2022, Algorithms 1 and 2): any chain of scales, without an N x N buffer.

With the scales s_0 > s_1 > ... > s_k, each dividing the one before, the matrix is first covered by
blocks of side s_0. On every level the best blocks are cut into blocks of the next scale. What is
left in the end covers every entry once, and each block contributes the product of its means. The
states of an online softmax are carried from coarse rows to finer ones: maximum, denominator,
numerator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import (
    PART_BYTES,
    block_means,
    compute_dtype,
    count_blocks,
    is_exporting,
    mask_to_blocks,
    to_blocks,
)
from .selection import best_keys, score_dtype, select, sort_keys


def fit_scales(resolutions: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The same scales with no block that is mostly beyond `length` tokens.

    A block of which the tokens are only a part is the same with less of the rest: its mean, and its
    children that hold tokens.
    """
    fitted: list[int] = []
    for size in reversed(resolutions):
        finer = fitted[-1] if fitted else 1
        fitted.append(min(size, count_blocks(length, finer) * finer))
    return tuple(reversed(fitted))


@dataclass(frozen=True)
class Scheme:
    """What `multiresolution_attention` was asked for, checked.

    Args:
        resolutions: s_0 > ... > s_k.
        block_budgets: pairs of blocks per head that are cut on the levels 0 to k - 1.
        initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks: of level 0.
        rule: "row_normalized" or "global".
        scale: factor of the logits.
        sparse: only blocks of the scale s_k contribute.
    """

    resolutions: tuple[int, ...]
    block_budgets: tuple[int, ...]
    initial_prior_first_n_blocks: int
    initial_prior_diagonal_n_blocks: int
    rule: str
    scale: float
    sparse: bool

    def padded_length(self, length: int) -> int:
        blocks = count_blocks(length, self.resolutions[0])
        if is_exporting():  # as `select` counts them there
            blocks = length // self.resolutions[0] + 2
        return blocks * self.resolutions[0]

    def select_first(self, query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor:
        """The blocks of scale s_0 that are cut, `[B, H, R, R]` bool."""
        return select(
            query,
            key,
            token_mask,
            block_per_row=1,
            block_budget=self.block_budgets[0],
            block_size=self.resolutions[0],
            initial_prior_first_n_blocks=self.initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=self.initial_prior_diagonal_n_blocks,
            rule=self.rule,
            scale=self.scale,
            traceable=is_exporting(),
            reads_mask=not torch.compiler.is_compiling(),
        )


class Level:
    """Blocks of one scale: R = padded length / scale, and the real tokens in each, `[B, R]`."""

    def __init__(
        self, size: int, padded: int, token_mask: Tensor | None, shape: torch.Size, device
    ):
        self.size, self.n_blocks, self.token_mask = size, padded // size, token_mask
        real = mask_to_blocks(token_mask, shape[0], shape[2], size, self.n_blocks, device)
        self.tokens, self.counts = real.flatten(1), real.sum(-1)

    def means(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Means over the real tokens of the blocks: `[B, H, N, D]` -> `[B, H, R, D]`."""
        blocks = to_blocks(x, self.token_mask, self.size, self.n_blocks)
        return block_means(blocks, self.counts, dtype)


def levels_of(scheme: Scheme, x: Tensor, token_mask: Tensor | None) -> list[Level]:
    padded = scheme.padded_length(x.shape[2])
    return [Level(size, padded, token_mask, x.shape, x.device) for size in scheme.resolutions]


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
    chosen = torch.zeros_like(live)
    if not is_last:
        chosen = scheme.select_first(query.detach(), key.detach(), token_mask)
    if is_last or not scheme.sparse:
        logits = scheme.scale * coarse.means(query) @ coarse.means(key).mT
        state.add_all(
            logits.flatten(0, 1),
            (live & ~chosen).flatten(0, 1),
            _per_head(coarse.counts, heads),
            coarse.means(value).flatten(0, 1),
        )
    if not is_last:
        width = min(scheme.block_budgets[0], coarse.n_blocks**2)
        # uint8, so that the indices of True come first.
        found, places = chosen.flatten(2).flatten(0, 1).to(torch.uint8).topk(width, dim=-1)
        pairs = _Pairs(places // coarse.n_blocks, places % coarse.n_blocks, found > 0)
    for number, level in enumerate(levels[1:], 1):
        is_last = number == len(levels) - 1
        children = _Children(levels[number - 1], level, pairs, heads)
        state.refine(children.factor)
        chosen = None
        if not is_last:
            pairs, chosen = _choose(
                children, query, key, scheme, scheme.block_budgets[number], level
            )
        if is_last or not scheme.sparse:
            members = children.live if chosen is None else children.live & ~chosen
            means = (level.means(x).flatten(0, 1) for x in (query, key, value))
            state.add_pairs(children, members, *means, scheme.scale)
    return _finish(state, levels[-1], query.shape, token_mask, value.dtype)


@dataclass
class _Pairs:
    """Pairs of blocks, `[G, m]` each (G = B H): row, column, and whether the pair is one at all."""

    row: Tensor
    column: Tensor
    real: Tensor


class _Children:
    """The blocks that cut pairs fall into: `factor` rows and columns of each, `[G, m, f, f]`."""

    def __init__(self, parent: Level, level: Level, pairs: _Pairs, heads: int):
        self.factor = parent.size // level.size
        self.n_parents, self.n_blocks = parent.n_blocks, level.n_blocks
        self.pairs = pairs
        within = torch.arange(self.factor, device=pairs.row.device)
        self.row = pairs.row[..., None] * self.factor + within  # [G, m, f]
        self.column = pairs.column[..., None] * self.factor + within
        counts = _per_head(level.counts, heads)
        self.column_counts = self._gather(counts, pairs.column)
        own = self._gather(counts, pairs.row) > 0
        self.live = own[..., None] & (self.column_counts > 0)[..., None, :]
        self.live = self.live & pairs.real[..., None, None]

    def rows(self, x: Tensor, some: slice) -> Tensor:
        """Rows of some pairs: `[G, R, D]` -> `[G, m, f, D]`."""
        return self._gather(x, self.pairs.row[:, some])

    def columns(self, x: Tensor, some: slice) -> Tensor:
        return self._gather(x, self.pairs.column[:, some])

    def parts(self, dim: int) -> list[slice]:
        """Pairs to work on one after another; all at once but on a CPU."""
        groups, pairs, factor = self.row.shape
        if self.row.device.type != "cpu" or torch.compiler.is_compiling():
            return [slice(None)]
        some = max(1, PART_BYTES // max(1, 4 * groups * factor * max(dim, factor)))
        return [slice(first, first + some) for first in range(0, pairs, some)]

    def _gather(self, x: Tensor, parents: Tensor) -> Tensor:
        """`[G, R, ...]` -> `[G, m, f, ...]`, the blocks of `parents` `[G, m]`."""
        groups = x.shape[0]
        first = torch.arange(groups, device=x.device)[:, None] * self.n_parents
        blocks = x.reshape(groups * self.n_parents, self.factor, *x.shape[2:])
        picked = blocks.index_select(0, (first + parents).flatten())
        return picked.unflatten(0, parents.shape)


class _State:
    """The online softmax of every row of blocks: maximum and denominator `[G, R]`, numerator
    `[G, R, D]`.
    """

    def __init__(self, groups: int, rows: int, dim: int, dtype: torch.dtype, device):
        self.lowest = torch.finfo(dtype).min / 4  # differences of two stay finite
        self.largest = torch.full((groups, rows), self.lowest, dtype=dtype, device=device)
        self.denominator = torch.zeros(groups, rows, dtype=dtype, device=device)
        self.numerator = torch.zeros(groups, rows, dim, dtype=dtype, device=device)

    def refine(self, factor: int) -> None:
        """Go to rows of the next scale: each is repeated `factor` times."""
        self.largest = self.largest.repeat_interleave(factor, 1)
        self.denominator = self.denominator.repeat_interleave(factor, 1)
        self.numerator = self.numerator.repeat_interleave(factor, 1)

    def add_all(self, logits: Tensor, members: Tensor, counts: Tensor, values: Tensor) -> None:
        """Add the members among all pairs: `[G, R, R]` logits, `[G, R]` counts, `[G, R, D]` means
        of values.
        """
        logits = logits.masked_fill(~members, self.lowest)
        self._raise(logits.detach().amax(-1))
        weights = torch.exp(logits - self.largest[..., None]) * members
        weights = weights * counts[:, None, :]
        self.denominator = self.denominator + weights.sum(-1)
        self.numerator = self.numerator + weights @ values

    def add_pairs(
        self,
        children: _Children,
        members: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> None:
        """Add the members among the children, `[G, m, f, f]`; query, key and value are the means of
        their blocks, `[G, R, D]`.
        """
        parts = children.parts(query.shape[-1])
        all_logits = []
        largest = torch.full_like(self.largest, self.lowest)
        for some in parts:
            logits = scale * children.rows(query, some) @ children.columns(key, some).mT
            logits = logits.masked_fill(~members[:, some], self.lowest)
            row = children.row[:, some].flatten(1)
            largest.scatter_reduce_(1, row, logits.detach().amax(-1).flatten(1), "amax")
            all_logits.append(logits)
        self._raise(largest)
        for some, logits in zip(parts, all_logits, strict=True):
            row = children.row[:, some].flatten(1)  # [G, m f]
            own = self.largest.gather(1, row).view(logits.shape[:-1])
            weights = torch.exp(logits - own[..., None]) * members[:, some]
            weights = weights * children.column_counts[:, some, None, :]
            sums = (weights @ children.columns(value, some)).flatten(1, 2)
            # In place: _raise has made tensors of this call.
            self.denominator.scatter_add_(1, row, weights.sum(-1).flatten(1))
            self.numerator.scatter_add_(1, row[..., None].expand_as(sums), sums)

    def _raise(self, largest: Tensor) -> None:
        """Refer to a larger maximum. It cancels in the end and has no gradient."""
        largest = torch.maximum(self.largest, largest)
        rescale = torch.exp(self.largest - largest)
        self.denominator = self.denominator * rescale
        self.numerator = self.numerator * rescale[..., None]
        self.largest = largest


def _choose(
    children: _Children, query: Tensor, key: Tensor, scheme: Scheme, budget: int, level: Level
) -> tuple[_Pairs, Tensor]:
    """The best `budget` children per head, and where they are: `[G, m, f, f]` bool."""
    with torch.no_grad():
        dtype = score_dtype(query)
        own = children.rows(level.means(query, dtype).flatten(0, 1), slice(None))
        gathered = children.columns(level.means(key, dtype).flatten(0, 1), slice(None))
        scores = (own @ gathered.mT * scheme.scale).float()
        row = children.row[..., :, None].expand(scores.shape)
        column = children.column[..., None, :].expand(scores.shape)
        if scheme.rule == "row_normalized":
            hidden = scores.masked_fill(~children.live, -torch.inf)
            largest = scores.new_full((scores.shape[0], children.n_blocks), -torch.inf)
            own_row = children.row.flatten(1)
            largest.scatter_reduce_(1, own_row, hidden.amax(-1).flatten(1), "amax")
            scores = scores - largest.gather(1, own_row).view(*scores.shape[:-1], 1)
        keys = sort_keys(scores, row, column, children.n_blocks)
        keys = torch.where(children.live, keys, -1).flatten(1)
        real, places = best_keys(keys, budget)
        chosen = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, places, real)
        pairs = _Pairs(row.flatten(1).gather(1, places), column.flatten(1).gather(1, places), real)
        return pairs, chosen.view(children.live.shape)


def _finish(
    state: _State, level: Level, shape: torch.Size, token_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rows of the last scale to tokens; 0 where nothing is attended to, and at padding."""
    some = state.denominator > 0
    denominator = torch.where(some, state.denominator, 1)
    output = torch.where(some[..., None], state.numerator / denominator[..., None], 0)
    output = output.repeat_interleave(level.size, 1)[:, : shape[2]].unflatten(0, shape[:2])
    if token_mask is not None:
        output = output.masked_fill(~token_mask[:, None, :, None], 0)
    return output.to(dtype)


def _per_head(counts: Tensor, heads: int) -> Tensor:
    """`[B, R]` -> `[G, R]`."""
    return counts[:, None].expand(-1, heads, -1).flatten(0, 1)
