"""Run directories read back: tables in Markdown and CSV, and one picture of curves per task.

A run is what `mra_hf.training.runs.fit` wrote. Runs that differ in their seed alone are several
draws of one result: mean +- t * s / sqrt(n), with s their standard deviation and t the 97.5 %
quantile of Student's distribution with n - 1 degrees of freedom, a 95 % interval.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mra_hf.results.files import EXPERIMENT_NAME, HISTORY_NAME, RESULTS_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

#: Settings that name a run or what it reports; runs may differ in them as in the seed.
_NAMES_OF_A_RUN = frozenset(
    {"seed", "data_seed", "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to"}
)

#: Conditions in `results.json` that runs of one result share.
_CONDITIONS = (
    *("task", "attention", "approx_mode", "block_per_row", "parameters", "max_seq_length"),
    *("device", "processes", "dtype", "mra_hf", "commit", "torch", "transformers"),
)

#: Ending of a metric -> its word in a table, factor, digits and unit.
_MEASURES = {
    "accuracy": ("accuracy", 100, 1, " %"),
    "nll": ("nll", 1, 3, ""),
    "bits_per_token": ("bits", 1, 3, ""),
}

_NOT_METRICS = ("_runtime", "_per_second", "_time")
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """What one run directory holds.

    Attributes:
        name: the directory, as short as it is unique.
        folder: its path.
        settings: `experiment.yaml`; empty before it is written.
        results: `results.json`; empty before it is written.
        history: rows of `training_curve.csv`, without empty cells.
        missing: what an unfinished run lacks; empty for a finished one.
    """

    name: str
    folder: Path
    settings: "Mapping[str, Any]"
    results: "Mapping[str, Any]"
    history: "Sequence[Mapping[str, float]]"
    missing: str

    @property
    def task(self) -> str:
        """The task, "" where it is not known yet."""
        return self.results.get("task", "")

    @property
    def model(self) -> str:
        """The checkpoint it started from, without its folder; of the Long Range Arena, what was
        changed about the encoder.
        """
        checkpoint = self.settings.get("model_name_or_path")
        if checkpoint:
            return Path(checkpoint).name
        kind = self.settings.get("model_type")
        return f"new {kind}" if kind else self.settings.get("config_overrides") or ""

    @property
    def paper_row(self) -> str | None:
        """The row of the paper that it says it repeats."""
        return self.results.get("paper_row") or self.settings.get("paper_row")

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the last evaluation but their speed."""
        return {
            key: value
            for key, value in self.results.get("eval", {}).items()
            if key.startswith("eval_")
            and not key.endswith(_NOT_METRICS)
            and isinstance(value, (int, float))
        }

    @property
    def seconds_per_step(self) -> float | None:
        """Time of training over the steps it was measured for."""
        train = self.results.get("train", {})
        seconds, steps, resumed = (
            train.get(key) for key in ("train_runtime", "steps", "resumed_from")
        )
        if resumed:  # the time is that of the steps since
            match = re.fullmatch(r"checkpoint-(\d+)", resumed)
            steps = steps - int(match[1]) if match and steps else None
        return seconds / steps if seconds is not None and steps else None


