"""The commands and the Python of the guide on deployment run as pasted."""

import re
import shlex
from pathlib import Path

import pytest

from mra_hf.commands import main

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide" / "deploying.md"


@pytest.mark.slow
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    text = GUIDE.read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    commands = re.findall(r"^mra-hf (.*)$", text, re.M)
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)) == 0
    capsys.readouterr()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(block, GUIDE.name, "exec"), {})
    assert capsys.readouterr().out.strip().isalpha()
    assert (tmp_path / "english-int8" / "onnx" / "model.onnx").is_file()
    assert (tmp_path / "english-torch" / "model.pt2").is_file()
