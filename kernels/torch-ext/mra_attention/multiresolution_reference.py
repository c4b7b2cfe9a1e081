"""The definition of the general scheme, for reading: O(N^2) memory, autograd by torch."""

import torch
from torch import Tensor

from .blocks import compute_dtype, upsample
from .reference import softmax_over_real
from .scheme import Level, Scheme, levels_of
from .selection import RULES, best_keys, score_dtype, sort_keys


def multiresolution_matrix(
    query: Tensor, key: Tensor, token_mask: Tensor | None, scheme: Scheme
) -> Tensor:
    """Return the row-normalised matrix A-hat `[B, H, N, N]` of the general scheme.

    Algorithm 1 as it is written: it visits the blocks of every scale in turn, from the coarsest on.
    Chosen blocks are replaced by their children, the others keep the product of their means.
    """
    levels = levels_of(scheme, query, token_mask)
    last = len(levels) - 1
    padded = scheme.padded_length(query.shape[2])
    shape = (*query.shape[:2], padded, padded)
    logits = query.new_full(shape, -torch.inf, dtype=compute_dtype(query.dtype))
    cut = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)  # level 0 divides it
    for number, level in enumerate(levels):
        live = level.counts > 0
        live_pairs = live[:, None, :, None] & live[:, None, None, :]
        candidates = upsample(cut, level.n_blocks // cut.shape[-1]) & live_pairs
        if number == last:
            cut = torch.zeros_like(candidates)
        elif number == 0:
            cut = scheme.select_first(query.detach(), key.detach(), token_mask)
        else:
            cut = _choose_children(query, key, candidates, level, scheme, number)
        if number < last and scheme.sparse:
            continue
        means = scheme.scale * level.means(query) @ level.means(key).mT
        members = upsample(candidates & ~cut, level.size)
        logits = torch.where(members, upsample(means, level.size), logits)
    return softmax_over_real(logits, levels[0].tokens, query.shape[2])


def _choose_children(
    query: Tensor, key: Tensor, candidates: Tensor, level: Level, scheme: Scheme, number: int
) -> Tensor:
    """The best candidates of a level after the first, `[B, H, R, R]` bool."""
    with torch.no_grad():
        query_means, key_means = (level.means(x, score_dtype(query)) for x in (query, key))
        scores = (query_means @ key_means.mT * scheme.scale).float()
        if RULES[scheme.rule].row_normalized:
            row_max = scores.masked_fill(~candidates, -torch.inf).amax(-1, keepdim=True)
            scores = scores - torch.where(row_max == -torch.inf, 0, row_max)
        row = torch.arange(level.n_blocks, device=query.device)[:, None]
        keys = torch.where(candidates, sort_keys(scores, row, row.T, level.n_blocks), -1)
        real, indices = best_keys(keys.flatten(2), scheme.block_budgets[number])
        cut = torch.zeros_like(keys, dtype=torch.bool).flatten(2)
        return cut.scatter_(2, indices, real).view(keys.shape)
