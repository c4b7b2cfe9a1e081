"""The pre-norm encoder that all small models share, around any attention layer.

An attention layer is a module `layer(hidden_states [B, N, C], token_mask [B, N] bool or None)` that
returns `[B, N, C]` and a `Routing` if it routes its queries, else None.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from mra_hf.remote_code import OwnCode, OwnConfig, check_config_class


@dataclass
class EncoderOutput(ModelOutput):
    """Output of an encoder.

    Args:
        last_hidden_state: `[B, N, C]`, 0 at padding.
        hidden_states: the embeddings and the output of each layer, if requested.
        routing_shares: `[layers, H]`, the share of the real tokens that each head received; None
            without routing.
        balance_loss: load-balancing loss, the mean over layers; None without routing.
        router_probs: `[B, N, H]` for each layer, if requested.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing_shares: Tensor | None = None
    balance_loss: Tensor | None = None
    router_probs: tuple[Tensor, ...] | None = None


@dataclass
class ClassifierOutput(ModelOutput):
    """Output of a classifier: `loss` (which includes the balance loss times its coefficient),
    `logits` `[B, labels]`, and the fields of `EncoderOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing_shares: Tensor | None = None
    balance_loss: Tensor | None = None
    router_probs: tuple[Tensor, ...] | None = None


#: Fields that `Trainer` must not collect as predictions.
NO_PREDICTIONS = ("hidden_states", "routing_shares", "balance_loss", "router_probs")


class Routing(NamedTuple):
    """What the router of a layer decided.

    Attributes:
        probabilities: `[B, N, H]` float32; uniform under "random" routing.
        heads: `[B, N]` int64, the head of each query; None under "soft" routing.
        shares: `[H]` float32 without gradient, the share of the real tokens that each head receives
            (under "soft" routing, its mean probability).
        balance_loss: H times the sum over heads of share times mean probability; 1 when balanced.
    """

    probabilities: Tensor
    heads: Tensor | None
    shares: Tensor
    balance_loss: Tensor


class TokenEmbeddings(nn.Module):
    """The sum of token embeddings and learned absolute positions, with dropout."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`[B, N]` ids or `[B, N, C]` token embeddings -> `[B, N, C]`.

        Raises:
            ValueError: both or neither are given, no tokens, or more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds.")
        tokens = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, rows = tokens.shape[1], self.positions.num_embeddings
        if not length:
            raise ValueError("input_ids must hold at least one token, got none.")
        if length > rows:
            raise ValueError(
                f"input_ids has {length} tokens, and the position table {rows} rows; "
                "cut the input or build the model with a larger max_position_embeddings."
            )
        return self.dropout(tokens + self.positions.weight[:length])


class PreNormLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: PreTrainedConfig, attention: nn.Module):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2)
        )
        self.attention = attention
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple:
        """The new hidden states, followed by the fields of the `Routing` if there is one:
        checkpointing only finds tensors in a plain tuple.
        """
        attended, routing = self.attention(self.attention_norm(hidden_states), token_mask)
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.dropout(F.gelu(self.up(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(self.down(inner)), *(routing or ())


class PreNormEncoder(nn.Module):
    """Pre-norm layers and a final norm.

    Args:
        config: sizes.
        attentions: one attention layer for each encoder layer.
    """

    def __init__(self, config: PreTrainedConfig, attentions: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(PreNormLayer(config, attention) for attention in attentions)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        *,
        output_hidden_states: bool = False,
        output_router_probs: bool = False,
    ) -> EncoderOutput:
        """Encode `[B, N, C]` embeddings under a `[B, N]` bool mask or None."""
        if token_mask is not None:  # padding may hold anything
            hidden_states = hidden_states.masked_fill(~token_mask[..., None], 0)
        states = [hidden_states]
        routings: list[Routing] = []
        for layer in self.layers:
            hidden_states, *routing = layer(hidden_states, token_mask)
            states.append(hidden_states)
            if routing:
                routings.append(Routing(*routing))
        output = self.norm(hidden_states)
        if token_mask is not None:
            output = output.masked_fill(~token_mask[..., None], 0)
        routed: dict[str, Any] = {}
        if routings:
            routed["routing_shares"] = torch.stack([r.shares for r in routings])
            routed["balance_loss"] = torch.stack([r.balance_loss for r in routings]).mean()
            if output_router_probs:
                routed["router_probs"] = tuple(r.probabilities for r in routings)
        return EncoderOutput(
            last_hidden_state=output,
            hidden_states=tuple(states) if output_hidden_states else None,
            **routed,
        )


class Classifier(nn.Module):
    """Linear, ReLU, linear: `[B, C]` -> `[B, labels]`."""

    def __init__(self, features: int, hidden_size: int, labels: int):
        super().__init__()
        self.hidden = nn.Linear(features, hidden_size)
        self.out = nn.Linear(hidden_size, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(features)))


def pooled(hidden_states: Tensor, token_mask: Tensor | None, config: PreTrainedConfig) -> Tensor:
    """Mean of `[B, N, C]` over real tokens, `[B, C]`. Under "mean_over_all" the sum is divided by
    `max_position_embeddings`, the length to which the published code pads every text with zeros.
    """
    if token_mask is not None:
        hidden_states = hidden_states.masked_fill(~token_mask[..., None], 0)
    sums = hidden_states.sum(1)
    if config.pooling == "mean_over_all":
        return sums / config.max_position_embeddings
    if token_mask is None:
        return sums / hidden_states.shape[1]
    return sums / token_mask.sum(1, keepdim=True).clamp_min(1)


def to_token_mask(attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The 2-D mask as bool; `shape` is `[B, N]`.

    Raises:
        ValueError: a mask of another shape, or an additive (floating-point) one.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != shape or attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {tuple(shape)}, bool or integer, "
            f"got {attention_mask.dtype} {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def refuse_matrices(output_attentions: bool | None) -> None:
    """Raise a `ValueError` if attention matrices are requested."""
    if output_attentions:
        raise ValueError(
            "output_attentions=True asks for matrices that this attention never has; leave it off."
        )


def check_classes(config: OwnConfig) -> None:
    """Raise a `ValueError` unless the configuration asks for one of two or more classes."""
    if config.num_labels < 2:
        raise ValueError(
            f"num_labels must be at least 2, got {config.num_labels}: this model chooses a class."
        )
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            'problem_type must be None or "single_label_classification", '
            f"got {config.problem_type!r}: this model chooses one class."
        )


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> None:
    """Embeddings N(0, std), linear layers Glorot uniform with zero biases, norms 1 and 0."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0, std)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class PreNormPreTrainedModel(OwnCode, PreTrainedModel):
    """Base class of all models around the encoder: initial weights, and the token table.

    A module with parameters of its own initialises them in `reset_own_parameters`.
    """

    supports_gradient_checkpointing = True
    # The losses are means over a batch, see MraPreTrainedMixin.
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig):
        config_class = type(self).config_class
        assert config_class is not None
        check_config_class(config, config_class)
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range)
        reset = getattr(module, "reset_own_parameters", None)
        if reset is not None:
            reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule("embeddings.tokens")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.get_submodule("embeddings").tokens = value
