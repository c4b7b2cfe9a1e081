"""Peak memory of one forward and backward pass, above its inputs and their gradients' seed."""

import multiprocessing
from pathlib import Path

import torch

from mra_attention.benchmarking import topical_inputs


def peak_megabytes(
    device: str,
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    name: tuple[str, int | None],
) -> float | None:
    """Megabytes (10^6 bytes) that forward and backward take above inputs and output gradient.

    On a GPU that of PyTorch's allocator; on Linux that of resident memory, in a fresh process,
    whose heap holds nothing to use again; None on other systems.
    """
    arguments = (device, length, dtype, budgets, name)
    if device == "cuda":
        return _measure(*arguments)
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(_measure, arguments)


def _measure(device, length, dtype, budgets, name) -> float:
    from benchmarks.cases import DTYPES, attention_providers

    def run(tokens: int) -> float:
        function = attention_providers(tokens, budgets, device)[name]
        inputs = topical_inputs(tokens, dtype=DTYPES[dtype], device=device)
        grad = torch.ones_like(inputs[0])
        before = _start(device)
        grads = torch.autograd.grad(function(*inputs), inputs, grad)
        del grads
        return (_peak(device) - before) / 1e6

    run(128)  # loads libraries and operators
    return round(run(length), 1)


def _start(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident memory so far
    return _resident("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
