"""The source of a conversion: its type, config, tokenizer, weight names and head.

`SOURCE_TYPES` has one row for each `model_type`. Everything that a model of this package cannot
express exactly is refused here.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    CamembertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.activations import ACT2FN
from transformers.models.mra.configuration_mra import MraConfig as BuiltinConfig

from mra_attention.checks import check_int
from mra_hf.configuration import (
    BUILTIN_RESERVED_ROWS,
    BUILTIN_TYPE,
    AttentionSettings,
    MraConfig,
    builtin_block_budget,
)
from mra_hf.conversion.files import (
    VOCABULARY_NAMES,
    CheckpointLocation,
    read_json,
    read_weights,
    resolve_checkpoint,
)
from mra_hf.conversion.sentence_encoders import (
    SentenceModules,
    read_modules,
    tokenizer_folder,
)
from mra_hf.conversion.wrappers import (
    refuse_other_weights,
    refuse_quantisation,
    wrapper_note,
    wrapper_patterns,
)
from mra_hf.modeling import BERT_LM_HEAD_KEYS, GELU_NAMES, HEADS, Head

#: Heads that are kept, by the ending of their class names.
CONVERTED_HEADS = {head.ending: head for head in HEADS if head.auto_classes}

#: Dtypes of weights that can be converted.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DECODERS = ("LMHeadModel", "ForCausalLM")


@dataclass(frozen=True)
class SourceType:
    """A `model_type` that can be converted: where it differs from RoBERTa.

    Args:
        config_class: reads its config.json, with the defaults of the type.
        class_prefix: beginning of its class names: "Roberta" of RobertaForMaskedLM.
        weight_prefix: beginning of the names of its encoder's weights.
        renamed_weights: patterns of its other weight names -> RoBERTa's names.
        reserved_rows: rows of its position table in front of the first position; None: RoBERTa's
            `pad_token_id + 1`.
        counts_tokens: its max_position_embeddings does not count the reserved rows.
        attention: its attention settings, from its config; None: its attention is dense.
        kept_fields: fields of `MraConfig` that are taken over from this type only.
        borders_from_tokenizer: bos and eos are the tokenizer's cls and sep, not in the config.
        pooled_classifier: its sequence classifier is a pooler and a linear layer, RoBERTa's is one
            head of two layers.
        lm_head_follows_config: its LM head applies hidden_act, RoBERTa's always gelu.
        refused_heads: endings of heads that would compute something else here -> why.
    """

    config_class: type[PreTrainedConfig]
    class_prefix: str
    weight_prefix: str = "roberta"
    renamed_weights: Mapping[str, str] = field(default_factory=dict)
    reserved_rows: int | None = None
    counts_tokens: bool = False
    attention: Callable[[PreTrainedConfig], AttentionSettings] | None = None
    kept_fields: tuple[str, ...] = ()
    borders_from_tokenizer: bool = False
    pooled_classifier: bool = False
    lm_head_follows_config: bool = False
    refused_heads: Mapping[str, str] = field(default_factory=dict)


def _builtin_settings(config: PreTrainedConfig) -> AttentionSettings:
    budget = builtin_block_budget(config.max_position_embeddings, config.block_per_row)
    return AttentionSettings(
        block_per_row=config.block_per_row,
        block_budget=budget or None,
        approx_mode=config.approx_mode,
        initial_prior_first_n_blocks=config.initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks=config.initial_prior_diagonal_n_blocks,
    )


SOURCE_TYPES = {
    "roberta": SourceType(RobertaConfig, "Roberta"),
    "xlm-roberta": SourceType(XLMRobertaConfig, "XLMRoberta"),
    "camembert": SourceType(CamembertConfig, "Camembert"),
    "bert": SourceType(
        BertConfig,
        "Bert",
        weight_prefix="bert",
        renamed_weights=BERT_LM_HEAD_KEYS,
        reserved_rows=0,
        borders_from_tokenizer=True,
        pooled_classifier=True,
        lm_head_follows_config=True,
    ),
    BUILTIN_TYPE: SourceType(
        BuiltinConfig,
        "Mra",
        weight_prefix="mra",
        renamed_weights=BERT_LM_HEAD_KEYS,
        reserved_rows=BUILTIN_RESERVED_ROWS,
        counts_tokens=True,
        attention=_builtin_settings,
        lm_head_follows_config=True,
        refused_heads={
            "ForSequenceClassification": "its head applies hidden_act where RoBERTa's applies tanh",
            "ForMultipleChoice": "its head (pre_classifier and ReLU) has no counterpart here",
        },
    ),
    MraConfig.model_type: SourceType(
        MraConfig, "Mra", attention=AttentionSettings.of, kept_fields=("embedding_size",)
    ),
}


class Source(NamedTuple):
    """A checkpoint to convert: its location, its type, its config.json, the completed config, and
    the modules that sentence-transformers put around it.
    """

    location: CheckpointLocation
    type: SourceType
    raw_config: dict[str, Any]
    config: PreTrainedConfig
    modules: SentenceModules | None = None

    @property
    def label(self) -> str:
        """The name to show."""
        return self.location.label

    @property
    def reserved_rows(self) -> int:
        """Rows of the position table in front of its first position."""
        reserved = self.type.reserved_rows
        return self.config.pad_token_id + 1 if reserved is None else reserved

    @property
    def learned_rows(self) -> int:
        """Positions, in tokens."""
        rows = self.config.max_position_embeddings
        return rows if self.type.counts_tokens else rows - self.reserved_rows


class SourceWeights(NamedTuple):
    """All tensors by their names in the files, and RoBERTa's name of a tensor -> that name."""

    tensors: dict[str, Tensor]
    names: dict[str, str]


