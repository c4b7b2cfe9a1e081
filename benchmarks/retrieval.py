"""Find long documents by a sentence that was taken out of them: one vector per document.

The encoder is all-MiniLM-L6-v2, or another BERT without a head that means were trained for. A
vector is the mean of the last hidden states over the tokens of the mask; documents are ranked by
the cosine to the vector of the query. Converted models, untrained, are compared with two ways to
use the source: cut the document at 512 tokens, or take the mean over chunks of 512.

example:
  python benchmarks/retrieval.py --model all-MiniLM-L6-v2 --corpus corpus/english
  python benchmarks/retrieval.py --draw docs/experiments/long_positions/retrieval.png
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.long_documents import SETS, Document, build_documents
from benchmarks.records import conditions, read_rows
from mra_hf import MraConfig, convert_checkpoint
from mra_hf.configuration import AttentionSettings
from mra_hf.loading import longest_input
from mra_hf.results.comparison import paired_bootstrap
from mra_hf.results.drawing import new_figure, save_figure
from mra_hf.results.files import csv_text, write_text

LONGEST = 4096
#: The system that others are compared with.
YARDSTICK = "chunks"
OUT = ROOT / "benchmarks" / "results" / "retrieval.csv"

CONDITIONS = ("date", "commit", "device", "torch", "transformers", "model", "seed")
#: One row per query: where it was taken from, and the rank of its document with each system.
QUERY_COLUMNS = ("set", "document", "tokens", "offset", "query")
COLUMNS = (
    *("set", "part", "system", "documents", "queries"),
    *("recall_1", "recall_1_low", "recall_1_high", "mrr", "mrr_low", "mrr_high"),
    *("mrr_difference", "mrr_difference_low", "mrr_difference_high"),
)

#: How far below the mean of chunks 8 blocks may be.
_TOLERATED = -0.03
_BATCH_TOKENS = 4096
_SMOKE_SYSTEMS = ("first_512", YARDSTICK, "mra2_8")


@dataclass(frozen=True)
class System:
    """How documents become vectors.

    Args:
        about: a few words for tables.
        source: "first" or "chunks" of the source; None: the converted model.
        bias: whether the converted model has its distance bias.
        attention: "mra2" or "sdpa", dense attention with the bias.
        settings: of the attention, where they differ from the default of the conversion.
        window: of the distance bias in blocks; None: the default of the conversion.
    """

    about: str
    source: str | None = None
    bias: bool = True
    attention: str = "mra2"
    settings: dict[str, Any] = field(default_factory=dict)
    window: int | None = None


def _mra2(blocks: int, about: str = "", window: int | None = None, **settings: Any) -> System:
    settings = {"block_per_row": blocks, "initial_prior_first_n_blocks": 0} | settings
    return System(f"converted, {blocks} blocks{about}", settings=settings, window=window)


_DIAGONAL = {"initial_prior_diagonal_n_blocks": 3}
_FIRST = {"initial_prior_first_n_blocks": 1}
SYSTEMS = {
    "first_512": System("source, first 512 tokens", source="first"),
    YARDSTICK: System("source, mean of chunks of 512", source="chunks"),
    "mra2_8": _mra2(8),
    "mra2_16": _mra2(16),
    "mra2_8_no_bias": System("converted, 8 blocks, no bias", bias=False),
    "mra2_8_diagonal3": _mra2(8, ", diagonal 3", **_DIAGONAL),
    "mra2_16_diagonal3": _mra2(16, ", diagonal 3", **_DIAGONAL),
    "mra2_8_refined": _mra2(8, ", refined", selection="refined"),
    "mra2_8_first1": _mra2(8, ", first block", **_FIRST),
    "mra2_16_first1": _mra2(16, ", first block", **_FIRST),
    "mra2_8_first1_refined": _mra2(8, ", first block, refined", **_FIRST, selection="refined"),
    "mra2_8_first1_diagonal3": _mra2(8, ", first block, diagonal 3", **_FIRST, **_DIAGONAL),
    "dense": System(
        "converted, exact attention",
        attention="sdpa",
        settings={"initial_prior_first_n_blocks": 0},
    ),
    "mra2_8_window8": _mra2(8, ", window 8", window=8),
    "mra2_16_window8": _mra2(16, ", window 8", window=8),
}


def ranks(queries: np.ndarray, documents: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the rank of the own document of every query by cosine, `[queries]`, 1 is best; a tie
    counts against it.

    Args:
        queries: `[queries, D]`.
        documents: `[documents, D]`.
        own: `[queries]`, the index of the document that the query was taken from.
    """
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    documents = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    cosines = queries @ documents.T  # [queries, documents]
    of_own = cosines[np.arange(len(own)), own]
    return (cosines >= of_own[:, None]).sum(1)


