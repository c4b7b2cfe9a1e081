"""`mra-hf env` says what runs here, and why the rest does not."""

from __future__ import annotations

import subprocess
import sys

import torch

from mra_attention import implementations
from mra_attention.native_impl import library
from mra_hf.commands import main
from mra_hf.commands.env import environment


def test_it_prints_versions_and_implementations(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name in implementations.FAST:
        assert f'impl="{name}"' in out
    if implementations.native_problem() is None:
        assert library.instruction_sets()[0] in environment()['impl="native"']


def test_a_library_that_was_not_built_is_said(monkeypatch):
    def missing():
        raise ImportError("the compiled CPU kernels were not built")

    monkeypatch.setattr(library, "load", missing)
    assert "not available: " in environment()['impl="native"']
    assert "were not built" in environment()['impl="native"']


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
import mra_hf
from mra_attention import mra2_attention
from mra_hf.commands import main
model = mra_hf.MraModel(mra_hf.MraConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
))
assert model(torch.ones(1, 40, dtype=torch.long))[0].isfinite().all()
query = torch.ones(1, 2, 40, 16)
try:
    mra2_attention(query, query, query, impl="triton")
except ValueError as error:
    print(error)
main(["env"])
"""


def test_everything_but_its_kernels_works_without_triton():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    refusal, *environment = result.stdout.splitlines()
    assert refusal.startswith('impl="triton" needs triton, which is not installed: pip install')
    (line,) = [line for line in environment if line.startswith("triton ")]
    assert "not installed" in line and "pip install" in line
