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
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    for split, size in (("train", 2400), ("dev", 100), ("test", 600)):
        text = f"its {split} questions (default: {size})"
        parser.add_argument(
            f"--{split}", type=int, default=size, dest=f"n_{split}", metavar="N", help=text
        )
    parser.add_argument(
        "--hops", type=int, default=2, choices=(1, 2), help="glosses to join (default: 2)"
    )
    text = "answers to choose from (default: 8)"
    parser.add_argument(
        "--candidates", type=int, default=8, dest="n_candidates", metavar="N", help=text
    )
    words: dict[str, Any] = {
        "type": int,
        "nargs": 2,
        "default": (800, 1100),
        "metavar": ("MIN", "MAX"),
    }
    text = "length of the documents of a question, in words (default: 800 1100)"
    parser.add_argument("--words", **words, help=text)
    text = "questions of a split with the same answer (default: 12)"
    parser.add_argument("--max-per-answer", type=int, default=12, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of all choices (default: 0)")
    parser.add_argument("--packages", type=Path, help="folder of packages already downloaded")


def run(args: argparse.Namespace) -> int:
    """Build the data set and print what it holds."""
    manifest = build_wordnet_hop(**vars(args))
    print(f"{'split':<8}{'questions':>10}{'answers':>10}{'of chains':>11}")
    for split, row in manifest["splits"].items():
        print(f"{split:<8}{row['instances']:>10}{row['answers']:>10}{row['chains']:>11}")
    print(f"written to {args.output}: train.json, dev.json, test.json, manifest.json")
    return 0
