"""The benchmark of runtimes: rows of a small model, and a run that goes on where it stopped."""

import pytest

from benchmarks import deployment
from benchmarks.records import read_rows


@pytest.mark.slow
def test_a_smoke_run_writes_rows_once(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "rows.csv"
    arguments = ["--smoke", "--work", str(tmp_path / "work"), "--out", str(out)]
    arguments += ["--only", "mra2-float32"]
    assert deployment.main(arguments) == 0
    rows = read_rows(out)
    assert [(row["runtime"], row["length"]) for row in rows] == [
        *(("onnxruntime", "64"), ("onnxruntime", "512")),
        *(("torch", "64"), ("torch", "512")),
    ]
    assert all(float(row["ms_median"]) > 0 and float(row["peak_mb"]) >= 0 for row in rows)
    assert float(rows[0]["file_mb"]) > 0 and rows[0]["device"] and rows[0]["onnxruntime"]
    capsys.readouterr()
    assert deployment.main(arguments) == 0
    assert capsys.readouterr().out == "" and read_rows(out) == rows
