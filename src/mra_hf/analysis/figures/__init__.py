"""The figures and Table 7 of the ICML 2022 paper, redrawn on any heads, and two more figures."""

from collections.abc import Callable
from pathlib import Path

from mra_hf.analysis.figures.choices import locality, selection_rules
from mra_hf.analysis.figures.drawing import Drawn
from mra_hf.analysis.figures.errors import (
    error_and_entropy,
    error_and_time,
    table_7,
    work_and_length,
)
from mra_hf.analysis.figures.matrices import (
    frame_and_haar,
    haar_coefficients,
    stages,
    stages_in_logarithms,
    supports,
)
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.results.drawing import save_figure
from mra_hf.results.files import csv_text, write_text

#: Least number of tokens: four blocks of 32, enough to select from.
SHORTEST = 128

FIGURES: dict[str, Callable[[HeadInputs], Drawn]] = {
    "figure-1": haar_coefficients,
    "figure-2": frame_and_haar,
    "figure-3": stages_in_logarithms,
    "figure-4": error_and_time,
    "figure-5": error_and_entropy,
    "figure-6": stages,
    "figure-7": work_and_length,
    "figure-8": supports,
    "table-7": table_7,
    "locality": locality,
    "selection": selection_rules,
}


def check_length(heads: HeadInputs) -> None:
    """Raise a `ValueError` if the heads are too short for figures."""
    if heads.length < SHORTEST:
        raise ValueError(
            f"figures need heads of {SHORTEST} tokens or more, got {heads.length}; raise --length."
        )


def draw(name: str, heads: HeadInputs, out: Path) -> str:
    """Write NAME.png, NAME.csv and NAME.txt (the caption) to the folder `out`.

    Args:
        name: a key of `FIGURES`.
        heads: the heads to draw it from.
        out: an existing folder.

    Returns:
        The caption.

    Raises:
        ValueError: heads of fewer than 128 tokens.
    """
    check_length(heads)
    drawn = FIGURES[name](heads)
    caption = f"{name}. Source: {heads.source}. {drawn.caption}"
    columns = list(dict.fromkeys(key for row in drawn.rows for key in row))
    write_text(out / f"{name}.csv", csv_text(columns, drawn.rows))
    save_figure(drawn.figure, out / f"{name}.png", dpi=100)
    (out / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return caption
