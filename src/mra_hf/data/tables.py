"""Tables of text: `.jsonl`, `.tsv` or `.csv`. A faulty row is named by its file and line."""

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import os

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

#: A document may be one cell; the limit of `csv` is 131072 characters by default.
_LONGEST_CELL = 2**31 - 1

#: Suffix (before the compression's) -> the character between columns; None: JSON lines.
KINDS: dict[str, str | None] = {
    ".jsonl": None,
    ".json": None,
    ".tsv": "\t",
    ".txt": "\t",
    ".csv": ",",
}


def read_table(
    path: "str | os.PathLike[str]", skip: Callable[[str], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a table with the numbers of their lines, counted from 1.

    `.tsv` and `.txt` files have a header and tabs between columns, and quotes mean nothing, as in
    the files of GLUE and MNLI; `.csv` files have a header, commas and quotes; `.jsonl` files hold
    one JSON object a line. `.gz` and `.xz` files are decompressed.

    A row that is no JSON object, or has another number of columns than the header, is an error;
    with `skip` that function is called with what is wrong, and the row is left out.

    Raises:
        ValueError: no such file, another kind of file, a row that cannot be read, or no rows; the
            message gives file and line.
    """
    path = Path(path).expanduser()
    compression = path.suffix if path.suffix in _OPENERS else ""
    kind = Path(path.name.removesuffix(compression)).suffix
    if kind not in KINDS:
        raise ValueError(f"{path} must end in {', '.join(KINDS)} (then .gz or .xz, if packed).")
    if not path.is_file():
        raise ValueError(f"{path} is no file; pass one that ends in {', '.join(KINDS)}.")
    number = 0
    with _OPENERS.get(compression, open)(path, "rb") as packed:
        lines = _lines(packed, path)
        fault = skip or _refuse
        if KINDS[kind] is None:
            rows = _json_rows(lines, path, fault)
        else:
            rows = _cells(lines, path, kind, fault)
        for number, row in rows:
            yield number, row
    if number == 0:
        raise ValueError(f"{path} holds no rows: a header, then a row a line (.jsonl: no header).")


def _refuse(fault: str) -> None:
    raise ValueError(fault)


def _refuse_old_line_ends(line: str, path: Path) -> None:
    """Refuse a file whose only line holds carriage returns inside."""
    before, mark, _ = line.rstrip("\r\n").partition("\r")
    if mark and not line.endswith("\n") and before.count('"') % 2 == 0:
        unpack = {".gz": f"gzip -dc {path.name} | ", ".xz": f"xz -dc {path.name} | "}
        begin = unpack.get(path.suffix, "")
        given = "" if begin else f" < {path.name}"
        raise ValueError(
            f"{path}: lines end in CR only, as on old Macs, and not in LF; save it with line ends "
            f"LF, or write `{begin}tr '\\r' '\\n'{given} > NEW` and read NEW."
        )


def _lines(packed, path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(packed, 1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}).") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: the file is damaged ({error}).") from error


def _json_rows(lines, path: Path, fault) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield number, _json_object(line, path, number)
        except ValueError as error:
            if number == 1:
                _refuse_old_line_ends(line, path)
            fault(str(error))


def _json_object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{path}, line {number}: JSON nested too deeply.") from error
    except json.JSONDecodeError as error:
        cut = "" if line.endswith("\n") else " (the file is cut off?)"
        raise ValueError(f"{path}, line {number}: not JSON: {error.msg}{cut}.") from error
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"{path}, line {number}: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: must be a JSON object, got {row!r:.60}.")
    if "\\u" in line:
        check_characters(row, f"{path}, line {number}")
    return row


def check_characters(content: Any, where: str) -> None:
    r"""Refuse halves of surrogate pairs ("\ud83d" alone), which JSON can spell and UTF-8 cannot.

    Raises:
        ValueError: there is one; the message says `where`.
    """
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {error.object[error.start]!r} is half of a surrogate pair and no character."
        ) from error


def _cells(lines, path: Path, kind: str, fault) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = KINDS[kind]
    assert delimiter is not None
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if kind == ".csv" else csv.QUOTE_NONE
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for last, text in lines:
            if last == 1:
                _refuse_old_line_ends(text, path)
            yield text

    reader = csv.reader(texts(), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have one name, got {header}.")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                columns = f"{len(cells)} columns where the header has {len(header)}"
                fault(f"{path}, line {last}: {columns}.")
                continue
            yield last, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        reason = str(error)
        if reason.startswith("new-line character"):  # its advice is for programmers
            reason = "a carriage return (CR) stands inside a row; quote the cell, or remove it"
        raise ValueError(f"{path}, line {last}: {reason}.") from error
