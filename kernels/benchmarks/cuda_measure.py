"""What steps on a card are made of: inputs, timings by CUDA events, graphs, patched settings."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from cuda_driver import Session
from torch import Tensor

from mra_attention.benchmarking import topical_inputs
from mra_attention.triton_impl import launching

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Those whose tiles one or two query blocks may own.
QUERY_KERNELS = ("forward", "query_gradient")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p20: float
    p80: float

    def columns(self) -> dict[str, float]:
        names = ("ms_median", "ms_p20", "ms_p80")
        return {name: round(x, 4) for name, x in zip(names, dataclasses.astuple(self), strict=True)}


def time_calls(session: Session, run: Callable[[], object], seconds: float = 0.4) -> Timing:
    """Time `run` for about `seconds`, 5 to 100 times, after a warm-up.

    On a card by CUDA events around each call, all queued before the first is read; in a dry run
    once, by the wall clock. Caches are left as the call before left them.
    """
    if session.dry_run or session.warm:
        begin = time.perf_counter()
        run()
        passed = 1e3 * (time.perf_counter() - begin)
        return Timing(passed, passed, passed)
    for _ in range(2):
        run()
    estimate = max(1e-3, _event_times(run, 2)[-1])
    samples = sorted(_event_times(run, max(5, min(100, int(1e3 * seconds / estimate)))))
    last = len(samples) - 1
    return Timing(statistics.median(samples), samples[int(0.2 * last)], samples[round(0.8 * last)])


def _event_times(run: Callable[[], object], repeats: int) -> list[float]:
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(max(1, repeats))
    ]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def as_graph(run: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """Capture `run` in a CUDA graph: its replay, and what `run` returned, which replays refill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def graphed(session: Session, run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, so that the host's speed plays no part; itself in a dry run."""
    if session.dry_run or session.warm:
        return run
    replay, kept = as_graph(run)

    def replayed() -> object:
        replay()
        return kept

    return replayed


def peak_megabytes(session: Session, run: Callable[[], object]) -> float | None:
    """Megabytes (10^6 bytes) that `run` takes at its peak above what was there; None on a CPU."""
    if session.dry_run:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def attention_inputs(
    session: Session, length: int, batch: int, heads: int, dim: int, dtype: str
) -> tuple[Tensor, ...]:
    """Query, key, value `[B, H, N, D]` that require gradients, and a gradient of the output.

    Two generated samples in turn fill the batch: the numbers are drawn on the host. The inputs of
    the last call are kept.
    """
    key = (length, batch, heads, dim, dtype)
    if session.kept.get("inputs_key") != key:
        session.kept.pop("inputs", None)  # frees the memory before more is taken
        drawn = topical_inputs(length, batch=min(2, batch), heads=heads, head_dim=dim)
        inputs = []
        for x in drawn:
            x = x.detach().to(session.device, DTYPES[dtype])
            x = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].contiguous()
            inputs.append(x.requires_grad_())
        grad = torch.randn_like(inputs[0]).detach()
        session.kept |= {"inputs_key": key, "inputs": (*inputs, grad)}
    return session.kept["inputs"]


@contextlib.contextmanager
def patched_table(**changes) -> Iterator[None]:
    """Launch settings as in the shipped table but for `changes`, fields of `launching.Table`."""
    shipped = launching.table
    changed = dataclasses.replace(shipped(), **changes)
    launching.table = lambda: changed
    try:
        yield
    finally:
        launching.table = shipped


def with_configs(kernels: tuple[str, ...] | None = None, **changes) -> dict:
    """The `configs` of the table with `changes` to those of `kernels` (default: all)."""
    return {
        key: dataclasses.replace(config, **changes)
        if kernels is None or key[1] in kernels
        else config
        for key, config in launching.table().configs.items()
    }


def forms(session: Session) -> tuple[bool, ...]:
    """Values of `swapped` that the architecture is meant to run; both in the interpreter."""
    if session.dry_run or launching.architecture(session.device) == "sm_90":
        return (False, True)
    return (False,)
