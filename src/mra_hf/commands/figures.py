r"""Draw the figures and Table 7 of the MRA paper on heads of a checkpoint, or on synthetic ones.

Each figure becomes a picture, a table of its numbers, and a caption that compares the result with
the paper's.

example:
  mra-hf figures --out figures
  mra-hf figures --source roberta-base --text book.txt --out figures
  mra-hf figures --source heads.safetensors --only figure-5 --out figures
"""

import argparse
import sys
import time
from pathlib import Path

from mra_hf.commands.experiments import quiet_outside_terminals

#: The names of `mra_hf.analysis.figures.FIGURES`, without importing the functions that draw them.
NAMES = (*(f"figure-{number}" for number in range(1, 9)), "table-7", "locality", "selection")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--source",
        default="synthetic",
        help='"synthetic" (default), a file of mra-hf record, or a checkpoint: directory or hub id',
    )
    parser.add_argument(
        "--text",
        metavar="PATH",
        help="what the checkpoint reads: .txt or .jsonl file, or a folder (no default)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens, 128 or more (default: 512, or what was recorded)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help="figure-1 to figure-8, table-7, locality, selection (default: all, some minutes)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("figures"),
        help="folder to write to (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw the figures; print each caption once its figure is written."""
    if args.out.is_file():
        raise ValueError(f"out must be a folder, and {args.out} is a file.")
    is_recorded = Path(args.source).is_file()
    if args.text is not None and (is_recorded or args.source == "synthetic"):
        raise ValueError(
            f"--text is for a checkpoint, and --source is {args.source}; name a checkpoint with "
            "--source, or drop it."
        )
    if args.length is not None and is_recorded:
        raise ValueError(f"length is that of the recorded heads in {args.source}; drop it.")
    length = 512 if args.length is None else args.length
    if args.text is None and not is_recorded and args.source != "synthetic":
        raise ValueError(f"--source {args.source} is a checkpoint and needs --text to read.")
    from mra_hf.analysis.figures import check_length, draw  # slow to import; --help stays quick
    from mra_hf.analysis.head_inputs import load_heads, synthetic_heads
    from mra_hf.analysis.recording import record_checkpoint

    quiet_outside_terminals()
    if args.source == "synthetic":
        heads = synthetic_heads(length)
    elif is_recorded:
        heads = load_heads(args.source)
    else:
        heads = record_checkpoint(args.source, args.text, length=length)
    check_length(heads)
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.only or NAMES
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] drawing {name} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        caption = draw(name, heads, args.out)
        print(
            f"[{number}/{len(names)}, {time.perf_counter() - begin:.0f} s] {caption}\n", flush=True
        )
    print(f"written to {args.out}")
    return 0
