"""Checkpoint -> MRA checkpoint: `convert_checkpoint`.

Weights keep their values; only names and the position table change. With p reserved rows
(`pad_token_id + 1`) and L learned rows, row r < p of the new table is kept and row r >= p is
learned row (r - p) mod L; the table has `max_length + p` rows. BERT counts positions from row 0,
so p rows of zeros are put in front, and it becomes a RoBERTa that computes the same.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mra_attention.blocks import count_blocks
from mra_attention.checks import check_int
from mra_attention.selection import MAX_BLOCK_ROWS
from mra_hf import modeling
from mra_hf.configuration import (
    ATTENTION_DEFAULTS,
    BUILTIN_TYPE,
    MraConfig,
    of_layers,
    one_description,
)
from mra_hf.conversion.files import (
    check_output,
    read_json,
    read_weights,
    resolve_checkpoint,
    staged_directory,
)
from mra_hf.conversion.report import ConversionReport, ScoreRow, TensorRecord
from mra_hf.conversion.sources import (
    canonical_names,
    find_head,
    learned_rows,
    open_tokenizer,
    read_config,
    reserved_rows,
)
from mra_hf.evaluation import masked_token_scores, read_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: The most tokens whose blocks of the default size can be ranked.
MAX_LENGTH = MAX_BLOCK_ROWS * ATTENTION_DEFAULTS["block_size"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT_NAME = "conversion_report.json"
#: Most tokens of a text that are scored, unless one chunk alone is longer.
SCORED_TOKENS = 32768

_WORDS = "roberta.embeddings.word_embeddings.weight"
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_DECODER = "lm_head.decoder.weight"
#: Tensors that are one parameter under two names, when words and decoder are tied.
_TIED = {
    _DECODER: _WORDS,
    _WORDS: _DECODER,
    "lm_head.decoder.bias": "lm_head.bias",
    "lm_head.bias": "lm_head.decoder.bias",
}
#: Fields of `MraConfig` that are not taken over from the source as they are.
_OWN_FIELDS = {
    *ATTENTION_DEFAULTS,
    *("transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict"),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "embedding_size"),
    *("max_position_embeddings", "attention_probs_dropout_prob"),
}
_DROP_NOTES = {
    r"position_ids$|token_type_ids$": "a buffer, made anew on loading",
    r"^cls\.seq_relationship\.": "next sentence prediction has no counterpart",
    r"(^|\.)pooler\.": "this head reads no pooler",
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
        source: a directory or hub id of type roberta, xlm-roberta, camembert, bert, mra or mra_hf.
            Its head is kept: none, masked LM, sequence or token classification, question answering,
            multiple choice.
        output_dir: the directory to write; its parents are created.
        max_length: longest sequence of the result, in tokens.
        block_per_row, approx_mode, initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks:
            as in `MraConfig`. None: 8, "full", 0, 0; for a source of type mra or mra_hf its own.
        text: a UTF-8 text file, or texts, on which the masked-token scores of source and result are
            taken (at most 32768 tokens, or one chunk).
        tokenizer: a directory or hub id to take the tokenizer from, instead of `source`.
        dtype: "float32", "bfloat16", "float16" or the torch dtype; None: that of the source.
        force: replace a directory `output_dir` that is not empty.
        progress: called with a line of text before each step.

    Returns:
        The report; also saved in the result.

    Raises:
        ValueError: an argument out of range, a source that cannot be expressed exactly, or an
            `output_dir` that must not be written.
        OSError: the source, its weights or its tokenizer cannot be read, or nothing can be written.
    """
    for name, path in (("source", source), ("output_dir", output_dir), ("tokenizer", tokenizer)):
        _check_path(name, path, optional=name == "tokenizer")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of one line of text, got {progress!r}.")
    say = progress or (lambda line: None)
    check_int("max_length", max_length, 1)
    if max_length > MAX_LENGTH:
        raise ValueError(
            f"max_length must be at most {MAX_LENGTH}, the most tokens whose blocks can be ranked, "
            f"got {max_length}."
        )
    dtype = _as_dtype(dtype)
    texts = None if text is None else read_texts(text)
    output = Path(output_dir).expanduser().resolve()
    local = Path(source).expanduser()
    check_output(output, force=force, source=local.resolve() if local.is_dir() else None)

    say(f"finding {os.fspath(source)}")
    found = resolve_checkpoint(source)
    raw_config = read_json(found.folder / "config.json")
    source_config = read_config(found, raw_config)
    saved_tokenizer = open_tokenizer(found, tokenizer, source_config)
    requested = {
        "block_per_row": block_per_row,
        "approx_mode": approx_mode,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "initial_prior_diagonal_n_blocks": initial_prior_diagonal_n_blocks,
    }
    config, notes = _result_config(source_config, requested, max_length, saved_tokenizer)

    say(f"reading the weights of {found.label}")
    weights = read_weights(found.folder)
    names = canonical_names(weights, source_config.model_type)
    head = find_head(raw_config, weights, names, source_config, notes)
    if texts is not None and (head != "ForMaskedLM" or saved_tokenizer.mask_token_id is None):
        raise ValueError(
            "masked-token scores on a text need a masked-LM head and a mask token, but "
            f"{found.label} has the head {head!r} and the mask token "
            f"{saved_tokenizer.mask_token!r}; convert it without text (`mra-hf convert`)."
        )
    if (found.folder / "modules.json").is_file():
        notes.append("The modules of sentence-transformers (pooling) are not part of the result.")

    say(f"building Mra{head} for {max_length} tokens")
    _untie_where_different(config, weights, names, notes)
    model = _new_model(getattr(modeling, f"Mra{head}"), config)
    state, records = _new_state(model, head, weights, names, source_config, max_length)
    if dtype is None:
        floats = [tensor.dtype for tensor in state.values()]
        dtype = functools.reduce(torch.promote_types, floats)
    model.to(dtype).load_state_dict(state, strict=True)
    model.eval()

    length = learned_rows(source_config)
    report = ConversionReport(
        source=os.fspath(source),
        output=os.path.expanduser(os.fspath(output_dir)),
        hub_id=found.hub_id,
        source_type=source_config.model_type,
        model_class=type(model).__name__,
        source_length=length,
        max_length=max_length,
        dtype=str(dtype).removeprefix("torch."),
        settings={name: getattr(config, name) for name in ATTENTION_DEFAULTS},
        density=config.density(max_length),
        blocks_per_head=_blocks_per_head(config, max_length),
        tensors=tuple(records),
        notes=tuple(notes),
    )
    with staged_directory(output, force=force) as folder:
        say(f"writing {os.fspath(output_dir)}")
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"OUT {output} could not be written: {error}.") from error
        saved_tokenizer.save_pretrained(folder)
        if texts is not None:
            rows = _scores(found, source_config, model, saved_tokenizer, texts, length, say)
            if rows[-1].n_tokens < max_length // 2:
                notes.append(
                    f"The scored text has {rows[-1].n_tokens} tokens: it says little about "
                    f"{max_length}."
                )
            report = dataclasses.replace(report, scores=tuple(rows), notes=tuple(notes))
        _write_report(report, folder)
    return report


