"""Which budget at which length: measured with your checkpoint, text and machine.

For every length, with every budget of exact blocks and with dense attention, it
measures seconds for a document, peak memory, and the masked-token loss; without
a masked-LM head, how far hidden states agree with dense attention. Then one
recommendation: the fastest within 0.05 nats of dense attention, or within a
cosine of 0.95. Checkpoints of other types are converted first, in a temporary
folder. A model of base size takes less than five minutes on two cores.

example:
  mra-hf advise roberta-4096 --text held-out.txt
  mra-hf advise FacebookAI/roberta-base --text held-out.txt --lengths 512 2048
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import mra_hf
from mra_attention.checks import check_int
from mra_hf.analysis.advice import Advice, plot_advice
from mra_hf.analysis.measuring import BUDGETS, LONGEST, advise, lengths_up_to
from mra_hf.attention import supported_attention_modules
from mra_hf.commands.env import processor_name
from mra_hf.commands.experiments import quiet_outside_terminals
from mra_hf.configuration import MraConfig
from mra_hf.conversion import DTYPES, convert_checkpoint
from mra_hf.conversion.sources import SOURCE_TYPES
from mra_hf.data.mlm import load_documents
from mra_hf.loading import load_masked_lm, longest_input, read_config
from mra_hf.results.files import source_commit, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("checkpoint", help="directory or hub id of an encoder")
    usual = parser.add_argument_group("most used options")
    usual.add_argument(
        "--text",
        nargs="+",
        required=True,
        help=".txt or .jsonl files, or folders of them; at least as long as the longest length, "
        "twice that for steady times",
    )
    parser.add_argument(
        "--text-column", default="text", help="field of .jsonl files (default: %(default)s)"
    )
    usual.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens (default: 512, 1024, ... to the model's longest, at most 4096)",
    )
    usual.add_argument(
        "--block-per-row",
        type=int,
        nargs="+",
        metavar="N",
        help=f"budgets (default: {', '.join(map(str, BUDGETS))} and the checkpoint's own)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="tokens of the text to read (default: as many as take about four minutes)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="directory or hub id (default: that of the checkpoint)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="default: %(default)s"
    )
    usual.add_argument(
        "--out",
        type=Path,
        default=Path("advice"),
        help="folder for advice.json and advice.png (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier advice in --out")
    usual.add_argument("--json", action="store_true", help="print advice.json, not a table")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the recommendation, and write the numbers and the picture."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {line}", file=sys.stderr, flush=True)

    quiet_outside_terminals()
    texts = [row["text"] for row in load_documents(args.text, text_column=args.text_column)]
    _check(args)
    with _opened(args, say) as (model, tokenizer, masked_lm):
        supported_attention_modules(model)  # or says why there are none
        longest = longest_input(model) or getattr(model.config, "max_position_embeddings", None)
        if longest is None:
            raise ValueError(f"{args.checkpoint} does not say how much it reads; convert it first.")
        advice = advise(
            model,
            tokenizer,
            texts,
            lengths=args.lengths or lengths_up_to(longest),
            block_per_row=args.block_per_row,
            masked_lm=masked_lm,
            max_tokens=args.max_tokens,
            progress=say,
        )
    say("done")
    content = _conditions(args) | dataclasses.asdict(advice)
    if args.json:
        print(json.dumps(content, indent=2))
    else:
        print(f"{_table(advice)}\n\n{textwrap.fill(advice.recommendation, 98)}", flush=True)
    _write(args, advice, content)
    if not args.json:
        print(f"\nnumbers  {args.out / 'advice.json'}\npicture  {args.out / 'advice.png'}")
        if _is_source(args.checkpoint):
            print(
                f"convert  mra-hf convert {args.checkpoint} OUT --max-length {advice.longest} "
                "--block-per-row N   (what was measured is such a conversion, untrained)"
            )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what could not be measured or written.

    Raises:
        ValueError: the output is there already or is no folder, a length, or a device.
        OSError: the folder cannot be made.
    """
    for length in args.lengths or ():
        check_int("--lengths", length, 3)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder.")
    there = [name for name in ("advice.json", "advice.png") if (args.out / name).exists()]
    if there and not args.force:
        raise ValueError(
            f"{args.out / there[0]} is there already; name another --out, or pass --force to "
            "replace it."
        )
    if blocking := [name for name in there if not (args.out / name).is_file()]:
        raise ValueError(f"{args.out / blocking[0]} is no file; name another --out.")
    folder = next(folder for folder in (args.out, *args.out.parents) if folder.exists())
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; name another --out.")


