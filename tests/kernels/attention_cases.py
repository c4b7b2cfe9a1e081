"""Inputs, masks and comparisons that the tests of the operator share.

Inputs carry a slow component besides the noise, so that block means differ and the coarse part of
the attention has something to say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import settings

from mra_attention import mra2_attention

MASK_KINDS = ("none", "right", "left", "holes", "empty sample")
MODES = ("full", "sparse")
NAMES = ("output", "grad_query", "grad_key", "grad_value")

few_examples = settings(max_examples=20, deadline=None, derandomize=True)


def make_inputs(batch, heads, length, dim, *, dtype=torch.float32, seed=0, amplitude=1.0):
    """Return query, key, value and a gradient of the output, `[B, H, N, D]`, values of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(slow):
        shape = (batch, heads, length, dim)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        steps = (batch, heads, length // 16 + 1, dim)
        level = torch.randn(steps, generator=generator, dtype=torch.float64)
        return noise + slow * level.repeat_interleave(16, dim=2)[:, :, :length]

    query, key, value = draw(0.7) * amplitude, draw(0.7) * amplitude, draw(0.5)
    return [x.to(dtype) for x in (query, key, value, draw(0.0))]


def make_mask(kind, batch, length):
    """Return a `[B, N]` bool mask of one of MASK_KINDS, or None; every sample is masked its own
    way, and unless the kind says so, keeps a real token.
    """
    if kind == "none":
        return None
    position = torch.arange(length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    for i in range(batch):
        padded = length * (i + 1) // (batch + 1)
        match kind:
            case "right":
                mask[i] = position < length - padded
            case "left":
                mask[i] = position >= padded
            case "holes":
                mask[i] = (position * 7 + i) % 5 < 3
                mask[i, 32:65] = False  # a whole block, and a little more
                mask[i, 0] = True
            case "empty sample":
                mask[i] = position < length - padded // 2
    if kind == "empty sample":
        mask[-1] = False
    return mask


def outputs_and_gradients(attention, query, key, value, grad_output):
    """Return `attention(query, key, value)` and its gradients of the three, given that of the
    output.
    """
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attention(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output)


class Attention(torch.nn.Module):
    """`mra2_attention` with its settings, as a module to be exported."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, query, key, value, mask=None):
        return mra2_attention(query, key, value, mask, **self.settings)


def assert_exports_no_operator_of_ours(program):
    """An exported graph runs where this package is not installed: the reference, in aten."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not any("mra2" in target for target in targets), targets


def dense_attention(query, key, value, mask=None, scale=None):
    """Softmax attention over the real tokens, zero at padded queries and in empty samples."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    visible = mask | ~mask.any(-1, keepdim=True)  # softmax needs a token even in an empty sample
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None, None, :], scale=scale
    )
    return output * mask[:, None, :, None]


def assert_all_close(given, expected, tolerance):
    """Each output and gradient is finite and within `tolerance` of the expected one: absolute,
    times the largest expected value where that exceeds 1.
    """
    for name, x, y in zip(NAMES, given, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert x.isfinite().all(), f"{name} is not finite"
        if x.numel():
            error, largest = (x - y).abs().max().item(), y.abs().max().item()
            assert error <= tolerance * max(1.0, largest), f"{name} is off by {error:.1e}"


def assert_all_equal(given, expected):
    """Each output and gradient has the bits of the expected one."""
    for name, x, y in zip(NAMES, given, expected, strict=True):
        assert torch.equal(x, y), f"{name} differs by {(x - y).abs().max().item():.1e}"


def assert_as_good_as_eager(fast, eager, exact):
    """`fast` may be at most as far from float64 as `eager` in the same dtype is, plus rounding:
    that of the dtype, and that of float32 arithmetic where the exact value cancels to zero.
    """
    assert fast.dtype == eager.dtype
    slack = 4 * torch.finfo(fast.dtype).eps * exact.abs().max()
    slack += 4 * torch.finfo(torch.float32).eps
    error, allowed = (fast - exact).abs().max(), (eager - exact).abs().max() + slack
    assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.1e}"
