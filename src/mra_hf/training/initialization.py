"""An initialisation with which the heads of a small encoder read neighbouring tokens at once."""

from typing import Any

import torch
from transformers import PreTrainedModel

#: The fastest wave in radians per token, the slowest as a share of it, their amplitude in units of
#: `initializer_range`, and the scale of query and key.
_FASTEST_WAVE, _WAVE_RANGE, _WAVE_SIZE, _SHARPNESS = 2.8, 0.002, 1.5, 1.2
#: Tokens from the one that reads to the one that is read, by head.
_OFFSETS = (-1, 1, -2, 2)


@torch.no_grad()
def init_previous_token_heads(model: PreTrainedModel) -> None:
    """Let the heads of the first layer begin by reading the neighbours of each token, in place.

    A small post-norm model spends thousands of steps on the frequencies of words before it learns
    that neighbours matter. Here positions start as sinusoids, as in Vaswani et al. 2017
    (section 3.5) but with wavelengths from two tokens on. Query and key of the first heads select
    the fast waves, and the query is turned by the angle of an offset: -1, +1, -2 or +2 tokens. All
    of it is trained like every other weight.

    Raises:
        ValueError: no learned position table, or heads of odd size.
    """
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if table is None:
        raise ValueError(
            f"start_with_neighbours needs learned positions, and {type(model).__name__} has none."
        )
    rows, hidden = table.weight.shape
    head_dim = hidden // model.config.num_attention_heads
    if head_dim % 2 or hidden % 2:
        raise ValueError(f"start_with_neighbours needs an even head size, got {head_dim}.")
    waves = hidden // 2
    frequencies = _FASTEST_WAVE * _WAVE_RANGE ** (torch.arange(waves) / max(1, waves - 1))
    angles = torch.arange(rows)[:, None] * frequencies
    values = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    table.weight.copy_(_WAVE_SIZE * model.config.initializer_range * values)
    if table.padding_idx is not None:
        table.weight[table.padding_idx] = 0

    attention: Any = model.base_model.get_submodule("encoder.layer.0.attention.self")
    fastest = torch.eye(head_dim, hidden)  # selects the fastest waves
    for head, offset in zip(range(model.config.num_attention_heads), _OFFSETS, strict=False):
        cosine, sine = ((offset * frequencies[: head_dim // 2]).cos(), (offset * frequencies).sin())
        turn = torch.zeros(head_dim, hidden)
        even = torch.arange(0, head_dim, 2)
        turn[even, even] = turn[even + 1, even + 1] = cosine
        turn[even, even + 1] = sine[: head_dim // 2]
        turn[even + 1, even] = -sine[: head_dim // 2]
        rows_of_head = slice(head * head_dim, (head + 1) * head_dim)
        attention.query.weight[rows_of_head] = _SHARPNESS * turn
        attention.key.weight[rows_of_head] = _SHARPNESS * fastest
