"""Figures that need no display, and pictures that are written whole or not at all."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, with the canvas that draws it as PNG."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write `figure` as PNG; the same figure gives the same bytes.

    Args:
        figure: as `new_figure` made it.
        path: file to write; an older one is replaced once the picture is complete.
        dpi: pixels per inch.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=dpi, format="png")
    partial.replace(path)
