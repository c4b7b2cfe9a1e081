"""Convert a real checkpoint and see what comes out, in two minutes on a CPU, offline.

Converts SOURCE to a long MRA checkpoint, compares both on masked tokens, fills masks in a long
document, times its attention against dense attention at 4096 tokens on this machine, and draws one
head in two resolutions. Without SOURCE: a small English RoBERTa, before and after further training.

example:
  mra-hf quickstart
  mra-hf quickstart path/to/roberta --text notes.txt --output try-it
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from mra_attention import mra2_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs
from mra_hf.analysis.attention_maps import matrices_of_all_heads, plot_two_resolutions
from mra_hf.conversion import REPORT_NAME, convert_checkpoint
from mra_hf.conversion.report import ConversionReport
from mra_hf.english import LENGTHS as ENGLISH_LENGTHS
from mra_hf.english import english_checkpoint, english_sample
from mra_hf.evaluation import masked_token_scores, read_texts

_TIMED_LENGTH = 4096
_PICTURE_TOKENS = 1024

_CONVERSION_SETTINGS = ("block_per_row", "approx_mode", "initial_prior_diagonal_n_blocks")

#: The marks of byte-level BPE and SentencePiece before a token that begins a word.
WORD_STARTS = ("\u0120", "\u2581")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "source",
        nargs="?",
        help="a checkpoint with a masked-LM head, of a type that mra-hf convert takes: a directory "
        "or hub id. Default: the small English RoBERTa that comes with this package",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart-output"),
        help="folder for the checkpoint, the numbers and the picture (default: %(default)s)",
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure on (default: a sample)")
    parser.add_argument(
        "--max-length", type=int, default=4096, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--block-per-row",
        type=int,
        help="exact blocks per row (default: 8; for the embedded checkpoint as it was trained)",
    )


def run(args: argparse.Namespace) -> int:
    """Run all steps; print a table per step and write `quickstart.json` and `attention.png`."""
    steps = _Steps(total=6)
    checkpoint = args.output / "checkpoint"

    steps.begin("get the source checkpoint")
    text = english_sample() if args.text is None else read_texts(args.text)[0]
    source = args.source or str(english_checkpoint())
    if args.source is not None and args.text is None:
        text = _readable(text, source)

    steps.begin(f"convert it to {args.max_length} tokens and score masked tokens")
    report = convert_checkpoint(
        source,
        checkpoint,
        max_length=args.max_length,
        **_settings(args),
        text=[text],
        force=(checkpoint / REPORT_NAME).exists(),  # left by an earlier quickstart
    )
    print(dataclasses.replace(report, scores=()).summary())

    steps.begin("compare source and result on masked tokens")
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    models = {"untrained": (model, "sdpa")}
    continued = None
    is_embedded = args.source is None and args.block_per_row is None
    if is_embedded and args.max_length <= max(ENGLISH_LENGTHS):
        continued = AutoModelForMaskedLM.from_pretrained(english_checkpoint(max(ENGLISH_LENGTHS)))
        continued.eval()
        models["continued"] = (continued, "mra2")
    scores = _compare(report, models, tokenizer, text)

    best = model if continued is None else continued
    kind = "converted" if continued is None else "continued"
    steps.begin(f"fill masks in a long document with the {kind} checkpoint")
    filled = _fill_masks(best, tokenizer, text)

    steps.begin(f"time attention at {_TIMED_LENGTH} tokens")
    timings = _time_attention(args.block_per_row or 8)

    steps.begin("draw one head in two resolutions")
    picture = args.output / "attention.png"
    drawn = _draw(best, tokenizer, text, picture)

    numbers = {
        "source": args.source or "the embedded English checkpoint",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{"masked_tokens": scores, "filled": filled, "timing": timings, "picture": drawn},
        "seconds": round(steps.elapsed(), 1),
    }
    (args.output / "quickstart.json").write_text(json.dumps(numbers, indent=2) + "\n")
    steps.end()
    print(
        f"\ncheckpoint  {checkpoint}\npicture     {picture}\n"
        f"numbers     {args.output / 'quickstart.json'}\n"
        "\nUse it:\n"
        "  import mra_hf\n"
        "  from transformers import AutoModelForMaskedLM\n"
        f'  model = AutoModelForMaskedLM.from_pretrained("{checkpoint}")'
    )
    return 0


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


def _settings(args: argparse.Namespace) -> dict:
    """Settings of the conversion. Without SOURCE, the continued checkpoint's, so that the rows of
    the table are of one model.
    """
    if args.source is None and args.block_per_row is None:
        config = AutoConfig.from_pretrained(english_checkpoint(max(ENGLISH_LENGTHS)))
        return {name: getattr(config, name) for name in _CONVERSION_SETTINGS}
    return {"block_per_row": 8 if args.block_per_row is None else args.block_per_row}


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
    return " ".join(tokenizer.decode([generator.choice(words)]) for _ in range(1000))


def _compare(report: ConversionReport, models: dict, tokenizer, text: str) -> list[dict]:
    """The report's masked-token scores, then those of `models` (name -> (model, attention))."""

    def row(name: str, attention: str, scores) -> dict:
        return {
            **{"model": name, "attention": attention, "length": scores.length},
            "accuracy": round(scores.accuracy, 4),
            "nll": round(scores.nll, 4),
            "masked_tokens": scores.n_masked,
        }

    rows = [
        row("source" if s.model == "source" else "untrained", s.attention, s) for s in report.scores
    ]
    for name, (model, attention) in models.items():
        original = model.config._attn_implementation
        model.set_attn_implementation(attention)
        scores = masked_token_scores(
            model, tokenizer, text, length=report.max_length, max_tokens=report.scores[-1].n_tokens
        )
        model.set_attn_implementation(original)
        label = "dense" if attention == "sdpa" else report.scores[-1].attention
        rows.append(row(name, label, scores))
    print(f"{'model':<14}{'attention':<11}{'chunk':>6}{'accuracy':>10}{'loss':>8}{'masked':>8}")
    for entry in rows:
        print(
            f"{entry['model']:<14}{entry['attention']:<11}{entry['length']:>6}"
            f"{entry['accuracy']:>10.1%}{entry['nll']:>8.3f}{entry['masked_tokens']:>8}"
        )
    print(f"Up to {report.dense_length} tokens the result is dense attention.", end=" ")
    if report.max_length > report.source_length:
        print(
            f"Beyond the {report.source_length} learned positions the\n"
            "tiled ones cost accuracy, with dense attention too, until training continues.",
            end="",
        )
    print()
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
        and not tokens[i + 1][:1].isalpha()  # the word has no second token
    ]
    if len(words) < count:
        words = [i for i, token in enumerate(ids) if token not in special]
    step = max(1, len(words) // count)
    return words[step // 2 :: step][:count]


def _time_attention(block_per_row: int, repeats: int = 3) -> dict:
    """Median milliseconds of both attentions, interleaved: 12 heads x 64, batch 1, fp32."""
    inputs = topical_inputs(_TIMED_LENGTH)
    providers = {
        "dense (SDPA)": F.scaled_dot_product_attention,
        "MRA-2": lambda *qkv: mra2_attention(*qkv, block_per_row=block_per_row),
    }
    measured: dict[str, dict[str, float]] = {name: {} for name in providers}
    for title, backward in (("forward", False), ("forward + backward", True)):
        samples = interleaved_milliseconds(providers, inputs, backward=backward, repeats=repeats)
        for name, times in samples.items():
            measured[name][title] = round(statistics.median(times), 1)
    print(
        f"{_TIMED_LENGTH} tokens, 12 heads x 64, batch 1, float32, block_per_row {block_per_row}, "
        f"{torch.get_num_threads()} threads, median of {repeats}, ms"
    )
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 1.5 * torch.get_num_threads():
        print(f"This machine is busy (load {busy:.1f}): the timing is disturbed, try again later.")
    print(f"{'':<16}{'forward':>12}{'forward + backward':>22}")
    for name, row in measured.items():
        print(f"{name:<16}{row['forward']:>12.0f}{row['forward + backward']:>22.0f}")
    dense, ours = measured.values()
    print(
        f"{'ratio':<16}{dense['forward'] / ours['forward']:>11.1f}x"
        f"{dense['forward + backward'] / ours['forward + backward']:>21.1f}x"
    )
    return measured


def _draw(model, tokenizer, text: str, path: Path) -> dict:
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=model.config.max_tokens)
    ids = ids["input_ids"][:, :_PICTURE_TOKENS]
    heads = sorted(matrices_of_all_heads(model, {"input_ids": ids}), key=lambda m: m.relative_error)
    head = heads[len(heads) // 2]  # neither the best nor the worst
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_two_resolutions(head, path, f"{ids.shape[1]} tokens")
    errors = f"{heads[0].relative_error:.2f} to {heads[-1].relative_error:.2f}"
    print(
        f"layer {head.layer}, head {head.head}: relative error {head.relative_error:.2f}, "
        f"the median of {len(heads)} heads ({errors})"
    )
    where = {"layer": head.layer, "head": head.head, "tokens": ids.shape[1]}
    return where | {"relative_error": round(head.relative_error, 4)}
