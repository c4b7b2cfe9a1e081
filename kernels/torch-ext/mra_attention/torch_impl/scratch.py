"""Buffers that are used again: on a CPU, fresh memory costs a page fault per 4 kB.

Every thread uses one buffer per name and dtype, as large as the largest request so far. A buffer
is valid until the same thread asks for its name again. Between uses, sets of buffers are kept for
any thread. The allocators of other devices keep memory themselves, so that new tensors are returned
there.
"""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_Buffers = dict[tuple[str, torch.dtype], Tensor]
_free: list[_Buffers] = []
_borrowed = threading.local()


@contextlib.contextmanager
def borrowed_buffers() -> Iterator[None]:
    """While it is open, this thread may call `scratch`."""
    # Appending and popping are atomic: threads take different sets.
    try:
        _borrowed.buffers = _free.pop()
    except IndexError:
        _borrowed.buffers = {}
    try:
        yield
    finally:
        _free.append(_borrowed.buffers)
        del _borrowed.buffers


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor with arbitrary contents."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    buffers: _Buffers = _borrowed.buffers
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a buffer made inside could not be written to outside
            buffer = buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)


def take(name: str, x: Tensor, index: Tensor) -> Tensor:
    """Return `x[index]` along the first dimension, in the buffer of that name."""
    out = scratch(name, (index.shape[0], *x.shape[1:]), x.dtype, x.device)
    return torch.index_select(x, 0, index, out=out)


def convert(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` itself where it has that dtype, else a copy in the buffer of that name."""
    return x if x.dtype == dtype else scratch(name, x.shape, dtype, x.device).copy_(x)