# Arguments


def _check_path(name: str, path: Any, *, optional: bool) -> None:
    if optional and path is None:
        return
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"{name} must be a path or a name, not empty, got {path!r}.")


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {sorted(DTYPES)}, the torch dtype of that name, or None for "
            f"that of the source, got {dtype!r}."
        )
    return DTYPES[dtype]


# Result


def _result_config(
    source: PreTrainedConfig,
    requested: dict[str, Any],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[MraConfig, list[str]]:
    """The result's config, and notes; sets `model_max_length` of the tokenizer."""
    notes = []
    settings = dict(ATTENTION_DEFAULTS)
    if source.model_type == BUILTIN_TYPE:
        settings |= {name: getattr(source, name) for name in requested}
        # The rule these models were trained with.
        budget = source.max_position_embeddings // 32 * source.block_per_row
        if max_length == source.max_position_embeddings and requested["block_per_row"] is None:
            settings["block_budget"] = budget or None
        else:
            notes.append(
                f"The source's fixed budget of {budget} blocks per head is dropped: the budget of "
                "the result follows block_per_row."
            )
    own = source.model_type == MraConfig.model_type
    if own:
        settings |= {name: getattr(source, name) for name in ATTENTION_DEFAULTS}
        kept = requested["block_per_row"] is None and max_length == learned_rows(source)
        if source.block_budget is not None and not kept:
            settings["block_budget"] = None
            notes.append(
                f"The source's budget of {source.block_budget} blocks per head is dropped: the "
                "budget of the result follows block_per_row."
            )
    settings |= one_description(
        {name: chosen for name, chosen in requested.items() if chosen is not None}
    )
    fields = {
        field.name: getattr(source, field.name)
        for field in dataclasses.fields(MraConfig)
        if field.name not in _OWN_FIELDS and hasattr(source, field.name)
    }
    if own:
        fields["embedding_size"] = source.embedding_size
    if source.model_type == "bert":
        fields["bos_token_id"] = tokenizer.cls_token_id
        fields["eos_token_id"] = tokenizer.sep_token_id
    if source.attention_probs_dropout_prob:
        notes.append(
            f"attention_probs_dropout_prob {source.attention_probs_dropout_prob} is set to 0: "
            "multi-resolution attention has no dropout on attention weights."
        )
    if tokenizer.pad_token_id != source.pad_token_id:
        notes.append(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, the config says "
            f"{source.pad_token_id}: set pad_token of the tokenizer before padding a batch."
        )
    tokenizer.model_max_length = max_length
    rows = max_length + source.pad_token_id + 1
    return MraConfig(max_position_embeddings=rows, **fields, **settings), notes


def _untie_where_different(config, weights, names, notes) -> None:
    """Words and decoder that differ in the file stay two tables, as Transformers loads them."""
    if not config.tie_word_embeddings or _DECODER not in names or _WORDS not in names:
        return
    if not torch.equal(weights[names[_DECODER]], weights[names[_WORDS]]):
        config.tie_word_embeddings = False
        notes.append("tie_word_embeddings is set to false: words and decoder differ in the source.")


def _new_model(model_class: type[PreTrainedModel], config: MraConfig) -> PreTrainedModel:
    """A model with fresh weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model_class(config)


def _new_state(
    model: PreTrainedModel,
    head: str,
    weights: dict[str, Tensor],
    names: dict[str, str],
    source_config: PreTrainedConfig,
    max_length: int,
) -> tuple[dict[str, Tensor], list[TensorRecord]]:
    """All tensors of `model` from the source's, and what was done with each.

    Raises:
        ValueError: a tensor is missing, or has not the shape or kind the config asks for.
    """
    state, records, used, missing = {}, [], set(), []
    tied = _TIED if head == "ForMaskedLM" else {}
    for name, fresh in model.state_dict().items():
        wanted = name if head != "Model" else f"roberta.{name}"
        source_name, note = names.get(wanted), ""
        # RoBERTa's decoder adds `decoder.bias`; a different `lm_head.bias` in the file is not used.
        overruled = wanted == "lm_head.bias" and _bias_differs(weights, names)
        if wanted in tied and (source_name is None or overruled):
            decoder_tied = model.config.tie_word_embeddings or wanted.endswith("bias")
            source_name = names.get(tied[wanted]) if decoder_tied else source_name
            note = f"the same as {tied[wanted]}"
        if source_name is None:
            if head == "Model" and name.startswith("pooler."):
                state[name] = fresh
                note = "the source has no pooler; random until trained"
                records.append(TensorRecord(name, "new", None, tuple(fresh.shape), note))
            else:
                missing.append(name)
            continue
        tensor = weights[source_name]
        used.add(source_name)
        action = "copied" if source_name == name or note else "renamed"
        shape = tuple(fresh.shape)
        if wanted == _POSITIONS:
            rows = source_config.max_position_embeddings
            shape = (rows + 2 * (source_config.model_type == BUILTIN_TYPE), shape[1])
        plain = tensor.layout == torch.strided and tensor.dtype in (*DTYPES.values(), torch.float64)
        if tuple(tensor.shape) != shape or not plain:
            raise ValueError(
                f"the tensor {source_name} of the source is {tensor.dtype} {list(tensor.shape)}, "
                f"but its config.json asks for plain floating point {list(shape)}; the two do not "
                "belong together, or the weights are quantised."
            )
        if tensor.isnan().any():
            raise ValueError(f"the tensor {source_name} of the source holds NaN; it is corrupt.")
        if wanted == _POSITIONS:
            tensor, tiled_note = _tile(tensor, source_config, max_length)
            action, note = ("tiled", tiled_note) if tiled_note else (action, note)
        state[name] = tensor
        records.append(TensorRecord(name, action, source_name, tuple(tensor.shape), note))
    if missing:
        raise ValueError(
            f"the source lacks {len(missing)} tensors of its head {head!r}, the first for "
            f"{missing[0]}; it is incomplete, or architectures in config.json is wrong."
        )
    for source_name in sorted(set(weights) - used):
        notes = [note for pattern, note in _DROP_NOTES.items() if re.search(pattern, source_name)]
        note = (notes or [f"no part of {type(model).__name__}"])[0]
        if re.search(r"encoder\.layer\.\d+\.", source_name):
            raise ValueError(
                f"the tensor {source_name} of the source belongs to a layer beyond its "
                f"num_hidden_layers {source_config.num_hidden_layers} in config.json; raise that, "
                "or remove the layer from the weights."
            )
        if source_name == names.get("lm_head.bias"):
            note = "the decoder adds lm_head.decoder.bias, which differs"
        shape = tuple(weights[source_name].shape)
        records.append(TensorRecord(source_name, "dropped", source_name, shape, note))
    return state, records


def _bias_differs(weights, names) -> bool:
    """Whether the LM head adds a decoder bias that is not `lm_head.bias`."""
    bias, added = names.get("lm_head.bias"), names.get("lm_head.decoder.bias")
    return bool(bias and added) and not torch.equal(weights[bias], weights[added])


def _tile(old: Tensor, config: PreTrainedConfig, max_length: int) -> tuple[Tensor, str]:
    """The new position table `[max_length + p, D]`, and a note unless it is the old one."""
    reserved, p = reserved_rows(config), config.pad_token_id + 1
    learned = old[reserved:]  # [L, D]
    front = old[:p] if reserved == p else old.new_zeros(p, old.shape[1])
    table = torch.cat([front, learned[torch.arange(max_length) % len(learned)]])
    if reserved == p and max_length == len(learned):
        return table, ""
    rows = "1 row" if p == 1 else f"{p} rows"
    kept = f"{rows} kept" if reserved == p else f"{rows} of zeros in front"
    return table, f"{kept}, then row r is learned row (r - {p}) mod {len(learned)}"


def _blocks_per_head(config: MraConfig, length: int) -> int:
    if config.resolutions is not None:
        return (config.block_budgets or (0,))[-1]
    rows = count_blocks(length, config.block_size)
    if config.block_budget is not None:
        return min(rows**2, config.block_budget)
    layers = of_layers(config.block_per_row)
    return round(sum(min(rows**2, rows * blocks) for blocks in layers) / len(layers))


# Scores and report


def _scores(found, source_config, model, tokenizer, texts, length, say) -> list[ScoreRow]:
    """Scores of the source at its own length and of `model` there and at its longest."""
    longest = model.config.max_tokens
    mode = {"full": "MRA-2", "sparse": "MRA-2-s"}

    def row(name: str, attention: str, scored: PreTrainedModel, tokens: int) -> ScoreRow:
        say(f"scoring the {name} in chunks of {tokens} tokens")
        scores = masked_token_scores(
            scored, tokenizer, texts, length=tokens, max_tokens=max(SCORED_TOKENS, longest)
        )
        return ScoreRow(name, attention, **dataclasses.asdict(scores))

    # Transformers' own attends to nothing on a CPU; ours is scored with its own attention.
    if source_config.model_type in (BUILTIN_TYPE, MraConfig.model_type):
        original = modeling.MraForMaskedLM.from_pretrained(found.folder, dtype=torch.float32)
        attention = mode[original.config.approx_mode]
    else:
        original = AutoModelForMaskedLM.from_pretrained(
            found.folder, config=source_config, dtype=torch.float32, attn_implementation="sdpa"
        )
        attention = "dense"
    rows = [row("source", attention, original, length)]
    del original
    result = model.float()
    lengths = sorted({min(length, longest), longest})
    return rows + [row("result", mode[result.config.approx_mode], result, n) for n in lengths]


def _write_report(report: ConversionReport, folder: Path) -> None:
    facts = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    (folder / REPORT_NAME).write_text(facts + "\n", encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(), encoding="utf-8")
