r"""Compare the predictions of two runs on the same examples, with a paired bootstrap.

Reads `predictions_SET.csv` of both run directories. Prints the accuracies, their difference and its
95 % interval. If the interval holds 0, the examples do not tell the runs apart.

example:
  mra-hf compare runs/mnli-mra runs/mnli-dense
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from mra_hf.results.comparison import paired_bootstrap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("first", type=Path, metavar="RUN", help="output_dir of a run with do_eval")
    parser.add_argument(
        "second", type=Path, metavar="OTHER", help="the run to compare with it, on the same data"
    )
    parser.add_argument(
        "--draws",
        type=int,
        metavar="N",
        default=10_000,
        help="bootstrap samples, 100 or more (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of the samples (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line per set of predictions that both runs have."""
    if args.draws < 100:
        raise ValueError(f"draws must be at least 100, got {args.draws}.")
    for folder in (args.first, args.second):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; name the output_dir of two runs.")
    names = [
        {path.name for path in folder.glob("predictions_*.csv")}
        for folder in (args.first, args.second)
    ]
    shared = sorted(names[0] & names[1])
    if not shared:
        raise ValueError(
            f"{args.first} and {args.second} have no predictions_SET.csv of the same set; "
            "both must be runs with do_eval on the same data."
        )
    header = f"{'set':<16}{'examples':>9}{'first':>9}{'second':>9}{'difference':>12}"
    lines = [f"{header}  95 % interval"]
    for name in shared:
        first_examples, first = _read(args.first / name)
        second_examples, second = _read(args.second / name)
        if first_examples != second_examples:
            raise ValueError(f"{name} of {args.first} and {args.second} are of other examples.")
        result = paired_bootstrap(first, second, draws=args.draws, seed=args.seed)
        lines.append(
            f"{name.removeprefix('predictions_').removesuffix('.csv'):<16}{result.n_examples:>9}"
            f"{first.mean():>9.1%}{second.mean():>9.1%}{result.difference:>+12.1%}  "
            f"{result.low:+.1%} to {result.high:+.1%}"
            f"{'' if result.is_certain else ' (not told apart)'}"
        )
    lines.append(
        "first, second: accuracy; difference: the first minus the second, in percentage points."
    )
    print("\n".join(lines))
    return 0


def _read(file: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Row and label of every example, and whether the prediction is right."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
    if not rows or not {"row", "label", "prediction"} <= set(rows[0]):
        raise ValueError(f"{file} must have the columns row, label, prediction.")
    right = np.array([row["label"] == row["prediction"] for row in rows])
    return [(row["row"], row["label"]) for row in rows], right
