"""Texts and pairs of texts with a label: MNLI and data of its form, from files or by name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset

from mra_hf.data.hub import fetching
from mra_hf.data.tables import KINDS, read_table

#: Columns that are recognised, most specific first.
TEXT_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_A", "sentence_B"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
LABEL_COLUMNS = ("gold_label", "label", "entailment_judgment")

#: Labels whose order is settled; others come in alphabetical or numerical order.
KNOWN_LABELS = (
    ("entailment", "neutral", "contradiction"),
    ("entailment", "not_entailment"),
    ("negative", "positive"),
)

#: The marks of rows whose annotators did not agree (MNLI, SNLI), or whose label is held back.
NO_LABEL = ("-", -1)
#: -1 as the name of a class.
MINUS_ONE = "-1"


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Args:
        texts: one or two names; empty: the first of `TEXT_COLUMNS` that the data has.
        label: a name; None: the first of `LABEL_COLUMNS` that the data has.
    """

    texts: tuple[str, ...] = ()
    label: str | None = None

    def among(self, names: Iterable[str], where: str) -> "Columns":
        """These columns, looked up among `names`.

        Raises:
            ValueError: a column is missing; the message says `where`.
        """
        names = list(names)
        texts, label = self.texts, self.label
        if not texts:
            texts = next((some for some in TEXT_COLUMNS if set(some) <= set(names)), ())
        if label is None:
            label = next((name for name in LABEL_COLUMNS if name in names), None)
        missing = [name for name in (*texts, label) if name is not None and name not in names]
        if missing or not texts or label is None:
            missing = missing or ["text_columns"] * (not texts) + ["label_column"] * (label is None)
            raise ValueError(
                f"{where} has no column for {', '.join(map(repr, missing))}; it has {names}. "
                "Name them with --text_columns (one or two) and --label_column."
            )
        return Columns(tuple(texts), label)


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of one file or split.

    Args:
        texts: tuples of one or two texts.
        labels: a label for each, as the data has it.
        origins: where each row comes from: a file or split, and the number of its line or row.
        label_names: the names of the labels, if the data set declares them.
        without_label: rows left out because they have no label.
        without_text: rows left out because a text is empty.
        faulty: rows left out because they cannot be read.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any]
    origins: list[tuple[str, int]]
    label_names: tuple[str, ...] | None = None
    without_label: int = 0
    without_text: int = 0
    faulty: int = 0

    def select(self, rows: Sequence[int] | np.ndarray) -> "LabelledTexts":
        """The rows of these indices."""
        return LabelledTexts(
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            [self.origins[row] for row in rows],
            self.label_names,
        )


def read_files(
    files: Sequence[str],
    columns: Columns,
    *,
    skip_faulty: bool = False,
    declared: Sequence[str] = (),
) -> LabelledTexts:
    """Read tables (see `mra_hf.data.tables.read_table`) one after another.

    Args:
        files: paths.
        columns: which to read.
        skip_faulty: leave faulty rows out and count them, also those with a label of -1 beside 0
            to n, which is how data sets mark rows without one.
        declared: labels that the user named, none of which marks a row without label.

    Raises:
        ValueError: a file that cannot be read, no such column, or a row with an empty text or no
            label; the message gives file and line.
    """
    texts, labels, origins = [], [], []
    count: Counter[str] = Counter()

    def skip(fault: str) -> None:
        count["faulty"] += 1

    for file in files:
        present = None
        for line, row in read_table(file, skip if skip_faulty else None):
            where = f"{file}, line {line}"
            if present is None:
                present = columns.among(row, where)
            values: tuple[Any, ...] = tuple(row.get(name) for name in present.texts)
            label = None if present.label is None else row.get(present.label)
            label = label.strip() if isinstance(label, str) else label
            kind, fault = _fault_of(present, values, label)
            if fault and not skip_faulty:
                raise ValueError(f"{where}: {fault}")
            if fault or label == "-":  # MNLI's mark of pairs that its annotators did not agree on
                count[kind or "without_label"] += 1
                continue
            texts.append(values)
            labels.append(label)
            origins.append((f"{file}, line", line))
    rows = LabelledTexts(texts, labels, origins, None, **count)
    return _drop_minus_one(rows) if skip_faulty and MINUS_ONE not in declared else rows


