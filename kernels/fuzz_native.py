"""Thousands of random calls of the compiled CPU kernels under AddressSanitizer and UBSan.

    python kernels/fuzz_native.py --calls 3000

Needs GCC. Builds the library anew, without touching the installed one, with AVX-512 and AMX
emulated (the sanitizers see no load of a tile), and runs every pass on random sizes, strides,
dtypes, masks and selections, with NaN in padding. A write or read outside a
buffer or undefined behaviour ends the run with the report of the sanitizer.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "torch-ext")]

_CHILD = "MRA_HF_SANITIZED_LIBRARY"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
#: `-O1` comes after `-O3`; overflows of signed shifts of vectors are how bits are moved.
SANITIZERS += ["-fno-omit-frame-pointer", "-fno-sanitize=shift"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if _CHILD in os.environ:
        return fuzz(args.calls, args.seed)
    from build_native import library_name
    from emulate_native import compile_emulated

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / library_name()
        os.environ["MRA_HF_CXX"] = "g++"
        compile_emulated(path, *SANITIZERS)
        runtime = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
        # Python and torch keep what they allocate; a test of the suite watches the memory.
        environment = os.environ | {
            _CHILD: str(path),
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def fuzz(calls: int, seed: int) -> int:
    import torch

    from mra_attention import native_impl
    from mra_attention.native_impl import library

    library.find = lambda: Path(os.environ[_CHILD])
    generator = random.Random(seed)
    torch.manual_seed(seed)
    names = library.instruction_sets()
    for number in range(calls):
        torch.set_num_threads(generator.choice([1, 2, 3]))
        with native_impl.instruction_set(generator.choice(names)):
            one_call(native_impl, generator)
        if number + 1 == calls or number % 500 == 499:
            sys.stdout.write(f"{number + 1} calls on {', '.join(names)}: no finding\n")
    return 0


def one_call(native_impl, generator: random.Random) -> None:
    """All three passes on one drawn problem; results of real tokens must be finite."""
    import torch

    from mra_attention.native_impl import library

    batch, heads = generator.randint(1, 3), generator.randint(1, 3)
    length, dim = (
        generator.choice([1, 31, 32, 33, 100, 1050]),
        generator.choice([1, 8, 40, 64, 129]),
    )
    if length > 1000:
        batch, heads, dim = 1, 1, min(dim, 40)
    n_blocks = (length + 31) // 32
    dtype = generator.choice([torch.float32, torch.bfloat16, torch.float16])
    mask = None if generator.random() < 0.3 else torch.rand(batch, length) < generator.random()

    def draw(kind=dtype):
        order = generator.choice([(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)])
        shape = [(batch, heads, length, dim)[i] for i in order]
        x = torch.randn(shape).to(kind).permute([order.index(i) for i in range(4)])
        return x if mask is None else x.masked_fill(~mask[:, None, :, None], float("nan"))

    query, key, value = draw(), draw(), draw()
    bias = generator.choice([None, torch.randn(heads, n_blocks)])
    first, width = generator.choice([0, 0, 1, 2]), generator.choice([8, 16, 32])
    shared = {"summaries": None, "scale": 0.3, "block_size": 32, "distance_bias": bias}
    shared |= {"initial_prior_first_n_blocks": first, "key_block_size": width}
    blocks = native_impl.select(
        query, key, mask, block_per_row=generator.randint(1, n_blocks + 1),
        block_budget=generator.choice([None, None, generator.randint(1, n_blocks**2 + 2)]),
        initial_prior_diagonal_n_blocks=generator.choice([0, 0, 1, 3]),
        rule=generator.choice(list(library.RULES)), **shared,
    )  # fmt: skip
    if generator.random() < 0.2:
        drawn = torch.rand(batch, heads, n_blocks, n_blocks * 32 // width) < 0.5
        blocks = generator.choice([None, drawn])
    shared |= {"sparse": generator.random() < 0.5, "largest_budget": None}
    output, lse = native_impl.forward(query, key, value, mask, blocks, **shared)
    grads = native_impl.backward(
        draw(torch.float32), query, key, value, output, lse, mask, blocks, **shared
    )
    for x in (output, *grads):
        assert x is None or x.isfinite().all()


if __name__ == "__main__":
    raise SystemExit(main())
