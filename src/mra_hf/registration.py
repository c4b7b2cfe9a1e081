"""The only module with side effects: the names given to Transformers. Everything here can be called
again.
"""

from typing import Any, TypeAlias

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mra_hf import attention
from mra_hf.configuration import BUILTIN_TYPE, MraConfig
from mra_hf.encoders.configuration import AdaMraConfig, LraConfig
from mra_hf.encoders.images import MraForImageClassification, MraImageConfig
from mra_hf.encoders.modeling import (
    AdaMraForSequenceClassification,
    AdaMraModel,
    LraForSequenceClassification,
    LraModel,
)
from mra_hf.modeling import HEADS
from mra_hf.remote_code import add_model_class

_Classes: TypeAlias = tuple[type[PreTrainedConfig], type[PreTrainedModel], tuple[Any, ...]]

#: (configuration, model class, Auto classes) of the small encoders.
ENCODERS: tuple[_Classes, ...] = (
    (AdaMraConfig, AdaMraModel, (AutoModel,)),
    (AdaMraConfig, AdaMraForSequenceClassification, (AutoModelForSequenceClassification,)),
    (LraConfig, LraModel, (AutoModel,)),
    (LraConfig, LraForSequenceClassification, (AutoModelForSequenceClassification,)),
    (MraImageConfig, MraForImageClassification, (AutoModelForImageClassification,)),
)


def register() -> None:
    """Register config, models, tokenizer and attention names. Called by `import mra_hf`."""
    heads: tuple[_Classes, ...] = tuple(
        (MraConfig, head.model_class, head.auto_classes) for head in HEADS
    )
    for config_class, model_class, auto_classes in heads + ENCODERS:
        # By class name "MraConfig" is taken by Transformers' own MRA, hence exist_ok.
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in auto_classes:
            auto_class.register(config_class, model_class, exist_ok=True)
        add_model_class(config_class, model_class, auto_classes)
    AutoTokenizer.register(MraConfig, fast_tokenizer_class=RobertaTokenizer, exist_ok=True)
    AttentionInterface.register("mra2", attention.mra2_attention_forward)
    AttentionInterface.register("mra2_s", attention.mra2_s_attention_forward)
    for name in attention.ATTENTION_NAMES:
        AttentionMaskInterface.register(name, attention.mra2_mask)


def replace_builtin_mra() -> None:
    """Let Auto classes open directories of Transformers' own type `"mra"` with our classes.

    For this process. Saved again, they are of type `"mra_hf"`.
    """
    CONFIG_MAPPING.register(BUILTIN_TYPE, MraConfig, exist_ok=True)
