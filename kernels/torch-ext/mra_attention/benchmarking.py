"""What measurements are made of: generated inputs, interleaved timing, peak memory."""

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

#: Names of dtypes in tables of measurements.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def topical_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 12,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value `[B, H, N, D]`, contiguous, that require gradients.

    Segments of 64 tokens share one of 24 topics per head. Related blocks so lie both near the
    diagonal and far from it, and rows need uneven numbers of exact blocks, as in trained models.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, head_dim)
    topics = 1.2 * torch.randn(batch, heads, 24, head_dim, generator=generator)
    segments = torch.randint(0, 24, (batch, heads, -(-length // 64)), generator=generator)
    segment_topics = topics.gather(2, segments[..., None].expand(-1, -1, -1, head_dim))
    base = segment_topics.repeat_interleave(64, 2)[:, :, :length]
    query = base + 0.8 * torch.randn(shape, generator=generator)
    key = base + 0.8 * torch.randn(shape, generator=generator)
    value = torch.randn(shape, generator=generator)
    query, key, value = (x.to(device, dtype).requires_grad_() for x in (query, key, value))
    return query, key, value


def interleaved_milliseconds(
    providers: dict[str, Callable[..., Tensor]],
    inputs: tuple[Tensor, ...],
    *,
    backward: bool,
    repeats: int,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time `provider(*inputs)` of each provider in turn, `repeats` times after a warm-up round.

    Providers take turns, so that a change of the machine's speed affects all alike.

    Args:
        providers: name -> attention function.
        inputs: query, key, value.
        backward: include the gradients of all inputs.
        repeats: number of timed rounds.
        warm_up: run one round before them that is not timed.

    Returns:
        Wall-clock milliseconds of each provider, one per timed round.
    """
    grad_output = torch.ones_like(inputs[0])
    on_gpu = inputs[0].device.type == "cuda"

    def once(function: Callable[..., Tensor]) -> float:
        if on_gpu:
            torch.cuda.synchronize(inputs[0].device)
        begin = time.perf_counter()
        if backward:
            torch.autograd.grad(function(*inputs), inputs, grad_output)
        else:
            with torch.no_grad():
                function(*inputs)
        if on_gpu:
            torch.cuda.synchronize(inputs[0].device)
        return 1e3 * (time.perf_counter() - begin)

    samples: dict[str, list[float]] = {name: [] for name in providers}
    for is_timed in [False] * warm_up + [True] * repeats:
        for name, function in providers.items():
            milliseconds = once(function)
            if is_timed:
                samples[name].append(milliseconds)
    return samples


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: PyTorch's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def added_peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Call `run` and return the bytes by which its peak memory exceeds what was in use before.

    Measures PyTorch's allocator on a GPU and the process's resident set on Linux. On other systems
    `run` is called as well, and the result is None.
    """
    before = reset_peak(device)
    run()
    return added_since(before, device)


def reset_peak(device: torch.device | str = "cpu") -> int | None:
    """Set the peak of memory to what is in use now, in bytes, and return that; None where
    `added_peak_bytes` cannot measure.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _reset_resident_peak()


def added_since(before: int | None, device: torch.device | str = "cpu") -> int | None:
    """Return by how many bytes the peak exceeds `before`, which `reset_peak` returned."""
    device = torch.device(device)
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, _resident_bytes("VmHWM") - before)


def _reset_resident_peak() -> int | None:
    """Set the peak of the resident set to its present size and return that; None if not Linux."""
    peak_reset = Path("/proc/self/clear_refs")
    if not peak_reset.exists():
        return None
    # Return freed memory to the system first, or the next peak would hide in it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        peak_reset.write_text("5")
    except OSError:
        return None
    return _resident_bytes("VmRSS")


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
