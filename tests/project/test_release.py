"""What a release says of itself: one version everywhere, a changelog, types, complete sources."""

import re
from pathlib import Path

import pytest
import yaml

import mra_hf
import mra_hf_cli

tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from 3.11 on")

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = PYPROJECT["tool"]["hatch"]["build"]
PACKAGES = BUILD["targets"]["wheel"]["packages"]


def test_the_version_is_written_in_one_source_file():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    written = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^__version__ *(:.*)?=", path.read_text(), re.MULTILINE)
    ]
    assert written == [PYPROJECT["tool"]["hatch"]["version"]["path"]]
    assert mra_hf.__version__ == mra_hf_cli.__version__


def test_the_citation_and_the_changelog_name_this_version_and_its_day():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mra_hf.__version__
    heading = f"## [{mra_hf.__version__}] - {citation['date-released']}"
    headings = re.findall(r"^## .+", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == heading


def test_the_changelog_has_the_groups_of_its_form():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    groups = re.findall(r"^### (.+)", changelog, re.MULTILINE)
    known = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    assert groups and set(groups) <= set(known)
    releases = re.findall(r"^## (.+)", changelog, re.MULTILINE)
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", x) for x in releases)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package):
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()


def test_the_source_distribution_has_every_file_of_the_root():
    kinds = (".md", ".cff", ".toml", ".yml")
    files = {path.name for path in ROOT.iterdir() if path.suffix in kinds and path.stem[0] != "."}
    assert files <= set(BUILD["targets"]["sdist"]["include"])
