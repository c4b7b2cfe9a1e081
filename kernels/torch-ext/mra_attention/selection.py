"""Which blocks of the attention matrix are computed exactly.

A pair is a block of M queries (`block_size`) and a block of W keys (`key_block_size`): W = M are
the squares of the paper, and a square holds k = M / W narrower pairs. The coarse logit of a pair is
`scale * mean(query block) . mean(key block)`, plus the distance bias of its square. A rule, one row
of `RULES`, turns such logits into scores. Per (batch, head) the best pairs of the whole matrix are
chosen, k for every square of the budget; equal scores go to the pair whose square is nearest the
diagonal, then to the lowest row, then to the lowest column. Priors take all pairs of a square.
Nothing here has a gradient.

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
    count_exported_blocks,
    drop_trivial_mask,
    global_pairs,
    is_exporting,
    mask_to_blocks,
    repeat_columns,
    split_blocks,
    to_blocks,
    upsample,
    zero_unsafe_padding,
)
from .parallel import run_items

_TIE_BITS = 30
#: Logits of sub-blocks that `softmax_mass` holds at a time.
_SUB_BLOCK_SCORES = 2**22
#: Block rows of squares that fit the tie rank; 741,440 tokens in blocks of 32.
MAX_BLOCK_ROWS = 23170


def max_block_rows(per_block: int) -> int:
    """Block rows that fit the tie rank, 2 * R * R * k <= 2**30, with k key blocks to a block."""
    return math.isqrt(2 ** (_TIE_BITS - 1) // per_block)


@dataclass(frozen=True)
class BlockSelection:
    """The block pairs that are computed exactly.

    Attributes:
        blocks: `[B, H, R, C]` bool, True at (query block, key block) pairs in high resolution; C is
            R * block_size / key_block_size.
        block_size: queries per block.
        key_block_size: keys per block; None is block_size.
    """

    blocks: Tensor
    block_size: int
    key_block_size: int | None = None

    def __post_init__(self):
        if self.key_block_size is None:
            object.__setattr__(self, "key_block_size", self.block_size)

    @property
    def counts(self) -> Tensor:
        """Chosen pairs per (batch, head): `[B, H]` int64."""
        return self.blocks.sum((-2, -1))


class Means(NamedTuple):
    """Means over the real tokens of sub-blocks: P of queries, the same number in each of R blocks,
    and S of keys, the same number in each of C key blocks.

    Attributes:
        query, key: `[B, H, P, D]` and `[B, H, S, D]` float64 (float32 where the device has none).
        query_counts, key_counts: `[B, P]` and `[B, S]` int64, real tokens of each sub-block.
        sub_blocks: (P / R, S / C).
        bias: `[B, H, R, C]` in the dtype of query, B = 1 where samples do not differ, or None: the
            distance bias of pairs.
    """

    query: Tensor
    key: Tensor
    query_counts: Tensor
    key_counts: Tensor
    sub_blocks: tuple[int, int]
    bias: Tensor | None = None


class Scores(NamedTuple):
    """What pairs are chosen by.

    Attributes:
        scores: `[B, H, R, C]` float32; the largest are chosen.
        live: `[B, R]` bool, blocks that hold a real token.
        live_keys: `[B, C]` bool, key blocks that do.
    """

    scores: Tensor
    live: Tensor
    live_keys: Tensor


@dataclass(frozen=True)
class SelectionRule:
    """How block pairs are ranked: one row of `RULES`.

    Attributes:
        description: what a pair is ranked by, in one sentence.
        score: called as `score(means, scale)`, returns `[B, H, R, C]` float32; the largest scores
            are chosen.
        sub_blocks: how many means per block of queries `score` takes, a power of two; fewer where
            that does not divide the block size. Of keys it takes sub-blocks of the same size, or
            whole key blocks where those are smaller.
        row_normalized: whether the largest score of the row, over live blocks, is subtracted.
        scheme: whether the general scheme may use the rule. The scheme computes coarse logits
            itself, so `score` must be `coarse_logits`.
        kernels: names of the fast implementations that rank by this rule themselves; for all
            others torch does.
    """

    description: str
    score: Callable[[Means, float], Tensor]
    sub_blocks: int = 1
    row_normalized: bool = False
    scheme: bool = False
    kernels: tuple[str, ...] = ()


def coarse_logits(means: Means, scale: float) -> Tensor:
    """Scaled products of the means of blocks, plus their bias, `[B, H, R, C]` float32.

    They are computed in float64 and rounded to float32 before anything is compared. What is equal
    by definition (constant queries, repeated text) then ties exactly, instead of being ranked by
    the rounding of blocks of different sizes.
    """
    logits = means.query @ means.key.mT * scale
    return (logits if means.bias is None else logits + means.bias).float()


def softmax_mass(means: Means, scale: float) -> Tensor:
    """The softmax mass of block pairs, `[B, H, R, C]` float32, estimated from means of sub-blocks:
    tokens of the query block times the share of their attention.

    The error of leaving a pair out depends on its mass. Few large logits make it up, and the mean
    logit of 32 x 32 token pairs hides them; the means of smaller blocks hide fewer.
    """
    per_row, per_column = means.sub_blocks
    log_counts = means.key_counts.float().log()[:, None, None]  # -inf: attended by nothing
    bias = None if means.bias is None else upsample(means.bias.float(), per_row, per_column)
    masses = []
    if is_exporting():  # sizes stay symbolic
        strips = [slice(None)]
    else:
        row_scores = max(1, means.key_counts.shape[-1] * means.query.shape[:2].numel())
        step = per_row * max(1, _SUB_BLOCK_SCORES // (row_scores * per_row))
        total = means.query_counts.shape[-1]
        strips = [slice(first, first + step) for first in range(0, total, step)]
    for strip in strips:
        logits = (means.query[:, :, strip] @ means.key.mT * scale).float() + log_counts
        if bias is not None:
            logits = logits + bias[:, :, strip]
        shares = logits.softmax(-1).nan_to_num_()  # NaN in a sample without a real token
        shares = split_blocks(shares, 3, per_column).sum(-1)
        mass = shares * means.query_counts[:, None, strip, None]
        masses.append(split_blocks(mass, 2, per_row).sum(3))
    return torch.cat(masses, dim=2)


#: All rules by name. A new one needs its row here, its function above, and a test.
RULES = {
    "row_normalized": SelectionRule(
        "By the coarse logit minus the largest one of its row (the authors' code): every row gets "
        "its best pair when the budget allows one each.",
        coarse_logits,
        row_normalized=True,
        scheme=True,
        kernels=("native", "triton"),
    ),
    "global": SelectionRule(
        "By the coarse logit itself (Algorithm 1 of the paper): rows with small logits may get "
        "nothing.",
        coarse_logits,
        scheme=True,
        kernels=("native", "triton"),
    ),
    "mass": SelectionRule(
        "By the softmax mass of the pair: tokens of the query block times the softmax over the "
        "coarse logits of its row. Fits narrow key blocks.",
        softmax_mass,
        kernels=("native",),
    ),
    "refined": SelectionRule(
        "By the softmax mass of the pair, estimated from quarters of blocks: finds better pairs "
        "for 16 times the scores.",
        softmax_mass,
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
    key_block_size: int | None = None,
    distance_bias: Tensor | None = None,
    initial_prior_first_n_blocks: int = 0,
) -> Scores:
    """Score the pairs of `[B, H, N, D]` query and key by a rule of `RULES`. `distance_bias` is
    `[H, K]`; see `blocks.bias_of_pairs`.
    """
    ranking = RULES[rule]
    per_block = block_size // (key_block_size or block_size)
    sub_blocks = math.gcd(block_size, ranking.sub_blocks)
    sub_key_blocks = max(1, sub_blocks // per_block)
    query_means, query_counts = _means(
        query, token_mask, block_size // sub_blocks, n_blocks * sub_blocks
    )
    key_means, key_counts = _means(
        key,
        token_mask,
        block_size // (per_block * sub_key_blocks),
        n_blocks * per_block * sub_key_blocks,
    )
    live = split_blocks(query_counts, 1, sub_blocks).any(-1)
    live_keys = split_blocks(key_counts, 1, sub_key_blocks).any(-1)
    means = Means(query_means, key_means, query_counts, key_counts, (sub_blocks, sub_key_blocks))
    if distance_bias is not None:
        bias = bias_of_pairs(
            distance_bias.to(query_means.dtype), live, initial_prior_first_n_blocks
        )
        means = means._replace(bias=repeat_columns(bias, per_block))
    scores = ranking.score(means, scale)
    if ranking.row_normalized:
        dead = ~live_keys[:, None, None, :]
        scores = scores - scores.masked_fill(dead, -torch.inf).amax(-1, keepdim=True)
    return Scores(scores, live, live_keys)


def _means(x: Tensor, token_mask: Tensor | None, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Means `[B, H, count, D]` of `[B, H, N, D]` over the real tokens of blocks of `size` tokens,
    and the numbers of those, `[B, count]`.
    """
    real = mask_to_blocks(token_mask, x.shape[0], x.shape[2], size, count, x.device)
    counts, dtype = real.sum(-1), score_dtype(x)
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # no value is read
        return block_means(to_blocks(x, token_mask, size, count), counts, dtype), counts
    blocks = to_blocks(zero_unsafe_padding(x, token_mask), None, size, count)
    return block_means(blocks, counts, dtype, None if token_mask is None else real), counts


