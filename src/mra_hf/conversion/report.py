"""What a conversion did: `ConversionReport`, its printable summary and the model card."""

import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mra_hf.configuration import AttentionSettings
from mra_hf.modeling import HEADS, Head

ACTIONS = ("copied", "renamed", "tiled", "new", "dropped")
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


class AgreementRow(NamedTuple):
    """Cosines of one model at one chunk length to the source, as in `evaluation.Agreement`."""

    model: str
    attention: str
    length: int
    states: float
    pooled: float
    n_tokens: int
    n_documents: int


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` read, wrote and measured.

    Args:
        source, output: as the caller passed them.
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
        scores: masked-token scores, empty unless the caller passed a text.
        distance_bias_window, distance_bias_far: as in `MraConfig`.
        modules: of sentence-transformers, the encoder first; empty for other directories.
        opened_by: its class that opens the result; None for other directories.
        agreement: in place of the scores where masked tokens cannot be filled in.
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
    distance_bias_window: int | None = None
    distance_bias_far: float = -8.0
    modules: tuple[str, ...] = ()
    opened_by: str | None = None
    agreement: tuple[AgreementRow, ...] = ()

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
        return AttentionSettings(**self.settings).dense_length(self.max_length)

    @property
    def head(self) -> Head:
        """The row of `HEADS` of the result."""
        return next(head for head in HEADS if head.class_name == self.model_class)

    @property
    def auto_class(self) -> str:
        """The Auto class that opens the result."""
        return self.head.auto_classes[-1].__name__

    def counts(self) -> dict[str, int]:
        """Return the number of tensors by action, in the order of `ACTIONS`."""
        counted = Counter(record.action for record in self.tensors)
        return {action: counted[action] for action in ACTIONS}

    def to_dict(self) -> dict[str, Any]:
        """Return all facts as plain JSON types; source and output by name, without folders."""
        facts = asdict(self) | {"source": self.source_name, "output": self.output_name}
        facts["counts"] = self.counts()
        facts["dense_length"] = self.dense_length
        facts["tensors"] = [
            record._asdict() | {"shape": list(record.shape)} for record in self.tensors
        ]
        facts["scores"] = [row._asdict() for row in self.scores]
        facts["agreement"] = [row._asdict() for row in self.agreement]
        facts |= {"notes": list(self.notes), "modules": list(self.modules)}
        return facts

    def summary(self) -> str:
        """Return a short table to print: sizes, budget, tensors by action, notes, scores."""
        lines = [
            f"{self.source_name} ({self.source_type}) -> {self.model_class}",
            f"  tokens     {self.source_length} -> {self.max_length}, {self.dtype}",
            f"  attention  {_budget(self)}",
            f"             dense up to {self.dense_length} tokens",
            *([f"             {_bias_summary(self)}"] if _has_bias(self) else []),
            *([f"  modules    {', '.join(self.modules)}"] if self.modules else []),
            "  tensors    " + ", ".join(f"{n} {action}" for action, n in self.counts().items()),
        ]
        lines += [f"    {action:<8} {text}" for action, text in _groups(self.tensors)]
        lines += [f"  note       {note}" for note in self.notes]
        if self.scores:
            lines.append("  masked tokens, untrained (accuracy, loss in nats)")
            lines += [
                f"    {row.model:<7} {row.attention:<6} {row.length:>6} tokens  "
                f"{row.accuracy:.3f}  {row.nll:.3f}  ({row.n_masked} masked)"
                for row in self.scores
            ]
        if self.agreement:
            lines.append("  agreement with the source in windows, untrained (cosine)")
            lines += [
                f"    {row.model:<7} {row.attention:<6} {row.length:>6} tokens  "
                f"states {row.states:.3f}  pooled {row.pooled:.3f}  ({row.n_tokens} tokens)"
                for row in self.agreement
            ]
        return "\n".join(lines)

    def model_card(self) -> str:
        """Return the README.md of the result."""
        lines = [
            *_front_matter(self),
            *_usage_section(self),
            *_attention_section(self),
            *(_scores_section(self) if self.scores else ()),
            *(_agreement_section(self) if self.agreement else ()),
            *_tensors_section(self),
        ]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _front_matter(report: ConversionReport) -> list[str]:
    tag = report.head.pipeline_tag
    if report.opened_by == "SentenceTransformer":
        tag = "sentence-similarity"
    return [
        "---",
        f"library_name: {'sentence-transformers' if report.modules else 'transformers'}",
        *([f"pipeline_tag: {tag}"] if tag else []),
        *([f"base_model: {report.hub_id}"] if report.hub_id else []),
        *("tags:", "- mra", "- mra_hf", "- long-context", "- multi-resolution-attention"),
        "---",
        "",
        f"# {report.output_name}",
        "",
        f"`{report.source_name}` (`{report.source_type}`, {report.source_length} tokens) "
        f"converted to multi-resolution attention for {report.max_length} tokens "
        "by `mra-hf convert`. No training took place. "
        "The licence and the model card of the source apply.",
        "",
    ]


def _usage_section(report: ConversionReport) -> list[str]:
    name = report.output_name
    if report.modules:
        is_pair = report.opened_by == "CrossEncoder"
        call = 'predict([("A question", "A long text")])' if is_pair else 'encode(["A long text"])'
        code = [
            f"from sentence_transformers import {report.opened_by}",
            "",
            f'model = {report.opened_by}("{name}")',
            f"outputs = model.{call}",
        ]
    else:
        code = [
            f"from transformers import {report.auto_class}, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = {report.auto_class}.from_pretrained("{name}")',
            *_example_call(report.head),
        ]
    return [
        "## Use",
        "",
        "```python",
        "import mra_hf  # registers the classes",
        *code,
        "```",
        "",
        f'`"{name}"` stands for this directory or its hub id. Pad on the right.',
        "",
    ]


