"""Methods that Transformers implements, on queries, keys and values in place of hidden states.

Its modeling modules are imported when a method is called: they would slow `import mra_hf` down.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig, NystromformerConfig

#: Random blocks of BigBird, as in the ICML 2022 paper's Table 7.
_RANDOM_BLOCKS = 3


class _Rows(nn.Module):
    """Replaces a projection: returns stored rows, selected by the first channel of its input.

    Args:
        rows: `[B, N, H * D]`.
        batch_first: whether the hidden states are `[B, N, C]` or `[N, B, C]`.
    """

    def __init__(self, rows: Tensor, *, batch_first: bool = True):
        super().__init__()
        self.rows = rows
        self.batch_first = batch_first

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = hidden_states[..., 0].long()
        batch = positions if self.batch_first else positions.mT
        rows = torch.stack([rows[index] for rows, index in zip(self.rows, batch, strict=True)])
        return rows if self.batch_first else rows.transpose(0, 1)


def longformer(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """A window of `size` tokens, half on each side, and a global first token (Beltagy et al. 2020).
    N must be a multiple of `size`.
    """
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    _check_multiple(query, size, "window")
    settings = _sizes(query) | {"attention_window": [size]}
    layer = LongformerSelfAttention(
        LongformerConfig(**settings, attention_probs_dropout_prob=0.0), 0
    )
    rows = [_rows(x) for x in (query * (scale * query.shape[-1] ** 0.5), key, value)]
    for name, x in zip(("query", "key", "value"), rows, strict=True):
        for projection in (name, f"{name}_global"):
            setattr(layer, projection, _Rows(x, batch_first=False))
    batch, _, length, _ = query.shape
    is_global = torch.zeros(batch, length, dtype=torch.bool)
    is_global[:, 0] = True
    output = layer(
        _positions(query),
        attention_mask=torch.where(is_global, 10000.0, 0.0),
        is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global,
        is_global_attn=True,
    )[0]
    return output.view(batch, length, query.shape[1], -1).transpose(1, 2)


def bigbird(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """Blocks of `size` tokens: a band of three, the first and the last, and three random ones
    (Zaheer et al. 2020). N must be a multiple of `size`.
    """
    from transformers.models.big_bird.modeling_big_bird import (
        BigBirdBlockSparseAttention,
        BigBirdModel,
    )

    _check_multiple(query, size, "block")
    batch, heads, length, dim = query.shape
    config = BigBirdConfig(
        **_sizes(query),
        block_size=size,
        num_random_blocks=_RANDOM_BLOCKS,
        max_position_embeddings=length,
    )
    # In evaluation Transformers replaces each random block by the first; nothing else differs.
    layer = BigBirdBlockSparseAttention(config, seed=seed).train()
    mask = torch.ones(batch, length)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask, size)
    state = np.random.get_state()  # Transformers seeds numpy's global generator
    try:
        output, _ = layer.bigbird_block_sparse_attention(
            query * (scale * dim**0.5), key, value, band, rows, columns, blocked, blocked,
            heads, _RANDOM_BLOCKS, dim, size, size, batch, length, length,
            seed=seed, plan_from_length=None, plan_num_rand_blocks=None,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(
            f"the length must be several times the size (block), got {length} and {size}: "
            f"{length // size} blocks do not leave {_RANDOM_BLOCKS} to draw for each row."
        ) from error
    finally:
        np.random.set_state(state)
    return output.view(batch, length, heads, dim).transpose(1, 2)


def nystromformer(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, size: int, seed: int = 0
) -> Tensor:
    """The Nystrom method with `size` landmarks, the means of segments (Xiong et al. 2021); without
    the convolution of its models. N must be a multiple of `size`.
    """
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    _check_multiple(query, size, "landmarks")
    batch, heads, length, dim = query.shape
    config = NystromformerConfig(
        **_sizes(query),
        num_landmarks=size,
        segment_means_seq_len=length,
        attention_probs_dropout_prob=0.0,
        inv_coeff_init_option=False,
    )
    layer = NystromformerSelfAttention(config)
    layer.conv_kernel_size = None
    for name, x in (("query", query * (scale * dim**0.5)), ("key", key), ("value", value)):
        setattr(layer, name, _Rows(_rows(x)))
    output = layer(_positions(query))[0]
    return output.view(batch, length, heads, dim).transpose(1, 2)


def _sizes(query: Tensor) -> dict[str, Any]:
    _, heads, _, dim = query.shape
    return {"hidden_size": heads * dim, "num_attention_heads": heads, "num_hidden_layers": 1}


def _rows(x: Tensor) -> Tensor:
    """`[B, H, N, D]` as the output of a projection, `[B, N, H * D]`."""
    return x.transpose(1, 2).flatten(2)


def _positions(query: Tensor) -> Tensor:
    """Hidden states `[B, N, H * D]` whose first channel is the position."""
    batch, heads, length, dim = query.shape
    states = torch.zeros(batch, length, heads * dim)
    states[..., 0] = torch.arange(length)
    return states


def _check_multiple(query: Tensor, size: int, name: str) -> None:
    if query.shape[2] % size:
        raise ValueError(
            f"the length must be a multiple of the size ({name}), got {query.shape[2]} and {size}."
        )
