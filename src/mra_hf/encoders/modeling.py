"""The Long Range Arena encoder and its classifier of texts and of pairs of texts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mra_attention.order import patch_order
from mra_hf.encoders.configuration import LraConfig
from mra_hf.encoders.layers import attention_layer
from mra_hf.encoders.prenorm import (
    Classifier,
    ClassifierOutput,
    EncoderOutput,
    PreNormModel,
    PreNormPreTrainedModel,
    check_classes,
    pooled,
    to_token_mask,
)


class LraPreTrainedModel(PreNormPreTrainedModel):
    """What the models of the arena share."""

    config_class = LraConfig
    base_model_prefix = "lra"


class LraModel(LraPreTrainedModel, PreNormModel):
    """Encoder: two pre-norm layers, by default."""

    def __init__(self, config: LraConfig):
        super().__init__(config, attention_layer)

    def order(self, length: int, device: torch.device) -> Tensor | None:
        """Patches of 4 x 8 where the configuration has a grid.

        Raises:
            ValueError: another number of tokens than the grid has.
        """
        if self.config.grid is None:
            return None
        height, width = self.config.grid
        if length != height * width:
            raise ValueError(
                f"input_ids must hold the {height} x {width} = {height * width} places of the "
                f"grid, got {length}."
            )
        return patch_order(height, width, device=device)


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
