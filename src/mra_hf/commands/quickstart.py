"""Convert a real checkpoint and see what comes out, in two minutes on a CPU, offline.

Converts SOURCE to a long MRA checkpoint, compares both on masked tokens of a held-out text (a model
that fills in no masks: by hidden states), fills masks in a long document, times its attention
against dense attention on this machine, and draws one head in two resolutions.

example:
  mra-hf quickstart
  mra-hf quickstart path/to/roberta --text notes.txt --output try-it
  mra-hf quickstart path/to/all-MiniLM-L6-v2
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from mra_attention import mra2_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs
from mra_hf.analysis.attention_maps import (
    HeadMatrices,
    matrices_of_all_heads,
    plot_two_resolutions,
)
from mra_hf.conversion import REPORT_NAME, convert_checkpoint
from mra_hf.conversion.report import ConversionReport
from mra_hf.conversion.scoring import (
    fills_masks,
    open_source_encoder,
    open_source_masked_lm,
    source_states,
)
from mra_hf.conversion.sources import Source, read_source
from mra_hf.english import LENGTHS as ENGLISH_LENGTHS
from mra_hf.english import english_checkpoint, english_passage
from mra_hf.evaluation import MaskedTokenLosses, masked_token_losses, read_texts

_TIMED_LENGTH = 4096
#: Exact blocks per row that attention is timed with.
_TIMED_BLOCKS = 8
#: A machine gives a process at least this share of its cores' time when nothing else runs on them.
_UNDISTURBED = 0.85
_PICTURE_TOKENS = 1024
#: The most tokens of a text that are scored.
_SCORED_TOKENS = 32768
#: Exact blocks per row of a conversion that is used without training.
_UNTRAINED_BLOCKS = 16
#: Blocks of the diagonal that such a conversion keeps exact.
_DIAGONAL_BLOCKS = 3

#: The marks of byte-level BPE and SentencePiece before a token that begins a word.
WORD_STARTS = ("\u0120", "\u2581")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="directory or hub id of a model that mra-hf convert takes (default: the small English "
        "RoBERTa that comes with this package)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("quickstart-output"),
        help="folder for the checkpoint, the numbers and the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to measure on (default: an English sample)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        default=4096,
        help="longest sequence of the result, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--block-per-row",
        type=int,
        metavar="N",
        default=_UNTRAINED_BLOCKS,
        help="exact blocks per block row; 8 do if you train further (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run all steps; print a table per step and write `quickstart.json` and `attention.png`."""
    steps = _Steps(total=6)
    checkpoint = args.output / "checkpoint"

    steps.begin("get the source checkpoint")
    text = english_passage() if args.text is None else read_texts(args.text)[0]
    source = args.source or str(english_checkpoint())
    read = read_source(source)
    if args.source is not None and args.text is None:
        text = _readable(text, source)

    steps.begin(f"convert it to {args.max_length} tokens")
    report = convert_checkpoint(
        source,
        checkpoint,
        max_length=args.max_length,
        block_per_row=args.block_per_row,
        initial_prior_diagonal_n_blocks=_DIAGONAL_BLOCKS if args.block_per_row > 3 else None,
        force=(checkpoint / REPORT_NAME).exists(),  # left by an earlier quickstart
    )
    print(report.summary())

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if fills_masks(report.model_class, tokenizer):
        best, measured = _masked_tokens(args, steps, report, read, tokenizer, text)
    else:
        best, measured = _agreement(steps, report, read, tokenizer, text)

    steps.begin(f"time attention at {_TIMED_LENGTH} tokens")
    timings = _time_attention()

    steps.begin("draw one head in two resolutions")
    picture = args.output / "attention.png"
    drawn = _draw(best, tokenizer, text, picture)

    numbers = {
        "source": args.source or "the embedded English checkpoint",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **measured,
        **{"timing": timings, "picture": drawn},
        "seconds": round(steps.elapsed(), 1),
    }
    (args.output / "quickstart.json").write_text(json.dumps(numbers, indent=2) + "\n")
    steps.end()
    print(
        f"\ncheckpoint  {checkpoint}\n"
        f"picture     {picture if drawn else '-'}\n"
        f"numbers     {args.output / 'quickstart.json'}\n"
        "\nUse it:\n"
        "  import mra_hf\n" + _opening_lines(report, checkpoint)
    )
    return 0


