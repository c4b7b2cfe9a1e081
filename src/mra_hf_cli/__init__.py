"""The names of the commands of `mra-hf`, known without importing what they run.

`import mra_hf` takes seconds, since it imports torch and Transformers. Help, the version and a
mistyped command need neither: this package imports the standard library only.
"""

import argparse
import difflib
from collections.abc import Sequence

#: The only place that says the version: the build, `mra_hf.__version__` and `--version` read it.
__version__ = "0.2.0"

#: What one wants to do -> name of a command -> what it does; its module is imported when it runs.
GROUPS = {
    "start": {
        "quickstart": "convert, compare, draw a small model: offline, 2 minutes",
        "env": "versions, and which attention implementations run here",
    },
    "convert and use": {
        "convert": "turn a RoBERTa-family or BERT checkpoint into a long one",
        "export": "write a checkpoint as an ONNX or torch graph",
    },
    "train": {
        "run-mlm": "train or evaluate a masked language model",
        "run-classification": "fine-tune or evaluate a classifier of texts or pairs",
        "run-wikihop": "train or evaluate multi-hop question answering",
        "run-lra": "train and test on a task of the Long Range Arena",
        "build-corpus": "text to train on: the embedded model's English corpus",
        "build-wordnet-hop": "questions to train on: two hops over many documents",
    },
    "measure": {
        "advise": "which budget at which length: on your machine and text",
        "score": "masked-token accuracy and loss on held-out text",
        "calibrate": "propose block_per_row for each layer from a target error",
        "results": "one table and one picture of many training runs",
        "compare": "accuracy of two runs on the same examples, with interval",
    },
    "study": {
        "figures": "draw the figures and Table 7 of the MRA paper",
        "record": "save queries, keys and values of a checkpoint for figures",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}
#: Other names of commands.
ALIASES = {"run-mnli": "run-classification"}

_EXAMPLES = """\
examples:
  mra-hf quickstart
  mra-hf convert FacebookAI/roberta-base roberta-base-mra-4096
  mra-hf COMMAND --help    examples, arguments and defaults of one command

Multi-resolution attention (MRA-2) for RoBERTa-family and BERT encoders."""


def command_of(argv: Sequence[str]) -> str:
    """The command that `argv` begins with, as it is written there.

    Prints help or the version where that is asked for.

    Raises:
        SystemExit: with status 0 after help or the version; with status 2 where `argv` names no
            command.
    """
    parser = _ProgramParser(prog="mra-hf", usage="%(prog)s COMMAND ...")
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("--help-all", action="help")
    parser.add_argument("--version", action="version", version=f"mra_hf {__version__}")
    if not argv:
        parser.error("name a command; mra-hf --help lists them.")
    name = parser.parse_args(argv[:1]).command
    if name not in COMMANDS and name not in ALIASES:
        hint = suggestion(name, (*COMMANDS, *ALIASES))
        parser.error(f"there is no command {name!r}{hint}; mra-hf --help lists them.")
    return name


class _ProgramParser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return program_help()


def program_help() -> str:
    """What `mra-hf --help` prints: examples, then the commands by what one wants to do."""
    width = max(map(len, COMMANDS))
    groups = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {what}" for name, what in group.items())])
        for title, group in GROUPS.items()
    )
    others = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    return f"{_EXAMPLES}\n\n{groups}\n\n{others}; --version prints the version.\n"


def suggestion(name: str, names: Sequence[str]) -> str:
    """`" (did you mean NAME?)"` for what resembles `name` among `names`, else ""."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
