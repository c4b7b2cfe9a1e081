"""Text for masked language modelling: loading and packing.

Documents become one stream of tokens, each document ended by `</s>`. The stream is cut into chunks
of `length - 2` tokens and every chunk is wrapped, `<s> ... </s>`. Nothing is padded; only the last,
incomplete chunk of a shard is dropped (RoBERTa's FULL-SENTENCES, Liu et al. 2019, section 4.2).
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from mra_attention.checks import check_int
from mra_hf.data.hub import fetching
from mra_hf.data.tables import read_table

logger = logging.get_logger(__name__)

#: Documents tokenised and packed together; a shard loses its last incomplete chunk.
SHARD_DOCUMENTS = 1000

#: Documents whose packed examples are one file of the cache: a run that is stopped while it packs a
#: large corpus does not repeat the files that are complete.
CACHED_DOCUMENTS = 50_000

#: What datasets raises for a file that it cannot read: its own error, or, while it peeks at the
#: file, the error of the reader.
_UNREADABLE = (DatasetGenerationError, UnicodeDecodeError, pa.ArrowInvalid, StopIteration)


def load_documents(
    source: "str | Sequence[str]",
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """Load documents: text files, JSON lines, or a dataset of the hub.

    Args:
        source: a file, a folder or a glob pattern, or several; a `.txt` file is one document,
            a `.jsonl` file holds one document a line in the field `text_column`. Anything that is
            not on this machine is taken for the name of a dataset; its rows without text, which
            some datasets have between paragraphs, are skipped by `pack`.
        config_name: configuration of a dataset of the hub.
        split: its split; ignored for files.
        text_column: the field with the text; `.txt` files have none, and a warning says so.
        streaming: read the text while training, not before.

    Returns:
        A dataset with one column, "text".

    Raises:
        ValueError: no files, files of both kinds or of another kind, text that is not UTF-8, lines
            that are not JSON, documents of files without text, or no such column. Streamed files
            are read, and these errors raised, while training.
    """
    names = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    files_of = {str(name): _files(name) for name in names}
    files = [file for some in files_of.values() for file in some]
    if files:
        empty = [name for name, some in files_of.items() if not some]
        if empty:
            raise ValueError(f"no text files in {empty}; pass .txt or .jsonl files, or folders.")
        kinds = {file.suffix for file in files}
        if len(kinds) != 1 or not kinds <= {".txt", ".jsonl"}:
            raise ValueError(
                f"text files must all be .txt or all be .jsonl, got {sorted(kinds)} in {names}."
            )
        if kinds == {".txt"} and text_column != "text":
            logger.warning(
                f"text_column={text_column!r} is not used for {names}: .txt files have no columns."
            )
            text_column = "text"
        documents = _load_files(files, names, text_column, streaming)
    else:
        if len(names) != 1 or any(mark in names[0] for mark in "*?[") or _is_path(str(names[0])):
            raise ValueError(f"no text files in {names}; pass .txt or .jsonl files, or a folder.")
        with fetching(names[0]):
            documents = load_dataset(names[0], config_name, split=split, streaming=streaming)
    columns = documents.column_names or [text_column]
    if text_column not in columns:
        raise ValueError(
            f"text_column must name a column of {names}, got {text_column!r}; it has {columns}."
        )
    feature = None if documents.features is None else documents.features[text_column]
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        _raise_first_fault(files, text_column)
        raise ValueError(f"column {text_column!r} of {names} must hold text, and holds {feature}.")
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    if not files:
        return documents
    if streaming:
        check = functools.partial(_require_text, files=files, text_column=text_column)
        return documents.map(check, batched=True)
    _check_texts(documents, files, text_column)
    return documents


def _load_files(
    files: Sequence[Path], names: Sequence, text_column: str, streaming: bool
) -> "Dataset | IterableDataset":
    options = {"data_files": [str(file) for file in files], "split": "train"}
    if files[0].suffix == ".txt":
        options["sample_by"] = "document"
    kind = "text" if files[0].suffix == ".txt" else "json"
    try:
        return load_dataset(kind, streaming=streaming, **options)
    except _UNREADABLE as error:
        _raise_first_fault(files, text_column)
        raise ValueError(
            f"cannot read {names}: {error.__cause__ or error}; files must be UTF-8, "
            "and every line of a .jsonl file one JSON object with the same fields."
        ) from error


def _check_texts(documents: Dataset, files: Sequence[Path], text_column: str) -> None:
    """Raise a `ValueError` that names the first document without text or not in UTF-8, if any."""
    for texts in documents.data.column("text").chunks:
        try:
            texts.validate(full=True)  # UTF-8, which the JSON reader does not check
        except pa.ArrowInvalid:
            _raise_first_fault(files, text_column)
            raise
        blank = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.utf8_length(texts), 0))
        if pc.any(pc.fill_null(blank, True)).as_py():
            _raise_first_fault(files, text_column)


def is_unreadable(error: Exception) -> bool:
    """Whether `error`, which names no line, may come from streamed text: datasets' own, or any
    error that a worker of a data loader passed on with its stack.
    """
    return isinstance(error, _UNREADABLE) or "in DataLoader worker process" in str(error)


def check_files(source: "str | Sequence[str]", text_column: str = "text") -> None:
    """Read the text files of `load_documents` line by line, up to their first fault.

    Raises:
        ValueError: the message says what is wrong, with file and line.
    """
    names = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    _raise_first_fault([file for name in names for file in _files(name)], text_column)


def _require_text(batch: dict, *, files: Sequence[Path], text_column: str) -> dict:
    if not all(_holds_text(text) for text in batch["text"]):
        _raise_first_fault(files, text_column)
    return batch


def _holds_text(text: str | None) -> bool:
    return text is not None and not text.isspace() and text != ""


def _raise_first_fault(files: Sequence[Path], text_column: str) -> None:
    """Raise a `ValueError` that names the first file and line that cannot be used, if any."""
    for file in files:
        if file.suffix == ".jsonl":
            for number, row in read_table(file):
                text = row.get(text_column)
                if not isinstance(text, str) or not _holds_text(text):
                    raise ValueError(
                        f"{file}, line {number}: {text_column!r} must be a text that is not empty, "
                        f"got {text!r}; remove the line or fill it in."
                    )
            continue
        content = file.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{file}, line {line}: not UTF-8 ({error.reason}).") from error
        if not _holds_text(text):
            raise ValueError(f"{file}, line 1: the file holds no text; remove it.")


def _files(name: "str | os.PathLike[str]") -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in {".txt", ".jsonl"})
    if path.is_file():
        return [path]
    if any(mark in path.name for mark in "*?["):
        return sorted(path.parent.glob(path.name))
    return []


def _is_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or Path(name).suffix in {".txt", ".jsonl"}
        or Path(name).is_dir()
    )


def pack(
    documents: "Dataset | IterableDataset",
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    workers: int | None = None,
) -> "Dataset | IterableDataset":
    """Tokenise documents and pack them into examples of exactly `length` tokens.

    `datasets` caches the result of a `Dataset`, in parts of `CACHED_DOCUMENTS` documents: a run
    that was stopped continues with the part it was at. An `IterableDataset` is packed while it is
    read.

    Args:
        documents: a dataset with the column "text".
        tokenizer: a tokenizer that wraps a text in `bos_token` and `eos_token`, or cls and sep.
        length: tokens of an example, special tokens included.
        workers: processes to tokenise with (default None: this one).

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`, `[length]` each.

    Raises:
        ValueError: a length that leaves no room, or a tokenizer without special tokens.
    """
    check_int("length", length, 3)
    first, last = boundary_tokens(tokenizer)
    options = {"batched": True, "batch_size": SHARD_DOCUMENTS, "remove_columns": ["text"]}
    pack_shard = functools.partial(
        _pack_shard, tokenizer=tokenizer, first=first, last=last, length=length
    )
    if not isinstance(documents, Dataset):
        return documents.map(pack_shard, **options)
    starts = range(0, max(1, len(documents)), CACHED_DOCUMENTS)
    parts = []
    for number, start in enumerate(starts, 1):
        rows = range(start, min(start + CACHED_DOCUMENTS, len(documents)))
        part = documents if len(starts) == 1 else documents.select(rows)
        counted = f", part {number} of {len(starts)}" * (len(starts) > 1)
        parts.append(
            part.map(
                pack_shard, num_proc=workers, desc=f"packing to {length} tokens{counted}", **options
            )
        )
    return concatenate_datasets(parts)


def boundary_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids that stand before and after a text: `<s>` and `</s>`, or `[CLS]` and `[SEP]`."""
    wrapped = tokenizer("", add_special_tokens=True)["input_ids"]
    if len(wrapped) != 2:
        raise ValueError(
            "tokenizer must put one special token before a text and one after it, "
            f"as RoBERTa's and BERT's do; it puts {len(wrapped)}."
        )
    return wrapped[0], wrapped[1]


def _pack_shard(batch, *, tokenizer, first, last, length):
    texts = [text for text in batch["text"] if _holds_text(text)]
    stream: list[int] = []
    if texts:
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += ids
            stream.append(last)
    room = length - 2
    chunks = [stream[i : i + room] for i in range(0, len(stream) - room + 1, room)]
    special = {first, last}
    return {
        "input_ids": [[first, *chunk, last] for chunk in chunks],
        "special_tokens_mask": [
            [1, *(int(token in special) for token in chunk), 1] for chunk in chunks
        ],
    }
