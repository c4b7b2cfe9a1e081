"""Draw milliseconds against length from a CSV of `run.py`.

python kernels/benchmarks/plot.py results/cpu.csv results/cpu.png
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"fwd": "forward", "fwd+bwd": "forward + backward"}
COLOURS = {"": "#444444", "4": "#1b9e77", "8": "#d95f02", "16": "#7570b3"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    with args.csv.open() as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == args.dtype]
    if not rows:
        parser.error(f"{args.csv} has no rows of dtype {args.dtype}")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        for budget in sorted({row["block_per_row"] for row in rows}, key=lambda b: int(b or 0)):
            line = [r for r in rows if r["pass"] == kind and r["block_per_row"] == budget]
            x = [int(r["length"]) for r in line]
            y = [float(r["ms_median"]) for r in line]
            label = f"MRA-2, block_per_row {budget}" if budget else "dense (SDPA)"
            style = {"linestyle": "-" if budget else "--", "marker": "o", "markersize": 4}
            axes.plot(x, y, label=label, color=COLOURS.get(budget), **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=title)
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    first = rows[0]
    figure.suptitle(
        f"{first['device']}; {args.dtype}, batch {first['batch']}, {first['heads']} heads x "
        f"{first['head_dim']}; torch {first['torch']}; {first['date']}, {first['commit']}",
        fontsize=9,
    )
    figure.savefig(args.png, dpi=120)
    return 0


if __name__ == "__main__":
    sys.exit(main())
