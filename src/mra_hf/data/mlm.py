"""Text for masked language modelling: the English corpus, its tokenizer, packing.

Documents become one stream of tokens, each document ended by `</s>`; the stream is cut into pieces
of `length - 2` tokens and every piece is wrapped, `<s> ... </s>`: no padding, nothing dropped but
the last incomplete piece of a shard (RoBERTa's FULL-SENTENCES, Liu et al. 2019, section 4.2).
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import AddedToken, ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, RobertaTokenizer

from mra_attention.checks import check_int
from mra_hf.data import debian_text
from mra_hf.data.tables import read_table

#: One document in so many is held out of every source that names no documents of its own.
HELD_OUT_EVERY = 50

#: Documents tokenised and packed together; a shard loses its last incomplete piece.
SHARD_DOCUMENTS = 1000

#: Documents whose packed examples are one file of the cache: what is done of a large corpus when a
#: run is stopped is not done again.
CACHED_DOCUMENTS = 50_000

MANIFEST_NAME = "manifest.json"

#: What datasets raises for a file that it cannot read; it peeks at one outside of what it wraps in
#: an error of its own.
_UNREADABLE = (DatasetGenerationError, UnicodeDecodeError, pa.ArrowInvalid, StopIteration)


@dataclass(frozen=True)
class TextSource:
    """A Debian package that holds English text.

    Args:
        package: its name.
        read: decoder of the unpacked package, see `mra_hf.data.debian_text`.
        licence: what the text may be used under.
        held_out: titles of the documents kept for evaluation; none means one in 50.
    """

    package: str
    read: Callable[[Path], Iterator[tuple[str, str]]]
    licence: str
    held_out: frozenset[str] = frozenset()


#: What `build_english_corpus` reads: about 14 million characters.
ENGLISH_SOURCES = (
    TextSource(
        "r-cran-janeaustenr",
        debian_text.austen_novels,
        "text in the public domain, package MIT",
        frozenset({"Persuasion"}),
    ),
    TextSource("sword-text-web", debian_text.web_bible, "public domain", frozenset({"Acts"})),
    TextSource("dict-jargon", debian_text.dictionary, "public domain"),
    TextSource("dict-devil", debian_text.dictionary, "public domain"),
    TextSource("sqlite3-doc", debian_text.html_pages, "public domain"),
)

#: Typographic quotes to plain ones: a small vocabulary should not hold every word twice.
_QUOTES = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}


def build_english_corpus(
    output: str | os.PathLike[str],
    *,
    vocab_size: int = 6144,
    packages: str | os.PathLike[str] | None = None,
    sources: Sequence[TextSource] = ENGLISH_SOURCES,
    progress: bool = False,
) -> dict:
    """Write a corpus of public-domain and permissively licensed English, and a tokenizer for it.

    Args:
        output: folder to write: `train/PACKAGE.jsonl` and `heldout/PACKAGE.jsonl` with one
            document a line (fields "text" and "title"), `tokenizer/`, and `manifest.json`. It
            appears when everything is done; it must not exist.
        vocab_size: entries of the byte-level BPE vocabulary, special tokens included.
        packages: where to download the packages, and to look for them (default None: a temporary
            folder).
        sources: what to read.
        progress: show a bar.

    Returns:
        The manifest: per source the package, its version, licence, documents and characters of
        both splits, and the SHA-256 of both files.

    Raises:
        ValueError: `output` exists, or a wrong `vocab_size`.
        OSError: a package could not be had; see `debian_text.fetch_package`.
    """
    output = Path(output).expanduser().absolute()
    check_int("vocab_size", vocab_size, 300)
    if output.exists():
        raise ValueError(f"output {output} exists; name a folder that does not, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        partial, downloads = Path(scratch) / "corpus", Path(scratch) / "packages"
        if packages is not None:
            downloads = Path(packages).expanduser().absolute()
        downloads.mkdir(parents=True, exist_ok=True)
        for split in ("train", "heldout"):
            (partial / split).mkdir(parents=True)
        rows = [
            _write_source(source, downloads, partial)
            for source in tqdm(sources, desc="packages", disable=not progress)
        ]
        manifest = {"sources": rows, "vocab_size": vocab_size}
        files = sorted((partial / "train").glob("*.jsonl"))
        train_tokenizer(_texts_of(files), vocab_size, partial / "tokenizer", progress=progress)
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.move(partial, output)
    return manifest


def _write_source(source: TextSource, downloads: Path, output: Path) -> dict:
    unpacked, version = debian_text.fetch_package(source.package, downloads)
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    characters = dict.fromkeys(splits, 0)
    for number, (title, text) in enumerate(source.read(unpacked)):
        if source.held_out:
            held_out = title in source.held_out
        else:
            held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        text = text.translate(_QUOTES)
        split = "heldout" if held_out else "train"
        splits[split].append(json.dumps({"title": title, "text": text}, ensure_ascii=False))
        characters[split] += len(text)
    row = {"package": source.package, "version": version, "licence": source.licence}
    for split, lines in splits.items():
        written = "".join(f"{line}\n" for line in lines).encode()
        if lines:
            (output / split / f"{source.package}.jsonl").write_bytes(written)
        row[split] = {
            "documents": len(lines),
            "characters": characters[split],
            "sha256": hashlib.sha256(written).hexdigest(),
        }
    return row


def _texts_of(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    *,
    max_length: int = 512,
    progress: bool = False,
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with RoBERTa's special tokens and save it to `output`.

    Args:
        texts: what to learn the merges from.
        vocab_size: entries, with the five special tokens and the 256 bytes.
        output: folder for `tokenizer.json` and its settings.
        max_length: its `model_max_length`, in tokens.
        progress: show the bars of the trainer.
    """
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        texts, vocab_size, min_frequency=2, show_progress=progress, special_tokens=special
    )
    with tempfile.TemporaryDirectory() as folder:
        trained.save_model(folder)
        vocab = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
        lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    # The mask stands for a word with the space before it.
    mask = AddedToken("<mask>", lstrip=True, special=True)
    tokenizer = RobertaTokenizer(
        vocab=vocab, merges=merges, mask_token=mask, model_max_length=max_length
    )
    tokenizer.save_pretrained(output)
    return tokenizer


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
        source: a file, a folder or a glob pattern, or several; `.txt` files are one document each,
            `.jsonl` files one document a line in the field `text_column`. Anything that is not on
            this machine is taken for the name of a dataset; rows without text, which some have
            between paragraphs, are skipped when it is packed.
        config_name: configuration of a dataset of the hub.
        split: its split; ignored for files.
        text_column: the field with the text.
        streaming: read while training instead of first.

    Returns:
        A dataset with the one column "text".

    Raises:
        ValueError: no files, files of both kinds or of another kind, text that is not UTF-8, lines
            that are not JSON, documents of files without text, or no such column. Streamed files
            are read, and these errors raised, while training.
    """
    names = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found = {str(name): _files(name) for name in names}
    files = [file for some in found.values() for file in some]
    if files:
        empty = [name for name, some in found.items() if not some]
        if empty:
            raise ValueError(f"no text files in {empty}; pass .txt or .jsonl files, or folders.")
        kinds = {file.suffix for file in files}
        if len(kinds) != 1 or not kinds <= {".txt", ".jsonl"}:
            raise ValueError(
                f"text files must all be .txt or all be .jsonl, got {sorted(kinds)} in {names}."
            )
        options = {"data_files": [str(file) for file in files], "split": "train"}
        if kinds == {".txt"}:
            options["sample_by"] = "document"
            text_column = "text"
        kind = "text" if kinds == {".txt"} else "json"
        try:
            documents = load_dataset(kind, streaming=streaming, **options)
        except _UNREADABLE as error:
            _raise_first_fault(files, text_column)
            raise ValueError(
                f"cannot read {names}: {error.__cause__ or error}; files must be UTF-8, and every "
                "line of a .jsonl file one JSON object with the same fields."
            ) from error
    else:
        if len(names) != 1 or any(mark in names[0] for mark in "*?[") or _is_path(str(names[0])):
            raise ValueError(f"no text files in {names}; pass .txt or .jsonl files, or a folder.")
        documents = load_dataset(names[0], config_name, split=split, streaming=streaming)
    columns = documents.column_names or [text_column]
    if text_column not in columns:
        raise ValueError(
            f"text_column must name a column of {names}, got {text_column!r}; it has {columns}."
        )
    kind = None if documents.features is None else documents.features[text_column]
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string"):
        _raise_first_fault(files, text_column)
        raise ValueError(f"column {text_column!r} of {names} must hold text, and holds {kind}.")
    documents = documents.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    if not files:
        return documents
    if streaming:
        check = functools.partial(_require_text, files=files, text_column=text_column)
        return documents.map(check, batched=True)
    for texts in documents.data.column("text").chunks:
        try:
            texts.validate(full=True)  # that it is UTF-8: the JSON reader lets anything through
        except pa.ArrowInvalid:
            _raise_first_fault(files, text_column)
            raise
        blank = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.utf8_length(texts), 0))
        if pc.any(pc.fill_null(blank, True)).as_py():
            _raise_first_fault(files, text_column)
    return documents


def is_unreadable(error: Exception) -> bool:
    """Whether reading streamed text may have raised `error`, which then names no line: datasets'
    own, or any that a worker of a data loader passed on with its stack.
    """
    return isinstance(error, _UNREADABLE) or "in DataLoader worker process" in str(error)


def check_files(source: "str | Sequence[str]", text_column: str = "text") -> None:
    """Read text files as `load_documents` takes them, line by line, for their first fault.

    Raises:
        ValueError: what is wrong, with file and line.
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
                        f"{file}, line {number}: {text_column!r} must be a text that is not "
                        f"empty, got {text!r}; remove the line or fill it in."
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

    The result of a `Dataset` is cached by `datasets`, in parts of `CACHED_DOCUMENTS` documents: a
    run that was stopped goes on with the part it was at. That of an `IterableDataset` is made while
    it is read.

    Args:
        documents: a dataset with the column "text".
        tokenizer: a tokenizer that wraps a text in `bos_token` and `eos_token`, or cls and sep.
        length: tokens of an example, special tokens included.
        workers: processes to tokenise with (default None: this one).

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`.

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
                pack_shard,
                num_proc=workers,
                desc=f"packing to {length} tokens{counted}",
                **options,
            )
        )
    return concatenate_datasets(parts)


def boundary_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids that stand before and after a text: `<s>` and `</s>`, or `[CLS]` and `[SEP]`."""
    wrapped = tokenizer("", add_special_tokens=True)["input_ids"]
    if len(wrapped) != 2:
        raise ValueError(
            "tokenizer must put one special token before a text and one after it, as RoBERTa's and "
            f"BERT's do; it puts {len(wrapped)}."
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
    pieces = [stream[i : i + room] for i in range(0, len(stream) - room + 1, room)]
    special = {first, last}
    return {
        "input_ids": [[first, *piece, last] for piece in pieces],
        "special_tokens_mask": [
            [1, *(int(token in special) for token in piece), 1] for piece in pieces
        ],
    }
