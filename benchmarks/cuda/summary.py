"""The short tables that the commands for a GPU end with, read from their CSV files."""

import csv
from pathlib import Path

from benchmarks.records import read_rows

#: In the column of kernels: the sum of a pass, and the pass as a CUDA graph.
ALL, GRAPH = "(all)", "(graph)"
#: Counters that are shown: the words that their column's name must have, and their title.
SHOWN_COUNTERS = (
    (("gpu__time_duration.sum",), "time"),
    (("dram", "throughput", "pct_of_peak"), "memory, %"),
    (("lts__throughput", "pct_of_peak"), "L2, %"),
    (("sm__throughput", "pct_of_peak"), "SM, %"),
    (("pipe_tensor", "cycles_active", "pct_of_peak"), "tensor cores, %"),
    (("lts__t_sector_hit_rate.pct",), "L2 hits, %"),
    (("sm__warps_active", "pct_of_peak"), "warps active, %"),
    (("launch__registers_per_thread",), "registers"),
)
_DENSE = ("sdpa_flash", "sdpa_cudnn")
_PASSES = ("fwd", "fwd graph", "fwd+bwd", "fwd+bwd graph")


def print_bench(out: Path) -> None:
    """Ceilings, MRA-2 against the faster dense attention, and the other rows."""
    _print_rows(read_rows(out / "ceilings.csv"), ("name", "megabytes", "ms_median", "rate", "unit"))
    rows = read_rows(out / "bench.csv")
    _print_speedups([row for row in rows if row["op"] == "attention"])
    others = [row for row in rows if row["op"] != "attention"]
    shown = ("op", "provider", "batch", "length", "block_per_row", "pass", "ms_median", "peak_mb")
    _print_rows(others, shown)


def print_profile(out: Path) -> None:
    """Launches beside their rooflines, a table per shape, and the counters."""
    by_shape: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_rows(out / "launches.csv"):
        by_shape.setdefault((row["length"], row["batch"]), []).append(row)
    shown = ("pass", "kernel", "launches", "us", "floor_us", "bound")
    for (length, batch), rows in by_shape.items():
        total = sum(float(row["us"]) for row in rows if row["kernel"] == ALL)
        print(f"{length} x {batch}: microseconds of launches, and their share of {total:.0f}")
        table = [(*shown, "x roofline", "share")]
        for row in rows:
            us, least = float(row["us"]), float(row["floor_us"] or 0)
            over = f"{us / least:.1f}" if least else ""
            share = "" if row["kernel"] == GRAPH else f"{100 * us / total:.0f} %"
            table.append((*(row[name] for name in shown), over, share))
        _print_table(table)
    if (out / "counters.csv").exists():
        _print_table(shown_counters(out / "counters.csv"))


def shown_counters(path: Path) -> list[tuple[str, ...]]:
    """A line per launch with the counters of `SHOWN_COUNTERS`: the largest number in the matching
    columns, empty where there is none.
    """
    with path.open(newline="") as file:
        names, units, *launches = csv.reader(file)
    columns = [
        [i for i, name in enumerate(names) if all(word in name for word in words)]
        for words, _ in SHOWN_COUNTERS
    ]
    kernel = names.index("Kernel Name")
    lines = [("kernel", *(title for _, title in SHOWN_COUNTERS))]
    for launch in launches:
        cells = []
        for matching, (_, title) in zip(columns, SHOWN_COUNTERS, strict=True):
            numbers = [x for x in (_number(launch[i]) for i in matching) if x is not None]
            unit = f" {units[matching[0]]}" if matching and title == "time" else ""
            cells.append(f"{max(numbers):.4g}{unit}" if numbers else "")
        lines.append((launch[kernel], *cells))
    return lines


def _number(cell: str) -> float | None:
    """None for an empty cell and for one without a count."""
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return None


def _print_speedups(rows: list[dict[str, str]]) -> None:
    """A line per shape and provider: milliseconds, and the speedup over the faster of the dense
    kernels in the same pass.
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
            ms, dense_ms = float(passes[name]["ms_median"]), dense.get((*key[:2], name))
            cells.append(f"{ms:.3f}" + (f" {dense_ms / ms:.2f}x" if dense_ms else ""))
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
