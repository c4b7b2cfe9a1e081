"""The one place with side effects: names given to Transformers. Everything here can be called
again.
"""

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    RobertaTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mra_hf import attention, modeling
from mra_hf.configuration import BUILTIN_TYPE, MraConfig
from mra_hf.encoders.configuration import AdaMraConfig, LraConfig
from mra_hf.encoders.images import MraForImageClassification, MraImageConfig
from mra_hf.encoders.modeling import (
    AdaMraForSequenceClassification,
    AdaMraModel,
    LraForSequenceClassification,
    LraModel,
)

AUTO_CLASSES = {
    AutoModel: modeling.MraModel,
    AutoModelForPreTraining: modeling.MraForMaskedLM,
    AutoModelForMaskedLM: modeling.MraForMaskedLM,
    AutoModelForSequenceClassification: modeling.MraForSequenceClassification,
    AutoModelForTokenClassification: modeling.MraForTokenClassification,
    AutoModelForQuestionAnswering: modeling.MraForQuestionAnswering,
    AutoModelForMultipleChoice: modeling.MraForMultipleChoice,
}


def register() -> None:
    """Register config, models, tokenizer and attention names. Called by `import mra_hf`."""
    AutoConfig.register(MraConfig.model_type, MraConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        # By class name "MraConfig" is taken by Transformers' own MRA, hence exist_ok.
        auto_class.register(MraConfig, model_class, exist_ok=True)
    AutoTokenizer.register(MraConfig, fast_tokenizer_class=RobertaTokenizer, exist_ok=True)
    AttentionInterface.register("mra2", attention.mra2_attention_forward)
    AttentionInterface.register("mra2_s", attention.mra2_s_attention_forward)
    AutoConfig.register(AdaMraConfig.model_type, AdaMraConfig, exist_ok=True)
    AutoModel.register(AdaMraConfig, AdaMraModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        AdaMraConfig, AdaMraForSequenceClassification, exist_ok=True
    )
    AutoConfig.register(LraConfig.model_type, LraConfig, exist_ok=True)
    AutoModel.register(LraConfig, LraModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        LraConfig, LraForSequenceClassification, exist_ok=True
    )
    AutoConfig.register(MraImageConfig.model_type, MraImageConfig, exist_ok=True)
    AutoModelForImageClassification.register(
        MraImageConfig, MraForImageClassification, exist_ok=True
    )
    for name in attention.ATTENTION_NAMES:
        AttentionMaskInterface.register(name, attention.mra2_mask)


def replace_builtin_mra() -> None:
    """Let Auto classes open directories of Transformers' own type `"mra"` with our classes.

    For this process. Saved again, they are of type `"mra_hf"`.
    """
    CONFIG_MAPPING.register(BUILTIN_TYPE, MraConfig, exist_ok=True)
