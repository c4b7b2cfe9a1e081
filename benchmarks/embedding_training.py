"""Does one vector of a trained 4096-token encoder find documents better than a mean of chunks does?

Two systems learn the same: sentences against the documents of 1,000 to 4,000 tokens that they were
taken out of, the same documents in the same order, with `SentenceTransformerTrainer`. "mra2" is a
sentence encoder converted to 4096 tokens, one pass over a document. "chunks" is its source, which
reads chunks of 512 tokens; the vector is the mean over all of their tokens. Both are tested, before
and after, on documents of other texts. A killed run goes on where its last checkpoint is.

example:
  mra-hf build-corpus corpus/english
  python benchmarks/embedding_training.py --model all-MiniLM-L6-v2 --corpus corpus/english
"""

import argparse
import json
import random
import re
import sys
import time
import types
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.long_documents import Document, build_documents
from benchmarks.records import Records, conditions, read_rows
from benchmarks.retrieval import COLUMNS as SUMMARY_COLUMNS
from benchmarks.retrieval import YARDSTICK, query_rows, ranks, summaries
from mra_hf import convert_checkpoint
from mra_hf.loading import longest_input
from mra_hf.results.files import write_text

LONGEST = 4096
LONG = "mra2"
SYSTEMS = (YARDSTICK, LONG)
OUT = ROOT / "benchmarks" / "results" / "embedding_training.csv"
CONDITIONS = ("date", "commit", "device", "torch", "transformers", "model", "seed")
RECIPE = ("blocks", "batch", "rate", "bias_rate", "steps")
MEASURED = ("loss", "cpu_seconds_per_step")
KEYS = (*CONDITIONS[5:], *RECIPE, "step", "set", "part", "system")
COLUMNS = (*CONDITIONS, *RECIPE, "step", *MEASURED, *SUMMARY_COLUMNS)

#: Novels whose chapters, and passages, are for tests.
_TEST_NOVELS = {"Northanger Abbey", "Sense And Sensibility", "Persuasion"}
#: Documents of each set that a pass of training reads.
_PASS_DOCUMENTS = 32
#: A checkpoint is written after so many steps.
_SAVE_STEPS = 10


def is_for_tests(package: str, title: str) -> bool:
    """Whether a text is kept for tests; half of each package, by the title."""
    if package == "r-cran-janeaustenr":
        return title in _TEST_NOVELS
    return zlib.crc32(f"{package}/{title}".encode()) % 2 == 0