def _opening_lines(report: ConversionReport, checkpoint: Path) -> str:
    """Python that opens the result."""
    if report.opened_by is not None:
        return (
            f"  from sentence_transformers import {report.opened_by}\n"
            f'  model = {report.opened_by}("{checkpoint}")'
        )
    return (
        f"  from transformers import {report.auto_class}\n"
        f'  model = {report.auto_class}.from_pretrained("{checkpoint}")'
    )


class _Steps:
    """Progress lines on stderr: the current step, and the seconds since the start."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def begin(self, what: str) -> None:
        self.done += 1
        sys.stdout.flush()
        print(f"\n[{self.done}/{self.total}] {what}  ({self.elapsed():.0f} s)", file=sys.stderr)

    def end(self) -> None:
        sys.stdout.flush()
        print(f"\ndone in {self.elapsed():.0f} s", file=sys.stderr)


def _masked_tokens(
    args: argparse.Namespace,
    steps: _Steps,
    report: ConversionReport,
    source: Source,
    tokenizer,
    text,
) -> tuple[PreTrainedModel, dict]:
    """Two steps for masked language models; the model to go on with, and the numbers."""
    steps.begin("compare source and result on masked tokens")
    read = open_source_masked_lm(source)
    # Half precision, in which a source may be stored, is slow on a CPU.
    options = {"dtype": torch.float32}
    model = AutoModelForMaskedLM.from_pretrained(args.output / "checkpoint", **options).eval()
    continued = None
    if args.source is None and args.max_length <= max(ENGLISH_LENGTHS):
        continued = AutoModelForMaskedLM.from_pretrained(english_checkpoint(max(ENGLISH_LENGTHS)))
    scores = _compare(report, read, model, continued, tokenizer, text)
    del read

    best = model if continued is None else continued
    kind = "converted" if continued is None else "continued"
    steps.begin(f"fill masks in a long document with the {kind} checkpoint")
    return best, {"masked_tokens": scores, "filled": _fill_masks(best, tokenizer, text)}


def _agreement(
    steps: _Steps, report: ConversionReport, source: Source, tokenizer, text: str
) -> tuple[PreTrainedModel, dict]:
    """Two steps for all other models; the encoder to go on with, and the numbers."""
    steps.begin("read the text with the source, in overlapping windows")
    encoder, source_attention = open_source_encoder(source)
    states = source_states(report, source, encoder, tokenizer, text)
    steps.begin("compare the hidden states of source and result")
    folder = report.output
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    short, long = min(report.source_length, report.max_length), report.max_length
    columns = "{:<11}{:<20}{:>6}{:>10}{:>10}"
    print(columns.format("model", "attention", "chunk", "states", "pooled"))
    rows: list[dict] = []
    for name, compared, attention, length in (
        ("source", encoder, None, short),
        ("untrained", model, "sdpa", long),
        ("untrained", model, "mra2", long),
    ):
        label = source_attention if attention is None else _with_attention(compared, attention)
        found = states.agreement(compared, length)
        row = {"model": name, "attention": label, "length": length}
        row |= {"states": round(found.states, 4), "pooled": round(found.pooled, 4)}
        rows.append(row | {"tokens": found.n_tokens, "documents": found.n_documents})
        cosines = (f"{found.states:.3f}", f"{found.pooled:.3f}")
        print(columns.format(name, label, length, *cosines), flush=True)
    print(
        f"{rows[0]['tokens']} tokens of {rows[0]['documents']} documents, the same in every row. "
        "states: mean cosine of the\nlast hidden state of a token to its state in the middle of a "
        "window of the source; pooled:\ncosine of the embedding of a document "
        f"({states.pooling}) to the source's mean over its chunks."
    )
    return model, {"agreement": rows}


def _with_attention(model: PreTrainedModel, attention: str) -> str:
    """Switch the attention of a result and return its name for tables."""
    model.set_attn_implementation(attention)
    mode = "MRA-2" if model.config.approx_mode == "full" else "MRA-2-s"
    return "dense" if attention == "sdpa" else f"{mode}, {model.config.block_per_row} blocks"


def _readable(text: str, source: str) -> str:
    """The text, or random words if the tokenizer of `source` does not know its words."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return text  # the conversion says what is wrong
    special = set(tokenizer.all_special_ids)
    known = [token not in special for token in tokenizer(text, verbose=False).input_ids]
    if sum(known) >= len(known) / 2:
        return text
    print(
        "The English sample is unknown to this tokenizer: "
        "random words of its vocabulary take its place.\n"
        "Pass --text FILE, a text the model was made for, for scores that mean something."
    )
    words = sorted({token for token in tokenizer.get_vocab().values() if token not in special})
    generator = random.Random(0)
    drawn = [generator.choice(words) for _ in range(1000)]
    return " ".join(str(tokenizer.decode([word])) for word in drawn)


