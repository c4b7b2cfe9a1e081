"""Time `mra2_attention` against dense attention and write one CSV row per measurement.

    python kernels/benchmarks/run.py --device cpu --preset quick --out results.csv

Rows are written as they are measured; an interrupted run keeps what it has.
`plot.py` draws the CSV.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from mra_attention import mra2_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs

COLUMNS = (
    *("date", "commit", "device", "torch", "triton", "transformers"),
    *("op", "provider", "dtype", "batch", "heads", "length", "head_dim", "block_per_row", "mode"),
    *("pass", "ms_median", "ms_p20", "ms_p80", "peak_mb", "rel_error"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: lengths, dtypes, block_per_row, repeats
PRESETS = {
    "smoke": ((64,), ("fp32",), (1,), 1),
    "quick": ((512, 1024, 2048, 4096), ("fp32",), (8,), 3),
    "crossover": ((512, 1024, 2048, 4096, 8192), ("fp32", "bf16"), (4, 8), 5),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="CSV to write (default: only print)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths, dtypes, budgets, repeats = PRESETS[args.preset]
    conditions = _conditions(args.device, args.threads)
    file = writer = None
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        file = args.out.open("w", newline="")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
    print(f"{conditions['device']}, torch {torch.__version__}, batch 1, 12 heads x 64, median ms")
    print(f"{'length':>7}{'dtype':>6}{'pass':>10}{'provider':>22}{'ms':>10}{'vs SDPA':>9}")
    for dtype in dtypes:
        for length in lengths:
            for row in _measure(length, dtype, budgets, args.device, repeats):
                ratio = row.pop("ratio")
                print(
                    f"{length:>7}{dtype:>6}{row['pass']:>10}"
                    f"{row['provider'] + ' ' + str(row['block_per_row'] or ''):>22}"
                    f"{row['ms_median']:>10.1f}{ratio:>8.2f}x",
                    flush=True,
                )
                if writer is not None and file is not None:
                    writer.writerow(conditions | row)
                    file.flush()
    if file is not None:
        file.close()
    return 0


def _measure(length, dtype, budgets, device, repeats):
    inputs = topical_inputs(length, dtype=DTYPES[dtype], device=device)
    providers = {("sdpa", None): F.scaled_dot_product_attention}
    for block_per_row in budgets:
        providers["mra2", block_per_row] = lambda q, k, v, n=block_per_row: mra2_attention(
            q, k, v, block_per_row=n
        )
    with torch.no_grad():
        exact = F.scaled_dot_product_attention(*(x.float() for x in inputs))
        errors = {
            name: float((function(*inputs).float() - exact).norm() / exact.norm())
            for name, function in providers.items()
        }
    for backward in (False, True):
        samples = interleaved_milliseconds(providers, inputs, backward=backward, repeats=repeats)
        dense = statistics.median(samples["sdpa", None])
        for (provider, block_per_row), times in samples.items():
            ordered = sorted(times)
            median = statistics.median(ordered)
            yield {
                "op": "attention",
                "provider": provider,
                "dtype": dtype,
                "batch": 1,
                "heads": 12,
                "length": length,
                "head_dim": 64,
                "block_per_row": block_per_row,
                "mode": "full" if provider == "mra2" else "dense",
                "pass": "fwd+bwd" if backward else "fwd",
                "ms_median": round(median, 3),
                "ms_p20": round(ordered[int(0.2 * (len(ordered) - 1))], 3),
                "ms_p80": round(ordered[round(0.8 * (len(ordered) - 1))], 3),
                "peak_mb": None,
                "rel_error": f"{errors[provider, block_per_row]:.2e}",
                "ratio": dense / median,
            }


def _conditions(device: str, threads: int) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return __import__(package).__version__
        except ImportError:
            return ""

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    name = f"{_cpu_name()}, {threads} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": "",
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
