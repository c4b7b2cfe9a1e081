"""Does a model use what stands far away? Accuracy on words that can be looked up there only.

Hidden words of a held-out text are counted if the same word stands elsewhere in the example, more
than 480 tokens away, and not nearer: a model that reads 512 tokens cannot look it up. Every model
hides the same tokens.

    python benchmarks/far_words.py --text held-out.jsonl --out rows.csv source:512 converted:4096
"""

import argparse
import datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from mra_hf.commands.quickstart import WORD_STARTS
from mra_hf.data.mlm import load_documents
from mra_hf.evaluation import MaskedTokenLosses, masked_token_losses
from mra_hf.loading import load_masked_lm
from mra_hf.results.files import csv_text, source_commit, write_text

#: Tokens that a model with 512 positions sees to either side.
NEAR = 480
#: Letters of a word, at least: shorter ones stand everywhere.
LETTERS = 4
COLUMNS = (
    *("date", "commit", "torch", "transformers", "model", "length", "group"),
    *("masked_tokens", "accuracy", "nll", "nll_difference", "half_interval"),
)


def groups_of(losses: MaskedTokenLosses, tokenizer, example: int) -> dict[str, Tensor]:
    """Which hidden tokens belong to which group, `[masked]` bool: all tokens; words that stand far
    away in the same example of `example` tokens, but not near; words that stand near.
    """
    names = tokenizer.convert_ids_to_tokens(losses.stream.tolist())
    hidden = set(losses.places.tolist())
    where: dict[int, list[int]] = {}
    for place, token in enumerate(losses.stream.tolist()):
        if place not in hidden:  # the model does not see it
            where.setdefault(token, []).append(place)
    near, far = [], []
    for place in losses.places.tolist():
        name = names[place]
        following = names[place + 1][:1] if place + 1 < len(names) else ""
        is_word = name[:1] in WORD_STARTS and name[1:].isalpha() and len(name) > LETTERS
        if following.isalpha() and following not in WORD_STARTS:
            is_word = False  # a second token completes it
        token = int(losses.stream[place])
        same = [x for x in where.get(token, ()) if x // example == place // example]
        stands_near = any(abs(x - place) <= NEAR for x in same)
        near.append(is_word and stands_near)
        far.append(is_word and bool(same) and not stands_near)
    everything = torch.ones(len(near), dtype=torch.bool)
    return {"all": everything, "far": torch.tensor(far), "near": torch.tensor(near)}


def measure(models: list[str], texts: list[str], longest: int = 4096) -> list[dict]:
    """Rows for models given as PATH:LENGTH; differences are to the first."""
    rows: list[dict] = []
    first = groups = None
    for name, length in (model.rsplit(":", 1) for model in models):
        model, tokenizer = load_masked_lm(name), AutoTokenizer.from_pretrained(name)
        losses = masked_token_losses(model, tokenizer, texts, length=int(length))
        if first is None:
            first, groups = losses, groups_of(losses, tokenizer, longest - 2)
        for group, members in groups.items():
            difference = (losses.nll - first.nll)[members]
            half = 1.96 * difference.std().item() / max(1, len(difference)) ** 0.5
            row = {
                "date": datetime.date.today().isoformat(),
                "commit": source_commit(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "model": Path(name).name,
                "length": int(length),
                "group": group,
                "masked_tokens": int(members.sum()),
                "accuracy": round(losses.correct[members].double().mean().item(), 4),
                "nll": round(losses.nll[members].mean().item(), 4),
                "nll_difference": round(difference.mean().item(), 4),
                "half_interval": round(half, 4),
            }
            rows.append(row)
            print({key: row[key] for key in COLUMNS[4:]}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="PATH:LENGTH")
    parser.add_argument("--text", nargs="+", required=True, help="held-out .txt or .jsonl files")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    args = parser.parse_args()
    texts = [row["text"] for row in load_documents(args.text)]
    rows = measure(args.models, texts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, csv_text(COLUMNS, rows))


if __name__ == "__main__":
    main()
