"""Turn a checkpoint into one with multi-resolution attention and a longer position table.

SOURCE keeps its weights and its head, and what else is in a directory of sentence-transformers.
OUT gets weights, config, tokenizer, a model card and a report. A model of this package as SOURCE is
made longer.

example:
  mra-hf convert FacebookAI/roberta-base roberta-base-mra-4096 --text novel.txt
"""

import argparse
import json
import shlex
import sys

from mra_attention.selection import SELECTION_RULES
from mra_hf.conversion import DTYPES, convert_checkpoint
from mra_hf.conversion.report import ConversionReport
from mra_hf.conversion.sources import SOURCE_TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mra-hf convert`."""
    types = ", ".join(SOURCE_TYPES)
    parser.add_argument("source", metavar="SOURCE", help=f"directory or hub id of type {types}")
    parser.add_argument("output_dir", metavar="OUT", help="directory to write")
    _add_usual_arguments(parser.add_argument_group("most used options"))
    _add_block_arguments(
        parser.add_argument_group(
            "which blocks are exact (default for a SOURCE of type mra or mra_hf: its own)"
        )
    )
    _add_bias_arguments(parser.add_argument_group("what tells far tokens from near ones"))


def _add_usual_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        default=4096,
        help="longest sequence, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--block-per-row",
        type=int,
        metavar="N",
        help="exact blocks per block row: 8 if you train further, 16 to use the model as it is "
        "(default: 8; SOURCE of type mra or mra_hf: its own)",
    )
    group.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text on which source and result are compared: masked tokens, or hidden states "
        "where there is no masked-LM head (default: no comparison)",
    )
    group.add_argument(
        "--tokenizer", metavar="PATH", help="directory or hub id of the tokenizer (default: SOURCE)"
    )
    group.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: SOURCE's)")
    group.add_argument("--force", action="store_true", help="replace OUT if it is not empty")


def _add_block_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--approx-mode",
        choices=("full", "sparse"),
        help="full: MRA-2, the other blocks are averaged; sparse: MRA-2-s, they are left out "
        "(default: full)",
    )
    group.add_argument(
        "--selection",
        choices=SELECTION_RULES,
        help="the rule that ranks blocks (default: row_normalized)",
    )
    group.add_argument(
        "--prior-diagonal",
        type=int,
        metavar="N",
        dest="initial_prior_diagonal_n_blocks",
        help="blocks around the diagonal that are always exact; 3 lowers the masked-token loss "
        "where a distance bias hides far text (default: 0)",
    )
    group.add_argument(
        "--prior-first",
        type=int,
        metavar="N",
        dest="initial_prior_first_n_blocks",
        help="first block rows and columns that are always exact, and that no distance bias hides "
        "(default: 0; with a new distance bias at least 1, for heads that read the first token)",
    )
    group.add_argument(
        "--key-block-size",
        type=int,
        metavar="N",
        help="keys per block: 8, 16 or 32; narrow ones lower the error of far-looking heads, with "
        "--selection mass and --prior-diagonal (default: 32)",
    )


def _add_bias_arguments(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--distance-bias",
        action=argparse.BooleanOptionalAction,
        help="give every head a trainable bias on the distance of blocks, --far-bias where "
        "positions repeat and 0 elsewhere; without it far tokens look adjacent there. A bias of "
        "SOURCE is kept, --no-distance-bias drops it (default: on where --max-length exceeds the "
        "positions of SOURCE)",
    )
    group.add_argument(
        "--far-bias",
        type=float,
        metavar="X",
        help="where that bias starts, a logit; -8 closes far pairs until training opens them "
        "(default: -8)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, print the report and what to try next."""
    report = convert_checkpoint(
        **vars(args), progress=lambda line: print(f"{line} ...", file=sys.stderr, flush=True)
    )
    print(report.summary())
    print(f"\nwritten to {report.output}; try:\n{_next_command(report)}")
    return 0


def _next_command(report: ConversionReport) -> str:
    """A shell command that opens the result and runs it."""
    path = json.dumps(report.output)
    if report.model_class == "MraForMaskedLM":
        code = (
            "import mra_hf; from transformers import pipeline; "
            f'fill = pipeline("fill-mask", {path}); print(fill("A " + fill.tokenizer.mask_token))'
        )
    elif report.modules:
        call = 'predict([("A", "B")])' if report.opened_by == "CrossEncoder" else 'encode("A text")'
        code = (
            f"import mra_hf; from sentence_transformers import {report.opened_by}; "
            f"print({report.opened_by}({path}).{call})"
        )
    else:
        code = (
            f"import mra_hf; from transformers import {report.auto_class}; "
            f"print({report.auto_class}.from_pretrained({path}))"
        )
    return f"  python -c {shlex.quote(code)}"
