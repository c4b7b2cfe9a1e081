"""Put run directories into one table (Markdown and CSV) and their curves into one picture per task.

A run directory is the output_dir of a run-* command. Runs that differ only in the seed also get a
mean and a 95 % interval; several attentions on a task of the Long Range Arena get a score of speed,
memory and accuracy.

example:
  mra-hf results runs --out results
"""

import argparse
from pathlib import Path

from mra_hf.results.curves import plot_curves
from mra_hf.results.files import write_text
from mra_hf.results.paper import paper_table
from mra_hf.results.runs import find_runs
from mra_hf.results.smat import smat_table
from mra_hf.results.tables import runs_csv, runs_table, seeds_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="run directories, or folders to search for them"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results"),
        help="folder for results.md, results.csv and curves_TASK.png (default: %(default)s)",
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="add the paper's tables, beside the runs that name a row of them (paper_row)",
    )


def run(args: argparse.Namespace) -> int:
    """Read the runs, write tables and pictures, and print the Markdown."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out must be a folder, and {args.out} is a file.")
    runs = find_runs(args.folders)
    parts = {
        "Runs": runs_table(runs),
        "Several seeds": seeds_table(runs),
        "Speed, memory, accuracy": smat_table(runs),
    }
    if args.paper:
        parts["The paper and our runs"] = paper_table(runs)
    text = "\n".join(f"# {title}\n\n{part}" for title, part in parts.items() if part)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "results.csv", runs_csv(runs))
    written = ["results.md", "results.csv"]
    for task in sorted({run.task for run in runs if run.history and run.task}):
        name = f"curves_{task}.png"
        with_curve = [run for run in runs if run.task == task and run.history]
        plot_curves(with_curve, args.out / name, task)
        written.append(name)
    write_text(args.out / "results.md", text)
    print(text)
    print(f"written to {args.out}: {', '.join(written)}")
    return 0
