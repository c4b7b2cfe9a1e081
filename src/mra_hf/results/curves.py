"""Pictures of training curves: one run by itself, or many runs of a task against each other."""

from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.lines import Line2D

from mra_hf.results.drawing import new_figure, save_figure
from mra_hf.results.runs import evaluation_set

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from mra_hf.results.runs import Run

_LINE_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_LOSS_COLOURS = ("#1f5f99", "#5b3f8c", "#3c8c6b")
_ACCURACY_COLOURS = ("#d95f02", "#b3273a", "#a6761d")


def plot_training_curve(
    rows: "Sequence[Mapping[str, float]]",
    path: "str | os.PathLike[str]",
    title: str,
    unit: str = "masked token",
) -> None:
    """Draw one run: training loss, held-out losses and held-out accuracies against the step.

    Args:
        rows: "step", and where known "loss" and metrics "eval_...", as
            `mra_hf.results.files.write_history` returns them. Held-out losses are the metrics that
            end in "nll", or else in "loss".
        path: PNG to write.
        title: stands above the picture.
        unit: what a loss is a mean over.
    """
    figure = new_figure(8, 4)
    loss_axes = figure.subplots()
    accuracy_axes = loss_axes.twinx()
    losses = _metrics(rows, "nll") or _metrics(rows, "loss")
    lines = [(loss_axes, "loss", "training loss", "#9ab8d3")]
    for colour, name in zip(_LOSS_COLOURS, losses, strict=False):
        lines.append((loss_axes, name, f"held-out loss{_of_set(name)}", colour))
    for colour, name in zip(_ACCURACY_COLOURS, _metrics(rows, "accuracy"), strict=False):
        lines.append((accuracy_axes, name, f"held-out accuracy{_of_set(name)}", colour))
    for axes, name, label, colour in lines:
        steps, values = _curve(rows, name)
        if steps:
            mark: dict[str, Any] = {} if name == "loss" else {"marker": "o", "markersize": 4}
            axes.plot(steps, values, label=label, color=colour, **mark)
    loss_axes.set(xlabel="step", ylabel=f"loss per {unit}, nats", title=title)
    accuracy_axes.set(ylabel="accuracy", ylim=(0, None))
    loss_axes.grid(alpha=0.3)
    if loss_axes.lines or accuracy_axes.lines:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def plot_curves(runs: "Sequence[Run]", path: "str | os.PathLike[str]", title: str) -> None:
    """Draw the training losses and held-out metrics of `runs` against the step, a colour per run.

    The metric is accuracy, or the loss where there is none; line styles tell evaluation sets apart.

    Args:
        runs: with a history, of one task.
        path: PNG to write.
        title: stands above the picture.
    """
    legend_rows = -(-len(runs) // 2)
    figure = new_figure(11, 4.4 + 0.2 * legend_rows)
    loss_axes, metric_axes = figure.subplots(1, 2, sharex=True)
    all_rows = [row for run in runs for row in run.history]
    ending = next(
        (ending for ending in ("accuracy", "nll", "loss") if _metrics(all_rows, ending)), "accuracy"
    )
    metrics = _metrics(all_rows, ending)
    factor, unit = (100, "%") if ending == "accuracy" else (1, "nats")
    styles = [_LINE_STYLES[number % len(_LINE_STYLES)] for number in range(len(metrics))]
    colormap = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
    colours = [colormap(number) for number in range(colormap.N)]
    for number, run in enumerate(runs):
        colour = colours[number % len(colours)]
        label = f"{run.name} (unfinished)" if run.missing else run.name
        steps, losses = _curve(run.history, "loss")
        loss_axes.plot(steps, losses, color=colour, linewidth=1.1, label=label)
        for style, metric in zip(styles, metrics, strict=True):
            steps, values = _curve(run.history, metric)
            look = {"linestyle": style, "linewidth": 1.3, "marker": "o", "markersize": 3.5}
            metric_axes.plot(steps, [factor * value for value in values], color=colour, **look)
    loss_axes.set(xlabel="step", ylabel="training loss, nats", title="training")
    metric_axes.set(
        xlabel="step",
        ylabel=f"{ending}, {unit}",
        title="held out" if metrics else "held out: not evaluated while training",
    )
    if len(metrics) > 1:
        metric_axes.legend(
            [Line2D([], [], color="black", linestyle=style) for style in styles],
            [evaluation_set(metric, ending) or "one set" for metric in metrics],
        )
    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=min(2, len(runs)), frameon=False)
    save_figure(figure, path)


def _metrics(rows: "Sequence[Mapping[str, float]]", ending: str) -> list[str]:
    """The held-out metrics that end in `ending`, sorted."""
    names = {name for row in rows for name in row}
    return sorted(name for name in names if name.startswith("eval_") and name.endswith(ending))


def _curve(rows: "Sequence[Mapping[str, float]]", name: str) -> tuple[list[float], list[float]]:
    """The steps at which `name` was logged, and its values there."""
    logged = [row for row in rows if name in row]
    return [row["step"] for row in logged], [row[name] for row in logged]


def _of_set(metric: str) -> str:
    """The evaluation set of a metric for a label: "eval_matched_accuracy" -> ", matched"."""
    name = evaluation_set(metric, metric.rpartition("_")[2])
    return f", {name}" if name else ""
