"""Build WordNet-Hop: two-hop questions over many short documents, in WikiHop's schema.

The documents are glosses of WordNet, which comes from a Debian package. The package is downloaded;
this needs Debian or Ubuntu, but no root.

example:
  mra-hf build-wordnet-hop wordnet-hop
"""

import argparse
from pathlib import Path
from typing import Any

from mra_hf.data.wordnet_hop import build_wordnet_hop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="folder to write; it must not exist"
    )
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    for split, size in (("train", 2400), ("dev", 100), ("test", 600)):
        text = f"questions of {split}.json (default: {size})"
        parser.add_argument(f"--{split}", **number, default=size, dest=f"n_{split}", help=text)
    parser.add_argument(
        "--hops", type=int, default=2, choices=(1, 2), help="glosses to join (default: 2)"
    )
    text = "answers to choose from (default: 8)"
    parser.add_argument("--candidates", **number, default=8, dest="n_candidates", help=text)
    parser.add_argument(
        "--words",
        type=int,
        nargs=2,
        default=(800, 1100),
        metavar=("MIN", "MAX"),
        help="length of the documents of a question, in words (default: 800 1100)",
    )
    text = "questions of a split with the same answer (default: 12)"
    parser.add_argument("--max-per-answer", **number, default=12, help=text)
    parser.add_argument("--seed", **number, default=0, help="of all choices (default: 0)")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="folder that keeps the .deb file; one that lies there is not downloaded again "
        "(default: a temporary one)",
    )


def run(args: argparse.Namespace) -> int:
    """Build the data set and print what it holds."""
    manifest = build_wordnet_hop(**vars(args))
    print(f"{'split':<8}{'questions':>10}{'answers':>10}{'of chains':>11}")
    for split, row in manifest["splits"].items():
        print(f"{split:<8}{row['instances']:>10}{row['answers']:>10}{row['chains']:>11}")
    print(f"written to {args.output}: train.json, dev.json, test.json, manifest.json")
    return 0
