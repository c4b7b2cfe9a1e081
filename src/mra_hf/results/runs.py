"""Run directories read back: what each holds, and which runs are seeds of one result.

A run is what `mra_hf.training.runs.Experiment.fit` wrote. Runs that differ only in their seed are n
draws of one result, reported as mean +- t * s / sqrt(n), a 95 % interval: s is their standard
deviation and t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom.
"""

import csv
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mra_hf.encoders.methods import METHODS
from mra_hf.results.files import EXPERIMENT_NAME, HISTORY_NAME, RESULTS_NAME, STATE_NAME, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

#: Settings that may differ between seeds of one result: the seed, and where and how a run reports.
_IGNORED_SETTINGS = frozenset(
    {"seed", "data_seed", "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to"}
    | {"dataloader_pin_memory"}
)

#: Conditions in `results.json` that seeds of one result share.
_CONDITIONS = (
    *("task", "attention", "approx_mode", "block_per_row", "key_block_size", "selection"),
    *("parameters", "max_seq_length"),
    *("device", "processes", "dtype", "mra_hf", "commit", "torch", "transformers"),
)

_NOT_METRICS = ("_runtime", "_per_second", "_time")


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
        """The checkpoint it started from, without its folder; in the arena, the method's label."""
        checkpoint = self.settings.get("model_name_or_path")
        if checkpoint:
            return Path(checkpoint).name
        kind = self.settings.get("model_type")
        if kind:
            return f"new {kind}"
        method = METHODS.get(self.settings.get("attention", ""))
        return method.label if method else ""

    @property
    def paper_row(self) -> str | None:
        """The row of the paper that it says it repeats."""
        return self.results.get("paper_row") or self.settings.get("paper_row")

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the last evaluation, without its speed."""
        return {
            key: value
            for key, value in self.results.get("eval", {}).items()
            if key.startswith("eval_")
            and not key.endswith(_NOT_METRICS)
            and isinstance(value, (int, float))
        }

    @property
    def seconds_per_step(self) -> float | None:
        """Training time divided by the steps it was measured for."""
        train = self.results.get("train", {})
        seconds, steps, resumed = (
            train.get(key) for key in ("train_runtime", "steps", "resumed_from")
        )
        if resumed:  # only the steps since then were timed
            match = re.fullmatch(r"checkpoint-(\d+)", resumed)
            steps = steps - int(match[1]) if match and steps else None
        return seconds / steps if seconds is not None and steps else None


def find_runs(folders: "Iterable[str | os.PathLike[str]]") -> list[Run]:
    """Read the run directories among `folders` and below them, each once, in their order.

    Raises:
        ValueError: a folder without a run, or a file that cannot be read, by name.
    """
    names: dict[Path, tuple[Path, str]] = {}  # resolved -> (folder, name below its root)
    for root in map(Path, folders):
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder; name run directories or folders of them.")
        run_folders = _run_folders(root)
        if not run_folders:
            raise ValueError(
                f"no run found in {root}; name the output_dir of runs, or folders that hold some "
                f"(a run has a {RESULTS_NAME}, or a checkpoint-N while it trains)."
            )
        for folder in run_folders:
            name = folder.relative_to(root).as_posix() if folder != root else root.resolve().name
            names.setdefault(folder.resolve(), (folder, name))
    uses = Counter(name for _, name in names.values())
    return [
        _read_run(folder, name if uses[name] == 1 else folder.as_posix())
        for folder, name in names.values()
    ]


def _run_folders(root: Path) -> list[Path]:
    run_folders = []
    for folder, below, files in os.walk(root):
        checkpoints = [name for name in below if _is_checkpoint(Path(folder, name))]
        if checkpoints or RESULTS_NAME in files or EXPERIMENT_NAME in files:
            run_folders.append(Path(folder))
        below[:] = sorted(
            name for name in below if name not in checkpoints and not name.startswith(".")
        )
    return run_folders


def _is_checkpoint(folder: Path) -> bool:
    return bool(re.fullmatch(r"checkpoint-\d+", folder.name)) and (folder / STATE_NAME).is_file()


def _read_run(folder: Path, name: str) -> Run:
    settings, results, history = {}, {}, []
    if (folder / EXPERIMENT_NAME).is_file():
        settings = _read_mapping(folder / EXPERIMENT_NAME)
    if (folder / HISTORY_NAME).is_file():
        history = _read_history(folder / HISTORY_NAME)
    if (folder / RESULTS_NAME).is_file():
        results = _read_results(folder / RESULTS_NAME)
        if not settings:
            raise ValueError(
                f"{folder} has {RESULTS_NAME} and no {EXPERIMENT_NAME}; "
                "copy the whole directory of the run."
            )
    if results.get("train") or results.get("eval"):
        missing = "" if results.get("eval") else "not evaluated"
    else:
        steps = [
            int(path.name.partition("-")[2]) for path in folder.iterdir() if _is_checkpoint(path)
        ]
        last = f"last checkpoint at step {max(steps)}" if steps else "no checkpoint"
        missing = f"running or stopped, {last}"
    return Run(name, folder, settings, results, history, missing)


def _read_results(file: Path) -> dict[str, Any]:
    results = _read_mapping(file)
    if not isinstance(results.get("task"), str):
        raise ValueError(
            f'{file} names no "task", as the results of a run do; add it, or leave {file.parent} '
            "out."
        )
    if not all(isinstance(results.get(part, {}), dict) for part in ("train", "eval", "data")):
        raise ValueError(
            f'{file}: "train", "eval" and "data" must be objects; '
            f"repeat the run, or leave {file.parent} out."
        )
    return results


def _read_mapping(file: Path) -> dict[str, Any]:
    content = read_file(file, f"repeat the run, or leave {file.parent} out")
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold names and values; leave {file.parent} out.")
    return content


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
            f"{file} is not the curve of a run ({error}); "
            f"repeat the run, or leave {file.parent} out."
        ) from error
    return rows


def evaluation_set(metric: str, ending: str) -> str:
    """The evaluation set in a metric's name: "eval_matched_accuracy" -> "matched"; "" for one."""
    return metric.removeprefix("eval_").removesuffix(ending).removesuffix("_")


def seed_groups(runs: "Sequence[Run]") -> tuple[list[list[Run]], list[str]]:
    """Group runs that differ only in the seed.

    Returns:
        The groups, many of one run, and notes on runs that look alike and yet stay single.
    """
    alike: dict[str, dict[str, list[Run]]] = {}  # settings -> conditions -> runs
    for run in runs:
        settings = {k: value for k, value in run.settings.items() if k not in _IGNORED_SETTINGS}
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
            conditions = [json.loads(text) for text in by_conditions]
            differ = [
                name for name in conditions[0] if len({str(each[name]) for each in conditions}) > 1
            ]
            names = ", ".join(run.name for run in together)
            notes.append(
                f"{names}: the same settings but for the seed, and another {', '.join(differ)}; "
                "not put together."
            )
    return groups, notes


def _conditions(run: Run) -> dict[str, Any]:
    """What seeds of one result share beside the settings. Not the training data: its order follows
    the seed.
    """
    conditions = {name: run.results.get(name) for name in _CONDITIONS}
    data = run.results.get("data", {})
    conditions["evaluation data"] = {k: value for k, value in data.items() if k.startswith("eval")}
    conditions["training rows"] = data.get("train_rows")
    return conditions


def mean_interval(values: "Sequence[float]") -> tuple[float, float]:
    """Mean of at least two values and half the width of its 95 % interval.

    Above 31 values the quantile of 30 degrees of freedom is used, at most 4 % too wide.
    """
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)
