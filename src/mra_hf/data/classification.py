"""Texts and pairs of texts with a label: MNLI and data of its form, from files or by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """

    texts: list[tuple[str, ...]]
    labels: list[Any]
    origins: list[tuple[str, int]]
    label_names: tuple[str, ...] | None = None
    without_label: int = 0

    def select(self, rows: Sequence[int]) -> "LabelledTexts":
        """The rows of these indices."""
        return LabelledTexts(
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            [self.origins[row] for row in rows],
            self.label_names,
        )


def read_files(files: Sequence[str], columns: Columns) -> LabelledTexts:
    """Read tables (see `mra_hf.data.tables.read_table`) one after another.

    Raises:
        ValueError: a file that cannot be read, no such column, or a row with an empty text or no
            label; the message gives file and line.
    """
    texts, labels, origins, without_label = [], [], [], 0
    for file in files:
        present = None
        for line, row in read_table(file):
            where = f"{file}, line {line}"
            if present is None:
                present = columns.among(row, where)
            values = tuple(row.get(name) for name in present.texts)
            for name, value in zip(present.texts, values, strict=True):
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{where}: column {name!r} is empty or no text.")
            label = row.get(present.label)
            label = label.strip() if isinstance(label, str) else label
            if label is None or label == "":
                raise ValueError(f"{where}: column {present.label!r} is empty.")
            if isinstance(label, (float, list, dict)):
                raise ValueError(
                    f"{where}: column {present.label!r} must be a class, a text or an integer, "
                    f"got {label!r}."
                )
            if label == "-":  # MNLI's mark of pairs that its annotators did not agree on
                without_label += 1
                continue
            texts.append(values)
            labels.append(label)
            origins.append((f"{file}, line", line))
    return LabelledTexts(texts, labels, origins, None, without_label)


def read_split(name: str, config_name: str | None, split: str, columns: Columns) -> LabelledTexts:
    """Read a split of a data set by its name ("nyu-mll/multi_nli", or "glue" with "mnli").

    Raises:
        ValueError: no such split or column, or an empty text.
    """
    with fetching(name):
        data = load_dataset(name, config_name, split=split)
    where = f"split {split!r} of {name}"
    columns = columns.among(data.column_names, where)
    feature = data.features[columns.label]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    texts, labels, origins, without_label = [], [], [], 0
    for number, row in enumerate(data.select_columns([*columns.texts, columns.label])):
        values = tuple(row[column] for column in columns.texts)
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise ValueError(f"{where}, row {number}: a text is empty.")
        label = row[columns.label]
        if label in NO_LABEL:
            without_label += 1
            continue
        texts.append(values)
        labels.append(names[label] if names else label)
        origins.append((f"{where}, row", number))
    return LabelledTexts(texts, labels, origins, names, without_label)


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
