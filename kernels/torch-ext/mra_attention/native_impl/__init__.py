"""MRA-2 and MRA-2-s on a CPU, compiled: selection, forward and backward pass, one call each.

The C++ of `csrc/` does the work, one (sample, head) at a time on torch's threads; this module
checks what it is given and allocates what it writes. Every sum has one owner, so that results are
the same bits for any number of threads.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ..blocks import count_blocks
from . import library

_BLOCK_SIZE = 32
_KEY_BLOCK_SIZES = (8, 16, 32)
_STRIDED = ("query", "key", "value", "grad_output", "output")
#: The instruction set that is forced, as an index of `library.instruction_sets()`; -1: the best.
_forced_isa: ContextVar[int] = ContextVar("forced_isa", default=-1)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run with one of `library.instruction_sets()` instead of the best; for tests and benchmarks.

    Raises:
        ValueError: this machine cannot run it.
    """
    names = library.instruction_sets()
    if name not in names:
        raise ValueError(f"name must be an instruction set of this machine, {names}, got {name!r}.")
    token = _forced_isa.set(names.index(name))
    try:
        yield
    finally:
        _forced_isa.reset(token)


def summarize(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, key_block_size: int
) -> None:
    """Return None: every pass pools for itself, and shares nothing."""


def select(
    query, key, token_mask, *, summaries, block_size, block_per_row, block_budget,
    initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, rule, scale, distance_bias,
    key_block_size,
) -> Tensor:  # fmt: skip
    """The chosen pairs `[B, H, R, C]` bool, as `selection.select` chooses them."""
    tensors = {"query": query, "key": key, "token_mask": token_mask, "distance_bias": distance_bias}
    call, _kept = _call(tensors, scale, key_block_size, initial_prior_first_n_blocks)
    call.diagonal_blocks = initial_prior_diagonal_n_blocks
    call.block_per_row = block_per_row
    call.block_budget = -1 if block_budget is None else block_budget
    call.rule = library.RULES[rule]
    n_blocks = count_blocks(query.shape[2], block_size)
    n_key_blocks = n_blocks * (block_size // key_block_size)
    blocks = query.new_empty((*query.shape[:2], n_blocks, n_key_blocks), dtype=torch.bool)
    call.new_blocks = blocks.data_ptr()
    library.run("select", call)
    return blocks


def forward(
    query, key, value, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output `[B, H, N, D]` and its log-sum-exp `[B, H, N]` (+inf at padding), both
    float32; arguments as in `ops.mra2_forward`.
    """
    tensors = {"query": query, "key": key, "value": value, "token_mask": token_mask}
    tensors |= {"blocks": blocks, "distance_bias": distance_bias}
    call, _kept = _call(tensors, scale, key_block_size, initial_prior_first_n_blocks, sparse)
    output = query.new_empty(query.shape, dtype=torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    call.new_output, call.lse = output.data_ptr(), lse.data_ptr()
    library.run("forward", call)
    return output, lse


def backward(
    grad_output, query, key, value, output, lse, token_mask, blocks, *,
    summaries, scale, sparse, block_size, largest_budget, distance_bias,
    initial_prior_first_n_blocks, key_block_size,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of query, key and value in their dtype, and of the distance bias,
    `[H, R]` float32 (None without); arguments as in `ops.mra2_backward`.
    """
    tensors = {"query": query, "key": key, "value": value, "token_mask": token_mask}
    tensors |= {"blocks": blocks, "distance_bias": distance_bias, "lse": lse}
    tensors |= {"grad_output": grad_output.float(), "output": output.float()}
    call, _kept = _call(tensors, scale, key_block_size, initial_prior_first_n_blocks, sparse)
    grads = tuple(query.new_empty(query.shape) for _ in range(3))
    call.grad_query, call.grad_key, call.grad_value = (x.data_ptr() for x in grads)
    if distance_bias is None:
        library.run("backward", call)
        return *grads, None
    shape = (query.shape[0], *distance_bias.shape)
    grad_bias = query.new_empty(shape, dtype=torch.float64)
    call.grad_bias = grad_bias.data_ptr()
    library.run("backward", call)
    return *grads, grad_bias.sum(0).to(distance_bias.dtype)


def _call(
    tensors: dict[str, Tensor | None],
    scale: float,
    key_block_size: int,
    first_n_blocks: int,
    sparse: bool = False,
) -> tuple[library.Call, list[Tensor]]:
    """A call with everything that is read, and the tensors it points into: keep them until it ran.

    Nothing reaches C++ that was not checked here.
    """
    if key_block_size not in _KEY_BLOCK_SIZES:
        raise ValueError(f"key_block_size must be one of {_KEY_BLOCK_SIZES}, got {key_block_size}.")
    query = tensors["query"]
    assert query is not None
    batch, heads, length, dim = query.shape
    n_blocks = count_blocks(length, _BLOCK_SIZE)
    expected = {
        **dict.fromkeys(("query", "key", "value"), (query.shape, query.dtype)),
        **dict.fromkeys(("grad_output", "output"), (query.shape, torch.float32)),
        "lse": (query.shape[:3], torch.float32),
        "token_mask": ((batch, length), torch.bool),
        "blocks": ((batch, heads, n_blocks, n_blocks * _BLOCK_SIZE // key_block_size), torch.bool),
        "distance_bias": ((heads, n_blocks), torch.float32),
    }
    call = library.Call(
        batch=batch,
        heads=heads,
        length=length,
        dim=dim,
        scale=scale,
        dtype=library.DTYPES[query.dtype],
        key_block_size=key_block_size,
        sparse=sparse,
        threads=torch.get_num_threads(),
        isa=_forced_isa.get(),
        first_blocks=first_n_blocks,
    )
    kept = []
    for name, x in tensors.items():
        if x is None:
            continue
        shape, dtype = expected[name]
        if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
            raise ValueError(
                f"{name} must be {dtype} {tuple(shape)} on a CPU, got {x.dtype} {tuple(x.shape)} "
                f"on {x.device}."
            )
        if name in _STRIDED:
            x = x if x.stride(-1) == 1 or dim == 1 else x.contiguous()
            setattr(call, name, library.strided(x))
        else:
            x = x.contiguous()
            setattr(call, name, x.data_ptr())
        kept.append(x)
    return call, kept
