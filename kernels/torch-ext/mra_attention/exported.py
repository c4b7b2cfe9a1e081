"""MRA-2 and MRA-2-s as a graph of standard operators, for `torch.export` and ONNX.

Time and memory grow with the budget; of the N x N matrix only its R x C coarse image exists. Every
size is a polynomial in B and N, so that one graph takes every batch and every length from 2 on.

How many pairs a row of blocks gets is known only from values. The chosen pairs of each row are
therefore cut into items of S pairs, the last of which is filled up with pairs that count for
nothing: ceil(P_x / S) items for the P_x pairs of row x. With P pairs in all these are never more
than T = R + P // S, which is a size. An item is one softmax over its keys; items of one row and its
coarse part are merged by their maxima and sums, as blocks of keys are in online softmax.

Letters: B batch, H heads, N tokens, D head dim, M queries per block, R = ceil(N / M) + 1 blocks
(the last holds no token), W keys per key block, C = R * M / W key blocks, P pairs, S pairs
per item, T items.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import (
    bias_of_pairs,
    compute_dtype,
    count_exported_blocks,
    first_tokens,
    global_pairs,
    mask_to_blocks,
    repeat_columns,
    to_blocks,
)
from .selection import coarse_scores, pair_budget, tie_ranks

#: Stands for -inf in logits: no difference of two is NaN.
_NOTHING = -1e30
#: Squares of an item: more make larger products, fewer leave less to fill up.
_SQUARES_PER_ITEM = 4
#: Constants that float32 holds too, as exporters may write them; float64 factors are two of them.
#: Prior pairs rank from `_HUGE` squared on, more than every float32 score.
_HUGE, _TINY = 2.0**100, 2.0**-100


_replacement: Callable[..., Tensor] | None = None


@contextmanager
def replaced_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """While it is open, `function` takes the calls of `attention` in exported graphs: for an
    exporter that puts one node there. A model calls the attention once a layer, and torch needs
    seconds to reason about its sizes.
    """
    global _replacement
    before, _replacement = _replacement, function
    try:
        yield
    finally:
        _replacement = before


class Items(NamedTuple):
    """The chosen pairs, cut into items.

    Attributes:
        row: `[B, H, T]` int64, the query block of each item.
        column: `[B, H, T, S]` int64, its key blocks.
        used: `[B, H, T, S]` bool, False where an item is filled up.
    """

    row: Tensor
    column: Tensor
    used: Tensor


def export_attention(*tensors: Tensor | None, **arguments) -> Tensor:
    """`attention`, or what it is `replaced_by`."""
    function: Callable[..., Tensor] = _replacement or attention
    return function(*tensors, **arguments)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    distance_bias: Tensor | None = None,
    *,
    rule: str,
    block_per_row: int,
    block_budget: int | None,
    scale: float,
    sparse: bool,
    block_size: int,
    key_block_size: int,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
) -> Tensor:
    """Choose pairs and attend: `[B, H, N, D]` in the dtype of `value`.

    Takes checked arguments of `mra2_attention`; `rule` is a name in `selection.RULES`,
    `distance_bias` is `[H, K]`, `token_mask` `[B, N]` bool or None.
    """
    batch, heads, length, dim = query.shape
    dtype, device = compute_dtype(query.dtype), query.device
    per_block, n_blocks = block_size // key_block_size, count_exported_blocks(length, block_size)
    n_key_blocks = n_blocks * per_block
    if token_mask is None:
        token_mask = torch.ones(batch, length, dtype=torch.bool, device=device)

    # No gradient; `torch.no_grad` would put this part into a graph of its own.
    scores = coarse_scores(
        query.detach(),
        key.detach(),
        token_mask,
        block_size=block_size,
        n_blocks=n_blocks,
        scale=scale,
        rule=rule,
        key_block_size=key_block_size,
        distance_bias=None if distance_bias is None else distance_bias.detach(),
        initial_prior_first_n_blocks=initial_prior_first_n_blocks,
    )
    squares = n_blocks * block_per_row if block_budget is None else block_budget
    selected, pairs = _choose(
        *scores,
        pair_budget(scores.live, scores.live_keys, block_per_row, block_budget, per_block),
        squares * per_block,
        initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks,
    )
    squares_per_item = min(_SQUARES_PER_ITEM, block_per_row) if block_budget is None else 1
    items = _cut_into_items(selected, pairs, squares_per_item * per_block)

    real_queries = mask_to_blocks(
        token_mask, batch, length, block_size, n_blocks, device
    )  # [B, R, M]
    real_keys = mask_to_blocks(
        token_mask, batch, length, key_block_size, n_key_blocks, device
    )  # [B, C, W]
    # Scaled last: what comes before is what the scores are made from, too.
    query_blocks = to_blocks(query.to(dtype), token_mask, block_size, n_blocks) * scale
    key_blocks, value_blocks = (
        to_blocks(x.to(dtype), token_mask, key_block_size, n_key_blocks) for x in (key, value)
    )  # [B, H, C, W, D]
    bias = None
    if distance_bias is not None:
        bias = bias_of_pairs(
            distance_bias.to(dtype), scores.live, initial_prior_first_n_blocks
        ).expand(batch, -1, -1, -1)  # [B, H, R, R]

    if sparse:
        coarse = None
    else:
        coarse = _coarse_part(
            query_blocks, key_blocks, value_blocks, real_queries, real_keys, selected, bias
        )
    exact = _exact_part(query_blocks, key_blocks, value_blocks, real_keys, items, bias)
    output = _merge(exact, coarse, items.row, real_queries)  # [B, H, R, M, D]
    output = output.reshape(batch, heads, n_blocks * block_size, dim)
    return first_tokens(output, 2, length).to(value.dtype)


def _choose(
    scores: Tensor,
    live: Tensor,
    live_keys: Tensor,
    budget: Tensor,
    largest_budget: int,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Choose as `selection.choose_blocks`, whose arguments these are, by other keys.

    Returns:
        `[B, H, R, C]` bool, the pairs, and `[B, H, P]` int64, P = `largest_budget`: the same as
        row * C + column in rising order, then R * C in places without a pair.
    """
    batch, heads, rows, columns = scores.shape
    keys = _sort_keys(
        scores, live, live_keys, initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks
    ).reshape(batch, heads, rows * columns)
    # As many places without a pair as there is budget: a short text has fewer pairs.
    nothing = keys.new_full((batch, heads, largest_budget), -torch.inf)
    keys = torch.cat([keys, nothing], dim=-1)
    chosen = keys.topk(largest_budget, dim=-1).indices
    inside = torch.arange(largest_budget, device=scores.device) < budget[:, None, None]
    inside = inside.expand(-1, heads, -1)
    flags = torch.zeros_like(keys, dtype=torch.float32).scatter(-1, chosen, inside.float())
    selected = first_tokens(flags, 2, rows * columns).reshape(batch, heads, rows, columns) > 0
    pairs = torch.where(inside, chosen, rows * columns)
    return selected, pairs.sort(dim=-1).values