@torch.no_grad()
def mean_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> np.ndarray:
    """Mean of the hidden states over the real tokens of each text, `[texts, D]`; texts are cut at
    `length` tokens.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    vectors = np.zeros((len(texts), model.config.hidden_size))
    while order:
        size = max(1, _BATCH_TOKENS // length)
        rows, order = order[:size], order[size:]
        inputs = tokenizer(
            [texts[row] for row in rows],
            **{"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"},
        )
        states = model(**inputs).last_hidden_state  # [B, N, D]
        mask = inputs["attention_mask"][..., None]
        vectors[rows] = ((states * mask).sum(1) / mask.sum(1)).double().numpy()
    return vectors


@torch.no_grad()
def chunk_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> np.ndarray:
    """Mean of the hidden states over the real tokens of all chunks of each text, `[texts, D]`;
    every chunk has `length` tokens, special tokens included, but the last one.
    """
    vectors = np.zeros((len(texts), model.config.hidden_size))
    for row, text in enumerate(texts):
        options = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        inputs = tokenizer(text, padding=True, return_tensors="pt", **options)
        mask = inputs["attention_mask"]
        states = model(inputs["input_ids"], attention_mask=mask).last_hidden_state
        vectors[row] = states[mask.bool()].double().mean(0).numpy()
    return vectors


class Encoders:
    """Vectors of queries and documents with every system; converts where it is first needed."""

    def __init__(self, source: str, folder: Path):
        self.source, self.folder = source, folder
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.source_model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        self.source_length = longest_input(self.source_model)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special tokens."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "verbose": False}
        return [len(ids) for ids in self.tokenizer(list(texts), **options)["input_ids"]]

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors by the source: a converted model attends to all of so few tokens, as it does."""
        return mean_vectors(self.source_model, self.tokenizer, texts, 128)

    def documents(
        self, system: System, texts: Sequence[str], progress: Callable[[int], None]
    ) -> np.ndarray:
        """Vectors `[documents, D]`; `progress` is called with how many there are."""
        of = {"first": mean_vectors, "chunks": chunk_means, None: mean_vectors}[system.source]
        model, length = self.source_model, self.source_length
        if system.source is None:
            model, length = self.converted(system), LONGEST
        vectors = []
        for done, text in enumerate(texts):
            vectors.append(of(model, self.tokenizer, [text], length)[0])
            progress(done + 1)
        return np.stack(vectors)

    def converted(self, system: System) -> PreTrainedModel:
        """The converted model of a system."""
        is_default = system.bias and system.window is None
        folder = self.folder / ("default" if is_default else "no_bias")
        if not folder.exists():
            options = {} if is_default else {"distance_bias": False}
            convert_checkpoint(self.source, folder, max_length=LONGEST, **options)
        config = MraConfig.from_pretrained(folder)
        if system.window is not None:
            config.distance_bias_window = system.window  # of a bias that is made with the model
        AttentionSettings.of(config).replace(**system.settings).write_to(config)
        options = {"config": config, "attn_implementation": system.attention}
        return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def summaries(
    queries: Sequence[dict], names: Sequence[str], limit: int, draws: int = 10_000
) -> list[dict[str, Any]]:
    """The rows of `COLUMNS`: each set, all queries and those of both sides of token `limit`.

    Documents count alike, and the bootstrap draws documents: queries of one are not independent.
    """
    parts = {"all": lambda x: True, "first": lambda x: x < limit, "beyond": lambda x: x >= limit}
    rows = []
    for set_name in (*SETS, "both"):
        for part, belongs in parts.items():
            chosen = [
                row
                for row in queries
                if set_name in (row["set"], "both") and belongs(int(row["offset"]))
            ]
            if not chosen:
                continue
            yardstick = _by_document(chosen, YARDSTICK)[1] if YARDSTICK in names else None
            for name in names:
                first, reciprocal = _by_document(chosen, name)
                row = {"set": set_name, "part": part, "system": name}
                row |= {"documents": len(first), "queries": len(chosen)}
                nothing = np.zeros(len(first))
                row |= _interval("recall_1", first, nothing, draws)
                row |= _interval("mrr", reciprocal, nothing, draws)
                if yardstick is not None and name != YARDSTICK:
                    row |= _interval("mrr_difference", reciprocal, yardstick, draws)
                rows.append(row)
    return rows


