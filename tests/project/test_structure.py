"""The layout: which module may import which, and what must not exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "kernels" / "torch-ext" / "mra_attention"
FAMILY = ROOT / "src" / "mra_hf"

#: What each module of the operator may import from its own package.
OPERATOR_IMPORTS = {
    "__init__": {"api", "selection"},
    "api": {
        *("ops", "reference", "multiresolution", "multiresolution_reference"),
        *("blocks", "checks", "implementations", "selection"),
    },
    "checks": {"blocks", "multiresolution", "selection"},
    "implementations": set(),
    "ops": {"_ops", "selection", "torch_impl", "triton_impl", "blocks", "implementations"},
    "_ops": set(),
    "benchmarking": set(),
    "blocks": set(),
    "selection": {"blocks"},
    "reference": {"blocks"},
    "multiresolution": {"blocks", "selection"},
    "multiresolution_reference": {"blocks", "multiresolution", "reference", "selection"},
    "order": {"checks"},
}


def imports(path: Path) -> set[tuple[int, str]]:
    """(level, module) of every import statement, wherever it stands in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                found |= {(node.level, alias.name) for alias in node.names}
            else:
                found.add((node.level, node.module))
    return found


def names_with_from_dot(path: Path) -> set[str]:
    return {module.split(".")[0] for level, module in imports(path) if level}


def test_every_module_of_the_operator_is_listed():
    assert {path.stem for path in OPERATOR.glob("*.py")} == set(OPERATOR_IMPORTS)


@pytest.mark.parametrize("module", OPERATOR_IMPORTS)
def test_the_operator_imports_in_one_direction(module):
    path = OPERATOR / f"{module}.py"
    assert names_with_from_dot(path) <= OPERATOR_IMPORTS[module]
    outside = {name.split(".")[0] for level, name in imports(path) if not level}
    assert not outside & {"transformers", "mra_hf", "mra_attention", "numpy"}


def test_the_triton_kernels_import_what_all_implementations_share():
    for path in (OPERATOR / "triton_impl").glob("*.py"):
        from_package = {name for level, name in imports(path) if level == 2}
        assert from_package <= {"blocks", "implementations", "selection"}, path.name
        outside = {name.split(".")[0] for level, name in imports(path) if not level}
        assert not outside & {"transformers", "mra_hf", "mra_attention", "numpy"}


def test_triton_is_imported_by_its_implementation_alone():
    for path in OPERATOR.glob("*.py"):
        assert not {name for level, name in imports(path) if name.split(".")[0] == "triton"}


def test_the_family_imports_the_operator_and_never_scripts_or_tests():
    for path in FAMILY.rglob("*.py"):
        for level, name in imports(path):
            assert level == 0, f"{path.name} uses a relative import"
            assert name.split(".")[0] not in {"scripts", "tests", "kernels"}
            inside = path.relative_to(FAMILY).parts[0]
            if name.startswith("mra_hf.commands"):
                assert inside in {"commands", "__main__.py"}, f"{path.name} imports a command"
            if name.startswith("mra_hf.registration"):
                assert path.name == "__init__.py"


def test_the_family_does_not_import_triton():
    for path in FAMILY.rglob("*.py"):
        assert not {name for _, name in imports(path) if name.split(".")[0] == "triton"}


def test_the_kernels_folder_is_no_package():
    # It would shadow the library named kernels and break `import transformers`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_scripts_are_thin():
    scripts = list((ROOT / "scripts").glob("*.py"))
    assert scripts
    for path in scripts:
        assert len(path.read_text().splitlines()) < 30, path.name


def test_files_are_short_enough_to_read():
    for path in [*OPERATOR.rglob("*.py"), *FAMILY.rglob("*.py")]:
        limit = 700 if path.name == "modeling.py" else 500
        assert len(path.read_text().splitlines()) <= limit, path.name


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme
    assert "pip install -c constraints.txt -e . && mra-hf quickstart" in readme
    assert re.search(r'^pip install -q -c constraints.txt -e "\.\[test\]"$', ci, re.M)
    assert re.search(r"^pytest$", ci, re.M) and "mra-hf quickstart" in ci


def test_exporting_is_asked_for_in_one_place():
    """`torch.compiler.is_exporting()` is true in every compiled function in torch 2.11."""
    for path in [*OPERATOR.rglob("*.py"), *FAMILY.rglob("*.py")]:
        called = "torch.compiler.is_exporting()" in path.read_text()
        assert not called or path == OPERATOR / "blocks.py", path
