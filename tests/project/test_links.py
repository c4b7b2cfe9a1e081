"""Relative links and anchors of the pages lead somewhere, on a code host and in the site."""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / folder / "README.md" for folder in ("kernels", "configs")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
FENCE = re.compile(r"^ *```.*?^ *```", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MARKUP = re.compile(r"\]\([^)]*\)|[`*\[]")


def github_anchor(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_anchor(heading: str) -> str:
    """The anchor that Python-Markdown gives a heading."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page that work in both places."""
    lines = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    headings = [MARKUP.sub("", line.lstrip("#")).strip() for line in lines if line.startswith("#")]
    return {*map(github_anchor, headings)} & {*map(site_anchor, headings)}


def faults_of(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    faults = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if ":" in path:  # an address
            continue
        target = page.parent / path if path else page
        if not target.exists():
            faults.append(f"{link}: does not exist")
        elif not target.resolve().is_relative_to(ROOT):
            faults.append(f"{link}: leaves the repository")
        elif anchor and (target.suffix != ".md" or anchor not in anchors_of(target)):
            faults.append(f"{link}: no such anchor")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert not faults_of(page)


def test_wrong_links_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A `b`: c, *d*\n\n```bash\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[1](other.md) [2](other.md#a-b-c-d) [3](https://a.b/c.md) [4](#none) [5](none.md)\n"
        "[6](other.md#no-heading) [7](../x.md)\n\n```python\nx[0](y)\n```\n"
    )
    (tmp_path.parent / "x.md").touch()
    assert [fault.partition(":")[0] for fault in faults_of(page)] == [
        *("#none", "none.md", "other.md#no-heading", "../x.md")
    ]


def test_there_are_links():
    assert len(PAGES) > 20
    assert sum(len(LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 150
