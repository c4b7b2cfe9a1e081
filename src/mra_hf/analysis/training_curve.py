"""A picture of a training run: loss of training and evaluation, accuracy of evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence


def plot_training_curve(
    rows: "Sequence[Mapping[str, float]]", path: "str | os.PathLike[str]", title: str
) -> None:
    """Draw `rows` (keys "step", "loss", "eval_nll", "eval_accuracy", the last three where known).

    Args:
        rows: as `mra_hf.experiment_files.write_history` returns them.
        path: PNG to write.
        title: stands above the picture.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes = figure.subplots()
    accuracy_axes = loss_axes.twinx()
    for axes, key, label, colour in (
        (loss_axes, "loss", "training loss", "#9ab8d3"),
        (loss_axes, "eval_nll", "held-out loss", "#1f5f99"),
        (accuracy_axes, "eval_accuracy", "held-out accuracy", "#d95f02"),
    ):
        known = [(row["step"], row[key]) for row in rows if key in row]
        if known:
            mark = {} if key == "loss" else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*known, strict=True), label=label, color=colour, **mark)
    loss_axes.set(xlabel="step", ylabel="loss per masked token, nats", title=title)
    accuracy_axes.set(ylabel="accuracy of masked tokens", ylim=(0, None))
    loss_axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(path), dpi=120)
