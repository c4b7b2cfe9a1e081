"""What the figures share: a result, a sheet to draw on, colours of methods."""

from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mra_hf.analysis.head_inputs import HeadInputs

#: Colour and mark of a method, the same in every figure.
STYLES = {
    "dense": ("#444444", "*"),
    "mra2": ("#b3273a", "o"),
    "mra2_s": ("#e08a3c", "o"),
    "longformer": ("#1f5f99", "s"),
    "bigbird": ("#5aa0d8", "s"),
    "nystromformer": ("#3c8c6b", "^"),
    "performer": ("#8fc7a9", "^"),
    "linformer": ("#b9b9b9", "v"),
    "h_transformer": ("#7a4fa3", "D"),
    "sparse": ("#c9a227", "P"),
    "low_rank": ("#8c564b", "X"),
}


@dataclass(frozen=True)
class Drawn:
    """A figure with its numbers.

    Attributes:
        figure: the picture.
        rows: the numbers in it, for a CSV.
        caption: what is seen, what the paper found and what was found here.
    """

    figure: Figure
    rows: list[dict[str, Any]]
    caption: str


def sheet(width: float, height: float) -> Figure:
    """An empty figure that needs no display, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def shape_of(heads: HeadInputs) -> str:
    """What a figure is drawn from, for its caption."""
    instances, count, length, dim = heads.query.shape
    return f"{instances} x {count} heads, {length} tokens, head dim {dim}"
