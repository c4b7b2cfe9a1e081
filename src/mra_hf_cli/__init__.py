"""The names of the commands of `mra-hf`, known without importing what they run.

`import mra_hf` takes seconds, since it imports torch and Transformers. Help, the version and a
mistyped command need neither: this package imports the standard library only.
"""

import argparse
import difflib
from collections.abc import Sequence

#: The only place that says the version: the build, `mra_hf.__version__` and `--version` read it.
__version__ = "0.2.0"

#: Name of a command -> what it does; its module is imported when the command runs.
COMMANDS = {
    "convert": "turn a RoBERTa-family or BERT checkpoint into an MRA checkpoint",
    "export": "write a checkpoint as an ONNX or torch graph that runs without this package",
    "run-mlm": "train or evaluate a masked language model with Trainer",
    "run-classification": "fine-tune and evaluate a classifier of texts or pairs with Trainer",
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
#: Other names of commands.
ALIASES = {"run-mnli": "run-classification"}


def command_of(argv: Sequence[str]) -> str:
    """The command that `argv` begins with, as it is written there.

    Prints help or the version where that is asked for.

    Raises:
        SystemExit: with status 0 after help or the version; with status 2 where `argv` names no
            command.
    """
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    others = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    parser = argparse.ArgumentParser(
        prog="mra-hf",
        usage="%(prog)s COMMAND ...",
        description="Multi-resolution attention for RoBERTa-family encoders.",
        epilog=f"commands ({others}):\n{listed}\n\n"
        "examples:\n  mra-hf quickstart\n  mra-hf convert --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="what to do; see below")
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"mra_hf {__version__}")
    if not argv:
        parser.error("name a command; mra-hf --help lists them.")
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS and name not in ALIASES:
        hint = suggestion(name, (*COMMANDS, *ALIASES))
        parser.error(f"there is no command {name!r}{hint}; mra-hf --help lists them.")
    return name


def suggestion(name: str, names: Sequence[str]) -> str:
    """`" (did you mean NAME?)"` for what resembles `name` among `names`, else ""."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