def _fault_of(columns: Columns, values: tuple, label: Any) -> tuple[str | None, str]:
    """Under what a row of a file is counted if it is left out, and what is wrong with it."""
    for name, value in zip(columns.texts, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            return "without_text", f"column {name!r} is empty or no text."
    if label is None or label == "":
        return "without_label", f"column {columns.label!r} is empty."
    fault = _fault_of_label(columns, label)
    return ("faulty", fault) if fault else (None, "")


def _fault_of_label(columns: Columns, label: Any) -> str:
    """What is wrong with a label that is there: a number to predict, or several."""
    if isinstance(label, (float, list, dict)):
        return f"column {columns.label!r} must be a class, a text or an integer, got {label!r}."
    return ""


def _marks_missing(labels: Iterable[Any]) -> bool:
    """Whether the labels are the numbers 0 to n, n at least 1, and -1 beside them."""
    names = {str(label) for label in labels}
    others = names - {MINUS_ONE}
    is_range = len(others) > 1 and others == {str(number) for number in range(len(others))}
    return MINUS_ONE in names and is_range


def _drop_minus_one(rows: LabelledTexts) -> LabelledTexts:
    """Leave out, counted, the rows with a label of -1 where it marks rows without one."""
    if not _marks_missing(rows.labels):
        return rows
    named = [index for index, label in enumerate(rows.labels) if str(label) != MINUS_ONE]
    without_label = rows.without_label + len(rows.labels) - len(named)
    return replace(
        rows.select(named),
        without_label=without_label,
        without_text=rows.without_text,
        faulty=rows.faulty,
    )


def note_minus_one(sets: Iterable[LabelledTexts], declared: Sequence[str]) -> str | None:
    """A sentence on rows of files with the label -1 beside 0 to n; None where there are none."""
    labels = [label for texts in sets for label in texts.labels]
    if MINUS_ONE in declared or not _marks_missing(labels):
        return None
    count = sum(str(label) == MINUS_ONE for label in labels)
    return (
        f"{count} rows have the label -1 beside 0 to {len(set(map(str, labels))) - 2}, which makes "
        "it a class of its own. Where it marks rows without a label, as in data sets of the hub, "
        "pass --skip_faulty_rows true to leave them out."
    )


def read_split(
    name: str,
    config_name: str | None,
    split: str,
    columns: Columns,
    declared: Sequence[str] = (),
) -> LabelledTexts:
    """Read a split of a data set by its name ("nyu-mll/multi_nli", or "glue" with "mnli"). Rows
    without a label (-1, unless it is among the `declared` ones) or with an empty text are left out
    and counted.

    Raises:
        ValueError: no such split or column, or a label that is no class, text or integer.
    """
    with fetching(name):
        data = load_dataset(name, config_name, split=split)
    where = f"split {split!r} of {name}"
    columns = columns.among(data.column_names, where)
    feature = data.features[columns.label]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    is_class = names is None and MINUS_ONE in declared
    no_label = (None, "", "-") if is_class else (None, "", *NO_LABEL)
    texts, labels, origins = [], [], []
    count: Counter[str] = Counter()
    for number, row in enumerate(data.select_columns([*columns.texts, columns.label])):
        values = tuple(row[column] for column in columns.texts)
        label = row[columns.label]
        label = label.strip() if isinstance(label, str) else label
        if fault := _fault_of_label(columns, label):
            raise ValueError(f"{where}, row {number}: {fault}")
        if label in no_label:
            count["without_label"] += 1
        elif not all(isinstance(value, str) and value.strip() for value in values):
            count["without_text"] += 1
        else:
            texts.append(values)
            labels.append(names[int(label)] if names else label)
            origins.append((f"{where}, row", number))
    rows = LabelledTexts(texts, labels, origins, names, **count)
    return rows if names or is_class else _drop_minus_one(rows)


def left_out(sets: Mapping[str, LabelledTexts]) -> str | None:
    """A line on the rows of all sets that were left out; None if there are none."""
    sums = {
        "with an empty text": sum(rows.without_text for rows in sets.values()),
        "without a label": sum(rows.without_label for rows in sets.values()),
        "that cannot be read": sum(rows.faulty for rows in sets.values()),
    }
    parts = [f"{count} rows {what}" for what, count in sums.items() if count]
    return f"Left out: {', '.join(parts)}." if parts else None


def label_names(sets: Iterable[LabelledTexts]) -> tuple[str, ...]:
    """The labels of all sets in their order: as declared, as settled for a task, or sorted.

    Raises:
        ValueError: all labels of a known task and others besides, which are most likely slips.
    """
    sets = list(sets)
    for texts in sets:
        if texts.label_names is not None:
            return texts.label_names
    labels = {label for texts in sets for label in texts.labels}
    lowered = {str(label).lower() for label in labels}
    for known in KNOWN_LABELS:
        if lowered == set(known):
            # Each in one spelling: the known one if some row has it, else the rows' own.
            spelled = {label.lower(): label for label in sorted(map(str, labels))}
            return tuple(spelled[label] for label in known)
    for known in KNOWN_LABELS:
        if lowered > set(known):
            _refuse_label(sets, known, "; mend it, or declare all with --labels")
    if all(isinstance(label, int) for label in labels):
        return tuple(str(label) for label in sorted(labels))
    return tuple(sorted(str(label) for label in labels))


def _refuse_label(sets: Iterable[LabelledTexts], names: Sequence[str], remedy: str = "") -> None:
    """Raise a `ValueError` for the first label that is none of `names`, if there is one."""
    lowered = {name.lower() for name in names}
    for texts in sets:
        for label, (where, number) in zip(texts.labels, texts.origins, strict=True):
            if str(label).lower() not in lowered:
                raise ValueError(
                    f"{where} {number}: label {label!r} is none of {list(names)}{remedy}."
                )


def to_dataset(rows: LabelledTexts, names: Sequence[str], where: str) -> Dataset:
    """A `Dataset` with the columns "text", "pair" (None if there is none) and "label", a number.

    Raises:
        ValueError: a label that is none of `names`, or no rows; `where` says in what.
    """
    numbers = {name.lower(): number for number, name in enumerate(names)}
    _refuse_label([rows], names)
    if not rows.labels:
        raise ValueError(f"{where} holds no rows with a label.")
    return Dataset.from_dict(
        {
            "text": [texts[0] for texts in rows.texts],
            "pair": [texts[1] if len(texts) == 2 else None for texts in rows.texts],
            "label": [numbers[str(label).lower()] for label in rows.labels],
        }
    )


def set_name(source: str) -> str:
    """The name of the set that `source`, a file or split, holds: "matched", "mismatched", ..."""
    stem = Path(source).name.lower().removesuffix(".gz").removesuffix(".xz")
    for suffix in KINDS:
        stem = stem.removesuffix(suffix)
    for name in ("mismatched", "matched"):
        if name in stem:
            return name
    return "".join(mark if mark.isalnum() else "_" for mark in stem)
