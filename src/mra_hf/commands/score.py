"""Score masked language models on held-out text: accuracy and loss of hidden tokens.

The same tokens of the text are hidden from every checkpoint at every length, so rows compare.

example:
  mra-hf score roberta-base roberta-4096 --text held-out.txt --length 512
"""

import argparse
import csv
import datetime
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from mra_attention.checks import check_int
from mra_hf.attention import ATTENTION_NAMES, attention_settings
from mra_hf.commands.experiments import quiet_outside_terminals
from mra_hf.data.mlm import load_documents
from mra_hf.evaluation import masked_token_scores
from mra_hf.loading import check_length, load_masked_lm, longest_input

COLUMNS = (
    *("date", "device", "threads", "torch", "transformers", "model", "attention"),
    *("approx_mode", "block_per_row", "length"),
    *("text", "tokens", "masked_tokens", "accuracy", "nll"),
)

HEADER = f"{'model':<32}{'attention':<10}{'chunk':>6}{'accuracy':>10}{'nll':>8}{'masked':>8}"

#: Tokenizers without a limit report 1e30.
_NO_LENGTH = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="directory or hub id with a masked-LM head"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="PATH",
        help="held-out text: .txt or .jsonl files, or folders of them",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a chunk (default: the longest that each model reads)",
    )
    parser.add_argument(
        "--attention",
        metavar="NAME",
        help="sdpa, mra2, mra2_s or eager (default: each model's own)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens read from the start (default: all)"
    )
    parser.add_argument(
        "--text-column",
        default="text",
        metavar="NAME",
        help="field of .jsonl files (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="CSV that the rows are appended to (default: printed only)",
    )


def run(args: argparse.Namespace) -> int:
    """Score every model, print a table and append it to the CSV."""
    if args.length is not None:
        check_int("--length", args.length, 3)
    if args.out is not None:
        _check_columns(args.out)
    quiet_outside_terminals()
    texts = [row["text"] for row in load_documents(args.text, text_column=args.text_column)]
    for number, name in enumerate(args.models):
        model = load_masked_lm(name, args.attention)
        tokenizer = AutoTokenizer.from_pretrained(name)
        length = _longest(model, tokenizer, name) if args.length is None else args.length
        check_length("--length", length, model)
        scores = masked_token_scores(
            model, tokenizer, texts, length=length, max_tokens=args.max_tokens
        )
        attention = model.config._attn_implementation
        settings = {}
        if attention in ATTENTION_NAMES:
            settings = attention_settings(model.config, attention).for_operator()
        row = {
            "date": datetime.date.today().isoformat(),
            "device": model.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": Path(name).name,
            "attention": attention,
            "approx_mode": settings.get("approx_mode"),
            "block_per_row": settings.get("block_per_row"),
            "length": scores.length,
            "text": " ".join(Path(text).name for text in args.text),
            "tokens": scores.n_tokens,
            "masked_tokens": scores.n_masked,
            "accuracy": round(scores.accuracy, 4),
            "nll": round(scores.nll, 4),
        }
        if number == 0:
            print(HEADER)
        print(
            f"{row['model'][-30:]:<32}{row['attention']:<10}{row['length']:>6}"
            f"{row['accuracy']:>10.1%}{row['nll']:>8.3f}{row['masked_tokens']:>8}",
            flush=True,
        )
        if args.out is not None:
            _append(row, args.out)
    print(
        "chunk: tokens read at once; accuracy: share of the masked tokens that are guessed right;\n"
        "nll: their mean loss in nats; masked: how many, the same ones in every row."
    )
    return 0


def _longest(model, tokenizer, name: str) -> int:
    """Tokens that the model can read: its learned positions, or the tokenizer's limit."""
    limits = (longest_input(model), tokenizer.model_max_length)
    known = [limit for limit in limits if limit is not None and limit < _NO_LENGTH]
    if not known:
        raise ValueError(
            f"neither {name} nor its tokenizer says how long a text it reads; pass --length."
        )
    return min(known)


def _check_columns(file: Path) -> None:
    """Refuse a file that rows cannot be appended to, before anything is computed.

    Raises:
        ValueError: a folder, or a table with other columns.
        OSError: its folder does not exist and cannot be made.
    """
    if file.is_dir():
        raise ValueError(f"--out must be a file, and {file} is a folder; name a file in it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            columns = next(csv.reader(lines), [])
        if tuple(columns) != COLUMNS:
            raise ValueError(f"--out {file} has other columns than this command; name a new file.")


def _append(row: dict, file: Path) -> None:
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
