"""Checkpoint -> MRA checkpoint: `convert_checkpoint`.

Read the source (`sources`), plan the config of the result, take over its tensors (`tensors`), write
everything at once (`files`) and say what was done (`report`).
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_attention.checks import check_block_sizes, check_int
from mra_attention.selection import max_block_rows
from mra_hf.configuration import (
    MAX_DISTANCE_BIAS,
    SETTING_NAMES,
    AttentionSettings,
    MraConfig,
)
from mra_hf.conversion.files import check_output, staged_directory
from mra_hf.conversion.report import ConversionReport
from mra_hf.conversion.scoring import with_scores
from mra_hf.conversion.sentence_encoders import CLASSIFIER_FIELDS, write_modules
from mra_hf.conversion.sources import (
    Source,
    SourceWeights,
    find_head,
    open_tokenizer,
    read_source,
    read_source_weights,
)
from mra_hf.conversion.tensors import (
    NewState,
    check_range,
    new_state,
    position_period,
    untie_where_different,
)
from mra_hf.conversion.tokenizers import prepare_tokenizer, save_tokenizer
from mra_hf.distance_bias import budget_for_a_global_block
from mra_hf.evaluation import read_texts
from mra_hf.modeling import Head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT_NAME = "conversion_report.json"

#: Fields of `MraConfig` that are not taken over from the source as they are.
_RESULT_FIELDS = {
    *SETTING_NAMES,
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "embedding_size"),
    *("max_position_embeddings", "attention_probs_dropout_prob"),
    *("distance_bias_window", "distance_bias_far"),
}


def convert_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    max_length: int = 4096,
    block_per_row: int | None = None,
    approx_mode: str | None = None,
    initial_prior_first_n_blocks: int | None = None,
    initial_prior_diagonal_n_blocks: int | None = None,
    key_block_size: int | None = None,
    selection: str | None = None,
    distance_bias: bool | None = None,
    far_bias: float | None = None,
    text: "str | os.PathLike[str] | Sequence[str] | None" = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    progress: "Callable[[str], None] | None" = None,
) -> ConversionReport:
    """Write `source` to `output_dir` as a model of this package for `max_length` tokens.

    The result holds weights (safetensors), config, tokenizer, a model card and
    `conversion_report.json`. It is written beside `output_dir` and renamed at the end.

    Args:
        source: a directory or hub id of a type in `sources.SOURCE_TYPES`. Its head, one of
            `modeling.HEADS`, is kept; so are modules of sentence-transformers.
        output_dir: the directory to write; its parents are created.
        max_length: longest sequence of the result, in tokens.
        block_per_row, approx_mode, key_block_size, selection: as in `MraConfig`; None: its default,
            or the source's own for a type mra or mra_hf.
        initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks: likewise; with a new bias the
            first block is global (1) if the head reads the first token.
        distance_bias: whether every head gets a trainable bias on the distance of blocks: 0 up to a
            window in which no two tokens share a position, `far_bias` beyond. None: where
            `max_length` exceeds the positions of the source. A source's own bias is kept.
        far_bias: None: -8, which closes pairs beyond the window until training opens them.
        text: a UTF-8 text file, or texts, to compare source and result on, as `scoring` does.
        tokenizer: a directory or hub id to take the tokenizer from, instead of `source`.
        dtype: a name in `DTYPES` or the torch dtype; None: the source's, as config or weights say.
        force: replace a directory `output_dir` that is not empty.
        progress: called with a line of text before each step.

    Returns:
        The report; also saved in the result.

    Raises:
        ValueError: a bad argument or `output_dir`, or a source that cannot be expressed exactly.
        OSError: something cannot be read or written.
    """
    _check_arguments(source, output_dir, tokenizer, max_length, progress)
    bias, dtype = _BiasRequest(distance_bias, far_bias), _as_dtype(dtype)
    texts = None if text is None else read_texts(text)
    output = _check_output(output_dir, source, force)
    changes = {
        "block_per_row": block_per_row, "approx_mode": approx_mode,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "initial_prior_diagonal_n_blocks": initial_prior_diagonal_n_blocks,
        "key_block_size": key_block_size, "selection": selection,
    }  # fmt: skip
    say = progress or (lambda line: None)
    say(f"finding {os.fspath(source)}")
    checkpoint = read_source(source)
    saved_tokenizer = open_tokenizer(checkpoint, tokenizer)
    say(f"reading the weights of {checkpoint.label}")
    weights = read_source_weights(checkpoint)
    config, notes = _result_config(checkpoint, weights, changes, bias, max_length, saved_tokenizer)
    head = find_head(checkpoint, weights, notes)
    _open_first_block(config, head, checkpoint, changes, notes)
    say(f"building {head.class_name} for {max_length} tokens")
    model, state = _build_result(head, config, checkpoint, weights, dtype, notes)
    report = _report(source, output_dir, checkpoint, model, state, notes)
    with staged_directory(output, force=force) as folder:
        say(f"writing {os.fspath(output_dir)}")
        _save(model, saved_tokenizer, checkpoint, folder, output)
        if texts is not None:
            report = with_scores(report, checkpoint, model, saved_tokenizer, texts, say)
        _write_report(report, folder)
    return report


def _check_arguments(source, output_dir, tokenizer, max_length, progress) -> None:
    check_int("max_length", max_length, 1)
    paths = {"source": source, "output_dir": output_dir}
    if tokenizer is not None:
        paths["tokenizer"] = tokenizer
    for name, path in paths.items():
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ValueError(f"{name} must be a path or a name, not empty, got {path!r}.")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of one line of text, got {progress!r}.")


def _check_length(max_length: int, settings: AttentionSettings) -> None:
    """Check that the blocks of so many tokens can be ranked."""
    if settings.resolutions is not None:
        settings = AttentionSettings()
    sizes = check_block_sizes(settings.block_size, settings.key_block_size)
    longest = max_block_rows(sizes[0] // sizes[1]) * sizes[0]
    if max_length > longest:
        raise ValueError(
            f"max_length must be at most {longest}, the most tokens whose blocks of {sizes[0]} "
            f"queries and {sizes[1]} keys can be ranked, got {max_length}."
        )


@dataclasses.dataclass(frozen=True)
class _BiasRequest:
    """What was asked of the distance bias; None where nothing was said."""

    wanted: bool | None
    far: float | None

    def __post_init__(self):
        if self.wanted is not None and not isinstance(self.wanted, bool):
            raise ValueError(f"distance_bias must be True, False or None, got {self.wanted!r}.")
        if self.far is None:
            return
        if isinstance(self.far, bool) or not isinstance(self.far, (int, float)):
            raise ValueError(f"far_bias must be a number, got {self.far!r}.")
        if not abs(self.far) <= MAX_DISTANCE_BIAS:  # nor is it for NaN
            raise ValueError(
                f"far_bias must lie between -{MAX_DISTANCE_BIAS:g} and {MAX_DISTANCE_BIAS:g}, "
                f"got {self.far!r}; -8 closes far pairs."
            )
        if self.wanted is False:
            raise ValueError(
                f"far_bias={self.far} is for a distance bias, and distance_bias is False "
                "(--no-distance-bias); leave one of them out."
            )

    def fields(
        self, source: Source, period: int, settings: AttentionSettings, max_length: int
    ) -> dict:
        """The fields of `MraConfig` for a result of `max_length` tokens, from a source whose
        positions repeat after `period` tokens.

        Raises:
            ValueError: the source has a bias, and another start or one that its positions cannot
                serve is asked for.
        """
        if self.wanted is False:
            return {}
        size = settings.block_size or 1  # a config with other scales refuses the bias by name
        # Texts of L - size tokens lie inside, and no two tokens inside are L apart.
        widest = max(0, (period - 1) // size - 1)
        window = getattr(source.config, "distance_bias_window", None)
        if window is not None:  # it may be trained: keep it as it is
            if self.far is not None:
                raise ValueError(
                    f"far_bias={self.far} is where a new bias starts, but SOURCE has a distance "
                    "bias already; leave far_bias out to keep it."
                )
            if window > widest and max_length > source.learned_rows:
                raise ValueError(
                    f"the distance bias of SOURCE has a window of {window} blocks, but as its "
                    f"positions repeat after {period} tokens, longer texts need one of at most "
                    f"{widest}; convert the checkpoint it was made from, or pass "
                    "distance_bias=False (--no-distance-bias) to drop the bias."
                )
            far = source.config.distance_bias_far
            return {"distance_bias_window": window, "distance_bias_far": far}
        is_repeated = max_length > source.learned_rows and settings.resolutions is None
        if not (is_repeated if self.wanted is None else self.wanted):
            if self.far is not None:
                raise ValueError(
                    f"far_bias={self.far} is for a distance bias, which this conversion has not, "
                    "as no position is repeated; pass distance_bias=True (--distance-bias)."
                )
            return {}
        far = MraConfig.distance_bias_far if self.far is None else float(self.far)
        return {"distance_bias_window": widest, "distance_bias_far": far}


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {sorted(DTYPES)}, the torch dtype of that name, "
            f"or None for the source's dtype, got {dtype!r}."
        )
    return DTYPES[dtype]


def _check_output(output_dir, source, force: bool) -> Path:
    """Return `output_dir` resolved; refuse it if it must not be written."""
    output = Path(output_dir).expanduser().resolve()
    local = Path(source).expanduser()
    check_output(output, force=force, source=local.resolve() if local.is_dir() else None)
    return output


def _result_config(
    source: Source,
    weights: SourceWeights,
    changes: dict[str, Any],
    bias: _BiasRequest,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[MraConfig, list[str]]:
    """The result's config, and notes; prepares the tokenizer."""
    notes: list[str] = []
    settings = _result_settings(source, changes, max_length, notes)
    _check_length(max_length, settings)
    fields = {
        field.name: getattr(source.config, field.name)
        for field in dataclasses.fields(MraConfig)
        if field.name not in _RESULT_FIELDS and hasattr(source.config, field.name)
    }
    fields |= {name: getattr(source.config, name) for name in source.type.kept_fields}
    fields |= bias.fields(source, position_period(source, weights), settings, max_length)
    if source.type.borders_from_tokenizer:
        fields["bos_token_id"] = tokenizer.cls_token_id
        fields["eos_token_id"] = tokenizer.sep_token_id
    dropout, pad_token_id = source.config.attention_probs_dropout_prob, source.config.pad_token_id
    if dropout:
        notes.append(
            f"attention_probs_dropout_prob {dropout} is set to 0: "
            "multi-resolution attention has no dropout on attention weights."
        )
    if tokenizer.pad_token_id != pad_token_id:
        notes.append(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, the config says {pad_token_id}: "
            "set pad_token of the tokenizer before padding a batch."
        )
    notes += prepare_tokenizer(tokenizer, max_length, source.config.type_vocab_size)
    rows = max_length + pad_token_id + 1
    config = MraConfig(max_position_embeddings=rows, **fields, **settings.as_dict())
    for name in source.raw_config.keys() & CLASSIFIER_FIELDS:
        setattr(config, name, source.raw_config[name])
    notes += _doubtful_requests(source, config, changes, max_length)
    return config, notes


