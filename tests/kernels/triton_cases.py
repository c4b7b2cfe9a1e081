"""What the Triton tests share: where they run, and the comparison with the definition.

`test_triton_interpreted.py` runs them in a process with TRITON_INTERPRET=1; by themselves they need
a CUDA or ROCm device. Shapes are small: the interpreter takes about 10 ms per program.
"""

from __future__ import annotations

import os

import pytest
import torch
from attention_cases import NAMES, make_mask, outputs_and_gradients

from mra_attention import mra2_attention, select_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_A_CARD = torch.cuda.is_available() and not INTERPRETED
#: Largest relative error (norms) of outputs and gradients.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

#: Tokens of more block rows than any kernel takes at once: 70 and 130 of them.
BEYOND_A_TILE = (2235, 4141)

needs_a_place = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or ON_A_CARD),
        reason="no CUDA or ROCm device (the interpreter's run is in test_triton_interpreted.py)",
    ),
]
only_on_a_card = pytest.mark.skipif(not ON_A_CARD, reason="needs a CUDA or ROCm device")


def on_device(inputs):
    return [x.to(DEVICE) for x in inputs]


def mask_on_device(kind, batch, length):
    mask = make_mask(kind, batch, length)
    return None if mask is None else mask.to(DEVICE)


def run(impl, inputs, mask=None, **arguments):
    def attention(query, key, value):
        return mra2_attention(query, key, value, mask, impl=impl, **arguments)

    return outputs_and_gradients(attention, *inputs)


def assert_right(inputs, mask, tolerance=None, **arguments):
    """Outputs and gradients agree with the definition in float64, for one selection."""
    tolerance = tolerance or TOLERANCES[inputs[0].dtype]
    if "selection" not in arguments:
        settings = {
            name: arguments.pop(name)
            for name in list(arguments)
            if name.startswith(("block_per_row", "block_budget", "initial_prior"))
        }
        arguments["selection"] = select_blocks(*inputs[:2], mask, **settings)
    given = run("triton", inputs, mask, **arguments)
    expected = run("reference", [x.double() for x in inputs], mask, **arguments)
    # Gradients of a single query and key are terms as large as this that cancel to 0.
    least = inputs[-1].norm().item() if inputs[0].shape[2] == 1 else 1.0
    for name, x, y in zip(NAMES, given, expected, strict=True):
        assert x.dtype == inputs[0].dtype and x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = (x.double() - y).norm() / y.norm().clamp_min(least)
        assert error <= tolerance, f"{name} is off by {error:.1e}"
    return given
