"""Files of a checkpoint: find a source, read its weights, write a result all or nothing.

Weights are read raw, tensor by tensor, from `model.safetensors`, sharded safetensors,
`pytorch_model.bin` or sharded bins (in this order; pickles with `weights_only=True`).
`staged_directory` fills a hidden folder beside the result and renames it at the very end.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mra_hf.loading import first_line, why_not_fetched

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Names of the weights in the order of preference; an index lists the files of its shards.
WEIGHT_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
#: Files that hold a vocabulary; a tokenizer directory has at least one of them.
VOCABULARY_NAMES = (
    *("tokenizer.json", "vocab.txt", "vocab.json"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model"),
)
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.codes"]
#: Weights of the modules of sentence-transformers, in folders such as `2_Dense`.
_MODULE_FILES = ["[0-9]*_*/model*.safetensors", "[0-9]*_*/pytorch_model*.bin"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LFS_POINTER = b"version https://git-lfs"

#: Staging folders of running conversions of this process.
_active: set[Path] = set()


class CheckpointLocation(NamedTuple):
    """Where a checkpoint lies: the name to show, the folder here, the hub id if it has one."""

    label: str
    folder: Path
    hub_id: str | None


def resolve_checkpoint(
    source: str | os.PathLike[str], *, weights: bool = True
) -> CheckpointLocation:
    """Return where `source`, a directory or hub id, lies on this machine.

    A hub repository is downloaded through the cache of `huggingface_hub`: small files, and with
    `weights` its safetensors, or its PyTorch bins where there are none.

    Raises:
        OSError: there is no such directory, or the hub could not be reached or has no such
            repository.
        ValueError: `source` is a file.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return CheckpointLocation(folder.name, folder, None)
    if folder.exists():
        raise ValueError(
            f"SOURCE must be a directory with config.json and weights, got the file {name}; "
            "pass the directory it lies in."
        )
    if not _HUB_ID.fullmatch(name):
        raise OSError(f"there is no directory {name}; pass an existing directory or a hub id.")
    try:
        patterns = [*_SMALL_FILES, *_MODULE_FILES, "model*.safetensors"]
        patterns = patterns if weights else _SMALL_FILES
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if weights and not any((folder / file).is_file() for file in WEIGHT_NAMES[:2]):
            patterns = [*_SMALL_FILES, *_MODULE_FILES, "pytorch_model*.bin"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client raises errors of several libraries
        raise OSError(
            f"there is no directory {name}, and {why_not_fetched(error)}, or pass a directory."
        ) from error
    return CheckpointLocation(name, folder, name)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{file.parent} has no {file.name}; it is not a model directory.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the files that together hold the weights of `folder`.

    Raises:
        OSError: there are none that can be read here, or a shard is missing.
        ValueError: the index does not map tensor names to files.
    """
    weights = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is None:
        others = sorted(
            file.name
            for pattern in ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "adapter_*.*")
            for file in folder.glob(pattern)
        )
        raise OSError(
            f"{folder} has no weights: looked for {', '.join(WEIGHT_NAMES)}"
            + (f", found only {', '.join(others)}" if others else "")
            + ". Save the model with save_pretrained first."
        )
    if not weights.name.endswith(".index.json"):
        return [weights]
    shards = read_json(weights).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{weights} must have a weight_map from tensor names to file names.")
    files = [folder / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise OSError(f"{folder} lacks {missing}, named in {weights.name}; fetch it again.")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of `folder` by their names in the files, on the CPU.

    Raises:
        OSError: weights are missing, truncated or corrupt; the file is named.
        ValueError: a file holds anything but named tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise OSError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull`.")
        is_safetensors = file.suffix == ".safetensors"
        tensors |= _read_safetensors(file) if is_safetensors else _read_pickle(file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file, device="cpu")
    except SafetensorError as error:
        raise OSError(
            f"{file} could not be read as safetensors, "
            f"it is truncated or corrupt ({first_line(error)}); fetch it again."
        ) from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        can_map = zipfile.is_zipfile(file)  # files of torch < 1.6 cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # pickle, zip and torch raise errors of many kinds
        raise OSError(
            f"{file} could not be read as PyTorch weights, it is truncated, corrupt "
            f"or holds more than tensors ({type(error).__name__}: {first_line(error)}); "
            "fetch it again, or save it as safetensors."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{file} must hold a dictionary of named tensors, as save_pretrained did.")
    return content


def check_output(output: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse an `output` (resolved) that must not be written.

    Raises:
        ValueError: it is a file, holds something and `force` is off, lies in `source` or around it,
            or holds the working or home directory.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUT must be a directory, got the file {output}; choose another name.")
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"OUT {output} would lie in {parent}, a file; choose another name.")
    if source is not None and (output.is_relative_to(source) or source.is_relative_to(output)):
        raise ValueError(
            f"OUT must lie outside SOURCE, got {output} with SOURCE {source}; choose another OUT."
        )
    if not _is_filled(output):
        return
    if not force:
        raise ValueError(
            f"OUT {output} is not empty; "
            "choose another directory, or replace it with force=True (--force)."
        )
    for in_use in (Path.cwd(), Path(os.path.expanduser("~"))):
        if in_use.is_relative_to(output):
            raise ValueError(f"OUT {output} holds {in_use} and is never replaced; choose another.")


@contextlib.contextmanager
def staged_directory(output: Path, *, force: bool = False) -> "Iterator[Path]":
    """Yield a new folder that becomes `output` (resolved) when the block ends without exception.

    The folder lies beside `output` as `.{name}.partial-{pid}`. It is removed on any exception,
    KeyboardInterrupt, SIGTERM and SIGHUP included. SIGKILL can leave that hidden folder, never a
    half-written `output`; the next call for the same `output` removes it.

    Raises:
        ValueError: `output` must not be written, or is being written by another thread.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output)
    check_output(output, force=force)
    staging = _sibling(output, "partial")
    if staging in _active:
        raise ValueError(f"OUT {output} is being written by another thread; choose another OUT.")
    _active.add(staging)
    with _exit_on_signals():
        try:
            staging.mkdir()
            yield staging
            _publish(staging, output, force)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            _active.discard(staging)


def _publish(staging: Path, output: Path, force: bool) -> None:
    check_output(output, force=force)  # again: it may have been filled meanwhile
    if not _is_filled(output):
        if output.exists():
            output.rmdir()
        staging.rename(output)
        return
    old = _sibling(output, "replaced")
    try:
        output.rename(old)
        staging.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(output: Path) -> None:
    """Remove what dead processes left beside `output`; put back what they moved."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(partial|replaced)-(\d+)")
    for sibling in sorted(output.parent.glob(f".{glob.escape(output.name)}.*")):
        match = pattern.fullmatch(sibling.name)
        if match is None or sibling in _active or _runs_elsewhere(int(match[2])):
            continue
        if match[1] == "replaced" and not output.exists():
            sibling.rename(output)  # killed between the two renames of _publish
        else:
            shutil.rmtree(sibling, ignore_errors=True)


@contextlib.contextmanager
def _exit_on_signals() -> "Iterator[None]":
    """Turn SIGTERM and SIGHUP into SystemExit, so that cleanup runs; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_leaving = False

    def leave(number, frame):
        nonlocal is_leaving
        if not is_leaving:  # a second signal must not interrupt the cleanup
            is_leaving = True
            raise SystemExit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _runs_elsewhere(pid: int) -> bool:
    """Whether `pid` is a running process other than this one (whose folders are in `_active`)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sibling(output: Path, purpose: str) -> Path:
    return output.with_name(f".{output.name}.{purpose}-{os.getpid()}")


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
