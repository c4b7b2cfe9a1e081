"""Draw milliseconds against length from a CSV of `run.py`.

python kernels/benchmarks/plot.py results/cpu.csv results/cpu.png
python kernels/benchmarks/plot.py results/cpu.csv results/cpu_modules.png --op self_attention
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"fwd": "forward", "fwd+bwd": "forward + backward", "step": "training step"}
NAMES = {
    "sdpa": "dense (SDPA)",
    "mra2": "MRA-2, {} blocks per row",
    "longformer_64": "Longformer, window 64",
    "longformer_256": "Longformer, window 256",
    "bigbird": "BigBird",
    "mra_1024_32_1": "scales 1024, 32, 1; {} blocks per row",
    "adamra": "AdaMRA, segments of 2, 8, 32",
    "linear": "linear attention",
}
COLOURS = {
    "sdpa": "#444444",
    "mra2 4": "#1b9e77",
    "mra2 8": "#d95f02",
    "mra2 16": "#7570b3",
    "longformer_64": "#66a3d2",
    "longformer_256": "#1f5f99",
    "bigbird": "#b5a642",
    "mra_1024_32_1 4": "#d95f02",
    "adamra": "#1b9e77",
    "linear": "#66a3d2",
}


def main() -> int:
    """Draw one kind of row, a panel per pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument(
        "--op", choices=("attention", "self_attention", "model", "scales", "adamra")
    )
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    with args.csv.open() as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == args.dtype]
    op = args.op or (rows[0]["op"] if rows else None)
    rows = [row for row in rows if row["op"] == op and row["provider"] in NAMES]
    if not rows:
        parser.error(f"{args.csv} has no rows of op {op} and dtype {args.dtype}")
    passes = [name for name in TITLES if any(row["pass"] == name for row in rows)]
    lengths = sorted({int(row["length"]) for row in rows})
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(passes), squeeze=False)[0]
    for axes, kind in zip(panels, passes, strict=True):
        for provider, budget in dict.fromkeys((r["provider"], r["block_per_row"]) for r in rows):
            chosen = (provider, budget, kind)
            line = [r for r in rows if (r["provider"], r["block_per_row"], r["pass"]) == chosen]
            axes.plot(
                [int(r["length"]) for r in line],
                [float(r["ms_median"]) for r in line],
                label=NAMES[provider].format(budget),
                color=COLOURS.get(f"{provider} {budget}".strip()),
                linestyle="--" if provider == "sdpa" else "-",
                marker="o",
                markersize=4,
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=TITLES[kind])
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    first = rows[0]
    what = {
        "attention": "attention",
        "self_attention": "self-attention module",
        "scales": "two and three scales",
        "adamra": "attention layers of the Long Range Arena",
    }
    figure.suptitle(
        f"{what.get(op, 'RoBERTa-base')}, {first['device']}; {args.dtype}, batch {first['batch']}, "
        f"{first['heads']} heads x {first['head_dim']}; torch {first['torch']}; {first['date']}, "
        f"{first['commit']}",
        fontsize=9,
    )
    figure.savefig(args.png, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
