"""Tables of pages that have a row for every measured row, made again from the committed files."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADVICE = ROOT / "docs" / "experiments" / "advice"
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def budget_table() -> list[str]:
    """Length and budget -> quality beside dense attention, and speed."""
    names = ("english-untrained", "english-4096", "minilm")
    advice = {name: json.loads((ADVICE / name / "advice.json").read_text()) for name in names}
    rows = {
        name: {(row["length"], row["block_per_row"]): row for row in content["rows"]}
        for name, content in advice.items()
    }
    lines = []
    for length, blocks in rows["minilm"]:
        untrained, trained, minilm = (rows[name][length, blocks] for name in names)
        dense = rows["minilm"][length, None]
        quality = [f"{row['over_dense'][0]:+.3f}" for row in (untrained, trained)]
        budget = "dense" if blocks is None else str(blocks)
        if blocks is None:
            quality = [f"0 ({row['loss']:.3f})" for row in (untrained, trained)]
        cells = (
            *(length, budget, *quality, f"{minilm['cosine']:.3f}"),
            *(f"{minilm['seconds']:.2f}", f"{dense['seconds'] / minilm['seconds']:.1f}"),
            f"{minilm['peak_mb']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def deployment_table() -> list[str]:
    """Length -> seconds and peak memory of RoBERTa-base in each runtime."""
    rows = {
        (row["runtime"], row["attention"], row["dtype"], int(row["length"])): row
        for row in read("deployment.csv")
        if row["ms_median"]
    }
    lines = []
    for length in (512, 1024, 2048, 4096):
        cells = [str(length)]
        for runtime, dtype in (
            ("onnxruntime", "float32"),
            ("onnxruntime", "int8"),
            ("torch", "float32"),
        ):
            pair = [rows[runtime, attention, dtype, length] for attention in ("mra2", "dense")]
            seconds = [float(row["ms_median"]) / 1e3 for row in pair]
            shown = [f"{x:.2f}" for x in seconds]
            faster = seconds.index(min(seconds))
            shown[faster] = f"**{shown[faster]}**"
            cells += [" / ".join(shown), " / ".join(f"{float(row['peak_mb']):.0f}" for row in pair)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def accuracy_table() -> list[str]:
    """Runtime and dtype -> accuracy, loss and file of the English model, seconds of a base one."""
    rows = read("deployment.csv")
    seconds = {
        (row["runtime"], row["dtype"], row["length"]): f"{float(row['ms_median']) / 1e3:.2f}"
        for row in rows
        if row["ms_median"] and row["attention"] == "mra2"
    }
    return [
        f"| {row['runtime']}, {row['dtype']} | {float(row['accuracy']):.1%} "
        f"| {float(row['nll']):.3f} | {row['file_mb'] or '-'} | "
        + " | ".join(
            seconds.get((row["runtime"], row["dtype"], length), "-") for length in ("512", "4096")
        )
        + " |"
        for row in rows
        if row["nll"]
    ]


def busy_table() -> list[str]:
    """Condition -> times the speed of dense attention there, and times the time on idle cores."""
    rows = {(row["condition"], row["provider"], row["pass"]): row for row in read("cpu_busy.csv")}
    lines = []
    for condition in dict.fromkeys(condition for condition, *_ in rows):
        cells = [condition]
        for provider in ("mra2_native", "mra2_torch"):
            pair = [rows[condition, provider, name] for name in ("fwd", "fwd+bwd")]
            for column in ("times_sdpa", "times_idle"):
                cells.append(" / ".join(f"{float(row[column]):.1f}" for row in pair))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def wikihop_table() -> list[str]:
    """Length -> training steps a minute with dense attention and by each implementation."""
    rows = {(row["length"], row["provider"]): row for row in read("cpu_wikihop.csv")}
    providers = ("sdpa", "mra2_torch", "mra2_native")
    return [
        f"| {length} | "
        + " | ".join(f"{6e4 / float(rows[length, name]['ms_median']):.1f}" for name in providers)
        + " |"
        for length in dict.fromkeys(length for length, _ in rows)
    ]


TABLES = {
    "docs/guide/budget.md": budget_table,
    "docs/guide/deploying.md": lambda: deployment_table() + accuracy_table(),
    "docs/performance.md": lambda: busy_table() + wikihop_table(),
}


@pytest.mark.parametrize("page", TABLES)
def test_a_page_has_every_measured_row(page):
    text = (ROOT / page).read_text()
    lines = TABLES[page]()
    assert len(lines) >= 3
    for line in lines:
        assert re.search(rf"^{re.escape(line)}$", text, re.M), line
