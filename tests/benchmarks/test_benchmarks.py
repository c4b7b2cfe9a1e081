"""The benchmark writes the agreed columns, can be completed, and is drawn."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import ROOT, cases, memory, plot, run
from benchmarks.records import COLUMNS
from mra_attention.benchmarking import added_peak_bytes, peak_bytes

OPS = tuple(cases.SECTIONS)


def script(name, *arguments):
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def rows_of(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == COLUMNS
        return list(reader)


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def refusal(main, *arguments, capsys):
    """The message with which a program refuses its arguments."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_the_columns_stay_the_same():
    assert ",".join(COLUMNS) == (
        "date,commit,device,torch,triton,transformers,"
        "op,provider,dtype,batch,heads,length,head_dim,block_per_row,mode,pass,"
        "ms_median,ms_p20,ms_p80,peak_mb,rel_error"
    )


def test_attention_is_timed_beside_dense_attention():
    rows = cases.attention(cases.Case(512, "fp32", (4, 8), "cpu", 1))
    assert {(row["provider"], row["block_per_row"]) for row in rows} == {
        *(("sdpa", None), ("mra2", 4), ("mra2", 8), ("mra2_padded", 8))
    }
    assert [row["pass"] for row in rows] == ["fwd"] * 4 + ["fwd+bwd"] * 4
    assert all(row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] for row in rows)
    errors = {(row["provider"], row["block_per_row"]): float(row["rel_error"]) for row in rows}
    assert errors["sdpa", None] == 0 < errors["mra2", 8] < errors["mra2", 4] < 1
    assert 0 < errors["mra2_padded", 8] < 1, "compared without the padding"


@pytest.fixture
def sections(monkeypatch):
    """Sections that time nothing; the cases they were called with."""
    called = []

    def section(op):
        def measure(case):
            called.append((op, case))
            row = {"op": op, "dtype": case.dtype, "length": case.length, "pass": "fwd"}
            row |= {"ms_median": 1.0, "ratio": 1.0, "peak_mb": None}
            budgets = (None, *case.budgets)
            return [row | {"provider": "mra2", "block_per_row": budget} for budget in budgets]

        return measure

    monkeypatch.setattr(cases, "SECTIONS", {op: section(op) for op in OPS})
    return called