def _compare(report: ConversionReport, source, model, continued, tokenizer, text) -> list[dict]:
    """Score masked tokens: of the source in chunks of its length, of the result and of its
    continuation (or None) at the result's; every difference is taken token by token.
    """
    source_model, source_attention = source
    short, long = min(report.source_length, report.max_length), report.max_length
    columns = "{:<11}{:<20}{:>6}{:>10}{:>8}{:>22}"
    print(columns.format("model", "attention", "chunk", "accuracy", "loss", "against the source"))
    rows: list[dict] = []
    first: MaskedTokenLosses | None = None
    for name, scored, attention, length in (
        ("source", source_model, None, short),
        ("untrained", model, "sdpa", long),
        ("untrained", model, "mra2", long),
        ("continued", continued, "mra2", long),
    ):
        if scored is None:
            continue
        label = source_attention if attention is None else _with_attention(scored, attention)
        losses = masked_token_losses(
            scored, tokenizer, text, length=length, max_tokens=max(_SCORED_TOKENS, long)
        )
        scores = losses.scores()
        row = {"model": name, "attention": label, "length": length}
        row |= {"accuracy": round(scores.accuracy, 4), "nll": round(scores.nll, 4)}
        row["masked_tokens"] = scores.n_masked
        against = ""
        if first is not None:
            mean, half = losses.difference(first)
            row |= {"nll_difference": round(mean, 4), "half_interval": round(half, 4)}
            against = f"{mean:+.3f} +- {half:.3f}"
        first = first or losses
        rows.append(row)
        loss, accuracy = f"{scores.nll:.3f}", f"{scores.accuracy:.1%}"
        print(columns.format(name, label, length, accuracy, loss, against), flush=True)
    print(
        f"{rows[0]['masked_tokens']} masked tokens, the same in every row; loss in nats, "
        "differences with their 95 % intervals.\nchunk: tokens read at once; untrained: the "
        "result of the conversion as it is"
        + (
            "."
            if continued is None
            else "; continued: the same after\nfurther training, which comes with this package."
        )
    )
    return rows


