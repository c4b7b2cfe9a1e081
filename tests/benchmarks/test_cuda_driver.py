"""The commands for a GPU: their rows, that they go on where they stopped, that a broken step costs
only itself. Dry runs try the whole programs out on a CPU.
"""

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT, run
from benchmarks.cuda import check, driver, tune
from benchmarks.cuda.driver import Finished, Outcome, Planned, Skipped, Started, Step
from benchmarks.records import CONDITIONS, read_rows
from mra_attention.triton_impl import launching

PASSES = ("summaries", "select", "forward", "backward")
SHIPPED = Path(launching.__file__).with_name("launch_configs.json")


def statuses(rows):
    return {row["step"]: row["status"] for row in rows}


def session(out, **attributes):
    out.mkdir(exist_ok=True)
    where = dict.fromkeys(CONDITIONS, "here")
    return driver.Session("check", "cpu", False, 1, out, False, where, **attributes)


# -- steps and their supervisor


def raises(error):
    def step():
        raise error

    return step


def test_a_worker_reports_every_step(tmp_path, monkeypatch):
    measured = Outcome(max_error=0.5, allowed=1.0)
    steps = {
        "measures": (lambda: measured, measured),
        "passes": (lambda: None, Outcome()),
        "done": (raises(ValueError()), None),
        "fails": (
            raises(ValueError("a sentence\nand more")),
            Outcome("fail", "ValueError: a sentence"),
        ),
        "memory": (
            raises(torch.OutOfMemoryError("too large")),
            Outcome("skipped", "skipped: OutOfMemoryError: too large"),
        ),
        "tool": (raises(Skipped("no tool")), Outcome("skipped", "skipped: no tool")),
    }
    module, messages = types.ModuleType("some_steps"), []
    module.steps = lambda session: [Step(name, step) for name, (step, _) in steps.items()]
    monkeypatch.setitem(sys.modules, "some_steps", module)
    done = frozenset(["done"])
    driver.work(session(tmp_path, done=done, send=messages.append), "some_steps")
    assert messages.pop(0) == Planned(list(steps))
    started, finished = messages[::2], messages[1::2]
    assert started == [Started(name) for name in steps if name != "done"]
    assert [x.outcome for x in finished] == [outcome for _, outcome in steps.values() if outcome]
    assert "Traceback" in (tmp_path / "check.log").read_text()


class Worker:
    """An ended process."""

    def __init__(self, exitcode):
        self.exitcode = exitcode

    def join(self):
        pass


def follow(supervisor, *messages, exitcode=0, ends=True):
    """What the supervisor makes of a worker that sends messages and ends."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    for message in messages:
        sender.send(message)
    if ends:
        sender.close()
    return supervisor.follow(Worker(exitcode), receiver)


def test_the_supervisor_writes_a_row_as_soon_as_a_step_ends(tmp_path, capsys):
    plan = Planned(["first", "second", "third"])
    supervisor = driver.Supervisor(session(tmp_path), 100)
    first = (Started("first"), Finished(Outcome(max_error=0.5, allowed=1.0), 2.0))
    second = (Started("second"), Finished(Outcome("fail", "off"), 1.0))
    assert follow(supervisor, plan, *first, *second) == 0
    assert supervisor.summarize() == 1
    printed = capsys.readouterr().out
    assert "failed: second: off" in printed and "left: third" in printed
    assert "check: 1 pass, 1 fail, 0 skipped, 1 left" in printed
    rows = read_rows(tmp_path / "check.csv")
    columns = ("step", "status", "max_error", "allowed", "seconds", "detail")
    assert tuple(rows[0]) == (*CONDITIONS, *columns)
    errors = [(row["step"], row["max_error"]) for row in rows]
    assert errors == [("first", "5.00e-01"), ("second", "")]

    again = driver.Supervisor(session(tmp_path), 100)
    assert again.done == {"first"}, "what failed is tried again"
    assert follow(again, plan, Started("second"), Finished(Outcome(), 1.0)) == 0
    assert again.summarize() == 0
    assert statuses(again.outcomes.values()) == {"first": "pass", "second": "pass"}


def test_a_step_that_ends_its_process_or_hangs_costs_only_itself(tmp_path, monkeypatch, capsys):
    supervisor = driver.Supervisor(session(tmp_path), 100)
    messages = (Started("tests"), Started("one test"))
    assert follow(supervisor, *messages, exitcode=-6) is None, "another worker goes on"
    monkeypatch.setattr(driver, "_STUCK_AFTER", 0.1)
    assert follow(supervisor, Started("hangs"), ends=False) is None
    details = {name: (row["status"], row["detail"]) for name, row in supervisor.outcomes.items()}
    assert details == {
        "one test": ("fail", "the process ended with -6"),  # not the step that it is a part of
        "hangs": ("fail", "no end in 0 s"),
    }
    assert follow(supervisor, exitcode=1) == 1, "no step is to blame, and none would go better"

    late = driver.Supervisor(session(tmp_path), driver._MARGIN + 0.1)
    assert follow(late, Started("long"), ends=False) == 0
    assert "stopped after 0 s in: long" in capsys.readouterr().out
    assert "long" not in late.outcomes, "it is left for the next call"


BROKEN_STEPS = """
import os, subprocess, sys, time
from benchmarks.cuda.driver import Step

