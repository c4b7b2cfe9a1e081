"""Which implementation takes a call. Imports no triton: it may be missing."""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")

# What the Triton kernels take.
BLOCK_SIZE = 32
SMALLEST_DIM, LARGEST_DIM = 16, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_CAPABILITY = (8, 0)

_IS_INSTALLED = importlib.util.find_spec("triton") is not None


class Summaries(NamedTuple):
    """What the coarse part knows of the tokens, computed once for all passes of a call.

    Attributes:
        vectors: `[3, B * H, R, D']` float32: means of query and key, sums of value, over the real
            tokens of every block; D' is the padded head dim.
        counts: `[B, R]` int32, real tokens of the blocks.
    """

    vectors: Tensor
    counts: Tensor


def resolve_impl(impl: str, query: Tensor, block_size: int) -> str:
    """Return "reference", "torch" or "triton"; an empty batch, nothing to compute, is the
    reference's.

    Raises:
        ValueError: "triton" was asked for and cannot take the call.
    """
    if impl == "triton":
        reason = refusal(query, block_size)
        if reason is not None:
            raise ValueError(f'impl="triton" {reason}. Pass impl="auto" or "torch" for such calls.')
    if query.shape[0] == 0 or query.shape[1] == 0:
        return "reference"
    if impl == "auto":
        on_a_gpu = query.device.type == "cuda"
        return "triton" if on_a_gpu and refusal(query, block_size) is None else "torch"
    return impl


def refusal(query: Tensor, block_size: int) -> str | None:
    """Why the Triton kernels cannot take a call, and what to do, in words; None where they can."""
    if not _IS_INSTALLED:
        return "needs triton, which is not installed (pip install triton)"
    if query.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if block_size != BLOCK_SIZE:
        return f"takes block_size={BLOCK_SIZE}, got {block_size}"
    if not SMALLEST_DIM <= query.shape[-1] <= LARGEST_DIM:
        return f"takes head dims {SMALLEST_DIM} to {LARGEST_DIM}, got {query.shape[-1]}"
    if query.device.type != "cuda" and not (query.device.type == "cpu" and interprets()):
        return (
            f"takes CUDA and ROCm tensors, got tensors on {query.device.type} (CPU tensors run in "
            "Triton's interpreter when TRITON_INTERPRET=1 is set before triton is imported)"
        )
    if query.device.type == "cuda":
        capability = cuda_capability(query.device)
        if capability is not None and capability < OLDEST_CAPABILITY:
            oldest, given = ("{}.{}".format(*x) for x in (OLDEST_CAPABILITY, capability))
            return f"takes CUDA devices of compute capability {oldest} or newer, got one of {given}"
    return None


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for ROCm, and where tensors on it are fake."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


# torch.compile calls it while it traces and keeps the result, as it does with functions that
# torch.compiler.assume_constant_result has marked; that would import the compiler, two seconds.
cuda_capability._dynamo_marked_constant = True


def interprets() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
