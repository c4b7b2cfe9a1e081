"""`torch.library` operators around the fast paths: what compile, checkpointing and autograd see.

`impl` is "torch" or "triton"; triton is imported by the first call that asks for it.

`mra2_summarize` and `mra2_select` have no gradient. `mra2_forward` returns the output and its
log-sum-exp; its gradient is `mra2_backward`, which has none of its own. Bodies run with autocast
off, forward and backward, whatever the context they are called in.

By Triton, `vectors` and `counts` are what `mra2_summarize` returned for the same inputs; where they
are None, every operator computes them for itself. By torch they are not used.
"""

import torch
from torch import Tensor

from . import selection, torch_impl
from ._ops import add_op_namespace_prefix
from .blocks import compute_dtype, count_blocks
from .implementations import Summaries


@torch.library.custom_op(add_op_namespace_prefix("mra2_summarize"), mutates_args=())
def mra2_summarize(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`triton_impl.summarize` as an operator: block means of query and key and sums of value
    `[3, B * H, R, D']` float32, and the real tokens of the blocks, `[B, R]` int32.
    """
    from . import triton_impl

    return tuple(triton_impl.summarize(query, key, value, token_mask))


@mra2_summarize.register_fake
def _(query, key, value, token_mask):
    from .triton_impl.call import summary_shapes

    vectors, counts = summary_shapes(query.shape)
    return query.new_empty(vectors, dtype=torch.float32), query.new_empty(counts, dtype=torch.int32)


def _summaries(vectors: Tensor | None, counts: Tensor | None):
    """The two tensors as the kernels take them; None for None."""
    return None if vectors is None else Summaries(vectors, counts)


@torch.library.custom_op(add_op_namespace_prefix("mra2_select"), mutates_args=())
def mra2_select(
    query: Tensor,
    key: Tensor,
    token_mask: Tensor | None,
    block_per_row: int,
    block_budget: int | None,
    block_size: int,
    initial_prior_first_n_blocks: int,
    initial_prior_diagonal_n_blocks: int,
    rule: str,
    scale: float,
    impl: str = "torch",
    vectors: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """`selection.select` as an operator: `[B, H, R, R]` bool."""
    settings = {
        "block_per_row": block_per_row,
        "block_budget": block_budget,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "initial_prior_diagonal_n_blocks": initial_prior_diagonal_n_blocks,
        "rule": rule,
        "scale": scale,
    }
    if impl == "triton" and rule != "refined":  # which torch ranks on every device
        from . import triton_impl

        summaries = _summaries(vectors, counts)
        return triton_impl.select(
            query, key, token_mask, summaries=summaries, block_size=block_size, **settings
        )
    return selection.select(query, key, token_mask, block_size=block_size, **settings)


@mra2_select.register_fake
def _(
    query,
    key,
    token_mask,
    block_per_row,
    block_budget,
    block_size,
    initial_prior_first_n_blocks,
    initial_prior_diagonal_n_blocks,
    rule,
    scale,
    impl="torch",
    vectors=None,
    counts=None,
):
    n_blocks = count_blocks(query.shape[2], block_size)
    return query.new_empty((query.shape[0], query.shape[1], n_blocks, n_blocks), dtype=torch.bool)


@torch.library.custom_op(add_op_namespace_prefix("mra2_forward"), mutates_args=())
def mra2_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor | None,
    scale: float,
    sparse: bool,
    block_size: int,
    impl: str = "torch",
    largest_budget: int | None = None,
    vectors: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch_impl.forward` or that of Triton as an operator: output `[B, H, N, D]` and log-sum-exp
    `[B, H, N]`.

    By torch both are in the compute dtype: a backward from an output rounded to half would lose
    digits. By Triton the output has the input dtype, as with other kernels of that kind.
    `largest_budget` is a bound of the pairs selected per head, where one is known.
    """
    if impl == "triton":
        from . import triton_impl

        return triton_impl.forward(
            query,
            key,
            value,
            token_mask,
            blocks,
            scale=scale,
            sparse=sparse,
            block_size=block_size,
            largest_budget=largest_budget,
            summaries=_summaries(vectors, counts),
        )
    with torch.autocast(query.device.type, enabled=False):
        return torch_impl.forward(
            query, key, value, token_mask, blocks, scale=scale, sparse=sparse, block_size=block_size
        )


@mra2_forward.register_fake
def _(
    query,
    key,
    value,
    token_mask,
    blocks,
    scale,
    sparse,
    block_size,
    impl="torch",
    largest_budget=None,
    vectors=None,
    counts=None,
):
    dtype = compute_dtype(query.dtype)
    output = query.new_empty(query.shape, dtype=query.dtype if impl == "triton" else dtype)
    return output, query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op(add_op_namespace_prefix("mra2_backward"), mutates_args=())
def mra2_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    token_mask: Tensor | None,
    blocks: Tensor | None,
    scale: float,
    sparse: bool,
    block_size: int,
    impl: str = "torch",
    largest_budget: int | None = None,
    vectors: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `mra2_forward` as an operator: gradients of query, key and value."""
    if impl == "triton":
        from . import triton_impl

        return triton_impl.backward(
            grad_output,
            query,
            key,
            value,
            output,
            lse,
            token_mask,
            blocks,
            scale=scale,
            sparse=sparse,
            block_size=block_size,
            largest_budget=largest_budget,
            summaries=_summaries(vectors, counts),
        )
    with torch.autocast(query.device.type, enabled=False):
        return torch_impl.backward(
            grad_output,
            query,
            key,
            value,
            output,
            lse,
            token_mask,
            blocks,
            scale=scale,
            sparse=sparse,
            block_size=block_size,
        )


@mra2_backward.register_fake
def _(
    grad_output,
    query,
    key,
    value,
    output,
    lse,
    token_mask,
    blocks,
    scale,
    sparse,
    block_size,
    impl="torch",
    largest_budget=None,
    vectors=None,
    counts=None,
):
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _save_for_backward(ctx, inputs, output):
    query, key, value, token_mask, blocks, *ctx.settings, vectors, counts = inputs
    ctx.save_for_backward(query, key, value, *output, token_mask, blocks, vectors, counts)


def _backward(ctx, grad_output, grad_lse):
    *saved, vectors, counts = ctx.saved_tensors
    grads = mra2_backward(grad_output, *saved, *ctx.settings, vectors, counts)
    return *grads, *(None for _ in range(9))


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "mra2_attention has no second derivative in the fast implementations; pass "
        'impl="reference", which is '
        "differentiated by torch, to differentiate its gradient."
    )


def _refuse_vmap(info, in_dims, *args):
    raise RuntimeError(
        "mra2_attention does not support torch.vmap; it is batched already: put the mapped "
        "dimension into "
        'the batch dimension of query, key and value, or pass impl="reference".'
    )


mra2_forward.register_autograd(_backward, setup_context=_save_for_backward)
mra2_backward.register_autograd(_refuse_double_backward)
for _op in (mra2_summarize, mra2_select, mra2_forward, mra2_backward):
    _op.register_vmap(_refuse_vmap)
