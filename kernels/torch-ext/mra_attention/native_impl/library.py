"""The compiled library: where it is, its C interface, its threads."""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ..parallel import torch_parallel_for

_FOLDER = Path(__file__).parent
#: Built by `kernels/build_native.py` when the package is installed.
LIBRARY_NAMES = ("libmra_attention.so", "libmra_attention.dylib")
#: `MraDtype` in csrc/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: `MraRule` in csrc/api.h, by the names of `selection.RULES`.
RULES = {"global": 0, "row_normalized": 1, "mass": 2}


class _Tensor(ctypes.Structure):
    """`MraTensor` in csrc/api.h."""

    _fields_ = [
        ("data", c_void_p),
        *((f"{name}_stride", c_int64) for name in ("batch", "head", "token")),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """`MraCall` in csrc/api.h, which says what the fields are."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "length", "dim")),
        ("scale", c_double),
        *((name, c_int64) for name in ("dtype", "key_block_size", "sparse", "threads", "isa")),
        *((name, c_int64) for name in ("first_blocks", "diagonal_blocks")),
        *((name, c_int64) for name in ("block_per_row", "block_budget", "rule")),
        *((name, _Tensor) for name in ("query", "key", "value", "grad_output", "output")),
        *((name, c_void_p) for name in ("token_mask", "blocks", "distance_bias", "lse")),
        *((name, c_void_p) for name in ("new_output", "grad_query", "grad_key", "grad_value")),
        *((name, c_void_p) for name in ("grad_bias", "new_blocks")),
    ]  # fmt: skip


def find() -> Path | None:
    """The library in the package folder, None if it was not built."""
    paths = (_FOLDER / name for name in LIBRARY_NAMES)
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library and hand it torch's threads.

    Raises:
        ImportError: it was not built, cannot be loaded, or is of another version of this package.
    """
    path = find()
    if path is None:
        raise ImportError("the compiled CPU kernels were not built (pip install -v says why)")
    try:
        library = ctypes.CDLL(str(path))
        library.mra_call_bytes.restype = c_int64
        library.mra_isa_name.restype = ctypes.c_char_p
        library.mra_isa_name.argtypes = [c_int64]
        library.mra_set_parallel_for.argtypes = [c_void_p]
    except (OSError, AttributeError) as error:
        raise ImportError(f"the compiled CPU kernels cannot be loaded: {error}") from error
    if library.mra_call_bytes() != ctypes.sizeof(Call):
        raise ImportError(f"{path} was built from another version of this package; build it again")
    region = torch_parallel_for()
    library.mra_set_parallel_for(None if region is None else ctypes.cast(region, c_void_p))
    return library


def instruction_sets() -> list[str]:
    """Names of the instruction sets that this machine can run, best first."""
    library = load()
    names: list[str] = []
    while (name := library.mra_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def run(name: str, call: Call) -> None:
    """Run `mra_NAME`.

    Raises:
        MemoryError: there was none for its buffers.
    """
    if getattr(load(), f"mra_{name}")(ctypes.byref(call)):
        raise MemoryError("the compiled CPU kernels could not allocate their buffers.")


def strided(x: Tensor) -> _Tensor:
    """A tensor `[B, H, N, D]` whose last stride is 1."""
    return _Tensor(x.data_ptr(), *x.stride()[:3])