def read_source(source: str | os.PathLike[str]) -> Source:
    """Find a checkpoint and read its config; weights are not read yet.

    Raises:
        OSError: the source or its config cannot be read.
        ValueError: a type or a config that cannot be converted.
    """
    location = resolve_checkpoint(source)
    modules = read_modules(location.folder)
    if modules is not None:
        location = location._replace(folder=modules.encoder_folder)
    config_file = location.folder / "config.json"
    raw_config = read_json(config_file)
    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in SOURCE_TYPES:
        raise ValueError(
            f"SOURCE {location.label} is of model_type {model_type!r}, "
            f"allowed are {', '.join(SOURCE_TYPES)}."
        )
    source_type = SOURCE_TYPES[model_type]
    try:
        config = source_type.config_class.from_dict(dict(raw_config))
    except Exception as error:  # validation of several libraries
        raise ValueError(
            f"{config_file} is not a valid {model_type} config: {' '.join(str(error).split())}"
        ) from error
    architectures = raw_config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(
            f"architectures of {config_file} must be a list of class names, got {architectures!r}."
        )
    checkpoint = Source(location, source_type, raw_config, config, modules)
    _refuse_config(checkpoint)
    return checkpoint


def _refuse_config(source: Source) -> None:
    """Raise a `ValueError` for decoders and for positions or activations unknown here."""
    raw_config, config = source.raw_config, source.config
    refuse_quantisation(raw_config, source.label)
    architectures = raw_config.get("architectures") or []
    decoders = [name for name in architectures if name.endswith(_DECODERS)]
    decoders += [f"{n}=true" for n in ("is_decoder", "add_cross_attention") if raw_config.get(n)]
    if decoders:
        raise ValueError(
            f"SOURCE {source.label} is a decoder ({', '.join(decoders)}), "
            "but MRA is attention of an encoder to itself; pass an encoder."
        )
    position_type = raw_config.get("position_embedding_type", "absolute")
    if position_type != "absolute":
        raise ValueError(
            f"SOURCE {source.label} has position_embedding_type {position_type!r}; "
            "only absolute positions can be converted."
        )
    check_int(f"pad_token_id of {source.label}", config.pad_token_id, 0)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} of {source.label} is not known here.")
    if source.learned_rows < 1:
        raise ValueError(
            f"max_position_embeddings of {source.label} leaves no positions, got "
            f"{config.max_position_embeddings} with pad_token_id {config.pad_token_id}."
        )


def open_tokenizer(
    source: Source, tokenizer: str | os.PathLike[str] | None
) -> PreTrainedTokenizerBase:
    """Open the tokenizer of the source, or the one in the directory or hub id `tokenizer`.

    Raises:
        OSError: there are no tokenizer files, or they cannot be opened.
        ValueError: the vocabulary is larger than the model's.
    """
    if tokenizer is None:
        label, folder, _ = source.location
    else:
        label, folder, _ = resolve_checkpoint(tokenizer, weights=False)
        folder = tokenizer_folder(folder)
    remedy = "pass the directory of a fitting one as tokenizer (--tokenizer)."
    if not any((folder / name).is_file() for name in VOCABULARY_NAMES):
        raise OSError(f"{label} has no tokenizer files; {remedy}")
    try:
        opened = AutoTokenizer.from_pretrained(
            folder, config=source.config, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer library raises its own
        message = " ".join(str(error).split())
        raise OSError(f"the tokenizer of {label} cannot be opened: {message}; {remedy}") from error
    vocabulary = opened.get_vocab()
    if len(vocabulary) <= len(set(opened.all_special_ids)):
        raise OSError(
            f"the tokenizer files of {label} hold no vocabulary "
            f"for its class {type(opened).__name__}; {remedy}"
        )
    if max(vocabulary.values()) >= source.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {label} has token ids up to {max(vocabulary.values())}, "
            f"but vocab_size of {source.label} is {source.config.vocab_size}; {remedy}"
        )
    return opened


