"""Compile every kernel for GPUs that are not here, and judge the machine code.

    python kernels/compile_check.py                         # a table, exit status 1 on a finding
    python kernels/compile_check.py --targets sm_90 --dims 64 --csv report.csv

Launches are recorded from the public code path on tensors without data (device "meta"), which also
shows that nothing on that path reads a value back. Kernels are not specialized on lengths, so that
one compiled kernel serves them all. Each launch is compiled ahead of time by the installed Triton
for sm_80, sm_90 and gfx942, with the launch configuration shipped for that architecture. Tiles of
two query blocks (column "queries"), which no shipped configuration uses, are compiled at head dim
64 in 16 bits; some with key blocks narrower than query blocks (column "keys": tokens) at head dims
64 and 128. Findings: stack spills beyond the allowance, shared memory over the GPU's limit (which
compiling does not notice), tensor-core instructions other than the intended ones, and scores that
are fused with the product before them.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default up to 3.9
    sys.path.insert(0, str(ROOT / "torch-ext"))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from mra_attention import triton_impl  # noqa: E402
from mra_attention.implementations import BLOCK_SIZE  # noqa: E402
from mra_attention.triton_impl import launching  # noqa: E402

#: Target and bytes of shared memory that one program may use.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (16, 32, 64, 128)
ITEM_KERNELS = ("exact_kernel", "exact_query_kernel", "exact_key_kernel")
#: Key blocks narrower than query blocks: their size, dtype and head dim. Kernels that are not of
#: `ITEM_KERNELS` are compiled for 8 keys in bf16 only.
NARROW = ((8, "bf16", 64), (16, "bf16", 64), (8, "fp32", 64), (8, "bf16", 128))
#: Kernels that subtract the largest logit of a row from its logits.
RANKING_KERNELS = ("score_kernel", "digit_kernel", "mark_kernel")
#: (sparse, masked), besides (False, True), with which everything is compiled.
FURTHER_MODES = ((False, False), (True, True), (True, False))
#: Head dims that the kernels pad, and the dtype to compile them with, by padded head dim.
PADDED = {64: (40, "fp32"), 128: (80, "bf16")}
#: Bytes (NVIDIA) or registers (AMD) that may be spilled, by (target, kernel, dtype, padded head
#: dim). What is not listed may not spill at all.
SPILL_ALLOWANCES: dict[tuple[str, str, str, int], int] = {
    ("sm_80", "pool_kernel", "fp32", 128): 8,
    ("sm_80", "exact_key_kernel", "fp32", 128): 8,
    ("sm_80", "exact_key_kernel", "fp32", 16): 8,
    ("sm_80", "exact_kernel", "fp32", 64): 24,
    ("sm_80", "exact_kernel", "fp32", 128): 8,
    ("sm_80", "exact_query_kernel", "fp32", 32): 8,
    ("sm_80", "exact_query_kernel", "fp32", 64): 24,
    ("sm_80", "exact_query_kernel", "fp32", 128): 8,
    ("sm_90", "exact_kernel", "fp32", 128): 16,
    ("sm_90", "exact_query_kernel", "fp32", 32): 8,
    ("sm_90", "exact_query_kernel", "fp32", 128): 32,
}
#: Instead of these, with Triton before 3.9: its compiler needs a few registers more at head dim 128
#: with a distance bias.
OLDER_SPILL_ALLOWANCES = {
    ("sm_90", "coarse_query_kernel", "bf16", 128): 16,
    ("sm_90", "coarse_query_kernel", "fp32", 128): 256,
    ("sm_90", "exact_query_kernel", "fp32", 128): 56,
}
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    SPILL_ALLOWANCES |= OLDER_SPILL_ALLOWANCES


@dataclass(frozen=True)
class Launch:
    """One launch as recorded: kernel name, argument types, constants, configuration."""

    kernel: str
    target: str
    dtype: str
    dim: int
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int


@dataclass
class Result:
    """One compiled launch: a row of the table."""

    target: str
    kernel: str
    dtype: str
    dim: int
    form: str
    bias: str
    query_blocks: int
    key_block_size: int
    group: int
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: str
    finding: str


#: The recorded kernels by name; the processes that compile inherit them.
_KERNELS: dict[str, object] = {}

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def _recorded(
    target, dtype, dim, sparse, masked, precision, length, biased=False, key_block_size=32,
    **changes,
) -> list[Launch]:  # fmt: skip
    """The launches of a selection, a forward and a backward pass, with a distance bias or without,
    and with `changes` to the configurations of kernels whose tiles belong to query blocks.
    """
    launches = []
    table = launching.table()
    configs = {
        key: config if key[1] == "key_gradient" else replace(config, **changes)
        for key, config in table.configs.items()
    }
    changed = replace(table, configs=configs)

    def record(kernel, programs, *, num_warps=4, num_stages=2, **arguments):
        assert arguments.keys() == set(kernel.arg_names), kernel.fn.__name__
        signature, aligned, constants = [], [], []
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr:
                constants.append((name, value))
                continue
            if isinstance(value, torch.Tensor):
                kind, is_aligned = _TYPES[value.dtype], True
            elif isinstance(value, float):
                kind, is_aligned = "fp32", False
            else:
                kind = "i64" if value >= 2**31 else "i32"
                is_aligned = value % 16 == 0 and not parameter.do_not_specialize
            signature.append((name, kind))
            if is_aligned:
                aligned.append(name)
        parameters = map(tuple, (signature, aligned, constants))
        described = (kernel.fn.__name__, target, dtype, dim)
        launches.append(Launch(*described, *parameters, num_warps, num_stages))
        _KERNELS[kernel.fn.__name__] = kernel

    shape = (2, length, 12, dim)
    query, key, value, grad = (
        torch.empty(shape, dtype=DTYPES[dtype], device="meta").transpose(1, 2) for _ in range(4)
    )
    mask = torch.empty(shape[:2], dtype=torch.bool, device="meta") if masked else None
    bias = torch.empty((12, length // 32), device="meta") if biased else None
    patches = {
        "launch": record,
        "architecture": lambda device: target,
        "float32_precision": lambda: precision,
        "table": lambda: changed,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in patches.items():
            stack.enter_context(mock.patch.object(launching, name, stand_in))
        scale = dim**-0.5
        summaries = triton_impl.summarize(query, key, value, mask, key_block_size)
        settings = {"summaries": summaries, "scale": scale, "block_size": 32}
        settings["key_block_size"] = key_block_size
        settings |= {"distance_bias": bias, "initial_prior_first_n_blocks": 1}
        choice = {"block_per_row": 8, "block_budget": None, "rule": "row_normalized"}
        choice["initial_prior_diagonal_n_blocks"] = 3
        blocks = triton_impl.select(query, key, mask, **settings, **choice)
        settings["sparse"] = sparse
        settings["largest_budget"] = 8 * length // key_block_size  # as of the selection above
        results = triton_impl.forward(query, key, value, mask, blocks, **settings)
        triton_impl.backward(grad, query, key, value, *results, mask, blocks, **settings)
    return launches


def recorded_launches(targets=tuple(TARGETS), dims=DIMS, dtypes=tuple(DTYPES)) -> list[Launch]:
    """Every launch worth compiling, once: kernels with a shipped configuration in all dtypes and
    head dims, other kernels at all head dims. Every head dim and every dtype meets all of the
    further modes, but not in every combination. With a distance bias, which is no wider in fp16
    than in bf16: the other two dtypes, masked.
    """
    recorded: dict[Launch, None] = {}
    for target in targets:
        for dim in dims:
            for dtype in dtypes:
                for launch in _recorded(target, dtype, dim, False, True, "ieee", 4096):
                    if launch.kernel in ITEM_KERNELS or dtype != "fp16":
                        recorded[launch] = None
            for i, dtype in enumerate(DTYPES, DIMS.index(dim)):
                mode = FURTHER_MODES[i % len(FURTHER_MODES)]
                for launch in _recorded(target, dtype, dim, *mode, "ieee", 4096):
                    if launch.kernel in ITEM_KERNELS and dtype in dtypes:
                        recorded[launch] = None
            padded, dtype = PADDED.get(dim, (dim, ""))
            if dtype in dtypes:
                for launch in _recorded(target, dtype, padded, False, True, "ieee", 4096):
                    if "D" in dict(launch.constants):  # others see the padded one only
                        recorded[launch] = None
            for dtype in (x for x in ("bf16", "fp32") if x in dtypes):
                for sparse in (False, True):
                    call = (target, dtype, dim, sparse, True, "ieee", 4096)
                    for launch in _recorded(*call, biased=True):
                        if _is_biased(launch) and (not sparse or dtype == "bf16"):
                            recorded[launch] = None
            # Longer sequences: more digits, and scores that every pass computes anew.
            for length in (16384, 65536) if dim >= 64 else ():
                for biased in (False, True):
                    call = (target, "bf16", dim, False, True, "ieee", length)
                    for launch in _recorded(*call, biased=biased):
                        if launch.kernel not in ITEM_KERNELS:
                            recorded[launch] = None
        for dim in {64} & set(dims):
            for biased in (False, True):
                call = (target, "fp32", dim, False, True, "tf32", 4096)
                for launch in _recorded(*call, biased=biased):
                    recorded[replace(launch, dtype="tf32")] = None
            for dtype in (x for x in ("bf16", "fp16") if x in dtypes):
                forms = (False, True) if target == "sm_90" else (False,)
                for swapped, biased in itertools.product(forms, (False, True)):
                    changes = {"query_blocks": 2, "swapped": swapped}
                    call = (target, dtype, dim, False, True, "ieee", 4096, biased)
                    for launch in _recorded(*call, **changes):
                        if _query_blocks(launch) == 2 and (
                            launch.kernel in ITEM_KERNELS or dtype == "bf16"
                        ):
                            recorded[launch] = None
        for key_block_size, dtype, dim in NARROW:
            for biased in (False, True) if dim in dims and dtype in dtypes else ():
                call = (target, dtype, dim, False, True, "ieee", 4096, biased)
                for launch in _recorded(*call, key_block_size):
                    if _key_block_size(launch) not in (0, BLOCK_SIZE) and (
                        launch.kernel in ITEM_KERNELS or (key_block_size, dtype) == (8, "bf16")
                    ):
                        recorded[launch] = None
    unique = {}
    for launch in recorded:  # many kernels do not depend on the dtype or the precision
        unique.setdefault(replace(launch, dtype="", dim=0), launch)
    return list(unique.values())


def _is_biased(launch: Launch) -> bool:
    """Whether a kernel adds a distance bias, or is launched for its sake only."""
    for_its_sake = launch.kernel in ("biased_from_kernel", "bias_gradient_kernel")
    return dict(launch.constants).get("HAS_BIAS", for_its_sake)


def _query_blocks(launch: Launch) -> int:
    """Query blocks that own a tile or a list; 0 for kernels without."""
    constants = dict(launch.constants)
    return constants.get("QUERY_BLOCKS", constants.get("OWN_BLOCKS", 0))


def _key_block_size(launch: Launch) -> int:
    """Keys per key block; 0 for kernels that do not depend on it."""
    constants = dict(launch.constants)
    per_block = constants.get(
        "PER_BLOCK", constants.get("PARTS", 0) // constants.get("OWN_BLOCKS", 1)
    )
    return BLOCK_SIZE // per_block if per_block else 0


def compile_launch(launch: Launch) -> Result:
    """Compile one launch and judge it."""
    kernel = _KERNELS[launch.kernel]
    names = kernel.arg_names
    constants = dict(launch.constants)
    types = dict(launch.signature)
    signature = {name: types.get(name, "constexpr") for name in names}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    target, shared_limit = TARGETS[launch.target]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        registers, spills = _nvidia_resources(compiled.asm["cubin"])
        fused = launch.kernel in RANKING_KERNELS and "neg.f32" in compiled.asm["ptx"]
        census = _nvidia_census(compiled.asm["cubin"])
    else:
        text, fused = compiled.asm["amdgcn"], False
        registers, spills = _amd_number(text, "vgpr_count"), _amd_number(text, "vgpr_spill_count")
        census = collections.Counter({"MFMA": len(re.findall(r"\bv_mfma", text))})
    described = (launch.target, launch.kernel, launch.dtype, launch.dim)
    bias = "yes" if _is_biased(launch) else ""
    tile = (_form(launch.kernel, constants), bias, _query_blocks(launch), _key_block_size(launch))
    tile += (constants.get("GROUP", 0),)
    tensor_core = "+".join(name for name, count in census.items() if count)
    used = (registers, spills, compiled.metadata.shared, tensor_core)
    result = Result(*described, *tile, launch.num_warps, launch.num_stages, *used, finding="")
    findings = _findings(result, shared_limit)
    if fused:
        findings.append(
            "a score is fused with the product before it, so that equal ones do not tie"
        )
    result.finding = "; ".join(findings)
    return result


def _form(kernel: str, constants: dict[str, object]) -> str:
    """How an item kernel lays out its operands, or how another kernel multiplies."""
    if "SWAPPED" in constants:
        return "swapped" if constants["SWAPPED"] else "plain"
    reads_scores = kernel in ("digit_kernel", "mark_kernel") and constants["STORED"]
    return "" if reads_scores else str(constants.get("PRECISION", ""))


def _findings(result: Result, shared_limit: int) -> list[str]:
    findings = []
    key = (result.target, result.kernel, result.dtype, launching.padded_dim(result.dim))
    allowed = SPILL_ALLOWANCES.get(key, 0)
    if result.spills > allowed:
        findings.append(f"spills {result.spills}, allowed {allowed}")
    if result.shared_bytes > shared_limit:
        findings.append(f"shared memory {result.shared_bytes}, limit {shared_limit}")
    if result.kernel in ITEM_KERNELS or result.form == "tf32x3":
        used, intended = result.tensor_core or "none", _intended(result) or "none"
        if used != intended:
            findings.append(f"tensor cores by {used}, not {intended}")
    return findings


def _intended(result: Result) -> str:
    """The tensor-core instructions that a kernel is meant to use, and no others."""
    if result.form == "tf32x3":
        return "HMMA"
    if result.target == "gfx942":
        return "MFMA"  # float32 too
    if result.dtype == "fp32":
        return ""  # IEEE products run on the ordinary units
    # Sums of fewer than 64 channels cannot be the M side that wgmma needs; tf32 runs plain.
    wide = launching.padded_dim(result.dim) >= 64 and result.dtype != "tf32"
    return "HGMMA" if result.target == "sm_90" and wide else "HMMA"


def _nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack and local memory."""
    text = _nvidia_tool("cuobjdump", "--dump-resource-usage", cubin)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, numbers.groups())
    return registers, stack + local


