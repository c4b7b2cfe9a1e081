"""Every public name is in the pages of the API reference, and what they name exists."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mra_hf.analysis

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
LISTED = [
    name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]
#: Packages whose `__all__` is public.
PUBLIC = (
    *("mra_hf", "mra_attention", "mra_hf.conversion", "mra_hf.deployment"),
    *("mra_hf.evaluation", "mra_hf.data.lra"),
)


def exports() -> list[str]:
    """Every exported name, behind the name of its package."""
    return [
        f"{package}.{name}"
        for package in PUBLIC
        for name in importlib.import_module(package).__all__
    ]


def resolve(name: str):
    """The object of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


def test_every_exported_name_is_in_the_reference():
    assert len(exports()) > 35
    listed = {id(resolve(name)) for name in LISTED}
    missing = [name for name in exports() if id(resolve(name)) not in listed]
    assert not missing


def test_every_module_of_the_analysis_is_in_the_reference():
    modules = {f"mra_hf.analysis.{x.name}" for x in pkgutil.iter_modules(mra_hf.analysis.__path__)}
    assert modules <= set(LISTED)


def test_packages_that_export_names_are_public():
    """A subpackage that gets an `__all__` is added to `PUBLIC`."""
    folders = (ROOT / "src", ROOT / "kernels" / "torch-ext")
    found = {
        ".".join(path.parent.relative_to(folder).parts)
        for folder in folders
        for path in folder.rglob("__init__.py")
        if re.search(r"^__all__ = ", path.read_text(), re.MULTILINE)
    }
    assert found == set(PUBLIC)


@pytest.mark.parametrize("name", LISTED)
def test_what_the_reference_names_has_a_docstring(name):
    documented = resolve(name)
    if callable(documented) or hasattr(documented, "__path__"):
        assert documented.__doc__ and documented.__doc__.strip()


def test_nothing_is_listed_twice():
    assert len(LISTED) == len(set(LISTED))
