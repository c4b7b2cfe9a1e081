"""The `mra-hf` program: `mra-hf NAME ...` runs the module `mra_hf.commands.NAME`.

Such a module has a docstring (the help text; the command lines that end it, under "example:", are
shown first), `add_arguments(parser)` and `run(args) -> int`. A module that runs an experiment also
has `DATACLASSES`, whose fields become arguments and keys of a YAML file. Scripts call the same
function through `run_command`.
"""

import errno
import importlib
import sys
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from mra_hf.commands import experiments
from mra_hf.commands.parsing import CommandParser
from mra_hf_cli import ALIASES, command_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import ModuleType


#: What the system refuses -> what it means and what to do.
_SYSTEM_ERRORS = {
    errno.ENOENT: "there is no such file or folder, and it cannot be made; choose another path",
    errno.EACCES: "permission denied; choose a path that you may read and write",
    errno.EPERM: "permission denied; choose a path that you may read and write",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.EEXIST: "is a file, and a folder is needed; choose another path",
    errno.EISDIR: "is a folder; name a file",
    errno.ENOTDIR: "a part of this path is a file; choose another path",
    errno.ENOSPC: "the disk is full; free some space or choose another path",
}


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the program on `argv` (default: the command line) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(command_of(argv), argv[1:])


def run_command(name: str, argv: "Sequence[str] | None" = None) -> int:
    """Run the command `name` on `argv` (default: the command line) and return its exit status.

    A `ValueError` or `OSError` is printed as one sentence, and so is a lack of memory; the status
    is then 2.
    """
    module, parser = command_parser(name)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return module.run(parse(parser, argv))
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{parser.prog}: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    finally:
        _leave_process_group()
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _sentence(error: Exception) -> str:
    """What `error` says, in one line; errors of the system and of memory with what to do."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return (
            f"out of memory ({(str(error) or 'on the CPU').splitlines()[0]}); take shorter texts "
            "(--max_seq_length, --length), smaller batches (--per_device_train_batch_size), or "
            "--gradient_checkpointing."
        )
    if isinstance(error, OSError) and error.filename is not None:
        meaning = _SYSTEM_ERRORS.get(error.errno or 0) or error.strerror
        return f"{error.filename}: {meaning}."
    return " ".join(str(error).split())


def command_parser(name: str) -> "tuple[ModuleType, CommandParser]":
    """The module of the command `name` and its parser."""
    module_name = ALIASES.get(name, name).replace("-", "_")
    module = importlib.import_module(f"mra_hf.commands.{module_name}")
    parser = CommandParser(
        getattr(module, "DATACLASSES", ()), prog=f"mra-hf {name}", description=module.__doc__
    )
    module.add_arguments(parser)
    return module, parser


def parse(parser: CommandParser, argv: "Sequence[str] | None" = None) -> "argparse.Namespace":
    """The arguments of a command; an experiment also takes them from the YAML file it names.

    Raises:
        ValueError: such a file is none, or holds what does not exist.
    """
    return experiments.parse(parser, argv) if parser.dataclass_types else parser.parse_args(argv)


def _leave_process_group() -> None:
    """End the communication threads of a run in several processes: a process that exits while they
    work may abort, and the launcher then stops the other processes before they have saved.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
