"""The files of a run directory: their names, the settings in force, and the log as rows."""

import csv
import dataclasses
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

if TYPE_CHECKING:
    import os

EXPERIMENT_NAME = "experiment.yaml"
RESULTS_NAME = "results.json"
HISTORY_NAME = "training_curve.csv"
PICTURE_NAME = "training_curve.png"
#: Written last by `Trainer` in a checkpoint folder.
STATE_NAME = "trainer_state.json"

#: Fields of `TrainingArguments` that it sets to False or empty when they are not given.
_FILLED_IN = frozenset(
    {"activation_checkpointing", "gradient_checkpointing", "disable_tqdm", "report_to", "debug"}
)

#: Endings of the entries in which `Trainer` reports the speed of an evaluation.
_SPEED = ("_runtime", "_per_second")


def save_experiment(path: "str | os.PathLike[str]", *arguments: Any) -> None:
    """Write `experiment_settings` to a YAML file that the command reads back."""
    write_text(path, yaml.safe_dump(experiment_settings(*arguments), sort_keys=False))


def experiment_settings(*arguments: Any) -> dict[str, Any]:
    """The settings of dataclasses by name.

    Of `TrainingArguments` only what differs from its defaults is kept, and never
    `resume_from_checkpoint`: a repetition starts from the beginning; nor `dataloader_pin_memory`,
    which follows the machine and changes no number.
    """
    settings: dict[str, Any] = {}
    for group in arguments:
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            if isinstance(value, AcceleratorConfig):
                value = None if value == AcceleratorConfig() else value.to_dict()
            if isinstance(group, TrainingArguments) and _is_default(item, value):
                continue
            if item.name in ("resume_from_checkpoint", "dataloader_pin_memory"):
                continue
            if item.init and isinstance(value, (str, int, float, bool, list, dict, type(None))):
                settings[item.name] = getattr(value, "value", value)  # an enum by its value
    return settings


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by name of the column as CSV; what no column has is left out."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_text(path: "str | os.PathLike[str]", text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_file(path: Path, remedy: str) -> Any:
    """The content of a file that a run wrote, YAML or JSON.

    Raises:
        ValueError: it cannot be read; the message ends with the `remedy`.
    """
    parse = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}.") from error


def source_commit(*status_options: str) -> str | None:
    """Return the commit of this package's source, "+" behind it where files differ; None if
    installed from a wheel.

    Args:
        status_options: options of `git status` that say which files count; by default all files
            of this package, untracked ones included.
    """
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel may lie in an environment inside somebody else's repository.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    return commit + "+" * bool(git("status", "--porcelain", *(status_options or (".",))))


def _is_default(item: dataclasses.Field, value: Any) -> bool:
    """Whether a field has its default value, or what `TrainingArguments` fills in for it.

    No second `TrainingArguments` is made to compare with: it would reset accelerate's state.
    """
    default = item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    return value == default or (item.name in _FILLED_IN and not value)


def write_predictions(
    path: "str | os.PathLike[str]", rows: Iterable[tuple[object, str, str]]
) -> None:
    """Write CSV with the columns row, label and prediction, which `mra-hf compare` reads."""
    columns = ("row", "label", "prediction")
    write_text(path, csv_text(columns, (dict(zip(columns, row, strict=True)) for row in rows)))


def write_history(
    history: Sequence[dict[str, float]], path: "str | os.PathLike[str]"
) -> list[dict[str, float]]:
    """Write the log of a `Trainer` as CSV, a row per step, and return the rows.

    The columns are what training logs, the share of the tokens that a router sent to each head
    ("share_..."), and every metric of the evaluations without their speed.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        if "train_runtime" not in entry:
            rows.setdefault(int(entry["step"]), {}).update(entry)
    logged = {name for row in rows.values() for name in row}
    columns = ["step", "epoch", "loss", "learning_rate", "grad_norm"]
    columns += sorted(name for name in logged if name.startswith("share_"))
    columns += sorted(
        name for name in logged if name.startswith("eval_") and not name.endswith(_SPEED)
    )
    in_order = [rows[step] for step in sorted(rows)]
    write_text(path, csv_text(columns, in_order))
    return in_order
