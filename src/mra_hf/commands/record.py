r"""Record the queries, keys and values of all heads of a checkpoint that reads text.

The file is an input of `mra-hf figures` and of `mra_hf.analysis`. The checkpoint attends densely
while it reads.

example:
  mra-hf record roberta-base book.txt heads.safetensors --length 512
"""

import argparse
from pathlib import Path

from mra_hf.commands.experiments import quiet_outside_terminals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_reading_arguments(parser)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="file to write (.safetensors); it must not exist"
    )


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which checkpoint reads what."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory or hub id of an encoder"
    )
    parser.add_argument("text", metavar="TEXT", help=".txt or .jsonl file, or a folder of them")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        default=512,
        help="tokens of a chunk of text (default: %(default)s)",
    )
    parser.add_argument(
        "--texts",
        type=int,
        metavar="N",
        default=2,
        help="chunks that are read (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Record the heads and print their sizes."""
    check_new_file(args.out)
    from mra_hf.analysis.recording import record_checkpoint  # slow to import; --help stays quick

    quiet_outside_terminals()
    heads = record_checkpoint(args.checkpoint, args.text, length=args.length, texts=args.texts)
    heads.save(args.out)
    instances, count, length, dim = heads.query.shape
    print(
        f"{instances} layers (of {args.texts} texts), {count} heads, {length} tokens, head dim "
        f"{dim}: written to {args.out} ({args.out.stat().st_size / 2**20:.0f} MiB)"
    )
    return 0


def check_new_file(out: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        ValueError: it exists, or its folder does not.
    """
    if out.exists():
        raise ValueError(f"OUT (--out) {out} exists; name another file, or remove it first.")
    if not out.parent.is_dir():
        raise ValueError(f"OUT (--out) {out} is in no folder that exists; make {out.parent} first.")
