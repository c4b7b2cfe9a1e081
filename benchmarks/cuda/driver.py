"""The commands for a card: `check`, `bench`, `profile` and `tune` as lists of steps, most wanted
first.

A supervisor, which never touches the card, starts workers that run the steps. A worker that crashes
or hangs, or whose device no longer answers, costs its step alone: the supervisor notes the step as
failed and starts a new worker for the rest. Files in the output folder:

    COMMAND.log               what happened, with tracebacks
    check.csv                 one row per check: pass, fail or skipped, with the largest error
    bench_steps.csv, profile_steps.csv, tune_steps.csv        the same for the steps of the others
    bench.csv, ceilings.csv, launches.csv, counters.csv, tune.csv, launch_configs.json, *.png
                              what was measured

Steps that have passed are skipped by the next call.
"""

import argparse
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cuda import summary
from benchmarks.records import CONDITIONS, Records, conditions

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("check", "bench", "profile", "tune")
NO_CARD = "--device cuda, but torch sees no CUDA or ROCm device here"

STEP_COLUMNS = (*CONDITIONS, "step", "status", "max_error", "allowed", "seconds", "detail")
#: Seconds that the supervisor grants a step that says nothing else.
STEP_LIMIT = 150
#: Those that start a program of their own, which may take all the time there is.
LONG_STEPS = ("pytest", "compute-sanitizer", "counters")
#: Exit status of a worker whose device no longer answers.
_BROKEN = 3
#: Seconds before the time limit at which workers stop starting steps.
_MARGIN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands."""
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="a command for a card")
    parser.add_argument("--tune", action="store_true", help="the command tune")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds (default: 540)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, Triton's interpreter")
    parser.add_argument(
        "--write-table", action="store_true", help="tune: replace the package's table too"
    )
    parser.add_argument("--workers", type=int, help="processes of check, and of tune's compiling")
    for hidden in ("--worker", "--rows-before"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)


def make_importable() -> None:
    """Put the packages of this checkout on the path where they are not installed."""
    for package, folder in (("mra_attention", "kernels/torch-ext"), ("mra_hf", "src")):
        if find_spec(package) is None:
            sys.path.insert(0, str(ROOT / folder))


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Supervise a command, or be one of its workers."""
    args.command = args.command or "tune"
    if args.out is None:
        parser.error(f"{args.command} needs --out, a folder")
    if args.dry_run != (args.device == "cpu"):
        parser.error(
            f"{args.command} runs with --device cuda, or with --device cpu --dry-run to try it out"
        )
    if args.write_table and (args.dry_run or args.command != "tune"):
        parser.error("--write-table goes with tune on a card")
    if args.worker is None:
        return Supervisor(args).run()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(NO_CARD)
    torch.set_num_threads(args.threads)
    return work(args)


# -- steps


@dataclass
class Outcome:
    """What a step found: "pass", "fail" or "skipped"; errors are of its worst tensor."""

    status: str = "pass"
    detail: str = ""
    max_error: float | None = None
    allowed: float | None = None


class Skipped(Exception):
    """A step finds that it cannot be run here; the text says why."""


@dataclass(frozen=True)
class Step:
    """Args:
    name: of the row it leaves.
    run: the work; None for a plain pass.
    kind: steps of a kind are expected to last as long as the longest of them did.
    seconds: expected at least, on a card.
    """

    name: str
    run: Callable[["Session"], Outcome | None]
    kind: str = ""
    seconds: float = 2.0


@dataclass
class Session:
    """What steps need to know.

    Args:
        device: a torch.device.
        warm: run every configuration once and record nothing, to fill Triton's cache.
        deadline: of `time.monotonic()`.
    """

    device: object
    dry_run: bool
    warm: bool
    out: Path
    deadline: float
    log_path: Path
    where: dict[str, str]
    kept: dict = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def log(self, text: str) -> None:
        with self.log_path.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def say(self, text: str) -> None:
        self.log(text)
        print(text, flush=True)


def steps_path(out: Path, command: str) -> Path:
    return out / ("check.csv" if command == "check" else f"{command}_steps.csv")


def finished(records: Records, rows_before: int) -> set[str]:
    """Steps that are not to be run: passed, skipped, or failed since row `rows_before`."""
    rows = records.rows()
    latest = {row["step"]: row["status"] for row in rows}
    passed = {name for name, status in latest.items() if status != "fail"}
    return passed | {row["step"] for row in rows[rows_before:]}


