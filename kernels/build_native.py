"""Compile the CPU kernels when the package is built: a hook of hatchling, and a command.

    python kernels/build_native.py        # into the package folder, as `pip install -e .` does

The compiler is `$MRA_HF_CXX` if that is set, else the first of c++, g++ and clang++ on the path,
else zig from the package `ziglang`, which pip then installs for the build. `MRA_HF_CXX=zig` makes a
library for any Linux with glibc 2.17 or newer. Where nothing compiles, the package is installed
without the library and runs on plain torch; `pip -v` and `mra-hf env` say so.
"""

import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a command
    BuildHookInterface = object

PACKAGE = Path(__file__).parent / "torch-ext" / "mra_attention" / "native_impl"
SOURCES = PACKAGE / "csrc"
INSTALLED = "mra_attention/native_impl"
ZIG = [sys.executable, "-m", "ziglang", "c++"]

FLAGS = [
    *("-O3", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
#: Flags of single files: each instruction set is compiled from the same source.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_AVX512 += ["-mprefer-vector-width=512"]
OWN_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": _AVX512,
    "isa_amx.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
#: Machines whose kernels are written; elsewhere the package is pure Python.
MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


class BuildFailed(Exception):
    """What did not work, in words."""


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler that can compile `csrc/`, None if there is none."""
    chosen = os.environ.get("MRA_HF_CXX")
    if chosen == "zig":
        return _zig()
    if chosen:
        try:
            return shlex.split(chosen)
        except ValueError as error:
            raise BuildFailed(f"MRA_HF_CXX={chosen!r} is not a command: {error}") from error
    found = (name for name in ("c++", "g++", "clang++") if shutil.which(name) and _works(name))
    return [name] if (name := next(found, None)) else _zig()


def _has_kernels() -> bool:
    """Whether there are kernels for this machine and system."""
    return platform.machine() in MACHINES and platform.system() in ("Linux", "Darwin")


@functools.cache
def _works(compiler: str) -> bool:
    """Whether it compiles the smallest of our sources that an old compiler may refuse."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = SOURCES / "isa_base.cpp", Path(folder) / "object.o"
        try:
            _run([compiler, *FLAGS, "-c", str(source), "-o", str(target)])
        except BuildFailed:
            return False
        return True


def _zig() -> list[str] | None:
    if find_spec("ziglang") is None:
        return None
    machine = MACHINES.get(platform.machine())
    if platform.system() == "Linux" and machine:
        return [*ZIG, "-target", f"{machine}-linux-gnu.2.17"]
    return ZIG


def library_name() -> str:
    return "libmra_attention.dylib" if platform.system() == "Darwin" else "libmra_attention.so"


def compile_library(
    output: Path,
    extra_flags: Sequence[str] = (),
    own_flags: Mapping[str, Sequence[str]] = MappingProxyType(OWN_FLAGS),
) -> None:
    """Compile `csrc/` into the shared library `output`; `own_flags`: of single files.

    Raises:
        BuildFailed: there is no compiler, no kernel for this machine, or an error of the compiler.
    """
    if not _has_kernels():
        raise BuildFailed(f"no kernels for {platform.system()} on {platform.machine()}")
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed("no C++ compiler was found (c++, g++, clang++, or the package ziglang)")
    flags = [*FLAGS, *extra_flags]
    is_x86 = MACHINES[platform.machine()] == "x86_64"
    sources = [
        path for path in sorted(SOURCES.glob("*.cpp")) if is_x86 or path.name not in OWN_FLAGS
    ]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> Path:
            object_file = Path(folder) / f"{source.stem}.o"
            own = own_flags.get(source.name, [])
            _run([*compiler, *flags, *own, "-c", str(source), "-o", str(object_file)])
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(path) for path in pool.map(compile_one, sources)]
        library = Path(folder) / library_name()
        bare = [] if extra_flags else ["-nostdlib++"] if "ziglang" in compiler else []
        _run(
            [*compiler, *flags, *bare, "-shared", *objects, "-o", str(library), "-lpthread", "-lm"]
        )
        partial = output.with_suffix(".partial")
        try:
            shutil.copyfile(library, partial)
            partial.replace(output)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise BuildFailed(f"{output} cannot be written: {error}") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildFailed(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildFailed(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")


def wheel_platform() -> str:
    """The platform tag of a wheel with the library that `find_compiler` makes."""
    from packaging.tags import platform_tags

    compiler = find_compiler() or []
    if "-target" in compiler:
        return f"manylinux_2_17_{MACHINES[platform.machine()]}"
    tags = list(platform_tags())
    # What the compiler of this system links against is known to be here only.
    return next((tag for tag in tags if tag.startswith("linux")), tags[0])


class CustomBuildHook(BuildHookInterface):
    """Adds the library to a wheel; for an editable install, to the package folder."""

    def dependencies(self) -> list[str]:
        if self.target_name != "wheel" or not _has_kernels():
            return []
        try:
            return [] if find_compiler() else ["ziglang>=0.13"]
        except BuildFailed:  # said by `initialize`
            return []

    def initialize(self, version: str, build_data: dict) -> None:
        if self.target_name != "wheel":
            return
        is_editable = version == "editable"
        self._folder = None if is_editable else tempfile.mkdtemp()
        folder = Path(self._folder or PACKAGE)
        library = folder / library_name()
        try:
            compile_library(library)
        except BuildFailed as problem:
            self.app.display_warning(
                f"The CPU kernels were not compiled: {problem}\n"
                "mra_hf is installed without them and runs on plain torch; see `mra-hf env`."
            )
            return
        if not is_editable:
            build_data["force_include"][str(library)] = f"{INSTALLED}/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{wheel_platform()}"

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if getattr(self, "_folder", None):
            shutil.rmtree(self._folder, ignore_errors=True)


if __name__ == "__main__":
    target = PACKAGE / library_name()
    compile_library(target)
    sys.stdout.write(f"compiled {target}\n")