def steps(session):
    def hangs():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (session.out / "child").write_text(str(child.pid))
        time.sleep(300)

    named = {"first": lambda: None, "dies": os.abort, "hangs": hangs, "last": lambda: None}
    return [Step(name, run) for name, run in named.items()]

def finish(session):
    session.say("finished")
"""


@pytest.mark.slow
def test_processes_of_broken_steps_are_replaced_and_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_steps.py").write_text(BROKEN_STEPS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(driver, "_STUCK_AFTER", 2)
    assert driver.Supervisor(session(tmp_path), 500, "broken_steps").run() == 1
    expected = {"first": "pass", "dies": "fail", "hangs": "fail", "last": "pass"}
    assert statuses(read_rows(tmp_path / "check.csv")) == expected
    assert "finished" in capsys.readouterr().out
    if Path("/proc/self/cmdline").exists():
        command = Path(f"/proc/{(tmp_path / 'child').read_text()}/cmdline")
        assert not command.exists() or not command.read_text(), "gone, or a zombie at most"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "--out", "x"), "--dry-run"),
        (("check", "--dry-run", "--device", "cuda", "--out", "x"), "--dry-run"),
        (("tune", "--dry-run", "--write-table", "--out", "x"), "--write-table"),
        (("check", "--dry-run"), "--out"),
        (("--dry-run",), "check, bench, profile, tune"),
        *(
            pytest.param(
                (*command, "--device", "cuda", "--out", "x"),
                "torch sees no CUDA or ROCm device here",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
            )
            for command in (("check",), ("--tune",), ("--preset", "quick"))
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code == 2 and words in capsys.readouterr().err


# -- check

SOME_TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_passes(record_property):
    record_property("max_error", 0.25)
    record_property("allowed", 0.5)

def test_fails():
    assert 1 == 2, "a sentence"

def test_done():
    raise RuntimeError

@pytest.mark.skip(reason="no GPU")
def test_is_skipped():
    pass
"""


