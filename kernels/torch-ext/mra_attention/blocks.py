"""Blocks of tokens: the few definitions that every implementation shares, and what makes them fast
on a CPU.

A sequence of N tokens is cut from position 0 into R = ceil(N / M) blocks of M tokens
(`block_size`), and its keys into C = R * M / W key blocks of W tokens (`key_block_size`, which
divides M; W = M are the squares of the paper). Padding tokens, and the tail that completes the last
block, are not real: they become zeros and are never counted.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

#: Bytes of one float32 operand that a CPU works on at a time. Buffers of this size are used again,
#: where fresh memory would cost a page fault per 4 kB.
CHUNK_BYTES = 16 * 2**20
#: Bytes of a float32 operand that a thread works on at a time: few enough that there are chunks for
#: all threads.
THREAD_BYTES = 2**20

#: Bytes of a temporary that stays in a core's cache.
_CACHED_BYTES = 2**20

#: Padding of at most this magnitude gives finite float32 products with operands up to 2^80.
_HARMLESS = 2.0**40


def is_exporting() -> bool:
    """Whether `torch.export` traces.

    Reads torch's own flag: in torch 2.11 `torch.compiler.is_exporting()` is true in every function
    that Dynamo compiles, which would then run what is meant for exported graphs.
    """
    return torch.compiler._is_exporting_flag


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all arithmetic: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def count_blocks(length: int, block_size: int) -> int:
    """Return R, the number of blocks that hold `length` tokens."""
    return (length + block_size - 1) // block_size


def count_exported_blocks(length: int, block_size: int) -> int:
    """R of an exported graph: one more than `count_blocks`, so that it is at least 2 and the last
    block holds no token.

    Written as one floor division, which stays one symbol in sizes: torch cannot divide
    64 + 32 * (N // 32) by N // 32 + 2.
    """
    return (length + 2 * block_size - 1) // block_size


def to_blocks(x: Tensor, token_mask: Tensor | None, block_size: int, n_blocks: int) -> Tensor:
    """Cut `[B, H, N, D]` into `[B, H, R, M, D]`; tokens that are not real become zero, even NaN.

    `token_mask` is `[B, N]` bool or None (all real). Returns a view where nothing has to be filled.
    """
    if token_mask is not None:
        x = fill_padding(x, token_mask, 0)
    missing = n_blocks * block_size - x.shape[2]
    if not isinstance(missing, int) or missing:
        x = F.pad(x, (0, 0, 0, missing))
    return split_blocks(x, 2, block_size)


def fill_padding(x: Tensor, token_mask: Tensor, value: float) -> Tensor:
    """`x`, `[B, H, N, ...]`, with `value` where `token_mask` `[B, N]` is False; a copy."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return fill_padding_(x.clone(), token_mask, value)
    return x.masked_fill(_padding_like(x, token_mask), value)


def fill_padding_(x: Tensor, token_mask: Tensor, value: float) -> Tensor:
    """`fill_padding` in place. On a CPU the cost depends on the padding, not on the size of x."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # By indices, because assigning through the mask itself visits all of x.
        padding = (~token_mask).nonzero(as_tuple=True)
        x.transpose(1, 2).index_put_(padding, x.new_tensor(value))
        return x
    return x.masked_fill_(_padding_like(x, token_mask), value)


def _padding_like(x: Tensor, token_mask: Tensor) -> Tensor:
    return ~token_mask.reshape(x.shape[0], 1, x.shape[2], *(1 for _ in x.shape[3:]))


def mask_to_blocks(
    token_mask: Tensor | None,
    batch: int,
    length: int,
    block_size: int,
    n_blocks: int,
    device: torch.device,
) -> Tensor:
    """Return `[B, R, M]` bool: True where a block holds a real token."""
    if token_mask is None:
        token_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    padded = F.pad(token_mask, (0, n_blocks * block_size - length))
    return split_blocks(padded, 1, block_size)


def split_blocks(x: Tensor, dim: int, block_size: int) -> Tensor:
    """Cut dimension `dim`, of R * block_size entries, into the two dimensions (R, block_size)."""
    return x.unflatten(dim, (x.shape[dim] // block_size, block_size))


def first_tokens(x: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` entries of `x` along `dim`: a view; for an exported graph a copy, because
    whether a view of a symbolic length is contiguous would limit the lengths that the graph takes.
    """
    if is_exporting():
        return x.index_select(dim, torch.arange(length, device=x.device))
    return x.narrow(dim, 0, length)


def upsample(x: Tensor, block_size: int, key_block_size: int | None = None) -> Tensor:
    """Repeat every entry of `[..., R, C]` over its block of tokens, block_size queries times
    key_block_size keys (None: block_size): `[..., R * block_size, C * key_block_size]`.
    """
    key_block_size = key_block_size or block_size
    if is_exporting():  # expanding and flattening would compare strides of symbolic sizes
        return repeat_columns(repeat_columns(x.mT, block_size).mT, key_block_size)
    *leading, rows, columns = x.shape
    x = x[..., :, None, :, None].expand(*leading, rows, block_size, columns, key_block_size)
    return x.flatten(-4, -3).flatten(-2, -1)


def repeat_columns(pairs: Tensor, times: int) -> Tensor:
    """Repeat every column: `[..., C]` -> `[..., C * times]`, as from square blocks to the narrower
    key blocks they are cut into.
    """
    if times == 1:
        return pairs
    if is_exporting():
        column = torch.arange(pairs.shape[-1] * times, device=pairs.device) // times
        return pairs.index_select(-1, column)
    return pairs.repeat_interleave(times, dim=-1)


def block_sums(blocks: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over the real tokens of each block: `[B, H, R, M, D]` -> `[B, H, R, D]` in `dtype`.

    `real` is `[B, R, M]` bool, or None where all other tokens are zero already.
    """
    sums = _sum_tokens(blocks, dtype)
    if real is not None:
        partial = ~real.all(-1)  # [B, R]: few blocks, which are summed again
        tokens = blocks.transpose(1, 2)[partial].masked_fill_(~real[partial][:, None, :, None], 0)
        sums.transpose(1, 2)[partial] = tokens.sum(2, dtype=dtype)
    return sums


def _sum_tokens(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """`blocks.sum(3, dtype=dtype)`, on a CPU a few heads at a time: torch would first convert all
    of it.
    """
    if blocks.dtype == dtype or blocks.device.type != "cpu" or torch.compiler.is_compiling():
        return blocks.sum(3, dtype=dtype)
    heads = max(1, _CACHED_BYTES // max(1, blocks[:, 0].numel() * dtype.itemsize))
    return torch.cat([x.sum(3, dtype=dtype) for x in blocks.split(heads, dim=1)], dim=1)


def block_means(
    blocks: Tensor, counts: Tensor, dtype: torch.dtype | None = None, real: Tensor | None = None
) -> Tensor:
    """Mean over the real tokens of each block, 0 in a block without any.

    `blocks` is `[B, H, R, M, D]`, `counts` `[B, R]`, `real` as in `block_sums`; returns
    `[B, H, R, D]` in `dtype` (default: the compute dtype).
    """
    dtype = dtype or compute_dtype(blocks.dtype)
    return block_sums(blocks, real, dtype) / counts.clamp_min(1)[:, None, :, None].to(dtype)


def bias_of_pairs(distance_bias: Tensor, live: Tensor, initial_prior_first_n_blocks: int) -> Tensor:
    """The bias of every pair of blocks, `[B, H, R, R]` (B = 1 where samples do not differ); key
    blocks have that of the block they are part of.

    Args:
        distance_bias: `[H, K]`; entry `[h, min(abs(x - y), K - 1)]` is the bias of the pair (x, y).
        live: `[B, R]` bool, blocks that hold a real token.
        initial_prior_first_n_blocks: pairs in the first n live block rows and columns are global:
            their bias is 0.
    """
    place = torch.arange(live.shape[1], device=live.device)
    distance = (place[:, None] - place).abs().clamp_max(distance_bias.shape[1] - 1)
    biases = distance_bias[:, distance][None]
    if initial_prior_first_n_blocks:
        biases = biases.masked_fill(global_pairs(live, initial_prior_first_n_blocks), 0)
    return biases


def global_pairs(live: Tensor, initial_prior_first_n_blocks: int) -> Tensor:
    """Pairs in the first n live block rows and columns, and in dead ones before them,
    `[B, 1, R, R]` bool; `live` is `[B, R]`.
    """
    first = live.cumsum(-1) <= initial_prior_first_n_blocks
    return first[:, None, :, None] | first[:, None, None, :]


def chunks(shape: torch.Size, device_type: str) -> Iterator[tuple[slice, slice]]:
    """Cut `[B, H, N, D]` into chunks of (samples, heads), each for one thread; on any device but a
    CPU one chunk holds everything.

    Every (sample, head) is a problem of its own, so cutting changes no result.
    """
    batch, heads, length, dim = shape
    if device_type != "cpu":
        yield slice(0, batch), slice(0, heads)
        return
    problems = max(1, THREAD_BYTES // max(1, 4 * length * dim))
    chunk_heads = max(1, min(heads, problems))
    chunk_samples = max(1, min(batch, problems // chunk_heads))
    for sample in range(0, batch, chunk_samples):
        for head in range(0, heads, chunk_heads):
            yield slice(sample, sample + chunk_samples), slice(head, head + chunk_heads)


def drop_trivial_mask(token_mask: Tensor | None) -> Tensor | None:
    """Drop an all-true mask: None in its place. Checked on a CPU only, to avoid a device sync."""
    if token_mask is None or (token_mask.device.type == "cpu" and bool(token_mask.all())):
        return None
    return token_mask


def zero_unsafe_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Return `x` itself where its padding is finite and moderate, so that a weight of 0 hides it,
    else a copy with zeros there. Values are checked on a CPU only; elsewhere it is always a copy.
    """
    if token_mask is None:
        return x
    if x.device.type == "cpu":
        padding = x.transpose(1, 2)[~token_mask]
        if padding.numel() == 0 or bool(padding.abs().amax().float() <= _HARMLESS):
            return x
    return fill_padding(x, token_mask, 0)