def score_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which scores are computed: float64 where the device has it."""
    return torch.float32 if query.device.type == "mps" else torch.float64


def sort_keys(
    scores: Tensor, row: Tensor, column: Tensor, n_blocks: int, per_block: int = 1
) -> Tensor:
    """One int64 per pair that orders pairs by score, then by tie rank; no two are equal.

    Args:
        scores: any shape, compared as float32.
        row, column: block and key block of the pairs, int64, that broadcast with `scores`.
        n_blocks: R, at most `max_block_rows(per_block)`.
        per_block: key blocks to a block.
    """
    # + 0.0 turns -0.0 into 0.0; a copy, because torch.vmap of torch 2.11 cannot make the view.
    bits = torch.view_copy(scores.float() + 0.0, dtype=torch.int32).long()
    ordered = torch.where(bits >= 0, bits + 2**31, ~bits)
    tie_rank = tie_ranks(row, column, n_blocks, per_block)
    return (ordered << _TIE_BITS) + ((1 << _TIE_BITS) - 1 - tie_rank)


def tie_ranks(row: Tensor, column: Tensor, n_blocks: int, per_block: int) -> Tensor:
    """Where pairs of equal scores stand, the first at 0: int64 below 2 * R * R * per_block, no two
    equal; arguments as of `sort_keys`.
    """
    block, part = column // per_block, column % per_block
    rank = 2 * ((row - block).abs() * n_blocks + row) + (block > row)
    return rank * per_block + part


def best_keys(keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the largest `budget` of `[..., K]` keys, and before them whether each
    is a pair (its key is not -1); both `[..., min(budget, K)]`.
    """
    largest, indices = keys.topk(min(budget, keys.shape[-1]), dim=-1)
    return largest >= 0, indices


