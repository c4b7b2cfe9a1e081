"""The benchmark runs, writes the agreed columns, can be completed, and is drawn."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
COLUMNS = [
    "date",
    "commit",
    "device",
    "torch",
    "triton",
    "transformers",
    "op",
    "provider",
    "dtype",
    "batch",
    "heads",
    "length",
    "head_dim",
    "block_per_row",
    "mode",
    "pass",
    "ms_median",
    "ms_p20",
    "ms_p80",
    "peak_mb",
    "rel_error",
]


def script(name, *arguments):
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def rows_of(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_the_smoke_preset_writes_every_kind_of_row_and_can_be_resumed(tmp_path):
    out = tmp_path / "out" / "smoke.csv"
    done = script("run.py", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    ops = ("attention", "self_attention", "model", "mixed_lengths", "scales", "adamra")
    assert {row["op"] for row in rows} == set(ops)
    for op in ops:
        providers = {row["provider"] for row in rows if row["op"] == op}
        assert {"sdpa", "mra2"} <= providers, "dense attention is always beside"
    assert all(float(row["ms_median"]) > 0 and row["device"] and row["torch"] for row in rows)
    assert "longformer_64" in {row["provider"] for row in rows}
    assert "mra_1024_32_1" in {row["provider"] for row in rows}
    mixed = {row["provider"]: row["mode"] for row in rows if row["op"] == "mixed_lengths"}
    assert set(mixed) == {"sdpa", "mra2", "mra2_unsorted", "mra2_longest"}
    assert all(mode.endswith(" tokens") for mode in mixed.values())
    errors = [float(row["rel_error"]) for row in rows if row["op"] == "attention"]
    assert errors[0] == 0 and 0 < max(errors) < 1

    kept = out.read_text().splitlines()
    missing = [line for line in kept if ",attention," not in line]
    out.write_text("\n".join(missing) + "\n")
    done = script("run.py", "--preset", "smoke", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(out)) == len(rows)
    assert out.read_text().startswith("\n".join(missing)), "what was there is kept"

    for op in ("attention", "self_attention", "model"):
        png = tmp_path / f"{op}.png"
        done = script("plot.py", out, png, "--op", op)
        assert done.returncode == 0, done.stderr
        assert png.stat().st_size > 10_000


def test_batches_and_graphs_are_drawn_apart(tmp_path):
    """A row of panels for every batch that was measured at several lengths."""
    rows = []
    for batch, lengths in ((1, (512, 4096)), (8, (512, 4096)), (64, (512,))):
        for length in lengths:
            for provider, budget in (("sdpa_cudnn", ""), ("sdpa_flash", ""), ("mra2", 8)):
                for name in ("fwd", "fwd+bwd", "fwd graph"):
                    about = {"op": "attention", "provider": provider, "dtype": "bf16"}
                    shape = {"batch": batch, "length": length, "block_per_row": budget}
                    rows.append(about | shape | {"pass": name, "ms_median": length * batch})
    with (tmp_path / "card.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    heights = {}
    for name, options in (("all", ()), ("one", ("--batch", "8")), ("graph", ("--graph",))):
        png = tmp_path / f"{name}.png"
        done = script("plot.py", tmp_path / "card.csv", png, *options)
        assert done.returncode == 0, done.stderr
        heights[name] = int.from_bytes(png.read_bytes()[20:24], "big")  # of the PNG's header
    assert heights["all"] == heights["graph"] > 1.5 * heights["one"]
    done = script("plot.py", tmp_path / "card.csv", tmp_path / "x.png", "--batch", "3")
    assert done.returncode == 2 and "no rows" in done.stderr


def test_a_plot_of_nothing_is_refused(tmp_path):
    (tmp_path / "empty.csv").write_text(",".join(COLUMNS) + "\n")
    done = script("plot.py", tmp_path / "empty.csv", tmp_path / "x.png")
    assert done.returncode == 2 and "no rows" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_counts_what_is_allocated(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.memory import peak_megabytes\n"
        "if __name__ == '__main__':\n"
        "    print(peak_megabytes('cpu', 2048, 'fp32', (2,), ('mra2', 2)))\n"
    )
    (tmp_path / "program.py").write_text(program)
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(ROOT)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Output and three gradients of 6.3 MB each are there at the end, and not a matrix of N x N.
    assert 20 < float(done.stdout) < 12 * 2048**2 * 4 / 1e6
