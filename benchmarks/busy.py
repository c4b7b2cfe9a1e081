"""Attention while other programs use the cores: SDPA, the compiled kernels and plain torch.

Three conditions, in the default environment: an idle machine, one busy process per core, and
beside another torch program with as many threads. In each, providers take turns; a row says how
many times as fast as SDPA it was there, and how many times slower than on the idle machine.

example:
  python benchmarks/busy.py --length 4096
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.records import Records, conditions, timing_columns

OUT = ROOT / "benchmarks" / "results" / "cpu_busy.csv"
COLUMNS = (
    *("date", "commit", "device", "torch", "transformers"),
    *("condition", "provider", "dtype", "heads", "length", "block_per_row", "pass"),
    *("ms_median", "ms_p20", "ms_p80", "times_sdpa", "times_idle"),
)
KEYS = COLUMNS[COLUMNS.index("condition") : COLUMNS.index("ms_median")]
_BUSY = "while True: pass"
_TORCH_JOB = """
import torch, torch.nn.functional as F
torch.set_num_threads({threads})
query = torch.randn(1, 12, 1024, 64)
while True:
    with torch.no_grad():
        F.scaled_dot_product_attention(query, query, query).mul_(2).add_(1)
"""
CONDITIONS = ("idle", "a busy process per core", "beside a torch program")


def main(argv=None) -> int:
    """Measure all conditions and write their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--block-per-row", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV (default: %(default)s)")
    args = parser.parse_args(argv)

    import torch

    records, threads = Records(args.out, COLUMNS, KEYS), torch.get_num_threads()
    idle: dict[tuple[str, str], float] = {}
    for condition in CONDITIONS:
        with _others(condition, threads):
            for row in _measure(args, idle):
                row |= conditions("cpu", threads) | {"condition": condition}
                records.add(row)
                shown = ("condition", "provider", "pass", "ms_median", "times_sdpa", "times_idle")
                print("  ".join(f"{row[name]:<24}" for name in shown), flush=True)
    return 0


@contextmanager
def _others(condition: str, threads: int) -> Iterator[None]:
    """The other programs of a condition."""
    programs: list[str] = []
    if condition == CONDITIONS[1]:
        programs = [_BUSY] * (os.cpu_count() or 1)
    elif condition == CONDITIONS[2]:
        programs = [_TORCH_JOB.format(threads=threads)]
    running = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    try:
        time.sleep(5 if running else 0)  # until they have imported torch
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _measure(args: argparse.Namespace, idle: dict[tuple[str, str], float]) -> Iterator[dict]:
    """Rows of both passes; `idle` is filled by the first call and read by the others."""
    import torch.nn.functional as F

    from mra_attention import mra2_attention
    from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs

    inputs = topical_inputs(args.length)
    providers = {"sdpa": F.scaled_dot_product_attention}
    for impl in ("native", "torch"):
        mra2 = partial(mra2_attention, block_per_row=args.block_per_row, impl=impl)
        providers[f"mra2_{impl}"] = mra2
    for name, backward in (("fwd", False), ("fwd+bwd", True)):
        samples = interleaved_milliseconds(
            providers, inputs, backward=backward, repeats=args.repeats
        )
        columns = {provider: timing_columns(times) for provider, times in samples.items()}
        for provider, row in columns.items():
            median = row["ms_median"]
            before = idle.setdefault((provider, name), median)
            yield row | {
                **{"provider": provider, "pass": name, "dtype": "fp32"},
                **{"heads": inputs[0].shape[1], "length": args.length},
                "block_per_row": "" if provider == "sdpa" else args.block_per_row,
                "times_sdpa": round(columns["sdpa"]["ms_median"] / median, 2),
                "times_idle": round(median / before, 2),
            }


if __name__ == "__main__":
    sys.exit(main())
