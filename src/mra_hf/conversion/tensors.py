"""The tensors of a result: where each comes from, and the longer position table.

Weights keep their values; only names and the position table change. With p reserved rows
(`pad_token_id + 1`) and L learned rows, row r < p of the new table is kept and row r >= p is
learned row (r - p) mod L; the table has `max_length + p` rows. A table that repeats itself already
goes on repeating its last period. BERT counts positions from row 0, so p rows of zeros are put in
front, and it becomes a RoBERTa that computes the same.

A distance bias that the source has not is new; one that it has is kept, and distances beyond its
last bucket share that bucket.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mra_hf.configuration import MraConfig
from mra_hf.conversion.report import TensorRecord
from mra_hf.conversion.sources import FLOATS, Source, SourceWeights
from mra_hf.modeling import MraForMaskedLM, MraModel

_WORDS = "roberta.embeddings.word_embeddings.weight"
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_DISTANCE_BIAS = ".distance_bias.weight"
_DECODER = "lm_head.decoder.weight"
#: A table repeats itself if its copies are nearer than so much of the distance of neighbours.
_COPY_DISTANCE = 0.5
#: And if at least so many rows have copies.
_COPIED_ROWS = 32
#: Tensors that are one parameter under two names, when words and decoder are tied.
_TIED = {
    _DECODER: _WORDS,
    _WORDS: _DECODER,
    "lm_head.decoder.bias": "lm_head.bias",
    "lm_head.bias": "lm_head.decoder.bias",
}
_DROP_NOTES = {
    r"position_ids$|token_type_ids$": "a buffer, made anew on loading",
    r"^cls\.seq_relationship\.": "next sentence prediction has no counterpart",
    r"(^|\.)pooler\.": "this head reads no pooler",
}


class NewState(NamedTuple):
    """All tensors of a result by name, and what was done with each tensor of either side."""

    tensors: dict[str, Tensor]
    records: list[TensorRecord]


def untie_where_different(config: MraConfig, weights: SourceWeights, notes: list[str]) -> None:
    """Keep two tables where words and decoder differ in the file, as Transformers loads them."""
    tensors, names = weights
    if not config.tie_word_embeddings or _DECODER not in names or _WORDS not in names:
        return
    if not torch.equal(tensors[names[_DECODER]], tensors[names[_WORDS]]):
        config.tie_word_embeddings = False
        notes.append("tie_word_embeddings is set to false: words and decoder differ in the source.")


def position_period(source: Source, weights: SourceWeights) -> int:
    """Return after how many tokens the positions of the source repeat: its learned rows, unless its
    table was made by repeating a shorter one.

    Training moves the copies apart, but most rows stay nearer to their copies than to their
    neighbours. Copies of fewer than 32 rows must be exact to count.
    """
    n_rows, name = source.learned_rows, weights.names.get(_POSITIONS)
    table = None if name is None else weights.tensors[name]
    if table is None or table.dim() != 2 or len(table) != source.reserved_rows + n_rows:
        return n_rows  # `new_state` refuses it
    learned = table[source.reserved_rows :].float()
    if torch.equal(learned[1:], learned[:-1]):
        return n_rows  # positions say nothing
    step = (learned[1:] - learned[:-1]).norm(dim=-1).median()
    starts = min(_COPIED_ROWS, n_rows - 1)
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(learned[:starts], learned, compute_mode=exact)  # [starts, L]
    for period in range(2, n_rows - 1):
        if n_rows - period < _COPIED_ROWS:
            if torch.equal(learned[period:], learned[:-period]):
                return period
        elif distances.diagonal(period).median() < _COPY_DISTANCE * step:
            gaps = (learned[period:] - learned[:-period]).norm(dim=-1)
            if gaps.median() < _COPY_DISTANCE * step:
                return period
    return n_rows


def new_state(model: PreTrainedModel, source: Source, weights: SourceWeights) -> NewState:
    """Return all tensors of `model` from the source's, and what was done with each.

    Raises:
        ValueError: a tensor is missing, or has not the shape or kind the config asks for.
    """
    tensors, records, missing = {}, [], []
    period = position_period(source, weights)
    is_bare = isinstance(model, MraModel)
    for name, fresh in model.state_dict().items():
        roberta_name = f"roberta.{name}" if is_bare else name
        source_name, note = _origin(model, roberta_name, weights)
        if source_name is not None:
            tensor = weights.tensors[source_name]
            action = "copied" if source_name == name or note else "renamed"
            if roberta_name == _POSITIONS:
                rows = source.reserved_rows + source.learned_rows
                _check_tensor(source_name, tensor, (rows, fresh.shape[1]))
                tensor, tiling = _tile(tensor, source, period, model.config.max_tokens)
                if tiling:
                    action, note = "tiled", tiling
            elif name.endswith(_DISTANCE_BIAS):
                tensor, widening = _widen(source_name, tensor, fresh)
                if widening:
                    action, note = "tiled", widening
            else:
                _check_tensor(source_name, tensor, tuple(fresh.shape))
            tensors[name] = tensor
            records.append(TensorRecord(name, action, source_name, tuple(tensor.shape), note))
        elif name.endswith(_DISTANCE_BIAS):
            tensors[name] = fresh
            note = _start_note(model.config)
            records.append(TensorRecord(name, "new", None, tuple(fresh.shape), note))
        elif is_bare and name.startswith("pooler."):
            tensors[name] = fresh
            note = "the source has no pooler; random until trained"
            records.append(TensorRecord(name, "new", None, tuple(fresh.shape), note))
        else:
            missing.append(name)
    if missing:
        head = type(model).__name__.removeprefix("Mra")
        raise ValueError(
            f"the source lacks {len(missing)} tensors of its head {head!r}, the first for "
            f"{missing[0]}; it is incomplete, or architectures in config.json is wrong."
        )
    used = {record.source for record in records}
    dropped = [
        _dropped(source_name, model, weights)
        for source_name in sorted(weights.tensors.keys() - used)
    ]
    return NewState(tensors, records + dropped)


def check_range(state: NewState, dtype: torch.dtype) -> None:
    """Raise a `ValueError` for a tensor of the result that `dtype` cannot hold."""
    for name, tensor in state.tensors.items():
        if not tensor.to(dtype).isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16"
            raise ValueError(
                f"the tensor {name} holds {tensor.abs().max():g}, beyond the largest {kind}, "
                f"{torch.finfo(dtype).max:g}; pass dtype={wider!r} (--dtype {wider}), which "
                "reaches further, or leave dtype out."
            )


def _origin(
    model: PreTrainedModel, roberta_name: str, weights: SourceWeights
) -> tuple[str | None, str]:
    """The tensor of the source that becomes `roberta_name`, None if there is none; and a note."""
    names = weights.names
    source_name = names.get(roberta_name)
    if not isinstance(model, MraForMaskedLM) or roberta_name not in _TIED:
        return source_name, ""
    # RoBERTa's decoder adds `decoder.bias`; a different `lm_head.bias` in the file is not used.
    is_overruled = roberta_name == "lm_head.bias" and _biases_differ(weights)
    if source_name is not None and not is_overruled:
        return source_name, ""
    twin = _TIED[roberta_name]
    if model.config.tie_word_embeddings or roberta_name.endswith("bias"):
        source_name = names.get(twin)
    return source_name, f"the same as {twin}"


def _biases_differ(weights: SourceWeights) -> bool:
    """Whether the LM head adds a decoder bias that is not `lm_head.bias`."""
    tensors, names = weights
    bias, decoder_bias = names.get("lm_head.bias"), names.get("lm_head.decoder.bias")
    if bias is None or decoder_bias is None:
        return False
    return not torch.equal(tensors[bias], tensors[decoder_bias])


def _check_tensor(source_name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    is_plain = tensor.layout == torch.strided and tensor.dtype in FLOATS
    if tuple(tensor.shape) != shape or not is_plain:
        raise ValueError(
            f"the tensor {source_name} of the source is {tensor.dtype} {list(tensor.shape)}, "
            f"but its config.json asks for plain floating point {list(shape)}; "
            "the two do not belong together, or the weights are quantised."
        )


def _tile(old_table: Tensor, source: Source, period: int, max_length: int) -> tuple[Tensor, str]:
    """The new position table `[max_length + p, D]`, and a note unless it is the old one."""
    reserved, p = source.reserved_rows, source.config.pad_token_id + 1
    learned = old_table[reserved:]  # [L, D]
    is_kept = reserved == p
    front = old_table[:p] if is_kept else old_table.new_zeros(p, old_table.shape[1])
    positions = torch.arange(max_length)
    repeated = len(learned) - period + (positions - len(learned)) % period
    table = torch.cat([front, learned[torch.where(positions < len(learned), positions, repeated)]])
    if is_kept and max_length == len(learned):
        return table, ""
    rows = "1 row" if p == 1 else f"{p} rows"
    front_note = f"{rows} kept" if is_kept else f"{rows} of zeros in front"
    if period < len(learned) < max_length:
        return table, f"{front_note}, {len(learned)} learned rows, then the last {period} repeat"
    return table, f"{front_note}, then row r is learned row (r - {p}) mod {len(learned)}"


def _widen(source_name: str, bias: Tensor, fresh: Tensor) -> tuple[Tensor, str]:
    """The bias of a source for the buckets of the result, and a note unless it is the same."""
    heads, buckets = fresh.shape
    known = min(bias.shape[-1], buckets)
    _check_tensor(source_name, bias, (heads, bias.shape[-1]))
    if known == buckets == bias.shape[-1]:
        return bias, ""
    bias = torch.cat([bias[:, :known], bias[:, -1:].expand(-1, buckets - known)], dim=1)
    return bias, f"{known} buckets kept, {buckets - known} more as the last one"


def _start_note(config: PreTrainedConfig) -> str:
    """Where a new distance bias starts."""
    assert isinstance(config, MraConfig)
    window = config.distance_bias_window
    return f"0 up to {window} blocks, {config.distance_bias_far:g} beyond"


def _dropped(source_name: str, model: PreTrainedModel, weights: SourceWeights) -> TensorRecord:
    """The record of a tensor that is not used; refuses to drop a layer."""
    in_layer = re.search(r"encoder\.layer\.\d+\.", source_name)
    if in_layer and not source_name.endswith(_DISTANCE_BIAS):
        raise ValueError(
            f"the tensor {source_name} of the source belongs to a layer beyond its "
            f"num_hidden_layers {model.config.num_hidden_layers} in config.json; "
            "raise that, or remove the layer from the weights."
        )
    if source_name.endswith(_DISTANCE_BIAS):
        note = "the result has no distance bias"
    elif source_name == weights.names.get("lm_head.bias"):
        note = "the decoder adds lm_head.decoder.bias, which differs"
    else:
        reasons = (text for pattern, text in _DROP_NOTES.items() if re.search(pattern, source_name))
        note = next(reasons, f"no part of {type(model).__name__}")
    shape = tuple(weights.tensors[source_name].shape)
    return TensorRecord(source_name, "dropped", source_name, shape, note)
