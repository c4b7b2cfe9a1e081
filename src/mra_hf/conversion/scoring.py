"""Source and result on a text: masked tokens where both can fill them in, agreement otherwise."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mra_hf.conversion.report import AgreementRow, ConversionReport, ScoreRow
from mra_hf.conversion.sources import Source, source_key_mapping
from mra_hf.evaluation import SourceStates, masked_token_scores
from mra_hf.modeling import BUILTIN_KEYS, MraForMaskedLM, MraModel

#: Most tokens of a text that are scored, unless a single chunk is longer.
SCORED_TOKENS = 32768
#: The same for agreement, which reads every token three times with the source.
AGREEMENT_TOKENS = 16384

_MODE_NAMES = {"full": "MRA-2", "sparse": "MRA-2-s"}


def fills_masks(model_class: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a result of this class can be scored on masked tokens."""
    return model_class == MraForMaskedLM.__name__ and tokenizer.mask_token_id is not None


def with_scores(
    report: ConversionReport,
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    say: Callable[[str], None],
) -> ConversionReport:
    """Return the report with what the texts say: the source at its own length, and `model`, which
    becomes float32, there and at its longest.
    """
    model.float()
    measure = _masked_tokens if fills_masks(report.model_class, tokenizer) else _agreement
    rows = measure(report, source, model, tokenizer, texts, say)
    notes = report.notes
    if rows[-1].n_tokens < report.max_length // 2:
        notes += (
            f"The scored text has {rows[-1].n_tokens} tokens: "
            f"it says little about {report.max_length}.",
        )
    field = "scores" if measure is _masked_tokens else "agreement"
    found: dict[str, Any] = {field: tuple(rows)}
    return dataclasses.replace(report, notes=notes, **found)


def _lengths(report: ConversionReport) -> list[int]:
    return sorted({min(report.source_length, report.max_length), report.max_length})


def _masked_tokens(report, source, model, tokenizer, texts, say) -> list[ScoreRow]:
    def score(name: str, attention: str, scored: PreTrainedModel, tokens: int) -> ScoreRow:
        say(f"scoring the {name} in chunks of {tokens} tokens")
        most = max(SCORED_TOKENS, report.max_length)
        scores = masked_token_scores(scored, tokenizer, texts, length=tokens, max_tokens=most)
        return ScoreRow(name, attention, **dataclasses.asdict(scores))

    original, attention = open_source_masked_lm(source)
    rows = [score("source", attention, original, report.source_length)]
    del original
    attention = _MODE_NAMES[model.config.approx_mode]
    return rows + [score("result", attention, model, length) for length in _lengths(report)]


def _agreement(report, source, model, tokenizer, texts, say) -> list[AgreementRow]:
    original, attention = open_source_encoder(source)
    say("reading the text with the source in overlapping windows")
    states = source_states(report, source, original, tokenizer, texts)
    width = _lengths(report)[0]
    rows = [AgreementRow("source", attention, width, *states.agreement(original, width))]
    del original
    attention = _MODE_NAMES[model.config.approx_mode]
    for length in _lengths(report):
        say(f"comparing the result in chunks of {length} tokens")
        found = states.agreement(model.base_model, length)
        rows.append(AgreementRow("result", attention, length, *found))
    return rows


def source_states(
    report: ConversionReport,
    source: Source,
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
) -> SourceStates:
    """What the encoder of the source makes of the texts, for a result as `report` says.

    Embeddings are pooled by the first token where the source pools by it, else by the mean.
    """
    pools_first = source.modules is not None and source.modules.pooling == ("cls",)
    return SourceStates(
        encoder,
        tokenizer,
        texts,
        width=min(report.source_length, report.max_length),
        longest=report.max_length,
        pooling="cls" if pools_first else "mean",
        max_tokens=max(AGREEMENT_TOKENS, report.max_length),
    )


def open_source_masked_lm(source: Source) -> tuple[PreTrainedModel, str]:
    """The source as a masked language model in float32, and a name of its attention.

    Raises:
        ValueError: it has no masked-LM head.
    """
    model, attention, missing = _open(source, AutoModelForMaskedLM, MraForMaskedLM)
    if any(key.endswith("dense.weight") for key in missing):
        raise ValueError(f"{source.label} has no masked-LM head.")
    return model, attention


def open_source_encoder(source: Source) -> tuple[PreTrainedModel, str]:
    """The source without its head in float32, and a name of its attention."""
    return _open(source, AutoModel, MraModel)[:2]


def _open(source: Source, auto_class, own_class) -> tuple[PreTrainedModel, str, set[str]]:
    """The source in evaluation mode, a name of its attention, and the weights it lacks."""
    folder, key_mapping = source.location.folder, source_key_mapping(source)
    options = {"dtype": torch.float32, "output_loading_info": True}
    if source.type.attention is None:
        model, info = auto_class.from_pretrained(
            folder,
            key_mapping=key_mapping or None,
            config=source.config,
            attn_implementation="sdpa",
            **options,
        )
        attention = "dense"
    else:  # in our classes: Transformers' own MRA attends to nothing on a CPU
        model, info = own_class.from_pretrained(
            folder, key_mapping={**key_mapping, **BUILTIN_KEYS}, **options
        )
        attention = _MODE_NAMES[model.config.approx_mode]
    return model.eval(), attention, info["missing_keys"]
