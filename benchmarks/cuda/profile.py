"""Where the time of a call goes on this card: every launch beside its floor, and its counters.

`launches.csv` has a row per pass and kernel: how many launches, microseconds of all of them (the
mean of some calls, as the device counts them), and the floor of `roofline.py` with the ceilings
that were measured here. Kernels of torch have no floor. The rows "(all)" are the sums, "(graph)"
what the pass takes as a CUDA graph: the rest is what lies between launches.

`counters.csv` is what Nsight Compute (`ncu`) writes of each kernel of a call: achieved throughput
of device memory, L2 and tensor cores, hit rates, occupancy. It needs `ncu` and the right to read
the counters.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cuda import bench
from benchmarks.cuda.bench import Shape
from benchmarks.cuda.driver import Outcome, Session, Skipped, Step
from benchmarks.cuda.measure import Passes, graphed, pictures, run_program, time_calls
from benchmarks.cuda.roofline import KERNELS, Ceilings, Problem, Work
from benchmarks.cuda.summary import ALL, GRAPH
from benchmarks.records import CONDITIONS, Records
from mra_attention.triton_impl import launching

_KEYS = ("pass", "dtype", "batch", "heads", "length", "head_dim", "block_per_row", "kernel")
_NUMBERS = ("launches", "us", "floor_us", "bound", "memory_mb", "gather_mb", "gigaflop")
LAUNCH_COLUMNS = (*CONDITIONS, *_KEYS, *_NUMBERS)
PASSES = ("summaries", "select", "forward", "backward")
#: What is asked of ncu: no names of counters, which differ from card to card.
_SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "Occupancy",
    "WarpStateStats",
    "LaunchStats",
)


def steps(session: Session) -> list[Step]:
    """Ceilings, then the launches of every pass, and the counters after the first shape."""
    records = Records(session.out / "launches.csv", LAUNCH_COLUMNS, _KEYS)
    first, *others = _shapes(session)

    def of_shape(shape: Shape) -> Iterator[Step]:
        for name in PASSES:

            def run(s: Session, name: str = name) -> Outcome | None:
                return _launches(s, records, shape, name)

            yield Step(f"launches: {shape} {name}", run, "launches", 6)

    counters = Step("counters by ncu", lambda s: _counters(s, first), "counters", 60)
    found = [*bench.ceiling_steps(session), *of_shape(first), counters]
    return found + [step for shape in others for step in of_shape(shape)]


def _shapes(session: Session) -> list[Shape]:
    if session.dry_run:
        return [Shape(96, 1, 1, 16), Shape(64, 2, 1, 16)]
    return [Shape(4096, 8), Shape(16384, 1), Shape(65536, 1), Shape(4096, 1), Shape(1024, 8)]


def _budget(session: Session) -> int:
    return 1 if session.dry_run else 8


# -- launches


def _launches(session: Session, records: Records, shape: Shape, name: str) -> Outcome | None:
    budget = _budget(session)
    about = session.where | shape.row(block_per_row=budget) | {"pass": name}
    if records.has(about | {"kernel": GRAPH}):
        return None
    passes = Passes(session, shape.length, shape.batch, shape.heads, shape.dim, "bf16", budget)
    run = getattr(passes, name)
    times = _kernel_times(session, run)
    problem = Problem(
        shape.length,
        shape.batch,
        shape.heads,
        shape.dim,
        budget,
        is_stored=shape.length < launching.table().recompute_from_length,
    )
    works = problem.works()[name]
    ceilings = Ceilings.measured(session.out / "ceilings.csv")
    precision = launching.coarse_precision(session.device, torch.bfloat16)
    missing = {kernel for kernel, work in works.items() if work.memory} - times.keys()
    if missing:
        raise RuntimeError(f"the profiler saw no launch of {', '.join(sorted(missing))}")
    rows, total, floor_total = [], 0.0, 0.0
    for kernel, (launches, us) in times.items():
        row = about | {"kernel": kernel, "launches": f"{launches:g}", "us": f"{us:.2f}"}
        work = works.get(kernel)
        if work is not None:
            floor, bound = ceilings.floor(work, precision)
            row |= _work_columns(work) | {"floor_us": f"{floor:.2f}", "bound": bound}
            floor_total += floor
        total += us
        rows.append(row)
    sums = {"us": f"{total:.2f}", "floor_us": f"{floor_total:.2f}"}
    launches = f"{sum(launches for launches, _ in times.values()):g}"
    rows.append(about | {"kernel": ALL, "launches": launches} | sums)
    graph = 1e3 * time_calls(session, graphed(session, run)).median
    rows.append(about | {"kernel": GRAPH, "us": f"{graph:.2f}"})
    for row in rows:  # all of them or none: a pass that is measured again must not count twice
        records.add(row)
    return Outcome(detail=f"{total:.0f} us in kernels, floor {floor_total:.0f}, graph {graph:.0f}")


def _work_columns(work: Work) -> dict[str, str]:
    numbers = (work.memory / 1e6, work.gather / 1e6, (work.exact + work.coarse) / 1e9)
    names = ("memory_mb", "gather_mb", "gigaflop")
    return {name: f"{x:.4g}" for name, x in zip(names, numbers, strict=True)}


def _kernel_times(session: Session, run: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Kernel -> launches and microseconds per call. In a dry run launches of Triton alone, by the
    host's clock.
    """
    on_card = session.device.type == "cuda"
    calls = 20 if on_card else 1
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    place = DeviceType.CUDA if on_card else DeviceType.CPU
    with contextlib.nullcontext() if on_card else _marked_launches() as marked:
        for repeats in (2, calls):  # the first round wakes the profiler up
            with profile(activities=[activity], acc_events=True) as profiler:
                for _ in range(repeats):
                    run()
                if on_card:
                    torch.cuda.synchronize()
    times: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        if event.device_type == place and (on_card or event.key in marked):
            us = event.self_device_time_total if on_card else event.cpu_time_total
            launches, before = times.get(event.key[:80], (0, 0))  # torch has longer names
            times[event.key[:80]] = (launches + event.count / calls, before + us / calls)
    return times


