"""The result that every figure function returns, and the words that captions share."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mra_hf.analysis.head_inputs import HeadInputs


@dataclass(frozen=True)
class Drawn:
    """A figure with its numbers.

    Attributes:
        figure: the picture.
        rows: its numbers, for a CSV.
        caption: what the figure shows, what the paper reports and what was measured here.
    """

    figure: Figure
    rows: list[dict[str, Any]]
    caption: str


def shape_of(heads: HeadInputs) -> str:
    """The heads behind a figure, for its caption."""
    instances, count, length, dim = heads.query.shape
    return f"{instances} x {count} heads, {length} tokens, head dim {dim}"
