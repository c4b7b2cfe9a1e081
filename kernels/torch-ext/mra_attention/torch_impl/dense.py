"""Dense softmax attention by aten's flash kernel for CPUs, for calls that select every live pair.

The kernel is a private operator. It is tried once; where it is missing, such calls are computed
like all others.
"""

from functools import cache

import torch
from torch import Tensor

from ..blocks import compute_dtype


@cache
def flash_is_available(device_type: str) -> bool:
    """Whether aten's flash attention for CPUs exists and accepts the calls made here."""
    if device_type != "cpu":
        return False
    try:
        query, bias = torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 1, 2)
        output, lse = _flash_forward(query, query, query, bias, 1.0)
        grads = _flash_backward(query, query, query, query, bias, output, lse, 1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return output.shape == grads[1].shape == query.shape and lse.shape == (1, 1, 2)


def dense_forward(
    query: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, N, D]` and its log-sum-exp `[B, H, N]` (+inf at padding).

    Both in the compute dtype; `token_mask` is `[B, N]` bool or None.
    """
    query, key, value, bias = _inputs(query, key, value, token_mask)
    output, lse = _flash_forward(query, key, value, bias, scale)
    output, lse = output.contiguous(), lse.contiguous()
    if token_mask is not None:
        output.masked_fill_(~token_mask[:, None, :, None], 0)
        lse.masked_fill_(~token_mask[:, None, :], torch.inf)
    return output, lse


def dense_backward(
    grad_output, query, key, value, output, lse, token_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each `[B, H, N, D]` in the input dtype."""
    input_dtype = query.dtype
    query, key, value, bias = _inputs(query, key, value, token_mask)
    grad_output = grad_output.to(query.dtype)
    if token_mask is not None:
        grad_output = grad_output.masked_fill(~token_mask[:, None, :, None], 0)
    tensors = (grad_output.contiguous(), query, key, value, bias, output, lse)
    grads: tuple[Tensor, ...] = _flash_backward(*tensors, scale)
    if token_mask is not None:
        grads = tuple(grad.masked_fill(~token_mask[:, None, :, None], 0) for grad in grads)
    grad_query, grad_key, grad_value = (grad.to(input_dtype).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _inputs(query, key, value, token_mask):
    """Inputs in the compute dtype with padding zeroed, and the bias `[B, 1, 1, N]` that hides it.

    In a sample without a real token nothing is hidden: its rows are overwritten afterwards.
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


def _flash_forward(query, key, value, bias, scale) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )


def _flash_backward(
    grad, query, key, value, bias, output, lse, scale
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, False, attn_mask=bias, scale=scale
    )