def _result_settings(
    source: Source, changes: dict[str, Any], max_length: int, notes: list[str]
) -> AttentionSettings:
    """The source's own settings with `changes`; a budget per head is for one length only."""
    settings = AttentionSettings()
    if source.type.attention is not None:
        settings = source.type.attention(source.config)
    is_same = changes["block_per_row"] is None and max_length == source.learned_rows
    if settings.block_budget is not None and not is_same:
        notes.append(
            f"The source's fixed budget of {settings.block_budget} blocks per head is dropped: "
            "the budget of the result follows block_per_row."
        )
        settings = settings.replace(block_budget=None)
    return settings.replace(**{name: value for name, value in changes.items() if value is not None})


def _doubtful_requests(
    source: Source, config: MraConfig, changes: dict[str, Any], max_length: int
) -> list[str]:
    """Notes on what may be asked for, and is seldom meant."""
    notes = []
    if max_length < source.learned_rows:
        notes.append(
            f"max_length {max_length} is less than the {source.learned_rows} tokens that the "
            "source reads: its positions beyond are dropped."
        )
    is_dense = AttentionSettings.of(config).dense_length(max_length) >= max_length
    if is_dense and changes["block_per_row"] is not None:
        notes.append(
            f"Every block is exact up to max_length {max_length}: nothing is saved over dense "
            "attention. Lower block_per_row (--block-per-row) to save time and memory."
        )
    return notes