def find_runs(folders: "Iterable[str | os.PathLike[str]]") -> list[Run]:
    """Read the run directories among `folders` and below them, each once, in their order.

    Raises:
        ValueError: a folder without a run, or a file that cannot be read, by name.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for given in folders:
        root = Path(given)
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; name run directories or folders of them.")
        inside = _run_folders(root)
        if not inside:
            raise ValueError(
                f"no run found in {root}; name the output_dir of runs, or folders that hold some "
                f"(a run has a {RESULTS_NAME}, or a checkpoint-N while it trains)."
            )
        for folder in inside:
            name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
            found.setdefault(folder.resolve(), (folder, name))
    uses = Counter(name for _, name in found.values())
    return [
        _read_run(folder, name if uses[name] == 1 else folder.as_posix())
        for folder, name in found.values()
    ]


def _run_folders(root: Path) -> list[Path]:
    found = []
    for folder, below, files in os.walk(root):
        checkpoints = [name for name in below if _is_checkpoint(Path(folder, name))]
        if checkpoints or RESULTS_NAME in files or EXPERIMENT_NAME in files:
            found.append(Path(folder))
        below[:] = sorted(
            name for name in below if name not in checkpoints and not name.startswith(".")
        )
    return found


def _is_checkpoint(folder: Path) -> bool:
    return (
        bool(re.fullmatch(r"checkpoint-\d+", folder.name))
        and (folder / "trainer_state.json").is_file()
    )


def _read_run(folder: Path, name: str) -> Run:
    settings, results, history = {}, {}, []
    if (folder / EXPERIMENT_NAME).is_file():
        settings = _mapping(folder / EXPERIMENT_NAME, yaml.safe_load)
    if (folder / HISTORY_NAME).is_file():
        history = _read_history(folder / HISTORY_NAME)
    if (folder / RESULTS_NAME).is_file():
        file = folder / RESULTS_NAME
        results = _mapping(file, json.loads)
        if not isinstance(results.get("task"), str):
            raise ValueError(
                f'{file} names no "task", as the results of a run do; add it, or leave {folder} '
                "out."
            )
        if not all(isinstance(results.get(part, {}), dict) for part in ("train", "eval", "data")):
            raise ValueError(
                f'{file}: "train", "eval" and "data" must be objects; repeat the run, or leave '
                f"{folder} out."
            )
        if not settings:
            raise ValueError(
                f"{folder} has {RESULTS_NAME} and no {EXPERIMENT_NAME}; copy the whole directory "
                "of the run."
            )
    if results.get("train") or results.get("eval"):
        missing = "" if results.get("eval") else "not evaluated"
    else:
        steps = [
            int(path.name.partition("-")[2]) for path in folder.iterdir() if _is_checkpoint(path)
        ]
        seen = f"last checkpoint at step {max(steps)}" if steps else "no checkpoint"
        missing = f"running or stopped, {seen}"
    return Run(name, folder, settings, results, history, missing)


def _mapping(file: Path, parse) -> dict[str, Any]:
    try:
        held = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); repeat the run, or leave {file.parent} out."
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold names and values; leave {file.parent} out.")
    return held


def _read_history(file: Path) -> list[dict[str, float]]:
    rows = []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                rows.append({key: float(value) for key, value in row.items() if value})
        if not all("step" in row for row in rows):
            raise ValueError("a row has no step")
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{file} is not the curve of a run ({error}); repeat the run, or leave {file.parent} "
            "out."
        ) from error
    return rows


def _measures(metrics: "Iterable[str]") -> dict[str, tuple[str, float, int, str]]:
    """Metric -> label, factor, digits, unit, for those that a table shows."""
    shown = {}
    for ending, (word, *form) in _MEASURES.items():
        for key in sorted(key for key in metrics if key.endswith(f"_{ending}")):
            shown[key] = (_set_name(key, ending) or word, *form)
    return shown


def _set_name(key: str, ending: str) -> str:
    """The evaluation set in a metric's name: "eval_matched_accuracy" -> "matched"."""
    return key.removeprefix("eval_").removesuffix(ending).removesuffix("_")


def runs_csv(runs: "Sequence[Run]") -> str:
    """A line per run as CSV, every metric in a column of its own, as it was measured."""
    measured = sorted({key for run in runs for key in run.metrics})
    columns = [
        *("run", "status", "task", "model", "attention", "approx_mode", "block_per_row"),
        *("max_seq_length", "seed", "steps", *measured, "train_seconds", "seconds_per_step"),
        *("resumed_from", "device", "dtype", "commit", "paper_row"),
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        train = run.results.get("train", {})
        writer.writerow(
            {
                **run.settings,
                **run.results,
                **train,
                **run.metrics,
                "run": run.name,
                "status": run.missing or "finished",
                "model": run.model,
                "train_seconds": train.get("train_runtime"),
                "seconds_per_step": run.seconds_per_step,
                "paper_row": run.paper_row,
            }
        )
    return out.getvalue()


def runs_table(runs: "Sequence[Run]") -> str:
    """A line per run as Markdown."""
    rows = []
    for run in runs:
        measures = _measures(run.metrics)
        result = ", ".join(
            f"{label} {run.metrics[key] * factor:.{digits}f}{unit}"
            for key, (label, factor, digits, unit) in measures.items()
        )
        train = run.results.get("train", {})
        resumed = f" since {train['resumed_from']}" if train.get("resumed_from") else ""
        seconds = train.get("train_runtime")
        known = {**run.settings, **run.results}
        rows.append(
            (
                run.name,
                *_model_cells(run),
                known.get("seed"),
                train.get("steps"),
                f"unfinished: {run.missing}" if run.missing else result or "no known metric",
                None if seconds is None else f"{seconds:.0f}{resumed}",
                None if run.seconds_per_step is None else f"{run.seconds_per_step:.3g}",
                *(known.get(key) for key in ("device", "dtype", "commit")),
            )
        )
    columns = (
        *("run", *_MODEL_COLUMNS, "seed", "steps", "result"),
        *("training s", "s per step", "device", "dtype", "commit"),
    )
    return (
        "Times of training include the evaluations and checkpoints in between.\n\n"
        + markdown_table(columns, rows)
    )


def seeds_table(runs: "Sequence[Run]") -> str:
    """A line per result of several seeds as Markdown, and why like runs are not put together.

    Returns:
        "" where no two runs have the same settings.
    """
    groups, notes = seed_groups([run for run in runs if not run.missing])
    rows = []
    for group in groups:
        if len(group) > 1:
            seeds = ", ".join(str(run.results["seed"]) for run in group)
            names = ", ".join(run.name for run in group)
            result = ", ".join(
                f"{label} {mean_text(group, key, factor, digits)}{unit}"
                for key, (label, factor, digits, unit) in _measures(group[0].metrics).items()
            )
            rows.append((*_model_cells(group[0]), len(group), seeds, result, names))
    parts = []
    if rows:
        parts.append("Mean and 95 % interval (Student's t) of runs that differ in seed alone.")
        parts.append(markdown_table((*_MODEL_COLUMNS, "n", "seeds", "result", "runs"), rows))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n\n".join(parts)


_MODEL_COLUMNS = ("task", "model", "attention", "mode", "blocks", "tokens")


def _model_cells(run: Run) -> tuple:
    known = {**run.settings, **run.results}
    keys = ("attention", "approx_mode", "block_per_row", "max_seq_length")
    return (run.task, run.model, *(known.get(key) for key in keys))


def seed_groups(runs: "Sequence[Run]") -> tuple[list[list[Run]], list[str]]:
    """Runs that differ in seed alone, and notes on runs that are alike and yet stay single."""
    alike: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in _NAMES_OF_A_RUN}
        same_settings = alike.setdefault(json.dumps(settings, sort_keys=True, default=str), {})
        same_settings.setdefault(json.dumps(_conditions(run)), []).append(run)
    groups, notes = [], []
    for by_conditions in alike.values():
        for group in by_conditions.values():
            seeds = [run.results.get("seed") for run in group]
            if len(group) == len(set(seeds)):
                groups.append(group)
                continue
            names = ", ".join(run.name for run in group)
            notes.append(f"{names}: a seed twice with the same settings; not put together.")
            groups += [[run] for run in group]
        together = [run for group in by_conditions.values() for run in group]
        if len(by_conditions) > 1 and len({run.results.get("seed") for run in together}) > 1:
            held = [json.loads(conditions) for conditions in by_conditions]
            differ = [key for key in held[0] if len({str(one[key]) for one in held}) > 1]
            names = ", ".join(run.name for run in together)
            notes.append(
                f"{names}: the same settings but for the seed, and another {', '.join(differ)}; "
                "not put together."
            )
    return groups, notes


