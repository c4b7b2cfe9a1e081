"""Key blocks narrower than query blocks: error against time, and the loss at the end of a model.

Heads: queries, keys and values of all layers of a model that attends exactly, at 512 tokens and,
converted with a distance bias, at 4096: mean relative error of the heads' outputs, beside the time
of the compiled CPU kernels, 12 heads x 64, selection included. States: cosine of the last hidden
states of the converted MiniLM to those with exact attention, 4096 tokens. Loss: hidden tokens of
held-out text that the converted embedded English model reads 4096 at a time, not trained, or
trained (`--trained NAME=DIRECTORY`, once for each model).

example:
  python benchmarks/key_blocks.py --minilm all-MiniLM-L6-v2 --corpus corpus/english
  python benchmarks/key_blocks.py --draw docs/experiments/key_blocks
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.long_documents import read_corpus
from benchmarks.records import Records, conditions, read_rows, timing_columns
from mra_attention import mra2_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs
from mra_attention.blocks import upsample
from mra_hf import MraModel, convert_checkpoint, set_attention
from mra_hf.baselines.measures import relative_errors
from mra_hf.distance_bias import MraSelfAttention
from mra_hf.english import english_checkpoint
from mra_hf.evaluation import masked_token_scores
from mra_hf.results.drawing import new_figure, save_figure

LENGTHS, BUDGETS = (512, 4096), (2, 4, 8, 16)
LOSS_BUDGETS = (4, 8, 16)
OUT = ROOT / "benchmarks" / "results" / "key_blocks.csv"
CONDITIONS = ("date", "commit", "device", "torch", "transformers")
KEYS = ("part", "model", "length", "block_per_row", "key_block_size", "selection", "diagonal")
COLUMNS = (
    *(*CONDITIONS, *KEYS, "heads", "error", "ms_median", "ms_p20", "ms_p80"),
    *("ms_median_bwd", "ms_p20_bwd", "ms_p80_bwd", "tokens", "nll", "accuracy", "cosine"),
)
#: Widths of key blocks and rules.
_WAYS = (
    *((32, "row_normalized"), (32, "mass"), (16, "mass"), (8, "mass")),
    *((32, "refined"), (8, "refined")),
)
_TEXTS = 2
_REPEATS = 15
_COLOURS = {"32": "#444444", "16": "#7570b3", "8": "#d95f02"}


@dataclass(frozen=True)
class Setting:
    """What is chosen; the last columns of `KEYS`. All None: exact attention."""

    block_per_row: int | None = None
    key_block_size: int | None = None
    selection: str | None = None
    diagonal: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of `mra2_attention`, or of `set_attention`."""
        given = asdict(self)
        given["initial_prior_diagonal_n_blocks"] = given.pop("diagonal")
        return given


EXACT = Setting()


def settings(budgets: Sequence[int], diagonals: Sequence[int] = (0, 1)) -> list[Setting]:
    """Return what is measured: the paper's squares first."""
    return [
        Setting(budget, width, rule, diagonal)
        for budget in budgets
        for width, rule in _WAYS
        for diagonal in diagonals
    ]


