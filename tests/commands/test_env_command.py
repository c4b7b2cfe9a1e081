"""`mra-hf env` says what runs here, and why the rest does not."""

from __future__ import annotations

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
