"""What can be said about the Triton kernels without a GPU."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import MODES, Attention, assert_exports_no_operator_of_ours, make_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from mra_attention import implementations, mra2_attention
from pairwise import pairwise

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")

from mra_attention.triton_impl import launching  # noqa: E402

INTERPRETED_CALL = """
import torch
from mra_attention import mra2_attention

query, key, value = (torch.randn(1, 2, 70, 16, requires_grad=True) for _ in range(3))
mask = torch.arange(70)[None] < 60
results = []
for impl in ("triton", "reference"):
    output = mra2_attention(query, key, value, mask, block_per_row=1, impl=impl)
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
    results.append((output, *gradients))
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
"""


def test_a_call_in_the_interpreter():
    """In a process of its own; `TRITON_INTERPRET=1 pytest -m gpu tests/kernels` tests the rest."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED_CALL], env=environment, check=True)


@pytest.mark.parametrize(
    ("kernel", "query_blocks"),
    [("forward", 3), ("query_gradient", 0), ("key_gradient", 2), ("forward", "2")],
)
def test_a_table_with_a_number_of_query_blocks_that_does_not_exist_is_refused(kernel, query_blocks):
    content = json.loads(Path(launching.__file__).with_name("launch_configs.json").read_text())
    row = next(row for row in content["configs"] if row["kernel"] == kernel)
    row["query_blocks"] = query_blocks
    with pytest.raises(ValueError, match=f"query_blocks must be .* for {kernel}, got"):
        launching.parse_table(content)


def test_an_unknown_coarse_precision_is_refused():
    content = json.loads(Path(launching.__file__).with_name("launch_configs.json").read_text())
    content["coarse_precision"]["sm_90"] = "tf32"
    with pytest.raises(ValueError, match=r"coarse_precision must be .*, got 'tf32' for sm_90"):
        launching.parse_table(content)


@pairwise(target=["sm_80", "sm_90", "gfx942"], dtype=["fp32", "bf16", "fp16"], dim=[64, 128])
def test_summaries_of_float32_inputs_are_multiplied_exactly(target, dtype, dim, monkeypatch):
    """And those of 16 bits on tensor cores where the table says so, but for what would spill."""
    monkeypatch.syspath_prepend(ROOT / "kernels")
    import compile_check as check

    found = {}
    for length, biased in itertools.product((4096, 65536), (False, True)):
        for launch in check._recorded(target, dtype, dim, False, True, "ieee", length, biased):
            if launch.kernel not in check.ITEM_KERNELS:
                found.setdefault(launch.kernel, set()).add(dict(launch.constants).get("PRECISION"))
    coarse = ["coarse_kernel", "coarse_query_kernel", "coarse_key_kernel", "diagonal_kernel"]
    coarse += check.RANKING_KERNELS
    for kernel, precisions in found.items():
        is_exact = target == "gfx942" or dtype == "fp32"
        is_exact |= kernel in ("coarse_key_kernel", "diagonal_kernel") and dim == 128
        expected = ("ieee" if is_exact else "tf32x3") if kernel in coarse else None
        assert precisions == {expected}, kernel
    assert found.keys() > set(coarse)


def compile_check(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "kernels" / "compile_check.py", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """The part of the compile check that matters most; CI runs all of it."""
    table = tmp_path / "table.csv"
    result = compile_check(
        *("--targets", "sm_90", "--dims", "64", "--dtypes", "bf16"), *("--csv", str(table))
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "0 findings" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if " swapped " in line]
    assert {row[1] for row in rows} == {"exact", "exact_query", "exact_key"}
    assert all("HGMMA" in row for row in rows)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) > 20
    two = {(row["kernel"], row["form"]) for row in rows if row["query_blocks"] == "2"}
    forms = itertools.product(("exact_kernel", "exact_query_kernel"), ("plain", "swapped"))
    assert two >= {*forms, ("merge_kernel", ""), ("merge_gradient_kernel", ""), ("fill_kernel", "")}
    items = {"exact_kernel", "exact_query_kernel", "exact_key_kernel"}
    further = {"pool_kernel", "mark_kernel", "coarse_key_kernel", "fill_kernel"}
    for width, expected in (("8", items | further), ("16", items), ("32", items | further)):
        assert {row["kernel"] for row in rows if row["key_block_size"] == width} >= expected
    biased = {row["kernel"] for row in rows if row["bias"]}
    assert biased >= items | {"diagonal_kernel", "bias_gradient_kernel"}


