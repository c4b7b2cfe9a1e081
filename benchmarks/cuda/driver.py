"""The commands for a GPU: `check`, `bench`, `profile`, `tune`. Each is a list of steps, most wanted
first.

A supervisor, which runs nothing on the GPU, starts a worker process for the steps. A step that
crashes or hangs, or that breaks the device, costs only itself: the supervisor records it as failed
and starts a new worker for the rest, until the time is over. Files in the output folder:

    COMMAND.log               what happened, with tracebacks
    check.csv                 one row per check: pass, fail or skipped, with the largest error
    bench_steps.csv, profile_steps.csv, tune_steps.csv
                              the same for the steps of the other commands
    bench.csv, ceilings.csv, launches.csv, counters.csv, tune.csv, launch_configs.json, *.png
                              what was measured

The next call into the same folder skips the steps that have passed.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import CONDITIONS, Records, conditions

COMMANDS = ("check", "bench", "profile", "tune")
STEP_COLUMNS = (*CONDITIONS, "step", "status", "max_error", "allowed", "seconds", "detail")
#: Seconds of the time limit that are kept for tables and pictures.
_MARGIN = 8
#: Seconds without a message after which the worker counts as stuck.
_STUCK_AFTER = 200.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands."""
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="a command for a GPU")
    parser.add_argument("--tune", action="store_true", help="the command tune")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds (default: 540)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, Triton's interpreter")
    parser.add_argument(
        "--write-table", action="store_true", help="tune: replace the package's table too"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together."""
    args.command = args.command or "tune"
    if args.out is None:
        parser.error(f"{args.command} needs --out, a folder")
    if args.dry_run != (args.device == "cpu"):
        parser.error(
            f"{args.command} runs with --device cuda, or with --device cpu --dry-run to try it out"
        )
    if args.write_table and (args.dry_run or args.command != "tune"):
        parser.error("--write-table goes with tune on a GPU")


def run(args: argparse.Namespace) -> int:
    """Run a command; 0, or 1 when a step has failed."""
    session = Session(
        command=args.command,
        device=args.device,
        dry_run=args.dry_run,
        threads=args.threads,
        out=args.out,
        write_table=args.write_table,
        where=conditions(args.device, args.threads),
    )
    return Supervisor(session, args.time_limit).run()


# -- steps, in the worker


@dataclass
class Outcome:
    """The result of a step: "pass", "fail" or "skipped"; the error of its worst tensor."""

    status: str = "pass"
    detail: str = ""
    max_error: float | None = None
    allowed: float | None = None


class Skipped(Exception):
    """Raised by a step that cannot run here; the text says why."""


class Step(NamedTuple):
    """The name of a row, and the work; None means a plain pass."""

    name: str
    run: Callable[[], Outcome | None]


class Planned(NamedTuple):
    """The worker is going to run these steps."""

    names: list[str]


class Started(NamedTuple):
    """The worker has started a step, maybe inside of another one."""

    name: str


class Finished(NamedTuple):
    """The step that was started last has ended."""

    outcome: Outcome
    seconds: float


@dataclass
class Session:
    """What steps get to know and use.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        threads: of torch on the CPU.
        out: the output folder.
        write_table: `tune` replaces the package's table.
        where: the first columns of every row.
        done: names of steps that are not to be run.
        send: passes a message to the supervisor.
        kept: what one step leaves for the next.
    """

    command: str
    device: str
    dry_run: bool
    threads: int
    out: Path
    write_table: bool
    where: dict[str, str]
    done: frozenset[str] = frozenset()
    send: Callable[[Planned | Started | Finished], None] | None = None
    kept: dict = field(default_factory=dict)

    def log(self, text: str) -> None:
        with (self.out / f"{self.command}.log").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def say(self, text: str) -> None:
        self.log(text)
        print(text, flush=True)

    def run(self, step: Step) -> None:
        """Run a step and report it."""
        self.send(Started(step.name))
        begin = time.monotonic()
        try:
            outcome = step.run() or Outcome()
        except Exception as error:
            self.log(f"{step.name}\n{traceback.format_exc()}")
            outcome = outcome_of(error)
        self.finish_step(outcome, time.monotonic() - begin)

    def finish_step(self, outcome: Outcome, seconds: float) -> None:
        """Report the end of a step; where the device no longer answers, end the process instead,
        and so let the step fail: an illegal access breaks the device for the whole process.
        """
        if self.device == "cuda":
            import torch

            gc.collect()
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                self.say(f"the device no longer answers: {outcome.detail or error}")
                os._exit(1)  # not through pytest, which would catch an exception
        self.send(Finished(outcome, seconds))


def outcome_of(error: Exception) -> Outcome:
    """The outcome of a step that raised. Out-of-memory counts as skipped, and so does a launch
    configuration that needs more shared memory than the GPU has.
    """
    import torch

    if isinstance(error, Skipped):
        return Outcome("skipped", f"skipped: {error}")
    lines = str(error).strip().splitlines() or [""]
    detail = f"{type(error).__name__}: {lines[0][:200]}"
    if isinstance(error, torch.OutOfMemoryError) or type(error).__name__ == "OutOfResources":
        return Outcome("skipped", f"skipped: {detail}")
    return Outcome("fail", detail)


def work(session: Session, module_name: str) -> None:
    """Run the steps of a module that are not done, and report each."""
    steps = importlib.import_module(module_name).steps(session)
    assert len({step.name for step in steps}) == len(steps), "two steps of one name"
    session.send(Planned([step.name for step in steps]))
    for step in steps:
        if step.name not in session.done:
            session.run(step)


def _work_in_a_process(session: Session, module_name: str, connection: Connection) -> None:
    os.setsid()  # the supervisor ends the group, and so what steps have started
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is chatty
    if session.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    torch.set_num_threads(session.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    session.send = connection.send
    work(session, module_name)


# -- the supervisor


class Supervisor:
    """Starts a worker, and another one where it dies, until all steps are done or time is over.

    Args:
        session: names the files, and is passed to the worker.
        seconds: the time limit.
        module: has the function `steps(session)`, and maybe `finish(session)`, which shows what was
            measured; default: the module of the command.
    """

    def __init__(self, session: Session, seconds: float, module: str | None = None):
        self.session, self.began = session, time.monotonic()
        self.deadline = self.began + seconds - _MARGIN
        self.module = module or f"benchmarks.cuda.{session.command}"
        name = "check.csv" if session.command == "check" else f"{session.command}_steps.csv"
        self.records = Records(session.out / name, STEP_COLUMNS, ("step",))
        self.outcomes = {row["step"]: row for row in self.records.rows()}
        self.done = {name for name, row in self.outcomes.items() if row["status"] != "fail"}
        self.planned: dict[str, None] = {}  # a set in order

    def run(self) -> int:
        """0; 1 when a step has failed, or the worker has failed outside of the steps."""
        context = multiprocessing.get_context("spawn")
        status = None
        while status is None:
            receiver, sender = context.Pipe(duplex=False)
            session = dataclasses.replace(self.session, done=frozenset(self.done))
            arguments = (session, self.module, sender)
            worker = context.Process(target=_work_in_a_process, args=arguments)
            worker.start()
            sender.close()
            try:
                status = self.follow(worker, receiver)
            finally:  # also when interrupted: workers have sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.kill()
                worker.join()
        module = importlib.import_module(self.module)
        if hasattr(module, "finish"):
            module.finish(self.session)
        return max(status, self.summarize())

    def follow(self, worker: multiprocessing.Process, receiver: Connection) -> int | None:
        """Record what a worker reports until it ends or has to be stopped; the exit status, or None
        where another worker has to go on.
        """
        running: list[str] = []  # a step, and maybe a step inside of it
        while True:
            left = self.deadline - time.monotonic()
            limit = float("inf") if self.session.dry_run or not running else _STUCK_AFTER
            if not receiver.poll(max(0.0, min(left, limit))):
                if left <= limit:
                    passed, name = time.monotonic() - self.began, running[-1:] or ["no step"]
                    print(f"stopped after {passed:.0f} s in: {name[0]}", flush=True)
                    return 0
                self.record(running[-1], Outcome("fail", f"no end in {limit:.0f} s"), limit)
                return None
            try:
                message = receiver.recv()
            except EOFError:
                break
            match message:
                case Planned(names):
                    self.planned |= dict.fromkeys(names)
                case Started(name):
                    running.append(name)
                case Finished(outcome, seconds):
                    self.record(running.pop(), outcome, seconds)
        worker.join()
        if worker.exitcode == 0:
            return 0
        if running:
            detail = f"the process ended with {worker.exitcode}"
            self.record(running[-1], Outcome("fail", detail), 0.0)
            return None
        print(f"the worker ended with {worker.exitcode}; see above", file=sys.stderr)
        return 1

    def record(self, name: str, outcome: Outcome, seconds: float) -> None:
        errors = {"max_error": outcome.max_error, "allowed": outcome.allowed}
        row = {key: None if x is None else f"{x:.2e}" for key, x in errors.items()}
        row |= {"step": name, "status": outcome.status, "detail": outcome.detail}
        row = self.session.where | row | {"seconds": f"{seconds:.2f}"}
        self.records.add(row)
        self.outcomes[name] = row
        self.done.add(name)
        error = "" if outcome.max_error is None else f" error {outcome.max_error:.1e}"
        text = f"{outcome.status:<8}{name}{error} ({seconds:.1f} s) {outcome.detail}"
        self.session.say(text.rstrip())

    def summarize(self) -> int:
        """Print how the steps went and which are left; 1 when one has failed, else 0."""
        counts = {"pass": 0, "fail": 0, "skipped": 0}
        for name, row in self.outcomes.items():
            counts[row["status"]] += 1
            if row["status"] == "fail":
                print(f"  failed: {name}: {row['detail']}")
        left = [name for name in self.planned if name not in self.outcomes]
        for name in left[:12]:
            print(f"  left: {name}")
        numbers = ", ".join(f"{count} {status}" for status, count in counts.items())
        seconds = time.monotonic() - self.began
        session = self.session
        print(f"{session.command}: {numbers}, {len(left)} left; {seconds:.0f} s; {session.out}")
        return int(counts["fail"] > 0)
