"""The roofline of each launch of the Triton kernels: bytes and FLOP over the GPU's ceilings.

    python benchmarks/cuda/roofline.py --length 4096 --batch 1

prints the table of kernels/README.md. The least time of a launch is the largest of three: what it
must move through device memory, what it must move through the L2 cache, and what it must multiply,
each divided by its ceiling. Gathered blocks come out of L2; everything else is counted once, as
device memory. A launch can be faster where the launch before left its inputs in L2. Merges depend
on the selection and are counted as nothing.

With `--key-block-size` below 32, the queries that the gradients of keys gather depend on the
selection too: `--spread` says how many times as many there are as for whole squares.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Tokens in a block.
_M = 32
#: Bytes of a 32-bit number: summaries, log-sum-exps, scores, list entries.
_WORD = 4
#: As in `launch_configs.json`, which this script does not read: it runs without Triton.
RECOMPUTE_FROM_LENGTH = 32768


@dataclass(frozen=True)
class Work:
    """The work of all launches of one kernel in a pass.

    Args:
        launches: how many there are.
        memory: bytes of device memory.
        gather: bytes gathered out of the L2 cache.
        exact: FLOP of products of tokens.
        coarse: FLOP of products of float32 summaries.
    """

    launches: int = 1
    memory: float = 0
    gather: float = 0
    exact: float = 0
    coarse: float = 0


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second, FLOP per second. The defaults are assumptions about one H100.

    Args:
        copy: device memory.
        gather: random blocks of 4 KB out of L2.
        bf16: products on tensor cores.
        fp32: IEEE products.
    """

    copy: float = 3.0e12
    gather: float = 5.5e12
    bf16: float = 800e12
    fp32: float = 60e12

    @classmethod
    def measured(cls, path: Path) -> "Ceilings":
        """The best rows of a `ceilings.csv`; what it does not hold stays assumed."""
        rates: dict[str, float] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                kind, *words = row["name"].split()
                name = words[0] if kind == "matmul" else kind
                rate = float(row["rate"]) * {"GB/s": 1e9, "TFLOP/s": 1e12}[row["unit"]]
                rates[name] = max(rate, rates.get(name, 0))
        return cls(**rates)

    def least_microseconds(self, work: Work, precision: str = "tf32x3") -> tuple[float, str]:
        """The roofline of some work: its least time, and the ceiling that bounds it ("" for none).

        `precision` is how coarse products are computed: "ieee", or "tf32x3", which is three
        products at half the rate of bf16.
        """
        times = {
            "memory": work.memory / self.copy,
            "L2": work.gather / self.gather,
            "tensor cores": work.exact / self.bf16,
            precision: work.coarse / (self.fp32 if precision == "ieee" else self.bf16 / 6),
        }
        bound = max(times, key=times.get)
        return 1e6 * times[bound], bound if times[bound] else ""