def test_compile_check_sees_spills_shared_memory_and_the_wrong_tensor_cores(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "kernels")
    import compile_check as check

    good = check.Result(
        "sm_90", "exact_kernel", "bf16", 64, "swapped", "", 1, 32, 2, 4, 3, 128, 0, 1, "", ""
    )
    good.tensor_core = "HGMMA"
    assert check._findings(good, 100) == []
    for field, value, word in (
        ("spills", 8, "spills 8"),
        ("shared_bytes", 200, "shared memory 200"),
        ("tensor_core", "HMMA", "not HGMMA"),
        ("tensor_core", "HGMMA+HMMA", "not HGMMA"),
    ):
        bad = check.replace(good, **{field: value})
        (finding,) = check._findings(bad, 100)
        assert word in finding


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "takes CUDA and ROCm tensors, got tensors on cpu"),
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 8}, "head dims 16 to 128, got 8"),
        ({"dim": 160}, "head dims 16 to 128, got 160"),
        ({"block_size": 16}, "block_size=32, got 16"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_a_remedy(change, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = make_inputs(1, 1, 40, change.get("dim", 32), dtype=change.get("dtype", torch.float32))
    block_size = change.get("block_size", 32)
    with pytest.raises(ValueError, match='impl="triton"') as error:
        mra2_attention(*inputs[:3], impl="triton", block_size=block_size)
    assert words in str(error.value) and 'impl="auto"' in str(error.value)
    assert implementations.resolve_impl("auto", inputs[0], block_size) in ("native", "torch")


@pytest.fixture
def on_a_cuda_device(monkeypatch):
    """Let the choice see a CUDA device of a compute capability; return a tensor that lies on it."""

    def pretend(*capability, hip=None):
        def get_device_capability(device):
            assert not torch.compiler.is_dynamo_compiling(), "the true one cannot be traced"
            return capability

        cuda = SimpleNamespace(
            is_available=lambda: True, get_device_capability=get_device_capability
        )
        version = SimpleNamespace(hip=hip)
        monkeypatch.setattr(implementations, "torch", SimpleNamespace(cuda=cuda, version=version))
        with FakeTensorMode():
            return torch.empty(1, 1, 40, 32, device="cuda:0")

    return pretend


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_cuda_devices_older_than_the_launch_table_take_the_torch_path(capability, on_a_cuda_device):
    query = on_a_cuda_device(*capability)
    assert implementations.resolve_impl("auto", query, 32) == "torch"
    with pytest.raises(ValueError, match='impl="triton" takes CUDA devices') as error:
        implementations.resolve_impl("triton", query, 32)
    assert "got one of {}.{}".format(*capability) in str(error.value)
    assert 'Pass impl="auto" or "torch"' in str(error.value)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_cuda_devices_take_the_kernels(capability, on_a_cuda_device):
    query = on_a_cuda_device(*capability)
    assert implementations.resolve_impl("auto", query, 32) == "triton"


def test_rocm_devices_take_the_kernels_whatever_their_number(on_a_cuda_device):
    query = on_a_cuda_device(7, 5, hip="7.0")
    assert implementations.resolve_impl("auto", query, 32) == "triton"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_the_compute_capability_does_not_break_a_compiled_graph(capability, on_a_cuda_device):
    on_a_cuda_device(*capability)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def shifted(x):
        found = implementations.cuda_capability(x.device)
        return x + 1 if found < implementations.OLDEST_CAPABILITY else x - 1

    given = shifted(torch.zeros(2)).tolist()
    assert given == ([1, 1] if capability < (8, 0) else [-1, -1])


@pytest.mark.parametrize("mode", MODES)
def test_a_module_for_the_kernels_is_exported_without_a_gpu(mode, monkeypatch):
    """Where calling it is refused: the exported graph is the same, whatever `impl` says."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = {"block_per_row": 2, "approx_mode": mode}
    module = Attention(**settings, impl="triton")
    inputs = make_inputs(2, 2, 70, 32)[:3]
    with pytest.raises(ValueError, match="got tensors on cpu"):
        module(*inputs)
    program = torch.export.export(module, tuple(inputs))
    assert_exports_no_operator_of_ours(program)
    expected = mra2_attention(*inputs, **settings, impl="reference")
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=0, atol=1e-5)


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(implementations, "_IS_INSTALLED", False)
    inputs = make_inputs(1, 1, 40, 32)
    with pytest.raises(ValueError, match="not installed"):
        mra2_attention(*inputs[:3], impl="triton")


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ("pass", "ieee"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ],
)
def test_float32_products_follow_the_settings_of_torch(setting, precision):
    """In a process of its own: torch refuses to mix its older and newer settings."""

    def check():
        exec(setting, {"torch": torch})
        assert launching.float32_precision() == precision

    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0
