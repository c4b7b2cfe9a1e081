"""Orders of tokens that bring similar tokens into one block (suggested by the MRA paper).

Block means say much where neighbours are alike. Softmax attention does not depend on the order of
its queries, nor on the common order of keys and values. So each of the two may be reordered first,
and the output put back afterwards.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .checks import check_int, check_tensors, to_token_mask


def patch_order(
    height: int, width: int, patch: tuple[int, int] = (4, 8), device: torch.device | None = None
) -> Tensor:
    """Positions of a grid's tokens, patch by patch, `[height * width]` int64.

    Tokens of the grid lie row by row. In `x[:, order]` the tokens of a patch lie beside each other,
    row by row, and patches follow each other row by row too. A patch of 4 x 8 is one block of 32
    tokens.

    Args:
        height, width: sides of the grid, in tokens.
        patch: (height, width) of a patch, in tokens.
        device: device of the result.

    Raises:
        ValueError: a side of the grid is no multiple of the patch's side.
    """
    if not isinstance(patch, Sequence) or len(patch) != 2:
        raise ValueError(f"patch must be (height, width), got {patch!r}.")
    for name, side, patch_side in (("height", height, patch[0]), ("width", width, patch[1])):
        check_int(f"patch of {name}", patch_side, 1)
        check_int(name, side, 1)
        if side % patch_side:
            raise ValueError(
                f"{name} must be a multiple of its side of the patch, {patch_side}, got {side}; "
                "pad the grid or choose another patch."
            )
    positions = torch.arange(height * width, device=device)
    rows, columns = height // patch[0], width // patch[1]
    return positions.view(rows, patch[0], columns, patch[1]).transpose(1, 2).flatten()


def inverse_order(order: Tensor) -> Tensor:
    """The order that undoes `order`, `[..., N]` int64."""
    positions = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, positions)


def hash_order(
    x: Tensor,
    attention_mask: Tensor | None = None,
    *,
    n_buckets: int = 16,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sort tokens by their bucket of a random projection, padding last; tokens of a bucket keep
    their order.

    The bucket of a token is the nearest of n_buckets / 2 random directions and their negatives (the
    hash of Andoni et al. 2015 that Reformer uses). Every head sorts its own tokens.

    Args:
        x: `[B, H, N, D]`, queries or keys.
        attention_mask: `[B, N]` bool or integer, or None.
        n_buckets: number of buckets, even.
        directions: `[D, n_buckets / 2]`; pass the same to sort queries and keys alike. Drawn by
            default.
        generator: generator that draws them.

    Returns:
        `[B, H, N]` int64, for `attend_in_order`.

    Raises:
        ValueError: an odd number of buckets, or directions of another shape.
    """
    check_int("n_buckets", n_buckets, 2)
    if n_buckets % 2:
        raise ValueError(f"n_buckets must be even, got {n_buckets}: a direction gives two.")
    shape = (x.shape[-1], n_buckets // 2)
    if directions is None:
        directions = random_directions(*shape, generator=generator)
    if tuple(directions.shape) != shape:
        raise ValueError(
            f"directions must be [head_dim, n_buckets / 2] = {shape}, "
            f"got {tuple(directions.shape)}."
        )
    directions = directions.to(x.device, torch.float32)
    token_mask = to_token_mask(attention_mask, x)
    with torch.no_grad():
        if token_mask is not None:
            x = x.masked_fill(~token_mask[:, None, :, None], 0)
        projected = x.float() @ directions
        buckets = torch.cat([projected, -projected], -1).argmax(-1)
        if token_mask is not None:
            buckets = buckets.masked_fill(~token_mask[:, None], n_buckets)
        return buckets.argsort(dim=-1, stable=True)


def random_directions(
    head_dim: int, n_directions: int, generator: torch.Generator | None = None
) -> Tensor:
    """Directions for `hash_order`, `[head_dim, n_directions]` float32."""
    return torch.randn(head_dim, n_directions, generator=generator) / math.sqrt(head_dim)


def attend_in_order(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    query_order: Tensor,
    key_order: Tensor,
) -> Tensor:
    """Attend in another order of tokens; the output is in the original order.

    Args:
        attention: called as `attention(query, key, value, attention_mask)`, for example a partial
            of `mra2_attention`.
        query, key, value: `[B, H, N, D]`.
        attention_mask: `[B, N]` bool or integer, or None. Padding comes last, whatever the orders
            say; real tokens keep their order.
        query_order, key_order: `[N]` or `[B, H, N]` int64, permutations.

    Returns:
        `[B, H, N, D]`.

    Raises:
        ValueError: orders of another shape, or that are no permutations (not checked in a compiled
            graph).
    """
    query, key, value = check_tensors(query, key, value)
    shape = query.shape[:3]
    token_mask = to_token_mask(attention_mask, query)
    orders = {"query_order": query_order, "key_order": key_order}
    for name, order in orders.items():
        actual = tuple(order.shape) if isinstance(order, Tensor) else type(order).__name__
        if actual not in (tuple(shape), tuple(shape[2:])):
            raise ValueError(
                f"{name} must be a tensor [tokens] or [batch, heads, tokens] = {tuple(shape)}, "
                f"got {actual}."
            )
        if not torch.compiler.is_compiling() and not _is_permutation(order):
            raise ValueError(f"{name} must hold every position from 0 to {shape[2] - 1} once.")
    if token_mask is not None:
        orders = {name: _padding_last(order, token_mask) for name, order in orders.items()}
        count = token_mask.sum(-1, keepdim=True)
        token_mask = torch.arange(shape[2], device=query.device) < count
    query_order, key_order = (order.expand(shape)[..., None] for order in orders.values())
    query = query.gather(2, query_order.expand_as(query))
    key, value = (x.gather(2, key_order.expand_as(x)) for x in (key, value))
    output = attention(query, key, value, token_mask)
    back = inverse_order(query_order[..., 0])[..., None]
    return output.gather(2, back.expand_as(output))


def _is_permutation(order: Tensor) -> bool:
    if order.dtype != torch.int64:
        return False
    positions = torch.arange(order.shape[-1], device=order.device)
    return bool((order.sort(-1).values == positions).all())


def _padding_last(order: Tensor, token_mask: Tensor) -> Tensor:
    """Move padding to the end, real tokens keep their order: `[N]` or `[B, H, N]` ->
    `[B, H or 1, N]`.
    """
    order = order if order.ndim == 3 else order.expand(token_mask.shape[0], 1, -1)
    is_padding = ~token_mask[:, None].expand(order.shape).gather(-1, order)
    return order.gather(-1, is_padding.byte().argsort(dim=-1, stable=True))
