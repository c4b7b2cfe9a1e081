"""The tables of the guide on embeddings are those of the rows."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide" / "embedding.md"


def rows_over_everything(table):
    with (ROOT / "benchmarks" / "results" / table).open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["set"], row["part"]) == ("both", "all")]


def numbers_of_the_guide(heading):
    """The numbers of each row of the table whose first line begins with `heading`."""
    table = GUIDE.read_text().split(f"\n| {heading} |")[1].split("\n\n")[0]
    cells = [line.split("|")[2:] for line in table.splitlines()[2:]]
    return [[float(number) for number in re.findall(r"-?\d\.\d+", "|".join(row))] for row in cells]


def numbers_of_the_row(row, *names):
    return pytest.approx([float(row[name]) for name in names], abs=6e-4)  # three digits are shown


DIFFERENCE = ("mrr_difference", "mrr_difference_low", "mrr_difference_high")


def test_the_retrieval_table_is_that_of_the_rows():
    rows = {row["system"]: row for row in rows_over_everything("retrieval.csv")}
    systems = ("first_512", "chunks", "mra2_16_first1", "mra2_8_first1", "dense")
    table = numbers_of_the_guide("one vector per document")
    for system, numbers in zip(systems, table, strict=True):
        difference = () if system == "chunks" else DIFFERENCE
        assert numbers == numbers_of_the_row(rows[system], "recall_1", "mrr", *difference)


def test_the_table_of_training_is_that_of_the_rows():
    rows = {
        (row["system"], row["step"]): row for row in rows_over_everything("embedding_training.csv")
    }
    chunks, converted, difference = numbers_of_the_guide("MRR | before")
    for column, step in enumerate(("0", "20")):
        assert [chunks[column]] == numbers_of_the_row(rows["chunks", step], "mrr")
        assert [converted[column]] == numbers_of_the_row(rows["mra2", step], "mrr")
        shown = difference[3 * column : 3 * column + 3]
        assert shown == numbers_of_the_row(rows["mra2", step], *DIFFERENCE)