def test_a_preset_can_be_resumed(tmp_path, sections, capsys):
    out = tmp_path / "out" / "smoke.csv"
    arguments = ["--preset", "smoke", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    assert run.main(arguments) == 0
    assert [op for op, _ in sections] == list(OPS)
    assert {case for _, case in sections} == {cases.Case(64, "fp32", (1,), "cpu", 1)}
    rows = rows_of(out)
    assert len(rows) == 2 * len(OPS) and all(row["device"] and row["torch"] for row in rows)

    lines = out.read_text().splitlines()
    missing = [line for line in lines if ",attention," not in line]
    out.write_text("\n".join(missing) + "\n")
    sections.clear()
    assert run.main([*arguments, "--resume"]) == 0
    assert [op for op, _ in sections] == ["attention"]
    assert len(rows_of(out)) == 2 * len(OPS)
    assert out.read_text().startswith("\n".join(missing)), "existing rows are kept"

    out.write_text(out.read_text().replace(",1,,fwd", ",2,,fwd"))
    assert "with other budgets" in refusal(run.main, *arguments, "--resume", capsys=capsys)


@pytest.mark.slow
def test_the_smoke_preset_writes_every_kind_of_row(tmp_path):
    out = tmp_path / "smoke.csv"
    done = script("run.py", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert {row["op"] for row in rows} == set(OPS)
    for op in OPS:
        providers = {row["provider"] for row in rows if row["op"] == op}
        by_name = op in ("implementations", "candidate_choice")
        ours = "mra2_torch" if by_name else "mra2"
        assert {"sdpa", ours} <= providers, "dense attention is always beside"
    assert all(float(row["ms_median"]) > 0 for row in rows)
    assert {"longformer_64", "mra_1024_32_1", "linear"} <= {row["provider"] for row in rows}
    mixed = {row["provider"]: row["mode"] for row in rows if row["op"] == "mixed_lengths"}
    assert set(mixed) == {"sdpa", "mra2", "mra2_unsorted", "mra2_longest"}
    assert all(mode.endswith(" tokens") for mode in mixed.values())
    done = script("plot.py", out, tmp_path / "attention.png")
    assert done.returncode == 0, done.stderr


def drawn_height(path):
    return int.from_bytes(path.read_bytes()[20:24], "big")  # of the PNG's header


def test_every_kind_of_row_is_drawn(tmp_path):
    providers = {
        "attention": ("sdpa", "mra2", "mra2_padded"),
        "self_attention": ("sdpa", "mra2", "longformer_64", "bigbird"),
        "model": ("sdpa", "mra2"),
        "scales": ("sdpa", "mra2", "mra_1024_32_1"),
        "adamra": ("sdpa", "mra2", "adamra", "linear"),
    }
    shape = {"dtype": "fp32", "batch": 1, "block_per_row": 4, "pass": "fwd", "ms_median": 2.0}
    write_rows(
        tmp_path / "rows.csv",
        [
            {"op": op, "provider": provider, "length": length} | shape
            for op, names in providers.items()
            for provider in names
            for length in (512, 1024)
        ],
    )
    for op in providers:
        png = tmp_path / f"{op}.png"
        assert plot.main([str(tmp_path / "rows.csv"), str(png), "--op", op]) == 0
        assert png.stat().st_size > 10_000


def test_batches_and_graphs_are_drawn_apart(tmp_path, capsys):
    """A row of panels for every batch that was measured at several lengths."""
    rows = []
    for batch, lengths in ((1, (512, 4096)), (8, (512, 4096)), (64, (512,))):
        for length in lengths:
            for provider, budget in (("sdpa_cudnn", ""), ("sdpa_flash", ""), ("mra2", 8)):
                for name in ("fwd", "fwd+bwd", "fwd graph"):
                    about = {"op": "attention", "provider": provider, "dtype": "bf16"}
                    shape = {"batch": batch, "length": length, "block_per_row": budget}
                    rows.append(about | shape | {"pass": name, "ms_median": length * batch})
    table = tmp_path / "gpu.csv"
    write_rows(table, rows)
    heights = {}
    for name, options in (("all", ()), ("one", ("--batch", "8")), ("graph", ("--graph",))):
        png = tmp_path / f"{name}.png"
        assert plot.main([str(table), str(png), *options]) == 0
        heights[name] = drawn_height(png)
    assert heights["all"] == heights["graph"] > 1.5 * heights["one"]
    png = tmp_path / "x.png"
    assert "no rows" in refusal(plot.main, table, png, "--batch", "3", capsys=capsys)
    write_rows(table, [])
    assert "no rows" in refusal(plot.main, table, png, capsys=capsys)


def test_added_peak_memory_is_what_a_call_allocates():
    size = 64 * 2**20

    def allocate():
        return torch.ones(size // 4)

    added = added_peak_bytes(allocate)
    if added is None:
        pytest.skip("not Linux")
    assert 0.9 * size < added < 1.5 * size
    assert added_peak_bytes(lambda: None) < 0.1 * size, "what was freed before does not count"
    assert peak_bytes(torch.device("cpu")) > size


@pytest.mark.slow
def test_peak_memory_of_attention_is_measured_in_a_process_of_its_own():
    peak = memory.peak_megabytes("cpu", 2048, "fp32", (2,), ("mra2", 2))
    if peak is None:
        pytest.skip("not Linux")
    # Output and three gradients of 6.3 MB each are there at the end, and not a matrix of N x N.
    assert 20 < peak < 12 * 2048**2 * 4 / 1e6
