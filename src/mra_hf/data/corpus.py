"""The English corpus of the embedded checkpoint, built from Debian packages, and its tokenizer."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, RobertaTokenizer

from mra_attention.checks import check_int
from mra_hf.data import debian_text

#: One document in so many is held out of every source that names no documents to hold out.
HELD_OUT_EVERY = 50

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class TextSource:
    """A Debian package that holds English text.

    Args:
        package: its name.
        read: decoder of the unpacked package, see `mra_hf.data.debian_text`.
        licence: what the text may be used under.
        held_out: titles of the documents kept for evaluation; empty: one document in 50.
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
            must not exist, and appears when everything is done.
        vocab_size: entries of the byte-level BPE vocabulary, special tokens included.
        packages: folder to download the packages to; packages already there are used (default
            None: a temporary folder).
        sources: what to read.
        progress: show a bar.

    Returns:
        The manifest: per source the package, its version, licence, documents and characters of
        both splits, and the SHA-256 of both files.

    Raises:
        ValueError: `output` exists, or a wrong `vocab_size`.
        OSError: a package could not be downloaded or read; see `debian_text.fetch_package`.
    """
    check_int("vocab_size", vocab_size, 300)
    with debian_text.built_folder(output, packages) as (folder, downloads):
        for split in ("train", "heldout"):
            (folder / split).mkdir()
        rows = [
            _write_source(source, downloads, folder)
            for source in tqdm(sources, desc="packages", disable=not progress)
        ]
        manifest = {"sources": rows, "vocab_size": vocab_size}
        files = sorted((folder / "train").glob("*.jsonl"))
        train_tokenizer(_texts_of(files), vocab_size, folder / "tokenizer", progress=progress)
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
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
    row: dict[str, Any] = {"package": source.package, "version": version}
    row["licence"] = source.licence
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
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # pairs, which its annotation leaves out
        mask_token=mask,  # type: ignore[arg-type]  # the same of an AddedToken
        model_max_length=max_length,
    )
    tokenizer.save_pretrained(output)
    return tokenizer
