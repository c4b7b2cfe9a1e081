"""AdaMRA: attention with a resolution of its own for every head, and a router between them."""

from mra_hf.adamra.attention import AdaMraAttention
from mra_hf.adamra.configuration import AdaMraConfig
from mra_hf.adamra.modeling import AdaMraForSequenceClassification, AdaMraModel

__all__ = ["AdaMraAttention", "AdaMraConfig", "AdaMraForSequenceClassification", "AdaMraModel"]
