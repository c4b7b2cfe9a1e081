"""The Long Range Arena encoder and its classifier of texts and of pairs of texts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_attention.order import inverse_order, patch_order
from mra_hf.adamra import AdaMraAttention
from mra_hf.lra.attention import Linformer, attention_layer
from mra_hf.lra.configuration import LraConfig
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


class LraPreTrainedModel(PreTrainedModel):
    """What the models share: their configuration and initial weights."""

    config_class = LraConfig
    base_model_prefix = "lra"
    supports_gradient_checkpointing = True
    # The losses are means over a batch, see MraPreTrainedMixin.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range)
        if isinstance(module, AdaMraAttention):
            module.reset_head_parameters()
        elif isinstance(module, Linformer):
            module.reset_projection()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embeddings.tokens = value


class LraModel(LraPreTrainedModel):
    """Encoder: two pre-norm layers, by default."""

    def __init__(self, config: LraConfig):
        super().__init__(config)
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
            input_ids: `[B, N]` int64; with a `grid`, N is its number of places.
            attention_mask: `[B, N]` bool or integer, nonzero at real tokens; None: all are.
            inputs_embeds: `[B, N, hidden_size]` in place of input_ids.
            output_hidden_states: return the states of all layers (of a grid patch by patch).
            output_attentions: must be off: there are no matrices.
            output_router_probs: return the router's probabilities of all layers (AdaMRA).
            return_dict: False for a tuple.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, a mask of another shape, more
                tokens than positions or another number than the grid has, or matrices asked for.
        """
        refuse_matrices(output_attentions)
        states = self.embeddings(input_ids, inputs_embeds)
        token_mask = to_token_mask(attention_mask, states.shape[:2])
        order = self._order(states)
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

    def _order(self, states: Tensor) -> Tensor | None:
        if self.config.grid is None:
            return None
        height, width = self.config.grid
        if states.shape[1] != height * width:
            raise ValueError(
                f"input_ids must hold the {height} x {width} = {height * width} places of the "
                f"grid, got {states.shape[1]}."
            )
        return patch_order(height, width, device=states.device)


class LraForSequenceClassification(LraPreTrainedModel):
    """The encoder, a mean over tokens, and a classifier; of pairs with `two_tower`."""

    def __init__(self, config: LraConfig):
        super().__init__(config)
        check_classes(config)
        self.lra = LraModel(config)
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
            input_ids, attention_mask: as `LraModel`.
            input_ids_2, attention_mask_2: the second text of a pair, likewise.
            labels: `[B]` int64, for a loss.
            return_dict: False for a tuple.
            **kwargs: as `LraModel`.

        Raises:
            ValueError: a second text without `two_tower`, or the other way round.
        """
        if (input_ids_2 is not None) != self.config.two_tower:
            raise ValueError(
                "input_ids_2 is the second text of a pair: pass it if and only if the "
                f"configuration has two_tower=True, which is {self.config.two_tower}."
            )
        encoded = self.lra(input_ids, attention_mask, **kwargs)
        features = self._pooled(encoded, attention_mask)
        shares, balance_loss = encoded.routing_shares, encoded.balance_loss
        if self.config.two_tower:
            other = self.lra(input_ids_2, attention_mask_2, **kwargs)
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
        token_mask = to_token_mask(attention_mask, states.shape[:2])
        return pooled(states, token_mask, self.config)
