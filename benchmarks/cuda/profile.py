"""Where the time of a call goes on this GPU: every launch beside its roofline, and its counters.

`launches.csv` has a row per pass and kernel: how many launches, microseconds of all of them (the
mean of some calls, as the device counts them), and `floor_us`, the least time by the roofline with
the ceilings that were measured here (`roofline.py`). torch's own kernels have none. The rows
"(all)" are the sums, "(graph)" what the pass takes as a CUDA graph: the rest is the time between
launches.

`counters.csv` is what Nsight Compute (`ncu`) writes of each kernel of a call: achieved throughput
of device memory, L2 and tensor cores, hit rates, occupancy. It needs `ncu` and permission to read
the counters.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cuda import bench, summary
from benchmarks.cuda.driver import Outcome, Session, Skipped, Step
from benchmarks.cuda.measure import Passes, Shape, graphed, pictures, run_program, time_calls
from benchmarks.cuda.roofline import KERNELS, Ceilings, Problem
from benchmarks.records import CONDITIONS, Records
from mra_attention.triton_impl import launching

_KEYS = ("pass", "dtype", "batch", "heads", "length", "head_dim", "block_per_row", "kernel")
_NUMBERS = ("launches", "us", "floor_us", "bound", "memory_mb", "gather_mb", "gigaflop")
LAUNCH_COLUMNS = (*CONDITIONS, *_KEYS, *_NUMBERS)
PASSES = ("summaries", "select", "forward", "backward")
#: Sections of ncu, not names of counters, which differ between GPUs.
_SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis"),
    *("Occupancy", "WarpStateStats", "LaunchStats"),
)


def steps(session: Session) -> list[Step]:
    """Ceilings, then the launches of every pass, and the counters after the first shape."""
    records = Records(session.out / "launches.csv", LAUNCH_COLUMNS, _KEYS)
    (first, *others), budget = _shapes(session)

    def launches_of(*shapes: Shape) -> Iterator[Step]:
        for shape in shapes:
            for name in PASSES:
                run = partial(_launches, session, records, shape, budget, name)
                yield Step(f"launches: {shape} {name}", run)

    counters = Step("counters by ncu", partial(_counters, session, first, budget))
    return [*bench.ceiling_steps(session), *launches_of(first), counters, *launches_of(*others)]


def _shapes(session: Session) -> tuple[list[Shape], int]:
    if session.dry_run:
        return [Shape(96, 1, 1, 16), Shape(64, 2, 1, 16)], 1
    sizes = [(4096, 8), (16384, 1), (65536, 1), (4096, 1), (1024, 8)]
    return [Shape(*x) for x in sizes], 8


# -- launches


def _launches(session, records, shape, budget, name) -> Outcome | None:
    about = session.where | shape.row(block_per_row=budget) | {"pass": name}
    if records.has(about | {"kernel": summary.GRAPH}):
        return None
    run = getattr(Passes(session, shape, "bf16", budget), name)
    times = _kernel_times(session, run)
    is_stored = shape.length < launching.table().recompute_from_length
    problem = Problem(*shape, budget, is_stored=is_stored)
    works = problem.works()[name]
    ceilings = Ceilings.measured(session.out / "ceilings.csv")
    precision = launching.coarse_precision(torch.device(session.device), torch.bfloat16)
    missing = {kernel for kernel, work in works.items() if work.memory} - times.keys()
    if missing:
        raise RuntimeError(f"the profiler saw no launch of {', '.join(sorted(missing))}")
    rows, total, least_total = [], 0.0, 0.0
    for kernel, (launches, us) in times.items():
        row = about | {"kernel": kernel, "launches": f"{launches:g}", "us": f"{us:.2f}"}
        work = works.get(kernel)
        if work is not None:
            least, bound = ceilings.least_microseconds(work, precision)
            row |= {"floor_us": f"{least:.2f}", "bound": bound}
            row |= {
                "memory_mb": f"{work.memory / 1e6:.4g}",
                "gather_mb": f"{work.gather / 1e6:.4g}",
            }
            row["gigaflop"] = f"{(work.exact + work.coarse) / 1e9:.4g}"
            least_total += least
        total += us
        rows.append(row)
    sums = {"us": f"{total:.2f}", "floor_us": f"{least_total:.2f}"}
    launches = f"{sum(launches for launches, _ in times.values()):g}"
    rows.append(about | {"kernel": summary.ALL, "launches": launches} | sums)
    graph = 1e3 * time_calls(session, graphed(session, run))["ms_median"]
    rows.append(about | {"kernel": summary.GRAPH, "us": f"{graph:.2f}"})
    for row in rows:  # all of them or none: a pass measured again must not count twice
        records.add(row)
    detail = f"{total:.0f} us in kernels, roofline {least_total:.0f}, graph {graph:.0f}"
    return Outcome(detail=detail)


def _kernel_times(session: Session, run: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Kernel -> launches and microseconds per call. In a dry run only launches of Triton, by the
    host's clock.
    """
    on_gpu = session.device == "cuda"
    calls = 20 if on_gpu else 1
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    device_type = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with contextlib.nullcontext() if on_gpu else _marked_launches() as marked:
        for repeats in (2, calls):  # the first round wakes the profiler up
            with profile(activities=[activity], acc_events=True) as profiler:
                for _ in range(repeats):
                    run()
                if on_gpu:
                    torch.cuda.synchronize()
    times: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        if event.device_type == device_type and (on_gpu or event.key in marked):
            us = event.self_device_time_total if on_gpu else event.cpu_time_total
            launches, before = times.get(event.key[:80], (0, 0))  # torch has longer names
            times[event.key[:80]] = (launches + event.count / calls, before + us / calls)
    return times


