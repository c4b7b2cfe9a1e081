"""Texts as bytes: the sentiment of film reviews (IMDb), or spam as a stand-in."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from mra_hf.data.lra.parts import LraData, rows
from mra_hf.data.samples import check_amounts, sample_rows, split_rows

_SPAM_FOLDERS = {
    "easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1,
}  # fmt: skip
_OPEN: dict[str, Callable[..., IO]] = {".xz": lzma.open, ".gz": gzip.open, ".jsonl": open}
_KINDS = ("neg", "pos")
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)


def text(
    source: str,
    *,
    seed: int = 0,
    max_bytes: int = 4000,
    test_as_dev: bool = True,
    max_train: int | None = None,
    max_eval: int | None = None,
) -> LraData:
    """Read texts; byte b is id b + 1, and longer texts are cut.

    Args:
        source: a folder with train/pos, train/neg, test/pos and test/neg (IMDb as published), with
            a file of JSON lines {"text", "label": 0 or 1} for train and another for test (.jsonl,
            also .xz, .gz), or with SpamAssassin's easy-ham-1, ..., spam-2.
        seed: of all draws.
        max_bytes: of a text. The papers' numbers are for 4000; 1000 is a small setting.
        test_as_dev: as published, the best checkpoint is chosen by the test set. False: by a tenth
            of the training texts. SpamAssassin has one set: dev and test are always a tenth each.
        max_train, max_eval: draw so many rows; None: all.

    Raises:
        ValueError: no such files, or damaged ones, with the file and its line.
    """
    check_amounts(seed=seed, max_bytes=max_bytes, max_train=max_train, max_eval=max_eval)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"source must be a folder of texts, and {source} is none.")
    if (folder / "data" / "spam-1").is_dir():  # the layout of the package
        folder = folder / "data"
    if (folder / "spam-1").is_dir():
        everything = _of_both_classes(_unique(_spam(folder)), folder)
        parts = split_rows(len(everything), (0.1, 0.1), seed)
        texts = {name: [everything[row] for row in rows_of] for name, rows_of in parts.items()}
        labels = ("ham", "spam")
        split = (
            f"SpamAssassin without headers, a stand-in; a tenth each for dev and test, seed {seed}"
        )
    else:
        texts = {
            name: _of_both_classes(list(_reviews(folder, name)), folder / name)
            for name in ("train", "test")
        }
        labels = ("negative", "positive")
        if test_as_dev:
            texts["dev"] = texts["test"]
            split = f"{folder.name}; dev IS the test set, as published"
        else:
            parts = split_rows(len(texts["train"]), (0.1, 0.0), seed)
            training = texts["train"]
            texts["dev"] = [training[row] for row in (*parts["dev"], *parts["test"])]
            texts["train"] = [training[row] for row in parts["train"]]
            split = f"{folder.name}; dev: a tenth of the training texts, drawn by seed {seed}"
    limits = {"train": max_train, "dev": max_eval, "test": max_eval}
    return LraData(
        **{
            name: _rows(texts[name], max_bytes, limit, seed, f"{source} ({name})")
            for name, limit in limits.items()
        },
        vocab_size=257,
        max_length=max_bytes,
        labels=labels,
        split=split,
    )


def to_ids(content: bytes, max_bytes: int) -> np.ndarray:
    """Ids of bytes: b + 1, int16."""
    return np.frombuffer(content[:max_bytes], np.uint8).astype(np.int16) + 1


def _rows(pairs: list[tuple[bytes, int]], max_bytes: int, limit: int | None, seed: int, where: str):
    pairs = [pairs[row] for row in sample_rows(len(pairs), limit, seed)]
    ids = [to_ids(content, max_bytes) for content, _ in pairs]
    return rows(ids, [label for _, label in pairs], 2, where)


def _of_both_classes(pairs: list[tuple[bytes, int]], where: Path) -> list[tuple[bytes, int]]:
    if len({label for _, label in pairs}) < 2:
        raise ValueError(f"{where} must hold texts of both classes, got {len(pairs)} of one.")
    return pairs


def _reviews(folder: Path, part: str) -> Iterator[tuple[bytes, int]]:
    if all((folder / part / kind).is_dir() for kind in _KINDS):
        for label, kind in enumerate(_KINDS):
            for path in sorted((folder / part / kind).glob("*.txt")):
                yield path.read_bytes(), label
        return
    files = [path for path in sorted(folder.iterdir()) if _is_lines(path) and part in path.name]
    if len(files) != 1:
        raise ValueError(
            f"{folder} must hold {part}/pos and {part}/neg, or one file of JSON lines with "
            f'"{part}" in its name, got {[path.name for path in files]}.'
        )
    yield from _lines(files[0])


def _is_lines(path: Path) -> bool:
    return path.is_file() and ".jsonl" in path.suffixes and path.suffix in _OPEN


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    done = 0
    try:
        with _OPEN[path.suffix](path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["label"] not in (0, 1) or not isinstance(row["text"], str):
                    raise ValueError("label must be 0 or 1, and text a string")
                yield row["text"].encode("utf-8", "surrogatepass"), row["label"]
                done += 1
    except (*_UNREADABLE, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}, line {done + 1}: must be JSON with "text" and "label" 0 or 1 '
            f"({type(error).__name__}: {error})."
        ) from error


def _spam(folder: Path) -> Iterator[tuple[bytes, int]]:
    for name, label in _SPAM_FOLDERS.items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks the folder {name} of SpamAssassin.")
        for path in sorted((folder / name).glob("*.txt")):
            yield _body(path.read_bytes()), label


def _body(message: bytes) -> bytes:
    """A mail without its headers, which give its class away."""
    head, blank_line, body = message.replace(b"\r\n", b"\n").partition(b"\n\n")
    return body.strip() if blank_line and b":" in head else message.strip()


def _unique(pairs: Iterator[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    return list({content: (content, label) for content, label in pairs if content}.values())
