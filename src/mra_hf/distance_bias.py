"""A learned bias on the distance of blocks, for models whose positions are repeated.

In a converted model the positions p and p + L are one row of the table, so that a pair of tokens
about L apart looks adjacent. The bias closes pairs that far from each other, and training opens
them again where that helps.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from mra_attention.blocks import bias_of_pairs, count_blocks
from mra_attention.reference import upsample
from mra_hf.attention import ATTENTION_NAMES
from mra_hf.configuration import AttentionSettings, MraConfig

#: The bias is so many times the weight. Adam moves a weight by about the learning rate in a step:
#: at 3e-5 to 5e-4, which suit all other weights, a bias would stay where it started.
BIAS_PER_WEIGHT = 100.0
#: Buckets for each doubling of the distance beyond the window.
_BUCKETS_PER_DOUBLING = 2

#: Names of dense attention functions that take an additive mask `[B, H, N, N]`.
_TAKES_ADDITIVE_MASK = ("sdpa", "eager")


def bucket_widths(window: int, n_distances: int) -> list[int]:
    """Return how many distances each bucket covers: one each up to `window` blocks, then two
    buckets for each doubling, up to `n_distances - 1` blocks.
    """
    edges = [*range(min(window + 1, n_distances))]
    for step in itertools.count():
        edge = math.ceil((window + 1) * 2 ** (step / _BUCKETS_PER_DOUBLING))
        if edge >= n_distances:
            break
        if edge > edges[-1]:
            edges.append(edge)
    return [end - start for start, end in itertools.pairwise([*edges, n_distances])]


def budget_for_a_global_block(settings: AttentionSettings) -> int:
    """Return the `block_per_row` that a global first block needs beside the diagonal prior."""
    diagonal = settings.initial_prior_diagonal_n_blocks
    return 3 + (2 * (diagonal // 2) + 1 if diagonal else 0)


class DistanceBias(nn.Module):
    """The bias of one layer.

    `weight` is `[heads, buckets]`; `BIAS_PER_WEIGHT` times it is added to the logits. Buckets are
    those of `bucket_widths`, up to the longest sequence of the model. A module, not a parameter of
    the attention, because PEFT's `modules_to_save` names modules.
    """

    def __init__(self, config: MraConfig):
        super().__init__()
        window, self.far_bias = config.distance_bias_window, config.distance_bias_far
        assert window is not None and config.block_size is not None  # `MraConfig.check`
        n_distances = count_blocks(config.max_tokens, config.block_size)
        self.widths = bucket_widths(window, n_distances)
        self.n_near = min(window + 1, len(self.widths))
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, len(self.widths)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with 0 inside the window and `config.distance_bias_far` beyond."""
        start = torch.zeros_like(self.weight)
        start[:, self.n_near :] = self.far_bias / BIAS_PER_WEIGHT
        initialization.copy_(self.weight, start)

    def forward(self, query: Tensor) -> Tensor:
        """Return the bias `[H, distances]` float32 (float64 for float64), one column per distance
        in blocks; of `query` only the dtype is read.
        """
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        biases = self.weight.to(dtype) * BIAS_PER_WEIGHT
        # Not by an index: its gradient would be summed by atomics on a GPU.
        repeated = [
            biases[:, bucket : bucket + 1].expand(-1, width)
            for bucket, width in enumerate(self.widths)
            if bucket >= self.n_near
        ]
        return torch.cat([biases[:, : self.n_near], *repeated], dim=1)

    def extra_repr(self) -> str:
        return f"heads={self.weight.shape[0]}, buckets={self.weight.shape[1]}"


class MraSelfAttention(RobertaSelfAttention):
    """RoBERTa's self-attention with a `distance_bias`, which `"mra2"` and `"mra2_s"` read; dense
    attention gets it as a mask, for comparison.
    """

    def __init__(self, config: MraConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.distance_bias = DistanceBias(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        """As the base class.

        Raises:
            ValueError: an attention function that cannot take the bias.
        """
        name = self.config._attn_implementation
        if name in _TAKES_ADDITIVE_MASK:
            attention_mask = self._with_bias(hidden_states, attention_mask)
        elif name not in ATTENTION_NAMES:
            raise ValueError(
                f"attn_implementation={name!r} would ignore the distance bias of this model; use "
                '"mra2", or "sdpa" or "eager" for the dense model.'
            )
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _with_bias(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The bias of all token pairs plus a mask `[B, 1, N, N]`, bool or additive:
        `[B, H, N, N]`.
        """
        batch, length, _ = hidden_states.shape
        size = self.config.block_size
        real = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None:
            keys = attention_mask[:, 0, -1]
            real = (keys if keys.dtype == torch.bool else keys == 0).expand(batch, -1)
        n_blocks = count_blocks(length, size)
        padded = nn.functional.pad(real, (0, n_blocks * size - length))
        bias = bias_of_pairs(
            self.distance_bias(hidden_states),
            padded.unflatten(1, (n_blocks, size)).any(-1),
            AttentionSettings.of(self.config).initial_prior_first_n_blocks,
        )
        bias = upsample(bias, size)[:, :, :length, :length].to(hidden_states.dtype)
        if attention_mask is None:
            return bias
        if attention_mask.dtype != torch.bool:
            return bias + attention_mask
        return bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
