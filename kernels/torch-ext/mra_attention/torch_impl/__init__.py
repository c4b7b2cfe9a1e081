"""MRA-2 and MRA-2-s in plain torch without an N x N buffer, forward and hand-written backward.

The coarse part gives every query of block x the state of an online softmax: a maximum R_x, a
numerator a_x and a denominator z_x. The exact part attends to the gathered keys of the selected
blocks. Both are merged by their log-sum-exp. With c_y real tokens in key block y, V_y the sum of
their values and S the coarse logits,

    E_xy = exp(S_xy - R_x) outside the selection, 0 inside
    a_x = sum_y E_xy V_y        z_x = sum_y E_xy c_y

and backward, with L_i the merged log-sum-exp, delta_i = dO_i . O_i and w_i = exp(R_x - L_i),

    G_x = sum_i w_i dO_i        g_x = sum_i w_i delta_i
    dS_xy = E_xy (G_x . V_y - c_y g_x)        dV_y = sum_x E_xy G_x

while the exact part is the backward of softmax attention fed the merged output and log-sum-exp. The
bias of a pair is added to its logits in both parts; its gradient is the sum of their gradients.

Query blocks are sorted by their number of selected blocks, and blocks with about the same number
form one batched attention (`batched.py`). Its keys are gathered, on a CPU into buffers
(`scratch.py`) small enough for the caches.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import (
    bias_of_pairs,
    chunks,
    compute_dtype,
    count_blocks,
    drop_trivial_mask,
    fill_padding_,
    global_pairs,
    mask_to_blocks,
    repeat_columns,
    to_blocks,
    zero_unsafe_padding,
)
from ..parallel import run_items
from ..selection import select as select_pairs
from .batched import LOG2_E, attend, attend_backward, operand_dtype
from .coarse import CoarsePart
from .dense import dense_backward, dense_forward, flash_is_available
from .scratch import borrowed_buffers, convert, scratch, take
from .sums import add_blocks_, sum_by_distance

#: Bytes of the keys of one batched attention, in the compute dtype: a few times what stays in a
#: core's cache, which pays for the calls.
_GATHER_BYTES = 3 * 2**19
_GATHER_BYTES_ON_A_GPU = 2**28
#: Query blocks with different numbers of selected blocks share a batched attention where that adds
#: at most so many filler blocks of the query's size: about the cost of one more call.
_FILLER_BLOCKS = 24


def summarize(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, key_block_size: int
) -> None:
    """Return None: every pass works on its own chunks, and shares nothing."""


def select(
    query, key, token_mask, *, summaries, block_size, block_per_row, block_budget,
    initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, rule, scale, distance_bias,
    key_block_size,
) -> Tensor:  # fmt: skip
    """The chosen pairs `[B, H, R, C]` bool, by `selection.select`."""
    return select_pairs(
        query,
        key,
        token_mask,
        block_size=block_size,
        block_per_row=block_per_row,
        block_budget=block_budget,
        initial_prior_first_n_blocks=initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
        rule=rule,
        scale=scale,
        key_block_size=key_block_size,
        distance_bias=distance_bias,
    )


def forward(
    query, key, value, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output `[B, H, N, D]` and its log-sum-exp `[B, H, N]` (+inf at padding), both in
    the compute dtype.

    `token_mask` is `[B, N]` bool or None; `blocks` is `[B, H, R, C]` bool, None for every live
    pair. Neither `summaries` nor `largest_budget` is needed here.
    """
    if blocks is None and distance_bias is None and flash_is_available(query.device.type):
        return dense_forward(query, key, value, token_mask, scale)
    token_mask = drop_trivial_mask(token_mask)
    dtype = compute_dtype(query.dtype)
    output = query.new_empty(query.shape, dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    settings = (scale, sparse, (block_size, key_block_size), initial_prior_first_n_blocks)
    tensors = (query, key, value, token_mask, blocks, distance_bias)

    def work(where: tuple[slice, slice]) -> None:
        _forward_chunk(_chunk_in_blocks(where, *tensors, *settings), output[where], lse[where])

    _run_chunks(work, query)
    return output, lse


def _forward_chunk(chunk: "_Chunk", output: Tensor, lse: Tensor) -> None:
    """Write the output and the log-sum-exp of a chunk into the last two arguments."""
    output_blocks = chunk.result_blocks(output, "output blocks", chunk.block_size)
    block_lse = chunk.exact_forward(output_blocks)
    if chunk.coarse is not None:
        block_lse = chunk.coarse.merge_(output_blocks, block_lse)
    dead = block_lse == -torch.inf  # nothing to attend to
    if bool(dead.any()):
        output_blocks.masked_fill_(dead[..., None], 0)
        block_lse.masked_fill_(dead, torch.inf)
    chunk.copy_result(output_blocks, output)
    lse.copy_(chunk.to_tokens(block_lse[..., None])[..., 0])
    if chunk.token_mask is not None:
        fill_padding_(output, chunk.token_mask, 0)
        fill_padding_(lse, chunk.token_mask, torch.inf)


def backward(
    grad_output, query, key, value, output, lse, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of query, key and value, each `[B, H, N, D]` in the input dtype, and of
    the distance bias `[H, R]`.
    """
    if blocks is None and distance_bias is None and flash_is_available(query.device.type):
        return *dense_backward(grad_output, query, key, value, output, lse, token_mask, scale), None
    token_mask = drop_trivial_mask(token_mask)
    grad_query, grad_key, grad_value = grads = [
        torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)
    ]
    grad_bias = None if distance_bias is None else torch.zeros_like(distance_bias)
    settings = (scale, sparse, (block_size, key_block_size), initial_prior_first_n_blocks)
    tensors = (query, key, value, token_mask, blocks, distance_bias)

    def work(where: tuple[slice, slice]) -> Tensor | None:
        chunk = _chunk_in_blocks(where, *tensors, *settings)
        chunk_grads = [grad[where] for grad in grads]
        _backward_chunk(chunk, grad_output[where], output[where], lse[where], chunk_grads)
        return None if grad_bias is None else chunk.bias_gradient()

    for where, chunk_grad_bias in _run_chunks(work, query):  # in a fixed order
        if grad_bias is not None and chunk_grad_bias is not None:
            grad_bias[where[1]] += chunk_grad_bias
    if token_mask is not None:
        for grad in grads:
            fill_padding_(grad, token_mask, 0)
    return grad_query, grad_key, grad_value, grad_bias


def _backward_chunk(
    chunk: "_Chunk", grad_output: Tensor, output: Tensor, lse: Tensor, grads: list[Tensor]
) -> None:
    """Write the gradients of query, key and value of a chunk into the last argument."""
    # The tail of the last block keeps lse = +inf, so that its probabilities are exp(-inf) = 0.
    missing = chunk.padded - lse.shape[-1]
    block_lse = F.pad(lse, (0, missing), value=torch.inf).reshape(-1, chunk.block_size)
    grad_blocks, output_blocks = (
        chunk.cut(x, chunk.block_size).to(chunk.dtype) for x in (grad_output, output)
    )
    delta = _row_dots(grad_blocks, output_blocks)  # [G * R, M]
    names = ("grad_query", "grad_key", "grad_value")
    sizes = (chunk.block_size, chunk.key_block_size, chunk.key_block_size)
    results = list(map(chunk.result_blocks, grads, names, sizes))
    if chunk.coarse is None:
        chunk.grad_pairs = torch.zeros_like(chunk.selected, dtype=chunk.dtype)
        for result in results:
            result.zero_()
    else:
        *coarse_grads, chunk.grad_pairs = chunk.coarse.backward(grad_blocks, delta, block_lse)
        for result, coarse_grad in zip(results, coarse_grads, strict=True):
            result.copy_(coarse_grad)  # the same for every token of a block
    grad_query, grad_key, grad_value = results
    chunk.add_exact_backward_(grad_query, grad_key, grad_value, grad_blocks, delta, block_lse)
    for result, grad in zip(results, grads, strict=True):
        chunk.copy_result(result, grad)


def _run_chunks(
    work: Callable[[tuple[slice, slice]], Tensor | None], query: Tensor
) -> list[tuple[tuple[slice, slice], Tensor | None]]:
    """Call `work` for where each chunk of `query` lies, (samples, heads) as slices, and return what
    it returns for each.
    """
    places = list(chunks(query.shape, query.device.type))
    results: list[Tensor | None] = [None] * len(places)

    def run(item: int) -> None:
        with borrowed_buffers():
            results[item] = work(places[item])

    run_items(run, len(places))
    return list(zip(places, results, strict=True))


def _chunk_in_blocks(
    where, query, key, value, token_mask, blocks, distance_bias, *settings
) -> "_Chunk":
    """The samples and heads `where` of a call, laid out in blocks."""
    chunk_mask = None if token_mask is None else token_mask[where[0]]
    chunk_blocks = None if blocks is None else blocks[where]
    chunk_bias = None if distance_bias is None else distance_bias[where[1]]
    inputs = (query[where], key[where], value[where])
    return _Chunk(*inputs, chunk_mask, chunk_blocks, chunk_bias, *settings)


class _Chunk:
    """Some samples and heads of a call, laid out in blocks.

    G = B * H. Queries are kept as blocks `[G * R, M, D]`, keys and values as `[G * C, W, D]`; a
    "row" is the index of a query block among them, a "column" the index of a key block.
    """

    def __init__(
        self, query, key, value, token_mask, blocks, distance_bias, scale, sparse, block_sizes,
        initial_prior_first_n_blocks,
    ):  # fmt: skip
        batch, heads, length, _ = query.shape
        self.shape, self.scale = query.shape, scale
        self.block_size, self.key_block_size = block_sizes
        self.token_mask, self.dtype = token_mask, compute_dtype(query.dtype)
        self.operand_dtype = operand_dtype(query.dtype, query.device.type)
        self.n_blocks = count_blocks(length, self.block_size)
        self.per_block = self.block_size // self.key_block_size
        self.n_key_blocks = self.n_blocks * self.per_block
        self.queries = self.cut(query, self.block_size)
        self.keys, self.values = (self.cut(x, self.key_block_size) for x in (key, value))

        real, real_keys = (
            mask_to_blocks(token_mask, batch, length, size, self.padded // size, query.device)
            for size in block_sizes
        )  # [B, R, M] and [B, C, W]
        counts = real_keys.sum(-1)
        live, live_keys = real.any(-1), counts > 0
        live_pairs = live[:, None, :, None] & live_keys[:, None, None, :]
        live_pairs = live_pairs.expand(-1, heads, -1, -1)
        selected = live_pairs if blocks is None else blocks & live_pairs
        self.selected = selected.reshape(-1, self.n_blocks, self.n_key_blocks)  # [G, R, C]
        self.key_bias = None  # hides what is not real in blocks that hold real tokens too
        partial = live_keys & (counts < self.key_block_size)
        if bool(partial.any()):
            self.partial = partial[:, None].expand(-1, heads, -1).flatten()  # [G * C]
            padding = ~real_keys[:, None].expand(-1, heads, -1, -1)
            padding = padding.reshape(-1, self.key_block_size)
            self.key_bias = torch.zeros(padding.shape, dtype=self.dtype, device=query.device)
            self.key_bias.masked_fill_(padding, -torch.inf)  # [G * C, W]
        self.biases = None  # of all pairs, [G * R, C]
        #: The sums of the gradients of their logits, [G, R, C]; set by the backward pass.
        self.grad_pairs: Tensor
        self.live, self.initial_prior_first_n_blocks = live, initial_prior_first_n_blocks
        if distance_bias is not None:
            biases = bias_of_pairs(distance_bias, live, initial_prior_first_n_blocks)
            biases = repeat_columns(biases, self.per_block).expand(batch, -1, -1, -1)
            self.biases = biases.reshape(-1, self.n_key_blocks)
        self.coarse = None
        if not sparse and blocks is not None:
            self.coarse = CoarsePart(self, real, real_keys, live_pairs)

    @property
    def padded(self) -> int:
        """Tokens of all blocks."""
        return self.n_blocks * self.block_size

    def cut(self, x: Tensor, size: int) -> Tensor:
        """`[B, H, N, D]` -> contiguous blocks of `size` tokens, `[G * R, M, D]` or `[G * C, W, D]`;
        padding holds numbers that do no harm.
        """
        x = zero_unsafe_padding(x, self.token_mask)
        blocks = to_blocks(x, None, size, self.padded // size)
        return blocks.reshape(-1, size, x.shape[-1]).contiguous()

    def to_tokens(self, blocks: Tensor) -> Tensor:
        """Blocks of all tokens `[..., D]` -> `[B, H, N, D]`, a view."""
        batch, heads, length, _ = self.shape
        return blocks.view(batch, heads, self.padded, blocks.shape[-1])[:, :, :length]

    def result_blocks(self, tokens: Tensor, name: str, size: int) -> Tensor:
        """Memory, in blocks of `size` tokens as of `cut`, in the compute dtype for the result
        `tokens` `[B, H, N, D]`: its own where that consists of whole blocks, else scratch.
        `copy_result` must follow.
        """
        whole = tokens.shape[2] == self.padded
        if whole and tokens.dtype == self.dtype and tokens.is_contiguous():
            return tokens.view(-1, size, tokens.shape[-1])
        shape = (self.queries.shape[0] * self.block_size // size, size, tokens.shape[-1])
        return scratch(name, shape, self.dtype, tokens.device)

    def copy_result(self, blocks: Tensor, tokens: Tensor) -> None:
        """Copy blocks from `result_blocks` to `tokens` unless they are the same memory."""
        if blocks.data_ptr() != tokens.data_ptr():
            tokens.copy_(self.to_tokens(blocks))

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (rows `[n]`, columns `[n, P]`, filler `[n, P]` bool or None) for each batched
        attention: n query blocks that select up to P key blocks each. Where `filler` is True, a
        column only fills up the list of a shorter row.
        """
        counts = self.selected.sum(-1).flatten()  # [G * R]
        rank = counts
        if self.key_bias is not None:
            # Among rows with equal counts, the ones that need a bias come last: fewer batches have
            # a bias then.
            partial = self.partial.view(-1, 1, self.n_key_blocks)  # [G, 1, C]
            rank = 2 * counts + (self.selected & partial).any(-1).flatten()
        order = rank.argsort(stable=True)
        counts = counts.index_select(0, order)  # ascending
        pairs = self.selected.flatten(0, 1).index_select(0, order).nonzero()  # row by row
        first_column = order // self.n_blocks * self.n_key_blocks  # of the head of each row
        columns = first_column.index_select(0, pairs[:, 0]).add_(pairs[:, 1])
        starts = counts.cumsum(0) - counts
        block_bytes = self.key_block_size * self.shape[-1] * self.dtype.itemsize
        on_a_cpu = counts.device.type == "cpu"
        gather_bytes = _GATHER_BYTES if on_a_cpu else _GATHER_BYTES_ON_A_GPU
        filler_blocks = _FILLER_BLOCKS * self.per_block
        for begin, end, width, uniform, offset in _groups(counts, filler_blocks):
            if uniform:
                lists = columns[offset : offset + (end - begin) * width].view(-1, width)
                filler = None
            else:
                slots = torch.arange(width, device=counts.device)
                last = counts[begin:end, None] - 1
                lists = columns[starts[begin:end, None] + torch.minimum(slots, last)]
                filler = slots > last
            size = max(1, gather_bytes // (block_bytes * width))
            for first in range(0, end - begin, size):
                batch = slice(first, first + size)
                rows = order[begin:end][batch]
                yield rows, lists[batch], None if filler is None else filler[batch]

    def gather(
        self, rows: Tensor, columns: Tensor, filler: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[n, P * W, D]` of the columns `[n, P]`, and the bias `[n, 1, P * W]`, to
        base 2, of their distances from the rows `[n]`, which also hides padding and filler.
        """
        n, flat = columns.shape[0], columns.flatten()
        shape = (n, -1, self.shape[-1])
        keys = self.take("keys", self.keys, flat).view(shape)
        values = self.take("values", self.values, flat).view(shape)
        key_bias = self.key_bias
        if key_bias is not None and not bool(self.partial.index_select(0, flat).any()):
            key_bias = None
        if key_bias is None and filler is None and self.biases is None:
            return keys, values, None
        if key_bias is not None:
            bias = key_bias.index_select(0, flat).view(*columns.shape, self.key_block_size)
        else:
            bias = keys.new_zeros((*columns.shape, self.key_block_size), dtype=self.dtype)
        if self.biases is not None:
            of_pairs = self.biases[rows[:, None], columns % self.n_key_blocks]
            bias += of_pairs[..., None] * LOG2_E
        if filler is not None:
            bias.masked_fill_(filler[..., None], -torch.inf)
        return keys, values, bias.view(n, 1, -1)

    def take(self, name: str, blocks: Tensor, index: Tensor) -> Tensor:
        """Some blocks of an input, in the dtype in which they are multiplied."""
        return convert(f"{name} operand", take(name, blocks, index), self.operand_dtype)

    def exact_forward(self, output: Tensor) -> Tensor:
        """Write the softmax attention over the selected blocks to `output` `[G * R, M, D]`; return
        its log-sum-exp `[G * R, M]`, -inf in rows without a selected block.
        """
        shape, device = self.queries.shape[:2], self.queries.device
        lse = torch.full(shape, -torch.inf, dtype=self.dtype, device=device)
        for rows, columns, filler in self.batches():
            keys, values, bias = self.gather(rows, columns, filler)
            query = self.take("query", self.queries, rows)
            batch_output, batch_lse = attend(query, keys, values, bias, self.scale)
            output.index_copy_(0, rows, batch_output)
            lse.index_copy_(0, rows, batch_lse)
        nothing = ~self.selected.any(-1).flatten()
        if bool(nothing.any()):
            output[nothing] = 0
        return lse

    def add_exact_backward_(
        self,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        grad_output: Tensor,
        delta: Tensor,
        lse: Tensor,
    ) -> None:
        """Add the gradients through the selected blocks to the first three arguments, and to those
        of the biases of pairs.

        Gradients are in blocks as of `cut`, `delta` and `lse` `[G * R, M]`, all in the compute
        dtype.
        """
        for rows, columns, filler in self.batches():
            keys, values, bias = self.gather(rows, columns, filler)
            d_query, d_keys, d_values, grad_logits = attend_backward(
                take("grad", grad_output, rows),
                self.take("query", self.queries, rows),
                keys,
                values,
                bias,
                take("delta", delta, rows),
                take("lse", lse, rows),
                self.scale,
            )
            flat = columns.flatten()
            if self.biases is not None:
                sums = grad_logits.sum(1).view(*columns.shape, self.key_block_size).sum(-1)
                # Equal columns of a row are filler, whose gradients are 0: any order will do.
                of_rows = sums.new_zeros((len(rows), self.n_key_blocks))
                of_rows.scatter_add_(1, columns % self.n_key_blocks, sums)
                self.grad_pairs.view(-1, self.n_key_blocks)[rows] += of_rows
            add_blocks_(grad_query, rows, d_query)
            add_blocks_(grad_key, flat, d_keys.view(-1, *grad_key.shape[1:]))
            add_blocks_(grad_value, flat, d_values.view(-1, *grad_value.shape[1:]))

    def bias_gradient(self) -> Tensor:
        """The gradient of the distance bias of the heads of this chunk, `[heads, R]`."""
        batch, heads, _, _ = self.shape
        grad_pairs = self.grad_pairs.view(batch, heads, self.n_blocks, self.n_blocks, -1).sum(-1)
        if self.initial_prior_first_n_blocks:
            is_global = global_pairs(self.live, self.initial_prior_first_n_blocks)
            grad_pairs = grad_pairs.masked_fill(is_global, 0)
        return sum_by_distance(grad_pairs.sum(0))


def _groups(counts: Tensor, filler_blocks: int) -> Iterator[tuple[int, int, int, bool, int]]:
    """Cut rows, sorted by their number of selected blocks, into groups of about the same number:
    at most `filler_blocks` fill up the lists of a group.

    Yields (first row, row after the last, largest number, whether all rows have it, selected blocks
    before the first row).
    """
    widths, sizes = (x.tolist() for x in counts.unique_consecutive(return_counts=True))
    begin = offset = 0
    i = 0
    while i < len(widths):
        if widths[i] == 0:
            begin, i = sizes[i], i + 1
            continue
        j, filler, rows, selected = i, 0, sizes[i], sizes[i] * widths[i]
        while j + 1 < len(widths):
            filler += rows * (widths[j + 1] - widths[j])
            if filler > filler_blocks:
                break
            j += 1
            rows += sizes[j]
            selected += sizes[j] * widths[j]
        yield begin, begin + rows, widths[j], i == j, offset
        begin, offset, i = begin + rows, offset + selected, j + 1


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Sum x * y over the last dimension, some blocks at a time: no product is as large as x."""
    size = max(1, _GATHER_BYTES // (x[0].numel() * x.dtype.itemsize))
    strips = zip(x.split(size), y.split(size), strict=True)
    return torch.cat([(a * b).sum(-1) for a, b in strips])
