"""CSV files that grow by one row at a time, and the conditions of a measurement in every row."""

import csv
import datetime
import importlib.metadata
import statistics
from collections.abc import Mapping
from pathlib import Path

CONDITIONS = ("date", "commit", "device", "torch", "triton", "transformers")
COLUMNS = (
    *CONDITIONS,
    *("op", "provider", "dtype", "batch", "heads", "length", "head_dim", "block_per_row", "mode"),
    *("pass", "ms_median", "ms_p20", "ms_p80", "peak_mb", "rel_error"),
)
#: The columns that identify a row of COLUMNS.
KEYS = COLUMNS[len(CONDITIONS) : COLUMNS.index("ms_median")]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Records:
    """A CSV file whose rows are on disk as soon as they are added."""

    def __init__(self, path: Path, columns: tuple[str, ...], keys: tuple[str, ...]):
        self.path, self.columns, self.keys = path, columns, keys
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(dict(zip(columns, columns, strict=True)))
        self._known = {self.key(row) for row in self.rows()}

    def rows(self) -> list[dict[str, str]]:
        return read_rows(self.path)

    def key(self, row: Mapping) -> tuple[str, ...]:
        return tuple("" if row.get(name) is None else str(row[name]) for name in self.keys)

    def has(self, row: Mapping) -> bool:
        return self.key(row) in self._known

    def add(self, row: Mapping) -> None:
        self._append(row)
        self._known.add(self.key(row))

    def _append(self, row: Mapping) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n", extrasaction="ignore")
            writer.writerow(row)


def timing_columns(milliseconds: list[float]) -> dict[str, float]:
    """The columns of the median and the percentiles 20 and 80."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return {
        "ms_median": round(statistics.median(ordered), 4),
        "ms_p20": round(ordered[int(0.2 * last)], 4),
        "ms_p80": round(ordered[round(0.8 * last)], 4),
    }


def conditions(device: str, threads: int) -> dict[str, str]:
    """Return date, commit, device and versions, the first columns of every row."""
    import torch

    from mra_hf.commands.env import processor_name
    from mra_hf.results.files import source_commit

    name = ", ".join((processor_name(), *_instruction_set(), f"{threads} threads"))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": source_commit("--untracked-files=no", ":/") or "",
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def _instruction_set() -> list[str]:
    """What the compiled CPU kernels run on here; none where they were not built."""
    from mra_attention.implementations import native_problem
    from mra_attention.native_impl.library import instruction_sets

    return instruction_sets()[:1] if native_problem() is None else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