def pair_budget(
    live: Tensor,
    live_keys: Tensor,
    block_per_row: int,
    block_budget: int | None,
    per_block: int = 1,
) -> Tensor:
    """Return how many pairs to choose per head, `[B]` int64: at most the live pairs of a sample.

    `live` is `[B, R]`, `live_keys` `[B, C]`; budgets count squares, of `per_block` pairs each.
    """
    rows = live.sum(-1)
    squares = rows * block_per_row if block_budget is None else block_budget
    return (rows * live_keys.sum(-1)).clamp_max(squares * per_block)


def choose_blocks(
    scores: Tensor,
    live: Tensor,
    budget: Tensor,
    *,
    largest_budget: int | None,
    live_keys: Tensor | None = None,
    per_block: int = 1,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
) -> Tensor:
    """Choose the `budget` best live pairs per (batch, head) by prior, score and tie rank.

    Args:
        scores: `[B, H, R, C]`, compared as float32.
        live: `[B, R]` bool, blocks that hold a real token.
        budget: `[B]` int64, pairs per head of each sample.
        largest_budget: the largest value `budget` can take, known from shapes; None sorts all
            pairs, which is slower but needs no such size (for tracing).
        live_keys: `[B, C]` bool, key blocks that hold a real token; None where those are `live`.
        per_block: C / R, key blocks to a block.
        initial_prior_first_n_blocks: the first n live blocks rank before everything else, as rows
            and as columns (live ones, so that leading padding by whole blocks changes nothing).
        initial_prior_diagonal_n_blocks: squares with `abs(row - column) <= n // 2` do so too; 0 is
            off. 1 keeps the block of each row itself exact.

    Returns:
        `[B, H, R, C]` bool.
    """
    live_keys = live if live_keys is None else live_keys
    rows = scores.shape[-2]
    row = torch.arange(rows, device=scores.device)[:, None]
    column = torch.arange(rows * per_block, device=scores.device)

    live_pairs = live[:, None, :, None] & live_keys[:, None, None, :]
    sort_key = sort_keys(scores, row, column, rows, per_block)
    if initial_prior_first_n_blocks or initial_prior_diagonal_n_blocks:
        prior = global_pairs(live, initial_prior_first_n_blocks)
        prior = repeat_columns(prior, per_block) & live_pairs
        if initial_prior_diagonal_n_blocks:
            distance = (row - column // per_block).abs()
            prior = prior | (distance <= initial_prior_diagonal_n_blocks // 2)
        sort_key = sort_key + (prior.long() << (_TIE_BITS + 32))
    sort_key = torch.where(live_pairs, sort_key, -1)

    flat = sort_key.flatten(2)  # [B, H, R * C]
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
    key_block_size: int | None = None,
    distance_bias: Tensor | None = None,
    traceable: bool = False,
    reads_mask: bool = True,
) -> Tensor:
    """Score and choose: `[B, H, N, D]` query and key -> `[B, H, R, C]` bool.

    Takes checked arguments of `mra2_attention`; `rule` is a name in `RULES`. `distance_bias` is
    `[H, K]`.

    `traceable` keeps every size polynomial in N for `torch.export`: R is
    `count_exported_blocks` (the surplus block holds no real token and is never chosen), and all
    pairs are sorted. A traced graph also needs `reads_mask=False`: no value of the mask is
    then read on the host.
    """
    batch, heads, length, _ = query.shape
    per_block = block_size // (key_block_size or block_size)
    if traceable:
        n_blocks, largest_budget = count_exported_blocks(length, block_size), None
    else:
        n_blocks = count_blocks(length, block_size)
        largest_budget = per_block * min(
            n_blocks * block_per_row if block_budget is None else block_budget, n_blocks**2
        )

    def choose(
        query: Tensor, key: Tensor, token_mask: Tensor | None, distance_bias: Tensor | None
    ) -> Tensor:
        scores, live, live_keys = coarse_scores(
            query,
            key,
            token_mask,
            block_size=block_size,
            n_blocks=n_blocks,
            scale=scale,
            rule=rule,
            key_block_size=key_block_size,
            distance_bias=distance_bias,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
        )
        return choose_blocks(
            scores,
            live,
            pair_budget(live, live_keys, block_per_row, block_budget, per_block),
            largest_budget=largest_budget,
            live_keys=live_keys,
            per_block=per_block,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
        )

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if traceable:
            return choose(query, key, token_mask, distance_bias)
        if reads_mask:
            token_mask = drop_trivial_mask(token_mask)
        shape = (batch, heads, n_blocks, n_blocks * per_block)
        blocks = query.new_empty(shape, dtype=torch.bool)
        places = list(chunks(query.shape, query.device.type))

        def work(item: int) -> None:
            chunk = places[item]
            chunk_mask = None if token_mask is None else token_mask[chunk[0]]
            chunk_bias = None if distance_bias is None else distance_bias[chunk[1]]
            blocks[chunk] = choose(query[chunk], key[chunk], chunk_mask, chunk_bias)

        run_items(work, len(places))
        return blocks
