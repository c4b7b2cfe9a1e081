"""What a conversion did: `ConversionReport`, its printable summary and the model card."""

import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mra_hf.configuration import of_layers

ACTIONS = ("copied", "renamed", "tiled", "new", "dropped")
#: Ending of a model class -> task name of the hub; multiple choice has none.
PIPELINE_TAGS = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": None,
}
_LINES_PER_ACTION = 12


class TensorRecord(NamedTuple):
    """One tensor: its name in the result (in the source when dropped), where it came from."""

    name: str
    action: str
    source: str | None
    shape: tuple[int, ...]
    note: str = ""


class ScoreRow(NamedTuple):
    """Masked-token scores of one model at one chunk length; loss in nats."""

    model: str
    attention: str
    length: int
    accuracy: float
    nll: float
    n_masked: int
    n_chunks: int
    n_tokens: int


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` read, wrote and measured.

    Args:
        source, output: as given by the caller.
        hub_id: the source's name on the hub, None for a local directory.
        source_type: its `model_type`.
        model_class: class of the result.
        source_length, max_length: longest sequence of source and result, in tokens.
        dtype: of the result's weights, such as "float32".
        settings: the attention settings of the result.
        density: share of the block pairs that is exact at `max_length` tokens.
        blocks_per_head: their number there.
        tensors: every tensor of the result and every tensor dropped from the source.
        notes: what else the reader should know, as sentences.
        scores: masked-token scores, empty unless a text was given.
    """

    source: str
    output: str
    hub_id: str | None
    source_type: str
    model_class: str
    source_length: int
    max_length: int
    dtype: str
    settings: dict[str, Any]
    density: float
    blocks_per_head: int
    tensors: tuple[TensorRecord, ...]
    notes: tuple[str, ...] = ()
    scores: tuple[ScoreRow, ...] = ()

    @property
    def source_name(self) -> str:
        """The hub id, or the last part of the local path."""
        return self.hub_id or Path(os.path.abspath(os.path.expanduser(self.source))).name

    @property
    def output_name(self) -> str:
        """The last part of the output path."""
        return Path(os.path.abspath(os.path.expanduser(self.output))).name

    @property
    def dense_length(self) -> int:
        """Up to how many tokens every block pair is exact; 0 where the scales end above 1."""
        scales = self.settings["resolutions"]
        if scales is not None:
            budgets = self.settings["block_budgets"] or ()
            sides = [math.isqrt(m) * size for m, size in zip(budgets, scales, strict=False)]
            side = min(sides, default=self.max_length) if scales[-1] == 1 else 0
            return min(side - side % scales[0], self.max_length)
        budget, size = self.settings["block_budget"], self.settings["block_size"]
        rows = math.isqrt(budget or 0) or min(of_layers(self.settings["block_per_row"]))
        return min(size * rows, self.max_length)

    @property
    def auto_class(self) -> str:
        """The Auto class that opens the result."""
        return "AutoModel" + self._ending.removeprefix("Model")

    @property
    def _ending(self) -> str:
        return self.model_class.removeprefix("Mra")

    def counts(self) -> dict[str, int]:
        """Number of tensors by action, in the order of `ACTIONS`."""
        counted = Counter(record.action for record in self.tensors)
        return {action: counted[action] for action in ACTIONS}

    def to_dict(self) -> dict[str, Any]:
        """All facts as plain JSON types; source and output by name, without their folders."""
        facts = asdict(self) | {"source": self.source_name, "output": self.output_name}
        facts["counts"] = self.counts()
        facts["dense_length"] = self.dense_length
        facts["tensors"] = [
            record._asdict() | {"shape": list(record.shape)} for record in self.tensors
        ]
        facts["scores"] = [row._asdict() for row in self.scores]
        facts["notes"] = list(self.notes)
        return facts

    def summary(self) -> str:
        """A short table to print: sizes, budget, tensors by action, notes, scores."""
        lines = [
            f"{self.source_name} ({self.source_type}) -> {self.model_class}",
            f"  tokens     {self.source_length} -> {self.max_length}, {self.dtype}",
            f"  attention  {self._budget()}",
            f"             dense up to {self.dense_length} tokens",
            "  tensors    " + ", ".join(f"{n} {action}" for action, n in self.counts().items()),
        ]
        lines += [f"    {action:<8} {text}" for action, text in self._groups()]
        lines += [f"  note       {note}" for note in self.notes]
        if self.scores:
            lines.append("  masked tokens, untrained (accuracy, loss in nats)")
            lines += [
                f"    {row.model:<7} {row.attention:<6} {row.length:>6} tokens  "
                f"{row.accuracy:.3f}  {row.nll:.3f}  ({row.n_masked} masked)"
                for row in self.scores
            ]
        return "\n".join(lines)

    def model_card(self) -> str:
        """README.md of the result."""
        name = self.output_name
        tag = PIPELINE_TAGS[self._ending]
        front = ["library_name: transformers"]
        front += [f"pipeline_tag: {tag}"] if tag else []
        front += [f"base_model: {self.hub_id}"] if self.hub_id else []
        front += ["tags:", "- mra", "- mra_hf", "- long-context", "- multi-resolution-attention"]
        lines = ["---", *front, "---", "", f"# {name}", ""]
        lines += [
            f"`{self.source_name}` (`{self.source_type}`, {self.source_length} tokens) converted "
            f"to multi-resolution attention for {self.max_length} tokens by "
            "`mra-hf convert`. No training took place. The licence and the model card of the "
            "source apply.",
            "",
            "## Use",
            "",
            "```python",
            "import mra_hf  # registers the classes",
            f"from transformers import {self.auto_class}, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = {self.auto_class}.from_pretrained("{name}")',
            *self._call(),
            "```",
            "",
            f'`"{name}"` stands for this directory or its hub id. Pad on the right.',
            "",
            "## Attention",
            "",
            f"- {self._budget()}.",
            f"- Up to {self.dense_length} tokens the result is dense attention: every block pair "
            "is exact.",
            "- Settings: "
            + ", ".join(f"`{key}={chosen!r}`" for key, chosen in self.settings.items())
            + ".",
            f"- Positions: {self._position_note()}.",
            *([f"- {self._cost()}"] if self._cost() else []),
            "",
        ]
        if self.scores:
            lines += [
                "## Scores (untrained)",
                "",
                "Masked tokens of one text, the same tokens in every row. No training took place. "
                + self._cost(),
                "",
                "| model | attention | tokens per chunk | accuracy | loss (nats) | masked |",
                "|---|---|---|---|---|---|",
                *(
                    f"| {row.model} | {row.attention} | {row.length} | {row.accuracy:.3f} | "
                    f"{row.nll:.3f} | {row.n_masked} |"
                    for row in self.scores
                ),
                "",
            ]
        lines += ["## Tensors", "", "| action | tensors |", "|---|---|"]
        lines += [f"| {action} | {number} |" for action, number in self.counts().items()]
        groups = [f"- {action}: {_as_code(text)}" for action, text in self._groups()]
        lines += ["", *groups, "", "<details><summary>Every tensor</summary>", ""]
        lines += ["| tensor | action | from | shape | note |", "|---|---|---|---|---|"]
        lines += [
            f"| `{record.name}` | {record.action} | "
            f"{f'`{record.source}`' if record.source else ''} | {list(record.shape)} | "
            f"{record.note} |"
            for record in self.tensors
        ]
        lines += ["", "</details>"]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def _call(self) -> list[str]:
        if self._ending == "ForMultipleChoice":
            return [
                'inputs = tokenizer(["A question"] * 2, ["One answer", "Another"], padding=True, '
                'return_tensors="pt")',
                "outputs = model(**{name: t[None] for name, t in inputs.items()})",
            ]
        if self._ending == "ForQuestionAnswering":
            call = '"A question", "A long text", truncation=True, return_tensors="pt"'
        else:
            call = '"A long text", truncation=True, return_tensors="pt"'
        return [f"outputs = model(**tokenizer({call}))"]

    def _budget(self) -> str:
        if self.settings["resolutions"] is not None:
            scales, budgets = (
                ", ".join(map(str, self.settings[name] or ()))
                for name in ("resolutions", "block_budgets")
            )
            return (
                f"blocks of {scales} tokens ({self.settings['approx_mode']}), of which "
                f"{budgets or 0} per head are cut: the finest cover {self.density:.1%} of the "
                f"matrix at {self.max_length} tokens"
            )
        size, mode = self.settings["block_size"], self.settings["approx_mode"]
        rows = math.ceil(self.max_length / size)
        if self.settings["block_budget"] is None:
            layers = ", ".join(map(str, of_layers(self.settings["block_per_row"])))
            asked = f"{layers} exact blocks of {size} tokens per block row"
        else:
            asked = f"{self.settings['block_budget']} exact blocks of {size} tokens per head"
        return (
            f"{'MRA-2' if mode == 'full' else 'MRA-2-s'} ({mode}), {asked}: "
            f"{self.blocks_per_head} of {rows**2} block pairs per head ({self.density:.1%}) at "
            f"{self.max_length} tokens"
        )

    def _cost(self) -> str:
        """A sentence on what costs accuracy until training continues; empty if nothing does."""
        causes = ["Tiled positions cost"] if self.max_length > self.source_length else []
        causes += ["A small budget costs"] if self.density < 1 else []
        if not causes:
            return ""
        both = "Tiled positions and a small budget cost"
        return f"{both if len(causes) == 2 else causes[0]} accuracy until training continues."

    def _position_note(self) -> str:
        [record] = [
            record
            for record in self.tensors
            if record.name.endswith("position_embeddings.weight") and record.action != "dropped"
        ]
        return record.note or "the table of the source, unchanged"

    def _groups(self) -> list[tuple[str, str]]:
        """Non-copied tensors as (action, text), tensors of the same rule in one line."""
        groups: dict[tuple[str, str, str], int] = {}
        for record in self.tensors:
            if record.action != "copied":
                key = (record.action, *_pattern(record))
                groups[key] = groups.get(key, 0) + 1
        lines: list[tuple[str, str]] = []
        for action in ACTIONS:
            texts = [
                text
                + (f" ({number} tensors)" if number > 1 else "")
                + (f": {note}" if note else "")
                for (of, text, note), number in groups.items()
                if of == action
            ]
            more = len(texts) - _LINES_PER_ACTION
            lines += [(action, text) for text in texts[:_LINES_PER_ACTION]]
            lines += [(action, f"... and {more} more groups")] if more > 0 else []
        return lines


def _pattern(record: TensorRecord) -> tuple[str, str]:
    """What the line of a tensor says, equal for tensors of the same rule, and its note."""
    name = re.sub(r"\.\d+\.", ".*.", record.name)
    if record.action != "renamed":
        return name, record.note
    old = re.sub(r"\.\d+\.", ".*.", record.source or "").split(".")
    new = name.split(".")
    shared = 0
    while shared < min(len(old), len(new)) and old[-1 - shared] == new[-1 - shared]:
        shared += 1
    ending = [] if shared == 0 else ["*"]
    old, new = old[: len(old) - shared], new[: len(new) - shared]
    return f"{'.'.join(old + ending)} -> {'.'.join(new + ending)}", record.note


def _as_code(text: str) -> str:
    """`text` with its leading tensor names set as code."""
    return re.sub(r"^(.+?)(?= \(\d+ tensors\)|: |$)", r"`\1`", text, count=1)