def _by_document(queries: Sequence[dict], system: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the queries of each document, `[documents]`: found first, reciprocal rank."""
    found: dict[str, list[int]] = {}
    for row in queries:
        found.setdefault(row["document"], []).append(int(row[system]))
    of_each = [np.array(ranks_of) for ranks_of in found.values()]
    return np.array([(r == 1).mean() for r in of_each]), np.array([(1 / r).mean() for r in of_each])


def _interval(name: str, first: np.ndarray, second: np.ndarray, draws: int) -> dict[str, float]:
    found = paired_bootstrap(first, second, draws=draws)
    ends = {"": found.difference, "_low": found.low, "_high": found.high}
    return {name + end: round(value, 4) for end, value in ends.items()}


def query_rows(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The rows of `QUERY_COLUMNS`."""
    return [
        {"set": x.set, "document": x.name, "tokens": x.tokens}
        | {"offset": query.offset, "query": query.text}
        for x in documents
        for query in x.queries
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `COLUMNS` as a Markdown table, one line per set and system; for the README too."""
    lines = [
        "| documents | system | recall@1 | MRR | first 512 | beyond | MRR minus mean of chunks |",
        "|---|---|---|---|---|---|---|",
    ]
    by_key = {(row["set"], row["part"], row["system"]): row for row in rows}
    for (set_name, part, name), row in by_key.items():
        if part != "all":
            continue
        sides = [by_key.get((set_name, side, name)) for side in ("first", "beyond")]
        cells = [set_name, SYSTEMS[name].about, f"{float(row['recall_1']):.3f}"]
        cells.append(_with_interval(row, "mrr"))
        cells += [f"{float(side['mrr']):.3f}" if side else "" for side in sides]
        cells.append(_with_interval(row, "mrr_difference", "+") if row["mrr_difference"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], name: str, sign: str = "") -> str:
    value, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def draw(rows: Sequence[dict[str, str]], png: Path) -> None:
    """Draw the difference of every system to the mean of chunks, a panel for each set."""
    chosen = [row for row in rows if row["part"] == "all" and row["mrr_difference"]]
    names = [name for name in SYSTEMS if any(row["system"] == name for row in chosen)]
    figure = new_figure(11, 1.6 + 0.28 * len(names))
    panels = figure.subplots(1, len(SETS) + 1, sharex=True, sharey=True)
    for axes, set_name in zip(panels, (*SETS, "both"), strict=True):
        for row in chosen:
            if row["set"] == set_name:
                place = names.index(row["system"])
                ends = [float(row[f"mrr_difference_{end}"]) for end in ("low", "high")]
                axes.plot(ends, [place, place], color="#1f5f99")
                axes.plot(float(row["mrr_difference"]), place, "o", color="#1f5f99", markersize=5)
        axes.axvline(0, color="black", linewidth=1)
        axes.axvline(_TOLERATED, color="black", linewidth=1, linestyle="--")
        axes.set(xlabel="MRR minus mean of chunks", title=set_name)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), [SYSTEMS[name].about for name in names])
    panels[0].invert_yaxis()
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, 95 % intervals, dashed: {_TOLERATED}; {first['device']}, "
        f"torch {first['torch']}; {first['date']}, {first['commit']}",
        fontsize=9,
    )
    save_figure(figure, png)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rank with every system, write and print the results; or draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of the source, a BERT")
    parser.add_argument("--corpus", type=Path, help="of mra-hf build-corpus")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--documents", type=int, default=100, help="of each of two sets")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents, queries")
    parser.add_argument("--draws", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--resume", action="store_true", help="keep the ranks that OUT has")
    parser.add_argument("--smoke", action="store_true", help="4 documents, three systems")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw the rows of OUT there")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.documents, args.systems = 4, list(_SMOKE_SYSTEMS)
    try:
        if args.draw is None and (args.model is None or args.corpus is None):
            raise ValueError("--model and --corpus are needed, or --draw.")
        if args.draw is None:
            measure(args)
        rows = read_rows(args.out)
        if args.draw is not None:
            if not rows:
                raise ValueError(f"{args.out} holds no rows to draw; measure them first.")
            draw(rows, args.draw)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(rows))
    return 0


def measure(args: argparse.Namespace) -> None:
    """Add the rank of every query with each system to `OUT_ranks.csv`, and rewrite `OUT`."""
    ranks_file = args.out.with_name(f"{args.out.stem}_ranks.csv")
    about = conditions("cpu", torch.get_num_threads())
    about |= {"model": Path(args.model).name, "seed": args.seed}
    with tempfile.TemporaryDirectory() as folder:
        encoders = Encoders(args.model, Path(folder))
        documents = build_documents(
            args.corpus, encoders.count_tokens, per_set=args.documents, seed=args.seed
        )
        rows = query_rows(documents)
        known = _known_ranks(ranks_file, rows) if args.resume else {}
        own = np.array([i for i, x in enumerate(documents) for _ in x.queries])
        texts = [document.text for document in documents]
        queries = encoders.queries([row["query"] for row in rows])
        names = [name for name in SYSTEMS if name in known or name in args.systems]
        finished = {name: known[name] for name in names if name in known}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name in known:
                continue
            started = time.monotonic()

            def progress(done: int, name: str = name) -> None:
                if done % 20 == 0:
                    print(f"{name}: {done} of {len(texts)} documents", flush=True)

            vectors = encoders.documents(SYSTEMS[name], texts, progress)
            finished[name] = ranks(queries, vectors, own).tolist()
            done = [x for x in names if x in finished]
            for row, found in zip(
                rows, zip(*(finished[x] for x in done), strict=True), strict=True
            ):
                row.update(zip(done, found, strict=True))
            write_text(ranks_file, csv_text((*QUERY_COLUMNS, *done), rows))
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        _add_ranks(rows, finished)
        summary = summaries(rows, names, encoders.source_length - 1, args.draws)
    write_text(args.out, csv_text((*CONDITIONS, *COLUMNS), (about | row for row in summary)))


def _add_ranks(rows: Sequence[dict[str, Any]], ranks_of: dict[str, list[int]]) -> None:
    """Add the rank of each query with each system to its row."""
    for index, row in enumerate(rows):
        row.update({name: found[index] for name, found in ranks_of.items()})


def _known_ranks(file: Path, rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """System -> rank of each of the queries `rows`, which must be those of the file."""
    saved = read_rows(file)
    if not saved:
        return {}
    same = [[{k: str(row[k]) for k in QUERY_COLUMNS} for row in some] for some in (saved, rows)]
    if same[0] != same[1]:
        raise ValueError(f"{file} is about other queries; leave --resume out to start again.")
    names = [name for name in saved[0] if name in SYSTEMS]
    return {name: [int(row[name]) for row in saved] for name in names}


if __name__ == "__main__":
    sys.exit(main())
