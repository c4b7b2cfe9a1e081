"""Which blocks of the attention matrix are computed exactly.

The coarse logit of a block pair is `scale * mean(query block) . mean(key block)`, plus the distance
bias of the pair. A rule, one row of `RULES`, turns such logits into scores. Per (batch, head) the
`budget` best pairs of the whole matrix are chosen; equal scores go to the pair nearest the
diagonal, then to the lowest row, then to the lowest column. Nothing here has a gradient.

The order is made total by one int64 key per pair, so that a plain top-k is deterministic:

    prior (1 bit) | score, as an order-preserving image of its float32 bits (32 bits) | tie rank (30
    bits)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import (
    bias_of_pairs,
    block_means,
    chunks,
    count_blocks,
    drop_trivial_mask,
    global_pairs,
    is_exporting,
    mask_to_blocks,
    split_blocks,
    to_blocks,
    upsample,
    zero_unsafe_padding,
)

_TIE_BITS = 30
#: Logits of sub-blocks that `refined_mass` holds at a time.
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


class Means(NamedTuple):
    """Means over the real tokens of P = R * k sub-blocks, k to a block.

    Attributes:
        query, key: `[B, H, P, D]` float64 (float32 where the device has no float64).
        counts: `[B, P]` int64, real tokens of each sub-block.
        n_blocks: R.
        bias: `[B, H, R, R]` in the dtype of query, B = 1 where samples do not differ, or None: the
            distance bias of block pairs.
    """

    query: Tensor
    key: Tensor
    counts: Tensor
    n_blocks: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class SelectionRule:
    """How block pairs are ranked: one row of `RULES`.

    Attributes:
        description: what a pair is ranked by, in one sentence.
        score: called as `score(means, scale)`, returns `[B, H, R, R]` float32; the largest scores
            are chosen.
        sub_blocks: how many means per block `score` takes, a power of two; fewer where that does
            not divide the block size.
        row_normalized: whether the largest score of the row, over live blocks, is subtracted.
        scheme: whether the general scheme may use the rule. The scheme computes coarse logits
            itself, so `score` must be `coarse_logits`.
        kernel: whether the Triton kernels rank by this rule. They compute coarse logits themselves
            too; torch ranks by all other rules, on every device.
    """

    description: str
    score: Callable[[Means, float], Tensor]
    sub_blocks: int = 1
    row_normalized: bool = False
    scheme: bool = False
    kernel: bool = False


def coarse_logits(means: Means, scale: float) -> Tensor:
    """Scaled products of the means of blocks, plus their bias, `[B, H, R, R]` float32.

    They are computed in float64 and rounded to float32 before anything is compared. What is equal
    by definition (constant queries, repeated text) then ties exactly, instead of being ranked by
    the rounding of blocks of different sizes.
    """
    logits = means.query @ means.key.mT * scale
    return (logits if means.bias is None else logits + means.bias).float()


def refined_mass(means: Means, scale: float) -> Tensor:
    """The softmax mass of block pairs, `[B, H, R, R]` float32, estimated from means of sub-blocks:
    tokens of the query block times the share of their attention.

    The error of leaving a pair out depends on its mass. Few large logits make it up, and the mean
    logit of 32 x 32 token pairs hides them; the means of 8 x 8 pairs hide fewer.
    """
    query, key, counts, n_blocks, bias = means
    per_block = counts.shape[-1] // n_blocks
    log_counts = counts.float().log()[:, None, None]  # -inf: attended by nothing
    if bias is not None:
        bias = upsample(bias.float(), per_block)
    masses = []
    if is_exporting():  # sizes stay symbolic
        strips = [slice(None)]
    else:
        row_scores = max(1, counts.shape[-1] * query.shape[:2].numel())
        rows = per_block * max(1, _REFINED_SCORES // (row_scores * per_block))
        strips = [slice(first, first + rows) for first in range(0, counts.shape[-1], rows)]
    for strip in strips:
        logits = (query[:, :, strip] @ key.mT * scale).float() + log_counts
        if bias is not None:
            logits = logits + bias[:, :, strip]
        shares = logits.softmax(-1).nan_to_num_()  # NaN in a sample without a real token
        shares = split_blocks(shares, 3, per_block).sum(-1)
        mass = shares * counts[:, None, strip, None]
        masses.append(split_blocks(mass, 2, per_block).sum(3))
    return torch.cat(masses, dim=2)


#: All rules by name. A new one needs its row here, its function above, and a test.
RULES = {
    "row_normalized": SelectionRule(
        "By the coarse logit minus the largest one of its row (the authors' code): every row gets "
        "its best pair when the budget allows one each.",
        coarse_logits,
        row_normalized=True,
        scheme=True,
        kernel=True,
    ),
    "global": SelectionRule(
        "By the coarse logit itself (Algorithm 1 of the paper): rows with small logits may get "
        "nothing.",
        coarse_logits,
        scheme=True,
        kernel=True,
    ),
    "refined": SelectionRule(
        "By the softmax mass of the pair, estimated from quarters of blocks: finds better pairs "
        "for 16 times the scores.",
        refined_mass,
        sub_blocks=4,
    ),
}
SELECTION_RULES = tuple(RULES)
#: Rules of the general scheme.
SCHEME_RULES = tuple(name for name, rule in RULES.items() if rule.scheme)


def coarse_scores(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    *,
    block_size: int,
    n_blocks: int,
    scale: float,
    rule: str,
    distance_bias: Tensor | None = None,
    initial_prior_first_n_blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the scores `[B, H, R, R]` float32 that rank block pairs by a rule of `RULES`, and the
    live blocks `[B, R]` bool. `distance_bias` is `[H, K]`; see `blocks.bias_of_pairs`.
    """
    ranking = RULES[rule]
    per_block = math.gcd(block_size, ranking.sub_blocks)
    means = _means(query, key, token_mask, block_size, n_blocks, per_block)
    live = split_blocks(means.counts, 1, per_block).any(-1)
    if distance_bias is not None:
        bias = distance_bias.to(means.query.dtype)
        means = means._replace(bias=bias_of_pairs(bias, live, initial_prior_first_n_blocks))
    scores = ranking.score(means, scale)
    if ranking.row_normalized:
        row_max = scores.masked_fill(~live[:, None, None, :], -torch.inf).amax(-1, keepdim=True)
        scores = scores - row_max
    return scores, live


