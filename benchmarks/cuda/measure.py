"""What steps on a GPU are made of: inputs, timings by CUDA events, graphs, patched settings."""

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import time
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.cuda.driver import Outcome, Session
from benchmarks.records import Records, timing_columns
from mra_attention import ops
from mra_attention.benchmarking import DTYPES, added_peak_bytes, topical_inputs
from mra_attention.triton_impl import launching

#: Kernels whose tiles one or two query blocks may own.
QUERY_KERNELS = ("forward", "query_gradient")
#: Tokens that the inputs of `Passes` are rolled by. Their topics last 64 tokens, as long as two
#: blocks: unrolled, two adjacent query blocks would select the same key blocks, which flatters two
#: query blocks a tile. Rolled, the union of two lists is 0.82 of their sum; the embedded English
#: model has 0.83.
_ROLLED = 20


class Shape(NamedTuple):
    """Tokens, samples, heads and head dim of a call."""

    length: int
    batch: int
    heads: int = 12
    dim: int = 64

    def row(self, **columns) -> dict:
        """Columns of a row in bf16."""
        shape = {"batch": self.batch, "heads": self.heads, "length": self.length}
        return {"dtype": "bf16", **shape, "head_dim": self.dim, **columns}

    def __str__(self) -> str:
        return f"{self.length} x {self.batch}"


def time_calls(
    session: Session, run: Callable[[], object], seconds: float = 0.4
) -> dict[str, float]:
    """Time `run` for about `seconds`, 5 to 100 times, after a warm-up; the columns of the times.

    On a GPU by CUDA events around each call, all queued before the first is read; in a dry run
    once, by the wall clock. Caches are left as the previous call left them.
    """
    if session.dry_run:
        begin = time.perf_counter()
        run()
        return timing_columns([1e3 * (time.perf_counter() - begin)])
    for _ in range(2):
        run()
    estimate = max(1e-3, _event_times(run, 2)[-1])
    return timing_columns(_event_times(run, max(5, min(100, int(1e3 * seconds / estimate)))))


def add_timing(
    session: Session, records: Records, row: dict, measure: Callable[[], dict]
) -> Outcome | None:
    """Add a row and the columns that `measure` returns, unless there is one."""
    if records.has(row):
        return None
    columns = measure()
    records.add(session.where | row | columns)
    return Outcome(detail=f"{columns['ms_median']:.3f} ms")


def _event_times(run: Callable[[], object], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def graphed(session: Session, run: Callable[[], object]) -> Callable[[], None]:
    """Capture `run` in a CUDA graph and return its replay, so that the host's speed plays no part;
    `run` itself in a dry run.
    """
    if session.dry_run:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_megabytes(session: Session, run: Callable[[], object]) -> float | None:
    """Megabytes (10^6 bytes) by which the peak of `run` exceeds what was in use; None on a CPU."""
    return None if session.dry_run else round(added_peak_bytes(run, "cuda") / 1e6, 1)


def attention_inputs(session: Session, shape: Shape, dtype: str = "bf16") -> tuple[Tensor, ...]:
    """Query, key, value `[B, H, N, D]` that require gradients, and a gradient of the output.

    Two samples, drawn on the host, fill the batch in turn. The inputs of the last call are kept.
    """
    if session.kept.get("inputs_of") != (shape, dtype):
        session.kept.pop("inputs", None)  # frees the memory before more is taken
        length, batch, heads, dim = shape
        inputs = []
        for x in topical_inputs(length, batch=min(2, batch), heads=heads, head_dim=dim):
            x = x.detach().to(session.device, DTYPES[dtype])
            x = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].contiguous()
            inputs.append(x.requires_grad_())
        grad = torch.randn_like(inputs[0]).detach()
        session.kept |= {"inputs_of": (shape, dtype), "inputs": (*inputs, grad)}
    return session.kept["inputs"]


