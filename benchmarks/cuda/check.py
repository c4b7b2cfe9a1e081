"""Are the kernels right on this GPU? The test suite's GPU tests, a row each, and a memory checker.

What is right is defined in tests/kernels: `pytest -m gpu` compares with the reference and the
float64 yardstick, forces every row and form of the launch table, and tests what only a GPU can
show. A test that records the properties "max_error" and "allowed" fills these columns of its row.
"""

import importlib.util
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import ROOT
from benchmarks.cuda.driver import Outcome, Planned, Session, Skipped, Started, Step
from benchmarks.cuda.measure import run_program

if TYPE_CHECKING:
    import pytest


def steps(session: Session) -> list[Step]:
    """The tests, then the memory checker."""
    return [
        Step("pytest -m gpu", partial(_run_tests, session)),
        Step("compute-sanitizer finds nothing", partial(_sanitize, session)),
    ]


def _run_tests(session: Session) -> Outcome:
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome("fail", f"not installed: {', '.join(missing)}")
    import pytest

    folder = ROOT / "tests" / "kernels"
    tests = [folder / "test_gpu.py", *([] if session.dry_run else [folder])]  # the others after it
    rows = TestRows(session)
    # A row is printed for every test, instead of pytest's report.
    quiet = ("-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=")
    collecting = ("--rootdir", str(ROOT), "--continue-on-collection-errors", "-m", "gpu")
    status = pytest.main([*quiet, *collecting, *map(str, tests)], plugins=[rows])
    known = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if status not in known or rows.failed or not rows.collected:
        detail = f"pytest ended with {int(status)}; {rows.failed} failed of {rows.collected}"
        return Outcome("fail", detail)
    return Outcome(detail=f"{rows.collected} tests")


class TestRows:
    """Pytest plugin that reports every test as a step, and leaves out the steps that are done.

    Attributes:
        collected: GPU tests that there are.
        failed: tests and files that failed in this process.
    """

    __test__ = False

    def __init__(self, session: Session):
        self.session, self.collected, self.failed = session, 0, 0
        self.outcome, self.seconds = Outcome(), 0.0

    def pytest_collectreport(self, report: "pytest.CollectReport") -> None:
        if report.failed:
            self.failed += 1
            self.session.say(f"cannot be collected: {report.nodeid}\n{report.longreprtext}")

    def pytest_collection_finish(self, session: "pytest.Session") -> None:
        self.collected = len(session.items)
        self.session.send(Planned([item.nodeid for item in session.items]))
        done = self.session.done
        session.items[:] = [item for item in session.items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.seconds = Outcome(), 0.0
        self.session.send(Started(nodeid))

    def pytest_runtest_logreport(self, report: "pytest.TestReport") -> None:
        """Setup, call and teardown of a test have a report each; errors come with the last."""
        self.seconds += report.duration
        numbers = dict(report.user_properties)
        self.outcome.max_error = numbers.get("max_error")
        self.outcome.allowed = numbers.get("allowed")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            detail = f"skipped: {reason.removeprefix('Skipped: ')}"
            self.outcome.status, self.outcome.detail = "skipped", detail
        elif report.failed:
            lines = report.longreprtext.strip().splitlines() or [""]
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            self.outcome.status, self.outcome.detail = "fail", (errors or lines)[0][:200]
            self.session.log(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logfinish(self) -> None:
        self.failed += self.outcome.status == "fail"
        self.session.finish_step(self.outcome, self.seconds)


_SANITIZED = """
import torch
from mra_attention import mra2_attention
q, k, v = (torch.randn(2, 2, 100, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
mask = torch.arange(100, device="cuda").expand(2, 100) < torch.tensor([[100], [70]], device="cuda")
mra2_attention(q, k, v, mask, block_per_row=2, impl="triton").sum().backward()
torch.cuda.synchronize()
"""


def _sanitize(session: Session) -> Outcome:
    if session.dry_run:
        raise Skipped("dry run")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise Skipped("no compute-sanitizer")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-c", _SANITIZED]
    return run_program(session, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