def training_rows(
    corpus: Path, count_tokens: Callable, *, rows: int, batch: int, per_set: int, seed: int
) -> list[dict[str, str]]:
    """Return at least `rows` documents with their queries, in the order of training.

    Every pass draws documents and queries anew. No batch holds a document twice.
    """
    found: list[dict[str, str]] = []
    number = 0
    while len(found) < rows:
        one = build_documents(
            corpus,
            count_tokens,
            per_set=per_set,
            seed=1000 * (seed + 1) + number,
            belongs=lambda package, title: not is_for_tests(package, title),
        )
        random.Random(number).shuffle(one)
        whole = one[: len(one) // batch * batch]  # a batch of two passes could hold one twice
        if not whole:
            raise ValueError(f"a pass has {len(one)} documents, fewer than a batch of {batch}.")
        found += [
            {f"query_{i}": query.text for i, query in enumerate(document.queries)}
            | {"document": document.text}
            for document in whole
        ]
        number += 1
    return found[:rows]


def read_by_rows(encoder: Any, chunk: int | None) -> None:
    """Let a Transformer of sentence-transformers read each text by itself, without padding.

    Args:
        encoder: its first module; put into a state of the token embeddings as before.
        chunk: longer texts are read in chunks of so many tokens, special tokens included; the
            token embeddings are those of all chunks. None: as a whole.
    """

    def states_of(ids: Tensor) -> Tensor:
        """Token embeddings `[tokens, D]` of one text `[N]` with its two special tokens."""
        if chunk is None or len(ids) <= chunk:
            row, mask = ids[None], torch.ones_like(ids)[None]
        else:
            parts = [torch.cat([ids[:1], x, ids[-1:]]) for x in ids[1:-1].split(chunk - 2)]
            row = pad_sequence(parts, batch_first=True)
            mask = pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
        return encoder.model(row, attention_mask=mask).last_hidden_state[mask.bool()]

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        kept = features["attention_mask"].bool()
        states = [
            states_of(ids[mask]) for ids, mask in zip(features["input_ids"], kept, strict=True)
        ]
        features["token_embeddings"] = pad_sequence(states, batch_first=True)
        ones = [torch.ones(len(x), dtype=torch.long) for x in states]
        features["attention_mask"] = pad_sequence(ones, batch_first=True)
        return features

    encoder.forward = types.MethodType(forward, encoder)


def open_system(name: str, source: str, converted: Path) -> Any:
    """A SentenceTransformer of one of `SYSTEMS` that reads `LONGEST` tokens."""
    from sentence_transformers import SentenceTransformer

    # A conversion has no dropout on attention weights; neither has its rival then.
    options = {"device": "cpu", "config_kwargs": {"attention_probs_dropout_prob": 0.0}}
    model = SentenceTransformer(source if name == YARDSTICK else str(converted), **options)
    read_by_rows(model[0], longest_input(model[0].model) if name == YARDSTICK else None)
    model.max_seq_length = LONGEST
    return model


def queries_loss(model: Any) -> torch.nn.Module:
    """Every query of a document against all documents of the batch."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class QueriesLoss(MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, embeddings, labels):
            *queries, documents = embeddings
            one = super().compute_loss_from_embeddings
            return torch.stack([one([query, documents], labels) for query in queries]).mean()

    return QueriesLoss(model)


class _Progress(TrainerCallback):
    """Processor seconds and loss of every step, on the screen and in a file that is continued."""

    def __init__(self, name: str, file: Path):
        self.name, self.file, self.started = name, file, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            row = {"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds}
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            of = f"step {state.global_step} of {state.max_steps}"
            print(f"{self.name}: {of}, loss {row['loss']:.3f}, {self.seconds:.0f} s", flush=True)


def train(name: str, model: Any, rows: list[dict[str, str]], folder: Path, args) -> None:
    """Train on `rows`, `args.batch` documents a step, from the last checkpoint in `folder` on."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from torch.utils.data import BatchSampler, SequentialSampler

    class InOrder(SentenceTransformerTrainer):
        def get_batch_sampler(self, dataset, batch_size, drop_last, **kwargs):
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        learning_rate_mapping={r"distance_bias": args.bias_rate} if name == LONG else None,
        warmup_steps=max(1, args.steps // 10),
        seed=args.seed,
        logging_steps=1,
        save_steps=_SAVE_STEPS,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        loss=queries_loss(model),
        callbacks=[_Progress(name, folder / "steps.jsonl")],
    )
    last = get_last_checkpoint(folder)
    if last is not None:
        print(f"{name}: goes on from {Path(last).name}", flush=True)
    trainer.train(resume_from_checkpoint=last)


def measured_steps(folder: Path, steps: int) -> dict[str, float]:
    """The columns `MEASURED`: mean loss of the last tenth, median processor seconds of a step."""
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    by_step = {row["step"]: row for row in map(json.loads, lines)}  # the last try counts
    last = [row["loss"] for step, row in by_step.items() if step > steps - max(1, steps // 10)]
    seconds = np.median([row["seconds"] for row in by_step.values()])
    found = (float(np.mean(last)), float(seconds))
    return dict(zip(MEASURED, (round(x, 3) for x in found), strict=True))


def rank_documents(name: str, model: Any, documents: Sequence[Document], file: Path) -> list[int]:
    """The rank of the document of every query, from `file` if it is there."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    model.eval()
    vectors = []
    for done, document in enumerate(documents):
        vectors.append(model.encode(document.text, show_progress_bar=False))
        if (done + 1) % 20 == 0:
            print(f"{name}: {done + 1} of {len(documents)} test documents", flush=True)
    texts = [query.text for document in documents for query in document.queries]
    queries = model.encode(texts, show_progress_bar=False)
    own = np.array([i for i, x in enumerate(documents) for _ in x.queries])
    found = ranks(queries.astype(float), np.stack(vectors).astype(float), own).tolist()
    write_text(file, json.dumps(found))
    return found


def measure(args: argparse.Namespace) -> None:
    """Train and test both systems, then add their rows to OUT."""
    about = conditions("cpu", torch.get_num_threads())
    about |= {"model": Path(args.model).name, "seed": args.seed}
    about |= {name: getattr(args, name) for name in RECIPE}
    names = [str(about[x]) for x in ("model", "seed", *RECIPE)]
    folder = args.folder / re.sub(r"[^\w.-]", "-", "_".join(names))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    known: dict[str, int] = {}

    def count_tokens(texts: Sequence[str]) -> list[int]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            ids = tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            known.update(zip(new, map(len, ids), strict=True))
        return [known[text] for text in texts]

    options = {"per_set": args.documents, "seed": args.seed, "belongs": is_for_tests}
    documents = build_documents(args.corpus, count_tokens, **options)
    print(f"{len(documents)} test documents", flush=True)
    rows = training_rows(
        args.corpus,
        count_tokens,
        rows=args.steps * args.batch,
        batch=args.batch,
        per_set=args.pass_documents,
        seed=args.seed,
    )
    print(f"{len(rows)} training documents", flush=True)
    known.clear()
    converted = folder / "converted"
    if not converted.exists():
        convert_checkpoint(args.model, converted, block_per_row=args.blocks)
    found: dict[int, dict[str, list[int]]] = {0: {}, args.steps: {}}
    for name in SYSTEMS:
        run = folder / name
        run.mkdir(exist_ok=True)
        model = open_system(name, args.model, converted)
        found[0][name] = rank_documents(name, model, documents, run / "ranks-0.json")
        file = run / f"ranks-{args.steps}.json"
        if not file.is_file():
            train(name, model, rows, run, args)
        found[args.steps][name] = rank_documents(name, model, documents, file)
    limit = longest_input(AutoModel.from_pretrained(args.model)) - 1
    _add_rows(args, about, found, documents, folder, limit)


def _add_rows(args, about, found, documents, folder: Path, limit: int) -> None:
    records = Records(args.out, COLUMNS, KEYS)
    for step, ranks_of in found.items():
        queries = [
            row | {name: of[i] for name, of in ranks_of.items()}
            for i, row in enumerate(query_rows(documents))
        ]
        for row in summaries(queries, SYSTEMS, limit, args.draws):
            learnt = measured_steps(folder / row["system"], args.steps) if step else {}
            whole = about | {"step": step} | learnt | row
            if not records.has(whole):
                records.add(whole)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of all documents as a Markdown table."""
    lines = [
        "| blocks | seed | step | system | documents | recall@1 | MRR | minus chunks | s/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] != "all":
            continue
        difference = ""
        if row["mrr_difference"]:
            ends = [f"{float(row[f'mrr_difference_{end}']):+.3f}" for end in ("low", "high")]
            difference = f"{float(row['mrr_difference']):+.3f} ({' to '.join(ends)})"
        cells = [row[name] for name in ("blocks", "seed", "step", "system")]
        cells += [f"{row['documents']} {row['set']}", row["recall_1"], row["mrr"], difference]
        lines.append(f"| {' | '.join([*cells, row['cpu_seconds_per_step']])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the sentence encoder")
    parser.add_argument("--corpus", type=Path, required=True, help="of mra-hf build-corpus")
    parser.add_argument("--steps", type=int, default=40, help="of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="documents (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=16, help="per row (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-5, help="default: %(default)s")
    parser.add_argument(
        "--bias-rate",
        type=float,
        default=1e-3,
        help="learning rate of the distance bias, which is 100 times its weight (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--documents", type=int, default=60, help="of each of two sets, tested (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of documents and training")
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/embedding_training"),
        help="checkpoints of unfinished and finished runs (default: %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help="2 steps, 4 test documents")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    args.pass_documents = _PASS_DOCUMENTS
    if args.smoke:
        args.steps, args.batch, args.documents, args.pass_documents = 2, 2, 2, 2
    try:
        measure(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(read_rows(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