def _open_first_block(
    config: MraConfig, head: Head, source: Source, changes: dict[str, Any], notes: list[str]
) -> None:
    """Make the first block global under a new bias, for heads that read its first token, unless
    something else was asked for or the budget has no room for it.
    """
    asked = changes["initial_prior_first_n_blocks"] is not None
    had_bias = getattr(source.config, "distance_bias_window", None) is not None
    is_new = config.distance_bias_window is not None and not had_bias
    is_read = head.reads_first_token or source.modules is not None
    if asked or not is_new or not is_read or config.initial_prior_first_n_blocks:
        return
    settings = AttentionSettings.of(config)
    needed = budget_for_a_global_block(settings)
    if min(settings.layer_budgets) < needed:
        notes.append(
            "The first block is not global: with these priors that needs a block_per_row of "
            f"{needed}. This head reads the first token, which text beyond the window of the "
            "distance bias cannot reach."
        )
        return
    config.initial_prior_first_n_blocks = 1
    notes.append(
        "The first block is global (initial_prior_first_n_blocks 1): this head reads the first "
        "token, which text beyond the window of the distance bias could not reach otherwise."
    )


def _build_result(
    head: Head, config: MraConfig, source: Source, weights: SourceWeights, dtype, notes: list[str]
) -> tuple[PreTrainedModel, NewState]:
    """The model of the result in evaluation mode, and its tensors; tensors that the source lacks
    are the same every time.
    """
    untie_where_different(config, weights, notes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = head.model_class(config)
    state = new_state(model, source, weights)
    if dtype is None:
        taken = {record.name for record in state.records if record.source is not None}
        dtypes = [tensor.dtype for name, tensor in state.tensors.items() if name in taken]
        if isinstance(source.config.dtype, torch.dtype):  # what Transformers opens it in
            dtypes.append(source.config.dtype)
        dtype = functools.reduce(torch.promote_types, dtypes)
    check_range(state, dtype)
    model.to(dtype).load_state_dict(state.tensors, strict=True)
    return model.eval(), state


def _report(
    source_path, output_dir, source: Source, model: PreTrainedModel, state: NewState, notes
) -> ConversionReport:
    length = model.config.max_tokens
    settings = AttentionSettings.of(model.config)
    return ConversionReport(
        source=os.fspath(source_path),
        output=os.path.expanduser(os.fspath(output_dir)),
        hub_id=source.location.hub_id,
        source_type=source.config.model_type,
        model_class=type(model).__name__,
        source_length=source.learned_rows,
        max_length=length,
        dtype=str(model.dtype).removeprefix("torch."),
        settings=settings.as_dict(),
        density=settings.density(length),
        blocks_per_head=settings.blocks_per_head(length),
        tensors=tuple(state.records),
        notes=tuple(notes),
        distance_bias_window=model.config.distance_bias_window,
        distance_bias_far=model.config.distance_bias_far,
        modules=() if source.modules is None else source.modules.names,
        opened_by=None if source.modules is None else source.modules.opened_by,
    )


def _save(model, tokenizer, source: Source, folder: Path, output: Path) -> None:
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"OUT {output} could not be written: {error}.") from error
    save_tokenizer(tokenizer, folder)
    if source.modules is not None:
        write_modules(source.modules, folder, model.config.max_tokens)


def _write_report(report: ConversionReport, folder: Path) -> None:
    facts = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    (folder / REPORT_NAME).write_text(facts + "\n", encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(), encoding="utf-8")
