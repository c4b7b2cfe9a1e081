"""The tables of the compiled kernels and of whole models on the performance page are their rows."""

import re
from pathlib import Path

import pytest

from benchmarks.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
PASSES = ("fwd", "fwd+bwd")


def table_under(heading: str, number: int = 0) -> dict[int, list[float]]:
    """Tokens -> the numbers of that row, of a table in the section of `heading`."""
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n#")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", tables[number], re.MULTILINE)
    assert rows, heading
    return {
        int(tokens): [float(x) for x in re.findall(r"\d+(?:\.\d+)?", cells.replace(",", ""))]
        for tokens, cells in rows
    }


def times(file: str) -> dict[tuple, float]:
    """(provider, dtype, tokens, pass) -> milliseconds."""
    keys = ("provider", "dtype", "length", "pass")
    return {
        tuple(row[key] for key in keys): float(row["ms_median"])
        for row in read_rows(RESULTS / file)
    }


@pytest.mark.parametrize(("heading", "dtype"), [("Attention only", "fp32"), ("bfloat16", "bf16")])
def test_the_compiled_kernels(heading, dtype):
    rows = times("cpu_implementations.csv")
    lengths = {int(length) for _, of, length, _ in rows if of == dtype}
    table = table_under(heading)
    assert set(table) == lengths
    for tokens, shown in table.items():
        dense = [rows["sdpa", dtype, str(tokens), each] for each in PASSES]
        expected = list(dense)
        for provider in ("mra2_native", "mra2_torch"):
            taken = [rows[provider, dtype, str(tokens), each] for each in PASSES]
            expected += taken
            expected += [slow / fast for slow, fast in zip(dense, taken, strict=True)]
        assert shown[: len(expected)] == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize(
    ("file", "dtype", "number"), [("cpu_models.csv", "fp32", 0), ("cpu_models_bf16.csv", "bf16", 1)]
)
def test_whole_models(file, dtype, number):
    seconds = {key: value / 1000 for key, value in times(file).items()}
    table = table_under("Whole models", number)
    assert set(table) == {int(tokens) for _, _, tokens, _ in seconds}
    for tokens, shown in table.items():
        expected = [
            seconds[provider, dtype, str(tokens), each]
            for each in ("fwd", "step")
            for provider in ("sdpa", "mra2")
            if (provider, dtype, str(tokens), each) in seconds
        ]
        assert shown == pytest.approx(expected, abs=0.051, rel=0.005)


def test_chunks():
    seconds = {key: value / 1000 for key, value in times("cpu_models.csv").items()}
    section = PAGE.split("\n### Against chunks\n")[1]
    shown = [
        [float(x) for x in row]
        for row in re.findall(r"\| (\d+\.\d) \| (\d+\.\d) \|$", section, re.MULTILINE)
    ]
    chunk = [8 * seconds["sdpa", "fp32", "512", each] for each in ("fwd", "step")]
    whole = [
        [seconds[provider, "fp32", "4096", each] for each in ("fwd", "step")]
        for provider in ("mra2", "sdpa")
    ]
    for shown_row, expected in zip(shown, [chunk, *whole], strict=True):
        assert shown_row == pytest.approx(expected, abs=0.051)


def test_the_draft_of_the_kernels():
    rows = times("cpu_draft_sapphire_rapids.csv")
    section = PAGE.split("\n## Intel Sapphire Rapids: a draft of the kernels\n")[1].split("\n#")[0]
    table = re.findall(r"^\| (\d+) \|(.*)\|$", section, re.MULTILINE)
    assert {tokens for tokens, _ in table} == {length for _, _, length, _ in rows}
    for tokens, cells in table:
        shown = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", cells.replace(",", ""))]
        expected = []
        for dtype in ("fp32", "bf16"):
            dense, draft = (
                [rows[provider, dtype, tokens, each] for each in PASSES]
                for provider in ("sdpa", "draft_of_mra2_native")
            )
            ratios = [slow / fast for slow, fast in zip(dense, draft, strict=True)]
            expected += [*dense, *draft, *ratios]
        assert shown == pytest.approx(expected, rel=0.035)
