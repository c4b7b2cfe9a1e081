"""The commands for a card, tried out on a CPU: their rows, that they go on where they stopped, and
what they say where there is no card.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mra_attention.triton_impl import launching

PASSES = ("summaries", "select", "forward", "backward")
ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "run.py"
STEPS = {
    "check": "check.csv",
    "bench": "bench_steps.csv",
    "profile": "profile_steps.csv",
    "tune": "tune_steps.csv",
}


def run(*arguments, path=None, script=RUN):
    """Run the driver; it finds the packages of the checkout by itself."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def dry_run(command, out, **settings):
    done = run("--device", "cpu", "--dry-run", command, "--out", out, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_steps(out, command):
    """Every planned step has a row, and none has failed."""
    rows = rows_of(out / STEPS[command])
    planned = (out / f"{command}.plan").read_text().splitlines()
    assert [row["step"] for row in rows] == planned
    assert {row["status"] for row in rows} <= {"pass", "skipped"}
    assert all(row["detail"] == "skipped: dry run" for row in rows if row["status"] == "skipped")
    return {row["step"]: row for row in rows}


def assert_second_run_measures_nothing(command, out):
    before = {path.name: path.read_text() for path in out.glob("*.csv")}
    assert " 0 left" in dry_run(command, out)
    assert {path.name: path.read_text() for path in out.glob("*.csv")} == before


def test_check_compares_with_the_reference_and_can_be_resumed(tmp_path):
    dry_run("check", tmp_path, path=tmp_path)  # where there is no git
    rows = assert_steps(tmp_path, "check")
    assert all(row["commit"] == "" and row["torch"] for row in rows.values())
    compared = [row for name, row in rows.items() if name.startswith("agrees")]
    assert len(compared) >= 6 and all(row["status"] == "pass" for row in compared)
    errors = [float(row["max_error"]) for row in compared]  # 0 for a single token in float32
    assert all(e <= float(row["allowed"]) for e, row in zip(errors, compared, strict=True))
    assert sum(error > 0 for error in errors) >= 6
    skipped = {name for name, row in rows.items() if row["status"] == "skipped"}
    assert any("graph" in name for name in skipped) and any("sanitizer" in x for x in skipped)

    kept = (tmp_path / "check.csv").read_text()
    (tmp_path / "check.csv").write_text(kept.replace(",pass,", ",fail,", 1))
    failed = next(iter(rows))
    out = dry_run_again = run("--device", "cpu", "--dry-run", "check", "--out", tmp_path)
    assert dry_run_again.returncode == 0, "what failed before is tried again"
    again = rows_of(tmp_path / "check.csv")[len(rows) :]
    assert [row["step"] for row in again] == [failed] and " 0 fail" in out.stdout
    assert_second_run_measures_nothing("check", tmp_path)


def test_bench_writes_the_columns_of_the_benchmark_and_can_be_resumed(tmp_path):
    dry_run("bench", tmp_path)
    assert_steps(tmp_path, "bench")
    rows = rows_of(tmp_path / "bench.csv")
    header = (tmp_path / "bench.csv").read_text().splitlines()[0].split(",")
    assert header[:2] == ["date", "commit"] and header[-1] == "rel_error" and len(header) == 21
    assert {row["op"] for row in rows} == {"attention", "variant", "selection", "model"}
    assert all(float(row["ms_median"]) > 0 for row in rows)
    table = [row for row in rows if row["op"] == "attention"]
    assert {row["provider"] for row in table} == {"mra2", "sdpa_flash", "sdpa_cudnn"}
    assert {row["pass"] for row in table} == {"fwd", "fwd+bwd"}
    assert {row["mode"] for row in table if row["provider"] == "mra2"} == {"full", "sparse"}
    dense = [float(row["rel_error"]) for row in table if row["provider"] == "sdpa_flash"]
    assert 0 < max(dense) < 0.02
    ceilings = rows_of(tmp_path / "ceilings.csv")
    names = [" ".join(row["name"].split()[:2]) for row in ceilings]
    assert names == ["gather of", "copy", "matmul bf16", "matmul fp32"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000

    # A run that was cut off in the middle: its rows are kept, and only the others are measured.
    lines = (tmp_path / "bench.csv").read_text().splitlines(keepends=True)
    (tmp_path / "bench.csv").write_text("".join(lines[:-3]))
    steps = (tmp_path / "bench_steps.csv").read_text().splitlines(keepends=True)
    (tmp_path / "bench_steps.csv").write_text(steps[0])
    dry_run("bench", tmp_path)
    after = (tmp_path / "bench.csv").read_text().splitlines(keepends=True)
    assert after[:-3] == lines[:-3] and len(after) == len(lines)
    assert_second_run_measures_nothing("bench", tmp_path)


def test_profile_puts_every_launch_beside_its_floor_and_can_be_resumed(tmp_path):
    printed = dry_run("profile", tmp_path)
    assert_steps(tmp_path, "profile")
    rows = rows_of(tmp_path / "launches.csv")
    assert list(dict.fromkeys(row["pass"] for row in rows)) == list(PASSES)
    for name in PASSES:
        of_pass = [row for row in rows if row["pass"] == name and row["length"] == "96"]
        *kernels, total, graph = of_pass
        assert (total["kernel"], graph["kernel"]) == ("(all)", "(graph)") and float(graph["us"]) > 0
        assert float(total["us"]) == pytest.approx(
            sum(float(row["us"]) for row in kernels), abs=0.1
        )
        launches = sum(int(row["launches"]) for row in kernels)
        assert launches == int(total["launches"])
        assert launches == {"summaries": 1, "select": 7, "forward": 5, "backward": 8}[name]
    gathered = {row["kernel"] for row in rows if row["bound"] == "L2"}
    assert gathered == {"exact_kernel", "exact_query_kernel", "exact_key_kernel"}
    assert "exact_key_kernel" in printed and "x floor" in printed
    assert (tmp_path / "launches.png").stat().st_size > 10_000
    assert_second_run_measures_nothing("profile", tmp_path)


def test_of_two_settings_that_are_as_good_the_shipped_one_stays():
    from benchmarks.cuda import tune

    shipped = {"sm_80": "tf32x3", "sm_90": "tf32x3"}
    for ieee, wanted in ((0.99, "tf32x3"), (0.9, "ieee"), (1.1, "tf32x3")):
        settings = {"coarse_precision=tf32x3": 1.0, "coarse_precision=ieee": ieee}
        assert tune._best_precision(settings, shipped, "sm_90") == {"sm_90": wanted}
    assert tune._best_precision({"item_blocks=8": 1.0}, shipped, "sm_90") == {}


def test_tune_writes_a_table_that_parses_and_can_be_resumed(tmp_path):
    shipped = Path(launching.__file__).with_name("launch_configs.json").read_text()
    dry_run("--tune", tmp_path)
    assert_steps(tmp_path, "tune")
    content = json.loads((tmp_path / "launch_configs.json").read_text())
    table, before = launching.parse_table(content), launching.table()
    assert table.configs.keys() == before.configs.keys()
    measured = [row for row in content["configs"] if "triton" in row.get("source", "")]
    assert {row["kernel"] for row in measured} == {"forward", "query_gradient", "key_gradient"}
    same = [key for key in before.configs if key[2:] != (16, 4)]
    assert all(table.configs[key] == before.configs[key] for key in same)
    assert table.item_blocks in (1, 2, before.item_blocks) and table.topk_up_to_rows >= 0
    timed = {
        row["setting"].partition("=")[2]: float(row["ms_median"])
        for row in rows_of(tmp_path / "tune.csv")
        if row["setting"].startswith("coarse_precision=")
    }
    assert table.coarse_precision.keys() == before.coarse_precision.keys()
    assert timed.keys() == set(launching.COARSE_PRECISIONS)
    assert Path(launching.__file__).with_name("launch_configs.json").read_text() == shipped

    rows = rows_of(tmp_path / "tune.csv")
    tried = {(row["kernel"], row["query_blocks"]) for row in rows if not row["setting"]}
    both = {(kernel, n) for kernel in ("forward", "query_gradient") for n in "12"}
    assert tried == both | {("key_gradient", "1")}
    for row in rows:  # as if two query blocks were the fastest of all in one of the passes
        row["ms_median"] = 1e-6 if (row["kernel"], row["query_blocks"]) == ("forward", "2") else 1
    with (tmp_path / "tune.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert_second_run_measures_nothing("tune", tmp_path)
    content = json.loads((tmp_path / "launch_configs.json").read_text())
    chosen = {
        key: config.query_blocks for key, config in launching.parse_table(content).configs.items()
    }
    assert [key for key, n in chosen.items() if n == 2] == [("sm_80", "forward", 16, 4)]


def test_no_step_is_started_after_the_time_limit(tmp_path):
    done = run("--device", "cpu", "--dry-run", "check", "--out", tmp_path, "--time-limit", 0.5)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "check.csv") == [] and "0 pass, 0 fail" in done.stdout


CRASHING = """
import os
from benchmarks.cuda.driver import Outcome, Step

def fine(session):
    return Outcome(max_error=0.5, allowed=1.0)

def broken(session):
    raise ValueError("a sentence")

def steps(session):
    named = {"first": fine, "dies": lambda s: os.abort(), "raises": broken, "last": fine}
    return [Step(name, run) for name, run in named.items()]
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_a_step_that_kills_its_process_costs_no_other_step(workers, tmp_path):
    copy = tmp_path / "benchmarks"
    shutil.copytree(RUN.parent, copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (copy / "cuda" / "check.py").write_text(CRASHING)
    out = tmp_path / "out"
    arguments = ("check", "--device", "cpu", "--dry-run", "--out", out, "--workers", workers)
    done = run(*arguments, script=copy / "run.py")
    assert done.returncode == 1, done.stdout + done.stderr
    statuses = {row["step"]: row["status"] for row in rows_of(out / "check.csv")}
    assert statuses == {"first": "pass", "dies": "fail", "raises": "fail", "last": "pass"}
    assert "failed: raises: ValueError: a sentence" in done.stdout
    assert "Traceback" in (out / "check.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("command", STEPS)
def test_without_a_card_the_driver_says_so(command, tmp_path):
    done = run("--device", "cuda", command, "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 2
    assert "torch sees no CUDA or ROCm device here" in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("check",), "--dry-run"),
        (("check", "--dry-run", "--device", "cuda"), "--dry-run"),
        (("tune", "--dry-run", "--write-table"), "--write-table"),
    ],
)
def test_wrong_combinations_are_refused(arguments, words, tmp_path):
    done = run(*arguments, "--out", tmp_path)
    assert done.returncode == 2 and words in done.stderr
    done = run("check", "--dry-run")
    assert done.returncode == 2 and "--out" in done.stderr


STARTS_A_PROGRAM = """
import subprocess
import sys
import time
from pathlib import Path
from benchmarks.cuda.driver import Step

def starts_a_program(session):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(300)

def steps(session):
    return [Step("pytest that takes long", starts_a_program)]
"""


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(),
    reason="whether a process is gone is read from /proc, which Linux alone has",
)
def test_a_step_out_of_time_ends_with_all_it_has_started(tmp_path):
    copy = tmp_path / "benchmarks"
    shutil.copytree(RUN.parent, copy, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (copy / "cuda" / "check.py").write_text(STARTS_A_PROGRAM)
    arguments = ("check", "--device", "cpu", "--dry-run", "--out", tmp_path / "out")
    done = run(*arguments, "--workers", 1, "--time-limit", 40, script=copy / "run.py")
    assert "stopped at 40 s in: pytest that takes long" in done.stdout
    assert rows_of(tmp_path / "out" / "check.csv") == [], "it is left for the next call"
    command = Path(f"/proc/{(copy / 'cuda' / 'child').read_text()}/cmdline")
    assert not command.exists() or not command.read_text(), "gone, or a zombie at most"
