"""The site: its hook carries linked files in, its checker sees faults, and it builds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """The hook, on a small repository."""
    module = module_of(ROOT / "docs" / "site_files.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("docs/a/page.md", "kernels/README.md", "rows/x.csv", "rows/sub/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return module


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/a/page.md", "../../rows/x.csv", "../repository/rows/x.csv"),
        ("docs/a/page.md", "../../kernels/README.md#k", "../repository/kernels/README.md#k"),
        ("docs/a/page.md", "../../kernels", "../repository/kernels/README.md"),
        ("docs/a/page.md", "../../rows", "../repository/rows/index.md"),
        ("docs/a/page.md", "../index.md", "../index.md"),  # does not exist: MkDocs says so
        ("kernels/README.md", "../docs/a/page.md#p", "../../a/page.md#p"),
        ("kernels/README.md", "../rows/sub/y.png", "../rows/sub/y.png"),
        ("docs/a/page.md", "https://a.b/rows/x.csv", "https://a.b/rows/x.csv"),
    ],
)
def test_a_link_leads_to_where_its_target_lies_in_the_site(hook, page, link, expected):
    assert hook.rewritten(page, f"see [x `y`]({link}), ![p]({link})") == (
        f"see [x `y`]({expected}), ![p]({expected})"
    )


def test_code_is_left_alone(hook):
    text = "`[a](../../rows/x.csv)` and\n\n```python\na[0](../../rows/x.csv)\n```\n"
    assert hook.rewritten("docs/a/page.md", text) == text
    assert hook.linked("docs/a/page.md", text) == set()


def test_a_folder_becomes_a_page_of_its_files(hook):
    page = hook.listing("rows")
    assert "[x.csv](x.csv)" in page and "[sub/y.png](sub/y.png)" in page
    assert hook.rewritten("rows/index.md", page) == page
    assert hook.site_path("rows") == "repository/rows/index.md"
    assert hook.repository_path("repository/rows/x.csv") == "rows/x.csv"
    assert hook.repository_path("a/page.md") == "docs/a/page.md"


def test_the_checker_sees_faults(tmp_path):
    check = module_of(ROOT / ".ci" / "site_check.py")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<h1 id="top">B</h1>')
    (tmp_path / "index.html").write_text(
        '<a href="b/">1</a><a href="b/#top">2</a><a href="https://a.b/">3</a>'
        '<a href="c/">4</a><a href="b/#none">5</a><img src="p.png">'
        '<script src="https://a.b/x.js"></script>'
    )
    faults = check.faults_of(tmp_path)
    assert len(faults) == 4
    for word in ("c/", "#none", "p.png", "loads https://a.b/x.js"):
        assert any(word in fault for fault in faults)
    assert check.faults_of(tmp_path / "b") == []
    (tmp_path / "empty").mkdir()
    assert check.faults_of(tmp_path / "empty")


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    assert not module_of(ROOT / ".ci" / "site_check.py").faults_of(site)
    assert (site / "repository" / "benchmarks" / "results" / "cpu_models.csv").is_file()
    assert "repository/kernels" in (site / "index.html").read_text()