def work(args: argparse.Namespace) -> int:
    """Run a worker's share of the steps; 0 at the end, 3 when the device is broken."""
    import torch

    module = importlib.import_module(f"benchmarks.cuda.{args.command}")
    torch.backends.cuda.matmul.allow_tf32 = False
    session = Session(
        device=torch.device(args.device),
        dry_run=args.dry_run,
        warm=args.warm,
        out=args.out,
        deadline=time.monotonic() + args.time_limit - (0 if args.dry_run else _MARGIN),
        log_path=args.out / f"{args.command}.log",
        where=conditions(args.device, args.threads),
    )
    steps = module.steps(session)
    assert len({step.name for step in steps}) == len(steps), "two steps of one name"
    plan = args.out / f"{args.command}.plan"
    if args.worker == 0 and not args.warm:
        plan.write_text("\n".join(step.name for step in steps) + "\n")
    running = running_path(args.out, args.command, args.worker)
    records = Records(steps_path(args.out, args.command), STEP_COLUMNS, ("step",))
    done = finished(records, args.rows_before)
    longest: dict[str, float] = {}
    share = steps[args.worker :: args.workers]
    for step in share:
        needed = 0 if args.dry_run else max(step.seconds, longest.get(step.kind, 0))
        if step.name in done or session.left() < needed:
            continue
        running.write_text(step.name)
        begin = time.monotonic()
        try:
            outcome = step.run(session) or Outcome()
        except Exception as error:
            session.log(f"{step.name}\n{traceback.format_exc()}")
            outcome = outcome_of(error, is_shipped=step.name.startswith("agrees:"))
        seconds = time.monotonic() - begin
        longest[step.kind] = max(seconds, longest.get(step.kind, 0))
        if not args.warm:
            records.add(session.where | row_of(step.name, outcome, seconds))
            error = "" if outcome.max_error is None else f" error {outcome.max_error:.1e}"
            session.say(
                f"{outcome.status:<8}{step.name}{error} ({seconds:.1f} s) {outcome.detail}".rstrip()
            )
        running.write_text("")
        if not is_well(session):
            return _BROKEN
    if hasattr(module, "finish") and not args.warm:
        module.finish(session, args.write_table)
    return 0


def outcome_of(error: Exception, is_shipped: bool) -> Outcome:
    """Too little memory is no failure of what is measured; nor is a configuration that asks for too
    much shared memory, unless it is the one that is shipped.
    """
    import torch

    if isinstance(error, Skipped):
        return Outcome("skipped", f"skipped: {error}")
    lines = str(error).strip().splitlines() or [""]
    kind = type(error).__name__
    detail = f"{kind}: {lines[0][:200]}"
    too_large = kind == "OutOfResources" and not is_shipped  # Triton's
    if isinstance(error, torch.OutOfMemoryError) or too_large:
        return Outcome("skipped", f"skipped: {detail}")
    return Outcome("fail", detail)


def row_of(name: str, outcome: Outcome, seconds: float) -> dict:
    numbers = {"max_error": outcome.max_error, "allowed": outcome.allowed}
    row = {key: None if x is None else f"{x:.2e}" for key, x in numbers.items()}
    row |= {"step": name, "status": outcome.status, "detail": outcome.detail}
    return row | {"seconds": f"{seconds:.2f}"}


def is_well(session: Session) -> bool:
    """Whether the device still answers; an illegal access breaks it for the whole process."""
    import torch

    gc.collect()
    if session.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        session.log(f"the device no longer answers: {error}")
        return False
    return True


# -- the supervisor


def running_path(out: Path, command: str, worker: int) -> Path:
    return out / f"{command}.running.{worker}"


def limit_of(step: str) -> float:
    """Seconds after which a step counts as stuck."""
    return float("inf") if step.startswith(LONG_STEPS) else STEP_LIMIT


