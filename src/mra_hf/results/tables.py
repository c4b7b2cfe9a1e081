"""Tables of runs: every number as CSV, and what a reader compares as Markdown."""

from typing import TYPE_CHECKING, Any

from mra_hf.results.files import csv_text
from mra_hf.results.runs import Run, evaluation_set, mean_interval, seed_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Ending of a metric -> its word in a table, factor, digits and unit.
_MEASURES: dict[str, tuple[str, float, int, str]] = {
    "accuracy": ("accuracy", 100, 1, " %"),
    "nll": ("nll", 1, 3, ""),
    "bits_per_token": ("bits", 1, 3, ""),
}

_MODEL_COLUMNS = ("task", "model", "attention", "mode", "blocks", "tokens")


def runs_csv(runs: "Sequence[Run]") -> str:
    """A line per run as CSV, a column per metric, unrounded."""
    metrics = sorted({key for run in runs for key in run.metrics})
    columns = [
        *("run", "status", "task", "model", "attention", "approx_mode", "block_per_row"),
        *("max_seq_length", "seed", "steps", *metrics, "train_seconds", "seconds_per_step"),
        *("resumed_from", "device", "dtype", "commit", "paper_row", "config_overrides"),
    ]
    rows = []
    for run in runs:
        train = run.results.get("train", {})
        facts: dict[str, Any] = {"run": run.name, "model": run.model, "paper_row": run.paper_row}
        facts |= {"status": run.missing or "finished", "seconds_per_step": run.seconds_per_step}
        facts["train_seconds"] = train.get("train_runtime")
        rows.append({**run.settings, **run.results, **train, **run.metrics, **facts})
    return csv_text(columns, rows)


def runs_table(runs: "Sequence[Run]") -> str:
    """A line per run as Markdown."""
    rows = []
    for run in runs:
        result = ", ".join(
            f"{label} {run.metrics[key] * factor:.{digits}f}{unit}"
            for key, (label, factor, digits, unit) in _measures(run.metrics).items()
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
        "Training times include the evaluations and checkpoints in between.\n\n"
        + markdown_table(columns, rows)
    )


def seeds_table(runs: "Sequence[Run]") -> str:
    """A line per result of several seeds as Markdown, and why similar runs are not put together.

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
        parts.append("Mean and 95 % interval (Student's t) of runs that differ only in the seed.")
        parts.append(markdown_table((*_MODEL_COLUMNS, "n", "seeds", "result", "runs"), rows))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n\n".join(parts)


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
        texts = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |\n"

    return line(columns) + line(["---"] * len(columns)) + "".join(map(line, rows))


def _measures(metrics: "Iterable[str]") -> dict[str, tuple[str, float, int, str]]:
    """Metric -> label, factor, digits and unit, for the metrics that a table shows."""
    measures = {}
    for ending, (word, factor, digits, unit) in _MEASURES.items():
        for key in sorted(key for key in metrics if key.endswith(f"_{ending}")):
            label = evaluation_set(key, ending) or word
            measures[key] = (label, factor, digits, unit)
    return measures


def _model_cells(run: Run) -> tuple:
    known = {**run.settings, **run.results}
    keys = ("attention", "approx_mode", "block_per_row", "max_seq_length")
    return (run.task, run.model, *(known.get(key) for key in keys))
