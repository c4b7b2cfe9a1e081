"""Peak memory of one forward and backward pass, above its inputs and the gradient of its output."""

import multiprocessing

import torch

from benchmarks.providers import attention_providers
from mra_attention.benchmarking import DTYPES, added_peak_bytes, topical_inputs


def peak_megabytes(
    device: str,
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    name: tuple[str, int | None],
) -> float | None:
    """Megabytes (10^6 bytes) that forward and backward take above inputs and output gradient.

    On a GPU, memory of PyTorch's allocator. On Linux, resident memory of a fresh process, whose
    heap holds nothing to reuse. None on other systems.
    """
    arguments = (device, length, dtype, budgets, name)
    if device == "cuda":
        return _measure(*arguments)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(_measure, arguments)


def _measure(device, length, dtype, budgets, name) -> float | None:
    def peak(tokens: int) -> int | None:
        attend = attention_providers(tokens, budgets, device)[name]
        inputs = topical_inputs(tokens, dtype=DTYPES[dtype], device=device)
        grad = torch.ones_like(inputs[0])
        return added_peak_bytes(lambda: torch.autograd.grad(attend(*inputs), inputs, grad), device)

    peak(128)  # loads libraries and operators
    size = peak(length)
    return None if size is None else round(size / 1e6, 1)
