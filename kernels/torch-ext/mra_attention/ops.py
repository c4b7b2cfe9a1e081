"""`torch.library` operators around the fast implementations: what compile, checkpointing and
autograd see.

`impl` is a name in `implementations.FAST`; its package is imported by the first call that asks for
it. `implementations.py` states what it offers.

`mra2_summarize` and `mra2_select` have no gradient. `mra2_forward` returns the output and its
log-sum-exp; its gradient is `mra2_backward`, which has none of its own. Bodies run with autocast
off, forward and backward, whatever the context they are called in.

`vectors` and `counts` are what `mra2_summarize` returned for the same inputs; where they are None,
an operator whose implementation needs them computes them for itself.

`distance_bias` is `[H, R]` in the compute dtype, entry `[h, abs(x - y)]` for the block pair (x, y),
or None for 0. Pairs in the first `initial_prior_first_n_blocks` live block rows and columns take
none.

`key_block_size` W is the number of keys per key block; None is `block_size` M. There are
C = R * M / W key blocks.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .blocks import compute_dtype, count_blocks
from .implementations import BLOCK_SIZE, FAST, Summaries
from .selection import RULES


def _implementation(impl: str) -> ModuleType:
    """Return the package of a fast implementation."""
    return importlib.import_module(f".{impl}_impl", __package__)


def _summaries(
    package: ModuleType,
    inputs: tuple[Tensor, Tensor, Tensor],
    token_mask: Tensor | None,
    key_block_size: int,
    vectors: Tensor | None,
    counts: Tensor | None,
) -> Summaries | None:
    """The summaries of a call: the ones it was given, else computed."""
    if vectors is None or counts is None:
        return package.summarize(*inputs, token_mask, key_block_size)
    return Summaries(vectors, counts)


def _without_autocast(query: Tensor) -> torch.autocast:
    return torch.autocast(query.device.type, enabled=False)


@torch.library.custom_op(add_op_namespace_prefix("mra2_summarize"), mutates_args=())
def mra2_summarize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    key_block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`summarize` of the Triton kernels, whose blocks have 32 tokens: the two tensors of
    `Summaries`.
    """
    with _without_autocast(query):
        package = _implementation("triton")
        return tuple(package.summarize(query, key, value, token_mask, key_block_size))


@mra2_summarize.register_fake
def _(query, key, value, token_mask, key_block_size=BLOCK_SIZE):
    from .triton_impl.call import summary_shapes

    vectors, counts = summary_shapes(query.shape, key_block_size)
    return query.new_empty(vectors, dtype=torch.float32), query.new_empty(counts, dtype=torch.int32)


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
    distance_bias: Tensor | None = None,
    key_block_size: int | None = None,
) -> Tensor:
    """The pairs that are chosen, `[B, H, R, C]` bool, by a rule of `selection.RULES`. Torch ranks
    by the rules that kernels do not.
    """
    package = _implementation(impl if impl in RULES[rule].kernels else "torch")
    key_block_size = key_block_size or block_size
    with _without_autocast(query):
        inputs = (query, key, key)
        summaries = _summaries(package, inputs, token_mask, key_block_size, vectors, counts)
        return package.select(
            query,
            key,
            token_mask,
            summaries=summaries,
            block_size=block_size,
            block_per_row=block_per_row,
            block_budget=block_budget,
            initial_prior_first_n_blocks=initial_prior_first_n_blocks,
            initial_prior_diagonal_n_blocks=initial_prior_diagonal_n_blocks,
            rule=rule,
            scale=scale,
            distance_bias=distance_bias,
            key_block_size=key_block_size,
        )


