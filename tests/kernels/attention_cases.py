"""Implementations, inputs, masks and comparisons that the tests of the operator share.

Inputs carry a slow component besides the noise, so that block means differ and the coarse part of
the attention has something to say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import settings

from mra_attention import BlockSelection, mra2_attention, select_blocks

MASK_KINDS = ("none", "right", "left", "holes", "empty sample")
MODES = ("full", "sparse")
NAMES = ("output", "grad_query", "grad_key", "grad_value")

#: Whether Triton's kernels run on CPU tensors here, about 10 ms per program.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

few_examples = settings(
    max_examples=3 if INTERPRETED else 20, deadline=None, derandomize=True, database=None
)


@dataclass(frozen=True)
class Implementation:
    """A value of `impl`, the device that it runs on here, and what it takes."""

    name: str
    device: str = "cpu"
    #: Takes float64, and every head dim and block size.
    is_general: bool = True
    #: Of the compiled CPU kernels; None: the best of this machine.
    instruction_set: str | None = None

    @property
    def finest_dtype(self):
        return torch.float64 if self.is_general else torch.float32

    def inputs(self, batch, heads, length, dim, **arguments):
        """`make_inputs` on the device."""
        return [x.to(self.device) for x in make_inputs(batch, heads, length, dim, **arguments)]

    def mask(self, kind, batch, length):
        """`make_mask` on the device."""
        mask = make_mask(kind, batch, length)
        return None if mask is None else mask.to(self.device)

    def bias(self, heads, distances, **arguments):
        """`make_bias` on the device."""
        return make_bias(heads, distances, **arguments).to(self.device)

    def attention(self, mask=None, **settings):
        """The function of query, key and value with this mask and these settings."""

        def attention(query, key, value):
            return mra2_attention(query, key, value, mask, impl=self.name, **settings)

        return attention

    def attend(self, inputs, mask=None, **settings):
        """Output and gradients for `inputs`: query, key, value and a gradient of the output."""
        return outputs_and_gradients(self.attention(mask, **settings), *inputs)


REFERENCE = Implementation("reference")


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


def make_bias(heads, distances, *, dtype=torch.float32, seed=5):
    """A distance bias `[H, K]`, values of order 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, distances, generator=generator, dtype=torch.float64).to(dtype)


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


def attend_with_bias(impl, inputs, bias, mask=None, **settings):
    """Output and the gradients of query, key, value and distance bias; `inputs` end with the
    gradient of the output.
    """
    *tensors, grad_output = inputs
    tensors = [x.detach().requires_grad_() for x in (*tensors, bias)]
    settings |= {"distance_bias": tensors[3], "impl": impl.name}
    output = mra2_attention(*tensors[:3], mask, **settings)
    return output.detach(), *torch.autograd.grad(output, tensors, grad_output)


class Attention(torch.nn.Module):
    """`mra2_attention` with its settings, as a module to be exported."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, query, key, value, mask=None):
        return mra2_attention(query, key, value, mask, **self.settings)


def assert_exports_no_operator_of_ours(program):
    """An exported graph runs where this package is not installed: in aten, with no inner graphs."""
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith(("aten.", "<built-in")) for target in targets), targets


def dense_attention(query, key, value, mask=None, scale=None):
    """Softmax attention over the real tokens, zero at padded queries and in empty samples."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    visible = mask | ~mask.any(-1, keepdim=True)  # softmax needs a token even in an empty sample
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None, None, :], scale=scale
    )
    return output * mask[:, None, :, None]


def assert_all_close(actual, expected, tolerance):
    """Each output and gradient is finite and within `tolerance` of the expected one: absolute,
    times the largest expected value where that exceeds 1.
    """
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert x.isfinite().all(), f"{name} is not finite"
        if x.numel():
            error, largest = (x - y).abs().max().item(), y.abs().max().item()
            assert error <= tolerance * max(1.0, largest), f"{name} is off by {error:.1e}"


def assert_all_equal(actual, expected):
    """Each output and gradient has the bits of the expected one."""
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(x, y), f"{name} differs by {(x - y).abs().max().item():.1e}"


def assert_as_good_as_eager(fast, eager, exact):
    """`fast` may be at most as far from float64 as `eager` in the same dtype is, plus rounding:
    that of the dtype, and that of float32 sums, of terms that may cancel to zero. Returns the
    error and what is allowed.
    """
    assert fast.dtype == eager.dtype and fast.isfinite().all()
    largest = exact.abs().max()
    slack = 4 * torch.finfo(fast.dtype).eps * largest + 2e-5 * largest.clamp_min(1.0)
    error, allowed = (fast - exact).abs().max(), (eager - exact).abs().max() + slack
    assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.1e}"
    return float(error), float(allowed)


def assert_agrees(impl, inputs, mask=None, tolerance=2e-5, **arguments):
    """Outputs and gradients agree with the reference on the blocks of `arguments`: in float64, and
    in float32 up to `tolerance`; in a half type as well as the reference in the same type does.
    """
    arguments = dict(arguments)
    if not isinstance(arguments.get("selection"), BlockSelection):
        names = ("block_per_row", "block_budget", "block_size", "key_block_size", "selection")
        choice = {
            name: arguments.pop(name)
            for name in list(arguments)
            if name in names or name.startswith("initial_prior")
        }
        arguments["selection"] = select_blocks(*inputs[:2], mask, **choice)
        arguments["block_size"] = arguments["selection"].block_size
        arguments["key_block_size"] = arguments["selection"].key_block_size
    results = impl.attend(inputs, mask, **arguments)
    exact = REFERENCE.attend([x.double() for x in inputs], mask, **arguments)
    dtype = inputs[0].dtype
    if dtype.itemsize == 2:
        eager = REFERENCE.attend(inputs, mask, **arguments)
        for tensors in zip(results, eager, exact, strict=True):
            assert_as_good_as_eager(*tensors)
    else:
        exact = [x.to(dtype) for x in exact]
        assert_all_close(results, exact, 1e-10 if dtype == torch.float64 else tolerance)
