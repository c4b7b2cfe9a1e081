"""Draw milliseconds against length from a CSV of `run.py`.

python benchmarks/plot.py benchmarks/results/cpu.csv cpu.png
python benchmarks/plot.py benchmarks/results/cpu.csv cpu_modules.png --op self_attention
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.records import read_rows
from mra_hf.encoders.methods import METHODS
from mra_hf.results.drawing import new_figure, save_figure

TITLES = {"fwd": "forward", "fwd+bwd": "forward + backward", "step": "training step"}
_DENSE, _LONGFORMER = METHODS["dense"], METHODS["longformer"]
#: Provider -> its name in legends, where {} is the budget, and its colour. A method that is timed
#: under its own name looks as in `METHODS`; here stand the providers that need more words.
LOOKS = {name: (method.label, method.colour) for name, method in METHODS.items()} | {
    "sdpa": (f"{_DENSE.label} (SDPA)", _DENSE.colour),
    "sdpa_flash": (f"{_DENSE.label} (SDPA, flash)", _DENSE.colour),
    "sdpa_cudnn": (f"{_DENSE.label} (SDPA, cuDNN)", "#999999"),
    "flex_exact_part": ("FlexAttention on the same blocks; {} per row", "#66a3d2"),
    "mra2": (f"{METHODS['mra2'].label}, {{}} blocks per row", None),
    "mra2_native": (f"{METHODS['mra2'].label}, compiled; {{}} blocks per row", "#d95f02"),
    "mra2_torch": (f"{METHODS['mra2'].label}, plain torch; {{}} blocks per row", "#66a3d2"),
    "longformer_64": (f"{_LONGFORMER.label}, window 64", "#66a3d2"),
    "longformer_256": (f"{_LONGFORMER.label}, window 256", _LONGFORMER.colour),
    "bigbird": (METHODS["bigbird"].label, "#b5a642"),
    "mra_1024_32_1": ("scales 1024, 32, 1; {} blocks per row", "#d95f02"),
    "adamra": (f"{METHODS['adamra'].label}, segments of 2, 8, 32", METHODS["adamra"].colour),
}
#: Budget -> the colour of MRA-2 with it.
BUDGET_COLOURS = {"4": "#1b9e77", "8": "#d95f02", "16": "#7570b3"}
PASS_COLOURS = {
    "summaries": "#7570b3",
    "select": "#1b9e77",
    "forward": "#d95f02",
    "backward": "#1f5f99",
}


def draw_lengths(rows: list[dict[str, str]], png: Path, *, graph: bool = False) -> None:
    """Draw milliseconds against tokens: a column of panels per pass, and a row of panels per batch
    size that was measured at several lengths; one row of panels where there is none.

    Args:
        rows: of one op and dtype.
        png: the file to write.
        graph: rows of CUDA graphs instead of eager calls.

    Raises:
        ValueError: there are no such rows.
    """
    suffix = " graph" if graph else ""
    names = {title + suffix: title for title in TITLES}
    rows = [row | {"pass": names[row["pass"]]} for row in rows if row["pass"] in names]
    if not rows:
        raise ValueError("no rows of CUDA graphs" if graph else "no rows of eager calls")
    passes = [name for name in TITLES if any(row["pass"] == name for row in rows)]
    by_batch: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: int(row["batch"])):
        by_batch.setdefault(row["batch"], []).append(row)
    several = [group for group in by_batch.values() if len({row["length"] for row in group}) > 1]
    groups = several or [rows]
    figure = new_figure(10, 0.6 + 3.8 * len(groups))
    panels = figure.subplots(len(groups), len(passes), squeeze=False)
    for line, group in zip(panels, groups, strict=True):
        for axes, kind in zip(line, passes, strict=True):
            _draw_panel(axes, [row for row in group if row["pass"] == kind])
            batch = f", batch {group[0]['batch']}" if len(groups) > 1 else ""
            axes.set(xlabel="tokens", ylabel="ms", title=TITLES[kind] + batch)
    first = groups[0][0]
    subjects = {
        "attention": "attention",
        "implementations": "attention",
        "self_attention": "self-attention module",
        "scales": "two and three scales",
        "adamra": "attention layers of the Long Range Arena",
    }
    batches = {row["batch"] for group in groups for row in group}
    batch = f"batch {first['batch']}, " if len(batches) == 1 else ""
    title = subjects.get(first["op"], "RoBERTa-base") + " as CUDA graphs" * graph
    title += f", {first['device']}; {first['dtype']}, {batch}"
    title += f"{first['heads']} heads x {first['head_dim']}"
    _save(figure, png, title, first)


def _save(figure: Figure, png: Path, title: str, row: dict[str, str]) -> None:
    """Write the picture with a title and the conditions of a row."""
    conditions = f"torch {row['torch']}; {row['date']}, {row['commit']}"
    figure.suptitle(f"{title}; {conditions}", fontsize=9)
    save_figure(figure, png)


def _draw_panel(axes: Axes, rows: list[dict[str, str]]) -> None:
    for provider, budget in dict.fromkeys((r["provider"], r["block_per_row"]) for r in rows):
        line = [r for r in rows if (r["provider"], r["block_per_row"]) == (provider, budget)]
        line.sort(key=lambda row: int(row["length"]))
        name, colour = LOOKS[provider]
        axes.plot(
            [int(r["length"]) for r in line],
            [float(r["ms_median"]) for r in line],
            label=name.format(budget),
            color=colour or BUDGET_COLOURS.get(budget),
            linestyle="--" if provider.startswith("sdpa") else "-",
            marker="o",
            markersize=4,
        )
    lengths = sorted({int(row["length"]) for row in rows})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def draw_launches(rows: list[dict[str, str]], png: Path) -> None:
    """Draw microseconds of every kernel beside its roofline, for the first shape in the rows of a
    `launches.csv`.
    """
    first = rows[0]
    shape = ("length", "batch")
    bars = [
        row
        for row in rows
        if all(row[name] == first[name] for name in shape) and not row["kernel"].startswith("(")
    ]
    figure = new_figure(10, 1.2 + 0.24 * len(bars))
    axes = figure.subplots()
    positions = range(len(bars))
    axes.barh(
        positions,
        [float(row["us"]) for row in bars],
        color=[PASS_COLOURS[row["pass"]] for row in bars],
        height=0.8,
    )
    for position, row in enumerate(bars):
        if row["floor_us"]:
            ends = [position - 0.4, position + 0.4]
            axes.plot([float(row["floor_us"])] * 2, ends, color="black", linewidth=2)
    names = [
        f"{row['pass']}: {row['launches']} x {row['kernel'].removesuffix('_kernel')[:40]}"
        for row in bars
    ]
    axes.set_yticks(positions, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="microseconds; black: the roofline by measured ceilings")
    axes.grid(axis="x", alpha=0.3)
    title = f"launches of MRA-2, {first['device']}; {first['dtype']}, {first['length']} tokens x "
    title += f"{first['batch']}, {first['heads']} heads x {first['head_dim']}, "
    title += f"{first['block_per_row']} blocks per row"
    _save(figure, png, title, first)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw rows of one op, a panel per pass; or the rows of a `launches.csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument(
        "--op",
        choices=("attention", "implementations", "self_attention", "model", "scales", "adamra"),
    )
    parser.add_argument("--dtype", help="default: the first row's")
    parser.add_argument("--batch", help="default: all sizes that were measured at several lengths")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs, not eager calls")
    args = parser.parse_args(arguments)
    rows = read_rows(args.csv)
    if rows and "kernel" in rows[0]:
        draw_launches(rows, args.png)
        return 0
    dtype = args.dtype or (rows[0]["dtype"] if rows else None)
    op = args.op or (rows[0]["op"] if rows else None)
    rows = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
    rows = [row for row in drawable(rows) if args.batch in (None, row["batch"])]
    if not rows:
        parser.error(f"{args.csv} has no rows of op {op} and dtype {dtype}")
    try:
        draw_lengths(rows, args.png, graph=args.graph)
    except ValueError as error:
        parser.error(f"{args.csv}: {error}")
    return 0


def drawable(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of providers in LOOKS, without MRA-2-s, which costs about as much as MRA-2."""
    return [row for row in rows if row["provider"] in LOOKS and row["mode"] != "sparse"]


if __name__ == "__main__":
    sys.exit(main())