@contextlib.contextmanager
def _marked_launches() -> Iterator[set[str]]:
    """Make launches leave a profiler event under their kernel's name, and collect the names."""
    names: set[str] = set()
    launch = launching.launch

    def marked(kernel, *arguments, **settings) -> None:
        names.add(kernel.__name__)
        with record_function(kernel.__name__):
            launch(kernel, *arguments, **settings)

    with mock.patch.object(launching, "launch", marked):
        yield names


# -- counters

_PROFILED = """
import sys
import torch
from mra_attention import mra2_attention
from mra_attention.benchmarking import topical_inputs
length, batch, heads, dim, budget = map(int, sys.argv[1:])
drawn = topical_inputs(length, batch=batch, heads=heads, head_dim=dim, dtype=torch.bfloat16)
inputs = [x.detach().cuda().requires_grad_() for x in drawn]
def run():
    output = mra2_attention(*inputs, block_per_row=budget, impl="triton")
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    torch.cuda.synchronize()
run()
torch.cuda.profiler.start()
run()
torch.cuda.profiler.stop()
"""


def _counters(session: Session, shape: Shape, budget: int) -> Outcome | None:
    """Profile the Triton kernels of one call, in a program that has compiled them before."""
    path = session.out / "counters.csv"
    if path.exists():
        return None
    if session.dry_run:
        raise Skipped("dry run")
    tool = _ncu()
    if tool is None:
        raise Skipped("no ncu")
    raw = session.out / "counters.tmp"
    command = [tool, "--profile-from-start", "off", "--target-processes", "all"]
    command += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--clock-control", "none"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    command += ["--csv", "--page", "raw", "--log-file", str(raw)]
    command += [sys.executable, "-c", _PROFILED, *map(str, (*shape, budget))]
    outcome = run_program(session, command, {})
    if outcome.status != "pass":
        return outcome
    table = counters_of(raw.read_text())
    if not table:
        session.log(raw.read_text()[-4000:])
        return Outcome("fail", "ncu wrote no table; see the log")
    path.write_text(table)
    raw.unlink()
    return Outcome(detail=f"{len(table.splitlines()) - 2} launches")


def _ncu() -> str | None:
    installed = map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu"))
    paths = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu", *installed]
    return next((path for path in paths if path and os.access(path, os.X_OK)), None)


def counters_of(text: str) -> str:
    """The table in the output of ncu with `--csv --page raw`: names, units, a line per launch."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith('"')]
    return "".join(lines) if len(lines) > 2 else ""


def finish(session: Session) -> None:
    """Print the tables; draw the launches of the first shape."""
    summary.print_profile(session.out)
    plot, records = pictures(session), Records(session.out / "launches.csv", LAUNCH_COLUMNS, _KEYS)
    if plot is not None and records.rows():
        plot.draw_launches(records.rows(), session.out / "launches.png")