def _means(query, key, token_mask, block_size: int, n_blocks: int, per_block: int) -> Means:
    """Means of `[B, H, N, D]` query and key over sub-blocks, `per_block` of them to a block."""
    dtype = score_dtype(query)
    size, count = block_size // per_block, n_blocks * per_block
    real = mask_to_blocks(token_mask, query.shape[0], query.shape[2], size, count, query.device)
    counts = real.sum(-1)
    reads_values = query.device.type == "cpu" and not torch.compiler.is_compiling()

    def means(x: Tensor) -> Tensor:
        if not reads_values:
            return block_means(to_blocks(x, token_mask, size, count), counts, dtype)
        blocks = to_blocks(zero_unsafe_padding(x, token_mask), None, size, count)
        return block_means(blocks, counts, dtype, None if token_mask is None else real)

    return Means(means(query), means(key), counts, n_blocks)


def score_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which scores are computed: float64 where the device has it."""
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
    """Return the indices of the largest `budget` of `[..., K]` keys, and before them whether each
    is a pair (its key is not -1); both `[..., min(budget, K)]`.
    """
    largest, indices = keys.topk(min(budget, keys.shape[-1]), dim=-1)
    return largest >= 0, indices


def pair_budget(live: Tensor, block_per_row: int, block_budget: int | None) -> Tensor:
    """Return how many pairs to choose per head, `[B]` int64: at most the live pairs of a sample."""
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
            pairs, which is slower but needs no such size (for tracing).
        initial_prior_first_n_blocks: the first n live block rows and columns rank before everything
            else (live ones, so that leading padding by whole blocks changes nothing).
        initial_prior_diagonal_n_blocks: pairs with `abs(row - column) <= n // 2` do so too; 0 is
            off.

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
        prior = global_pairs(live, initial_prior_first_n_blocks) & live_pairs
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
    threshold = ranked.gather(-1, last)[..., None]  # the lowest key inside the budget
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
    distance_bias: Tensor | None = None,
    traceable: bool = False,
    reads_mask: bool = True,
) -> Tensor:
    """Score and choose: `[B, H, N, D]` query and key -> `[B, H, R, R]` bool.

    Takes checked arguments of `mra2_attention`; `rule` is a name in `RULES`. `distance_bias` is
    `[H, K]`.

    `traceable` keeps every size polynomial in N for `torch.export`: R is N // block_size + 2
    instead of ceil(N / block_size) (the surplus blocks hold no real token and are never chosen),
    and all pairs are sorted. A traced graph also needs `reads_mask=False`: no value of the mask is
    then read on the host.
    """
    batch, heads, length, _ = query.shape
    if traceable:
        n_blocks, largest_budget = length // block_size + 2, None
    else:
        n_blocks = count_blocks(length, block_size)
        largest_budget = min(
            n_blocks * block_per_row if block_budget is None else block_budget, n_blocks**2
        )

    def choose(
        query: Tensor, key: Tensor, token_mask: Tensor | None, distance_bias: Tensor | None
    ) -> Tensor:
        scores, live = coarse_scores(
            query,
            key,
            token_mask,
            block_size=block_size,
            n_blocks=n_blocks,
            scale=scale,
            rule=rule,
            distance_bias=distance_bias,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
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
            return choose(query, key, token_mask, distance_bias)
        if reads_mask:
            token_mask = drop_trivial_mask(token_mask)
        blocks = query.new_empty((batch, heads, n_blocks, n_blocks), dtype=torch.bool)
        for chunk in chunks(query.shape, query.device.type):
            chunk_mask = None if token_mask is None else token_mask[chunk[0]]
            chunk_bias = None if distance_bias is None else distance_bias[chunk[1]]
            blocks[chunk] = choose(query[chunk], key[chunk], chunk_mask, chunk_bias)
        return blocks