class Supervisor:
    """Starts workers, again where they die, until all steps are done or the time is over."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.monotonic()
        args.out.mkdir(parents=True, exist_ok=True)
        self.records = Records(steps_path(args.out, args.command), STEP_COLUMNS, ("step",))
        self.rows_before = len(self.records.rows())
        spread = 1 if args.dry_run else max(1, min(8, (os.cpu_count() or 2) // 2))
        self.workers = args.workers or spread
        self.environment = {"KINETO_LOG_LEVEL": "99", **os.environ}  # torch's profiler is chatty
        if args.dry_run:
            self.environment["TRITON_INTERPRET"] = "1"

    def run(self) -> int:
        """0; 1 when a step failed; 2 for a command that cannot run here."""
        args, status = self.args, 0
        if args.command == "tune" and not args.dry_run:
            status = self.phase(self.workers, 0.45 * args.time_limit, warm=True)
        if status == 0:
            workers = self.workers if args.command == "check" else 1
            status = self.phase(workers, args.time_limit, warm=False)
        if status == 2:
            return 2
        for path in args.out.glob(f"{args.command}.running.*"):
            path.unlink()
        failed = self.summary()
        return 1 if status or failed else 0

    def phase(self, workers: int, until: float, *, warm: bool) -> int:
        """Run workers until all have ended or `until` seconds have passed since the start."""
        processes = {i: self.start(i, workers, until, warm) for i in range(workers)}
        try:
            return self.watch(processes, workers, until, warm)
        finally:  # also when interrupted: workers have sessions of their own
            for process in processes.values():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def watch(
        self, processes: dict[int, subprocess.Popen], workers: int, until: float, warm: bool
    ) -> int:
        """Restart workers whose step got stuck or broke the device; the worst exit status."""
        status = 0
        while processes:
            time.sleep(0.1)
            for worker, process in list(processes.items()):
                code, running = process.poll(), self.running(worker)
                over = time.monotonic() - self.began > until
                if code is None and (over or self.is_stuck(worker)):
                    os.killpg(process.pid, signal.SIGKILL)  # and what the step has started
                    process.wait()
                    limit = limit_of(running)
                    reason = f"stopped at {until:.0f} s" if over else f"no end in {limit} s"
                elif code is None:
                    continue
                else:
                    reason = f"the process ended with {code}"
                del processes[worker]
                if code == 0 or code == 2:
                    status = max(status, code)
                elif over or warm:  # what was to be compiled will be when it is measured
                    print(f"{reason} in: {running}", flush=True)
                elif not running and code != _BROKEN:
                    print(f"worker {worker}: {reason}; see above", file=sys.stderr)
                    status = 1
                else:
                    if running:
                        self.note_failure(running, reason)
                    processes[worker] = self.start(worker, workers, until, warm)
        return status

    def start(self, worker: int, workers: int, until: float, warm: bool) -> subprocess.Popen:
        args = self.args
        running_path(args.out, args.command, worker).write_text("")
        left = until - (time.monotonic() - self.began)
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), args.command]
        command += ["--device", args.device, "--threads", str(args.threads)]
        command += ["--out", str(args.out), "--time-limit", f"{left:.1f}"]
        command += ["--worker", str(worker), "--workers", str(workers)]
        command += ["--rows-before", str(self.rows_before)]
        command += ["--dry-run"] * args.dry_run + ["--warm"] * warm
        command += ["--write-table"] * args.write_table
        return subprocess.Popen(command, env=self.environment, start_new_session=True)

    def running(self, worker: int) -> str:
        return running_path(self.args.out, self.args.command, worker).read_text()

    def is_stuck(self, worker: int) -> bool:
        step = self.running(worker)
        if self.args.dry_run or not step:
            return False
        path = running_path(self.args.out, self.args.command, worker)
        return time.time() - path.stat().st_mtime > limit_of(step)

    def note_failure(self, step: str, reason: str) -> None:
        print(f"fail    {step}: {reason}", flush=True)
        self.records.add(row_of(step, Outcome("fail", reason), 0.0))

    def summary(self) -> int:
        """Print what was measured and what is left; the number of failed steps."""
        args = self.args
        latest = {row["step"]: row for row in self.records.rows()}
        plan = args.out / f"{args.command}.plan"
        planned = plan.read_text().splitlines() if plan.exists() else []
        counts = {"pass": 0, "fail": 0, "skipped": 0}
        for row in latest.values():
            counts[row["status"]] += 1
        if args.command == "bench":
            summary.print_bench(args.out)
        if args.command == "profile":
            summary.print_profile(args.out)
        left = [name for name in planned if name not in latest]
        for name, row in latest.items():
            if row["status"] == "fail":
                print(f"  failed: {name}: {row['detail']}")
        for name in left[:12]:
            print(f"  left: {name}")
        numbers = ", ".join(f"{count} {status}" for status, count in counts.items())
        seconds = time.monotonic() - self.began
        print(f"{args.command}: {numbers}, {len(left)} left; {seconds:.0f} s; {args.out}")
        return counts["fail"]
