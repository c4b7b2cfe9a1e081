"""MRA-2 and MRA-2-s by Triton kernels: selection, forward and backward, as `ops.py` calls them.

Nothing here reads a value back from the device: sizes follow from shapes and budgets, so all of it
can be captured in a CUDA graph.
"""

import math

import torch
from torch import Tensor

from ..implementations import BLOCK_SIZE, Summaries
from ..selection import RULES, choose_blocks
from . import backward as backward_kernels
from . import forward as forward_kernels
from . import launching
from . import selection as selection_kernels
from .call import BlockLists, KernelCall, as_bytes

_LOG2_E = math.log2(math.e)
#: Block rows that a program of the selection ranks.
_STRIP_ROWS = 16


def summarize(query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None) -> Summaries:
    """What `select`, `forward` and `backward` of one call share; each computes it where it is not
    given.
    """
    with launching.on_device_of(query):
        return KernelCall(query, key, value, token_mask).summaries


def select(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    *,
    summaries: Summaries | None = None,
    block_size: int = BLOCK_SIZE,
    block_per_row: int,
    block_budget: int | None,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
    rule: str,
    scale: float,
) -> Tensor:
    """The chosen pairs `[B, H, R, R]` bool, by the order of `selection.choose_blocks`.

    Scores are float32 from float32 means.
    """
    with launching.on_device_of(query):
        call = KernelCall(query, key, key, token_mask, summaries)
        ranking = Ranking(
            call,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
            block_per_row=block_per_row,
            block_budget=block_budget,
        )
        ranking.score(normalized=RULES[rule].row_normalized, scale=scale)
        table = launching.table()
        if call.n_blocks <= table.topk_up_to_rows and ranking.stored:
            return ranking.choose_by_topk()
        return ranking.choose_by_radix()


