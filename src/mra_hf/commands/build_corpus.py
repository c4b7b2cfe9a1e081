"""Build the English corpus of the embedded checkpoint, and a tokenizer for it.

The text is in the public domain or permissively licensed. It comes from Debian packages, which are
downloaded; this needs Debian or Ubuntu, but no root.

example:
  mra-hf build-corpus corpus/english
"""

import argparse
from pathlib import Path

from mra_hf.data.corpus import build_english_corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="folder to write; it must not exist"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        default=6144,
        help="tokens of the tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="folder that keeps the .deb files; those that lie there are not downloaded again "
        "(default: a temporary one)",
    )


def run(args: argparse.Namespace) -> int:
    """Build the corpus and print what it holds."""
    manifest = build_english_corpus(
        args.output, vocab_size=args.vocab_size, packages=args.packages, progress=True
    )
    print(f"{'package':<20}{'version':<16}{'documents':>10}{'characters':>12}{'held out':>10}")
    for row in manifest["sources"]:
        print(
            f"{row['package']:<20}{row['version'][:15]:<16}{row['train']['documents']:>10}"
            f"{row['train']['characters']:>12}{row['heldout']['characters']:>10}"
        )
    print(f"written to {args.output}: train/, heldout/, tokenizer/, manifest.json")
    return 0
