"""The operator as a kernel of the hub: `kernels/build.toml`, and a build loaded by `kernels`.

kernel-builder itself needs Nix, so the test lays out what it would: a folder for each backend with
the package's files, an `_ops.py` with a namespace of its own, and `metadata.json`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mra_hf_cli
from mra_attention.native_impl.library import find

tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from 3.11 on")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "kernels"
BUILD = tomllib.loads((PROJECT / "build.toml").read_text())
PACKAGE = PROJECT / "torch-ext" / BUILD["general"]["name"].replace("-", "_")
OPERATORS = ["mra2_backward", "mra2_forward", "mra2_select", "mra2_summarize"]

#: What a build has in place of the package's own `_ops.py`.
GENERATED_OPS = """\
import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{namespace}::{{op_name}}"
"""

#: A program that has torch and `kernels`, and no Transformers.
CONSUMER = """\
import json
import sys
from pathlib import Path


class NoTransformers:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"{name} is hidden from this test", name=name)


sys.meta_path.insert(0, NoTransformers())

import torch
from kernels import get_local_kernel

repository, namespace, operators = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
impl = sys.argv[4]
operator = get_local_kernel(Path(repository), backend="cpu")
assert Path(operator.__file__) == Path(repository, "build", "torch-cpu", "__init__.py")
for other in {namespace, "mra_attention"}:
    registered = [name for name in operators if hasattr(getattr(torch.ops, other), name)]
    assert registered == (operators if other == namespace else []), (other, registered)

torch.manual_seed(0)
query, key, value = torch.randn(3, 2, 2, 100, 16).unbind(0)  # 4 blocks, the last one ragged
mask = torch.arange(100) < torch.tensor([[100], [70]])
weights = torch.randn(2, 2, 100, 16)


def output_and_gradients(attention, **arguments):
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    output = attention(*inputs, mask, block_per_row=2, **arguments)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


for mode in ("full", "sparse"):
    expected = output_and_gradients(operator.mra2_attention, approx_mode=mode, impl="reference")
    found = output_and_gradients(operator.mra2_attention, approx_mode=mode)
    same = output_and_gradients(operator.mra2_attention, approx_mode=mode, impl=impl)
    assert all(map(torch.equal, same, found))  # this is what `auto` takes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

# The fakes and the gradient are registered in the build's namespace too.
compiled = torch.compile(operator.mra2_attention, backend="aot_eager", fullgraph=True)
assert all(map(torch.equal, output_and_gradients(compiled, approx_mode="sparse"), found))

# The build imports nothing but itself ...
assert not {"transformers", "mra_hf", "mra_attention"} & set(sys.modules)
if namespace != "mra_attention":
    # ... and stands beside the installed package.
    import mra_attention

    settings = {"approx_mode": "sparse", "impl": impl}  # as in the build
    installed = output_and_gradients(mra_attention.mra2_attention, **settings)
    assert mra_attention is not operator and all(map(torch.equal, installed, found))
print("loaded", operator.__name__)
"""


def lay_out_build(repository: Path, generated_namespace: str | None) -> None:
    """Write `build/torch-<backend>/` for each backend of `build.toml` into `repository`."""
    general = BUILD["general"]
    for backend in general["backends"]:
        variant = repository / "build" / f"torch-{backend}"
        for extension in BUILD["torch-noarch"]["pyext"]:
            for source in PACKAGE.rglob(f"*.{extension}"):
                copy = variant / source.relative_to(PACKAGE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
        if generated_namespace is not None:
            ops = GENERATED_OPS.format(namespace=generated_namespace)
            (variant / "_ops.py").write_text(ops)
        metadata = {
            "id": f"_{PACKAGE.name}_{backend}_xyz",
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": general.get("python-depends", []),
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("generated_namespace", [None, "_mra_attention_xyz"])
def test_a_build_loads_and_computes_without_transformers(tmp_path, generated_namespace, impl):
    repository = tmp_path / "repository"
    lay_out_build(repository, generated_namespace)
    if impl == "native":  # a file that a build would have to carry beside those of Python
        library = find()
        if library is None:
            pytest.skip("the CPU kernels were not compiled")
        for copy in repository.glob("build/*/native_impl"):
            shutil.copy(library, copy)
    namespace = generated_namespace or PACKAGE.name
    result = subprocess.run(
        [sys.executable, "-c", CONSUMER, str(repository), namespace, json.dumps(OPERATORS), impl],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["loaded", f"_{PACKAGE.name}_cpu_xyz"]


def test_the_library_accepts_build_toml():
    from kernels._rust import Backend, Build

    build = Build.open(PROJECT)
    expected = [Backend.from_str(name) for name in BUILD["general"]["backends"]]
    assert build.general.backends == expected


def test_build_toml_agrees_with_the_package():
    general = BUILD["general"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (PACKAGE / "__init__.py").is_file() and (PACKAGE / "_ops.py").is_file()
    assert general["license"] == project["license"]
    assert general["version"] == int(mra_hf_cli.__version__.split(".")[0])
    compiled = PACKAGE / "native_impl"  # the hub leaves the library out: `auto` takes torch there
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix == ".py" or compiled not in path.parents]
    kinds = {path.suffix for path in files if path.parent.name != "__pycache__"}
    assert kinds <= {f".{extension}" for extension in BUILD["torch-noarch"]["pyext"]}