def read_source_weights(source: Source) -> SourceWeights:
    """Read all tensors of the source and give each the name it has in RoBERTa.

    Raises:
        OSError, ValueError: as `read_weights`.
        ValueError: quantised weights, an adapter, or values that are not finite.
    """
    tensors = read_weights(source.location.folder)
    refuse_other_weights(tensors, source.label)
    _refuse_damaged(tensors)
    prefix = source.type.weight_prefix
    unwrapped = wrapper_patterns(tensors, prefix, source.label)
    patterns = {**unwrapped, **source.type.renamed_weights, rf"^{prefix}\.": "roberta."}
    if not any(_renamed(name, unwrapped).startswith(f"{prefix}.") for name in tensors):
        # Saved as a bare encoder.
        patterns[r"^(?=(embeddings|encoder|pooler)\.)"] = "roberta."
    names: dict[str, str] = {}
    for source_name in tensors:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", source_name))
        names.setdefault(_renamed(name, patterns), source_name)
    return SourceWeights(tensors, names)


def source_key_mapping(source: Source) -> dict[str, str]:
    """Patterns -> replacements with which `from_pretrained` reads what wrappers have renamed."""
    names = read_weights(source.location.folder)
    return wrapper_patterns(names, source.type.weight_prefix, source.label)


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def _refuse_damaged(tensors: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` for a tensor that holds NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not tensor.isfinite().all():
            held = "NaN" if tensor.isnan().any() else "inf"
            raise ValueError(
                f"the tensor {name} of the source holds {held}; it is corrupt, or was saved in a "
                "dtype that is too small for it (float16)."
            )


def find_head(source: Source, weights: SourceWeights, notes: list[str]) -> Head:
    """Return the head of the source; refuses heads that would compute something else here.

    Adds to `notes`. Renames the two layers of a pooled sequence classifier in `weights.names`.

    Raises:
        ValueError: the head cannot be expressed by one of this package.
    """
    notes += wrapper_note(weights.tensors, source.type.weight_prefix, source.label)
    head = _head_by_architecture(source)
    if head is None:
        head = _head_by_weights(source, weights)
        stated = source.raw_config.get("architectures") or "nothing"
        notes.append(
            f"architectures says {stated}; by its tensors it was taken for {head.class_name}."
        )
    _refuse_head(source, head)
    if source.type.pooled_classifier and head.ending == "ForSequenceClassification":
        names = weights.names
        for name in list(names):
            new_name = re.sub(r"^classifier\.", "classifier.out_proj.", name)
            new_name = re.sub(r"^roberta\.pooler\.dense\.", "classifier.dense.", new_name)
            names[new_name] = names.pop(name)
        notes.append(
            "The pooler and the classifier of BERT are the two layers of the classification head; "
            "in training, dropout acts before both."
        )
    return head


def _head_by_architecture(source: Source) -> Head | None:
    """The head that `architectures` in config.json names; None if it is none of ours."""
    prefixes = "|".join(source_type.class_prefix for source_type in SOURCE_TYPES.values())
    for architecture in source.raw_config.get("architectures") or ():
        if match := re.fullmatch(rf"(?:{prefixes})(Model|For\w+)", architecture):
            return CONVERTED_HEADS.get(match[1].replace("ForPreTraining", "ForMaskedLM"))
    return None


def _head_by_weights(source: Source, weights: SourceWeights) -> Head:
    """The first head whose weights are all there.

    Where a sequence classifier has a pooler too, a single output for several labels is a choice.
    """
    tensors, names = weights
    if "pre_classifier.weight" in names:  # of Transformers' own MRA
        return CONVERTED_HEADS["ForMultipleChoice"]
    head = next(head for head in CONVERTED_HEADS.values() if names.keys() >= set(head.weights))
    if head.ending == "ForMultipleChoice" and source.type.pooled_classifier:
        outputs = len(tensors[names["classifier.weight"]])
        if outputs != 1 or source.config.num_labels == 1:
            return CONVERTED_HEADS["ForSequenceClassification"]
    return head


def _refuse_head(source: Source, head: Head) -> None:
    reason = source.type.refused_heads.get(head.ending)
    if reason is not None:
        raise ValueError(
            f"SOURCE has the head {head.ending} of type {source.config.model_type}: {reason}. "
            "Convert its encoder or masked LM and fine-tune a new head."
        )
    hidden_act = source.config.hidden_act
    follows_config = source.type.lm_head_follows_config and head.ending == "ForMaskedLM"
    if follows_config and hidden_act not in GELU_NAMES:
        raise ValueError(
            f"SOURCE has an LM head with hidden_act {hidden_act!r}, but the LM head of the result "
            'always applies "gelu" and would compute something else; convert only its encoder '
            "(name a model without LM head in architectures) and train a new head."
        )
