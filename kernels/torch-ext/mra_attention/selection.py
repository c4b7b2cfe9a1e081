"""Which blocks of the attention matrix are computed exactly.

The coarse logit of a block pair is `scale * mean(query block) . mean(key block)`. Per (batch, head)
the `budget` best pairs of the whole matrix are chosen; equal scores go to the pair nearest the
diagonal, then to the lowest row, then to the lowest column. Nothing here has a gradient.

The order is made total by one int64 key per pair, so that a plain top-k is deterministic:

    prior (1 bit) | score, as an order-preserving image of its float32 bits (32 bits) | tie rank (30
    bits)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import (
    block_means,
    chunks,
    count_blocks,
    drop_trivial_mask,
    is_exporting,
    mask_to_blocks,
    to_blocks,
    zero_unsafe_padding,
)

_TIE_BITS = 30
#: Scores of parts of blocks that `refined_mass` holds at a time.
_REFINED_SCORES = 2**22
#: Block rows that fit the tie rank, 2 * R * R <= 2**30; 741,440 tokens in blocks of 32.
MAX_BLOCK_ROWS = 23170


@dataclass(frozen=True)
class BlockSelection:
    """The block pairs that are computed exactly.

    Attributes:
        blocks: `[B, H, R, R]` bool, True at (query block, key block) pairs in high resolution.
        block_size: tokens per block.
    """

    blocks: Tensor
    block_size: int

    @property
    def counts(self) -> Tensor:
        """Chosen pairs per (batch, head): `[B, H]` int64."""
        return self.blocks.sum((-2, -1))


def coarse_scores(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    *,
    block_size: int,
    n_blocks: int,
    scale: float,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Return the scores `[B, H, R, R]` that rank block pairs, and the live blocks `[B, R]`.

    `rule` is `"row_normalized"` (coarse logit minus the largest one of its row over live pairs, the
    authors' code), `"global"` (the coarse logit itself, the text of the paper, Algorithm 1), or
    `"refined"` (`refined_mass`).

    Coarse logits are computed in float64 and rounded to float32 before anything is compared. What
    is equal by definition (constant queries, repeated text) then ties exactly, instead of being
    ranked by the rounding of blocks of different sizes.
    """
    if rule == "refined":
        parts_of_block = sub_blocks(block_size)
        size, count = block_size // parts_of_block, n_blocks * parts_of_block
        pooled_query, pooled_key, counts = _means(query, key, token_mask, size, count)
        live = counts.unflatten(-1, (n_blocks, parts_of_block)).any(-1)
        return refined_mass(pooled_query, pooled_key, counts, n_blocks, scale), live
    pooled_query, pooled_key, counts = _means(query, key, token_mask, block_size, n_blocks)
    live = counts > 0
    scores = (pooled_query @ pooled_key.mT * scale).float()  # [B, H, R, R]
    if rule == "row_normalized":
        row_max = scores.masked_fill(~live[:, None, None, :], -torch.inf).amax(-1, keepdim=True)
        scores = scores - row_max
    return scores, live


def sub_blocks(block_size: int) -> int:
    """Into how many parts the side of a block is cut by `"refined"`: 4 where they come out even."""
    return next(count for count in (4, 2, 1) if block_size % count == 0)


