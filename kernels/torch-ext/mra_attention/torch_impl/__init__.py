"""MRA-2 and MRA-2-s in plain torch without any N x N buffer, forward and hand-written backward.

The coarse part gives every query row of block x the state of an online softmax, a maximum R_x, a
numerator a_x and a denominator z_x; the exact part attends to the gathered keys of the row's
selected blocks; both are merged by their log-sum-exp. With c_y real tokens in key block y, V_y the
sum of their values and S the coarse logits,

    E_xy = exp(S_xy - R_x) outside the selection, 0 inside
    a_x = sum_y E_xy V_y        z_x = sum_y E_xy c_y

and backward, with L_i the merged log-sum-exp, delta_i = dO_i . O_i and w_i = exp(R_x - L_i),

    G_x = sum_i w_i dO_i        g_x = sum_i w_i delta_i
    dS_xy = E_xy (G_x . V_y - c_y g_x)        dV_y = sum_x E_xy G_x

while the exact part is the backward of softmax attention fed the merged output and log-sum-exp.

Query blocks are sorted by their number of selected blocks, and those with about the same number
form one batched attention (`batched.py`); keys are gathered in pieces, on a CPU into
buffers (`scratch.py`) small enough for its caches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import (
    block_sums,
    chunks,
    compute_dtype,
    count_blocks,
    drop_trivial_mask,
    fill_padding_,
    mask_to_blocks,
    to_blocks,
    zero_unsafe_padding,
)
from .batched import attend, attend_backward, operand_dtype
from .dense import dense_backward, dense_forward, flash_is_available
from .scratch import convert, scratch, take

#: Keys gathered at a time, counted in the compute dtype: a few times what stays in a core's cache,
#: which pays for the calls.
_GATHER_BYTES = 3 * 2**19
_GATHER_BYTES_ON_A_GPU = 2**28
#: Query blocks with different numbers of selected blocks share a batched attention when that takes
#: at most so many blocks of padding: about what one more call costs.
_PADDING_BLOCKS = 24


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor | None,
    *,
    scale: float,
    sparse: bool,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, N, D]` and its log-sum-exp `[B, H, N]` (+inf at padding).

    Both in the compute dtype.

    `token_mask` is `[B, N]` bool or None; `blocks` is `[B, H, R, R]` bool, None for every live
    pair.
    """
    if blocks is None and flash_is_available(query.device.type):
        return dense_forward(query, key, value, token_mask, scale)
    token_mask = drop_trivial_mask(token_mask)
    dtype = compute_dtype(query.dtype)
    output = query.new_empty(query.shape, dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    settings = (scale, sparse, block_size)
    for part, problem in _problems(query, key, value, token_mask, blocks, *settings):
        _forward_part(problem, output[part], lse[part])
    return output, lse


def _forward_part(problem: "_Problem", output_part: Tensor, lse_part: Tensor) -> None:
    output = problem.rows_to_write(output_part, "output rows")
    lse = problem.exact_forward(output)
    if problem.coarse is not None:
        lse = problem.coarse.merge_(output, lse)
    dead = lse == -torch.inf  # nothing to attend to
    if bool(dead.any()):
        output.masked_fill_(dead[..., None], 0)
        lse.masked_fill_(dead, torch.inf)
    problem.write(output, output_part)
    lse_part.copy_(problem.to_tokens(lse[..., None])[..., 0])
    if problem.token_mask is not None:
        fill_padding_(output_part, problem.token_mask, 0)
        fill_padding_(lse_part, problem.token_mask, torch.inf)


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
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each `[B, H, N, D]` in the input dtype."""
    if blocks is None and flash_is_available(query.device.type):
        return dense_backward(grad_output, query, key, value, output, lse, token_mask, scale)
    token_mask = drop_trivial_mask(token_mask)
    grads = tuple(torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3))
    settings = (scale, sparse, block_size)
    for part, problem in _problems(query, key, value, token_mask, blocks, *settings):
        part_grads = [grad[part] for grad in grads]
        _backward_part(problem, grad_output[part], output[part], lse[part], part_grads)
    if token_mask is not None:
        for grad in grads:
            fill_padding_(grad, token_mask, 0)
    return grads


def _backward_part(
    problem: "_Problem", grad_output: Tensor, output: Tensor, lse: Tensor, part_grads: list[Tensor]
) -> None:
    """Write the gradients of query, key and value into the last argument."""
    # Padding of the last block keeps lse = +inf, so that its probabilities are exp(-inf) = 0.
    missing = problem.n_blocks * problem.block_size - lse.shape[-1]
    row_lse = torch.nn.functional.pad(lse, (0, missing), value=torch.inf)
    row_lse = row_lse.reshape(-1, problem.block_size)
    row_grad, row_output = (problem.to_rows(x).to(problem.dtype) for x in (grad_output, output))
    delta = _row_dots(row_grad, row_output)  # [G * R, M]
    names = ("grad_query", "grad_key", "grad_value")
    grads = list(map(problem.rows_to_write, part_grads, names))
    if problem.coarse is None:
        for grad in grads:
            grad.zero_()
    else:
        coarse = problem.coarse.backward(row_grad, delta, row_lse)
        for grad, coarse_grad in zip(grads, coarse, strict=True):
            grad.copy_(coarse_grad)  # the same for every token of a block
    problem.add_exact_backward_(*grads, row_grad, delta, row_lse)
    for grad, part_grad in zip(grads, part_grads, strict=True):
        problem.write(grad, part_grad)


def _problems(query, key, value, token_mask, blocks, *settings):
    """Yield (samples, heads) as slices, and the part of the call they are."""
    for part in chunks(query.shape, query.device.type):
        mask_part = None if token_mask is None else token_mask[part[0]]
        blocks_part = None if blocks is None else blocks[part]
        yield part, _Problem(query[part], key[part], value[part], mask_part, blocks_part, *settings)


class _Problem:
    """One part of a call, laid out in blocks.

    G = B * H; a "row" is a query block, a "column" a key block, both `[G * R, M, D]`.
    """

    def __init__(self, query, key, value, token_mask, blocks, scale, sparse, block_size):
        batch, heads, length, _ = query.shape
        self.shape, self.block_size, self.scale = query.shape, block_size, scale
        self.token_mask, self.dtype = token_mask, compute_dtype(query.dtype)
        self.operand_dtype = operand_dtype(query.dtype, query.device.type)
        self.n_blocks = count_blocks(length, block_size)
        self.rows, self.keys, self.values = (self.to_rows(x) for x in (query, key, value))

        real = mask_to_blocks(
            token_mask, batch, length, block_size, self.n_blocks, query.device
        )  # [B, R, M]
        counts = real.sum(-1)
        live = counts > 0
        live_pairs = (live[:, :, None] & live[:, None, :])[:, None].expand(-1, heads, -1, -1)
        selected = live_pairs if blocks is None else blocks & live_pairs
        self.selected = selected.reshape(-1, self.n_blocks, self.n_blocks)  # [G, R, R]
        self.real = real[:, None].expand(-1, heads, -1, -1).reshape(-1, block_size)  # [G * R, M]
        self.key_bias = None  # for the logits of tokens that are not real, in blocks with real ones
        partial = live & (counts < block_size)
        if bool(partial.any()):
            self.partial = partial[:, None].expand(-1, heads, -1).flatten()  # [G * R]
            self.key_bias = torch.zeros(self.real.shape, dtype=self.dtype, device=query.device)
            self.key_bias.masked_fill_(~self.real, -torch.inf)
        self.coarse = None if sparse or blocks is None else _Coarse(self, real, live_pairs)

    def to_rows(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` -> contiguous `[G * R, M, D]`; padding holds numbers that do no harm."""
        x = zero_unsafe_padding(x, self.token_mask)
        blocks = to_blocks(x, None, self.block_size, self.n_blocks)
        return blocks.reshape(-1, self.block_size, x.shape[-1]).contiguous()

    def to_tokens(self, rows: Tensor) -> Tensor:
        """`[G * R, M, D]` -> `[B, H, N, D]`, a view."""
        batch, heads, length, _ = self.shape
        padded = rows.view(batch, heads, self.n_blocks * self.block_size, rows.shape[-1])
        return padded[:, :, :length]

    def rows_to_write(self, tokens: Tensor, name: str) -> Tensor:
        """Rows `[G * R, M, D]` in the compute dtype for the result `tokens` `[B, H, N, D]`: its own
        memory where it is laid out in whole blocks, else scratch. `write` ends it.
        """
        whole = tokens.shape[2] == self.n_blocks * self.block_size
        if whole and tokens.dtype == self.dtype and tokens.is_contiguous():
            return tokens.view(-1, self.block_size, tokens.shape[-1])
        return scratch(name, self.rows.shape, self.dtype, tokens.device)

    def write(self, rows: Tensor, tokens: Tensor) -> None:
        """Copy rows from `rows_to_write` to `tokens` unless they are the same memory."""
        if rows.data_ptr() != tokens.data_ptr():
            tokens.copy_(self.to_tokens(rows))

    def pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (rows `[n]`, columns `[n, P]`, surplus `[n, P]` bool or None).

        A piece is n query blocks that select up to P key blocks each; where `surplus` is True the
        column only fills the list of a shorter row up.
        """
        counts = self.selected.sum(-1).flatten()  # [G * R]
        rank = counts
        if self.key_bias is not None:
            # Of rows with equal counts those that need a bias come last, into as few pieces as can.
            partial = self.partial.view(-1, 1, self.n_blocks)  # [G, 1, R]
            rank = 2 * counts + (self.selected & partial).any(-1).flatten()
        order = rank.argsort(stable=True)
        counts = counts.index_select(0, order)  # ascending
        pairs = self.selected.flatten(0, 1).index_select(0, order).nonzero()  # row by row
        first_column = order // self.n_blocks * self.n_blocks  # of the head of each row
        columns = first_column.index_select(0, pairs[:, 0]).add_(pairs[:, 1])
        starts = counts.cumsum(0) - counts
        block_bytes = self.block_size * self.shape[-1] * self.dtype.itemsize
        on_a_cpu = counts.device.type == "cpu"
        gather_bytes = _GATHER_BYTES if on_a_cpu else _GATHER_BYTES_ON_A_GPU
        for begin, end, width, uniform, offset in _groups(counts):
            if uniform:
                lists = columns[offset : offset + (end - begin) * width].view(-1, width)
                surplus = None
            else:
                slots = torch.arange(width, device=counts.device)
                last = counts[begin:end, None] - 1
                lists = columns[starts[begin:end, None] + torch.minimum(slots, last)]
                surplus = slots > last
            size = max(1, gather_bytes // (block_bytes * width))
            for piece in range(0, end - begin, size):
                span = slice(piece, piece + size)
                rows = order[begin:end][span]
                yield rows, lists[span], None if surplus is None else surplus[span]

    def gather(
        self, columns: Tensor, surplus: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[n, P * M, D]` of the columns `[n, P]`, and the bias `[n, 1, P * M]`
        that hides padding and surplus columns.
        """
        n, flat = columns.shape[0], columns.flatten()
        shape = (n, -1, self.shape[-1])
        keys = self.take("keys", self.keys, flat).view(shape)
        values = self.take("values", self.values, flat).view(shape)
        padded = self.key_bias is not None and bool(self.partial.index_select(0, flat).any())
        if not padded and surplus is None:
            return keys, values, None
        if padded:
            bias = self.key_bias.index_select(0, flat).view(*columns.shape, self.block_size)
        else:
            bias = keys.new_zeros((*columns.shape, self.block_size), dtype=self.dtype)
        if surplus is not None:
            bias.masked_fill_(surplus[..., None], -torch.inf)
        return keys, values, bias.view(n, 1, -1)

    def take(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """Some rows of an input, in the dtype in which they are multiplied."""
        return convert(f"{name} operand", take(name, rows, index), self.operand_dtype)

    def exact_forward(self, output: Tensor) -> Tensor:
        """Write the softmax over the selected blocks alone to `output` `[G * R, M, D]`; returns its
        log-sum-exp `[G * R, M]` (-inf without any).
        """
        lse = torch.full(self.rows.shape[:2], -torch.inf, dtype=self.dtype, device=self.rows.device)
        for rows, columns, surplus in self.pieces():
            keys, values, bias = self.gather(columns, surplus)
            query = self.take("query", self.rows, rows)
            piece_output, piece_lse = attend(query, keys, values, bias, self.scale)
            output.index_copy_(0, rows, piece_output)
            lse.index_copy_(0, rows, piece_lse)
        nothing = ~self.selected.any(-1).flatten()
        if bool(nothing.any()):
            output[nothing] = 0
        return lse

    def add_exact_backward_(
        self,
        grad_rows: Tensor,
        grad_keys: Tensor,
        grad_values: Tensor,
        grad: Tensor,
        delta: Tensor,
        lse: Tensor,
    ) -> None:
        """Add the gradients through the selected blocks to the first three, all `[G * R, M, D]` in
        the compute dtype.
        """
        block = grad.shape[1:]
        for rows, columns, surplus in self.pieces():
            keys, values, bias = self.gather(columns, surplus)
            d_query, d_keys, d_values = attend_backward(
                take("grad", grad, rows),
                self.take("query", self.rows, rows),
                keys,
                values,
                bias,
                take("delta", delta, rows),
                take("lse", lse, rows),
                self.scale,
            )
            flat = columns.flatten()
            add_blocks_(grad_rows, rows, d_query)
            add_blocks_(grad_keys, flat, d_keys.view(-1, *block))
            add_blocks_(grad_values, flat, d_values.view(-1, *block))


def _groups(counts: Tensor) -> Iterator[tuple[int, int, int, bool, int]]:
    """Cut rows, sorted by their number of selected blocks, into groups of about the same number.

    Yields (begin, end, largest number, whether all have it, selected blocks before `begin`).
    """
    widths, sizes = (x.tolist() for x in counts.unique_consecutive(return_counts=True))
    begin = offset = 0
    i = 0
    while i < len(widths):
        if widths[i] == 0:
            begin, i = sizes[i], i + 1
            continue
        j, surplus, members, held = i, 0, sizes[i], sizes[i] * widths[i]
        while j + 1 < len(widths):
            surplus += members * (widths[j + 1] - widths[j])
            if surplus > _PADDING_BLOCKS:
                break
            j += 1
            members += sizes[j]
            held += sizes[j] * widths[j]
        yield begin, begin + members, widths[j], i == j, offset
        begin, offset, i = begin + members, offset + held, j + 1


class _Coarse:
    """The low-resolution part: operands of R rows instead of N."""

    def __init__(self, problem: _Problem, real: Tensor, live_pairs: Tensor):
        batch, heads, _, dim = problem.shape
        self.n_blocks, self.scale = problem.n_blocks, problem.scale

        real_or_none = None if problem.token_mask is None else real

        def sums(rows: Tensor) -> Tensor:  # [G * R, M, D] -> [B, H, R, D]
            blocks = rows.view(batch, heads, self.n_blocks, problem.block_size, dim)
            return block_sums(blocks, real_or_none, problem.dtype)

        counts = real.sum(-1)  # [B, R]
        size = counts.clamp_min(1)[:, None, :, None].to(problem.dtype)
        self.query_means = (sums(problem.rows) / size).flatten(0, 1)  # [G, R, D]
        self.key_means = (sums(problem.keys) / size).flatten(0, 1)
        self.value_sums = sums(problem.values).flatten(0, 1)
        counts_by_head = counts[:, None].expand(-1, heads, -1)
        self.counts = counts_by_head.reshape(-1, 1, self.n_blocks).to(problem.dtype)  # [G, 1, R]
        inside = live_pairs.reshape(problem.selected.shape) & ~problem.selected
        logits = self.scale * torch.bmm(self.query_means, self.key_means.mT)
        logits = logits.masked_fill_(~inside, -torch.inf)
        row_max = logits.amax(-1)  # [G, R], -inf where nothing is left to the coarse part
        self.row_max = row_max.view(-1, 1)
        finite_max = row_max.masked_fill(row_max == -torch.inf, 0)
        self.weights = logits.sub_(finite_max[..., None]).exp_()  # E

    def merge_(self, output: Tensor, exact_lse: Tensor) -> Tensor:
        """Merge into the exact part, `[G * R, M, D]` and `[G * R, M]`; returns the log-sum-exp."""
        numerator = torch.bmm(self.weights, self.value_sums)  # [G, R, D]
        denominator = (self.weights * self.counts).sum(-1).view(-1, 1)
        lse = torch.logaddexp(exact_lse, self.row_max + denominator.log())  # [G * R, M]
        finite_lse = lse.masked_fill(lse == -torch.inf, 0)
        output.mul_((exact_lse - finite_lse).exp_()[..., None])
        coarse_weight = (self.row_max - finite_lse).exp_()[..., None]
        output.addcmul_(coarse_weight, numerator.view(-1, 1, output.shape[-1]))
        return lse

    def backward(self, grad: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for every token of a block, `[G * R, 1, D]` each (the mean spreads them
        evenly).
        """
        dim = grad.shape[-1]
        # 0 at padding and where there is no coarse part
        weight = (self.row_max - lse).exp_()  # [G * R, M]
        grad_sum = torch.bmm(weight[:, None], grad).view(-1, self.n_blocks, dim)  # G: [G, R, D]
        delta_sum = (weight * delta).sum(-1).view(-1, self.n_blocks, 1)  # g: [G, R, 1]
        grad_values = torch.bmm(self.weights.mT, grad_sum)
        grad_logits = torch.bmm(grad_sum, self.value_sums.mT).addcmul_(
            delta_sum, self.counts, value=-1
        )
        grad_logits.mul_(self.weights)
        per_token = self.scale / self.counts.mT.clamp_min(1)  # [G, R, 1]
        grad_query = torch.bmm(grad_logits, self.key_means).mul_(per_token)
        grad_keys = torch.bmm(grad_logits.mT, self.query_means).mul_(per_token)
        return grad_query.view(-1, 1, dim), grad_keys.view(-1, 1, dim), grad_values.view(-1, 1, dim)


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the last dimension of x * y, a few rows at a time: no product as large as x."""
    size = max(1, _GATHER_BYTES // (x[0].numel() * x.dtype.itemsize))
    pieces = zip(x.split(size), y.split(size), strict=True)
    return torch.cat([(a * b).sum(-1) for a, b in pieces])


def add_blocks_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`target[index[i]] += source[i]` in a fixed order, so that two runs give the same bits on
    every device.
    """
    if target.device.type == "cpu":
        target.index_add_(0, index, source)  # sequential on a CPU
    else:
        add_sorted_blocks_(target, index, source)


def add_sorted_blocks_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`add_blocks_` without atomics: one sum per run of equal indices, after a stable sort."""
    index, order = index.sort(stable=True)
    where, lengths = index.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(source[order].flatten(1), "sum", lengths=lengths)
    target[where] += sums.view(-1, *target.shape[1:])
