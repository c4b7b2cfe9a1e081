"""The page on narrow key blocks shows the tables of its rows."""

from pathlib import Path

from benchmarks.key_blocks import OUT, Tables
from benchmarks.records import read_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiments" / "key_blocks" / "README.md"


def test_the_tables_are_those_of_the_rows():
    tables, page = Tables(read_rows(OUT)), PAGE.read_text(encoding="utf-8")
    for table in (tables.heads(), tables.times(), tables.states(), tables.losses()):
        assert table in page
