"""Check a built site: local links, anchors and pictures exist, and nothing is loaded from outside.

example:
  python .ci/site_check.py build/site
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: What a browser fetches when it opens a page.
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The targets of a page's links, what it loads, and its anchors."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in LOADS and values.get(LOADS[tag]) and values.get("rel") != "canonical":
            self.loads.append(values[LOADS[tag]])


def faults_of(site: Path) -> list[str]:
    """Return what is wrong with a site, a sentence each."""
    pages = {file: Page(file) for file in site.rglob("*.html")}
    faults = []
    for file, page in pages.items():
        name = file.relative_to(site)
        if name.name == "404.html":  # its links begin at the address that the site gets
            continue
        faults += [f"{name} loads {target}" for target in page.loads if urlsplit(target).netloc]
        for target in page.links + page.loads:
            scheme, netloc, path, _, anchor = urlsplit(target)
            if scheme or netloc:
                continue
            other = (file.parent / unquote(path)).resolve() if path else file
            other = other / "index.html" if other.is_dir() else other
            if not other.is_file():
                faults.append(f"{name} points to {target}, which does not exist")
            elif anchor and other in pages and unquote(anchor) not in pages[other].anchors:
                faults.append(f"{name} points to {target}, which has no such anchor")
    return faults if pages else [f"{site} holds no page"]


if __name__ == "__main__":
    found = faults_of(Path(sys.argv[1]).resolve())
    print("\n".join(found) or "the site is complete")  # noqa: T201
    raise SystemExit(bool(found))
