"""The embedded default: a small English RoBERTa, its continuation to 4096 tokens, long texts.

Both checkpoints were trained by this package on public-domain text
(`docs/experiments/english/README.md`); the texts are from a novel that neither has seen. Weights
are stored in half precision and load in float32.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

if TYPE_CHECKING:
    import os

_ASSETS = Path(__file__).parent / "assets"

#: Positions -> folder: RoBERTa with dense attention, and MRA-2 after continued training.
_CHECKPOINTS = {512: _ASSETS / "english", 4096: _ASSETS / "english-4096"}

#: What `english_checkpoint` accepts.
LENGTHS = tuple(_CHECKPOINTS)


def english_checkpoint(length: int = 512) -> Path:
    """Return the folder of the embedded checkpoint with `length` positions.

    512 is a `RobertaForMaskedLM` with dense attention, a source to convert; 4096 is the same model
    converted to MRA-2 with a distance bias and trained further on long documents.

    Raises:
        ValueError: another length.
    """
    if length not in LENGTHS:
        raise ValueError(f"length must be one of {LENGTHS}, got {length!r}.")
    return _CHECKPOINTS[length]


def english_sample() -> str:
    """Return the first 4000 tokens of Jane Austen's "Persuasion" (1817), held out of training."""
    return (_ASSETS / "sample.txt").read_text(encoding="utf-8")


def english_passage() -> str:
    """Return the first 32,000 tokens of "Persuasion", long enough to compare models on."""
    return (_ASSETS / "passage.txt").read_text(encoding="utf-8")


def write_half(source: "str | os.PathLike[str]", output: "str | os.PathLike[str]") -> None:
    """Save a masked language model and its tokenizer with weights in float16, to embed it.

    The configuration keeps float32, so that `from_pretrained` loads float32.

    Raises:
        ValueError: a weight is too large for float16.
    """
    model = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32)
    largest = max(float(weight.abs().max()) for weight in model.state_dict().values())
    if largest > torch.finfo(torch.float16).max:
        raise ValueError(f"a weight of source is {largest:.0f}, too large for float16.")
    model.half().save_pretrained(output)
    config = model.config
    config.dtype = torch.float32
    config.save_pretrained(output)
    AutoTokenizer.from_pretrained(source).save_pretrained(output)