def _conditions(run: Run) -> dict[str, Any]:
    """What runs of one result share beside the settings; the order of training follows the seed."""
    held = {key: run.results.get(key) for key in _CONDITIONS}
    data = run.results.get("data", {})
    held["evaluation data"] = {key: value for key, value in data.items() if key.startswith("eval")}
    held["training rows"] = data.get("train_rows")
    return held


def mean_interval(values: "Sequence[float]") -> tuple[float, float]:
    """Mean of at least two values and half the width of its 95 % interval.

    Above 31 values the quantile is that of 30 degrees of freedom, at most 4 % too wide.
    """
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def mean_text(group: "Sequence[Run]", key: str, factor: float, digits: int) -> str:
    """The metric of one run, or mean and interval of several."""
    values = [run.metrics.get(key, float("nan")) * factor for run in group]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown_table(columns: "Sequence[str]", rows: "Iterable[Sequence[Any]]") -> str:
    """A Markdown table; None is an empty cell."""

    def line(cells: "Sequence[Any]") -> str:
        shown = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(shown)} |\n"

    return line(columns) + line(["---"] * len(columns)) + "".join(map(line, rows))


def plot_curves(runs: "Sequence[Run]", path: "str | os.PathLike[str]", title: str) -> None:
    """Draw the training losses and held-out metrics of `runs` against the step, a colour per run.

    The metric is accuracy, or where there is none the loss; several evaluation sets differ in the
    style of their line. The picture is written whole or not at all.

    Args:
        runs: with a history, of one task.
        path: PNG to write.
        title: stands above the picture.
    """
    legend_rows = -(-len(runs) // 2)
    figure = Figure(figsize=(11, 4.4 + 0.2 * legend_rows), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2, sharex=True)
    names = {key for run in runs for row in run.history for key in row if key.startswith("eval_")}
    ending = next(
        (one for one in ("accuracy", "nll", "loss") if any(key.endswith(one) for key in names)),
        "accuracy",
    )
    keys = sorted(key for key in names if key.endswith(ending))
    factor, unit = (100, "%") if ending == "accuracy" else (1, "nats")
    colours = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    for number, run in enumerate(runs):
        colour = colours[number % len(colours)]
        label = f"{run.name} (unfinished)" if run.missing else run.name
        steps, losses = _curve(run, "loss")
        loss_axes.plot(steps, losses, color=colour, linewidth=1.1, label=label)
        for style, key in enumerate(keys):
            steps, values = _curve(run, key)
            metric_axes.plot(
                steps,
                [factor * value for value in values],
                color=colour,
                linestyle=_LINE_STYLES[style % len(_LINE_STYLES)],
                marker="o",
                markersize=3.5,
                linewidth=1.3,
            )
    loss_axes.set(xlabel="step", ylabel="training loss, nats", title="training")
    metric_axes.set(
        xlabel="step",
        ylabel=f"{ending}, {unit}",
        title="held out" if keys else "held out: not evaluated while training",
    )
    if len(keys) > 1:
        styles = [
            Line2D([], [], color="black", linestyle=_LINE_STYLES[style % len(_LINE_STYLES)])
            for style in range(len(keys))
        ]
        metric_axes.legend(styles, [_set_name(key, ending) or "one set" for key in keys])
    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=min(2, len(runs)), frameon=False)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def _curve(run: Run, key: str) -> tuple[list[float], list[float]]:
    known = [(row["step"], row[key]) for row in run.history if key in row]
    return [step for step, _ in known], [value for _, value in known]
