"""The small pre-norm encoder of the Long Range Arena, around any attention layer.

An attention layer is a module `layer(hidden_states [B, N, C], token_mask [B, N] bool or None)` that
returns `[B, N, C]` and, if it routes its queries, a `Routing`, else None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from mra_attention.order import inverse_order


@dataclass
class EncoderOutput(ModelOutput):
    """What an encoder returns.

    Args:
        last_hidden_state: `[B, N, C]`, 0 at padding.
        hidden_states: embeddings and the states behind each layer, when asked for.
        routing_shares: `[layers, H]`, the share of the real tokens that each head got, where the
            attention routes.
        balance_loss: mean over layers of the load-balancing loss, likewise.
        router_probs: `[B, N, H]` of each layer, when asked for.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routing_shares: Tensor | None = None
    balance_loss: Tensor | None = None
    router_probs: tuple[Tensor, ...] | None = None


@dataclass
class ClassifierOutput(ModelOutput):
    """What a classifier returns: `loss` and `logits` `[B, labels]`, then as `EncoderOutput`; the
    loss holds the balance loss times its coefficient.
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
        probabilities: `[B, N, H]` float32; of a router that is not asked ("random") uniform.
        heads: `[B, N]` int64, the head of each query; None under "soft" routing.
        shares: `[H]` float32, without gradient: the share of the real tokens that a head gets (its
            mean probability under "soft" routing).
        balance_loss: H times the sum over heads of share times mean probability; 1 when balanced.
    """

    probabilities: Tensor
    heads: Tensor | None
    shares: Tensor
    balance_loss: Tensor


class TokenEmbeddings(nn.Module):
    """Tokens and learned absolute positions, added, with dropout."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`[B, N]` ids or `[B, N, C]` embeddings of tokens -> `[B, N, C]`.

        Raises:
            ValueError: both or none are given, no tokens, or more than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds.")
        tokens = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length, rows = tokens.shape[1], self.positions.num_embeddings
        if not length:
            raise ValueError("input_ids must hold at least one token, got none.")
        if length > rows:
            raise ValueError(
                f"input_ids has {length} tokens, and the position table {rows} rows; cut the input "
                "or build the model with a larger max_position_embeddings."
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
        """States, and the fields of the `Routing` if there is one: checkpointing sees tensors in a
        plain tuple alone.
        """
        attended, routing = self.attention(self.attention_norm(hidden_states), token_mask)
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.dropout(F.gelu(self.up(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(self.down(inner)), *(routing or ())


class PreNormEncoder(nn.Module):
    """Layers and a last norm.

    Args:
        config: sizes.
        attentions: an attention layer for each layer.
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
        """`[B, N, C]` embeddings and `[B, N]` bool or None."""
        if token_mask is not None:  # padding may hold anything
            hidden_states = hidden_states.masked_fill(~token_mask[..., None], 0)
        states, routings = [hidden_states], []
        for layer in self.layers:
            hidden_states, *routing = layer(hidden_states, token_mask)
            states.append(hidden_states)
            if routing:
                routings.append(Routing(*routing))
        output = self.norm(hidden_states)
        if token_mask is not None:
            output = output.masked_fill(~token_mask[..., None], 0)
        return EncoderOutput(
            last_hidden_state=output,
            hidden_states=tuple(states) if output_hidden_states else None,
            routing_shares=torch.stack([r.shares for r in routings]) if routings else None,
            balance_loss=torch.stack([r.balance_loss for r in routings]).mean()
            if routings
            else None,
            router_probs=tuple(r.probabilities for r in routings)
            if routings and output_router_probs
            else None,
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
    """Mean of `[B, N, C]` over tokens, `[B, C]`: over real tokens, or under "mean_over_all" over
    `max_position_embeddings` places, to which the published code pads every text with zeros.
    """
    if token_mask is not None:
        hidden_states = hidden_states.masked_fill(~token_mask[..., None], 0)
    sums = hidden_states.sum(1)
    if config.pooling == "mean_over_all":
        return sums / config.max_position_embeddings
    if token_mask is None:
        return sums / hidden_states.shape[1]
    return sums / token_mask.sum(1, keepdim=True).clamp_min(1)


def to_token_mask(attention_mask: Tensor | None, places: torch.Size) -> Tensor | None:
    """The 2-D mask `[B, N]` as bool.

    Raises:
        ValueError: another shape, or a mask to be added to logits.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != places or attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {tuple(places)}, bool or integer, got "
            f"{attention_mask.dtype} {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def refuse_matrices(output_attentions: bool | None) -> None:
    """Raise a `ValueError` if attention matrices are asked for."""
    if output_attentions:
        raise ValueError(
            "output_attentions=True asks for matrices that this attention never has; leave it off."
        )


def check_classes(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless the configuration asks for one of two classes or more."""
    if config.num_labels < 2:
        raise ValueError(
            f"num_labels must be at least 2, got {config.num_labels}: this model chooses a class."
        )
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f'problem_type must be None or "single_label_classification", got '
            f"{config.problem_type!r}: this model chooses one class."
        )


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> None:
    """Embeddings N(0, std), linear layers uniform after Glorot with zero biases, norms 1 and 0."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, 0, std)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class PreNormPreTrainedModel(PreTrainedModel):
    """What all models around the encoder share: initial weights, and the table of tokens.

    A module that holds parameters of its own has `reset_own_parameters`.
    """

    supports_gradient_checkpointing = True
    # The losses are means over a batch, see MraPreTrainedMixin.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range)
        if hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embeddings.tokens = value


class PreNormModel(PreNormPreTrainedModel):
    """Embeddings and encoder.

    Args:
        config: sizes.
        attention_layer: called as `attention_layer(config, layer_idx)` for each layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        attention_layer: Callable[[PreTrainedConfig, int], nn.Module],
    ):
        super().__init__(config)
        self.embeddings = TokenEmbeddings(config)
        layers = range(config.num_hidden_layers)
        self.encoder = PreNormEncoder(config, [attention_layer(config, layer) for layer in layers])
        self.post_init()

    def order(self, length: int, device: torch.device) -> Tensor | None:
        """The order that tokens are put in for the layers, `[N]` int64; None: as they come."""
        return None

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
            input_ids: `[B, N]` int64; N is that of the grid where the configuration has one.
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
        order = self.order(states.shape[1], states.device)
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
