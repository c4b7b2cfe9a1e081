"""The AdaMRA models: a pre-norm encoder with `AdaMraAttention`, and a classifier on it."""

import torch.nn.functional as F
from torch import Tensor

from mra_hf.encoders.adamra import AdaMraAttention
from mra_hf.encoders.adamra_configuration import AdaMraConfig
from mra_hf.encoders.prenorm import (
    Classifier,
    ClassifierOutput,
    PreNormModel,
    PreNormPreTrainedModel,
    check_classes,
    pooled,
    to_token_mask,
)


class AdaMraPreTrainedModel(PreNormPreTrainedModel):
    """What the AdaMRA models share."""

    config_class = AdaMraConfig
    base_model_prefix = "adamra"


class AdaMraModel(AdaMraPreTrainedModel, PreNormModel):
    """Encoder; its cost is linear in the number of tokens."""

    def __init__(self, config: AdaMraConfig):
        super().__init__(config, AdaMraAttention)


class AdaMraForSequenceClassification(AdaMraPreTrainedModel):
    """The encoder, a mean over tokens, and a classifier with a hidden layer."""

    def __init__(self, config: AdaMraConfig):
        super().__init__(config)
        check_classes(config)
        self.adamra = AdaMraModel(config)
        self.classifier = Classifier(
            config.hidden_size, config.classifier_hidden_size, config.num_labels
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ClassifierOutput | tuple:
        """Classify; `labels` `[B]` int64 give a loss. The rest as `AdaMraModel`."""
        encoded = self.adamra(input_ids, attention_mask, inputs_embeds, **kwargs)
        states = encoded.last_hidden_state
        token_mask = to_token_mask(attention_mask, states.shape[:2])
        logits = self.classifier(pooled(states, token_mask, self.config))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
            loss = loss + self.config.router_aux_loss_coef * encoded.balance_loss
        output = ClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            routing_shares=encoded.routing_shares,
            balance_loss=encoded.balance_loss,
            router_probs=encoded.router_probs,
        )
        return output if return_dict is not False else output.to_tuple()
