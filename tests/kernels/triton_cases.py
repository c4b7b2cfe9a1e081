"""What the Triton tests share: where they run, and the comparison with the definition.

They need a CUDA or ROCm device, or `TRITON_INTERPRET=1` in the environment: then they run on CPU
tensors in Triton's interpreter, which takes about 10 ms per program; shapes are small for its sake.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import INTERPRETED, NAMES, REFERENCE, Implementation, attend_with_bias

from mra_attention import select_blocks

TRITON = Implementation("triton", "cpu" if INTERPRETED else "cuda", is_general=False)
ON_A_GPU = torch.cuda.is_available() and not INTERPRETED
#: Largest relative error (norms) of outputs and gradients.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

#: Tokens of more block rows than any kernel takes at once: 70 and 130 of them.
BEYOND_A_TILE = (2235, 4141)

needs_triton = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or ON_A_GPU),
        reason="no CUDA or ROCm device, and no TRITON_INTERPRET=1 for Triton's interpreter",
    ),
]
only_on_a_gpu = pytest.mark.skipif(not ON_A_GPU, reason="needs a CUDA or ROCm device")


def assert_right_with_bias(inputs, bias, mask=None, first=0, block_per_row=3, **settings):
    """As `assert_right`; the gradient of the bias, too. `first` live block rows and columns are
    global.
    """
    settings["initial_prior_first_n_blocks"] = first
    if "selection" not in settings:
        choice = {"block_per_row": block_per_row, "initial_prior_first_n_blocks": first}
        settings["selection"] = select_blocks(*inputs[:2], mask, distance_bias=bias, **choice)
    results = attend_with_bias(TRITON, inputs, bias, mask, **settings)
    doubles = [x.double() for x in inputs]
    expected = attend_with_bias(REFERENCE, doubles, bias.double(), mask, **settings)
    tolerance = TOLERANCES[inputs[0].dtype]
    for name, x, y in zip((*NAMES, "grad_bias"), results, expected, strict=True):
        assert x.dtype == (bias if name == "grad_bias" else inputs[0]).dtype, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = (x.double() - y).norm() / y.norm().clamp_min(1.0)
        # Few numbers, each a sum of terms of both signs: in 16 bits the error of the torch path is
        # three times that of the other gradients, too.
        allowed = max(2 * tolerance, 1e-5) if name == "grad_bias" else tolerance
        assert error <= allowed, f"{name} is off by {error:.1e}"
    return results


def assert_right(inputs, mask=None, **arguments):
    """Outputs and gradients agree with the definition in float64, for one selection."""
    if "selection" not in arguments:
        settings = {
            name: arguments.pop(name)
            for name in list(arguments)
            if name.startswith(("block_per_row", "block_budget", "initial_prior"))
        }
        arguments["selection"] = select_blocks(*inputs[:2], mask, **settings)
    results = TRITON.attend(inputs, mask, **arguments)
    expected = REFERENCE.attend([x.double() for x in inputs], mask, **arguments)
    for name, x, y in zip(NAMES, results, expected, strict=True):
        assert x.dtype == inputs[0].dtype and x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        # Gradients of a single query and key are terms as large as this that cancel to 0.
        least = inputs[-1].norm().item() if inputs[0].shape[2] == 1 else 1.0
        error = (x.double() - y).norm() / y.norm().clamp_min(least)
        assert error <= TOLERANCES[x.dtype], f"{name} is off by {error:.1e}"
    return results