def _example_call(head: Head) -> list[str]:
    if head.ending == "ForMultipleChoice":
        return [
            'inputs = tokenizer(["A question"] * 2, ["One answer", "Another"], padding=True, '
            'return_tensors="pt")',
            "outputs = model(**{name: t[None] for name, t in inputs.items()})",
        ]
    texts = '"A long text"'
    if head.ending == "ForQuestionAnswering":
        texts = '"A question", "A long text"'
    return [f'outputs = model(**tokenizer({texts}, truncation=True, return_tensors="pt"))']


def _attention_section(report: ConversionReport) -> list[str]:
    settings = ", ".join(f"`{name}={value!r}`" for name, value in report.settings.items())
    cost = _cost(report)
    return [
        "## Attention",
        "",
        f"- {_budget(report)}.",
        f"- Up to {report.dense_length} tokens the result is dense attention: "
        "every block pair is exact.",
        f"- Settings: {settings}.",
        f"- Positions: {_position_note(report.tensors)}.",
        *([f"- Distance bias: {_bias_in_words(report)}"] if _has_bias(report) else []),
        *([f"- {cost}"] if cost else []),
        "",
    ]


def _scores_section(report: ConversionReport) -> list[str]:
    return [
        "## Scores (untrained)",
        "",
        "Masked tokens of one text, the same tokens in every row. No training took place. "
        + _cost(report),
        "",
        "| model | attention | tokens per chunk | accuracy | loss (nats) | masked |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.model} | {row.attention} | {row.length} | {row.accuracy:.3f} | "
            f"{row.nll:.3f} | {row.n_masked} |"
            for row in report.scores
        ),
        "",
    ]


def _agreement_section(report: ConversionReport) -> list[str]:
    return [
        "## Agreement with the source (untrained)",
        "",
        "Cosine of the hidden state of every token to its state in the middle of a window that the "
        "source reads, and of the pooled embedding of a document to the mean over chunks of the "
        "source. No training took place. " + _cost(report),
        "",
        "| model | attention | tokens per chunk | states | pooled | tokens |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.model} | {row.attention} | {row.length} | {row.states:.3f} | "
            f"{row.pooled:.3f} | {row.n_tokens} |"
            for row in report.agreement
        ),
        "",
    ]


