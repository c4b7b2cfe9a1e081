"""Softmax attention of many small problems at once: n query blocks, each with K keys of its own.

Query is `[n, M, D]`, keys and values `[n, K, D]`, the bias `[n, 1, K]`, to base 2, or None, the
log-sum-exp `[n, M]`. The softmax takes powers of 2, not of e, which CPUs compute several times
faster. Operands are multiplied in their own dtype; logits, softmax and log-sum-exp are always in
the compute dtype. Outputs and gradients lie in scratch memory: they are valid until the next call
in the same thread.
"""

import math

import torch
from torch import Tensor

from ..blocks import compute_dtype
from .scratch import convert, scratch

LOG2_E = math.log2(math.e)


def operand_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype in which inputs of `dtype` are multiplied: bfloat16 for bfloat16 on a CPU, else the
    compute dtype.
    """
    return dtype if dtype == torch.bfloat16 and device_type == "cpu" else compute_dtype(dtype)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output `[n, M, D]` and the log-sum-exp `[n, M]` in the compute dtype."""
    wide = compute_dtype(query.dtype)
    weights = _logits(query, keys, bias, wide, scale, None)  # [n, M, K]
    largest = weights.amax(-1, keepdim=True)
    total = weights.sub_(largest).exp2_().sum(-1, keepdim=True)
    output = scratch("output", query.shape, values.dtype, query.device)
    torch.bmm(convert("operand", weights, values.dtype), values, out=output)
    lse = total.log2().add_(largest).div_(LOG2_E)[..., 0]
    return convert("wide output", output, wide).div_(total), lse


def attend_backward(
    grad, query, keys, values, bias: Tensor | None, delta, lse, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys, values and logits in the compute dtype.

    `grad`, `delta` (the row sums of grad times output) and `lse` are in the compute dtype. They may
    belong to a softmax over more keys than these.
    """
    dtype, wide, device = query.dtype, grad.dtype, grad.device
    weights = _logits(query, keys, bias, wide, scale, lse).exp2_()
    # A difference of nearly equal numbers: its operands stay wide.
    grad_logits = scratch("grad_logits", weights.shape, wide, device)
    wide_values = convert("wide", values, wide)
    torch.baddbmm(delta[..., None], grad, wide_values.mT, beta=-1, out=grad_logits)
    grad_logits.mul_(weights)

    operand = convert("operand", weights, dtype)
    d_values = scratch("d_values", values.shape, dtype, device)
    torch.bmm(operand.mT, convert("grad operand", grad, dtype), out=d_values)
    operand = convert("operand", grad_logits, dtype)
    d_query = scratch("d_query", query.shape, dtype, device)
    d_query.baddbmm_(operand, keys, beta=0, alpha=scale)
    d_keys = scratch("d_keys", keys.shape, dtype, device)
    d_keys.baddbmm_(operand.mT, query, beta=0, alpha=scale)
    gradients = {"d_query": d_query, "d_keys": d_keys, "d_values": d_values}
    d_query, d_keys, d_values = (convert(f"wide {name}", x, wide) for name, x in gradients.items())
    return d_query, d_keys, d_values, grad_logits


def _logits(query, keys, bias, wide: torch.dtype, scale: float, lse: Tensor | None) -> Tensor:
    """Logits `[n, M, K]` to base 2, minus the log-sum-exp unless it is None, in the compute dtype:
    a product rounded to bfloat16 is too coarse for a logit.
    """
    shape = (*query.shape[:2], keys.shape[1])
    logits = scratch("logits", shape, wide, query.device)
    factors = (convert("wide query", query, wide), convert("wide", keys, wide).mT)
    if lse is None:
        logits.baddbmm_(*factors, beta=0, alpha=scale * LOG2_E)
    else:
        lse = lse[..., None] * LOG2_E
        torch.baddbmm(lse, *factors, beta=-1, alpha=scale * LOG2_E, out=logits)
    return logits if bias is None else logits.add_(bias)
