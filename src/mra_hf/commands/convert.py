"""Turn a checkpoint into one with multi-resolution attention and a longer position table.

SOURCE is a directory or hub id of a RoBERTa-family or BERT model, or of a model of this package to
make it longer; its weights and its head are kept, and the modules of a directory of
sentence-transformers. OUT gets weights, config,
tokenizer, a model card and a report.

example:
  mra-hf convert FacebookAI/roberta-base roberta-base-mra-4096 --text novel.txt
"""

import argparse
import json
import shlex
import sys
from typing import Any

from mra_attention.selection import SELECTION_RULES
from mra_hf.conversion import DTYPES, convert_checkpoint
from mra_hf.conversion.report import ConversionReport
from mra_hf.conversion.sources import SOURCE_TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mra-hf convert`."""
    types = ", ".join(SOURCE_TYPES)
    parser.add_argument("source", metavar="SOURCE", help=f"directory or hub id of type {types}")
    parser.add_argument("output_dir", metavar="OUT", help="directory to write")
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--max-length",
        **number,
        default=4096,
        help="longest sequence (default: %(default)s tokens)",
    )
    source_default = "for a source of type mra or mra_hf its own"
    parser.add_argument(
        "--block-per-row",
        **number,
        help="exact blocks per block row: 8 for a model that is trained further, 16 for one that "
        f"is used as it is (default: 8; {source_default})",
    )
    parser.add_argument(
        "--approx-mode",
        choices=("full", "sparse"),
        help='"full" (MRA-2) or "sparse" (MRA-2-s) (default: full; for a source of type mra or '
        "mra_hf its own)",
    )
    priors = {
        "first": "first block rows and columns that are always exact, and global: no distance bias "
        "hides them or what they see",
        "diagonal": "diagonal band in blocks that is always exact; 3 lowers the masked-token loss "
        "where a distance bias hides far text",
    }
    for kind, meaning in priors.items():
        dest = f"initial_prior_{kind}_n_blocks"
        new_bias = "; at least 1 with a new distance bias, for heads that read the first token"
        text = f"{meaning} (default: 0; {source_default}{new_bias if kind == 'first' else ''})"
        parser.add_argument(f"--prior-{kind}", **number, dest=dest, help=text)
    parser.add_argument(
        "--key-block-size",
        **number,
        help="keys per block, 8, 16 or 32: narrow ones lower the error of far-looking heads, with "
        f"--selection mass and --prior-diagonal (default: 32; {source_default})",
    )
    parser.add_argument(
        "--selection",
        choices=SELECTION_RULES,
        help=f"the rule that ranks blocks (default: row_normalized; {source_default})",
    )
    parser.add_argument(
        "--distance-bias",
        action=argparse.BooleanOptionalAction,
        help="give every head a trainable bias on the distance of blocks: 0 where no two tokens "
        "share a row of the position table, --far-bias beyond. Without it, repeated positions make "
        "far tokens look adjacent. A bias that SOURCE has is kept, --no-distance-bias drops it "
        "(default: where --max-length exceeds SOURCE's positions)",
    )
    parser.add_argument(
        "--far-bias",
        type=float,
        metavar="X",
        help="where that bias starts; -8 closes far pairs until training opens them (default: -8)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to score masked tokens of source and result on; without a masked-LM head, "
        "how far their hidden states agree",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="directory or hub id of the tokenizer (default: SOURCE)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: SOURCE's)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is not empty")


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
