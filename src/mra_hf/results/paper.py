"""Results of the MRA paper (arXiv 2207.10284, ICML 2022), Tables 1 to 4, as data, beside ours.

A row is one result of one model, all figures in percent. A run that repeats a row gives the row's
name as its `paper_row`: "table1/base-512/mra2-4/mnli". Only the methods of this package are here:
dense softmax attention, MRA-2 and MRA-2-s. None stands for a figure that is not recorded.
"""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mra_hf.results.files import RESULTS_NAME
from mra_hf.results.runs import Run, seed_groups
from mra_hf.results.tables import markdown_table, mean_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: result -> task of a run, and the metrics of its evaluation that compare with the figures.
RESULTS = {
    "mlm-before": ("masked-lm", ("eval_accuracy",)),
    "mlm": ("masked-lm", ("eval_accuracy",)),
    "mnli": ("classification", ("eval_matched_accuracy", "eval_mismatched_accuracy")),
    "wikihop": ("wikihop", ("eval_accuracy",)),
}

#: What the results are, for a reader of the table.
RESULT_NAMES = {
    "mlm-before": "masked LM, before further training",
    "mlm": "masked LM",
    "mnli": "MNLI, matched / mismatched",
    "wikihop": "WikiHop",
}

#: `approx_mode` of a run -> attention of a row; dense attention has no mode.
ATTENTION_OF_MODE = {None: "dense", "full": "mra2", "sparse": "mra2_s"}

#: size -> least and most parameters; other heads and positions change it by a few percent.
_PARAMETERS = {"base": (120e6, 130e6), "small": (12e6, 16e6)}

#: result -> least rows of its training set; a smaller set is not the paper's.
_TRAINING_ROWS = {"mnli": 390_000, "wikihop": 43_000}

# (table, size, tokens) -> {(attention, blocks per row): {result: figures}}
_TABLES: dict[tuple, dict[tuple, dict[str, tuple[float | None, ...]]]] = {
    (1, "base", 512): {
        ("dense", None): {"mlm-before": (73.1,), "mlm": (74.0,), "mnli": (87.4, 87.3)},
        ("mra2", 4): {"mlm-before": (68.9,), "mlm": (73.1,), "mnli": (86.8, 87.1)},
        ("mra2", 8): {"mlm-before": (71.9,), "mlm": (73.8,), "mnli": (87.1, 87.2)},
        ("mra2_s", 4): {"mlm-before": (67.2,), "mlm": (72.8,), "mnli": (87.0, 87.0)},
        ("mra2_s", 8): {"mlm-before": (71.8,), "mlm": (73.8,), "mnli": (87.4, 87.4)},
    },
    (2, "small", 512): {
        ("dense", None): {"mlm": (57.0,), "mnli": (72.7, 73.8)},
        ("mra2", 4): {"mlm": (56.4,), "mnli": (73.2, None)},
        ("mra2", 8): {"mlm": (57.3,), "mnli": (73.0, None)},
        ("mra2_s", 4): {"mlm": (56.7,), "mnli": (73.6, None)},
        ("mra2_s", 8): {"mlm": (57.5,), "mnli": (73.9, None)},
    },
    (3, "base", 4096): {
        ("dense", None): {"mlm": (74.3,), "wikihop": (74.6,)},
        ("mra2", 8): {"mlm": (73.1,), "wikihop": (71.2,)},
        ("mra2", 16): {"mlm": (73.7,), "wikihop": (73.4,)},
        ("mra2_s", 8): {"mlm": (73.0,), "wikihop": (71.8,)},
        ("mra2_s", 16): {"mlm": (73.8,), "wikihop": (74.1,)},
    },
    (4, "small", 4096): {
        ("dense", None): {"mlm": (55.8,), "wikihop": (54.6,)},
        ("mra2", 8): {"mlm": (54.2,), "wikihop": (None,)},
        ("mra2", 16): {"mlm": (55.2,), "wikihop": (52.6,)},
        ("mra2_s", 8): {"mlm": (53.8,), "wikihop": (51.8,)},
        ("mra2_s", 16): {"mlm": (55.1,), "wikihop": (53.6,)},
    },
}


@dataclass(frozen=True)
class PaperRow:
    """One result of one model of the paper."""

    table: int
    size: str
    tokens: int
    attention: str
    blocks: int | None
    result: str
    figures: tuple[float | None, ...]

    @property
    def name(self) -> str:
        """What a run gives as `paper_row`."""
        attention = self.attention if self.blocks is None else f"{self.attention}-{self.blocks}"
        return f"table{self.table}/{self.size}-{self.tokens}/{attention}/{self.result}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of a run's evaluation that compare with `figures`."""
        return RESULTS[self.result][1]


