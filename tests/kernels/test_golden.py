"""Recorded outputs and gradients of Transformers' own MRA-2, reproduced by the operator.

The recordings lie in `shared/golden` beside the repository: `index.json` holds the arguments of
each case, one safetensors file its tensors. Only rows of real tokens count.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from builtin_mra import builtin_mra2_attention, emulated_kernel
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
INDEX = FOLDER / "index.json"
CASES = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.is_file() else {}

OUTPUT_TOLERANCE = 5e-6  # absolute; the recordings are up to 4.7e-6 from the result in float64
#: Without fused multiply-add each product is rounded, too: 2.9e-6 from float64 instead of 2.7e-6.
OUTPUT_TOLERANCE_SSE2 = 7e-6
GRADIENT_TOLERANCE = 5e-6  # of the gradient's norm

pytestmark = pytest.mark.skipif(not CASES, reason="no recorded cases beside the repository")


@pytest.mark.parametrize("name", CASES)
def test_operator_reproduces_the_recorded_output_and_gradients(name, impl):
    recorded = load_file(FOLDER / f"{name}.safetensors", device=impl.device)
    mask = recorded["attention_mask"].bool()
    is_sse2 = impl.instruction_set == "base" and platform.machine() in ("x86_64", "AMD64")
    tolerance = OUTPUT_TOLERANCE_SSE2 if is_sse2 else OUTPUT_TOLERANCE
    assert_reproduces(impl.attention(mask, **CASES[name]), recorded, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_emulated_builtin_reproduces_the_recorded_output_and_gradients(name):
    recorded = load_file(FOLDER / f"{name}.safetensors")
    fixed = ("block_size", "scale")  # the built-in function knows one block size and one scale
    arguments = {key: given for key, given in CASES[name].items() if key not in fixed}

    def builtin(query, key, value):
        mask = recorded["attention_mask"]
        return builtin_mra2_attention(query, key, value, mask, **arguments)

    with emulated_kernel():
        assert_reproduces(builtin, recorded)


def assert_reproduces(attention, recorded, tolerance=OUTPUT_TOLERANCE):
    """`attention(query, key, value)` gives the recorded output and gradients on real rows."""
    real = recorded["attention_mask"].bool()[:, None, :, None]  # [B, 1, N, 1]
    inputs = [recorded[name].requires_grad_() for name in ("query", "key", "value")]
    output = attention(*inputs)
    gradients = torch.autograd.grad(output, inputs, recorded["grad_output"])

    error = ((output - recorded["output"]) * real).abs().max()
    assert error <= tolerance, f"output is off by {error:.1e}"
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        expected = recorded[f"grad_{name}"] * real
        error = (gradient * real - expected).norm() / expected.norm()
        assert error <= GRADIENT_TOLERANCE, f"grad_{name} is off by {error:.1e} of its norm"