@torch.no_grad()
def _fill_masks(model, tokenizer, text: str, count: int = 8) -> list[dict]:
    """Hide `count` words of the document at once and print the model's guesses."""
    ids = tokenizer(
        text, truncation=True, max_length=model.config.max_tokens, return_tensors="pt"
    ).input_ids
    hidden = _words(ids[0].tolist(), tokenizer, count)
    masked = ids.clone()
    masked[0, hidden] = tokenizer.mask_token_id
    begin = time.perf_counter()
    states = model.base_model(masked).last_hidden_state[0, hidden]
    probabilities = model.lm_head(states).float().softmax(-1)  # [hidden, vocabulary]
    seconds = time.perf_counter() - begin
    print(f"{ids.shape[1]} tokens, {len(hidden)} of them hidden, read at once in {seconds:.2f} s")
    rows = []
    for position, guess in zip(hidden, probabilities, strict=True):
        best = guess.topk(3)
        left, right = ids[0, max(0, position - 12) : position], ids[0, position + 1 : position + 9]
        before, after = (
            " ".join(tokenizer.decode(context, skip_special_tokens=True).split())
            for context in (left, right)
        )
        truth = tokenizer.decode(ids[0, position]).strip()
        guesses = [
            (tokenizer.decode([token]).strip(), round(score, 3))
            for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        context = {"place": position, "before": before, "after": after}
        rows.append(context | {"truth": truth, "guesses": guesses})
        listed = ", ".join(f"{token} {score:.0%}" for token, score in guesses)
        print(f"{position:>6}  ...{before[-34:]} [{truth}] {after[:20]}...  ->  {listed}")
    return rows


def _words(ids: list[int], tokenizer, count: int) -> list[int]:
    """Positions of whole words, spread evenly over the document; of any tokens if words are few."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    words = [
        i
        for i, token in enumerate(tokens[:-1])
        if ids[i] not in special
        and token[:1] in WORD_STARTS
        and token[1:].isalpha()
        # The word has no second token. The marks themselves count as letters.
        and (tokens[i + 1][:1] in WORD_STARTS or not tokens[i + 1][:1].isalpha())
    ]
    if len(words) < count:
        words = [i for i, token in enumerate(ids) if token not in special]
    step = max(1, len(words) // count)
    return words[step // 2 :: step][:count]


def _time_attention(repeats: int = 3) -> dict:
    """Median milliseconds of both attentions, interleaved: 12 heads x 64, batch 1, fp32. No ratio
    where other programs took part of the cores: threads that wait for one another then measure
    those programs.
    """
    inputs, threads = topical_inputs(_TIMED_LENGTH), torch.get_num_threads()
    providers = {
        "dense (SDPA)": F.scaled_dot_product_attention,
        "MRA-2": lambda *qkv: mra2_attention(*qkv, block_per_row=_TIMED_BLOCKS),
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    measured: dict[str, dict[str, float]] = {name: {} for name in providers}
    shares = []
    for title, backward in (("forward", False), ("forward + backward", True)):
        wall, used = time.perf_counter(), time.process_time()
        samples = interleaved_milliseconds(providers, inputs, backward=backward, repeats=repeats)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        shares.append(used / (wall * threads))
        for name, times in samples.items():
            measured[name][title] = round(statistics.median(times), 1)
    print(
        f"{_TIMED_LENGTH} tokens, 12 heads x 64, batch 1, float32, block_per_row {_TIMED_BLOCKS}, "
        f"{threads} threads, median of {repeats}, ms"
    )
    print(f"{'':<16}{'forward':>12}{'forward + backward':>22}")
    for name, row in measured.items():
        print(f"{name:<16}{row['forward']:>12.0f}{row['forward + backward']:>22.0f}")
    undisturbed = min(shares) >= _UNDISTURBED
    if undisturbed:
        dense, ours = measured.values()
        print(
            f"{'ratio':<16}{dense['forward'] / ours['forward']:>11.1f}x"
            f"{dense['forward + backward'] / ours['forward + backward']:>21.1f}x"
        )
    else:
        print(
            f"No ratio: this process got {min(shares):.0%} of the time of {threads} cores, the "
            "rest went to\nother programs. Run it again on an idle machine."
        )
    return {"milliseconds": measured, "share_of_cores": round(min(shares), 3), "load": load}


def _draw(model, tokenizer, text: str, path: Path) -> dict | None:
    """Draw the head in which one sees best what the method does, or none where all err too much."""
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_tokens)
    ids = ids["input_ids"][:, :_PICTURE_TOKENS]
    heads = matrices_of_all_heads(model, {"input_ids": ids})
    head = max(heads, key=_clarity)
    errors = sorted(head.relative_error for head in heads)
    listed = f"{len(heads)} heads err by {errors[0]:.2f} to {errors[-1]:.2f}"
    path.unlink(missing_ok=True)
    if head.relative_error >= 1:
        print(f"No picture: {listed}, relative to the exact matrix, as much as zeros would.")
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_two_resolutions(head, path, f"{ids.shape[1]} tokens")
    print(
        f"layer {head.layer}, head {head.head}, chosen for clarity: relative error "
        f"{head.relative_error:.2f} ({listed})"
    )
    where = {"layer": head.layer, "head": head.head, "tokens": ids.shape[1]}
    return where | {"relative_error": round(head.relative_error, 4)}


def _clarity(head: HeadMatrices) -> float:
    """How much of what the head attends to lies in exact blocks off the diagonal, and how well it
    is approximated; at most 0 where the approximation errs as much as zeros would.
    """
    length = head.exact.shape[0]
    block = torch.arange(length) // head.selection.block_size
    covered = head.chosen_tokens & ((block[:, None] - block).abs() > 1)
    share = float((head.exact * covered).sum() / length)
    return (1 - head.relative_error) * (0.1 + share)
