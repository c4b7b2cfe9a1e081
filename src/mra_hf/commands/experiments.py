"""Commands whose settings are dataclasses: a YAML file, overridden by the command line."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from mra_hf.results.files import EXPERIMENT_NAME, HISTORY_NAME, RESULTS_NAME


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the YAML file as the first argument, and defaults of `TrainingArguments` that differ.

    Progress bars show in a terminal alone: in a log file they are a line per step.
    """
    parser.add_argument("config", nargs="?", help="YAML file of settings; the command line wins")
    parser.set_defaults(disable_tqdm=quiet_outside_terminals(), report_to="none")


def quiet_outside_terminals() -> bool:
    """Switch the bars of datasets off where there is no terminal to draw them on."""
    from datasets import disable_progress_bars  # slow to import; commands without it stay quick

    quiet = not sys.stderr.isatty()
    if quiet:
        disable_progress_bars()
    return quiet


def print_results(results: dict[str, Any], training_args: TrainingArguments) -> None:
    """Print the metrics of a run and what it wrote, in its main process."""
    if training_args.process_index:
        return
    for part in ("train", "eval"):
        for name, value in results.get(part, {}).items():
            if isinstance(value, float):
                print(f"{name:<36}{value:>14.4f}")
            elif isinstance(value, (int, str)):
                print(f"{name:<36}{value:>14}")
    written = [RESULTS_NAME, EXPERIMENT_NAME]
    written += [HISTORY_NAME] * training_args.do_train
    print(f"written to {training_args.output_dir}: {', '.join(written)}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`, with the settings of the YAML file it names as defaults.

    Raises:
        ValueError: no such file, no mapping in it, or a setting that does not exist.
    """
    first, _ = parser.parse_known_args(argv)
    if first.config is not None:
        settings = _read(first.config)
        known = {action.dest for action in parser._actions}
        unknown = sorted(str(name) for name in set(settings) - known)
        if unknown:
            raise ValueError(
                f"{first.config} holds settings that do not exist: {', '.join(unknown)}; see "
                f"{parser.prog} --help."
            )
        actions = {action.dest: action for action in parser._actions}
        single = {action.dest for action in parser._actions if action.nargs not in ("+", "*")}
        for name, value in settings.items():
            if isinstance(value, list) and name in single:
                raise ValueError(f"{first.config}: {name} must be one value, got {value}.")
            if isinstance(value, str) and name not in single:
                settings[name] = [value]
            if name in single:
                _check_value(first.config, actions[name], value)
        parser.set_defaults(**settings)
    return parser.parse_args(argv)


def _check_value(config: str, action: argparse.Action, value: Any) -> None:
    """Refuse a value of a YAML file that the command line would refuse.

    Raises:
        ValueError: the message names the file, the setting and what it may be.
    """
    if value is None or isinstance(value, dict) or action.type is None:
        is_fault = value is None and action.default is not None
        wanted = "set"
    else:
        wanted = f"of type {getattr(action.type, '__name__', action.type)}"
        if action.choices is not None:
            wanted = f"one of {list(action.choices)}"
        try:
            if action.type is int and isinstance(value, (bool, float)):
                raise ValueError("no integer")
            found = action.type(str(value))
            is_fault = action.choices is not None and found not in action.choices
        except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
            is_fault = True
    if is_fault:
        raise ValueError(f"{config}: {action.dest} must be {wanted}, got {value!r}.")


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"config must be a YAML file, and {path} is no file.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML in UTF-8: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as `name: value`, a line each.")
    return settings


def dataclasses_of(args: argparse.Namespace, kinds: Sequence[type]) -> tuple[Any, ...]:
    """Instances of the dataclasses `kinds` that the parsed arguments describe."""

    def instance(kind: type) -> Any:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        return kind(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    return tuple(instance(kind) for kind in kinds)