@mra2_select.register_fake
def _(
    query, key, token_mask, block_per_row, block_budget, block_size,
    initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, rule, scale, impl="torch",
    vectors=None, counts=None, distance_bias=None, key_block_size=None,
):  # fmt: skip
    n_blocks = count_blocks(query.shape[2], block_size)
    n_key_blocks = n_blocks * (block_size // (key_block_size or block_size))
    return query.new_empty((*query.shape[:2], n_blocks, n_key_blocks), dtype=torch.bool)


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
    distance_bias: Tensor | None = None,
    initial_prior_first_n_blocks: int = 0,
    key_block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, N, D]` and its log-sum-exp `[B, H, N]`, +inf at padding and where there is
    nothing to attend to.

    The log-sum-exp is in the compute dtype. So is the output, unless `Implementation.keeps_dtype`:
    a backward from an output rounded to half precision loses digits.

    `blocks` is `[B, H, R, C]` bool, or None for every live pair. `largest_budget` is an upper bound
    of the pairs selected per head, None where there is no such bound.
    """
    key_block_size = key_block_size or block_size
    settings: dict[str, Any] = {"scale": scale, "sparse": sparse, "block_size": block_size}
    settings |= {
        "distance_bias": distance_bias,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "key_block_size": key_block_size,
    }
    package = _implementation(impl)
    with _without_autocast(query):
        inputs = (query, key, value)
        summaries = _summaries(package, inputs, token_mask, key_block_size, vectors, counts)
        settings |= {"summaries": summaries, "largest_budget": largest_budget}
        return package.forward(query, key, value, token_mask, blocks, **settings)


@mra2_forward.register_fake
def _(query, key, value, token_mask, blocks, scale, sparse, block_size, impl="torch", *_):
    dtype = compute_dtype(query.dtype)
    output = query.new_empty(query.shape, dtype=query.dtype if FAST[impl].keeps_dtype else dtype)
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
    distance_bias: Tensor | None = None,
    initial_prior_first_n_blocks: int = 0,
    key_block_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, each `[B, H, N, D]` in the input dtype, and of the
    distance bias, `[H, R]` in the compute dtype (`[0]` where that is None); `output` and `lse` are
    what `mra2_forward` returned.
    """
    key_block_size = key_block_size or block_size
    settings: dict[str, Any] = {"scale": scale, "sparse": sparse, "block_size": block_size}
    settings |= {
        "distance_bias": distance_bias,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "key_block_size": key_block_size,
    }
    package = _implementation(impl)
    with _without_autocast(query):
        inputs = (query, key, value)
        summaries = _summaries(package, inputs, token_mask, key_block_size, vectors, counts)
        settings |= {"summaries": summaries, "largest_budget": largest_budget}
        tensors = (grad_output, query, key, value, output, lse, token_mask, blocks)
        *grads, grad_bias = package.backward(*tensors, **settings)
    if grad_bias is None:
        grad_bias = query.new_empty(0, dtype=compute_dtype(query.dtype))
    return *grads, grad_bias


@mra2_backward.register_fake
def _(
    grad_output, query, key, value, output, lse, token_mask, blocks, scale, sparse, block_size,
    impl="torch", largest_budget=None, vectors=None, counts=None, distance_bias=None, *_,
):  # fmt: skip
    bias_shape = (0,) if distance_bias is None else distance_bias.shape
    grad_bias = query.new_empty(bias_shape, dtype=compute_dtype(query.dtype))
    return *(query.new_empty(query.shape) for _ in range(3)), grad_bias


def _save_for_backward(ctx, inputs, output):
    (
        query, key, value, token_mask, blocks, *settings, vectors, counts, distance_bias,
        first_n_blocks, key_block_size,
    ) = inputs  # fmt: skip
    ctx.settings, ctx.last_settings = settings, (first_n_blocks, key_block_size)
    tensors = (token_mask, blocks, vectors, counts, distance_bias)
    ctx.save_for_backward(query, key, value, *output, *tensors)


def _backward(ctx, grad_output, grad_lse):
    *saved, vectors, counts, distance_bias = ctx.saved_tensors
    tensors = (vectors, counts, distance_bias)
    *grads, grad_bias = mra2_backward(
        grad_output, *saved, *ctx.settings, *tensors, *ctx.last_settings
    )
    grad_bias = None if distance_bias is None else grad_bias
    return *grads, *(None for _ in range(9)), grad_bias, None, None


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "mra2_attention has no second derivative in the fast implementations; to differentiate its "
        'gradient, pass impl="reference", which is differentiated by torch.'
    )


def _refuse_vmap(info, in_dims, *args):
    raise RuntimeError(
        "mra2_attention does not support torch.vmap; it is batched already: put the mapped "
        "dimension into the batch dimension of query, key and value, or pass "
        'impl="reference".'
    )


mra2_forward.register_autograd(_backward, setup_context=_save_for_backward)
mra2_backward.register_autograd(_refuse_double_backward)
for _op in (mra2_summarize, mra2_select, mra2_forward, mra2_backward):
    _op.register_vmap(_refuse_vmap)
