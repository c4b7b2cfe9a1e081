"""MkDocs hook: files outside this folder that pages link to become part of the site.

Pages link relative to themselves, as a code host follows links:
`../../benchmarks/results/cpu.csv`. In the site such a file lies below `repository/`; a page of
Markdown is built as a page, a folder becomes a page that lists its files. The links of every page
are rewritten accordingly. Paths are relative to the root of the repository, with forward slashes;
a site path is one below the root of the site's sources.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: This folder, and where files from outside it lie in the site.
INSIDE, OUTSIDE = "docs/", "repository/"

#: Blocks and spans of code, in which nothing is a link.
_CODE = re.compile(r"(^ *```.*?^ *```|`(?:(?!\n\n)[^`])+`)", re.S | re.M)
#: A link or picture with a relative target: `](path)` or `](path#anchor)`.
_LINK = re.compile(r"\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def site_path(path: str) -> str:
    """Return where a file, or the page of a folder, lies in the site."""
    if (ROOT / path).is_dir():
        path += "/README.md" if (ROOT / path / "README.md").is_file() else "/index.md"
    return path.removeprefix(INSIDE) if path.startswith(INSIDE) else OUTSIDE + path


def repository_path(path: str) -> str:
    """Return which file of the repository a site path is for; the inverse of `site_path`."""
    return path.removeprefix(OUTSIDE) if path.startswith(OUTSIDE) else INSIDE + path


def target_of(page: str, link: re.Match) -> str:
    """Return the path that a link on `page` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link["path"]))


def linked(page: str, markdown: str) -> set[str]:
    """Return the existing files and folders that `page` links to."""
    prose = _CODE.split(markdown)[::2]
    targets = {target_of(page, link) for part in prose for link in _LINK.finditer(part)}
    return {target for target in targets if (ROOT / target).exists()}


def rewritten(page: str, markdown: str) -> str:
    """Return the text of `page` with links to where their targets lie in the site."""
    folder = posixpath.dirname(site_path(page)) or "."

    def link_in_site(link: re.Match) -> str:
        target = target_of(page, link)
        if not (ROOT / target).exists():
            return link[0]  # MkDocs reports it
        return f"]({posixpath.relpath(site_path(target), folder)}{link['anchor'] or ''})"

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(link_in_site, part) for part in parts[::2]]
    return "".join(parts)


def files_of(folder: str) -> list[str]:
    """Return the files below a folder that its page lists."""
    found = (path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*")))
    kept = (path for path in found if "__pycache__" not in path.parts and (ROOT / path).is_file())
    return [path.as_posix() for path in kept]


def listing(folder: str) -> str:
    """Return the page of a folder: a link to each of its files."""
    names = [posixpath.relpath(path, folder) for path in files_of(folder)]
    return "\n".join([f"# {folder}", "", *(f"- [{name}]({name})" for name in names), ""])


def on_files(files, config):
    """Add what pages link to, and what those pages link to in turn."""
    from mkdocs.structure.files import File

    def add(path: str, **source) -> None:
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), **source))

    pages = [repository_path(file.src_uri) for file in files.documentation_pages()]
    seen = set(pages)
    while pages:
        page = pages.pop()
        for path in sorted(linked(page, (ROOT / page).read_text(encoding="utf-8")) - seen):
            seen.add(path)
            members = [path]
            if (ROOT / path).is_dir():
                if site_path(path).endswith("/index.md"):
                    add(path, content=listing(path))
                    members = files_of(path)
                else:
                    members = [f"{path}/README.md"]
            for member in members:
                add(member, abs_src_path=str(ROOT / member))
                if member.endswith(".md") and member not in seen | set(pages):
                    pages.append(member)
    return files


def on_page_markdown(markdown, page, **kwargs):
    """Point the links of a page to where their targets lie in the site."""
    return rewritten(repository_path(page.file.src_uri), markdown)
