"""The source of a conversion: its config, tokenizer, tensor names and head.

Everything that cannot be expressed exactly by a model of this package is refused here.
"""

import os
import re
from typing import Any

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
from mra_hf.configuration import BUILTIN_TYPE, MraConfig
from mra_hf.conversion.files import VOCABULARY_NAMES, CheckpointLocation, resolve_checkpoint
from mra_hf.conversion.report import PIPELINE_TAGS
from mra_hf.modeling import BUILTIN_KEYS, GELU_NAMES

SOURCE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "camembert": CamembertConfig,
    "bert": BertConfig,
    BUILTIN_TYPE: BuiltinConfig,
    MraConfig.model_type: MraConfig,
}
_ARCHITECTURE = re.compile(r"(?:Roberta|XLMRoberta|Camembert|Bert|Mra)(Model|For\w+)")
_DECODERS = ("LMHeadModel", "ForCausalLM")


def read_config(found: CheckpointLocation, raw: dict[str, Any]) -> PreTrainedConfig:
    """The source's config, with the defaults of its own type; refuses what cannot be converted."""
    source_type = raw.get("model_type")
    if not isinstance(source_type, str) or source_type not in SOURCE_CONFIGS:
        raise ValueError(
            f"SOURCE {found.label} is of model_type {source_type!r}, allowed are "
            f"{', '.join(SOURCE_CONFIGS)}."
        )
    try:
        config = SOURCE_CONFIGS[source_type].from_dict(dict(raw))
    except Exception as error:  # validation of several libraries
        raise ValueError(
            f"{found.folder / 'config.json'} is not a valid {source_type} config: "
            f"{' '.join(str(error).split())}"
        ) from error
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(
            f"architectures of {found.folder / 'config.json'} must be a list of class names, got "
            f"{architectures!r}."
        )
    decoders = [name for name in architectures if name.endswith(_DECODERS)]
    for name in ("is_decoder", "add_cross_attention"):
        decoders += [f"{name}=true"] if raw.get(name) else []
    if decoders:
        raise ValueError(
            f"SOURCE {found.label} is a decoder ({', '.join(decoders)}), but MRA is attention of "
            "an encoder to itself; pass an encoder."
        )
    kind = raw.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(
            f"SOURCE {found.label} has position_embedding_type {kind!r}; only absolute positions "
            "can be converted."
        )
    check_int(f"pad_token_id of {found.label}", config.pad_token_id, 0)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} of {found.label} is not known here.")
    if learned_rows(config) < 1:
        raise ValueError(
            f"max_position_embeddings of {found.label} leaves no positions, got "
            f"{config.max_position_embeddings} with pad_token_id {config.pad_token_id}."
        )
    return config


def reserved_rows(config: PreTrainedConfig) -> int:
    """Rows of the source's table in front of its first position."""
    return {"bert": 0, BUILTIN_TYPE: 2}.get(config.model_type, config.pad_token_id + 1)


def learned_rows(config: PreTrainedConfig) -> int:
    """Positions of the source, in tokens."""
    rows = config.max_position_embeddings
    return rows if config.model_type in ("bert", BUILTIN_TYPE) else rows - reserved_rows(config)


