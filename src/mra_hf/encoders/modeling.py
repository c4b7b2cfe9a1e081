"""The small encoder of the Long Range Arena and its classifier of texts and of pairs of texts.

The AdaMRA models are the same classes, bound to `AdaMraConfig`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from mra_attention.order import inverse_order, patch_order
from mra_hf.encoders.configuration import AdaMraConfig, LraConfig
from mra_hf.encoders.methods import METHODS
from mra_hf.encoders.prenorm import (
    Classifier,
    ClassifierOutput,
    EncoderOutput,
    PreNormEncoder,
    PreNormPreTrainedModel,
    TokenEmbeddings,
    check_classes,
    pooled,
    refuse_matrices,
    to_token_mask,
)


class LraModel(PreNormPreTrainedModel):
    """Embeddings and pre-norm layers, two by default.

    Args:
        config: sizes, and the attention, a key of `METHODS`.
    """

    config_class: type[PreTrainedConfig] = LraConfig
    base_model_prefix = "lra"

    def __init__(self, config: LraConfig | AdaMraConfig):
        super().__init__(config)
        attention_layer = METHODS[config.attention].layer
        assert attention_layer is not None  # `ARENA_ATTENTIONS`
        self.embeddings = TokenEmbeddings(config)
        layers = range(config.num_hidden_layers)
        self.encoder = PreNormEncoder(config, [attention_layer(config, layer) for layer in layers])
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
            input_ids: `[B, N]` int64; N = height x width where the configuration has a grid.
            attention_mask: `[B, N]` bool or integer, nonzero at real tokens; None: all are real.
            inputs_embeds: `[B, N, hidden_size]` in place of input_ids.
            output_hidden_states: return the states of all layers (of a grid, patch by patch).
            output_attentions: must be off: there are no matrices.
            output_router_probs: return the router's probabilities of all layers (AdaMRA).
            return_dict: False for a tuple.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, a mask of another shape,
                more tokens than positions, a number of tokens that is not the grid's, or matrices
                requested.
        """
        refuse_matrices(output_attentions)
        states = self.embeddings(input_ids, inputs_embeds)
        token_mask = to_token_mask(attention_mask, states.shape[:2])
        order = self._patch_order(states.shape[1], states.device)
        if order is not None:
            states = states[:, order]
            token_mask = None if token_mask is None else token_mask[:, order]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.encoder(
            states,
            token_mask,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
        )
        if order is not None:
            output.last_hidden_state = output.last_hidden_state[:, inverse_order(order)]
        return output if return_dict is not False else output.to_tuple()

    def _patch_order(self, length: int, device: torch.device) -> Tensor | None:
        """Order of the tokens in the layers, `[N]` int64: patches of 4 x 8; None without a grid."""
        if self.config.grid is None:
            return None
        height, width = self.config.grid
        if length != height * width:
            raise ValueError(
                f"input_ids must hold the {height} x {width} = {height * width} positions of the "
                f"grid, got {length}."
            )
        return patch_order(height, width, device=device)


class LraForSequenceClassification(PreNormPreTrainedModel):
    """The encoder, mean pooling and a classifier with a hidden layer; with `two_tower`, of pairs of
    texts.
    """

    config_class: type[PreTrainedConfig] = LraConfig
    base_model_prefix = "lra"
    encoder_class: ClassVar[type[LraModel]] = LraModel

    def __init__(self, config: LraConfig | AdaMraConfig):
        super().__init__(config)
        check_classes(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        features = config.hidden_size * (4 if config.two_tower else 1)
        self.classifier = Classifier(features, config.classifier_hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids_2: Tensor | None = None,
        attention_mask_2: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ClassifierOutput | tuple:
        """Classify.

        Args:
            input_ids, attention_mask: as in `LraModel`.
            input_ids_2, attention_mask_2: the second text of a pair.
            labels: `[B]` int64, for a loss.
            return_dict: False for a tuple.
            **kwargs: further arguments of `LraModel`, such as `inputs_embeds`.

        Raises:
            ValueError: a second text without `two_tower`, or `two_tower` without a second text.
        """
        if (input_ids_2 is not None) != self.config.two_tower:
            raise ValueError(
                "input_ids_2 is the second text of a pair: pass it if and only if the "
                f"configuration has two_tower=True, which is {self.config.two_tower}."
            )
        encoded = self.base_model(input_ids, attention_mask, **kwargs)
        features = self._pooled(encoded, attention_mask)
        shares, balance_loss = encoded.routing_shares, encoded.balance_loss
        if self.config.two_tower:
            other = self.base_model(input_ids_2, attention_mask_2, **kwargs)
            second = self._pooled(other, attention_mask_2)
            features = torch.cat([features, second, features * second, features - second], -1)
            if shares is not None:
                shares = (shares + other.routing_shares) / 2
                balance_loss = (balance_loss + other.balance_loss) / 2
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
            if balance_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * balance_loss
        output = ClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            routing_shares=shares,
            balance_loss=balance_loss,
            router_probs=encoded.router_probs,
        )
        return output if return_dict is not False else output.to_tuple()

    def _pooled(self, encoded: EncoderOutput, attention_mask: Tensor | None) -> Tensor:
        states = encoded.last_hidden_state
        assert states is not None
        token_mask = to_token_mask(attention_mask, states.shape[:2])
        return pooled(states, token_mask, self.config)


class AdaMraModel(LraModel):
    """`LraModel` with AdaMRA attention; its cost is linear in the number of tokens."""

    config_class = AdaMraConfig
    base_model_prefix = "adamra"


class AdaMraForSequenceClassification(LraForSequenceClassification):
    """`LraForSequenceClassification` with AdaMRA attention, for single texts."""

    config_class = AdaMraConfig
    base_model_prefix = "adamra"
    encoder_class = AdaMraModel
