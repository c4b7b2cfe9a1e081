"""Softmax attention of many small problems at once: n query blocks, each with K keys of its own.

Shapes are those of one-headed attention: query `[n, 1, M, D]`, keys and values `[n, 1, K, D]`, bias
`[n, 1, 1, K]` or None, log-sum-exp `[n, 1, M]`. On a CPU this is aten's flash kernel, a private op
that is tried once. For bfloat16, elsewhere, and where that op is missing, it is matmul and softmax,
with powers of 2 in place of e, which CPUs compute several times faster. bfloat16 operands are
multiplied as bfloat16; logits, softmax and log-sum-exp are float32 always.
"""

import math
from functools import cache

import torch
from torch import Tensor

from .blocks import compute_dtype

_LOG2_E = math.log2(math.e)


@cache
def flash_is_available(device_type: str) -> bool:
    """Whether aten's flash attention for CPUs exists and accepts the calls made here."""
    if device_type != "cpu":
        return False
    try:
        query, bias = torch.ones(1, 1, 2, 8), torch.zeros(1, 1, 1, 2)
        output, lse = flash_forward(query, query, query, bias, 1.0)
        grads = flash_backward(query, query, query, query, bias, output, lse, 1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return output.shape == grads[1].shape == query.shape and lse.shape == (1, 1, 2)


def operand_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which inputs of `dtype` are multiplied: bfloat16 as it is on a CPU, everything
    else in the compute dtype.
    """
    return dtype if dtype == torch.bfloat16 and device_type == "cpu" else compute_dtype(dtype)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, in the dtype of the operands, and the log-sum-exp."""
    if flash_is_available(query.device.type) and query.dtype != torch.bfloat16:
        return flash_forward(query, keys, values, bias, scale)
    wide = compute_dtype(query.dtype)
    query, keys, values = (x[:, 0] for x in (query, keys, values))
    weights = torch.bmm(query.to(wide) * (scale * _LOG2_E), keys.to(wide).mT)  # [n, M, K]
    if bias is not None:
        weights += bias[:, 0]
    largest = weights.amax(-1, keepdim=True)
    total = weights.sub_(largest).exp2_().sum(-1, keepdim=True)
    output = torch.bmm(weights.to(values.dtype), values).to(wide).div_(total)
    return output[:, None], total.log2_().add_(largest).div_(_LOG2_E)[:, None, :, 0]


def attend_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and values in the compute dtype.

    `grad`, `output` and `lse`, in the compute dtype, may be those of a softmax over more keys than
    are given here.
    """
    # In bfloat16 the flash kernel's backward takes longer than the products one by one.
    if flash_is_available(query.device.type) and query.dtype != torch.bfloat16:
        return flash_backward(grad, query, keys, values, bias, output, lse, scale)
    dtype, wide = query.dtype, grad.dtype
    delta = (grad * output).sum(-1)[:, 0, :, None]  # [n, M, 1]
    grad, query, keys, values = (x[:, 0] for x in (grad, query, keys, values))
    # Logits in the compute dtype: a product rounded to bfloat16 would be no logit.
    lse = lse[:, 0, :, None] * _LOG2_E
    weights = torch.baddbmm(  # [n, M, K]
        lse, query.to(wide) * (scale * _LOG2_E), keys.to(wide).mT, beta=-1
    )
    if bias is not None:
        weights += bias[:, 0]
    weights.exp2_()
    # Both factors are differences of nearly equal numbers: they stay wide until they are done.
    grad_logits = torch.baddbmm(delta, grad, values.to(wide).mT, beta=-scale, alpha=scale)
    grad_logits = grad_logits.mul_(weights).to(dtype)
    return (
        torch.bmm(grad_logits, keys).to(wide)[:, None],
        torch.bmm(grad_logits.mT, query).to(wide)[:, None],
        torch.bmm(weights.to(dtype).mT, grad.to(dtype)).to(wide)[:, None],
    )


def flash_forward(query, keys, values, bias, scale) -> tuple[Tensor, Tensor]:
    """`attend` by aten's flash kernel; any `[B, H, ...]` will do."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=bias, scale=scale
    )


def flash_backward(
    grad, query, keys, values, bias, output, lse, scale
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` by aten's flash kernel; any `[B, H, ...]` will do."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, keys, values, output, lse, 0.0, False, attn_mask=bias, scale=scale
    )