#: name -> row, in the order of the paper.
PAPER_ROWS = {
    row.name: row
    for (table, size, tokens), models in _TABLES.items()
    for (attention, blocks), results in models.items()
    for result, figures in results.items()
    for row in [PaperRow(table, size, tokens, attention, blocks, result, figures)]
}


def check_paper_row(
    name: str, results: "Mapping[str, Any]", settings: "Mapping[str, Any]"
) -> PaperRow:
    """Return the row that a run says it repeats, once its conditions are checked against the row.

    Args:
        name: the run's `paper_row`.
        results: what its `results.json` holds.
        settings: what its `experiment.yaml` holds.

    Raises:
        ValueError: no such row, or a run of another kind, size or amount of data.
    """
    if name not in PAPER_ROWS:
        near = difflib.get_close_matches(str(name), PAPER_ROWS, 3) or list(PAPER_ROWS)[:3]
        raise ValueError(f"paper_row {name!r} is not a row of the paper; such are {near}.")
    row = PAPER_ROWS[name]
    mode = results.get("approx_mode")
    # what -> (the row's, the run's)
    compared = {
        "task": (RESULTS[row.result][0], results.get("task")),
        "attention": (row.attention, ATTENTION_OF_MODE.get(mode, mode)),
        "block_per_row": (row.blocks, results.get("block_per_row")),
        "max_seq_length": (row.tokens, results.get("max_seq_length")),
        "max_train_samples": (None, settings.get("max_train_samples")),
    }
    if row.result in _TRAINING_ROWS:  # held-out text for masked LM has no natural size
        compared["max_eval_samples"] = (None, settings.get("max_eval_samples"))
    if row.result == "mlm-before":
        compared["trained"] = (False, "train" in results)
    parameters = results.get("parameters") or 0
    least, most = _PARAMETERS[row.size]
    if not least <= parameters <= most:
        compared["parameters"] = (f"{least / 1e6:.0f} to {most / 1e6:.0f} million", parameters)
    rows, least = results.get("data", {}).get("train_rows"), _TRAINING_ROWS.get(row.result, 0)
    if rows is not None and rows < least:
        compared["training rows"] = (f"{least} or more", rows)
    for what, (of_row, of_run) in compared.items():
        if of_run != of_row:
            raise ValueError(
                f"paper_row {name!r} has {what} {of_row!r} and the run {of_run!r}; "
                "give the run the row it repeats, or none."
            )
    return row


def paper_table(runs: "Sequence[Run]") -> str:
    """A line per result of the paper as Markdown: the paper's figures, ours, or "not run".

    Raises:
        ValueError: a run names a row that does not exist, or that it does not repeat.
    """
    repeated: dict[str, list[Run]] = {}
    for run in runs:
        if run.paper_row and run.results:
            try:
                row = check_paper_row(run.paper_row, run.results, run.settings)
            except ValueError as error:
                raise ValueError(f"{run.folder / RESULTS_NAME}: {error}") from error
            if not run.missing:
                if not set(row.metrics) <= set(run.metrics):
                    raise ValueError(
                        f"{run.folder / RESULTS_NAME}: paper_row {row.name!r} needs "
                        f"{' and '.join(row.metrics)}; evaluate on these sets."
                    )
                repeated.setdefault(row.name, []).append(run)
    rows = []
    for row in PAPER_ROWS.values():
        groups, _ = seed_groups(repeated.get(row.name, []))
        paper = " / ".join("?" if figure is None else f"{figure:.1f}" for figure in row.figures)
        rows.append(
            (
                *(row.table, row.size, row.tokens, row.attention, row.blocks),
                *(RESULT_NAMES[row.result], paper),
                "; ".join(_ours(row, group) for group in groups) or "not run",
                ", ".join(run.name for group in groups for run in group),
                row.name,
            )
        )
    columns = (
        *("table", "size", "tokens", "attention", "blocks", "result", "paper", "ours", "runs"),
        "paper_row",
    )
    return (
        "Accuracy in percent, Tables 1 to 4 of arXiv 2207.10284. Ours is a run that names the row "
        "in its paper_row, with its task, attention, length and size of model, on the whole of the "
        "data. Stand-in data never fill a row of the paper; a run without paper_row is never "
        "matched. Several seeds: mean ± 95 % interval. ?: a figure not recorded here.\n\n"
        + markdown_table(columns, rows)
    )


def _ours(row: PaperRow, group: "Sequence[Run]") -> str:
    figures = " / ".join(mean_text(group, metric, 100, 1) for metric in row.metrics)
    return f"{figures} (n = {len(group)})" if len(group) > 1 else figures