@dataclass(frozen=True)
class Layer:
    """Query, key and value `[1, H, N, D]` of a layer and its distance bias `[H, K]` or None."""

    parts: tuple[Tensor, Tensor, Tensor]
    distance_bias: Tensor | None

    def exact(self) -> Tensor:
        """Softmax attention with the bias, one head at a time: N x N."""
        length = self.parts[0].shape[2]
        place = torch.arange(-(-length // 32))
        distance = (place[:, None] - place).abs()
        outputs = []
        for head in range(self.parts[0].shape[1]):
            mask = None
            if self.distance_bias is not None:
                of_blocks = self.distance_bias[head][
                    distance.clamp_max(self.distance_bias.shape[1] - 1)
                ]
                mask = upsample(of_blocks, 32)[:length, :length]
            head_parts = (part[:, head : head + 1] for part in self.parts)
            outputs.append(F.scaled_dot_product_attention(*head_parts, attn_mask=mask))
        return torch.cat(outputs, dim=1)


@torch.no_grad()
def layers_of(model: MraModel, ids: Tensor) -> list[Layer]:
    """What every layer of a model is given when it reads `ids` `[1, N]` with exact attention."""
    model.set_attn_implementation("sdpa")
    modules = [layer.attention.self for layer in model.encoder.layer]
    recorded: dict[tuple[int, str], Tensor] = {}
    handles = []
    for number, module in enumerate(modules):
        for name in ("query", "key", "value"):

            def record(_module, _inputs, output, at=(number, name)):
                recorded[at] = output

            handles.append(getattr(module, name).register_forward_hook(record))
    try:
        model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    for number, module in enumerate(modules):
        parts = tuple(
            recorded[number, name].unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        biased = isinstance(module, MraSelfAttention)
        layers.append(Layer(parts, module.distance_bias(parts[0]) if biased else None))
    return layers


def converted(
    source: Path, length: int, texts: Sequence[str], folder: Path
) -> tuple[PreTrainedModel, Tensor]:
    """`source`, converted to `length` tokens, and the beginnings of texts, `[texts, length]`."""
    path = folder / f"{Path(source).name}-{length}"
    convert_checkpoint(source, path, max_length=length)
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    options = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    ids = [tokenizer(text[: 16 * length], **options)["input_ids"] for text in texts]
    whole = [one for one in ids if one.shape[1] == length][:_TEXTS]
    if not whole:
        raise ValueError(f"no text has {length} tokens.")
    return model, torch.cat(whole)


@torch.no_grad()
def head_rows(layers: Sequence[Layer], chosen: Sequence[Setting]) -> Iterator[tuple[Setting, dict]]:
    """The mean error of all heads with each setting."""
    exact = [layer.exact() for layer in layers]
    for setting in chosen:
        errors = [
            relative_errors(
                mra2_attention(*x.parts, distance_bias=x.distance_bias, **setting.arguments), y
            )
            for x, y in zip(layers, exact, strict=True)
        ]
        found = torch.cat([error.flatten() for error in errors])
        yield setting, {"heads": found.numel(), "error": round(float(found.mean()), 4)}


@torch.no_grad()
def state_rows(model: MraModel, ids: Tensor, chosen: Sequence[Setting]) -> Iterator[tuple]:
    """The mean cosine, over tokens, of the last hidden states to those of exact attention."""
    model.set_attn_implementation("sdpa")
    exact = [model(input_ids=one[None]).last_hidden_state for one in ids]
    for setting in chosen:
        set_attention(model, "mra2", **setting.arguments)
        states = [model(input_ids=one[None]).last_hidden_state for one in ids]
        cosines = [
            torch.cosine_similarity(x, y, dim=-1) for x, y in zip(states, exact, strict=True)
        ]
        mean = float(torch.cat(cosines, dim=1).mean())
        yield setting, {"tokens": ids.numel(), "cosine": round(mean, 4)}


def time_columns(length: int, chosen: Sequence[Setting], repeats: int) -> dict[Setting, dict]:
    """Milliseconds of the forward pass, and of it with the backward pass, of interleaved rounds."""
    inputs = topical_inputs(length)
    providers: dict[Setting, Callable[..., Tensor]] = {EXACT: F.scaled_dot_product_attention}
    for setting in chosen:
        providers[setting] = partial(mra2_attention, impl="native", **setting.arguments)
    named = {str(number): function for number, function in enumerate(providers.values())}
    columns: dict[Setting, dict] = {setting: {} for setting in providers}
    for suffix, backward in (("", False), ("_bwd", True)):
        samples = interleaved_milliseconds(named, inputs, backward=backward, repeats=repeats)
        for setting, milliseconds in zip(providers, samples.values(), strict=True):
            found = timing_columns(milliseconds)
            columns[setting] |= {f"{name}{suffix}": value for name, value in found.items()}
    return columns


def loss_row(model: PreTrainedModel, tokenizer, texts, setting: Setting, max_tokens: int) -> dict:
    """Nats and accuracy of hidden tokens: the same tokens with every setting."""
    if setting == EXACT:
        model.set_attn_implementation("sdpa")
    else:
        set_attention(model, "mra2", **setting.arguments)
    length = model.config.max_tokens
    scores = masked_token_scores(model, tokenizer, texts, length=length, max_tokens=max_tokens)
    found = {"tokens": scores.n_tokens, "nll": round(scores.nll, 4)}
    return found | {"accuracy": round(scores.accuracy, 4)}


def measure(args: argparse.Namespace) -> None:
    """Add the rows that OUT lacks."""
    records = Records(args.out, COLUMNS, KEYS)
    about = conditions("cpu", torch.get_num_threads())
    texts = [text for _, _, text in read_corpus(args.corpus, "heldout/*.jsonl")]
    budgets = BUDGETS[1:2] if args.smoke else BUDGETS
    loss_budgets = LOSS_BUDGETS[1:2] if args.smoke else LOSS_BUDGETS

    def add(part: str, model: str, length: int, setting: Setting, found: dict) -> None:
        row = {"part": part, "model": model, "length": length} | asdict(setting) | found
        records.add(about | row)
        print({name: x for name, x in row.items() if x is not None}, flush=True)

    def lacking(part: str, model: str, length: int, wanted: Sequence[Setting]) -> list[Setting]:
        of_part = {"part": part, "model": model, "length": length}
        return [setting for setting in wanted if not records.has(of_part | asdict(setting))]

    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("minilm", args.minilm), ("english", english_checkpoint())):
            for length in LENGTHS:
                wanted = lacking("heads", name, length, settings(budgets))
                if wanted:
                    model, ids = converted(source, length, texts, Path(folder) / name)
                    layers = [layer for one in ids for layer in layers_of(model, one[None])]
                    for setting, found in head_rows(layers, wanted):
                        add("heads", name, length, setting, found)
        longest = max(LENGTHS)
        # Its first block is global, which takes a budget of 4.
        wanted = lacking("states", "minilm", longest, settings(loss_budgets))
        if wanted:
            model, ids = converted(args.minilm, longest, texts, Path(folder) / "states")
            for setting, found in state_rows(model, ids, wanted):
                add("states", "minilm", longest, setting, found)
    for length in LENGTHS:
        wanted = settings(budgets)
        if lacking("time", "", length, wanted):  # of one run, so that they compare
            for setting, found in time_columns(
                length, wanted, 1 if args.smoke else _REPEATS
            ).items():
                add("time", "", length, setting, found)
    _measure_losses(args, texts, [EXACT, *settings(loss_budgets, (1, 3))], add, lacking)


def _measure_losses(args, texts, wanted: Sequence[Setting], add, lacking) -> None:
    longest = max(LENGTHS)
    with tempfile.TemporaryDirectory() as folder:
        untrained = Path(folder) / "english-4096"
        for name, path in (("english, untrained", untrained), *args.trained):
            missing = lacking("loss", name, longest, wanted)
            if not missing:
                continue
            if path == untrained:
                convert_checkpoint(english_checkpoint(), untrained, max_length=longest)
            model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32).eval()
            tokenizer = AutoTokenizer.from_pretrained(path)
            for setting in missing:
                found = loss_row(model, tokenizer, texts, setting, args.max_tokens)
                add("loss", name, longest, setting, found)


def draw(rows: Sequence[dict[str, str]], folder: Path) -> None:
    """Draw `error_against_time.png`: a panel for each model and length."""
    figure = new_figure(11, 8)
    panels = figure.subplots(2, 2)
    times = {key_of(row)[1:]: row for row in rows if row["part"] == "time"}
    for line, (model, title) in enumerate((("minilm", "MiniLM"), ("english", "English model"))):
        for column, length in enumerate(LENGTHS):
            axes = panels[line, column]
            for width, rule, style in (
                *(("32", "row_normalized", "-"), ("32", "mass", "--"), ("16", "mass", "-")),
                *(("8", "mass", "-"), ("32", "refined", ":"), ("8", "refined", ":")),
            ):
                points = []
                for row in rows:
                    found = (row["part"], row["model"], row["length"], row["diagonal"])
                    of_way = (row["key_block_size"], row["selection"]) == (width, rule)
                    if of_way and found == ("heads", model, str(length), "1"):
                        time = times[("", *key_of(row)[2:])]["ms_median_bwd"]
                        points.append((float(time), float(row["error"])))
                label = f"32 x {width}, {rule}"
                axes.plot(*zip(*points, strict=True), "o", ls=style, c=_COLOURS[width], label=label)
            dense = float(times["", str(length), "", "", "", ""]["ms_median_bwd"])
            axes.axvline(dense, color="#1f5f99", label="exact attention (SDPA), error 0")
            axes.set(xscale="log", ylim=(0, None), title=f"{title}, {length} tokens")
            axes.set(xlabel="forward + backward, ms (12 heads x 64)", ylabel="relative error")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
    first = next(iter(times.values()))
    figure.suptitle(
        f"2, 4, 8 and 16 blocks per row, own block exact; {first['device']}, float32, "
        f"torch {first['torch']}, {first['date']}, {first['commit']}",
        fontsize=9,
    )
    save_figure(figure, folder / "error_against_time.png")


class Tables:
    """The tables of `docs/experiments/key_blocks`, from the rows of OUT."""

    def __init__(self, rows: Sequence[dict[str, str]]):
        self.by_key = {key_of(row): row for row in rows}

    def value(self, part: str, model: str, length: int, setting: Setting, column: str) -> float:
        """A number of a row."""
        chosen = ("" if x is None else str(x) for x in asdict(setting).values())
        return float(self.by_key[(part, model, str(length), *chosen)][column])

    def heads(self) -> str:
        """Errors of heads: a line for each way, 2, 4, 8 (and 16) blocks per row in a cell."""
        lines = [
            "| blocks and rule | MiniLM, 512 | MiniLM, 4096 | English, 512 | English, 4096 |",
            "|---|---|---|---|---|",
        ]
        free = ((32, "row_normalized", 0), (8, "mass", 0))
        for width, rule, diagonal in (*free, *((*way, 1) for way in _WAYS)):
            cells = []
            for model in ("minilm", "english"):
                for length in LENGTHS:
                    budgets = [budget for budget in BUDGETS if 32 * budget < length]
                    of_cell = (Setting(budget, width, rule, diagonal) for budget in budgets)
                    errors = [self.value("heads", model, length, x, "error") for x in of_cell]
                    cells.append(" / ".join(f"{error:.3f}" for error in errors))
            own = ", own block exact" if diagonal else ""
            lines.append(f"| 32 x {width}, {rule}{own} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def times(self) -> str:
        """Milliseconds, and how many times those of squares; the own block exact."""
        columns = ("ms_median", "ms_median_bwd")

        def pair(length: int, setting: Setting) -> list[float]:
            return [self.value("time", "", length, setting, column) for column in columns]

        lines = ["| forward / forward + backward, ms | 512 tokens | 4096 tokens |", "|---|---|---|"]
        exact = ["{:.1f} / {:.0f}".format(*pair(length, EXACT)) for length in LENGTHS]
        lines.append(f"| exact attention (SDPA) | {' | '.join(exact)} |")
        for budget in BUDGETS:
            for width, rule in _WAYS:
                cells = []
                for length in LENGTHS:
                    found = pair(length, Setting(budget, width, rule, 1))
                    squares = pair(length, Setting(budget, *_WAYS[0], 1))
                    ratios = (x / y for x, y in zip(found, squares, strict=True))
                    cells.append("{:.1f} / {:.0f} ({:.2f} / {:.2f})".format(*found, *ratios))
                lines.append(f"| {budget} blocks, 32 x {width}, {rule} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def states(self) -> str:
        """Cosines at the end of MiniLM, the own block exact."""
        lines = [f"| blocks per row | {self._ways()} |", f"|---|{'---|' * len(_WAYS)}"]
        for budget in LOSS_BUDGETS:
            found = (Setting(budget, *way, 1) for way in _WAYS)
            values = [self.value("states", "minilm", max(LENGTHS), x, "cosine") for x in found]
            lines.append(f"| {budget} | {' | '.join(f'{value:.3f}' for value in values)} |")
        return "\n".join(lines)

    def losses(self) -> str:
        """Nats at the end of the English model, a diagonal of 3 blocks exact."""
        longest = max(LENGTHS)
        lines = [f"| model | blocks | {self._ways()} |", f"|---|---|{'---|' * len(_WAYS)}"]
        for model in dict.fromkeys(key[1] for key in self.by_key if key[0] == "loss"):
            exact = self.value("loss", model, longest, EXACT, "nll")
            name = f"{model.removeprefix('english, ')} (exact: {exact:.3f})"
            for budget in LOSS_BUDGETS:
                found = (Setting(budget, *way, 3) for way in _WAYS)
                values = [self.value("loss", model, longest, x, "nll") for x in found]
                cells = " | ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {name} | {budget} | {cells} |")
        return "\n".join(lines)

    @staticmethod
    def _ways() -> str:
        return " | ".join(f"32 x {width}, {rule}" for width, rule in _WAYS)


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """The columns of `KEYS`."""
    return tuple(row[name] for name in KEYS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what OUT lacks, or draw it, or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minilm", type=Path, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--corpus", type=Path, help="of mra-hf build-corpus")
    parser.add_argument(
        "--trained", action="append", default=[], type=_named, metavar="NAME=DIRECTORY"
    )
    parser.add_argument("--max-tokens", type=int, default=65536, help="of the English text")
    parser.add_argument("--smoke", action="store_true", help="one budget, few tokens")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the rows of OUT there")
    parser.add_argument("--tables", action="store_true", help="print the tables of OUT")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.max_tokens = max(LENGTHS)
    try:
        if args.tables:
            tables = Tables(read_rows(args.out))
            print(*(tables.heads(), tables.times(), tables.states(), tables.losses()), sep="\n\n")
        elif args.draw is not None:
            rows = read_rows(args.out)
            if not rows:
                raise ValueError(f"{args.out} holds no rows to draw; measure them first.")
            draw(rows, args.draw)
        elif args.minilm is None or args.corpus is None:
            raise ValueError("--minilm and --corpus are needed, or --draw or --tables.")
        else:
            measure(args)
    except KeyError as error:
        parser.error(f"{args.out} has no row {error}; measure it first.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=DIRECTORY, got {text!r}.")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
