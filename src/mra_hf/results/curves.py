"""A picture of a training run: loss of training and evaluation, accuracy of evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence


def plot_training_curve(
    rows: "Sequence[Mapping[str, float]]",
    path: "str | os.PathLike[str]",
    title: str,
    unit: str = "masked token",
) -> None:
    """Draw `rows`: "step", and where known "loss", the held-out losses (keys that end in "nll", or
    else in "loss") and accuracies (keys that end in "accuracy").

    Args:
        rows: as `mra_hf.results.files.write_history` returns them.
        path: PNG to write.
        title: stands above the picture.
        unit: what a loss is a mean over.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes = figure.subplots()
    accuracy_axes = loss_axes.twinx()
    names = {name for row in rows for name in row if name.startswith("eval_")}
    losses = sorted(name for name in names if name.endswith("nll"))
    losses = losses or sorted(name for name in names if name.endswith("loss"))
    accuracies = sorted(name for name in names if name.endswith("accuracy"))
    lines = [(loss_axes, "loss", "training loss", "#9ab8d3")]
    for colour, name in zip(("#1f5f99", "#5b3f8c", "#3c8c6b"), losses, strict=False):
        lines.append((loss_axes, name, f"held-out loss{_set_name(name)}", colour))
    for colour, name in zip(("#d95f02", "#b3273a", "#a6761d"), accuracies, strict=False):
        lines.append((accuracy_axes, name, f"held-out accuracy{_set_name(name)}", colour))
    for axes, key, label, colour in lines:
        known = [(row["step"], row[key]) for row in rows if key in row]
        if known:
            mark = {} if key == "loss" else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*known, strict=True), label=label, color=colour, **mark)
    loss_axes.set(xlabel="step", ylabel=f"loss per {unit}, nats", title=title)
    accuracy_axes.set(ylabel="accuracy", ylim=(0, None))
    loss_axes.grid(alpha=0.3)
    if loss_axes.lines or accuracy_axes.lines:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(path), dpi=120)


def _set_name(key: str) -> str:
    """The evaluation set in a metric's name: "eval_matched_accuracy" -> ", matched"."""
    middle = key.removeprefix("eval_").rpartition("_")[0]
    return f", {middle}" if middle else ""