def test_every_gpu_test_has_a_row(tmp_path, monkeypatch):
    tests = tmp_path / "tests" / "kernels"
    tests.mkdir(parents=True)
    (tests / "test_gpu.py").write_text(SOME_TESTS)
    (tests / "test_cannot_be_imported.py").write_text("import no_such_module\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    # The real one, which this process may have imported, would stand in its way.
    monkeypatch.delitem(sys.modules, "test_gpu", raising=False)
    name, messages = "tests/kernels/test_gpu.py::test_{}".format, []
    done = frozenset([name("done")])
    outcome = check._run_tests(session(tmp_path, done=done, send=messages.append))
    assert outcome == Outcome("fail", "pytest ended with 1; 2 failed of 4")
    kinds = ("passes", "fails", "done", "is_skipped")
    assert messages[0] == Planned([name(kind) for kind in kinds])
    started = [x.name for x in messages if isinstance(x, Started)]
    outcomes = [x.outcome for x in messages if isinstance(x, Finished)]
    assert dict(zip(started, outcomes, strict=True)) == {
        name("passes"): Outcome(max_error=0.25, allowed=0.5),
        name("fails"): Outcome("fail", "AssertionError: a sentence"),
        name("is_skipped"): Outcome("skipped", "skipped: no GPU"),
    }
    log = (tmp_path / "check.log").read_text()
    assert "no_such_module" in log and "assert 1 == 2" in log


# -- tune


def test_of_two_settings_that_are_as_good_the_shipped_one_stays():
    for fp32, expected in ((0.99, "tf32x3"), (0.9, "ieee"), (1.1, "tf32x3")):
        settings = {"coarse_precision=tf32x3": 1.0, "coarse_precision=ieee": fp32}
        assert tune.best_value(settings, "coarse_precision", "tf32x3") == expected
        assert tune.best_value(settings, "item_blocks", "16") == "16"
    settings = {"item_blocks=8": 1.0, "item_blocks=32": 0.5}
    assert tune.best_value(settings, "item_blocks", "16") == "32"
    topk = {f"topk_at_rows={n}": n for n in (16, 128, 32)}
    assert tune.topk_up_to(topk | {f"radix_at_rows={n}": 50 for n in (16, 32, 128)}, 7) == 32
    assert tune.topk_up_to(topk, 7) == 0 and tune.topk_up_to({}, 7) == 7


def test_the_fastest_configurations_take_the_place_of_the_shipped_ones():
    shipped = json.loads(SHIPPED.read_text())
    where = {"device": "some GPU", "torch": "2", "triton": "3", "date": "today"}
    keys = {"architecture": "sm_90", "kernel": "forward", "head_dim": "64", "operand_bytes": "2"}
    config = {"swapped": "False", "group": "4", "num_warps": "8", "num_stages": "3"}
    rows = [
        where | keys | config | {"query_blocks": "2", "setting": "", "ms_median": "0.5"},
        where | keys | config | {"query_blocks": "1", "setting": "", "ms_median": "0.7"},
        where | keys | config | {"query_blocks": "1", "setting": "", "ms_median": ""},  # no launch
    ]
    content = tune.tuned(shipped, rows)
    table, before = launching.parse_table(content), launching.table()
    changed = [key for key, config in table.configs.items() if config != before.configs[key]]
    assert changed == [("sm_90", "forward", 64, 2)]
    assert table.configs[changed[0]] == launching.LaunchConfig(False, 4, 8, 3, 2)
    (row,) = (row for row in content["configs"] if row.get("source", "").startswith("some GPU"))
    assert row["source"] == "some GPU, torch 2, triton 3, today"
    assert dataclasses.replace(table, configs=before.configs) == before
    assert launching.parse_table(json.loads(tune.as_text(content))) == table
    assert tune.tuned(shipped, []) == shipped


# -- dry runs of the whole programs


def dry_run(command, out):
    """Every planned step has a row and none has failed; a second run measures nothing."""
    script = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--device", "cpu", "--dry-run"]
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [*script, command, "--out", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 fail" in done.stdout and " 0 left" in done.stdout
        printed.append((done.stdout, {path.name: path.read_text() for path in out.glob("*.csv")}))
    assert printed[0][1] == printed[1][1]
    name = command.removeprefix("--")
    rows = read_rows(out / ("check.csv" if name == "check" else f"{name}_steps.csv"))
    assert set(statuses(rows).values()) <= {"pass", "skipped"}
    return printed[0][0], rows


@pytest.mark.slow
def test_check_compares_with_the_reference(tmp_path):
    _, rows = dry_run("check", tmp_path)
    compared = [row for row in rows if row["max_error"]]
    assert len(compared) >= 10
    assert all(float(row["max_error"]) <= float(row["allowed"]) for row in compared)
    assert sum(float(row["max_error"]) > 0 for row in compared) >= 8
    skipped = [row["step"] for row in rows if row["status"] == "skipped"]
    assert any("graph" in name for name in skipped) and any("sanitizer" in x for x in skipped)


@pytest.mark.slow
def test_bench_writes_the_columns_of_the_benchmark(tmp_path):
    dry_run("bench", tmp_path)
    rows = read_rows(tmp_path / "bench.csv")
    assert {row["op"] for row in rows} == {"attention", "variant", "selection", "model"}
    assert all(float(row["ms_median"]) > 0 for row in rows)
    table = [row for row in rows if row["op"] == "attention"]
    assert {row["provider"] for row in table} == {"mra2", "sdpa_flash", "sdpa_cudnn"}
    assert {row["pass"] for row in table} == {"fwd", "fwd+bwd"}
    assert {row["mode"] for row in table if row["provider"] == "mra2"} == {"full", "sparse"}
    dense = [float(row["rel_error"]) for row in table if row["provider"] == "sdpa_flash"]
    assert 0 < max(dense) < 0.02
    ceilings = read_rows(tmp_path / "ceilings.csv")
    names = [" ".join(row["name"].split()[:2]) for row in ceilings]
    assert names == ["gather of", "gather of", "copy", "matmul bf16", "matmul fp32"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000

    # After a run that was cut off in the middle only the missing rows are measured.
    lines = (tmp_path / "bench.csv").read_text().splitlines(keepends=True)
    (tmp_path / "bench.csv").write_text("".join(lines[:-3]))
    steps = (tmp_path / "bench_steps.csv").read_text().splitlines(keepends=True)
    (tmp_path / "bench_steps.csv").write_text(steps[0])
    dry_run("bench", tmp_path)
    after = (tmp_path / "bench.csv").read_text().splitlines(keepends=True)
    assert after[:-3] == lines[:-3] and len(after) == len(lines)


@pytest.mark.slow
def test_profile_puts_every_launch_beside_its_roofline(tmp_path):
    printed, _ = dry_run("profile", tmp_path)
    rows = read_rows(tmp_path / "launches.csv")
    assert list(dict.fromkeys(row["pass"] for row in rows)) == list(PASSES)
    for name in PASSES:
        first_shape = [row for row in rows if row["pass"] == name and row["length"] == "96"]
        *kernels, total, graph = first_shape
        assert (total["kernel"], graph["kernel"]) == ("(all)", "(graph)") and float(graph["us"]) > 0
        microseconds = sum(float(row["us"]) for row in kernels)
        assert float(total["us"]) == pytest.approx(microseconds, abs=0.1)
        launches = sum(int(row["launches"]) for row in kernels)
        assert launches == int(total["launches"])
        assert launches == {"summaries": 1, "select": 7, "forward": 5, "backward": 8}[name]
    gathered = {row["kernel"] for row in rows if float(row["gather_mb"] or 0) > 0}
    assert gathered == {"exact_kernel", "exact_query_kernel", "exact_key_kernel"}
    assert "exact_key_kernel" in printed and "x roofline" in printed
    assert (tmp_path / "launches.png").stat().st_size > 10_000


@pytest.mark.slow
def test_tune_writes_a_table_that_parses(tmp_path):
    shipped = SHIPPED.read_text()
    dry_run("--tune", tmp_path)
    content = json.loads((tmp_path / "launch_configs.json").read_text())
    table, before = launching.parse_table(content), launching.table()
    assert table.configs.keys() == before.configs.keys()
    measured = [row for row in content["configs"] if "triton" in row.get("source", "")]
    assert {row["kernel"] for row in measured} == {"forward", "query_gradient", "key_gradient"}
    same = [key for key in before.configs if key[2:] != (16, 4)]
    assert all(table.configs[key] == before.configs[key] for key in same)
    assert table.item_blocks in (1, 2, before.item_blocks) and table.topk_up_to_rows >= 0
    assert table.coarse_precision.keys() == before.coarse_precision.keys()
    rows = read_rows(tmp_path / "tune.csv")
    settings = [row["setting"].partition("=")[::2] for row in rows if row["setting"]]
    precisions = {value for name, value in settings if name == "coarse_precision"}
    assert precisions == set(launching.COARSE_PRECISIONS)
    tried = {(row["kernel"], row["query_blocks"]) for row in rows if not row["setting"]}
    both = {(kernel, n) for kernel in ("forward", "query_gradient") for n in "12"}
    assert tried == both | {("key_gradient", "1")}
    assert SHIPPED.read_text() == shipped
