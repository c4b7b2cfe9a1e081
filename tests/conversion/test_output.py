"""The output directory is written whole or not at all."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conversion_cases import convert, make_source
from safetensors.torch import load_file

from mra_hf import MraConfig
from mra_hf.conversion.files import staged_directory


def test_output_is_refused_or_replaced(tmp_path):
    make_source(tmp_path / "source")
    out = tmp_path / "deep" / "er" / "out"
    out.mkdir(parents=True)
    convert(tmp_path / "source", out)  # empty is free
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="force"):
        convert(tmp_path / "source", out, max_length=50)
    with pytest.raises(ValueError, match="block_per_row"):
        convert(tmp_path / "source", out, block_per_row=0, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    convert(tmp_path / "source", out, max_length=50, force=True)
    assert not (out / "mine.txt").exists()
    assert MraConfig.from_pretrained(out).max_tokens == 50
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_output_in_around_or_at_the_source_is_refused(force, tmp_path, monkeypatch):
    source = tmp_path / "a" / "source"
    make_source(source)
    for output in (source, source / "inside", tmp_path / "a", source / ".." / "source"):
        with pytest.raises(ValueError, match="OUT"):
            convert(source, output, force=force)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="OUT must be a directory"):
        convert(source, tmp_path / "file", force=force)
    with pytest.raises((ValueError, OSError), match=r"OUT.*a file"):
        convert(source, tmp_path / "file" / "out", force=force)
    assert (tmp_path / "file").read_text() == "x"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "now").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "now")
    with pytest.raises(ValueError, match="OUT"):
        convert(source, tmp_path / "here", force=force)
    assert load_file(source / "model.safetensors")


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing(error, tmp_path, monkeypatch):
    make_source(tmp_path / "source")

    def fail(*args):
        assert (tmp_path / f".out.partial-{os.getpid()}").is_dir()
        raise error

    monkeypatch.setattr("mra_hf.conversion.convert._write_report", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    kind = type(out)
    real = kind.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(kind, "rename", rename)
    with pytest.raises(OSError, match="no"), staged_directory(out, force=True) as folder:
        (folder / "new").write_text("new")
    monkeypatch.undo()
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_works_in_another_thread_and_once_at_a_time(tmp_path):
    make_source(tmp_path / "source")
    with ThreadPoolExecutor() as threads:
        threads.submit(convert, tmp_path / "source", tmp_path / "out").result()
        assert (tmp_path / "out" / "config.json").is_file()
        with staged_directory(tmp_path / "other"):
            second = threads.submit(convert, tmp_path / "source", tmp_path / "other")
            with pytest.raises(ValueError, match="another thread"):
                second.result()


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent = os.getppid()
    for name in (f".out.partial-{dead.pid}", f".out.partial-{parent}", ".other.partial-1"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out.replaced-{dead.pid}").mkdir()
    (tmp_path / f".out.replaced-{dead.pid}" / "old").write_text("old")
    with pytest.raises(ValueError, match="force"), staged_directory(tmp_path / "out"):
        pass  # killed between the two renames: the old directory is back and not empty
    assert (tmp_path / "out" / "old").read_text() == "old"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([f".out.partial-{parent}", ".other.partial-1", "out"])


SLOW = """
    import sys, time
    from mra_hf.conversion import convert

    def wait(report, folder):
        assert (folder / "model.safetensors").is_file()
        print("waiting", flush=True)
        time.sleep(60)

    convert._write_report = wait
    convert.convert_checkpoint(sys.argv[1], sys.argv[2], max_length=64, force=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_output(number, tmp_path):
    make_source(tmp_path / "source")
    out = tmp_path / "out"
    if number == signal.SIGTERM:
        out.mkdir()
        (out / "old").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "source"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waiting\n"
        partial = tmp_path / f".out.partial-{process.pid}"
        assert partial.is_dir()
        started = time.monotonic()
        process.send_signal(number)
        code = process.wait(timeout=30)
    assert time.monotonic() - started < 20
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert not partial.exists() and (out / "old").read_text() == "old"
    else:
        assert partial.is_dir() and not out.exists()
    convert(tmp_path / "source", out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