def _tensors_section(report: ConversionReport) -> list[str]:
    return [
        *("## Tensors", "", "| action | tensors |", "|---|---|"),
        *(f"| {action} | {number} |" for action, number in report.counts().items()),
        "",
        *(f"- {action}: {_as_code(text)}" for action, text in _groups(report.tensors)),
        *("", "<details><summary>Every tensor</summary>", ""),
        *("| tensor | action | from | shape | note |", "|---|---|---|---|---|"),
        *(
            f"| `{record.name}` | {record.action} | "
            f"{f'`{record.source}`' if record.source else ''} | {list(record.shape)} | "
            f"{record.note} |"
            for record in report.tensors
        ),
        *("", "</details>"),
    ]


def _budget(report: ConversionReport) -> str:
    """The budget and what it covers, in words."""
    settings, length = AttentionSettings(**report.settings), report.max_length
    mode, size = settings.approx_mode, settings.block_size
    if settings.resolutions is not None:
        scales = ", ".join(map(str, settings.resolutions))
        budgets = ", ".join(map(str, settings.block_budgets or ())) or 0
        return (
            f"blocks of {scales} tokens ({mode}), of which {budgets} per head are cut: "
            f"the finest cover {report.density:.1%} of the matrix at {length} tokens"
        )
    assert size is not None  # of two scales
    if settings.block_budget is None:
        budgets = ", ".join(map(str, settings.layer_budgets))
        budget = f"{budgets} exact blocks of {size} tokens per block row"
    else:
        budget = f"{settings.block_budget} exact blocks of {size} tokens per head"
    if settings.key_block_size != size:
        budget += f", each cut into key blocks of {settings.key_block_size}"
    return (
        f"{'MRA-2' if mode == 'full' else 'MRA-2-s'} ({mode}), {budget}: "
        f"{report.blocks_per_head} of {math.ceil(length / size) ** 2} block pairs per head "
        f"({report.density:.1%}) at {length} tokens"
    )


def _cost(report: ConversionReport) -> str:
    """A sentence on what costs accuracy until training continues; empty if nothing does."""
    is_tiled = report.max_length > report.source_length and not _has_bias(report)
    is_sparse = report.density < 1
    if is_tiled and is_sparse:
        cause = "Tiled positions and a small budget cost"
    elif is_tiled:
        cause = "Tiled positions cost"
    elif is_sparse:
        cause = "A small budget costs"
    else:
        return ""
    return f"{cause} accuracy until training continues."


def _has_bias(report: ConversionReport) -> bool:
    return report.distance_bias_window is not None


def _bias_summary(report: ConversionReport) -> str:
    window, far = report.distance_bias_window, report.distance_bias_far
    return f"distance bias: starts at 0 up to {window} blocks, {far:g} beyond"


def _bias_in_words(report: ConversionReport) -> str:
    size = AttentionSettings(**report.settings).block_size
    assert report.distance_bias_window is not None and size is not None  # `_has_bias`
    tokens = (report.distance_bias_window + 1) * size
    return (
        "every head adds a learned number to its logits, one for each distance in blocks; it "
        f"starts at 0 up to {report.distance_bias_window} blocks (texts of {tokens} tokens) and at "
        f"{report.distance_bias_far:g} beyond. This hides tokens that would share a row of the "
        "position table, until training opens the distances that help."
    )


def _position_note(tensors: tuple[TensorRecord, ...]) -> str:
    [record] = [
        record
        for record in tensors
        if record.name.endswith("position_embeddings.weight") and record.action != "dropped"
    ]
    return record.note or "the table of the source, unchanged"


def _groups(tensors: tuple[TensorRecord, ...]) -> list[tuple[str, str]]:
    """Tensors that were not just copied, as (action, text), one line for each rule."""
    counted = Counter(
        (record.action, *_pattern(record)) for record in tensors if record.action != "copied"
    )
    lines: list[tuple[str, str]] = []
    for action in ACTIONS:
        texts = [
            pattern + (f" ({number} tensors)" if number > 1 else "") + (f": {note}" if note else "")
            for (group_action, pattern, note), number in counted.items()
            if group_action == action
        ]
        more = len(texts) - _LINES_PER_ACTION
        lines += [(action, text) for text in texts[:_LINES_PER_ACTION]]
        lines += [(action, f"... and {more} more groups")] if more > 0 else []
    return lines


def _pattern(record: TensorRecord) -> tuple[str, str]:
    """The name of a tensor, equal for all tensors of the same rule, and its note."""
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
