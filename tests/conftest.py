"""Settings for every test and the processes it starts: no hub, quiet loading, one thread.

Tensors are tiny: a second thread gains nothing, and loses much time where cores are shared.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from transformers.utils import logging

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def real_pictures():
    """Asked for by tests that look at a picture, where others have `empty_pictures`."""


@pytest.fixture
def empty_pictures(request, monkeypatch):
    """Write pictures as empty files: to draw a curve takes longer than a run of a few steps."""
    if "real_pictures" not in request.fixturenames:

        def write(figure, path, **_):
            Path(path).write_bytes(b"")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", write)


@pytest.fixture
def refused(capsys):
    """Run a command that is refused, in a sentence and with status 2; return what it says."""

    def run(*arguments):
        from mra_hf.commands import main

        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run
