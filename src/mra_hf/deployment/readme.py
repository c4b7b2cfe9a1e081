"""The README of an exported directory: what is in it and how to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mra_hf.deployment.report import ExportReport

_RUN = {
    ".onnx": """```python
import onnxruntime
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
session = onnxruntime.InferenceSession("{file}")
names = [x.name for x in session.get_inputs()]
texts = ["A text.", "Another one."]
inputs = tokenizer(texts, padding=True, return_token_type_ids=True, return_tensors="np")
outputs = session.run(None, {{name: inputs[name]{shaped} for name in names}})
```""",
    ".pt2": """```python
import torch
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
model = torch.export.load("{file}").module()
texts = ["A text.", "Another one."]
inputs = tokenizer(texts, padding=True, return_token_type_ids=True, return_tensors="pt")
outputs = model(*(inputs[name]{shaped} for name in {inputs}))
```""",
}


#: What an input of a head looks like where it is not [batch, tokens].
_NOTES = {
    "MraForMultipleChoice": "The inputs are [batch, choices, tokens]; below, the two texts are the "
    "choices of one question. ",
    "MraForCandidateChoice": "`candidate_spans` is [batch, candidates, 2] int64: the positions of "
    "the tokens that open and close each candidate, -1 for none. ",
}


def write_readme(path: Path, report: ExportReport, file: Path, is_sentence_encoder: bool) -> None:
    """Write how to run `file`, relative to the folder of `path`."""
    shaped = "[None]" if report.model_class == "MraForMultipleChoice" else ""
    run = _RUN[file.suffix].format(file=file.as_posix(), inputs=list(report.inputs), shaped=shaped)
    note = _NOTES.get(report.model_class, "")
    if report.model_class == "MraForCandidateChoice":
        run = ""
    rows = "\n".join(f"| {n} | {error:.1e} |" for n, error, _ in report.rows)
    kept = ""
    weights = file.with_name(f"{file.name}_data")
    if (path.parent / weights).exists():
        kept = f" Keep `{weights.as_posix()}` beside it: the weights are in there."
    sentence = ""
    if is_sentence_encoder and file.suffix == ".onnx":
        sentence = (
            '\n`SentenceTransformer(".", backend="onnx")` finds the graph in `onnx/`. It needs '
            "`import mra_hf` first, and a release of optimum-onnx for transformers 5 (0.1.0 is for "
            "4).\n"
        )
    path.write_text(
        f"# {report.source}, exported\n\n"
        f"`{file.as_posix()}` is {report.model_class} with multi-resolution attention (MRA-2), "
        f"{report.dtype}, {report.megabytes:.0f} MB, in standard operators: it runs without the "
        f"package mra_hf.{kept} Time and memory grow with the budget of exact blocks, not with the "
        "square of the length.\n\n"
        f"Inputs: {', '.join(f'`{name}`' for name in report.inputs)}. Outputs: "
        f"{', '.join(f'`{name}`' for name in report.outputs)}. Any batch, any length from 2 "
        f"tokens on. {note}Pad on the right.\n\n{run}\n{sentence}\n"
        "Compared with the model in torch; the largest difference as a share of its largest "
        f"output:\n\n| tokens | difference |\n|---|---|\n{rows}\n",
        encoding="utf-8",
    )
