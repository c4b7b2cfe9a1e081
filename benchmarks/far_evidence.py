"""Can a classifier read one sentence that stands far from its first token?

The class of a document follows from one sentence in it. The embedded model of 512 tokens learns
that from short documents. It is then converted to 4096 tokens in several ways, with a distance bias
or without, with the first block global or not, and fine-tuned on documents of 1,000 to 4,000 tokens
whose sentence stands anywhere beyond the first 600. Same documents, steps and seeds for all.

example:
  mra-hf build-corpus corpus/english
  python benchmarks/far_evidence.py --corpus corpus/english
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.long_documents import read_corpus, split_sentences
from benchmarks.records import Records, conditions
from mra_hf import MraForSequenceClassification, convert_checkpoint
from mra_hf.english import english_checkpoint

#: The sentence of a document: one of the beginnings, then its class.
BEGINNINGS = (
    "The secret word of this story is",
    "Remember that the secret word is",
    "They agreed that the secret word would be",
    "She wrote down that the secret word was",
)
CLASSES = ("garden", "letter", "winter", "river")
OUT = ROOT / "benchmarks" / "results" / "far_evidence.csv"
COLUMNS = (
    *("date", "commit", "device", "torch", "transformers"),
    *("start", "seed", "step", "documents", "accuracy", "loss"),
)


@dataclass(frozen=True)
class Documents:
    """Lengths in tokens, and how many tokens stand before the sentence, at least."""

    shortest: int
    longest: int
    before: int


SHORT = Documents(60, 440, 0)
LONG = Documents(1000, 4000, 600)
#: Arguments of the conversion.
STARTS = {
    "bias, first block global": {"initial_prior_first_n_blocks": 1},
    "bias": {"initial_prior_first_n_blocks": 0},
    "no bias": {"distance_bias": False},
}
SOURCE = "source, short documents"


def build_documents(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, kind: Documents, n: int, seed: int
) -> list[dict]:
    """Return `n` tokenized documents with `labels`, cut from the texts in turn."""
    generator = random.Random(seed)
    sentences = _sentences(texts, tokenizer, generator)
    documents = []
    for _ in range(n):
        label = generator.randrange(len(CLASSES))
        words = f" {generator.choice(BEGINNINGS)} {CLASSES[label]}."
        key = tokenizer(words, add_special_tokens=False).input_ids
        length = generator.randint(kind.shortest, kind.longest)
        place = generator.randint(kind.before, max(kind.before, length - len(key)))
        before: list[int] = []
        while len(before) < place:
            before += next(sentences)
        before = before[: kind.longest - len(key)]
        ids = before + key
        while len(ids) < length:
            ids += next(sentences)
        ids = ids[: max(length, len(before) + len(key))]
        ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        documents.append({"input_ids": ids, "labels": label})
    return documents


def _sentences(texts, tokenizer, generator) -> Iterator[list[int]]:
    """The sentences of the texts as tokens, from a random one on and round and round."""
    lines = [s for text in texts for line in text.split("\n") for s in split_sentences(line)]
    tokens = tokenizer([f" {line}" for line in lines], add_special_tokens=False).input_ids
    return itertools.islice(itertools.cycle(tokens), generator.randrange(len(tokens)), None)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: tuple[list[dict], list[dict]],
    *,
    folder: str,
    seed: int,
    eval_steps: int,
    **settings,
) -> list[dict]:
    """Train, keep the model in `folder`, and return a row for every evaluation, the first before
    any step.
    """
    set_seed(seed)
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            warmup_steps=20,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=seed,
            train_sampling_strategy="group_by_length",
            eval_strategy="steps",
            eval_steps=eval_steps,
            eval_on_start=True,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            **settings,
        ),
        train_dataset=documents[0],
        eval_dataset=documents[1],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )
    trainer.train()
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    return [
        {
            "step": entry["step"],
            "documents": len(documents[1]),
            "accuracy": round(entry["eval_accuracy"], 4),
            "loss": round(entry["eval_loss"], 4),
        }
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]


def _texts(corpus: Path, split: str) -> list[str]:
    return [text for _, _, text in read_corpus(corpus, f"{split}/r-cran-janeaustenr.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="the folder of build-corpus")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--source-steps", type=int, default=100, help="of 16 short documents")
    parser.add_argument("--steps", type=int, default=40, help="of 4 long documents")
    parser.add_argument("--eval-steps", type=int, default=20, help="between tests on long ones")
    parser.add_argument("--test", type=int, default=200, help="test documents")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    records = Records(args.out, COLUMNS, ("start", "seed", "step"))
    tokenizer = AutoTokenizer.from_pretrained(english_checkpoint())
    train, test = _texts(args.corpus, "train"), _texts(args.corpus, "heldout")
    short = (
        build_documents(train, tokenizer, SHORT, 16 * args.source_steps, 0),
        build_documents(test, tokenizer, SHORT, args.test, 1),
    )
    long = (
        build_documents(train, tokenizer, LONG, 4 * args.steps, 2),
        build_documents(test, tokenizer, LONG, args.test, 3),
    )

    def record(start: str, seed: int, rows: list[dict]) -> None:
        for row in rows:
            row = conditions("cpu", torch.get_num_threads()) | row | {"start": start, "seed": seed}
            records.add(row)
            print({name: row[name] for name in COLUMNS[5:]}, flush=True)

    for seed in args.seeds:
        missing = [s for s in args.starts if not records.has({"start": s, "seed": seed, "step": 0})]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            set_seed(seed)  # of the new head
            source = RobertaForSequenceClassification.from_pretrained(
                english_checkpoint(), num_labels=len(CLASSES), dtype=torch.float32
            )
            settings = {"max_steps": args.source_steps, "learning_rate": 3e-4, "seed": seed}
            settings |= {f"per_device_{x}_batch_size": 16 for x in ("train", "eval")}
            settings |= {"folder": f"{folder}/source", "eval_steps": 50}
            rows = fine_tune(source, tokenizer, short, **settings)
            if not records.has({"start": SOURCE, "seed": seed, "step": 0}):
                record(SOURCE, seed, rows)
            settings = {"max_steps": args.steps, "learning_rate": 1e-4, "seed": seed}
            settings |= {"folder": f"{folder}/tuned", "eval_steps": args.eval_steps}
            settings |= {f"per_device_{x}_batch_size": 4 for x in ("train", "eval")}
            for start in missing:
                path = f"{folder}/converted"
                convert_checkpoint(
                    f"{folder}/source", path, max_length=4096, force=True, **STARTS[start]
                )
                model = MraForSequenceClassification.from_pretrained(path)
                record(start, seed, fine_tune(model, tokenizer, long, **settings))


if __name__ == "__main__":
    main()
