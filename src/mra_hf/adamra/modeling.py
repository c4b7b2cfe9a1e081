"""The AdaMRA models: a pre-norm encoder with `AdaMraAttention`, and a classifier on it."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_hf.adamra.attention import AdaMraAttention
from mra_hf.adamra.configuration import AdaMraConfig
from mra_hf.prenorm import (
    Classifier,
    ClassifierOutput,
    EncoderOutput,
    PreNormEncoder,
    TokenEmbeddings,
    check_classes,
    initialise,
    pooled,
    refuse_matrices,
    to_token_mask,
)


class AdaMraPreTrainedModel(PreTrainedModel):
    """What the AdaMRA models share: their configuration and initial weights."""

    config_class = AdaMraConfig
    base_model_prefix = "adamra"
    supports_gradient_checkpointing = True
    # The losses are means over a batch, see MraPreTrainedMixin.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range)
        if isinstance(module, AdaMraAttention):
            module.reset_head_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embeddings.tokens = value


class AdaMraModel(AdaMraPreTrainedModel):
    """Encoder; its cost is linear in the number of tokens."""

    def __init__(self, config: AdaMraConfig):
        super().__init__(config)
        self.embeddings = TokenEmbeddings(config)
        layers = range(config.num_hidden_layers)
        self.encoder = PreNormEncoder(config, [AdaMraAttention(config, layer) for layer in layers])
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_probs: bool = False,
        return_dict: bool | None = None,
    ) -> EncoderOutput | tuple:
        """Encode.

        Args:
            input_ids: `[B, N]` int64.
            attention_mask: `[B, N]` bool or integer, nonzero at real tokens; None: all are.
            inputs_embeds: `[B, N, hidden_size]` in place of input_ids.
            output_hidden_states: return the states of all layers.
            output_attentions: must be off: there are no matrices.
            output_router_probs: return the router's probabilities of all layers.
            return_dict: False for a tuple.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, a mask of another shape, more
                tokens than positions, or matrices asked for.
        """
        refuse_matrices(output_attentions)
        hidden_states = self.embeddings(input_ids, inputs_embeds)
        token_mask = to_token_mask(attention_mask, hidden_states.shape[:2])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.encoder(
            hidden_states,
            token_mask,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
        )
        return output if return_dict is not False else output.to_tuple()


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
