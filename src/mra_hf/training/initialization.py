"""An initialisation with which a small encoder learns from its neighbours at once."""

import torch
from transformers import PreTrainedModel

#: Radians per token of the fastest wave and the slowest's share of it,
#: amplitude in units of `initializer_range`, scale of query and key, and the offsets of the heads.
_FASTEST_WAVE, _WAVE_RANGE, _WAVE_SIZE, _SHARPNESS = 2.8, 0.002, 1.5, 1.2
_OFFSETS = (-1, 1, -2, 2)


@torch.no_grad()
def init_previous_token_heads(model: PreTrainedModel) -> None:
    """Let the heads of the first layer begin by reading the tokens next to each, in place.

    A small post-norm model spends thousands of steps on the frequencies of words before it finds
    out that neighbours matter. Here positions start as sinusoids, as in Vaswani et al. 2017
    (section 3.5) but with wavelengths from two tokens on, and query and key of the first heads pick
    out the fast waves, the query turned by the angle of an offset: -1, +1, -2 and +2 tokens. All of
    it is trained like every other weight.

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

    attention = model.base_model.encoder.layer[0].attention.self
    picked = torch.eye(head_dim, hidden)  # the fastest waves
    for head, offset in zip(range(model.config.num_attention_heads), _OFFSETS, strict=False):
        cosine, sine = ((offset * frequencies[: head_dim // 2]).cos(), (offset * frequencies).sin())
        turn = torch.zeros(head_dim, hidden)
        even = torch.arange(0, head_dim, 2)
        turn[even, even] = turn[even + 1, even + 1] = cosine
        turn[even, even + 1] = sine[: head_dim // 2]
        turn[even + 1, even] = -sine[: head_dim // 2]
        of_head = slice(head * head_dim, (head + 1) * head_dim)
        attention.query.weight[of_head] = _SHARPNESS * turn
        attention.key.weight[of_head] = _SHARPNESS * picked
