"""English text from Debian packages: fetched with `apt-get download`, unpacked, decoded.

The packages carry public-domain or permissively licensed text in various formats. Every decoder
takes the unpacked folder and yields `(title, text)`: paragraphs are lines of the text.
"""

import contextlib
import gzip
import html.parser
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

Documents = Iterator[tuple[str, str]]

#: Characters after which the entries of a dictionary begin a new document.
DICTIONARY_DOCUMENT = 20_000

_HTML_BLOCKS = frozenset(
    ("p", "li", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "dd", "dt", "div", "tr", "br")
)
_HTML_DROPPED = frozenset(("script", "style", "pre", "svg", "head"))


@contextlib.contextmanager
def built_folder(
    output: str | os.PathLike[str], packages: str | os.PathLike[str] | None
) -> Iterator[tuple[Path, Path]]:
    """Fill a folder that appears at `output` when the block ends, and not at all if it fails.

    Args:
        output: folder that must not exist.
        packages: folder of downloaded packages; None: a temporary one.

    Yields:
        The folder to fill, and the folder of packages.

    Raises:
        ValueError: `output` exists.
    """
    output = Path(output).expanduser().absolute()
    if output.exists():
        raise ValueError(f"output {output} exists; name a folder that does not, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        partial, downloads = Path(scratch) / "partial", Path(scratch) / "packages"
        if packages is not None:
            downloads = Path(packages).expanduser().absolute()
        partial.mkdir()
        downloads.mkdir(parents=True, exist_ok=True)
        yield partial, downloads
        shutil.move(partial, output)


def fetch_package(name: str, folder: Path) -> tuple[Path, str]:
    """Download the Debian package `name` into `folder` and unpack it there; no root is needed.

    Returns:
        The folder it was unpacked to, and the version of the package.

    Raises:
        OSError: no `apt-get` or `dpkg-deb` on this machine, or the package could not be downloaded
            or read.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(
                f"the corpus is built from Debian packages and needs {tool}, "
                "which is not on this machine; "
                "run it on Debian or Ubuntu, or train on text files of your own."
            )
    unpacked = folder / name
    archives = sorted(folder.glob(f"{name}_*.deb"))
    if not archives:
        downloaded = subprocess.run(
            ["apt-get", "download", name], cwd=folder, capture_output=True, text=True, check=False
        )
        archives = sorted(folder.glob(f"{name}_*.deb"))
        if downloaded.returncode or not archives:
            reason = " ".join(downloaded.stderr.split())
            raise OSError(
                f"the Debian package {name} could not be downloaded ({reason}); "
                "is the machine online, and are its package lists there (apt-get update)?"
            )
    archive = archives[-1]
    version = ""
    for command in (["-x", str(archive), str(unpacked)], ["-f", str(archive), "Version"]):
        done = subprocess.run(["dpkg-deb", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"the package {archive} is damaged ({done.stderr.strip()}); delete it.")
        version = done.stdout.strip()
    return unpacked, version


def austen_novels(folder: Path) -> Documents:
    """The six novels of `r-cran-janeaustenr`, each an R character vector in a lazy-load file."""
    file = _only(folder, "Rdata.rdb")
    for characters in _r_vectors(file.read_bytes()):
        lines = [line.strip() for line in characters]
        text = unwrap("\n".join(lines))
        yield next(line for line in lines if line).title(), text.replace("_", "")


def web_bible(folder: Path) -> Documents:
    """The books of the World English Bible (`sword-text-web`, a SWORD zText module)."""
    for testament in ("ot", "nt"):
        index = _only(folder, f"{testament}.bzs").read_bytes()
        blocks = _only(folder, f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            markup = zlib.decompress(blocks[offset : offset + size]).decode("utf-8")
            titles = re.findall(r'<milestone n="([^"]+)" type="x-usfm-h"', markup)
            if titles:
                yield titles[-1], _osis_text(markup)


def dictionary(folder: Path) -> Documents:
    """A dictionary in dictd format (`*.dict.dz`), in documents of equal size."""
    file = _only(folder, "*.dict.dz")
    text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
    text = re.sub(r"[{}_]", "", text)
    yield from _documents(file.name.removesuffix(".dict.dz"), unwrap(text).splitlines())


def html_pages(folder: Path) -> Documents:
    """The prose of HTML pages; code, tables of symbols and pages without prose are left out."""
    for file in sorted(folder.rglob("*.html")):
        reader = _HtmlText()
        reader.feed(file.read_text(encoding="utf-8", errors="replace"))
        lines = (" ".join(line.split()) for line in "".join(reader.texts).splitlines())
        prose = [line for line in lines if len(line) > 60 and _is_prose(line)]
        if sum(map(len, prose)) >= 2000:
            yield file.stem, "\n".join(prose)


def unwrap(text: str) -> str:
    """Join the lines of each paragraph; a blank line ends one. Returns one paragraph a line."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n".join(joined for p in paragraphs if (joined := " ".join(p.split())))


def _is_prose(line: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in line)
    return letters >= 0.9 * len(line)


def _only(folder: Path, pattern: str) -> Path:
    files = sorted(folder.rglob(pattern))
    if len(files) != 1:
        raise OSError(
            f"{folder.name} should hold one {pattern}, found {len(files)}: "
            "this version of the package is laid out differently."
        )
    return files[0]


def _documents(title: str, lines: list[str]) -> Documents:
    """Consecutive lines in documents of about `DICTIONARY_DOCUMENT` characters."""
    document: list[str] = []
    size = number = 0
    for line in lines:
        document.append(line)
        size += len(line)
        if size >= DICTIONARY_DOCUMENT:
            yield f"{title} {number}", "\n".join(document)
            document, size, number = [], 0, number + 1
    if document:
        yield f"{title} {number}", "\n".join(document)


def _r_vectors(data: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load file: (length, zlib stream) one after another."""
    while data:
        stream = zlib.decompressobj()
        serialized = stream.decompress(data[4:])
        data = stream.unused_data
        # A header (version 3, native encoding, STRSXP, count), then for every string: flags
        # (4 bytes, the last one 9), length (4 bytes big-endian), bytes.
        start = serialized.index(b"\x00\x00\x00\x10") + 4
        (count,) = struct.unpack_from(">i", serialized, start)
        position, strings = start + 4, []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", serialized, position + 4)
            strings.append(serialized[position + 8 : position + 8 + size].decode("utf-8"))
            position += 8 + size
        yield strings


def _osis_text(markup: str) -> str:
    markup = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", markup, flags=re.S)
    # Words are wrapped in markup too: only the marks of paragraphs separate text.
    markup = re.sub(r"<(div|chapter|lg|l)\b[^>]*>", "\n\n", markup)
    markup = re.sub(r"<verse\b[^>]*>", " ", markup)
    return unwrap(html.unescape(re.sub(r"<[^>]+>", "", markup)))


class _HtmlText(html.parser.HTMLParser):
    """Collects the text of a page, a line per block element."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []
        self._dropped = 0

    def handle_starttag(self, tag, attrs):
        self._dropped += tag in _HTML_DROPPED
        if tag in _HTML_BLOCKS:
            self.texts.append("\n")

    def handle_endtag(self, tag):
        if tag in _HTML_DROPPED:
            self._dropped = max(0, self._dropped - 1)
        if tag in _HTML_BLOCKS:
            self.texts.append("\n")

    def handle_data(self, data):
        if not self._dropped:
            self.texts.append(data.replace("\n", " "))
