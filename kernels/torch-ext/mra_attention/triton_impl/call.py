"""One call as the kernels see it: its inputs, sizes and launch configurations. Launches nothing."""

import math

import torch
from torch import Tensor

from ..blocks import count_blocks
from ..implementations import BLOCK_SIZE, KEY_BLOCK_SIZES, Summaries
from . import launching

_LOG2_E = math.log2(math.e)


def summary_shapes(
    shape: tuple[int, ...], key_block_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the `Summaries` of inputs `[B, H, N, D]`: vectors and counts."""
    batch, heads, length, dim = shape
    n_blocks, per_block = count_blocks(length, BLOCK_SIZE), BLOCK_SIZE // key_block_size
    vectors = (1 + 2 * per_block, batch * heads, n_blocks, launching.padded_dim(dim))
    return vectors, (batch, n_blocks * per_block)


class KernelCall:
    """Sizes of one call, and arguments that many kernels share, by parameter name.

    `inputs` are those of kernels that read query, key and value: the tensors and their strides.
    `tokens` are those of all kernels that visit tokens: mask, sizes and constants.
    """

    def __init__(
        self, query, key, value, token_mask, block_size=BLOCK_SIZE, key_block_size=BLOCK_SIZE, *,
        scale=1.0, sparse=False,
    ):  # fmt: skip
        assert block_size == BLOCK_SIZE, block_size
        assert key_block_size in KEY_BLOCK_SIZES, key_block_size
        self.scale, self.scale_log2, self.has_coarse = scale, scale * _LOG2_E, not sparse
        self.shape, self.device, self.dtype = tuple(query.shape), query.device, query.dtype
        self.batch, self.heads, self.length, self.dim = self.shape
        self.all_heads = self.batch * self.heads
        self.n_blocks = count_blocks(self.length, BLOCK_SIZE)
        self.key_block_size = key_block_size
        self.per_block = BLOCK_SIZE // key_block_size
        self.n_key_blocks = self.n_blocks * self.per_block
        self.padded_dim = launching.padded_dim(self.dim)
        has_mask = token_mask is not None
        self.tokens = {
            "MASK": token_mask.contiguous().view(torch.uint8) if has_mask else query,
            "length": self.length,
            "n_blocks": self.n_blocks,
            "heads": self.heads,
            "HAS_MASK": has_mask,
            "M": BLOCK_SIZE,
            "D": self.dim,
            "D_PAD": self.padded_dim,
        }
        self.inputs = {}
        for name, x in (("query", query), ("key", key), ("value", value)):
            x = x if x.stride(-1) == 1 else x.contiguous()
            self.inputs[name.upper()] = x
            batch, head, token, _ = x.stride()
            self.inputs |= {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def as_bytes(self, blocks: Tensor | None) -> Tensor:
        """A selection `[B, H, R, C]` as int8; every pair for None."""
        shape = (self.batch, self.heads, self.n_blocks, self.n_key_blocks)
        if blocks is None:
            return torch.ones(shape, dtype=torch.int8, device=self.device)
        return blocks.expand(shape).contiguous().view(torch.int8)

    def strips(self, size: int) -> int:
        """Number of programs, where each handles a strip of `size` blocks of one head."""
        return self.all_heads * launching.ceil_div(self.n_blocks, size)

    def key_strips(self, size: int) -> int:
        """The same for key blocks."""
        return self.all_heads * launching.ceil_div(self.n_key_blocks, size)

    def as_operands(self, summaries: Summaries) -> dict:
        """What kernels read of the summaries: means of query blocks `[G, R, D_PAD]`, means and
        sums of values of key blocks `[G, C, D_PAD]`, and real tokens of key blocks `[B, C]`.
        """
        query_means, *of_keys = summaries.vectors.split([1, self.per_block, self.per_block])
        shape = (self.all_heads, self.n_key_blocks, self.padded_dim)
        key_means, value_sums = (x.view(shape) for x in of_keys)
        return {
            "QUERY_MEANS": query_means[0],
            "KEY_MEANS": key_means,
            "VALUE_SUMS": value_sums,
            "COUNTS": summaries.counts,
        }

    def config_of(self, kernel: str) -> launching.LaunchConfig:
        return launching.config_for(kernel, self.device, self.padded_dim, self.dtype)

    def coarse_products(self) -> dict:
        """Sizes and constants of kernels that multiply summaries."""
        return {
            "n_blocks": self.n_blocks,
            "heads": self.heads,
            "PER_BLOCK": self.per_block,
            "D_PAD": self.padded_dim,
            "PRECISION": launching.coarse_precision(self.device, self.dtype),
        }
