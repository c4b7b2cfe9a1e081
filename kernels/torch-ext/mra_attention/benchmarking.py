"""Generated inputs and interleaved timing, for every benchmark."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


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
    levels = topics.gather(2, segments[..., None].expand(-1, -1, -1, head_dim))
    base = levels.repeat_interleave(64, 2)[:, :, :length]
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
