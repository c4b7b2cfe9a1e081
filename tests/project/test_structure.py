"""The layout: which module may import which, read from the sources, and what must not exist."""

import ast
import re
import shutil
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "kernels" / "torch-ext" / "mra_attention"
FAMILY = ROOT / "src" / "mra_hf"

#: Folder of every package, below the root of the repository.
PACKAGES = {
    "mra_attention": "kernels/torch-ext/mra_attention",
    "mra_hf": "src/mra_hf",
    "mra_hf_cli": "src/mra_hf_cli",
    "benchmarks": "benchmarks",
    "scripts": "scripts",
}
#: What each room (module or subpackage) of the operator may import from other rooms.
OPERATOR_IMPORTS = {
    "_ops": set(),
    "benchmarking": set(),
    "blocks": set(),
    "implementations": {"native_impl"},
    "selection": {"blocks", "parallel"},
    "scheme": {"blocks", "selection"},
    "reference": {"blocks"},
    "exported": {"blocks", "selection"},
    "multiresolution_reference": {"blocks", "scheme", "selection", "reference"},
    "multiresolution": {"blocks", "scheme", "selection"},
    "parallel": set(),
    "torch_impl": {"blocks", "implementations", "parallel", "selection"},
    "native_impl": {"blocks", "parallel", "selection"},
    "triton_impl": {"blocks", "implementations", "selection"},
    "ops": {
        *("_ops", "blocks", "implementations", "selection"),
        *("torch_impl", "native_impl", "triton_impl"),
    },
    "checks": {"blocks", "implementations", "scheme", "selection"},
    "order": {"checks"},
    "api": {
        *("blocks", "checks", "exported", "implementations", "ops", "scheme", "selection"),
        *("reference", "multiresolution", "multiresolution_reference"),
    },
    "": {"api", "selection"},
}
#: Rooms of the family from the bottom up: a room imports its own layer and those below.
FAMILY_LAYERS = (
    {
        *("configuration", "distance_bias", "attention", "modeling", "candidate_choice"),
        *("sparse_prediction", "loading", "english", "remote_code"),
    },
    {"baselines", "encoders", "evaluation", "data"},
    {"training", "conversion", "deployment", "analysis", "results", "registration", ""},
    {"commands"},
    {"__main__"},
)
LAYER_OF = {room: layer for layer, rooms in enumerate(FAMILY_LAYERS) for room in rooms}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, for every module of the packages below `root`."""
    modules = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
            if "assets" in parts:  # the stub that a saved checkpoint carries
                continue
            modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def imported_names(module: str, path: Path) -> set[str]:
    """The dotted name of everything that a file imports, wherever the statement stands in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            start = [*start, *([node.module] if node.module else [])]
            names |= {".".join([*start, alias.name]) for alias in node.names}
    return names


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same repository that it imports."""
    modules = sources(root)

    def module_of(name: str) -> str | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in modules), None)

    return {
        module: {module_of(name) for name in imported_names(module, path)} - {None, module}
        for module, path in modules.items()
    }


def split_room(module: str) -> tuple[str, str]:
    """`"mra_hf.data.lra.images"` -> `("mra_hf", "data")`; the package itself is the room `""`."""
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0]


def violations(root: Path) -> list[str]:
    """What is wrong with the imports below `root`, a sentence each."""
    graph = import_graph(root)
    faults = []
    for module, targets in sorted(graph.items()):
        package, room = split_room(module)
        for target in sorted(targets):
            target_package, target_room = split_room(target)
            if fault := _fault(package, room, target_package, target_room):
                faults.append(f"{module} imports {target}: {fault}")
    for module, path in sources(root).items():
        package, room = split_room(module)
        known = {"mra_attention": OPERATOR_IMPORTS, "mra_hf": LAYER_OF}.get(package)
        if known is not None and room not in known:
            faults.append(f"{module}: the room {room!r} of {package} is not listed here")
        faults += _outside_faults(package, room, path)
    for path in (root / "kernels").rglob("*.py"):
        faults += [
            f"{path.name} below kernels/ imports {library}"
            for library in sorted(libraries_of(path) & {"transformers", "mra_hf", "benchmarks"})
        ]
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        room = ".".join(split_room(module))
        rooms.setdefault(room, set()).update(".".join(split_room(x)) for x in targets)
        rooms[room].discard(room)
    for what, edges in (("modules", graph), ("rooms", rooms)):
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            faults.append(f"a circle of {what}: {' <- '.join(error.args[1])}")
    return faults


def _fault(package: str, room: str, target_package: str, target_room: str) -> str:
    """Why one room may not import another; empty where it may."""
    if target_package == "benchmarks" and package != "benchmarks":
        return "nothing sees benchmarks"
    if target_package == "scripts":
        return "nothing sees scripts"
    if package == "scripts" and (target_package, target_room) != ("mra_hf", "commands"):
        return "a script runs its command"
    if package == "mra_attention":
        if target_package != package:
            return "the operator has never heard of the model family"
        if target_room != room and target_room not in OPERATOR_IMPORTS.get(room, ()):
            return "not listed in OPERATOR_IMPORTS"
    if package == "mra_hf" and target_package == "mra_hf":
        if LAYER_OF.get(target_room, 0) > LAYER_OF.get(room, 0):
            return "this runs upwards"
        if target_room == "registration" and room != "":
            return "only `import mra_hf` registers"
    return ""


def libraries_of(path: Path) -> set[str]:
    """The libraries and packages that a file imports by name, not relative to itself."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def _outside_faults(package: str, room: str, path: Path) -> list[str]:
    """Imports that a file must not have, whatever they lead to."""
    forbidden: set[str] = set()
    if package == "mra_attention":  # relative imports only: a hub build has another name
        forbidden = {"mra_attention", "transformers", "mra_hf", "numpy", "datasets", "accelerate"}
        if room != "triton_impl":
            forbidden |= {"triton"}
    if package == "mra_hf_cli":  # answers before anything slow is imported
        allowed = set(sys.stdlib_module_names) | {"mra_hf_cli"}
        forbidden = libraries_of(path) - allowed - ({"mra_hf"} if room == "program" else set())
    if package == "mra_hf":
        forbidden = {"triton", "tests", "kernels", "sentence_transformers"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                return [f"{path.name} uses a relative import"]
    return [f"{path.name} imports {library}" for library in sorted(libraries_of(path) & forbidden)]


def test_imports_run_one_way():
    assert not violations(ROOT)


@pytest.fixture
def copy_of_sources(tmp_path):
    for folder in PACKAGES.values():
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("__pycache__", "assets", "results", "*.json"),
        )
    shutil.copy(ROOT / "kernels" / "compile_check.py", tmp_path / "kernels")
    # The folder `results` of the family is code.
    shutil.copytree(
        FAMILY / "results",
        tmp_path / PACKAGES["mra_hf"] / "results",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


@pytest.mark.parametrize(
    "file, line, words",
    [
        ("src/mra_hf/modeling.py", "import mra_hf.training.runs", "this runs upwards"),
        ("src/mra_hf/data/mlm.py", "from mra_hf.conversion import files", "this runs upwards"),
        ("src/mra_hf/training/runs.py", "from mra_hf import commands", "this runs upwards"),
        ("src/mra_hf/training/lra.py", "import mra_hf.registration", "only `import mra_hf`"),
        ("src/mra_hf/results/files.py", "from benchmarks import plot", "nothing sees benchmarks"),
        ("src/mra_hf/attention.py", "import triton", "attention.py imports triton"),
        ("src/mra_hf/attention.py", "import sentence_transformers", "sentence_transformers"),
        ("src/mra_hf/attention.py", "from . import loading", "uses a relative import"),
        ("src/mra_hf_cli/__init__.py", "import torch", "__init__.py imports torch"),
        ("src/mra_hf_cli/__init__.py", "import mra_hf", "__init__.py imports mra_hf"),
        ("src/mra_hf/other.py", "import math", "'other' of mra_hf is not listed"),
        ("kernels/compile_check.py", "import transformers", "below kernels/ imports transformers"),
        ("scripts/compare.py", "import mra_hf.training.runs", "a script runs its command"),
        ("benchmarks/records.py", "from benchmarks import run", "a circle of modules"),
        ("src/mra_hf/results/files.py", "from mra_hf.training import wikihop", "circle of rooms"),
        (f"{PACKAGES['mra_attention']}/blocks.py", "from . import api", "OPERATOR_IMPORTS"),
        (f"{PACKAGES['mra_attention']}/new.py", "import math", "'new' of mra_attention is not"),
        (
            f"{PACKAGES['mra_attention']}/api.py",
            "from mra_attention.blocks import to_blocks",
            "api.py imports mra_attention",
        ),
        (f"{PACKAGES['mra_attention']}/api.py", "import transformers", "imports transformers"),
        (f"{PACKAGES['mra_attention']}/ops.py", "import mra_hf", "never heard of the model family"),
        (f"{PACKAGES['mra_attention']}/torch_impl/dense.py", "import triton", "imports triton"),
        (
            f"{PACKAGES['mra_attention']}/reference.py",
            "from .torch_impl import dense",
            "not listed in OPERATOR_IMPORTS",
        ),
        (
            f"{PACKAGES['mra_attention']}/torch_impl/dense.py",
            "from .. import reference",
            "not listed in OPERATOR_IMPORTS",
        ),
        (
            f"{PACKAGES['mra_attention']}/multiresolution_reference.py",
            "from .multiresolution import attention",
            "not listed in OPERATOR_IMPORTS",
        ),
    ],
)
def test_a_wrong_import_is_seen_even_inside_a_function(file, line, words, copy_of_sources):
    path = copy_of_sources / file
    text = path.read_text() if path.exists() else '"""A new module."""\n'
    path.write_text(f"{text}\n\ndef _violation():\n    {line}\n")
    faults = violations(copy_of_sources)
    assert any(words in fault for fault in faults), faults


def test_the_root_of_the_family_is_small():
    assert len(list(FAMILY.glob("*.py"))) <= 12


def test_the_kernels_folder_is_no_package():
    # It would shadow the library named kernels and break `import transformers`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_scripts_are_thin():
    scripts = list((ROOT / "scripts").glob("*.py"))
    assert scripts
    for path in scripts:
        assert len(path.read_text().splitlines()) < 30, path.name


def test_files_are_short_enough_to_read():
    for path in sources(ROOT).values():
        limit = 700 if path.name == "modeling.py" else 500
        assert len(path.read_text().splitlines()) <= limit, path.name


def test_functions_of_the_conversion_fit_on_a_page():
    for path in (FAMILY / "conversion").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


def test_tests_mirror_the_packages():
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    packages = {path.name for path in FAMILY.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= packages | {"kernels", "benchmarks", "model", "project"}


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme
    assert "pip install -c constraints.txt -e . && mra-hf quickstart" in readme
    assert re.search(r'^pip install -q -c constraints.txt -e "\.\[test\]"$', ci, re.M)
    assert re.search(r"^pytest$", ci, re.M) and "mra-hf quickstart" in ci


def test_exporting_is_asked_for_in_one_place():
    """`torch.compiler.is_exporting()` is true in every compiled function in torch 2.11."""
    for path in sources(ROOT).values():
        called = "torch.compiler.is_exporting()" in path.read_text()
        assert not called or path == OPERATOR / "blocks.py", path
