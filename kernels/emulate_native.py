"""Test the CPU kernels of instruction sets that this machine lacks.

    python kernels/emulate_native.py amx tests/kernels -k native
    python kernels/emulate_native.py neon tests/kernels/test_golden.py -k native

What follows the name is for pytest. "amx" is the code of AVX-512 and AMX, in vectors of AVX2 and
tiles in plain C++: what is computed, not the instructions themselves. "neon" is compiled for
64-bit ARM and runs in a program under qemu-aarch64 (Debian's package qemu-user), a call at a time;
it needs zig (`pip install ziglang`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_native import FLAGS, OWN_FLAGS, SOURCES, ZIG, BuildFailed, compile_library, library_name

#: Read by tests/kernels/conftest.py.
LIBRARY, PROGRAM = "MRA_HF_TEST_LIBRARY", "MRA_HF_TEST_PROGRAM"
NEON = [*ZIG, "-target", "aarch64-linux-musl"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("amx", "neon"))
    args, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        build = {"amx": build_amx, "neon": build_neon}[args.name]
        environment = os.environ | build(Path(folder))
        command = [sys.executable, "-m", "pytest", *pytest_arguments]
        return subprocess.run(command, env=environment, check=False).returncode


def compile_emulated(library: Path, *extra_flags: str) -> None:
    """Compile the library with AVX-512 and AMX emulated wherever there is AVX2."""
    emulated = ["-mavx2", "-mfma", "-DMRA_LANES=16"]
    flags = {name: emulated if "-mavx512f" in own else own for name, own in OWN_FLAGS.items()}
    compile_library(library, ["-DMRA_EMULATES", *extra_flags], flags)


def build_amx(folder: Path) -> dict[str, str]:
    """A library that emulates, and the environment that makes tests take it."""
    compile_emulated(folder / library_name())
    return {LIBRARY: str(folder / library_name())}


def build_neon(folder: Path) -> dict[str, str]:
    """A program for ARM, and the environment that makes tests send it their calls."""
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise BuildFailed("there is no qemu-aarch64 here; on Debian: apt-get install qemu-user")
    program = folder / "native_calls"
    own = Path(__file__).parent / "native_calls.cpp"
    sources = [path for path in SOURCES.glob("*.cpp") if path.name not in OWN_FLAGS]
    command = [*NEON, *FLAGS, "-static", "-I", SOURCES, own, *sources, "-o", program, "-lpthread"]
    subprocess.run([str(part) for part in command], check=True)
    return {PROGRAM: f"{qemu} {program}"}


if __name__ == "__main__":
    raise SystemExit(main())