def open_tokenizer(
    found: CheckpointLocation, tokenizer: str | os.PathLike[str] | None, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """Open the tokenizer of the source, or the one in the directory or hub id `tokenizer`.

    Raises:
        OSError: there are no tokenizer files, or they cannot be opened.
        ValueError: the vocabulary is larger than the model's.
    """
    given = found if tokenizer is None else resolve_checkpoint(tokenizer, weights=False)
    remedy = "pass the directory of a fitting one as tokenizer (--tokenizer)."
    if not any((given.folder / name).is_file() for name in VOCABULARY_NAMES):
        raise OSError(f"{given.label} has no tokenizer files; {remedy}")
    try:
        opened = AutoTokenizer.from_pretrained(given.folder, config=config, trust_remote_code=False)
    except Exception as error:  # each tokenizer library raises its own
        said = " ".join(str(error).split())
        raise OSError(
            f"the tokenizer of {given.label} cannot be opened: {said}; {remedy}"
        ) from error
    vocabulary = opened.get_vocab()
    if len(vocabulary) <= len(set(opened.all_special_ids)):
        raise OSError(
            f"the tokenizer files of {given.label} hold no vocabulary for its class "
            f"{type(opened).__name__}; {remedy}"
        )
    if max(vocabulary.values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {given.label} has token ids up to {max(vocabulary.values())}, but "
            f"vocab_size of {found.label} is {config.vocab_size}; {remedy}"
        )
    return opened


def canonical_names(weights: dict[str, Tensor], source_type: str) -> dict[str, str]:
    """RoBERTa's name of every tensor -> its name in the source."""
    prefix = {"bert": "bert", BUILTIN_TYPE: "mra"}.get(source_type, "roberta")
    patterns = dict(BUILTIN_KEYS) if prefix != "roberta" else {}
    patterns[rf"^{prefix}\."] = "roberta."
    if not any(name.startswith(f"{prefix}.") for name in weights):  # saved as a bare encoder
        patterns[r"^(?=(embeddings|encoder|pooler)\.)"] = "roberta."
    names: dict[str, str] = {}
    for source_name in weights:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", source_name))
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        names.setdefault(name, source_name)
    return names


def find_head(
    raw_config: dict[str, Any],
    weights: dict[str, Tensor],
    names: dict[str, str],
    config: PreTrainedConfig,
    notes: list[str],
) -> str:
    """The head as the ending of a class name; refuses heads that would compute something else.

    Adds to `notes`, and renames the two layers of BERT's sequence classifier in `names`.
    """
    head = None
    for architecture in raw_config.get("architectures") or ():
        if match := _ARCHITECTURE.fullmatch(architecture):
            head = match[1].replace("ForPreTraining", "ForMaskedLM")
            break
    if head not in PIPELINE_TAGS:
        head = _infer_head(weights, names, config)
        stated = raw_config.get("architectures") or "nothing"
        notes.append(f"architectures says {stated}; by its tensors it was taken for Mra{head}.")
    by_builtin = config.model_type == BUILTIN_TYPE
    if by_builtin and head in ("ForSequenceClassification", "ForMultipleChoice"):
        reason = (
            "its head applies hidden_act where RoBERTa's applies tanh"
            if head == "ForSequenceClassification"
            else "its head (pre_classifier and ReLU) has no counterpart here"
        )
        raise ValueError(
            f"SOURCE has the head {head} of Transformers' own MRA: {reason}. Convert its encoder "
            "or masked LM and fine-tune a new head."
        )
    follows_config = by_builtin or config.model_type == "bert"
    if head == "ForMaskedLM" and follows_config and config.hidden_act not in GELU_NAMES:
        raise ValueError(
            f"SOURCE has an LM head with hidden_act {config.hidden_act!r}, but the LM head of the "
            'result always applies "gelu" and would compute something else; convert its encoder '
            "alone (name a model without LM head in architectures) and train a new one."
        )
    if config.model_type == "bert" and head == "ForSequenceClassification":
        for name in list(names):
            new = re.sub(r"^classifier\.", "classifier.out_proj.", name)
            new = re.sub(r"^roberta\.pooler\.dense\.", "classifier.dense.", new)
            names[new] = names.pop(name)
        notes.append(
            "The pooler and the classifier of BERT are the two layers of the classification head; "
            "in training, dropout acts before both."
        )
    return head


def _infer_head(weights: dict[str, Tensor], names: dict[str, str], config: PreTrainedConfig) -> str:
    """The head by the names of its tensors; a single output of several labels is a choice."""
    if "lm_head.dense.weight" in names:
        return "ForMaskedLM"
    if "qa_outputs.weight" in names:
        return "ForQuestionAnswering"
    if "classifier.dense.weight" in names:
        return "ForSequenceClassification"
    if "pre_classifier.weight" in names:
        return "ForMultipleChoice"
    if "classifier.weight" in names:
        if "roberta.pooler.dense.weight" not in names:
            return "ForTokenClassification"
        outputs = len(weights[names["classifier.weight"]])
        if config.model_type != "bert" or outputs == 1 != config.num_labels:
            return "ForMultipleChoice"
        return "ForSequenceClassification"
    return "Model"