@dataclass(frozen=True)
class Problem:
    """Shape and budget of a call of MRA-2 without a mask. Summaries are computed once, by the pass
    "summaries", for all other passes.

    Args:
        operand_bytes: 2 or 4.
        is_stored: whether coarse scores are kept between the launches of a selection.
        key_block_size: keys per key block.
        spread: entries of the lists of key gradients per selected square: 1 where query blocks
            select squares whole, up to 32 / key_block_size where each selects parts of its own.
    """

    length: int
    batch: int
    heads: int
    head_dim: int
    block_per_row: int
    operand_bytes: int = 2
    is_stored: bool = True
    key_block_size: int = _M
    spread: float = 1.0

    def works(self) -> dict[str, dict[str, Work]]:
        """Pass -> kernel -> its work, both in order of launch."""
        all_heads, rows = self.batch * self.heads, -(-self.length // _M)
        per_block = _M // self.key_block_size
        pairs = all_heads * rows**2 * per_block
        selected = all_heads * rows * min(self.block_per_row, rows)  # squares
        # Bytes: a tensor like the query; a float32 per token; a float32 vector per block, and per
        # key block; the blocks of two tensors, one of each per selected square.
        tokens = all_heads * self.length * self.head_dim * self.operand_bytes
        numbers = all_heads * self.length * _WORD
        summaries = all_heads * rows * self.head_dim * _WORD
        of_keys = per_block * summaries
        gathered = selected * 2 * _M * self.head_dim * self.operand_bytes
        # FLOP: a product of all summaries; a product of the tokens of all selected squares.
        coarse = 2 * pairs * self.head_dim
        exact = 2 * selected * _M * _M * self.head_dim
        # Selection: 11 bits each of prior, score and tie rank; but the launches after the third
        # return at once, unless scores tie exactly.
        digits = -(-(1 + 32 + (2 * rows**2 * per_block - 1).bit_length()) // 11)
        scores, again = (pairs * _WORD, 0) if self.is_stored else (summaries + of_keys, coarse)

        def lists(directions: int) -> dict[str, Work]:
            entries = selected * _WORD * (per_block if directions == 1 else per_block + self.spread)
            return {
                "count_kernel": Work(memory=pairs),
                "plan_kernel": Work(),
                "fill_kernel": Work(memory=pairs + entries),
            }

        select = {
            "flag_kernel": Work(),
            "score_kernel": Work(
                memory=summaries + of_keys + pairs * _WORD * self.is_stored,
                coarse=coarse * (1 + self.is_stored),
            ),
            "digit_kernel": Work(digits, 3 * scores, coarse=3 * again),
            "mark_kernel": Work(memory=scores + pairs, coarse=again),
        }
        forward = {
            **lists(1),
            "coarse_kernel": Work(memory=2 * summaries + 2 * of_keys + pairs, coarse=2 * coarse),
            "exact_kernel": Work(
                memory=2 * tokens + numbers + summaries, gather=gathered, exact=2 * exact
            ),
            "merge_kernel": Work(),
        }
        backward = {
            **lists(2),
            "reduce_rows_kernel": Work(memory=2 * tokens + 2 * numbers + summaries),
            "coarse_query_kernel": Work(
                memory=3 * summaries + 2 * of_keys + pairs, coarse=3 * coarse
            ),
            "coarse_key_kernel": Work(
                memory=2 * summaries + 4 * of_keys + pairs, coarse=4 * coarse
            ),
            "exact_query_kernel": Work(
                memory=3 * tokens + 2 * numbers + summaries, gather=gathered, exact=3 * exact
            ),
            "exact_key_kernel": Work(
                memory=4 * tokens + 2 * of_keys,
                gather=self.spread * (gathered + selected * 2 * _M * _WORD),
                exact=self.spread * 4 * exact,
            ),
            "merge_gradient_kernel": Work(3),
        }
        return {
            "summaries": {"pool_kernel": Work(memory=3 * tokens + summaries + 2 * of_keys)},
            "select": select,
            "forward": forward,
            "backward": backward,
        }


#: What a launch of each kernel computes.
_WHAT = {
    "pool_kernel": "means and sums of blocks, for all passes",
    "flag_kernel": "live blocks, budget of each sample",
    "score_kernel": "coarse logits minus the largest of their row",
    "digit_kernel": "the key of the last selected pair, by 11 bits",
    "mark_kernel": "the selected pairs",
    "count_kernel": "lengths of the lists",
    "plan_kernel": "starts of the lists, work items",
    "fill_kernel": "lists of blocks",
    "coarse_kernel": "softmax state over unselected pairs",
    "exact_kernel": "output",
    "merge_kernel": "output of blocks with several items",
    "reduce_rows_kernel": "delta, and its sums over blocks",
    "coarse_query_kernel": "coarse gradients of queries, R rows",
    "coarse_key_kernel": "coarse gradients of keys and values",
    "exact_query_kernel": "gradients of queries",
    "exact_key_kernel": "gradients of keys and values",
    "merge_gradient_kernel": "gradients of blocks with several items",
}

KERNELS = tuple(_WHAT)


def print_rooflines(problem: Problem, ceilings: Ceilings, precision: str) -> None:
    """Print the works of a problem and their rooflines as a table in Markdown."""
    columns = ("pass", "launch", "what", "MB of memory", "MB gathered", "GFLOP")
    print(f"| {' | '.join(columns)} | roofline, us | bound by |")
    print("|---|---|---|---|---|---|---|---|")
    totals = {}
    for name, works in problem.works().items():
        totals[name] = 0.0
        label = name
        for kernel, work in works.items():
            least, bound = ceilings.least_microseconds(work, precision)
            totals[name] += least
            flop = work.exact + work.coarse
            numbers = (work.memory / 1e6, work.gather / 1e6, flop / 1e9, least)
            cells = " | ".join(f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in numbers)
            times = f"{work.launches} x " if work.launches > 1 else ""
            launch = f"{times}`{kernel.removesuffix('_kernel')}`"
            print(f"| {label} | {launch} | {_WHAT[kernel]} | {cells} | {bound} |")
            label = ""
    both = sum(totals.values())
    forward = both - totals["backward"]
    print(f"\nSum of the rooflines: {forward:.0f} us forward, {both:.0f} with the backward pass.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rooflines of one shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-per-row", type=int, default=8)
    parser.add_argument("--key-block-size", type=int, choices=(8, 16, 32), default=32)
    parser.add_argument(
        "--spread",
        type=float,
        help="entries of the lists of key gradients per selected square; the default is its bound, "
        "32 / KEY_BLOCK_SIZE",
    )
    parser.add_argument("--coarse-precision", choices=("tf32x3", "ieee"), default="tf32x3")
    parser.add_argument("--ceilings", type=Path, help="a ceilings.csv that `run.py bench` wrote")
    args = parser.parse_args(arguments)
    ceilings = Ceilings.measured(args.ceilings) if args.ceilings else Ceilings()
    shape = (args.length, args.batch, args.heads, args.head_dim, args.block_per_row)
    problem = Problem(
        *shape,
        is_stored=args.length < RECOMPUTE_FROM_LENGTH,
        key_block_size=args.key_block_size,
        spread=_M / args.key_block_size if args.spread is None else args.spread,
    )
    print_rooflines(problem, ceilings, args.coarse_precision)


if __name__ == "__main__":
    main()
