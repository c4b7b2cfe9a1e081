"""What the distance bias of converted models should be: its window, its value, and the budget.

Two models of 512 positions, converted to 4096 and not trained. The embedded English model fills in
hidden tokens of the held-out text: nats of the right token. For all-MiniLM-L6-v2, which has no
such head, the hidden states of each token are compared, by cosine, with its states in the middle
of a window of 512 tokens that the source reads. The yardstick of both is the source on separate
chunks of 512 tokens.

example:
  python benchmarks/long_positions.py --minilm all-MiniLM-L6-v2 --corpus corpus/english
  python benchmarks/long_positions.py --draw docs/experiments/long_positions
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.long_documents import read_corpus
from benchmarks.records import Records, conditions, read_rows
from mra_hf import MraConfig, convert_checkpoint
from mra_hf.configuration import AttentionSettings
from mra_hf.english import english_checkpoint
from mra_hf.evaluation import masked_token_scores
from mra_hf.evaluation.agreement import pieces, states_in_windows, states_of_pieces
from mra_hf.loading import longest_input
from mra_hf.results.drawing import new_figure, save_figure

LONGEST = 4096
MODELS = ("english", "minilm")
OUT = ROOT / "benchmarks" / "results" / "long_positions.csv"
CONDITIONS = ("date", "commit", "device", "torch", "transformers")
KEYS = ("model", "attention", "window", "far", "block_per_row", "diagonal", "first")
COLUMNS = (*CONDITIONS, *KEYS, "tokens", "texts", "nll", "accuracy", "cosine", "cosine_worst_text")
#: Of both sweeps, in blocks of 32 tokens and in logits.
WINDOWS, FARS = (4, 8, 12, 13, 14, 15, 16), (-4.0, -6.0, -8.0, -12.0, -16.0)
MRA_WINDOWS, BUDGETS = (4, 6, 8, 10, 12, 14, 15), (8, 16)
#: Where the conversion starts the bias for 512 positions.
WINDOW, FAR = 14, -8.0
#: A window with which each token sees about 512 tokens, as in the source.
HALF = 8

#: Tokens between the windows that MiniLM's states are compared with.
_STRIDE = 256
#: The picture ends so many nats above the yardstick.
_SHOWN_NATS = 0.4
_COLOURS = {"sdpa": "#1f5f99", "8": "#d95f02", "16": "#7570b3"}


@dataclass(frozen=True)
class Setting:
    """One converted model: the columns of `KEYS` but the first.

    Args:
        attention: "chunks" (the source on chunks of 512 tokens), "sdpa" or "mra2".
        window: of the distance bias in blocks; None: no bias.
        far: the bias beyond the window.
        block_per_row: budget of "mra2".
        diagonal: its `initial_prior_diagonal_n_blocks`.
        first: `initial_prior_first_n_blocks`; the pairs of these blocks have no bias, with exact
            attention too.
    """

    attention: str = "sdpa"
    window: int | None = WINDOW
    far: float | None = FAR
    block_per_row: int | None = None
    diagonal: int | None = None
    first: int | None = 0


NO_BIAS = {"window": None, "far": None}
CHUNKS = Setting("chunks", first=None, **NO_BIAS)


def settings() -> list[Setting]:
    """Return what is measured, the cheap settings first."""
    found = [CHUNKS]
    for budget in BUDGETS:
        mra = {"attention": "mra2", "block_per_row": budget}
        found += [Setting(window=window, diagonal=0, **mra) for window in MRA_WINDOWS]
        found += [
            Setting(diagonal=diagonal, first=first, **mra)
            for diagonal, first in ((3, 0), (0, 1), (3, 1))
        ]
        found.append(Setting(window=HALF, diagonal=3, **mra))
        found.append(Setting(diagonal=0, **mra, **NO_BIAS))
    found += [Setting(window=window) for window in WINDOWS]
    found += [Setting(far=far) for far in FARS if far != FAR]
    return [*found, Setting(first=1), Setting(**NO_BIAS)]


class Converted:
    """A source, and its conversions to `LONGEST` tokens with any distance bias."""

    def __init__(self, source: Path, auto_class: Any, folder: Path):
        self.source, self.auto_class, self.folder = source, auto_class, folder
        convert_checkpoint(source, folder, max_length=LONGEST, distance_bias=False)
        self.tokenizer = AutoTokenizer.from_pretrained(source)

    def source_model(self) -> PreTrainedModel:
        """The source, with dense attention."""
        return self.auto_class.from_pretrained(self.source, dtype=torch.float32).eval()

    def model(self, setting: Setting) -> PreTrainedModel:
        """The conversion, with the bias as a new one starts."""
        config = MraConfig.from_pretrained(self.folder)
        config.distance_bias_window = setting.window
        if setting.far is not None:
            config.distance_bias_far = setting.far
        given = {
            "block_per_row": setting.block_per_row,
            "initial_prior_diagonal_n_blocks": setting.diagonal,
            "initial_prior_first_n_blocks": setting.first,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        AttentionSettings.of(config).replace(**changes).write_to(config)
        options = {"config": config, "attn_implementation": setting.attention}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the weights of the bias are missing on purpose
        try:
            model = self.auto_class.from_pretrained(self.folder, dtype=torch.float32, **options)
        finally:
            logging.set_verbosity(verbosity)
        return model.eval()


def english_row(converted: Converted, setting: Setting, texts: Sequence[str], max_tokens: int):
    """Nats and accuracy of hidden tokens: the same tokens with every setting."""
    is_source = setting.attention == "chunks"
    model = converted.source_model() if is_source else converted.model(setting)
    length = longest_input(model) if is_source else LONGEST
    scores = masked_token_scores(
        model, converted.tokenizer, texts, length=length, max_tokens=max_tokens
    )
    amounts = {"tokens": scores.n_tokens, "texts": len(texts)}
    return amounts | {"nll": round(scores.nll, 4), "accuracy": round(scores.accuracy, 4)}


class WindowStates:
    """Texts of one model, and the states of their tokens in windows of the source."""

    def __init__(self, converted: Converted, texts: Sequence[str]):
        self.converted = converted
        tokenizer = converted.tokenizer
        self.borders = (
            torch.tensor([tokenizer.cls_token_id]),
            torch.tensor([tokenizer.sep_token_id]),
        )
        self.width = longest_input(converted.source_model()) - 2
        options = {"add_special_tokens": False, "verbose": False}
        ids = [torch.tensor(tokenizer(text, **options)["input_ids"]) for text in texts]
        self.texts = [one[: LONGEST - 2] for one in ids if len(one) >= LONGEST - 2]
        source = converted.source_model()
        with torch.no_grad():
            self.wanted = [
                states_in_windows(source, ids, self.borders, self.width, _STRIDE)
                for ids in self.texts
            ]

    @torch.no_grad()
    def row(self, setting: Setting) -> dict[str, Any]:
        """Mean cosine of the states of all tokens to those in windows."""
        is_source = setting.attention == "chunks"
        model = self.converted.source_model() if is_source else self.converted.model(setting)
        width = self.width if is_source else LONGEST
        cosines = []
        for ids, wanted in zip(self.texts, self.wanted, strict=True):
            whole = states_of_pieces(model, ids, self.borders, pieces(len(ids), width))
            states = torch.cat([states[1:-1] for states in whole])
            cosines.append(torch.cosine_similarity(states, wanted, dim=-1).mean().item())
        row = {"tokens": sum(map(len, self.texts)), "texts": len(self.texts)}
        row["cosine"] = round(sum(cosines) / len(cosines), 4)
        return row | {"cosine_worst_text": round(min(cosines), 4)}


def measure(args: argparse.Namespace) -> None:
    """Add the rows that OUT lacks."""
    records = Records(args.out, COLUMNS, KEYS)
    about = conditions("cpu", torch.get_num_threads())
    held_out = [text for _, _, text in read_corpus(args.corpus, "heldout/*.jsonl")]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            missing = [x for x in _chosen(args) if not records.has({"model": name} | asdict(x))]
            if not missing:
                continue
            row_of = _measurement(name, args, Path(folder) / name, held_out)
            for setting in missing:
                started = time.monotonic()
                row = {"model": name} | asdict(setting) | row_of(setting)
                records.add(about | row)
                seconds = f"{time.monotonic() - started:.0f} s"
                print({k: v for k, v in row.items() if v is not None}, seconds, flush=True)


def _chosen(args: argparse.Namespace) -> list[Setting]:
    default = Setting("mra2", block_per_row=8, diagonal=0)
    return [CHUNKS, default] if args.smoke else settings()


def _measurement(
    name: str, args: argparse.Namespace, folder: Path, held_out: Sequence[str]
) -> Callable[[Setting], dict[str, Any]]:
    if name == "english":
        converted = Converted(english_checkpoint(), AutoModelForMaskedLM, folder)
        return lambda setting: english_row(converted, setting, held_out, args.max_tokens)
    converted = Converted(args.minilm, AutoModel, folder)
    texts = [text[: 16 * LONGEST] for text in held_out]
    found = WindowStates(converted, texts[:1] if args.smoke else texts)
    if not found.texts:
        raise ValueError(f"{args.corpus} holds no held-out text of {LONGEST} tokens.")
    return found.row


def draw(rows: Sequence[dict[str, str]], folder: Path) -> None:
    """Draw `windows.png` and `far.png`: both models, a panel each."""
    panels = {
        "english": ("nll", "nats of hidden tokens"),
        "minilm": ("cosine", "cosine to windows"),
    }
    titles = {"english": "English model: lower is better", "minilm": "MiniLM: higher is better"}
    for kind, label in (
        ("window", "window, blocks of 32 tokens"),
        ("far", "bias beyond the window"),
    ):
        figure = new_figure(10, 4)
        for axes, (model, (value, about)) in zip(
            figure.subplots(1, 2), panels.items(), strict=True
        ):
            mine = [row for row in rows if row["model"] == model]
            for name, colour, points in _lines(mine, kind, value):
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
            for row in mine:
                if row["attention"] == "chunks":
                    style = {"color": "black", "linestyle": "--"}
                    axes.axhline(float(row[value]), label="source, chunks of 512", **style)
            axes.set(xlabel=label, ylabel=about, title=titles[model])
            if model == "english":
                _cut_off(axes, [float(row[value]) for row in mine if row["attention"] == "chunks"])
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
        first = rows[0]
        figure.suptitle(
            f"converted to 4096 tokens, untrained; {first['device']}, torch {first['torch']}; "
            f"{first['date']}, {first['commit']}",
            fontsize=9,
        )
        save_figure(figure, folder / f"{'windows' if kind == 'window' else 'far'}.png")


def _cut_off(axes: Axes, yardstick: Sequence[float]) -> None:
    """Leave out what is far above the yardstick, and write the values there."""
    top = max(yardstick, default=float("inf")) + _SHOWN_NATS
    if axes.get_ylim()[1] <= top:
        return
    points = [point for line in axes.get_lines() for point in zip(*line.get_data(), strict=True)]
    for x, y in points:
        if y > top:
            place = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{y:.2f}", (x, top), **place)
    axes.set_ylim(min(y for _, y in points) - _SHOWN_NATS / 10, top)


def _lines(rows: Sequence[dict[str, str]], kind: str, value: str) -> Iterator[tuple]:
    """Name, colour and points (x, y) of the lines of a panel."""
    fixed, at = ("far", str(FAR)) if kind == "window" else ("window", str(WINDOW))
    for attention, budget in (("sdpa", ""), *(("mra2", str(budget)) for budget in BUDGETS)):
        points = sorted(
            (float(row[kind]), float(row[value]))
            for row in rows
            if (row["attention"], row["block_per_row"], row[fixed]) == (attention, budget, at)
            and row["diagonal"] in ("", "0")
            and row["first"] == "0"
        )
        if len(points) > 1:
            name = f"MRA-2, {budget} blocks per row" if budget else "exact attention"
            yield name, _COLOURS[budget or attention], points


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of both models as a Markdown table, by budget, priors and window."""
    rows = sorted(rows, key=_place_in_table)
    lines = [
        "| attention | window | bias beyond | nats, English | accuracy | cosine, MiniLM |",
        "|---|---|---|---|---|---|",
    ]
    of_setting: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEYS[1:])
        of_setting.setdefault(key, {})[row["model"]] = row
    for (attention, window, far, budget, diagonal, first), of_model in of_setting.items():
        name = {"chunks": "source, chunks of 512", "sdpa": "exact"}.get(attention)
        name = name or f"MRA-2, {budget} blocks"
        name += f", diagonal {diagonal}" * (diagonal not in ("", "0"))
        name += ", first block" * (first == "1")
        english, minilm = (of_model.get(model, {}) for model in MODELS)
        scores = (english.get("nll"), english.get("accuracy"), minilm.get("cosine"))
        digits = [f"{float(score):.3f}" if score else "" for score in scores]
        biased = [window or "none", f"{float(far):g}" if far else ""]
        lines.append(f"| {' | '.join([name, *biased, *digits])} |")
    return "\n".join(lines)


def _place_in_table(row: dict[str, str]) -> tuple:
    names = ("block_per_row", "diagonal", "first")
    kind = ("chunks", "mra2", "sdpa").index(row["attention"])
    priors = [int(row[name] or 0) for name in names]
    return (kind, *priors, -float(row["far"] or 0), float(row["window"] or "inf"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what OUT lacks and print the table; or draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minilm", type=Path, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--corpus", type=Path, help="of mra-hf build-corpus")
    parser.add_argument("--max-tokens", type=int, default=65536, help="of the English text")
    parser.add_argument("--smoke", action="store_true", help="one text, two settings")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the rows of OUT there")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.max_tokens = LONGEST
    try:
        if args.draw is not None:
            rows = read_rows(args.out)
            if not rows:
                raise ValueError(f"{args.out} holds no rows to draw; measure them first.")
            draw(rows, args.draw)
        elif args.minilm is None or args.corpus is None:
            raise ValueError("--minilm and --corpus are needed, or --draw.")
        else:
            measure(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(read_rows(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
