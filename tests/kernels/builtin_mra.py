"""Transformers' own MRA attention on any device, as something to compare with.

`transformers.models.mra.modeling_mra` delegates three block primitives to a CUDA package and
returns zeros without it. `emulated_kernel()` puts plain torch versions in its place.

Layouts the primitives share, for a leading axis Z = batch * heads: indices `[Z, K]` count the
block pairs of a head row by row, a tile `[32, 32]` is stored key first, and a dense operand is
`[Z, blocks, D, 32]`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.models.mra import modeling_mra

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 32


class EmulatedKernel:
    """The three primitives in torch; gradients are the business of the functions above them."""

    @staticmethod
    @torch.no_grad()
    def index_max(
        tile_maxima: torch.Tensor, indices: torch.Tensor, query_blocks: int, key_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest logit of every query over its tiles, per token and spread to the tiles.

        Like the CUDA version it counts in whole thousandths and starts from -1e5.
        """
        thousandths = (tile_maxima.mT * 1000).to(torch.int32)  # [Z, K, 32], towards zero
        rows = (indices.long() // key_blocks)[:, :, None].expand_as(thousandths)
        start = thousandths.new_full((len(indices), query_blocks, BLOCK_SIZE), -100_000_000)
        maxima = start.scatter_reduce(1, rows, thousandths, "amax").to(tile_maxima.dtype) / 1000
        return maxima.flatten(1), maxima.gather(1, rows).mT.contiguous()

    @staticmethod
    def mm_to_sparse(query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Key-times-query products of the listed block pairs, `[Z, K, 32, 32]`."""
        indices = indices.long()
        head = torch.arange(len(indices), device=indices.device)[:, None]
        key_blocks = key.shape[1]
        return key[head, indices % key_blocks].mT @ query[head, indices // key_blocks]

    @staticmethod
    def sparse_dense_mm(
        tiles: torch.Tensor, indices: torch.Tensor, dense: torch.Tensor, query_blocks: int
    ) -> torch.Tensor:
        """Sum over the tiles of a block row of `dense` times tile, `[Z, query_blocks, D, 32]`."""
        indices = indices.long()
        head = torch.arange(len(indices), device=indices.device)[:, None]
        key_blocks = dense.shape[1]
        products = dense[head, indices % key_blocks] @ tiles  # [Z, K, D, 32]
        sums = products.new_zeros(len(indices) * query_blocks, *products.shape[2:])
        sums.index_add_(
            0, (indices // key_blocks + head * query_blocks).flatten(), products.flatten(0, 1)
        )
        return sums.unflatten(0, (len(indices), query_blocks))


@contextmanager
def emulated_kernel() -> Iterator[None]:
    """Let Transformers' MRA use the emulation; the backward pass has to run inside as well."""
    previous = modeling_mra.mra_cuda_kernel
    modeling_mra.mra_cuda_kernel = EmulatedKernel()
    try:
        yield
    finally:
        modeling_mra.mra_cuda_kernel = previous


def builtin_mra2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    block_budget: int,
    approx_mode: str,
    **priors: int,
) -> torch.Tensor:
    """Transformers' `mra2_attention` for `[B, H, N, D]` tensors and a mask `[B, N]`.

    Call it, and its backward, inside `emulated_kernel()`. What it computes is well defined when

    - the mask has one row per (batch, head), batch first: laid out here, while the model repeats
      the rows in another order and is right for one sample at a time only;
    - padding is on the right, and every real row has a positive coarse logit if blocks of padding
      exist, because these enter the row maximum as 0;
    - N is a multiple of 32, and D at least 32 (the model pads smaller heads and scales by the
      padded size; the CUDA primitives further need D % 64 == 0 and budget % 8 == 0, the emulation
      does not);
    - no two scores tie at the cut: the best pair of every row scores exactly 0 and the scores of
      priors are raised by 5000, so the budget is either the number of prior pairs or exceeds it
      by at least the number of block rows (a surplus over the pairs of real blocks goes to blocks
      of padding, where it changes nothing);
    - logits of real tokens are moderate, so that the 1e-6 added to counts and to the normaliser
      disappears.
    """
    if not isinstance(modeling_mra.mra_cuda_kernel, EmulatedKernel):
        raise RuntimeError("call builtin_mra2_attention inside emulated_kernel()")
    return modeling_mra.mra2_attention(
        query,
        key,
        value,
        _mask_per_head(query, attention_mask),
        block_budget,
        approx_mode,
        block_size=BLOCK_SIZE,
        **priors,
    )


@torch.no_grad()
def builtin_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    block_budget: int,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
) -> torch.Tensor:
    """The block pairs Transformers' `mra2_attention` computes exactly, bool `[B, H, R, R]`."""
    mask = _mask_per_head(query, attention_mask)
    flat_query, flat_key = query.flatten(0, 1), key.flatten(0, 1)
    if mask is not None:
        flat_query, flat_key = flat_query * mask[:, :, None], flat_key * mask[:, :, None]
    logits, _, row_maxima, _ = modeling_mra.get_low_resolution_logit(
        flat_query, flat_key, BLOCK_SIZE, mask
    )
    indices, _ = modeling_mra.get_block_idxes(
        logits - row_maxima,
        block_budget,
        "sparse",
        initial_prior_first_n_blocks,
        initial_prior_diagonal_n_blocks,
    )
    selected = torch.zeros_like(logits, dtype=torch.bool).flatten(1).scatter(1, indices, True)
    return selected.reshape(*query.shape[:2], *logits.shape[1:])


def _mask_per_head(query: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Mask `[B, N]` -> `[B * H, N]` in the dtype of the query, rows ordered like the heads."""
    if attention_mask is None:
        return None
    return attention_mask.to(query.dtype).repeat_interleave(query.shape[1], dim=0)
