"""The picture on the README's first screen: what a conversion costs, and how fast it is.

Drawn from committed rows only.

    python benchmarks/overview.py
"""

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.records import read_rows
from mra_hf.results.drawing import new_figure, save_figure

RESULTS = ROOT / "benchmarks" / "results"
SCORES = ROOT / "docs" / "experiments" / "english" / "scores.csv"
_DENSE, _OURS, _LIGHT = "#444444", "#d95f02", "#fdae6b"
#: (model, attention, blocks, length) of a row of SCORES -> its label and colour.
POINTS = {
    ("english", "sdpa", "", "512"): ("source, in chunks of 512", _DENSE),
    ("english-512-same-text", "sdpa", "", "512"): ("source, trained on the same text", _DENSE),
    ("english-4096-untrained", "mra2", "8", "4096"): ("converted, untrained, 8 blocks", _LIGHT),
    ("english-4096-untrained", "mra2", "16", "4096"): ("converted, untrained, 16 blocks", _LIGHT),
    ("english-4096", "mra2", "8", "4096"): ("converted and trained, 8 blocks", _OURS),
    ("english-4096", "mra2", "16", "4096"): ("converted and trained, 16 blocks", _OURS),
}
#: Label, colour and line style of a curve, and the rows it is made of: file, values that all have,
#: and the values of dense attention and of MRA-2.
CURVES = (
    (
        *("attention, with backward", _OURS, "-", "cpu_implementations.csv"),
        {"dtype": "fp32", "pass": "fwd+bwd"},
        *({"provider": "sdpa"}, {"provider": "mra2_native", "block_per_row": "8"}),
    ),
    (
        *("attention, forward", _OURS, "--", "cpu_implementations.csv"),
        {"dtype": "fp32", "pass": "fwd"},
        *({"provider": "sdpa"}, {"provider": "mra2_native", "block_per_row": "8"}),
    ),
    (
        *("RoBERTa-base, training step", "#7570b3", "-", "cpu_models.csv"),
        {"dtype": "fp32", "pass": "step"},
        *({"provider": "sdpa"}, {"provider": "mra2", "block_per_row": "8"}),
    ),
    (
        *("RoBERTa-base, forward", "#7570b3", "--", "deployment.csv"),
        {"dtype": "float32", "runtime": "torch", "model": "RoBERTa-base, random weights"},
        *({"attention": "dense"}, {"attention": "mra2"}),
    ),
)


def points() -> list[tuple[str, str, float]]:
    """Label, colour and masked-token loss of each point, in nats."""
    losses = {
        (row["model"], row["attention"], row["block_per_row"], row["length"]): float(row["nll"])
        for row in read_rows(SCORES)
    }
    return [(label, colour, losses[key]) for key, (label, colour) in POINTS.items()]


def speeds(label: str) -> dict[int, float]:
    """Tokens -> how many times as fast as dense attention, of the curve with that label."""
    (curve,) = (curve for curve in CURVES if curve[0] == label)
    file, common, dense, ours = curve[3:]
    times = []
    for own in (dense, ours):
        wanted = (common | own).items()
        rows = [row for row in read_rows(RESULTS / file) if wanted <= row.items()]
        times.append({int(row["length"]): float(row["ms_median"]) for row in rows})
    return {length: times[0][length] / milliseconds for length, milliseconds in times[1].items()}


def main(argv=None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "overview.png")
    args = parser.parse_args(argv)
    figure = new_figure(11, 3.6)
    quality, speed = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_quality(quality)
    _draw_speed(speed)
    save_figure(figure, args.out)
    return 0


def _draw_quality(axes: Axes) -> None:
    measured = points()[::-1]
    labels, colours, losses = zip(*measured, strict=True)
    places = range(len(losses))
    axes.hlines(places, 3.2, losses, color=colours, linewidth=1, linestyle=":")
    axes.scatter(losses, places, color=colours, s=60, zorder=3)
    for place, loss in enumerate(losses):
        axes.annotate(f"{loss:.3f}", (loss, place), (7, 4), textcoords="offset points", fontsize=9)
    axes.set_yticks(places, labels, fontsize=9)
    axes.set_xlim(3.29, 3.55)
    axes.set_ylim(-0.6, len(losses) - 0.4)
    axes.set_title("Masked-token loss on held-out text, nats: lower is better", fontsize=10)
    axes.set_xlabel("small English RoBERTa; conversions read 4096 tokens at once", fontsize=9)


def _draw_speed(axes: Axes) -> None:
    for label, colour, style, *_ in CURVES:
        curve = sorted(speeds(label).items())
        axes.plot(*zip(*curve, strict=True), style, color=colour, marker="o", label=label)
    lengths = sorted({length for label, *_ in CURVES for length in speeds(label)})
    axes.axhline(1, color=_DENSE, linewidth=1)
    axes.text(
        lengths[-1], 0.95, "dense attention (SDPA)", fontsize=9, color=_DENSE, va="top", ha="right"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(0.7, 64)
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1x", "2x", "4x", "8x", "16x", "32x"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("Times the speed of dense attention, 8 blocks", fontsize=10)
    axes.set_xlabel("tokens; float32, two threads of an AMD EPYC (AVX2)", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
