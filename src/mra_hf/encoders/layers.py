"""The attention layers of the Long Range Arena encoder, all called as `prenorm` says.

A layer is built by `layer(config, layer_idx)` from an `LraConfig` (or another configuration with
the fields it reads); `encoders.methods.METHODS` lists the layers by name.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LongformerConfig, NystromformerConfig, PreTrainedConfig

from mra_attention import mra2_attention
from mra_attention.blocks import compute_dtype, count_blocks
from mra_attention.checks import refuse_tracing
from mra_hf.baselines.kernelized import linear, linformer, orthogonal_directions, performer


class MultiHeadLayer(nn.Module):
    """Projections to heads, attention within each head, and an output projection.

    Args:
        config: sizes.
        attention: a module `attention(query, key, value, token_mask)` of `[B, H, N, D]`.
    """

    def __init__(self, config: PreTrainedConfig, attention: nn.Module):
        super().__init__()
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attend = attention

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if getattr(self.attend, "handles_precision", False):
            output = self.attend(query, key, value, token_mask)
        else:  # in float32, as in the published runs
            wide = (x.to(compute_dtype(x.dtype)) for x in (query, key, value))
            with torch.autocast(query.device.type, enabled=False):
                output = self.attend(*wide, token_mask).to(query.dtype)
        return self.output(output.transpose(1, 2).flatten(2)), None


def multi_head(
    attention_class: Callable[[PreTrainedConfig, int], nn.Module],
) -> Callable[[PreTrainedConfig, int], MultiHeadLayer]:
    """The factory of layers with this attention within each head."""
    return lambda config, layer_idx: MultiHeadLayer(config, attention_class(config, layer_idx))


class DenseAttention(nn.Module):
    """Softmax attention, with dropout on its weights in training."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, query, key, value, token_mask):
        mask = None
        if token_mask is not None:  # a sample without any token attends to its padding
            mask = (token_mask | ~token_mask.any(-1, keepdim=True))[:, None, None]
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)


class Mra2Attention(nn.Module):
    """MRA-2, or MRA-2-s for `attention="mra2_s"`."""

    handles_precision = True

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        self.settings: dict[str, Any] = {
            "approx_mode": "sparse" if config.attention == "mra2_s" else "full",
            "block_per_row": config.block_per_row,
            "block_size": config.block_size,
            "initial_prior_first_n_blocks": config.initial_prior_first_n_blocks,
            "initial_prior_diagonal_n_blocks": config.initial_prior_diagonal_n_blocks,
            "selection": config.selection,
        }

    def forward(self, query, key, value, token_mask):
        return mra2_attention(query, key, value, token_mask, **self.settings)


class LinearAttention(nn.Module):
    """Kernelized attention with ELU + 1, the Linear Transformer's."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()

    def forward(self, query, key, value, token_mask):
        return linear(query, key, value, token_mask)


class LinformerAttention(nn.Module):
    """Learned projections of the length, one per head, shared by keys and values."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        shape = (config.num_attention_heads, config.size, config.max_position_embeddings)
        self.projection = nn.Parameter(torch.empty(shape))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Draw the projections, N(0, 1 / projected length)."""
        nn.init.normal_(self.projection, 0, self.projection.shape[1] ** -0.5)

    def forward(self, query, key, value, token_mask):
        if token_mask is not None:
            key, value = (x.masked_fill(~token_mask[:, None, :, None], 0) for x in (key, value))
        projection = self.projection[..., : key.shape[2]]
        scale = query.shape[-1] ** -0.5
        return linformer(query, key, value, scale=scale, size=0, projection=projection)


class PerformerAttention(nn.Module):
    """Random features, drawn once for each layer and saved with its weights."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        dim = config.hidden_size // config.num_attention_heads
        self.register_buffer("directions", orthogonal_directions(config.size, dim, layer_idx))

    def forward(self, query, key, value, token_mask):
        directions = self.directions.to(query.dtype)
        settings: dict[str, Any] = {"size": 0, "directions": directions, "token_mask": token_mask}
        return performer(query, key, value, scale=query.shape[-1] ** -0.5, **settings)


class NystromformerLayer(nn.Module):
    """Transformers' Nystromformer attention without its convolution.

    Landmarks average over padding (zeros) too, as published. The iteration for the inverse starts
    from each matrix alone; in Transformers its start depends on the whole batch.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        from transformers.models.nystromformer.modeling_nystromformer import (
            NystromformerSelfAttention,
        )

        self.landmarks = config.size
        sizes = NystromformerConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_landmarks=config.size,
            segment_means_seq_len=config.max_position_embeddings,
            attention_probs_dropout_prob=0.0,
        )
        self.attend = NystromformerSelfAttention(sizes)
        self.attend.conv_kernel_size = None
        self.attend.iterative_inv = iterative_inverse  # type: ignore[method-assign]
        if hasattr(self.attend, "conv"):
            del self.attend.conv
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, None]:
        length = hidden_states.shape[1]
        if token_mask is not None:
            hidden_states = hidden_states.masked_fill(~token_mask[..., None], 0)
        states, mask = _padded(hidden_states, token_mask, self.landmarks)
        self.attend.seq_len = states.shape[1]
        logits = states.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(states.dtype).min / 2)
        output = self.attend(states, attention_mask=logits[:, None, None])[0]
        return self.output(output[:, :length]), None


class LongformerLayer(nn.Module):
    """Transformers' Longformer attention with a global first token."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        self.window = config.size
        sizes = LongformerConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            attention_window=[config.size],
            attention_probs_dropout_prob=0.0,
        )
        self.attend = LongformerSelfAttention(sizes, 0)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, None]:
        length = hidden_states.shape[1]
        states, mask = _padded(hidden_states, token_mask, self.window)
        # The mask is not read: the first position of every text holds a token.
        is_global = torch.zeros_like(mask)
        is_global[:, 0] = True
        is_padding = ~mask & ~is_global
        output = self.attend(
            states,
            attention_mask=(10000.0 * is_global - 10000.0 * is_padding),
            is_index_masked=is_padding,
            is_index_global_attn=is_global,
            is_global_attn=True,
        )[0]
        return self.output(output.view_as(states)[:, :length]), None


def iterative_inverse(matrix: Tensor, n_iter: int = 6) -> Tensor:
    """Pseudo-inverse of each `[..., m, m]` matrix by the third-order iteration of Razavi et al.
    (2014), as in Nystromformer.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    sums = matrix.abs().sum(-1).amax(-1) * matrix.abs().sum(-2).amax(-1)
    inverse = matrix.mT / sums[..., None, None]
    for _ in range(n_iter):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse


def _padded(
    hidden_states: Tensor, token_mask: Tensor | None, multiple: int
) -> tuple[Tensor, Tensor]:
    """States and mask, padded to a multiple of so many tokens."""
    refuse_tracing("this attention", "take another one")
    batch, length, _ = hidden_states.shape
    if token_mask is None:
        token_mask = hidden_states.new_ones((batch, length), dtype=torch.bool)
    missing = count_blocks(length, multiple) * multiple - length
    return F.pad(hidden_states, (0, 0, 0, missing)), F.pad(token_mask, (0, missing))
