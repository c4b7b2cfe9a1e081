"""The fast implementations, and which of them takes a call. Imports no triton: it may be missing.

Implementation NAME is the package `NAME_impl`, which `ops.py` imports on its first call. It offers

    summarize(query, key, value, token_mask, key_block_size) -> Summaries | None
    select(query, key, token_mask, *, summaries, block_size, block_per_row, block_budget,
           initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, rule, scale,
           distance_bias, key_block_size) -> blocks
    forward(query, key, value, token_mask, blocks, *, summaries, scale, sparse, block_size,
            largest_budget, distance_bias, initial_prior_first_n_blocks, key_block_size)
        -> (output, lse)
    backward(grad_output, query, key, value, output, lse, token_mask, blocks, *, summaries, scale,
             sparse, block_size, largest_budget, distance_bias, initial_prior_first_n_blocks,
             key_block_size)
        -> (grad_query, grad_key, grad_value, grad_distance_bias)

with the types and shapes that `ops.py` states.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# What the Triton and the compiled CPU kernels take.
BLOCK_SIZE = 32
KEY_BLOCK_SIZES = (8, 16, 32)
SMALLEST_DIM, LARGEST_DIM = 16, 128
LARGEST_NATIVE_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_CAPABILITY = (8, 0)

#: What to do where triton is missing. It is no dependency: CPUs have no use for it.
INSTALL_TRITON = 'pip install "triton>=3.5" (Linux; the CUDA and ROCm builds of torch bring it)'

_IS_INSTALLED = importlib.util.find_spec("triton") is not None


_Function = TypeVar("_Function", bound=Callable[..., object])


def _traced_as_constant(function: _Function) -> _Function:
    """Tell torch.compile to call the function while it traces and to keep the result.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler: two seconds.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


class Summaries(NamedTuple):
    """What the coarse part knows of the tokens, computed once for all passes of a call.

    Attributes:
        vectors: `[1 + 2 * C / R, B * H, R, D']` float32, D' at least D: means of query over the
            real tokens of each block, and, as `[B * H, C, D']` each, means of key and sums of value
            over those of each key block.
        counts: `[B, C]` int32, real tokens of each key block.
    """

    vectors: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Implementation:
    """A fast implementation: one row of `FAST`.

    Attributes:
        refusal: called as `refusal(query, block_size, key_block_size)`; says why the implementation
            cannot take a call and what to do, as words that follow its name, or returns None where
            it can.
        auto_devices: types of devices whose tensors `impl="auto"` gives to it.
        shares_summaries: whether selection, forward and backward pass share `Summaries`. Only for
            Triton: the operator `mra2_summarize` has no `impl`. Others summarize inside a pass.
        keeps_dtype: whether its output has the dtype of the inputs, not the compute dtype.
    """

    refusal: Callable[[Tensor, int, int], str | None]
    auto_devices: tuple[str, ...] = ()
    shares_summaries: bool = False
    keeps_dtype: bool = False


def resolve_impl(
    impl: str, query: Tensor, block_size: int, key_block_size: int | None = None
) -> str:
    """Return "reference" or a name of `FAST`: for "auto" the first that takes the tensors of this
    device, else "torch"; for an empty batch, where there is nothing to compute, "reference".

    Raises:
        ValueError: an implementation was asked for by name and cannot take the call.
    """
    sizes = (block_size, key_block_size or block_size)
    if impl in FAST:
        reason = FAST[impl].refusal(query, *sizes)
        if reason is not None:
            raise ValueError(f'impl="{impl}" {reason}. Pass impl="auto" or "torch" for such calls.')
    if query.shape[0] == 0 or query.shape[1] == 0:
        return "reference"
    if impl != "auto":
        return impl
    for name, implementation in FAST.items():
        on_its_device = query.device.type in implementation.auto_devices
        if on_its_device and implementation.refusal(query, *sizes) is None:
            return name
    return "torch"


def torch_refusal(query: Tensor, block_size: int, key_block_size: int) -> str | None:
    """None: plain torch takes every call."""
    return None


def native_refusal(query: Tensor, block_size: int, key_block_size: int) -> str | None:
    """Why the compiled CPU kernels cannot take a call."""
    if query.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if block_size != BLOCK_SIZE:
        return f"takes block_size={BLOCK_SIZE}, got {block_size}"
    if key_block_size not in KEY_BLOCK_SIZES:
        return f"takes key_block_size of {KEY_BLOCK_SIZES}, got {key_block_size}"
    if query.shape[-1] > LARGEST_NATIVE_DIM:
        return f"takes head dims up to {LARGEST_NATIVE_DIM}, got {query.shape[-1]}"
    if query.device.type != "cpu":
        return f"takes CPU tensors, got tensors on {query.device.type}"
    return native_problem()


@_traced_as_constant
def native_problem() -> str | None:
    """Why the compiled CPU kernels cannot be used here, None if they can."""
    from .native_impl import library

    try:
        library.load()
    except ImportError as error:
        return f"is not available: {error}"
    return None


def triton_refusal(query: Tensor, block_size: int, key_block_size: int) -> str | None:
    """Why the Triton kernels cannot take a call."""
    if not _IS_INSTALLED:
        return f"needs triton, which is not installed: {INSTALL_TRITON}"
    if query.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if block_size != BLOCK_SIZE:
        return f"takes block_size={BLOCK_SIZE}, got {block_size}"
    if key_block_size not in KEY_BLOCK_SIZES:
        return f"takes key_block_size of {KEY_BLOCK_SIZES}, got {key_block_size}"
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
            oldest, actual = ("{}.{}".format(*x) for x in (OLDEST_CAPABILITY, capability))
            return (
                f"takes CUDA devices of compute capability {oldest} or newer, got one of {actual}"
            )
    return None


def triton_is_installed() -> bool:
    """Whether triton can be imported; where it cannot, `impl="auto"` takes torch on GPUs."""
    return _IS_INSTALLED


@_traced_as_constant
def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for ROCm, and where tensors on it are fake."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def interprets() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


#: "auto" asks them from first to last.
FAST = {
    "torch": Implementation(torch_refusal),
    "native": Implementation(native_refusal, auto_devices=("cpu",)),
    "triton": Implementation(
        triton_refusal, auto_devices=("cuda",), shares_summaries=True, keeps_dtype=True
    ),
}
IMPLEMENTATIONS = ("auto", "reference", *FAST)
