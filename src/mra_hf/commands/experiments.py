"""Commands whose settings are dataclasses: a YAML file, overridden by the command line.

Such a command has `DATACLASSES`, `add_arguments = add_training_arguments`, and a `run` that hands
the function of its task to `run_experiment`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from mra_hf.commands.parsing import CommandParser
from mra_hf.results.files import EXPERIMENT_NAME, HISTORY_NAME, RESULTS_NAME
from mra_hf_cli import suggestion


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the YAML file as the first argument, and change defaults of `TrainingArguments`.

    Progress bars are shown in a terminal only: in a log file they are a line per step. Memory is
    pinned only where there is a device to copy it to: elsewhere torch warns at every data loader.
    """
    parser.add_argument(
        "config",
        nargs="?",
        metavar="FILE.yaml",
        help="settings as `name: value`, a line each",
    )
    parser.set_defaults(
        disable_tqdm=quiet_outside_terminals(),
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def quiet_outside_terminals() -> bool:
    """Switch off the progress bars of datasets unless stderr is a terminal; True if so."""
    from datasets import disable_progress_bars  # slow to import; commands without it stay quick

    quiet = not sys.stderr.isatty()
    if quiet:
        disable_progress_bars()
    return quiet


def run_experiment(
    args: argparse.Namespace,
    kinds: Sequence[type],
    run: Callable[..., dict[str, Any]],
    print_more: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run an experiment and print its results in the main process; return the exit status.

    Args:
        args: as parsed.
        kinds: the dataclasses that `run` takes, `TrainingArguments` last.
        run: the function of the task; returns what `results.json` holds.
        print_more: prints results beside the metrics.
    """
    arguments = dataclasses_of(args, kinds)
    results = run(*arguments)
    if arguments[-1].process_index == 0:
        _print_results(results, arguments[-1])
        if print_more is not None:
            print_more(results)
    return 0


def _print_results(results: dict[str, Any], training_args: TrainingArguments) -> None:
    """Print the metrics of a run and the files it wrote."""
    for part in ("train", "eval"):
        for name, value in results.get(part, {}).items():
            if isinstance(value, float):
                unit = " s" if name.endswith("_runtime") else ""
                print(f"{name:<36}{value:>14.4f}{unit}")
            elif isinstance(value, (int, str)):
                print(f"{name:<36}{value:>14}")
    output = Path(training_args.output_dir or ".")
    written = ["the model"] * any(output.glob("model*.safetensors"))
    written += [RESULTS_NAME, EXPERIMENT_NAME]
    written += [HISTORY_NAME] * training_args.do_train
    written += sorted(path.name for path in output.glob("predictions*.*"))
    print(f"written to {training_args.output_dir}: {', '.join(written)}")


def parse(parser: CommandParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv`, with the settings of the YAML file it names as defaults.

    Raises:
        ValueError: no such file, no mapping in it, or a setting that does not exist.
    """
    first, unknown = parser.parse_known_args(argv)
    if unknown:  # before their values are taken for the file
        parser.refuse(unknown)
    if first.config is not None:
        settings = _read(first.config)
        actions = {action.dest: action for action in parser._actions}
        unknown = sorted(str(name) for name in set(settings) - set(actions))
        if unknown:
            named = [f"{name}{suggestion(name, tuple(actions))}" for name in unknown]
            raise ValueError(
                f"{first.config} holds settings that do not exist: {', '.join(named)}; "
                f"see {parser.prog} --help, and --help-all for those of Trainer."
            )
        single = {name for name, action in actions.items() if action.nargs not in ("+", "*")}
        for name, value in settings.items():
            if name in single:
                if isinstance(value, list):
                    raise ValueError(f"{first.config}: {name} must be one value, got {value}.")
                _check_value(first.config, actions[name], value)
            elif isinstance(value, str):
                settings[name] = [value]
        parser.set_defaults(**settings)
    return parser.parse_args(argv)


def _check_value(config: str, action: argparse.Action, value: Any) -> None:
    """Refuse a value of a YAML file that the command line would refuse.

    Raises:
        ValueError: the message names the file, the setting and what it may be.
    """
    if value is None or isinstance(value, dict) or action.type is None:
        is_fault = value is None and action.default is not None
        allowed = "set"
    else:
        allowed = f"of type {getattr(action.type, '__name__', action.type)}"
        if action.choices is not None:
            allowed = f"one of {list(action.choices)}"
        try:
            if action.type is int and isinstance(value, (bool, float)):
                raise ValueError("no integer")
            assert callable(action.type)  # not the name of a type, which argparse knows too
            converted = action.type(str(value))
            is_fault = action.choices is not None and converted not in action.choices
        except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
            is_fault = True
    if is_fault:
        raise ValueError(f"{config}: {action.dest} must be {allowed}, got {value!r}.")


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