class Ranking:
    """Scores of all pairs of blocks, and the best of them."""

    def __init__(
        self,
        call: KernelCall,
        *,
        initial_prior_first_n_blocks: int,
        initial_prior_diagonal_n_blocks: int,
        block_per_row: int,
        block_budget: int | None,
    ):
        rows = call.n_blocks
        self.call, self.scale = call, 1.0
        self.stored = call.length < launching.table().recompute_from_length
        self.first_blocks = initial_prior_first_n_blocks
        self.diagonal_blocks = initial_prior_diagonal_n_blocks
        budget = rows * block_per_row if block_budget is None else block_budget
        self.largest_budget = min(budget, rows**2)
        self.flags = call.empty((call.batch, rows), torch.int32)
        self.budgets = call.empty((call.batch,), torch.int64)
        launching.launch(
            selection_kernels.flag_kernel,
            call.batch,
            call.counts,
            self.flags,
            self.budgets,
            rows,
            self.first_blocks,
            # Beyond R a budget per row, and beyond R * R one per head, select everything.
            min(block_per_row, rows),
            -1 if block_budget is None else self.largest_budget,
            R_PAD=launching.next_power_of_2(rows),
        )
        self.row_largest = call.empty((call.all_heads, rows))
        self.scores = call.empty((call.all_heads, rows, rows) if self.stored else (1,))

    def tile(self) -> dict:
        """Constants and launch configuration of the kernels: the same for all of them, so that
        passes that compute scores anew see the same bits.
        """
        columns = 16 if self.call.padded_dim == 128 else 32
        sizes = {"ROWS": _STRIP_ROWS, "COLUMNS": columns, **self.call.of_coarse_products()}
        return {"STORED": self.stored, "NEGATIVE": self.scale < 0, "num_warps": 8, **sizes}

    def score(self, *, normalized: bool, scale: float) -> None:
        call, self.scale = self.call, scale
        launching.launch(
            selection_kernels.score_kernel,
            call.strips(_STRIP_ROWS),
            call.query_means,
            call.key_means,
            self.flags,
            self.row_largest,
            self.scores,
            abs(scale),
            call.n_blocks,
            call.heads,
            NORMALIZED=normalized,
            **self.tile(),
        )

    def choose_by_topk(self) -> Tensor:
        call = self.call
        return choose_blocks(
            self.scores.view(call.batch, call.heads, call.n_blocks, call.n_blocks),
            self.flags > 0,
            self.budgets,
            largest_budget=self.largest_budget,
            initial_prior_first_n_blocks=self.first_blocks,
            initial_prior_diagonal_n_blocks=self.diagonal_blocks,
        )

    def choose_by_radix(self) -> Tensor:
        call, rows = self.call, self.call.n_blocks
        tie_bits = (2 * rows**2 - 1).bit_length()
        digit_bits = selection_kernels.DIGIT_BITS
        levels = launching.ceil_div(1 + 32 + tie_bits, digit_bits)
        # Whole digits, so that the first ones hold as much of the score as they can.
        tie_bits = min(levels * digit_bits, 63) - (1 + 32)
        prefixes, wanted = call.empty((2, levels, call.all_heads), torch.int64)
        histograms = call.empty((levels, call.all_heads, 2**digit_bits), torch.int32).zero_()
        diagonal = self.diagonal_blocks
        sources = (call.query_means, call.key_means, self.flags, self.row_largest, self.scores)
        found = (prefixes, wanted, histograms)
        shape = (abs(self.scale), rows, call.heads, call.all_heads)
        half_diagonal = diagonal // 2 if diagonal else -1
        constants = {"TIE_BITS": tie_bits, **self.tile()}
        for level in range(levels):
            launching.launch(
                selection_kernels.digit_kernel,
                call.strips(_STRIP_ROWS),
                *sources,
                self.budgets,
                *found,
                *shape,
                half_diagonal,
                level,
                digit_bits * (levels - 1 - level),
                **constants,
            )
        blocks = call.empty((call.batch, call.heads, rows, rows), torch.int8)
        launching.launch(
            selection_kernels.mark_kernel,
            call.strips(_STRIP_ROWS),
            *sources,
            *found,
            blocks,
            *shape,
            half_diagonal,
            levels,
            **constants,
        )
        return blocks.view(torch.bool)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor | None,
    *,
    scale: float,
    sparse: bool,
    block_size: int = BLOCK_SIZE,
    largest_budget: int | None,
    summaries: Summaries | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, N, D]` in the input dtype, and its log-sum-exp `[B, H, N]` in
    float32 (+inf at padding).

    `blocks` is `[B, H, R, R]` bool with at most `largest_budget` pairs per head (None: any number),
    or None for every live pair.
    """
    with launching.on_device_of(query):
        call = KernelCall(query, key, value, token_mask, summaries)
        blocks = as_bytes(call, blocks)
        query_blocks = call.config_of("forward").query_blocks
        lists = BlockLists(call, blocks, largest_budget, directions=1, query_blocks=query_blocks)
        sizes, _, _, first_items, *_ = lists.of(0)
        has_coarse = not sparse
        states = (call.all_heads, call.n_blocks)
        largest, denominator = call.empty((2, *states))
        numerator = call.empty((*states, call.padded_dim))
        if has_coarse:
            constants = call.of_summaries()
            launching.launch(
                forward_kernels.coarse_kernel,
                call.strips(constants["ROWS"]),
                call.query_means,
                call.key_means,
                call.value_sums,
                call.counts,
                blocks,
                largest,
                denominator,
                numerator,
                scale * _LOG2_E,
                call.n_blocks,
                call.heads,
                **constants,
            )
        output = call.empty(tuple(query.shape), query.dtype)
        lse = call.empty(tuple(query.shape[:3]))
        part_sums, part_states = (lists.parts(call, 0, n) for n in (call.padded_dim, 2))
        items = {"QUERY_BLOCKS": query_blocks, "ITEM_BLOCKS": lists.item_blocks}
        launching.launch(
            forward_kernels.exact_kernel,
            call.all_heads * lists.max_items[0],
            *call.inputs,
            call.mask,
            *lists.of(0),
            largest,
            denominator,
            numerator,
            output,
            lse,
            part_sums,
            part_states,
            *call.strides,
            scale * _LOG2_E,
            call.length,
            call.n_blocks,
            call.heads,
            lists.capacity,
            lists.max_items[0],
            HAS_COARSE=has_coarse,
            **items,
            **call.of_tokens(),
            **call.of_items("forward"),
        )
        if lists.may_split:
            launching.launch(
                forward_kernels.merge_kernel,
                call.all_heads * lists.owners[0],
                call.mask,
                sizes,
                first_items,
                output,
                lse,
                part_sums,
                part_states,
                call.length,
                call.n_blocks,
                call.heads,
                lists.max_items[0],
                **items,
                **call.of_tokens(),
            )
        return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor | None,
    *,
    scale: float,
    sparse: bool,
    block_size: int = BLOCK_SIZE,
    largest_budget: int | None,
    summaries: Summaries | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each `[B, H, N, D]` in the input dtype."""
    with launching.on_device_of(query):
        call = KernelCall(query, key, value, token_mask, summaries)
        blocks = as_bytes(call, blocks)
        query_blocks = call.config_of("query_gradient").query_blocks
        lists = BlockLists(call, blocks, largest_budget, directions=2, query_blocks=query_blocks)
        grad_output, output, lse = (x.contiguous() for x in (grad_output, output, lse))
        has_coarse = not sparse
        sizes = (call.length, call.n_blocks, call.heads)
        tokens = {"HAS_COARSE": has_coarse, **call.of_tokens()}

        delta = call.empty(tuple(lse.shape))
        smallest, delta_sums = call.empty((2, call.all_heads, call.n_blocks))
        summaries = (call.all_heads, call.n_blocks, call.padded_dim)
        grad_sums = call.empty(summaries)
        launching.launch(
            backward_kernels.reduce_rows_kernel,
            call.all_heads * call.n_blocks,
            grad_output,
            output,
            lse,
            call.mask,
            delta,
            smallest,
            grad_sums,
            delta_sums,
            *sizes,
            **tokens,
        )
        coarse_query, coarse_key, coarse_value = call.empty((3, *summaries))
        if has_coarse:
            sources = (call.query_means, call.key_means, call.value_sums, call.counts, blocks)
            sources += (smallest, grad_sums, delta_sums)
            numbers = (scale, scale * _LOG2_E, call.n_blocks, call.heads)
            tile = call.of_summaries()
            kernel = backward_kernels.coarse_query_kernel
            programs = call.strips(tile["ROWS"])
            launching.launch(kernel, programs, *sources, coarse_query, *numbers, **tile)
            tile = call.of_summary_columns()
            kernel = backward_kernels.coarse_key_kernel
            programs = call.strips(tile["COLUMNS"])
            launching.launch(kernel, programs, *sources, coarse_key, coarse_value, *numbers, **tile)

        grads = [call.empty(tuple(query.shape), query.dtype) for _ in range(3)]
        grad_query, grad_key, grad_value = grads
        sources = (*call.inputs, call.mask, grad_output, lse, delta)
        numbers = (*call.strides, scale, scale * _LOG2_E, *sizes, lists.capacity)
        items = {"ITEM_BLOCKS": lists.item_blocks, **tokens}

        def merge(direction: int, coarse: Tensor, result: Tensor, parts: Tensor) -> None:
            if lists.may_split:
                list_sizes, _, _, first_items, *_ = lists.of(direction)
                launching.launch(
                    backward_kernels.merge_gradient_kernel,
                    call.all_heads * lists.owners[direction],
                    call.mask,
                    list_sizes,
                    first_items,
                    coarse,
                    result,
                    parts,
                    *sizes,
                    lists.max_items[direction],
                    OWN_BLOCKS=lists.own_blocks[direction],
                    num_warps=8 if call.padded_dim == 128 else 4,  # which spills nothing
                    **items,
                )

        part_queries = lists.parts(call, 0, call.padded_dim)
        launching.launch(
            backward_kernels.exact_query_kernel,
            call.all_heads * lists.max_items[0],
            *sources,
            *lists.of(0),
            coarse_query,
            grad_query,
            part_queries,
            *numbers,
            lists.max_items[0],
            QUERY_BLOCKS=query_blocks,
            **items,
            **call.of_items("query_gradient"),
        )
        merge(0, coarse_query, grad_query, part_queries)
        del part_queries  # its memory serves the next two
        part_keys, part_values = (lists.parts(call, 1, call.padded_dim) for _ in range(2))
        launching.launch(
            backward_kernels.exact_key_kernel,
            call.all_heads * lists.max_items[1],
            *sources,
            *lists.of(1),
            coarse_key,
            coarse_value,
            grad_key,
            grad_value,
            part_keys,
            part_values,
            *numbers,
            lists.max_items[1],
            **items,
            **call.of_items("key_gradient"),
        )
        merge(1, coarse_key, grad_key, part_keys)
        merge(1, coarse_value, grad_value, part_values)
        return grad_query, grad_key, grad_value
