"""The short tables that the commands for a card end with, read from their CSV files."""

import csv
from pathlib import Path

_DENSE = ("sdpa_flash", "sdpa_cudnn")
_PASSES = ("fwd", "fwd graph", "fwd+bwd", "fwd+bwd graph")


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_bench(out: Path) -> None:
    """Ceilings, MRA-2 against the faster dense attention, and the other rows."""
    _print_rows(rows_of(out / "ceilings.csv"), ("name", "megabytes", "ms_median", "rate", "unit"))
    rows = rows_of(out / "bench.csv")
    _print_speedups([row for row in rows if row["op"] == "attention"])
    others = [row for row in rows if row["op"] != "attention"]
    shown = ("op", "provider", "batch", "length", "block_per_row", "pass", "ms_median", "peak_mb")
    _print_rows(others, shown)


def _print_speedups(rows: list[dict[str, str]]) -> None:
    """A line per shape and provider: milliseconds, and how many times faster than the faster of the
    dense kernels in the same pass.
    """
    dense: dict[tuple, float] = {}
    ours: dict[tuple, dict[str, dict[str, str]]] = {}
    for row in rows:
        shape = (row["length"], row["batch"])
        if row["provider"] in _DENSE:
            key = (*shape, row["pass"])
            dense[key] = min(float(row["ms_median"]), dense.get(key, float("inf")))
        else:
            key = (*shape, row["provider"], row["block_per_row"], row["mode"])
            ours.setdefault(key, {})[row["pass"]] = row
    table = [("length", "batch", "provider", "block_per_row", "mode", *_PASSES, "MB", "error")]
    for key, passes in ours.items():
        cells = []
        for name in _PASSES:
            if name not in passes:
                cells.append("")
                continue
            ms, beside = float(passes[name]["ms_median"]), dense.get((*key[:2], name))
            cells.append(f"{ms:.3f}" + (f" {beside / ms:.2f}x" if beside else ""))
        last = passes.get("fwd+bwd") or next(iter(passes.values()))
        table.append((*key, *cells, last["peak_mb"], last["rel_error"]))
    _print_table(table)


def _print_rows(rows: list[dict[str, str]], columns: tuple[str, ...], most: int = 60) -> None:
    """Print some columns of the first rows."""
    _print_table([columns, *(tuple(row[name] for name in columns) for row in rows[:most])])
    if len(rows) > most:
        print(f"... and {len(rows) - most} rows more")


def _print_table(table: list[tuple[str, ...]]) -> None:
    if len(table) < 2:
        return
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip())
