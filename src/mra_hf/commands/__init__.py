"""The `mra-hf` program: `mra-hf NAME ...` runs the module `mra_hf.commands.NAME`.

Such a module has a docstring (the help text, with an example), `add_arguments(parser)` and
`run(args) -> int`. A module that runs an experiment also has `DATACLASSES`, whose fields become
arguments and keys of a YAML file. Scripts call the same function through `run_command`.
"""

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from transformers import HfArgumentParser
from transformers.utils import logging

import mra_hf
from mra_hf.commands import experiments

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Name of a command -> what it does; its module is imported when the command runs.
COMMANDS = {
    "convert": "turn a RoBERTa-family or BERT checkpoint into an MRA checkpoint",
    "run-mlm": "train or evaluate a masked language model with Trainer",
    "run-mnli": "fine-tune and evaluate a classifier of texts or pairs with Trainer",
    "run-wikihop": "train or evaluate multi-hop question answering over candidates with Trainer",
    "run-lra": "train and test an encoder on a task of the Long Range Arena with Trainer",
    "score": "masked-token accuracy and loss of checkpoints on held-out text",
    "results": "one table and one picture of many runs, beside the figures of the paper",
    "compare": "two runs on the same examples: difference in accuracy and its interval",
    "record": "queries, keys and values of a checkpoint that reads text, for figures",
    "figures": "the figures and Table 7 of the MRA paper, on a checkpoint or on synthetic heads",
    "calibrate": "propose block_per_row for each layer of a checkpoint from a target error",
    "build-corpus": "the English corpus of the embedded checkpoint, and its tokenizer",
    "build-wordnet-hop": "two-hop questions over many short documents, in WikiHop's schema",
    "env": "versions, and which implementations of the attention run here and why not",
    "quickstart": "the whole journey on a small English checkpoint, offline, in two minutes",
}


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the program on `argv` (default: the command line) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mra-hf",
        description="Multi-resolution attention for RoBERTa-family encoders.",
        epilog=f"commands:\n{listed}\n\nexample:\n  mra-hf convert --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do; see below")
    parser.add_argument("--version", action="version", version=f"mra_hf {mra_hf.__version__}")
    return run_command(parser.parse_args(argv[:1]).command, argv[1:])


def run_command(name: str, argv: "Sequence[str] | None" = None) -> int:
    """Run the command `name` on `argv` (default: the command line) and return its exit status.

    A `ValueError` or `OSError` is printed as one sentence; the status is then 2.
    """
    module = importlib.import_module(f"mra_hf.commands.{name.replace('-', '_')}")
    parser = HfArgumentParser(
        getattr(module, "DATACLASSES", ()),
        prog=f"mra-hf {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if hasattr(module, "DATACLASSES"):
            return module.run(experiments.parse(parser, argv))
        return module.run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    finally:
        _leave_process_group()
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _leave_process_group() -> None:
    """End the communication threads of a run in several processes: a process that exits while they
    work may abort, and the launcher then stops the other processes before they have saved.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