def refined_mass(
    query_means: Tensor, key_means: Tensor, counts: Tensor, n_blocks: int, scale: float
) -> Tensor:
    """The softmax mass of pairs of blocks, estimated from means of parts of blocks.

    What a row of the softmax matrix gives to a pair is what the error of leaving it out depends on;
    the mean logit of 32 x 32 pairs misses the few large ones that make it up, the means of 8 x 8
    pairs less so.

    Args:
        query_means, key_means: `[B, H, P, D]`, the means of P = R * parts consecutive parts.
        counts: `[B, P]` real tokens of each.
        n_blocks: R.
        scale: factor of the logits.

    Returns:
        `[B, H, R, R]` float32: tokens of the query block times the share of their attention.
    """
    parts_of_block = counts.shape[-1] // n_blocks
    log_counts = counts.float().log()[:, None, None]  # -inf: attended by nothing
    mass = []
    if is_exporting():  # sizes stay symbolic
        strips = [(query_means, counts)]
    else:
        held = max(1, counts.shape[-1] * query_means.shape[:2].numel())
        step = parts_of_block * max(1, _REFINED_SCORES // (held * parts_of_block))
        strips = zip(query_means.split(step, dim=2), counts.split(step, dim=1), strict=True)
    for some, weights in strips:
        logits = (some @ key_means.mT * scale).float() + log_counts
        shares = logits.softmax(-1).nan_to_num_()  # of a sample without a real token
        shares = shares.unflatten(-1, (n_blocks, parts_of_block)).sum(-1)
        shares = shares * weights[:, None, :, None]
        mass.append(shares.unflatten(2, (-1, parts_of_block)).sum(3))
    return torch.cat(mass, dim=2)


def _means(
    query: Tensor, key: Tensor, token_mask: Tensor | None, block_size: int, n_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the blocks of both, `[B, H, R, D]`, and the real tokens of each block, `[B, R]`."""
    dtype = score_dtype(query)
    mask_blocks = mask_to_blocks(
        token_mask, query.shape[0], query.shape[2], block_size, n_blocks, query.device
    )
    counts = mask_blocks.sum(-1)
    reads_values = query.device.type == "cpu" and not torch.compiler.is_compiling()

    def means(x: Tensor) -> Tensor:
        if not reads_values:
            return block_means(to_blocks(x, token_mask, block_size, n_blocks), counts, dtype)
        blocks = to_blocks(zero_unsafe_padding(x, token_mask), None, block_size, n_blocks)
        real = None if token_mask is None else mask_blocks
        return block_means(blocks, counts, dtype, real)

    return means(query), means(key), counts


def score_dtype(query: Tensor) -> torch.dtype:
    """What scores are computed in: float64, where the device has it."""
    return torch.float32 if query.device.type == "mps" else torch.float64


def sort_keys(scores: Tensor, row: Tensor, column: Tensor, n_blocks: int) -> Tensor:
    """One int64 per pair that orders pairs by score, then by tie rank; no two are equal.

    Args:
        scores: any shape, compared as float32.
        row, column: blocks of the pairs, int64, that broadcast with `scores`.
        n_blocks: R, at most `MAX_BLOCK_ROWS`.
    """
    # + 0.0 turns -0.0 into 0.0; a copy, because torch.vmap of torch 2.11 cannot make the view.
    bits = torch.view_copy(scores.float() + 0.0, dtype=torch.int32).long()
    ordered = torch.where(bits >= 0, bits + 2**31, ~bits)
    tie_rank = 2 * ((row - column).abs() * n_blocks + row) + (column > row)
    return (ordered << _TIE_BITS) + ((1 << _TIE_BITS) - 1 - tie_rank)


def best_keys(keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The largest `budget` of `[..., K]` keys, -1 where there is no pair: whether each is a pair,
    and where it stands, `[..., min(budget, K)]`.
    """
    found, places = keys.topk(min(budget, keys.shape[-1]), dim=-1)
    return found >= 0, places


def pair_budget(live: Tensor, block_per_row: int, block_budget: int | None) -> Tensor:
    """Return the number of pairs to choose per head of each sample, `[B]` int64, at most its live
    pairs.
    """
    rows = live.sum(-1)
    if block_budget is None:
        return torch.minimum(rows * block_per_row, rows * rows)
    return (rows * rows).clamp_max(block_budget)


def choose_blocks(
    scores: Tensor,
    live: Tensor,
    budget: Tensor,
    *,
    largest_budget: int | None,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
) -> Tensor:
    """Choose the `budget` best live pairs per (batch, head) by prior, score and tie rank.

    Args:
        scores: `[B, H, R, R]`, compared as float32.
        live: `[B, R]` bool, blocks that hold a real token.
        budget: `[B]` int64, pairs per head of each sample.
        largest_budget: the largest value `budget` can take, known from shapes; None sorts all
            pairs, which is slower and free of data-independent sizes (for tracing).
        initial_prior_first_n_blocks: the first n live block rows and columns rank before everything
            else (live ones, so that leading padding by whole blocks changes nothing).
        initial_prior_diagonal_n_blocks: so do pairs with `abs(row - column) <= n // 2`; 0 is off.

    Returns:
        `[B, H, R, R]` bool.
    """
    rows = scores.shape[-1]
    row = torch.arange(rows, device=scores.device)[:, None]
    column = row.T
    distance = (row - column).abs()

    live_pairs = live[:, None, :, None] & live[:, None, None, :]
    sort_key = sort_keys(scores, row, column, rows)
    if initial_prior_first_n_blocks or initial_prior_diagonal_n_blocks:
        first = live.cumsum(-1) <= initial_prior_first_n_blocks  # [B, R]
        prior = (first[:, None, :, None] | first[:, None, None, :]) & live_pairs
        if initial_prior_diagonal_n_blocks:
            prior = prior | (distance <= initial_prior_diagonal_n_blocks // 2)
        sort_key = sort_key + (prior.long() << (_TIE_BITS + 32))
    sort_key = torch.where(live_pairs, sort_key, -1)

    flat = sort_key.flatten(2)  # [B, H, R * R]
    if largest_budget is None:
        ranked = flat.sort(dim=-1, descending=True).values
    else:
        ranked = flat.topk(largest_budget, dim=-1).values
    last = (budget - 1).clamp_min(0)[:, None, None].expand(-1, scores.shape[1], 1)
    threshold = ranked.gather(-1, last)[..., None]  # the lowest key that is still inside the budget
    return (sort_key >= threshold) & (sort_key >= 0)


def select(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    *,
    block_per_row: int,
    block_budget: int | None,
    block_size: int,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
    rule: str,
    scale: float,
    traceable: bool = False,
    reads_mask: bool = True,
) -> Tensor:
    """Score and choose: `[B, H, N, D]` query and key -> `[B, H, R, R]` bool.

    The arguments are those of `mra2_attention`, checked.

    `traceable` keeps every size polynomial in N for `torch.export`: R is N // block_size + 2
    instead of ceil(N / block_size) (the surplus blocks hold no real token and are never chosen),
    and all pairs are sorted. `reads_mask=False` reads no value of the mask, as a traced graph needs
    it.
    """
    batch, heads, length, _ = query.shape
    if traceable:
        n_blocks, largest_budget = length // block_size + 2, None
    else:
        n_blocks = count_blocks(length, block_size)
        largest_budget = min(
            n_blocks * block_per_row if block_budget is None else block_budget, n_blocks**2
        )

    def choose(query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor:
        scores, live = coarse_scores(
            query, key, token_mask, block_size=block_size, n_blocks=n_blocks, scale=scale, rule=rule
        )
        return choose_blocks(
            scores,
            live,
            pair_budget(live, block_per_row, block_budget),
            largest_budget=largest_budget,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
        )

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if traceable:
            return choose(query, key, token_mask)
        if reads_mask:
            token_mask = drop_trivial_mask(token_mask)
        blocks = query.new_empty((batch, heads, n_blocks, n_blocks), dtype=torch.bool)
        for part in chunks(query.shape, query.device.type):
            mask_part = None if token_mask is None else token_mask[part[0]]
            blocks[part] = choose(query[part], key[part], mask_part)
        return blocks
