"""The encoder of the Long Range Arena, with any of several attentions."""

from mra_hf.lra.configuration import LraConfig
from mra_hf.lra.modeling import LraForSequenceClassification, LraModel

__all__ = ["LraConfig", "LraForSequenceClassification", "LraModel"]