def _nvidia_census(cubin: bytes) -> collections.Counter:
    text = _nvidia_tool("cuobjdump", "--dump-sass", cubin)
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", text)
    return collections.Counter(name for name in names if name in ("HGMMA", "HMMA"))


def _amd_number(text: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))


def compile_all(launches: list[Launch], processes: int) -> list[Result]:
    """Compile in processes that inherit the recorded kernels; progress goes to stderr."""
    results = []
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for i, result in enumerate(pool.map(compile_launch, launches), 1):
            results.append(result)
            if sys.stderr.isatty() or i % 50 == 0 or i == len(launches):
                print(f"compiled {i} of {len(launches)}", file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=list(DIMS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--csv", type=Path, help="write the table there too")
    args = parser.parse_args()
    launches = recorded_launches(tuple(args.targets), tuple(args.dims), tuple(args.dtypes))
    results = compile_all(launches, args.processes)
    print(f"Triton {triton.__version__}, {len(results)} compiled launches")
    print(
        f"{'target':<7}{'kernel':<24}{'dtype':<6}{'dim':>4} {'form':<8}{'bias':<5}{'queries':>8}"
        f"{'keys':>5}{'group':>6}{'warps':>6}{'stages':>7}{'regs':>6}{'spills':>7}{'shared':>8}  "
        f"{'tensor cores':<13}finding"
    )
    for r in results:
        print(
            f"{r.target:<7}{r.kernel.removesuffix('_kernel'):<24}{r.dtype:<6}{r.dim:>4} "
            f"{r.form:<8}{r.bias:<5}{r.query_blocks or '':>8}{r.key_block_size or '':>5}"
            f"{r.group or '':>6}{r.warps:>6}"
            f"{r.stages:>7}{r.registers:>6}{r.spills:>7}{r.shared_bytes:>8}  "
            f"{r.tensor_core:<13}{r.finding}"
        )
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(results[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    findings = [result for result in results if result.finding]
    for r in findings:  # once more, where only the end of a log is kept
        print(f"{r.target} {r.kernel} {r.dtype} head dim {r.dim}: {r.finding}")
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
