"""Multi-resolution attention for RoBERTa-family encoders: convert, run and train at 4096 tokens.

Importing this package registers its classes with Transformers' Auto classes and the attention names
`"mra2"` and `"mra2_s"` with the attention interface.
"""

from mra_hf.attention import set_attention
from mra_hf.configuration import MraConfig
from mra_hf.conversion import ConversionReport, convert_checkpoint
from mra_hf.encoders.adamra import AdaMraAttention
from mra_hf.encoders.configuration import AdaMraConfig, LraConfig
from mra_hf.encoders.images import MraForImageClassification, MraImageConfig
from mra_hf.encoders.modeling import (
    AdaMraForSequenceClassification,
    AdaMraModel,
    LraForSequenceClassification,
    LraModel,
)
from mra_hf.modeling import (
    MraForCandidateChoice,
    MraForMaskedLM,
    MraForMultipleChoice,
    MraForQuestionAnswering,
    MraForSequenceClassification,
    MraForTokenClassification,
    MraModel,
)
from mra_hf.registration import register, replace_builtin_mra
from mra_hf_cli import __version__ as __version__

__all__ = [
    "AdaMraAttention",
    "AdaMraConfig",
    "AdaMraForSequenceClassification",
    "AdaMraModel",
    "ConversionReport",
    "LraConfig",
    "LraForSequenceClassification",
    "LraModel",
    "MraConfig",
    "MraForCandidateChoice",
    "MraForImageClassification",
    "MraForMaskedLM",
    "MraForMultipleChoice",
    "MraForQuestionAnswering",
    "MraForSequenceClassification",
    "MraForTokenClassification",
    "MraImageConfig",
    "MraModel",
    "convert_checkpoint",
    "replace_builtin_mra",
    "set_attention",
]

register()
