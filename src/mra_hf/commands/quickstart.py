"""Convert a real checkpoint and see what comes out, in two minutes on a CPU.

Converts SOURCE to a long MRA checkpoint, compares both on masked tokens, fills masks, times
attention against dense at 4096 tokens on this machine, and draws one head in two resolutions.

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
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from mra_attention import mra2_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs
from mra_hf import sapiens
from mra_hf.analysis.attention_maps import matrices_of_all_heads, plot_two_resolutions
from mra_hf.conversion import REPORT_NAME, convert_checkpoint
from mra_hf.conversion_report import ConversionReport
from mra_hf.evaluation import masked_token_scores, read_texts

_TIMED_LENGTH = 4096
_PICTURE_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "source",
        nargs="?",
        help="a checkpoint with a masked-LM head: a directory or hub id of type roberta, "
        "xlm-roberta, camembert, bert or mra. Default: a small real RoBERTa of antibody chains, "
        "fetched with pip",
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
        "--block-per-row", type=int, default=8, help="exact blocks per row (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run all steps; print a table per step and write `quickstart.json` and `attention.png`."""
    steps = _Steps(total=6)
    checkpoint = args.output / "checkpoint"

    steps.begin("get the source checkpoint")
    texts, short_texts = _texts(args)
    source = args.source or str(sapiens.sapiens_checkpoint())
    if args.source is not None and args.text is None:
        texts, short_texts = _readable(texts, short_texts, source)

    steps.begin(f"convert it to {args.max_length} tokens and score masked tokens")
    report = convert_checkpoint(
        source,
        checkpoint,
        max_length=args.max_length,
        block_per_row=args.block_per_row,
        text=texts,
        force=(checkpoint / REPORT_NAME).exists(),  # one of an earlier quickstart
    )
    print(dataclasses.replace(report, scores=()).summary())

    steps.begin("compare source and result on masked tokens")
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    scores = _compare(report, model, tokenizer, texts)

    steps.begin("fill masks with the converted checkpoint")
    filled = _fill_masks(model, tokenizer, short_texts)

    steps.begin(f"time attention at {_TIMED_LENGTH} tokens")
    timings = _time_attention(args.block_per_row)

    steps.begin("draw one head in two resolutions")
    picture = args.output / "attention.png"
    drawn = _draw(model, tokenizer, texts, picture)

    numbers = {
        "source": args.source or "sapiens==1.0.5 (heavy chains)",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "masked_tokens": scores,
        "filled": filled,
        "timing": timings,
        "picture": drawn,
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
    """Progress lines on stderr: what is being done, and for how long the run has been going."""

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


def _texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts to measure on, and a few short ones to mask a token of."""
    if args.text is not None:
        texts = read_texts(args.text)
        return texts, [line for line in texts[0].splitlines() if line.strip()][:3]
    if args.source is None:
        # Four times over, about 4000 tokens; each copy has other tokens masked.
        return list(sapiens.HEAVY_CHAINS) * 4, list(sapiens.HEAVY_CHAINS[:3])
    text = resources.files("mra_hf").joinpath("assets/sample.txt").read_text(encoding="utf-8")
    texts = text.split("\n\n")
    return texts, [part.split(". ")[0] + "." for part in texts[:3]]


def _readable(texts: list[str], short_texts: list[str], source: str) -> tuple[list[str], list[str]]:
    """The texts, or words of the tokenizer of `source` where they are unknown to it."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return texts, short_texts  # the conversion says what is wrong
    special = set(tokenizer.all_special_ids)
    known = [token not in special for token in tokenizer(" ".join(texts), verbose=False).input_ids]
    if sum(known) >= len(known) / 2:
        return texts, short_texts
    print(
        "The English sample is unknown to this tokenizer: random words of its vocabulary take its "
        "place.\nPass --text FILE, a text the model was made for, for scores that mean something."
    )
    words = sorted({token for token in tokenizer.get_vocab().values() if token not in special})
    generator = random.Random(0)
    drawn = [
        " ".join(tokenizer.decode([generator.choice(words)]) for _ in range(200)) for _ in range(5)
    ]
    return drawn, [" ".join(text.split()[:20]) for text in drawn[:3]]


def _compare(report: ConversionReport, model, tokenizer, texts: list[str]) -> list[dict]:
    """The report's masked-token scores, and those of the result's weights with dense attention."""
    rows = [
        {
            "model": row.model if row.model == "source" else "result, untrained",
            "attention": row.attention,
            "length": row.length,
            "accuracy": round(row.accuracy, 4),
            "nll": round(row.nll, 4),
            "masked_tokens": row.n_masked,
        }
        for row in report.scores
    ]
    model.set_attn_implementation("sdpa")
    dense = masked_token_scores(
        model, tokenizer, texts, length=report.max_length, max_tokens=report.scores[-1].n_tokens
    )
    model.set_attn_implementation("mra2")
    rows.append(
        rows[-1]
        | {"attention": "dense", "accuracy": round(dense.accuracy, 4), "nll": round(dense.nll, 4)}
    )
    print(f"{'model':<20}{'attention':<11}{'chunk':>6}{'accuracy':>10}{'loss':>8}{'masked':>8}")
    for row in rows:
        print(
            f"{row['model']:<20}{row['attention']:<11}{row['length']:>6}{row['accuracy']:>10.1%}"
            f"{row['nll']:>8.3f}{row['masked_tokens']:>8}"
        )
    print(f"Up to {report.dense_length} tokens the result is dense attention.", end=" ")
    if report.max_length > report.source_length:
        print(
            f"Beyond the {report.source_length} learned positions the\ntiled ones cost accuracy, "
            "with dense attention too, until training continues.",
            end="",
        )
    print()
    return rows


def _fill_masks(model, tokenizer, texts) -> list[dict]:
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    rows = []
    for text in texts:
        room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:room]
        if len(ids) < 3:
            continue
        place = len(ids) // 2
        truth = tokenizer.decode([ids[place]]).strip()
        before, after = (tokenizer.decode(part) for part in (ids[:place], ids[place + 1 :]))
        best = fill(f"{before}{tokenizer.mask_token}{after}", top_k=3)
        guesses = [(guess["token_str"].strip(), round(guess["score"], 3)) for guess in best]
        rows.append(
            {"before": before[-30:], "after": after[:30], "truth": truth, "guesses": guesses}
        )
        shown = ", ".join(f"{token} {score:.0%}" for token, score in guesses)
        print(f"...{before[-30:]}[{truth}]{after[:30]}...  ->  {shown}")
    return rows


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


def _draw(model, tokenizer, texts, path: Path) -> dict:
    ids = tokenizer(
        " ".join(texts), return_tensors="pt", truncation=True, max_length=model.config.max_tokens
    )
    ids = ids["input_ids"][:, :_PICTURE_TOKENS]
    heads = sorted(matrices_of_all_heads(model, {"input_ids": ids}), key=lambda m: m.relative_error)
    chosen = heads[len(heads) // 2]  # neither the best nor the worst head
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_two_resolutions(chosen, path, f"{ids.shape[1]} tokens")
    errors = f"{heads[0].relative_error:.2f} to {heads[-1].relative_error:.2f}"
    print(
        f"layer {chosen.layer}, head {chosen.head}: relative error {chosen.relative_error:.2f}, "
        f"the median of {len(heads)} heads ({errors})"
    )
    return {
        "layer": chosen.layer,
        "head": chosen.head,
        "tokens": ids.shape[1],
        "relative_error": round(chosen.relative_error, 4),
    }