@contextlib.contextmanager
def _marked_launches() -> Iterator[set[str]]:
    """Launches leave an event of their name, which is added to the set."""
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


def _counters(session: Session, shape: Shape) -> Outcome | None:
    """Profile the Triton kernels of one call; the program that is profiled compiles them before."""
    found = session.out / "counters.csv"
    if found.exists():
        return None
    if session.dry_run:
        raise Skipped("dry run")
    tool = _ncu()
    if tool is None:
        raise Skipped("no ncu")
    written = session.out / "counters.tmp"
    command = [tool, "--profile-from-start", "off", "--target-processes", "all"]
    command += ["--kernel-name", f"regex:^({'|'.join(KERNELS)})$", "--clock-control", "none"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    command += ["--csv", "--page", "raw", "--log-file", str(written)]
    numbers = (shape.length, shape.batch, shape.heads, shape.dim, _budget(session))
    command += [sys.executable, "-c", _PROFILED, *map(str, numbers)]
    outcome = run_program(session, command, {})
    if outcome.status != "pass":
        return outcome
    table = counters_of(written.read_text())
    if not table:
        session.log(written.read_text()[-4000:])
        return Outcome("fail", "ncu wrote no table; see the log")
    found.write_text(table)
    written.unlink()
    return Outcome(detail=f"{len(table.splitlines()) - 2} launches")


def _ncu() -> str | None:
    places = [
        "/usr/local/cuda/bin/ncu",
        *map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")),
    ]
    return shutil.which("ncu") or next(
        (place for place in places if os.access(place, os.X_OK)), None
    )


def counters_of(text: str) -> str:
    """The table in what ncu writes with `--csv --page raw`: names, units, a line per launch."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith('"')]
    return "".join(lines) if len(lines) > 2 else ""


def finish(session: Session, write_table: bool) -> None:
    """Draw the launches of the first shape."""
    drawn, rows = pictures(session), Records(session.out / "launches.csv", LAUNCH_COLUMNS, _KEYS)
    if drawn is not None and rows.rows():
        drawn.draw_launches(rows.rows(), session.out / "launches.png")
