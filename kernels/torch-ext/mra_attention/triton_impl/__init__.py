"""MRA-2 and MRA-2-s by Triton kernels: selection, forward and backward, as `ops.py` calls them.

Nothing here reads a value back from the device: sizes follow from shapes and budgets, so that all
of it can be captured in a CUDA graph. `summaries` are those of `summarize` for the same inputs;
where they are None, a pass computes them for itself.
"""

from torch import Tensor

from ..implementations import Summaries
from ..selection import RULES
from . import launching
from .backward import key_gradients, query_gradient, reduce_rows
from .bias_gradient import bias_gradient
from .block_lists import build_lists
from .call import KernelCall
from .coarse import coarse_gradients, coarse_state
from .distance_bias import pair_bias
from .forward import attend
from .pooling import pool
from .selection import choose_by_radix, choose_by_topk, flag_blocks, score_pairs


def summarize(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, key_block_size: int
) -> Summaries:
    """Block means of query and key and sums of value, which all passes of a call can share."""
    with launching.on_device_of(query):
        return pool(KernelCall(query, key, value, token_mask, key_block_size=key_block_size))


def select(
    query, key, token_mask, *, summaries, block_size, block_per_row, block_budget,
    initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, rule, scale, distance_bias,
    key_block_size,
) -> Tensor:  # fmt: skip
    """The selected pairs `[B, H, R, C]` bool, in the order of `selection.choose_blocks`.

    Scores are float32, from float32 means.
    """
    with launching.on_device_of(query):
        sizes = (block_size, key_block_size)
        call = KernelCall(query, key, key, token_mask, *sizes, scale=scale)
        summaries = pool(call) if summaries is None else summaries
        candidates = flag_blocks(
            call,
            summaries.counts,
            block_per_row=block_per_row,
            block_budget=block_budget,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
        )
        bias = pair_bias(call, summaries, distance_bias, initial_prior_first_n_blocks)
        is_normalized = RULES[rule].row_normalized
        ranking = score_pairs(call, summaries, candidates, bias, row_normalized=is_normalized)
        if ranking.is_stored and call.n_blocks <= launching.table().topk_up_to_rows:
            return choose_by_topk(ranking)
        return choose_by_radix(ranking)


def forward(
    query, key, value, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output `[B, H, N, D]` in the input dtype, and its log-sum-exp `[B, H, N]` in
    float32 (+inf at padding).

    `blocks` is `[B, H, R, C]` bool with at most `largest_budget` pairs per head (None: any number),
    or None for every live pair.
    """
    with launching.on_device_of(query):
        sizes = (block_size, key_block_size)
        call = KernelCall(query, key, value, token_mask, *sizes, scale=scale, sparse=sparse)
        summaries = pool(call) if summaries is None else summaries
        blocks = call.as_bytes(blocks)
        bias = pair_bias(call, summaries, distance_bias, initial_prior_first_n_blocks)
        lists = build_lists(
            call,
            summaries.counts,
            blocks,
            directions=1,
            query_blocks=call.config_of("forward").query_blocks,
            largest_budget=largest_budget,
        )
        state = coarse_state(call, summaries, blocks, bias)
        return attend(call, lists.by_query, state, bias)


def backward(
    grad_output, query, key, value, output, lse, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of query, key and value, each `[B, H, N, D]` in the input dtype, and of
    the distance bias, `[H, R]` float32.
    """
    with launching.on_device_of(query):
        sizes = (block_size, key_block_size)
        call = KernelCall(query, key, value, token_mask, *sizes, scale=scale, sparse=sparse)
        summaries = pool(call) if summaries is None else summaries
        blocks = call.as_bytes(blocks)
        bias = pair_bias(call, summaries, distance_bias, initial_prior_first_n_blocks)
        lists = build_lists(
            call,
            summaries.counts,
            blocks,
            directions=2,
            query_blocks=call.config_of("query_gradient").query_blocks,
            largest_budget=largest_budget,
        )
        upstream, row_sums = reduce_rows(call, grad_output, output, lse)
        coarse = coarse_gradients(call, summaries, blocks, bias, row_sums)
        grad_query, pairs = query_gradient(call, lists.by_query, bias, upstream, coarse)
        assert lists.by_key is not None  # two directions
        grad_key, grad_value = key_gradients(call, lists.by_key, bias, upstream, coarse)
        grad_bias = bias_gradient(call, summaries, blocks, bias, row_sums, lists.by_query, pairs)
        return grad_query, grad_key, grad_value, grad_bias
