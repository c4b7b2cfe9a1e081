"""The tables of the page on budgets are their rows."""

import re
from pathlib import Path

import pytest

from benchmarks.records import read_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guide" / "budget.md").read_text(encoding="utf-8")
ROWS = read_rows(ROOT / "benchmarks" / "results" / "key_blocks.csv")
SQUARES = {"key_block_size": "32", "selection": "row_normalized"}


def row_of(**values) -> dict[str, str]:
    (found,) = [row for row in ROWS if all(row[key] == str(value) for key, value in values.items())]
    return found


def numbers(heading: str) -> dict[str, list[float]]:
    """First cell -> the numbers of its row, of the table whose first line begins so."""
    table = PAGE.split(f"\n| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    cells = {line.split("|")[1].strip(): "|".join(line.split("|")[2:]) for line in table}
    return {
        name: [float(x) for x in re.findall(r"\d+\.?\d*", text)] for name, text in cells.items()
    }


def test_errors_and_losses():
    shown = numbers("blocks per row | MiniLM, error at 512 / 4096")
    for blocks in (4, 8, 16):
        expected = []
        for model in ("minilm", "english"):
            for length in (512, 4096):
                if length <= 32 * blocks:
                    expected.append(0.0)
                    continue
                of_row = {"length": length, "block_per_row": blocks, "diagonal": 0}
                row = row_of(part="heads", model=model, **of_row, **SQUARES)
                expected.append(float(row["error"]))
        assert shown[str(blocks)][:4] == pytest.approx(expected, abs=6e-4)


def test_losses():
    shown = numbers("blocks per row | MiniLM, error at 512 / 4096")
    page = (ROOT / "docs" / "experiments" / "key_blocks" / "README.md").read_text(encoding="utf-8")
    for index, model in ((4, "untrained"), (5, r"trained with 32 x 32")):
        for blocks in ("4", "8", "16"):
            (first,) = re.findall(rf"\| {model} \(exact: [\d.]+\) \| {blocks} \| ([\d.]+)", page)
            assert shown[blocks][index] == float(first)
        (exact,) = set(re.findall(rf"\| {model} \(exact: ([\d.]+)\)", page))
        assert shown["exact"][index] == float(exact)


def test_times():
    shown = numbers("blocks per row | 512 tokens | 4096 tokens")
    for blocks in ("4", "8", "16"):
        expected = []
        for length in (512, 4096):
            of_row = {"length": length, "block_per_row": blocks, "diagonal": 1}
            row = row_of(part="time", **of_row, **SQUARES)
            expected += [float(row["ms_median"]), float(row["ms_median_bwd"])]
        assert shown[blocks] == pytest.approx(expected, abs=0.55)
