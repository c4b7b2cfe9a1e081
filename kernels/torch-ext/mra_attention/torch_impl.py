"""MRA-2 and MRA-2-s in plain torch without any N x N buffer, forward and hand-written backward.

The coarse part gives every query row of block x the state of an online softmax, a maximum R_x, a
numerator a_x and a denominator z_x; the exact part attends to the gathered keys of the row's
selected blocks; both are merged by their log-sum-exp. With c_y real tokens in key block y, V_y the
sum of their values and S the coarse logits,

    E_xy = exp(S_xy - R_x) outside the selection, 0 inside      a_x = sum_y E_xy V_y      z_x =
    sum_y E_xy c_y

and backward, with L_i the merged log-sum-exp, delta_i = dO_i . O_i and w_i = exp(R_x - L_i),

    G_x = sum_i w_i dO_i    g_x = sum_i w_i delta_i    dS_xy = E_xy (G_x . V_y - c_y g_x)    dV_y =
    sum_x E_xy G_x

while the exact part is the backward of softmax attention fed the merged output and log-sum-exp.

Query blocks are grouped by their number of selected blocks, so that a group is one batched
attention; keys are gathered in pieces of about 2 MB, which costs less than the page faults of
larger buffers. On a CPU the batched attention is aten's flash kernel, elsewhere (or where that
private op is missing) it is matmul and softmax.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .blocks import block_means, compute_dtype, count_blocks, mask_to_blocks, to_blocks

_GATHER_BYTES = 2 * 2**20


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
        return _dense_forward(query, key, value, token_mask, scale)
    problem = _Problem(query, key, value, token_mask, blocks, scale, sparse, block_size)
    exact_output, exact_lse = problem.exact_forward()
    if problem.coarse is None:
        output, lse = exact_output, exact_lse
    else:
        output, lse = problem.coarse.merge(exact_output, exact_lse)
    dead = lse == -torch.inf
    dead |= ~problem.real
    output = output.masked_fill_(dead[..., None], 0)
    lse = lse.masked_fill_(dead, torch.inf)
    lse = problem.to_tokens(lse[..., None], lse.dtype)[..., 0].contiguous()
    return problem.to_tokens(output, problem.dtype), lse


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
        return _dense_backward(grad_output, query, key, value, output, lse, token_mask, scale)
    problem = _Problem(query, key, value, token_mask, blocks, scale, sparse, block_size)
    dtype = problem.dtype
    # Padding of the last block keeps lse = +inf, so that its probabilities are exp(-inf) = 0.
    missing = problem.n_blocks * block_size - query.shape[2]
    row_lse = torch.nn.functional.pad(lse, (0, missing), value=torch.inf).reshape(-1, block_size)
    row_grad, row_output = (problem.to_rows(x).to(dtype) for x in (grad_output, output))
    delta = (row_grad * row_output).sum(-1)  # [G * R, M]
    grads = problem.exact_backward(row_grad, row_output, row_lse, delta)
    if problem.coarse is not None:
        for grad, coarse_grad in zip(
            grads, problem.coarse.backward(row_grad, row_lse, delta), strict=True
        ):
            grad.add_(coarse_grad)
    if token_mask is not None:
        for grad in grads:
            grad.masked_fill_(~problem.real[..., None], 0)
    grad_query, grad_key, grad_value = (problem.to_tokens(grad, query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


class _Problem:
    """One call, laid out in blocks. G = B * H; a "row" is a query block, a "column" a key block,
    both `[G * R, M, D]`.
    """

    def __init__(self, query, key, value, token_mask, blocks, scale, sparse, block_size):
        batch, heads, length, _ = query.shape
        self.shape, self.block_size, self.scale = query.shape, block_size, scale
        self.token_mask, self.dtype = token_mask, compute_dtype(query.dtype)
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
        partial = live & (counts < block_size)
        self.key_bias = (
            None  # added to the logits where a selected block also holds tokens that are not real
        )
        if bool(partial.any()):
            self.key_bias = torch.zeros(self.real.shape, dtype=self.dtype, device=query.device)
            self.key_bias.masked_fill_(~self.real, -torch.inf)
        self.coarse = None if sparse or blocks is None else _Coarse(self, counts, live_pairs)

    def to_rows(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` -> contiguous `[G * R, M, D]`, zeros where there is no real token."""
        blocks = to_blocks(x, self.token_mask, self.block_size, self.n_blocks)
        return blocks.reshape(-1, self.block_size, x.shape[-1]).contiguous()

    def to_tokens(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """`[G * R, M, D]` -> contiguous `[B, H, N, D]` in `dtype`."""
        batch, heads, length, _ = self.shape
        tokens = rows.view(batch, heads, self.n_blocks * self.block_size, rows.shape[-1])[
            :, :, :length
        ]
        return tokens.to(dtype).contiguous()

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows `[n]`, columns `[n, P]`): n query blocks that select P key blocks each, a
        gather of about 2 MB.
        """
        counts = self.selected.sum(-1).flatten()  # [G * R]
        flat = self.selected.flatten().nonzero().squeeze(1)
        row = flat // self.n_blocks
        column = flat % self.n_blocks + row // self.n_blocks * self.n_blocks
        start = counts.cumsum(0) - counts
        block_bytes = self.block_size * self.shape[-1] * self.dtype.itemsize
        for per_row in counts.unique().tolist():
            if per_row == 0:
                continue
            rows = (counts == per_row).nonzero().squeeze(1)
            columns = column[
                start[rows, None] + torch.arange(per_row, device=rows.device)
            ]  # [n, P]
            size = max(1, _GATHER_BYTES // (block_bytes * per_row))
            yield from zip(rows.split(size), columns.split(size), strict=True)

    def gather(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[n, P * M, D]` of the columns `[n, P]`, and the bias `[n, 1, P * M]` of
        their padding.
        """
        n, flat = columns.shape[0], columns.flatten()
        dim = self.shape[-1]
        keys = self.keys.index_select(0, flat).view(n, -1, dim).to(self.dtype)
        values = self.values.index_select(0, flat).view(n, -1, dim).to(self.dtype)
        bias = None if self.key_bias is None else self.key_bias.index_select(0, flat).view(n, 1, -1)
        return keys, values, bias

    def exact_forward(self) -> tuple[Tensor, Tensor]:
        """Softmax over the selected blocks alone: `[G * R, M, D]` and its log-sum-exp `[G * R, M]`
        (-inf without any).
        """
        attend = _flash_forward if flash_is_available(self.rows.device.type) else _matmul_forward
        output = torch.zeros(self.rows.shape, dtype=self.dtype, device=self.rows.device)
        lse = torch.full(self.rows.shape[:2], -torch.inf, dtype=self.dtype, device=self.rows.device)
        for rows, columns in self.pieces():
            piece_query = self.rows.index_select(0, rows).to(self.dtype)
            piece_output, piece_lse = attend(piece_query, *self.gather(columns), self.scale)
            output.index_copy_(0, rows, piece_output)
            lse.index_copy_(0, rows, piece_lse)
        return output, lse

    def exact_backward(
        self, grad: Tensor, output: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows, keys and values through the selected blocks, each `[G * R, M, D]` in
        the compute dtype.
        """
        flash = flash_is_available(self.rows.device.type)
        grad_rows, grad_keys, grad_values = (torch.zeros_like(grad) for _ in range(3))
        for rows, columns in self.pieces():
            piece_query = self.rows.index_select(0, rows).to(self.dtype)
            piece = [
                piece_query,
                *self.gather(columns),
                grad.index_select(0, rows),
                lse.index_select(0, rows),
            ]
            if flash:
                d_query, d_keys, d_values = _flash_backward(
                    *piece, output.index_select(0, rows), self.scale
                )
            else:
                d_query, d_keys, d_values = _matmul_backward(
                    *piece, delta.index_select(0, rows), self.scale
                )
            grad_rows.index_copy_(0, rows, d_query)
            add_blocks_(grad_keys, columns.flatten(), d_keys.reshape(-1, *grad.shape[1:]))
            add_blocks_(grad_values, columns.flatten(), d_values.reshape(-1, *grad.shape[1:]))
        return grad_rows, grad_keys, grad_values


class _Coarse:
    """The low-resolution part: operands of R rows instead of N."""

    def __init__(self, problem: _Problem, counts: Tensor, live_pairs: Tensor):
        batch, heads, _, dim = problem.shape
        self.n_blocks, self.block_size, self.scale = (
            problem.n_blocks,
            problem.block_size,
            problem.scale,
        )

        def by_head(x: Tensor) -> Tensor:  # rows [G * R, M, D] -> [B, H, R, M, D]
            return x.view(batch, heads, self.n_blocks, self.block_size, dim)

        self.query_means = block_means(by_head(problem.rows), counts).flatten(0, 1)  # [G, R, D]
        self.key_means = block_means(by_head(problem.keys), counts).flatten(0, 1)
        self.value_sums = by_head(problem.values).sum(3, dtype=problem.dtype).flatten(0, 1)
        self.counts = (
            counts[:, None].expand(-1, heads, -1).reshape(-1, 1, self.n_blocks).to(problem.dtype)
        )  # [G, 1, R]
        inside = live_pairs.reshape(problem.selected.shape) & ~problem.selected
        logits = self.scale * torch.bmm(self.query_means, self.key_means.mT)
        logits = logits.masked_fill_(~inside, -torch.inf)
        row_max = logits.amax(-1)  # [G, R], -inf where nothing is left to the coarse part
        self.row_max = row_max.view(-1, 1)
        self.weights = logits.sub_(
            row_max.masked_fill(row_max == -torch.inf, 0)[..., None]
        ).exp_()  # E

    def merge(self, exact_output: Tensor, exact_lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge with the exact part, `[G * R, M, D]` and `[G * R, M]`; returns the same shapes."""
        numerator = torch.bmm(self.weights, self.value_sums).view(
            -1, 1, exact_output.shape[-1]
        )  # [G * R, 1, D]
        denominator = (self.weights * self.counts).sum(-1).view(-1, 1)
        lse = torch.logaddexp(exact_lse, self.row_max + denominator.log())  # [G * R, M]
        finite_lse = lse.masked_fill(lse == -torch.inf, 0)
        output = exact_output.mul_((exact_lse - finite_lse).exp_()[..., None])
        output.addcmul_((self.row_max - finite_lse).exp_()[..., None], numerator)
        return output, lse

    def backward(self, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for every token of a block, `[G * R, 1, D]` each (the mean spreads them
        evenly).
        """
        dim = grad.shape[-1]
        weight = (
            self.row_max - lse
        ).exp_()  # [G * R, M], 0 at padding and where there is no coarse part
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


# -- one batched attention: query [n, M, D], keys and values [n, K, D], bias [n, 1, K] or None


@cache
def flash_is_available(device_type: str) -> bool:
    """Whether aten's flash attention for CPUs, a private op, exists and accepts the calls made
    here; tried once.
    """
    if device_type != "cpu":
        return False
    try:
        query, bias = torch.ones(1, 2, 8), torch.zeros(1, 1, 2)
        output, lse = _flash_forward(query, query, query, bias, 1.0)
        _flash_backward(query, query, query, bias, query, lse, output, 1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return output.shape == (1, 2, 8) and lse.shape == (1, 2)


def _flash_forward(query, keys, values, bias, scale) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None],
        keys[:, None],
        values[:, None],
        0.0,
        False,
        attn_mask=_one_head(bias),
        scale=scale,
    )
    return output[:, 0], lse[:, 0]


def _flash_backward(
    query, keys, values, bias, grad, lse, output, scale
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x[:, None] for x in (grad, query, keys, values, output, lse)),
        0.0,
        False,
        attn_mask=_one_head(bias),
        scale=scale,
    )
    return grads[0][:, 0], grads[1][:, 0], grads[2][:, 0]


def _one_head(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[:, None]


def _matmul_forward(query, keys, values, bias, scale) -> tuple[Tensor, Tensor]:
    logits = torch.bmm(query, keys.mT).mul_(scale)
    if bias is not None:
        logits += bias
    lse = logits.logsumexp(-1)
    return torch.bmm(logits.sub_(lse[..., None]).exp_(), values), lse


def _matmul_backward(
    query, keys, values, bias, grad, lse, delta, scale
) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.bmm(query, keys.mT).mul_(scale)
    if bias is not None:
        logits += bias
    weights = logits.sub_(lse[..., None]).exp_()
    grad_logits = torch.bmm(grad, values.mT).sub_(delta[..., None]).mul_(weights).mul_(scale)
    return (
        torch.bmm(grad_logits, keys),
        torch.bmm(grad_logits.mT, query),
        torch.bmm(weights.mT, grad),
    )


# -- every live pair selected: dense softmax attention


def _dense_inputs(query, key, value, token_mask):
    """Inputs in the compute dtype with padding zeroed, and the bias `[B, 1, 1, N]` that hides it.

    A sample without any token is left open: its rows are overwritten afterwards.
    """
    dtype = compute_dtype(query.dtype)
    inputs = [x.to(dtype) for x in (query, key, value)]
    if token_mask is None:
        return (*(x.contiguous() for x in inputs), None)
    padding = ~token_mask[:, None, :, None]
    clean = [x.masked_fill(padding, 0).contiguous() for x in inputs]
    hidden = ~token_mask & token_mask.any(-1, keepdim=True)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=query.device)
    return (*clean, bias.masked_fill_(hidden, -torch.inf)[:, None, None])


def _dense_forward(query, key, value, token_mask, scale):
    query, key, value, bias = _dense_inputs(query, key, value, token_mask)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    output, lse = output.contiguous(), lse.contiguous()
    if token_mask is not None:
        output.masked_fill_(~token_mask[:, None, :, None], 0)
        lse.masked_fill_(~token_mask[:, None, :], torch.inf)
    return output, lse


def _dense_backward(grad_output, query, key, value, output, lse, token_mask, scale):
    input_dtype = query.dtype
    query, key, value, bias = _dense_inputs(query, key, value, token_mask)
    grad_output = grad_output.to(query.dtype)
    if token_mask is not None:
        grad_output = grad_output.masked_fill(~token_mask[:, None, :, None], 0)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad_output.contiguous(), query, key, value, output, lse),
        0.0,
        False,
        attn_mask=bias,
        scale=scale,
    )
    if token_mask is not None:
        grads = [grad.masked_fill(~token_mask[:, None, :, None], 0) for grad in grads]
    grad_query, grad_key, grad_value = (grad.to(input_dtype).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value