def patched_table(**changes) -> contextlib.AbstractContextManager:
    """Use the shipped launch settings with `changes`, fields of `launching.Table`."""
    changed = dataclasses.replace(launching.table(), **changes)
    return mock.patch.object(launching, "table", lambda: changed)


def with_configs(**changes) -> dict:
    """The `configs` of the table with `changes` in every row."""
    configs = launching.table().configs
    return {key: dataclasses.replace(config, **changes) for key, config in configs.items()}


def with_coarse_precision(precision: str) -> dict:
    """The change to the table by which every architecture multiplies summaries this way."""
    return {"coarse_precision": dict.fromkeys(launching.table().coarse_precision, precision)}


def coarse_precisions(session: Session) -> tuple[str, ...]:
    """The precisions of coarse products that this GPU can run."""
    on_amd = session.device == "cuda" and torch.version.hip is not None
    return launching.COARSE_PRECISIONS[: 1 if on_amd else None]


def architecture(session: Session) -> str:
    """The GPU's, as in the table of launch settings."""
    return launching.architecture(torch.device(session.device))


def forms(session: Session) -> tuple[bool, ...]:
    """The values of `swapped` meant for this architecture; both in the interpreter."""
    if session.dry_run or architecture(session) == "sm_90":
        return (False, True)
    return (False,)


class Passes:
    """The passes of one call, each of which can be run by itself on the results of the others.

    Args:
        shape: of generated inputs.
        dtype: a key of `DTYPES`.
        priors: force the first block row and column and five diagonals into the selection.
    """

    def __init__(
        self, session: Session, shape: Shape, dtype: str, block_per_row: int, priors: bool = False
    ):
        inputs = attention_inputs(session, shape, dtype)
        *self.tensors, self.grad = (x.detach().roll(_ROLLED, 2) for x in inputs)
        self.block_per_row, self.priors = block_per_row, priors
        self.pooled = self.summaries()
        self.blocks = self.select()
        largest_budget = self.blocks.shape[-1] * block_per_row
        scale, is_sparse = shape.dim**-0.5, False
        self.settings = (None, self.blocks, scale, is_sparse, 32, "triton", largest_budget)
        self.results = self.forward()

    def summaries(self) -> tuple[Tensor, Tensor]:
        return ops.mra2_summarize(*self.tensors, None)

    def select(self) -> Tensor:
        return select_blocks(*self.tensors[:2], self.block_per_row, self.priors, self.pooled)

    def forward(self) -> tuple[Tensor, Tensor]:
        return ops.mra2_forward(*self.tensors, *self.settings, *self.pooled)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (self.grad, *self.tensors, *self.results)
        return ops.mra2_backward(*tensors, *self.settings, *self.pooled)


def select_blocks(
    query: Tensor,
    key: Tensor,
    block_per_row: int,
    priors: bool = False,
    summaries: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The pairs `[B, H, R, R]` that the Triton kernels select."""
    numbers = (block_per_row, None, 32, int(priors), 5 * priors)
    scale = query.shape[-1] ** -0.5
    return ops.mra2_select(
        query, key, None, *numbers, "row_normalized", scale, "triton", *summaries
    )


def run_program(session: Session, command: list[str], extra: dict[str, str]) -> Outcome:
    """Run with the packages of this checkout on the path and log the end of what it prints.

    `extra` is added to the environment. There is no timeout: the supervisor stops a step with all
    its processes.
    """
    paths = [ROOT / "src", ROOT / "kernels" / "torch-ext", os.environ.get("PYTHONPATH")]
    environment = os.environ | extra
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    text = done.stdout + done.stderr
    session.log(f"{' '.join(command[:6])} ended with {done.returncode}\n{text[-6000:]}")
    lines = text.strip().splitlines() or [""]
    return Outcome("pass" if done.returncode == 0 else "fail", lines[-1][:150])


def pictures(session: Session) -> ModuleType | None:
    """The module `plot`; None, and a message, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        session.say("no pictures: matplotlib is not installed")
        return None
    from benchmarks import plot

    return plot