def _sort_keys(
    scores: Tensor,
    live: Tensor,
    live_keys: Tensor,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
) -> Tensor:
    """One float64 per pair, `[B, H, R, C]`, that orders pairs by prior, score and tie rank: -inf
    for what is not live.

    ONNX has no image of the bits of a number, as `selection.sort_keys` takes them. A score is a
    float32, so the lower half of a float64 has room for the tie rank. Of prior pairs, which matter
    to one another only where a budget does not hold them all, scores that differ by less than
    about 1e-9 may change places.
    """
    rows, columns = scores.shape[-2:]
    per_block = columns // rows
    row = torch.arange(rows, device=scores.device)[:, None]
    column = torch.arange(columns, device=scores.device)
    scores = scores.double()
    # In [0, 1), rising: the later of two equal scores.
    lateness = tie_ranks(row, column, rows, per_block).double() / (2 * rows * columns)
    keys = scores - scores.abs() * 2.0**-26 * lateness - lateness * _TINY * _TINY
    live_pairs = live[:, None, :, None] & live_keys[:, None, None, :]
    if initial_prior_first_n_blocks or initial_prior_diagonal_n_blocks:
        prior = global_pairs(live, initial_prior_first_n_blocks)
        prior = repeat_columns(prior, per_block)
        if initial_prior_diagonal_n_blocks:
            distance = (row - column // per_block).abs()
            prior = prior | (distance <= initial_prior_diagonal_n_blocks // 2)
        squeezed = scores / (1 + scores.abs()) - lateness * 2.0**-30
        keys = torch.where(prior, (2 + squeezed) * _HUGE * _HUGE, keys)
    return torch.where(live_pairs, keys, -torch.inf)


def _cut_into_items(selected: Tensor, pairs: Tensor, size: int) -> Items:
    """Cut the pairs of each row into items of `size`; arguments as `_choose` returns them."""
    rows, columns = selected.shape[-2:]
    largest_budget, device = pairs.shape[-1], pairs.device
    n_items = rows + largest_budget // size
    counts = selected.sum(-1)  # [B, H, R]
    first_pair = counts.cumsum(-1) - counts
    of_row = (counts + (size - 1)) // size
    last_item = of_row.cumsum(-1)

    item = torch.arange(n_items, device=device)
    row = (last_item[..., None, :] <= item[:, None]).sum(-1)  # [B, H, T]
    # Items beyond the last go to the last block, which holds no token.
    row = row.clamp_max(rows - 1)
    place = (item - (last_item - of_row).gather(-1, row)) * size
    place = place[..., None] + torch.arange(size, device=device)  # [B, H, T, S], within its row
    used = place < counts.gather(-1, row)[..., None]
    position = first_pair.gather(-1, row)[..., None] + place
    pair = _take(pairs[..., None], torch.where(used, position, 0))[..., 0]
    column = pair - row[..., None] * columns
    return Items(row, torch.where(used, column, 0), used)


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    """Entries `index` `[B, H, ...]` of `[B, H, X, F]` along X: `[B, H, ..., F]`.

    By a look-up of whole rows, which is a copy of memory; `gather` would take an index per element.
    """
    batch, heads, count, width = blocks.shape
    start = torch.arange(batch * heads, device=blocks.device).reshape(batch, heads) * count
    start = start.reshape(batch, heads, *(1 for _ in index.shape[2:]))
    return F.embedding(start + index, blocks.reshape(batch * heads * count, width))


class _Partial(NamedTuple):
    """A part of the softmax of some queries.

    Attributes:
        maximum: of its logits, `[..., M]` for queries or `[..., 1]` for all of a block.
        total: the sum of exp(logit - maximum), shaped alike.
        mean: the weighted mean of values, `[..., M, D]` or `[..., 1, D]`.
    """

    maximum: Tensor
    total: Tensor
    mean: Tensor


def _exact_part(
    query_blocks: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    real_keys: Tensor,
    items: Items,
    bias: Tensor | None,
) -> _Partial:
    """The softmax within each item; shapes begin with `[B, H, T]`."""
    heads, rows, _, dim = query_blocks.shape[1:]
    queries = _take(query_blocks.flatten(3), items.row).unflatten(-1, (-1, dim))
    keys, values = (
        _take(x.flatten(3), items.column).flatten(3).unflatten(-1, (-1, dim))
        for x in (key_blocks, value_blocks)
    )  # [B, H, T, S * W, D]
    real = real_keys[:, None].expand(-1, heads, -1, -1)
    visible = _take(real, items.column) & items.used[..., None]  # [B, H, T, S, W]
    if bias is None:
        hides = torch.where(visible, 0.0, _NOTHING).to(queries.dtype)
    else:
        square = items.column // (key_blocks.shape[2] // rows)
        of_pairs = _take(bias.flatten(2)[..., None], items.row[..., None] * rows + square)
        hides = torch.where(visible, of_pairs, _NOTHING)
    logits = queries @ keys.mT + hides.flatten(3)[..., None, :]
    shares = logits.softmax(-1)
    # The largest share is exp(0) / total.
    return _Partial(logits.amax(-1), 1 / shares.amax(-1), shares @ values)


def _coarse_part(
    query_blocks: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    real_queries: Tensor,
    real_keys: Tensor,
    selected: Tensor,
    bias: Tensor | None,
) -> _Partial:
    """What all pairs that are not selected contribute; shapes begin with `[B, H, R]`."""
    dtype = query_blocks.dtype
    counts = real_keys.sum(-1)  # [B, C]
    query_means = query_blocks.sum(3) / _at_least_one(real_queries.sum(-1), dtype)
    key_means = key_blocks.sum(3) / _at_least_one(counts, dtype)
    logits = query_means @ key_means.mT  # [B, H, R, C]; queries are scaled
    if bias is not None:
        logits = logits + repeat_columns(bias, selected.shape[3] // selected.shape[2])
    # A mean stands for so many tokens.
    logits = logits + _at_least_one(counts, dtype).log().mT
    logits = torch.where(selected | (counts == 0)[:, None, None, :], _NOTHING, logits)
    shares = logits.softmax(-1)
    value_means = value_blocks.sum(3) / _at_least_one(counts, dtype)
    mean = (shares @ value_means)[..., None, :]
    return _Partial(logits.amax(-1, keepdim=True), 1 / shares.amax(-1, keepdim=True), mean)


def _at_least_one(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, X]` int64 -> `[B, 1, X, 1]`, to divide by."""
    return counts.clamp_min(1).to(dtype)[:, None, :, None]


def _merge(exact: _Partial, coarse: _Partial | None, row: Tensor, real_queries: Tensor) -> Tensor:
    """Merge the items of every row and its coarse part: `[B, H, R, M, D]`, 0 for padded queries
    and where nothing is attended.
    """
    batch, heads, _, queries, dim = exact.mean.shape
    n_blocks = real_queries.shape[1]
    n_rows = batch * heads * n_blocks
    start = torch.arange(batch * heads, device=row.device).reshape(batch, heads, 1) * n_blocks
    target = (start + row).reshape(-1)  # [B * H * T], row of all blocks
    maxima = exact.maximum.flatten(0, 2)

    top = maxima.new_full((n_rows, queries), _NOTHING)
    if coarse is not None:
        top = top.maximum(coarse.maximum.detach().reshape(n_rows, 1))
    top = top.scatter_reduce(
        0, target[:, None].expand(-1, queries), maxima.detach(), "amax", include_self=True
    )
    weight = (maxima - top.index_select(0, target)).exp() * exact.total.flatten(0, 2)
    total = torch.zeros_like(top)
    output = exact.mean.new_zeros(n_rows, queries, dim)
    if coarse is not None:
        share = (coarse.maximum.reshape(n_rows, 1) - top).exp() * coarse.total.reshape(n_rows, 1)
        total = total + share
        output = output + share[..., None] * coarse.mean.reshape(n_rows, 1, dim)
    weighted = exact.mean.flatten(0, 2) * weight[..., None]
    total = total.index_put((target,), weight, accumulate=True)
    output = output.index_put((target,), weighted, accumulate=True)
    attends = (top > _NOTHING / 2).reshape(batch, heads, n_blocks, queries)
    attends = attends & real_queries[:, None]
    factor = torch.where(attends, 1 / total.clamp_min(1).reshape(attends.shape), 0.0)
    return output.reshape(batch, heads, n_blocks, queries, dim) * factor[..., None]
