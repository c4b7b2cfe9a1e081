"""What steps on a card are made of: inputs, timings by CUDA events, graphs, patched settings."""

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cuda.driver import ROOT, Outcome, Session
from mra_attention import triton_impl
from mra_attention.benchmarking import topical_inputs
from mra_attention.triton_impl import launching

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Those whose tiles one or two query blocks may own.
QUERY_KERNELS = ("forward", "query_gradient")
#: Tokens that the inputs of `Passes` are rolled by. Their topics last 64 tokens, as long as two
#: blocks: unrolled, two adjacent query blocks would select the same key blocks, which flatters two
#: query blocks a tile. Rolled, the union of two lists is 0.82 of their sum; the embedded English
#: model has 0.83.
_ROLLED = 20


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


def with_coarse_precision(precision: str) -> dict:
    """The change to the table that has every architecture multiply summaries so."""
    return {"coarse_precision": dict.fromkeys(launching.table().coarse_precision, precision)}


def coarse_precisions(session: Session) -> tuple[str, ...]:
    """Those that this card can run."""
    on_amd = session.device.type == "cuda" and torch.version.hip is not None
    return launching.COARSE_PRECISIONS[: 1 if on_amd else None]


def forms(session: Session) -> tuple[bool, ...]:
    """Values of `swapped` that the architecture is meant to run; both in the interpreter."""
    if session.dry_run or launching.architecture(session.device) == "sm_90":
        return (False, True)
    return (False,)


class Passes:
    """The passes of one call, each to be run by itself on what the others gave.

    Args:
        length, batch, heads, dim: of generated inputs `[batch, heads, length, dim]`.
        dtype: a key of `DTYPES`.
        priors: force the first block row and column and five diagonals into the selection.
    """

    def __init__(
        self,
        session: Session,
        length: int,
        batch: int,
        heads: int,
        dim: int,
        dtype: str,
        block_per_row: int,
        priors: bool = False,
    ):
        inputs = attention_inputs(session, length, batch, heads, dim, dtype)
        *self.tensors, self.grad = (x.detach().roll(_ROLLED, 2) for x in inputs)
        self.budget = {
            "block_per_row": block_per_row,
            "block_budget": None,
            "initial_prior_first_n_blocks": int(priors),
            "initial_prior_diagonal_n_blocks": 5 * priors,
            "rule": "row_normalized",
            "scale": dim**-0.5,
        }
        self.pooled = self.summaries()
        self.blocks = self.select()
        pairs = self.blocks.shape[-1] * block_per_row
        self.settings = {"scale": dim**-0.5, "sparse": False, "largest_budget": pairs}
        self.results = self.forward()

    def summaries(self) -> triton_impl.Summaries:
        return triton_impl.summarize(*self.tensors, None)

    def select(self) -> Tensor:
        return triton_impl.select(*self.tensors[:2], None, summaries=self.pooled, **self.budget)

    def forward(self) -> tuple[Tensor, Tensor]:
        arguments = (*self.tensors, None, self.blocks)
        return triton_impl.forward(*arguments, summaries=self.pooled, **self.settings)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (self.grad, *self.tensors, *self.results, None, self.blocks)
        return triton_impl.backward(*arguments, summaries=self.pooled, **self.settings)


def run_program(
    session: Session, command: list[str], extra: dict[str, str], nothing: int = -1
) -> Outcome:
    """Run with the packages of this checkout on the path; the end of what it prints is logged.

    `extra` is added to the environment; an exit status of `nothing` says that nothing was to do.
    """
    paths = [ROOT / "src", ROOT / "kernels" / "torch-ext", os.environ.get("PYTHONPATH")]
    environment = os.environ | extra
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,  # without a timeout: the supervisor stops the step with all its processes
    )
    text = done.stdout + done.stderr
    session.log(f"{' '.join(command[:6])} ended with {done.returncode}\n{text[-6000:]}")
    lines = text.strip().splitlines() or [""]
    if done.returncode == nothing:
        return Outcome("skipped", f"skipped: {lines[-1][:150]}")
    return Outcome("pass" if done.returncode == 0 else "fail", lines[-1][:150])


def pictures(session: Session) -> ModuleType | None:
    """The module `plot`; None, and a word of it, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        session.say("no pictures: matplotlib is not installed")
        return None
    from benchmarks import plot

    return plot
