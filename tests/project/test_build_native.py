"""The build of the CPU kernels: which compiler, what it makes, what happens where none works."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch):
    monkeypatch.delenv("MRA_HF_CXX", raising=False)
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "kernels/build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on the path to build with")
def test_a_compiler_of_the_system_makes_the_library(build, tmp_path):
    build.compile_library(tmp_path / build.library_name())
    library = ctypes.CDLL(str(tmp_path / build.library_name()))
    library.mra_isa_name.restype = ctypes.c_char_p
    assert library.mra_isa_name(0) is not None
    assert [path.name for path in tmp_path.iterdir()] == [build.library_name()]


def test_without_a_compiler_pip_is_asked_for_one(build, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert build.find_compiler() is None
    with pytest.raises(build.BuildFailed, match=r"no C\+\+ compiler was found"):
        build.compile_library(Path("nowhere.so"))
    hook = SimpleNamespace(target_name="wheel")
    assert build.CustomBuildHook.dependencies(hook) == ["ziglang>=0.13"]
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert build.CustomBuildHook.dependencies(hook) == []  # zig would not help
    hook.target_name = "sdist"
    assert build.CustomBuildHook.dependencies(hook) == []


def test_a_compiler_that_is_too_old_is_passed_over(build, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: name)
    monkeypatch.setattr(build, "_works", lambda name: name == "clang++")
    assert build.find_compiler() == ["clang++"]


def test_a_compiler_that_is_no_command_is_refused_in_words(build, monkeypatch):
    monkeypatch.setenv("MRA_HF_CXX", '"x')
    with pytest.raises(build.BuildFailed, match="is not a command"):
        build.find_compiler()
    assert build.CustomBuildHook.dependencies(SimpleNamespace(target_name="wheel")) == []


def test_an_error_of_the_compiler_leaves_a_pure_wheel_and_says_so(build, monkeypatch, tmp_path):
    monkeypatch.setenv("MRA_HF_CXX", "false")
    said, data = [], {"force_include": {}, "pure_python": True}
    app = SimpleNamespace(display_warning=said.append)
    build.CustomBuildHook.initialize(
        SimpleNamespace(target_name="wheel", app=app), "standard", data
    )
    assert data == {"force_include": {}, "pure_python": True}
    assert len(said) == 1 and "were not compiled" in said[0] and "mra-hf env" in said[0]


def test_another_machine_gets_a_pure_wheel(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(build.BuildFailed, match=r"no kernels for .* on riscv64"):
        build.compile_library(tmp_path / "x.so")
