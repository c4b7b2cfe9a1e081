"""The parser of every command: short help, and errors that name what was probably meant."""

import argparse
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from mra_hf_cli import suggestion

#: What help says about the settings of `Trainer` that most runs set.
TRAINER_HELP = {
    "output_dir": "folder of the run, new or resumed (default: trainer_output)",
    "do_train": "train",
    "do_eval": "evaluate at the end",
    "num_train_epochs": "passes over the training data",
    "max_steps": "stop after so many steps, whatever the epochs",
    "per_device_train_batch_size": "examples of a step on one device",
    "per_device_eval_batch_size": "examples of an evaluation step on one device",
    "gradient_accumulation_steps": "add up the gradients of so many batches before a step",
    "learning_rate": "peak learning rate of AdamW",
    "warmup_steps": "steps to reach it; below 1: as a share of all steps",
    "eval_strategy": "evaluate while training",
    "save_steps": "write a checkpoint after so many steps",
    "logging_steps": "log the loss after so many steps",
    "bf16": "compute in bfloat16",
    "gradient_checkpointing": "compute activations twice, to save memory",
    "resume_from_checkpoint": "true: go on from the last checkpoint in output_dir",
    "seed": "of the new weights and the order of the data",
}
_VALUES: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` for a command and its dataclasses.

    `--help` begins with the example that ends the description. It shows the options of the
    dataclasses in groups, under the first line of their docstrings. Of `TrainingArguments` it shows
    those of `TRAINER_HELP`, and `--help-all` the rest.
    """

    def __init__(self, kinds: Sequence[Any], description: str | None = None, **settings: Any):
        text, _, self.example = (description or "").partition("\nexample:\n")
        column = 34 if kinds else 26
        super().__init__(
            kinds,
            description=text.strip(),
            formatter_class=functools.partial(_HelpFormatter, max_help_position=column),
            **settings,
        )
        more = "show every option of Trainer too, and exit" if kinds else argparse.SUPPRESS
        self.add_argument("--help-all", action=_HelpAll, help=more)

    def format_usage(self) -> str:
        """One line: what must be given, and that there are options."""
        formatter = self._get_formatter()
        formatter.add_usage(self._short_usage(), (), ())
        return formatter.format_help()

    def format_help(self, everything: bool = False) -> str:
        """The help text, with all options of `TrainingArguments` if `everything`."""
        formatter = self._get_formatter()
        if self.example:
            formatter.add_text(f"example:\n{self.example.rstrip()}")
        formatter.add_text(self.description)
        formatter.add_usage(self._short_usage(), (), ())
        sections = self._experiment_sections(everything) if self.dataclass_types else self._groups()
        for title, actions in sections:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def _short_usage(self) -> str:
        if self.dataclass_types:
            return "%(prog)s [FILE.yaml] [--OPTION VALUE ...]"
        formatter = self._get_formatter()
        words = ["%(prog)s"]
        optional = False
        for action in self._actions:
            value = formatter._format_args(action, action.dest.upper())
            if action.nargs == "+":
                value = f"{value.split()[0]} ..."
            if not action.option_strings:
                words.append(value)
            elif action.required:
                words += [action.option_strings[0], value]
            else:
                optional |= not isinstance(action, (argparse._HelpAction, _HelpAll))
        return " ".join([*words, "[--OPTION VALUE ...]"] if optional else words)

    def _groups(self) -> Iterator[tuple[str | None, list[argparse.Action]]]:
        """Title and actions of every group: positional ones first, --help last."""
        positional, options, *titled = (
            (group.title, group._group_actions) for group in self._action_groups
        )
        yield "arguments", positional[1]
        yield from titled
        title = "other options" if titled else "options"
        yield title, sorted(options[1], key=lambda x: isinstance(x, argparse._HelpAction))

    def _experiment_sections(self, everything: bool) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Title and actions of the file and of every dataclass."""
        names = [name for kind in self.dataclass_types for name in _fields(kind)]
        yield "arguments", [action for action in self._actions if action.dest not in names]
        for kind in self.dataclass_types:
            actions = [action for action in self._actions if action.dest in _fields(kind)]
            if not everything:
                actions = _brief(actions, kind)
            title = (kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")
            if issubclass(kind, TrainingArguments):
                title = "Of transformers.TrainingArguments" + (
                    " (all: --help-all)" * (not everything)
                )
            yield title, actions

    def parse_args(  # type: ignore[override]  # argparse types it by the class of the namespace
        self, args=None, namespace=None
    ) -> argparse.Namespace:
        """As argparse's; an unknown option is answered with one that resembles it."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return namespace

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End the program with a sentence on arguments that do not exist."""
        known = [name for action in self._actions for name in action.option_strings]
        options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        hint = suggestion(options[0], known) if options else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}; see {self.prog} --help.")


class _HelpAll(argparse.Action):
    """Print the help with every option, and exit."""

    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


class _HelpFormatter(argparse.HelpFormatter):
    """An option is shown under its first name, with a short word for its value and its default.

    Paragraphs are filled to the width of the terminal; an example keeps its lines.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example:"):
            return text
        paragraphs = text.split("\n\n")
        filled = [super(_HelpFormatter, self)._fill_text(x, width, indent) for x in paragraphs]
        return "\n\n".join(filled)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        is_usual = isinstance(action, (argparse._HelpAction, argparse.BooleanOptionalAction))
        if not action.option_strings or is_usual:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        if action.nargs == "?":  # a flag of a dataclass, which may be followed by true or false
            value = ""
        if action.nargs == "+":
            value = f"{value.split()[0]} ..."
        return f"{action.option_strings[0]} {value}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _VALUES.get(action.type, "VALUE") if action.type else action.dest.upper()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_flag = action.nargs == 0 or (action.nargs == "?" and not action.default)
        is_said = not action.help or "default" in action.help or "not set" in action.help
        if is_flag or is_said or not action.option_strings or action.required:
            return action.help
        if action.default is None:
            return f"{action.help} (default: none)"
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return f"{action.help} (default: %(default)s)"


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


def _brief(actions: Iterable[argparse.Action], kind: type) -> list[argparse.Action]:
    """One action for each option: without `--no_NAME`; of `TrainingArguments` those that most runs
    set, with a shorter help text.
    """
    by_name = {action.dest: action for action in reversed(list(actions))}  # the first of a name
    if not issubclass(kind, TrainingArguments):
        return list(reversed(by_name.values()))
    shown = [by_name[name] for name in TRAINER_HELP if name in by_name]
    for action in shown:
        action.help = TRAINER_HELP[action.dest]
    return shown
