"""Time `mra2_attention` against dense attention and its peers; write one CSV row per measurement.

    python kernels/benchmarks/run.py --device cpu --preset quick --out results.csv

A section (what is timed, dtype, length) is written when it is complete; `--resume` skips those
that the file already has with the same budgets. `plot.py` draws the CSV.
"""

import argparse
import csv
import datetime
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sections import SECTIONS

COLUMNS = (
    *("date", "commit", "device", "torch", "triton", "transformers"),
    *("op", "provider", "dtype", "batch", "heads", "length", "head_dim", "block_per_row", "mode"),
    *("pass", "ms_median", "ms_p20", "ms_p80", "peak_mb", "rel_error"),
)


@dataclass(frozen=True)
class Sweep:
    """Which sections a preset measures.

    Args:
        op: a key of `SECTIONS`.
        lengths: tokens.
        dtypes: "fp32", "bf16".
        budgets: `block_per_row` of MRA-2.
        repeats: interleaved rounds.
        memory: measure the peak memory of each provider too, in a process of its own.
    """

    op: str
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    budgets: tuple[int, ...] = (4, 8, 16)
    repeats: int = 5
    memory: bool = True


_SHORT = (512, 1024, 2048)
PRESETS = {
    "smoke": (
        Sweep("attention", (64,), ("fp32",), (1,), 1, memory=False),
        Sweep("self_attention", (64,), ("fp32",), (1,), 1, memory=False),
        Sweep("model", (64,), ("fp32",), (1,), 1, memory=False),
    ),
    "quick": (Sweep("attention", (512, 1024, 2048, 4096), budgets=(8,), memory=False),),
    "pairs": (
        Sweep("attention", (512,), budgets=(4,), repeats=21, memory=False),
        Sweep("attention", (4096,), budgets=(8,), repeats=15, memory=False),
        Sweep("attention", (8192,), budgets=(8,), repeats=7, memory=False),
        Sweep("attention", (16384,), budgets=(8,), memory=False),
    ),
    "full": (
        Sweep("attention", _SHORT, memory=False),
        Sweep("attention", (4096, 8192)),
        Sweep("attention", (16384,), repeats=3),
        Sweep("self_attention", _SHORT, ("fp32",), (8,), 5, memory=False),
        Sweep("self_attention", (4096, 8192, 16384), ("fp32",), (8,), 1, memory=False),
    ),
    "models": (
        Sweep("model", _SHORT, ("fp32",), (8,), 3, memory=False),
        Sweep("model", (4096, 8192), ("fp32",), (8,), 1, memory=False),
    ),
}


def main() -> int:
    """Measure a preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: a minute; pairs: dense attention and one budget in many rounds, ten minutes; "
        "full: half an hour; models: whole RoBERTa-base models, ten minutes",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="CSV to write (default: only print)")
    parser.add_argument("--resume", action="store_true", help="keep the sections OUT already has")
    args = parser.parse_args()
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA or ROCm device here")
    torch.set_num_threads(args.threads)
    conditions = _conditions(args.device, args.threads)
    done = _start(args.out, args.resume)
    print(f"{conditions['device']}, torch {torch.__version__}, batch 1, 12 heads x 64, median ms")
    print(
        f"{'op':<16}{'length':>7}{'dtype':>6}{'pass':>9}  {'provider':<18}{'ms':>10}{'vs SDPA':>9}"
    )
    sections = list(_sections(args.preset))
    for number, (sweep, dtype, length) in enumerate(sections, 1):
        section = (sweep.op, dtype, str(length))
        wanted = {str(budget) for budget in sweep.budgets}
        if wanted <= done.get(section, set()):
            continue
        if section in done:
            parser.error(
                f"{args.out} has {section} with other budgets; write this preset to another file"
            )
        begin = time.perf_counter()
        rows = SECTIONS[sweep.op](
            length, dtype, sweep.budgets, args.device, sweep.repeats, sweep.memory
        )
        for row in rows:
            _show(row)
        if args.out is not None:
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
                writer.writerows(conditions | row for row in rows)
        seconds = time.perf_counter() - begin
        print(
            f"  section {number} of {len(sections)}, {seconds:.0f} s", file=sys.stderr, flush=True
        )
    return 0


def _sections(preset: str) -> Iterator[tuple[Sweep, str, int]]:
    for sweep in PRESETS[preset]:
        for dtype in sweep.dtypes:
            for length in sweep.lengths:
                yield sweep, dtype, length


def _start(out: Path | None, resume: bool) -> dict[tuple[str, str, str], set[str]]:
    """Write the header, or return the sections, and their budgets, of a file to be completed."""
    done: dict[tuple[str, str, str], set[str]] = {}
    if out is None:
        return done
    if resume and out.exists():
        with out.open(newline="") as file:
            for row in csv.DictReader(file):
                section = (row["op"], row["dtype"], row["length"])
                done.setdefault(section, set()).add(row["block_per_row"])
        return done
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writeheader()
    return done


def _show(row: dict) -> None:
    budget = row["block_per_row"]
    name = row["provider"] if budget is None else f"{row['provider']} {budget}"
    print(
        f"{row['op']:<16}{row['length']:>7}{row['dtype']:>6}{row['pass']:>9}  {name:<18}"
        f"{row['ms_median']:>10.1f}{row['ratio']:>8.2f}x"
        + (f"{row['peak_mb']:>9.0f} MB" if row["peak_mb"] is not None else ""),
        flush=True,
    )


def _conditions(device: str, threads: int) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
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
        "transformers": version("transformers"),
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
