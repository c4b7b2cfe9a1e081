"""Time `mra2_attention` against dense attention and its peers; write one CSV row per measurement.

    python benchmarks/run.py --device cpu --preset quick --out results.csv

A section (what is timed, dtype, length) is written when it is complete; `--resume` skips the
sections that the file already has with the same budgets. `plot.py` draws the CSV.

Four commands are for a GPU. They write into a folder, row by row, stop at the time limit, and go on
from there when called again:

    python benchmarks/run.py --device cuda check --time-limit 540 --out results/gpu
    python benchmarks/run.py --device cuda bench --time-limit 540 --out results/gpu
    python benchmarks/run.py --device cuda profile --time-limit 540 --out results/gpu
    python benchmarks/run.py --device cuda tune --time-limit 540 --out results/gpu

`--device cpu --dry-run` runs the same code at tiny shapes in Triton's interpreter.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.cuda import driver
from benchmarks.records import COLUMNS, KEYS, Records, conditions


@dataclass(frozen=True)
class Sweep:
    """Which sections a preset measures.

    Args:
        op: a key of `cases.SECTIONS`.
        lengths, dtypes: a section each; see `cases.Case`.
        budgets, repeats, memory: of every section; see `cases.Case`.
    """

    op: str
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    budgets: tuple[int, ...] = (4, 8, 16)
    repeats: int = 5
    memory: bool = False


_OPS = (
    *("attention", "implementations", "self_attention", "model"),
    *("candidate_choice", "mixed_lengths", "scales", "adamra"),
)
_SHORT = (512, 1024, 2048)
PRESETS = {
    "smoke": tuple(Sweep(op, (64,), ("fp32",), (1,), 1) for op in _OPS),
    # In bfloat16, which some CPUs multiply ten times slower than float32, shorter texts.
    "quick": (
        Sweep("attention", (512, 1024, 2048, 4096), ("fp32",), (8,)),
        Sweep("attention", (512, 1024), ("bf16",), (8,)),
    ),
    "pairs": (
        Sweep("attention", (512,), budgets=(4,), repeats=21),
        Sweep("attention", (4096,), budgets=(8,), repeats=15),
        Sweep("attention", (8192,), budgets=(8,), repeats=7),
        Sweep("attention", (16384,), budgets=(8,)),
    ),
    "full": (
        Sweep("attention", _SHORT),
        Sweep("attention", (4096, 8192), memory=True),
        Sweep("attention", (16384,), repeats=3, memory=True),
        Sweep("self_attention", _SHORT, ("fp32",), (8,), 5),
        Sweep("self_attention", (4096, 8192, 16384), ("fp32",), (8,), 1),
    ),
    "implementations": (
        Sweep("implementations", (512, 1024, 2048, 4096), ("fp32",), (8,), 7),
        Sweep("implementations", (512, 1024, 4096), ("bf16",), (8,), 3),
        Sweep("implementations", (16384,), ("fp32",), (8,), 1),
    ),
    "models": (
        Sweep("model", _SHORT, ("fp32",), (8,), 3),
        Sweep("model", (4096, 8192), ("fp32",), (8,), 1),
    ),
    "models_bf16": (Sweep("model", (512, 1024, 2048, 4096, 8192), ("bf16",), (8,), 1),),
    "wikihop": (Sweep("candidate_choice", (1024, 4096), ("fp32",), (8,), 5),),
    "scales": (
        Sweep("scales", (4096, 8192, 16384, 32768), ("fp32",), (4,), 3),
        Sweep("scales", (65536, 131072), ("fp32",), (4,), 3),
    ),
    "adamra": (
        Sweep("adamra", (1024, 2048, 4096, 8192, 16384), ("fp32",), (8,), 5),
        Sweep("adamra", (32768, 65536), ("fp32",), (8,), 1),
    ),
    "lengths": (Sweep("mixed_lengths", (4096,), ("fp32",), (8,), 3),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a preset, or run one of the commands for a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: a minute; "
        "pairs: dense attention and one budget in many rounds, ten minutes; "
        "full: half an hour; "
        "implementations: every fast implementation that runs here, five minutes; "
        "models: whole RoBERTa-base models, ten minutes; "
        "models_bf16: the same in bfloat16; on CPUs without instructions for it, "
        "twenty minutes, and training steps at 512 tokens only; "
        "wikihop: training steps of a model that chooses among candidates, three minutes; "
        "lengths: training on texts of 50 to 4096 tokens, two minutes; "
        "scales: two and three scales up to 131072 tokens, four minutes; "
        "adamra: attention layers of the Long Range Arena up to 65536 tokens, three minutes",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        help="CSV to write (default: benchmark_DEVICE_PRESET.csv here); the folder of a command",
    )
    parser.add_argument("--resume", action="store_true", help="keep the sections OUT already has")
    driver.add_arguments(parser)
    args = parser.parse_args(arguments)
    if args.command is not None or args.tune:
        driver.check_arguments(parser, args)
    elif args.dry_run:
        parser.error(f"--dry-run is for the commands of a GPU: {', '.join(driver.COMMANDS)}")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda, but torch sees no CUDA or ROCm device here")
    if args.command is not None:
        return driver.run(args)
    if args.out is None:
        args.out = Path(f"benchmark_{args.device}_{args.preset}.csv")
    return _measure(parser, args)


def _measure(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import torch

    from benchmarks.cases import SECTIONS, Case

    torch.set_num_threads(args.threads)
    where = conditions(args.device, args.threads)
    if not args.resume:
        args.out.unlink(missing_ok=True)
    records = Records(args.out, COLUMNS, KEYS)
    budgets_done: dict[tuple[str, str, str], set[str]] = {}
    for row in records.rows():
        section = (row["op"], row["dtype"], row["length"])
        budgets_done.setdefault(section, set()).add(row["block_per_row"])
    print(f"{where['device']}, torch {torch.__version__}, batch 1, heads of 64, median ms")
    names = f"{'op':<16}{'length':>7}{'dtype':>6}{'pass':>9}  {'provider':<18}"
    print(f"{names}{'ms':>10}{'vs SDPA':>9}")
    sections = [
        (sweep, dtype, length)
        for sweep in PRESETS[args.preset]
        for dtype in sweep.dtypes
        for length in sweep.lengths
    ]
    for number, (sweep, dtype, length) in enumerate(sections, 1):
        section = (sweep.op, dtype, str(length))
        if {str(budget) for budget in sweep.budgets} <= budgets_done.get(section, set()):
            continue
        if section in budgets_done:
            parser.error(
                f"{args.out} has {section} with other budgets; write this preset to another file"
            )
        begin = time.perf_counter()
        case = Case(length, dtype, sweep.budgets, args.device, sweep.repeats, sweep.memory)
        for row in SECTIONS[sweep.op](case):
            _show(row)
            records.add(where | row)
        seconds = time.perf_counter() - begin
        progress = f"  section {number} of {len(sections)}, {seconds:.0f} s"
        print(progress, file=sys.stderr, flush=True)
    print(f"written to {args.out}")
    return 0


def _show(row: dict) -> None:
    budget = row["block_per_row"]
    name = row["provider"] if budget is None else f"{row['provider']} {budget}"
    print(
        f"{row['op']:<16}{row['length']:>7}{row['dtype']:>6}{row['pass']:>9}  {name:<18}"
        f"{row['ms_median']:>10.1f}{row['ratio']:>8.2f}x"
        + (f"{row['peak_mb']:>9.0f} MB" if row["peak_mb"] is not None else "")
        + (f"{row['tokens_per_second']:>9.0f} tokens/s" if "tokens_per_second" in row else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