def _is_source(checkpoint: str) -> bool:
    """Whether a checkpoint is of a type that is converted first."""
    model_type = read_config(checkpoint).model_type
    return model_type != MraConfig.model_type and model_type in SOURCE_TYPES


@contextmanager
def _opened(
    args: argparse.Namespace, say: Callable[[str], None]
) -> Iterator[tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, bool]]:
    """The checkpoint, converted where it is of another type, its tokenizer, and whether it fills in
    masked tokens.
    """
    device = _device(args.device)
    name, config = args.checkpoint, read_config(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        if _is_source(name):
            length = max(args.lengths or [LONGEST])
            say(f"converting it to {length} tokens, into a temporary folder")
            name = str(Path(folder) / "converted")
            convert_checkpoint(args.checkpoint, name, max_length=length, tokenizer=args.tokenizer)
            config = read_config(name)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or name)
        architectures = config.architectures or []
        masked_lm = tokenizer.mask_token_id is not None and any(
            architecture.endswith("ForMaskedLM") for architecture in architectures
        )
        model: PreTrainedModel
        if masked_lm:
            model = load_masked_lm(name)
        else:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        torch.nn.Module.to(model, device, DTYPES[args.dtype])  # in place
        yield model, tokenizer, masked_lm


def _device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none here.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(f"--device {name} is not available here: there are {count} GPUs.")
    return torch.device(name)


def _conditions(args: argparse.Namespace) -> dict:
    """What the numbers depend on."""
    return {
        "checkpoint": args.checkpoint,
        "mra_hf": mra_hf.__version__,
        "commit": source_commit("--untracked-files=no", ":/"),
        "text": [Path(text).name for text in args.text],
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else processor_name(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _write(args: argparse.Namespace, advice: Advice, content: dict) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    where = f"{content['device']}, threads: {content['threads']}"
    title = f"{Path(args.checkpoint).name}, {args.dtype}, {where}"
    plot_advice(advice, args.out / "advice.png", title)
    write_text(args.out / "advice.json", json.dumps(content, indent=2) + "\n")


def _table(advice: Advice) -> str:
    """The rows, and what the columns mean."""
    has_loss = advice.n_masked is not None
    first = advice.rows[0]
    lines = [
        f"{'tokens':>6}  {'attention':<18}{'s/document':>10}{'x dense':>9}{'peak MB':>9}"
        + (f"{'loss':>8}{'over dense':>18}{'over chunks':>18}" if has_loss else f"{'cosine':>8}")
    ]
    for row in advice.rows:
        if row.block_per_row is None:
            dense = row
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        line = (
            f"{row.length:>6}  {row.attention:<18}{row.seconds:>10.2f}"
            f"{dense.seconds / row.seconds:>9.2f}{peak:>9}"
        )
        if has_loss:
            over_dense = "" if row is dense else str(row.over_dense)
            over_chunks = "" if row is first else str(row.over_chunks)
            line += f"{row.loss:>8.3f}{over_dense:>18}{over_chunks:>18}"
        else:
            line += f"{row.cosine:>8.3f}"
        lines.append(line)
    quality = (
        f"loss: of {advice.n_masked} masked tokens, the same in every row, in nats; "
        "over dense, over chunks: difference to dense attention at the same length, and to the "
        "first row, with 95 % intervals"
        if has_loss
        else "cosine: of the last hidden states to those of dense attention at the same length, "
        "mean over tokens"
    )
    notes = (
        f"s/document: seconds of the encoder for {advice.longest} tokens, in chunks of `tokens`; "
        f"x dense: speed against dense attention at the same length; {quality}. Every row read "
        f"{advice.n_tokens} tokens; several texts are read as one. Budgets that hold every block "
        "of a length are left out: they are dense attention there."
    )
    return "\n".join([*lines, "", textwrap.fill(notes, 98)])
