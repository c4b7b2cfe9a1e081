"""Calls of the compiled CPU kernels sent to a program: `kernels/native_calls.cpp`, emulated."""

from __future__ import annotations

import ctypes
import shlex
import struct
import subprocess

import numpy as np

from mra_attention.native_impl import library

PASSES = {"select": 0, "forward": 1, "backward": 2}
STRIDED = {
    "select": ("query", "key"),
    "forward": ("query", "key", "value"),
    "backward": ("query", "key", "value", "grad_output", "output"),
}


class Program:
    """Stands for `library.run`."""

    def __init__(self, command: str):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(shlex.split(command), stdin=pipe, stdout=pipe)

    def run(self, name: str, given: library.Call) -> None:
        call = library.Call.from_buffer_copy(given)
        shape = [call.batch, call.heads, call.length, call.dim]
        arrays = [
            (field, _contiguous(getattr(call, field), shape, _item_bytes(field, call)), True)
            for field in STRIDED[name]
        ]
        for field, _, _ in arrays:
            strides = (np.prod(shape[1:]), np.prod(shape[2:]), shape[3])
            setattr(call, field, library._Tensor(None, *(int(x) for x in strides)))
        for field, size in _flat_arrays(call).items():
            address = getattr(given, field)
            if not address:
                continue
            is_read = field in ("token_mask", "blocks", "distance_bias") or (
                field == "lse" and name == "backward"
            )
            arrays.append((field, address if not is_read else _bytes(address, size), size))
        self._send(name, call, arrays)
        self._receive(given, arrays)

    def _send(self, name, call, arrays):
        pipe = self.process.stdin
        pipe.write(struct.pack("<q", PASSES[name]) + bytes(call) + struct.pack("<q", len(arrays)))
        for field, content, size in arrays:
            is_read = isinstance(content, bytes)
            offset = getattr(library.Call, field).offset
            pipe.write(struct.pack("<qqq", offset, len(content) if is_read else size, is_read))
            if is_read:
                pipe.write(content)
        pipe.flush()

    def _receive(self, given, arrays):
        (failed,) = struct.unpack("<q", self._read(8))
        for _, address, size in arrays:
            if not isinstance(address, bytes):
                ctypes.memmove(address, self._read(size), size)
        if failed:
            raise MemoryError("the program could not allocate its buffers.")

    def _read(self, size):
        content = self.process.stdout.read(size)
        assert len(content) == size, "the program ended"
        return content


def _item_bytes(field, call):
    return 4 if field in ("grad_output", "output") or call.dtype == 0 else 2


def _bytes(address, size):
    return ctypes.string_at(address, size)


def _contiguous(tensor, shape, item):
    """The content of a strided tensor."""
    if 0 in shape:
        return b""
    strides = [tensor.batch_stride, tensor.head_stride, tensor.token_stride, 1]
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flat = np.frombuffer(_bytes(tensor.data, span * item), dtype=f"u{item}")
    return np.lib.stride_tricks.as_strided(flat, shape, [x * item for x in strides]).tobytes()


def _flat_arrays(call):
    """Bytes of each contiguous array."""
    n_blocks = -(-call.length // 32)
    tokens = call.batch * call.heads * call.length
    gradient = tokens * call.dim * (4 if call.dtype == 0 else 2)
    pairs = call.batch * call.heads * n_blocks**2 * (32 // call.key_block_size)
    return {
        "token_mask": call.batch * call.length,
        "blocks": pairs,
        "distance_bias": call.heads * n_blocks * 4,
        "lse": tokens * 4,
        "new_output": tokens * call.dim * 4,
        "grad_query": gradient,
        "grad_key": gradient,
        "grad_value": gradient,
        "grad_bias": call.batch * call.heads * n_blocks * 8,
        "new_blocks": pairs,
    }
