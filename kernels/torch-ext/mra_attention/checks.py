"""Checks of the arguments of the public functions: type, shape, dtype, device and value.

Every refusal is a `ValueError` that says what to pass.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import compute_dtype, count_blocks, is_exporting
from .scheme import Scheme, fit_scales
from .selection import (
    MAX_BLOCK_ROWS,
    SCHEME_RULES,
    SELECTION_RULES,
    BlockSelection,
    max_block_rows,
)

APPROX_MODES = ("full", "sparse")
#: Larger blocks are refused: inputs are padded to whole blocks.
MAX_BLOCK_SIZE = 1024
#: More pairs than any matrix has that can be ranked. Clamping to it keeps products of budgets
#: inside int64.
_ENOUGH = 2**30
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check shapes, dtypes and devices; under autocast, cast to its dtype."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{name} must be a torch.Tensor [batch, heads, tokens, head_dim], "
                f"got {type(x).__name__}."
            )
        if x.layout != torch.strided:
            raise ValueError(
                f"{name} must be a dense tensor, got layout {x.layout}; use to_dense()."
            )
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, head_dim], "
                f"got {x.ndim} dimensions {tuple(x.shape)}; "
                "split the hidden dimension into heads and move heads before tokens."
            )
    for name in ("key", "value"):
        if tensors[name].shape != query.shape:
            raise ValueError(
                f"{name} must have the shape of query, {tuple(query.shape)}, got "
                f"{tuple(tensors[name].shape)}; mra2_attention is self-attention: no cache, "
                "no cross-attention, no grouped key heads."
            )
        if tensors[name].device != query.device:
            raise ValueError(
                f"{name} is on {tensors[name].device}, query on {query.device}; "
                "move all three to one device."
            )
    if query.shape[2] == 0 or query.shape[3] == 0:
        raise ValueError(
            f"query must hold at least one token and one channel, got {tuple(query.shape)}."
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    if query.dtype not in _DTYPES:
        raise ValueError(
            "query must be float32, bfloat16, float16 or float64, "
            f"got {query.dtype}; cast it first."
        )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name} is {x.dtype}, query is {query.dtype}; cast all three to one dtype."
            )
    return query, key, value


def to_token_mask(attention_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Check the type and shape of the mask and return it as `[B, N]` bool. No value is read on the
    host.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask must be a torch.Tensor [batch, tokens] or None, "
            f"got {type(attention_mask).__name__}."
        )
    expected = (query.shape[0], query.shape[2])
    if attention_mask.ndim != 2 or attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {expected}, got "
            f"{tuple(attention_mask.shape)}; pass the tokenizer's 2-D attention_mask, "
            "not an expanded one."
        )
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise ValueError(
            "attention_mask must be bool or integer, nonzero at real tokens, got "
            f"{attention_mask.dtype}; an additive float mask cannot be used: pass mask.bool(), "
            "or (mask == 0) if it holds 0 for real tokens."
        )
    if attention_mask.device != query.device:
        raise ValueError(
            f"attention_mask is on {attention_mask.device}, query on {query.device}; "
            "move it to the device of query."
        )
    return attention_mask.bool()


def refuse_tracing(what: str, remedy: str) -> None:
    """Raise a `ValueError` while `torch.jit.trace` runs."""
    if torch.jit.is_tracing():
        raise ValueError(
            f"torch.jit.trace would fix {what} to the length of its example, and the graph would "
            f"be wrong at others: {remedy}, or use torch.export or torch.compile."
        )


def check_distance_bias(distance_bias: Tensor | None, query: Tensor) -> Tensor | None:
    """Check the bias of block distances and return it in the compute dtype. No value is read."""
    if distance_bias is None:
        return None
    if not isinstance(distance_bias, Tensor):
        raise ValueError(
            "distance_bias must be a torch.Tensor [heads, distances] or None, "
            f"got {type(distance_bias).__name__}."
        )
    heads, shape = query.shape[1], tuple(distance_bias.shape)
    if len(shape) != 2 or shape[0] != heads or shape[1] < 1:
        raise ValueError(
            f"distance_bias must be [heads, distances] = ({heads}, K) with K of at least 1, got "
            f"{shape}: one row per head, one column per distance in blocks; the last column is for "
            "all larger distances too."
        )
    if not distance_bias.is_floating_point():
        raise ValueError(
            f"distance_bias must be floating-point, got {distance_bias.dtype}; it is added to the "
            "logits: cast it with .float()."
        )
    if distance_bias.device != query.device:
        raise ValueError(
            f"distance_bias is on {distance_bias.device}, query on {query.device}; "
            "move it to the device of query."
        )
    return distance_bias.to(compute_dtype(query.dtype))


def refuse_distance_bias(distance_bias: Tensor | None, resolutions: tuple[int, ...]) -> None:
    """Raise where scales other than (block_size, 1) are given a bias."""
    if distance_bias is not None:
        raise ValueError(
            f"distance_bias is for two scales that end in 1, got resolutions={resolutions}; use "
            "resolutions=(32, 1), or pass distance_bias=None."
        )


def check_settings(query: Tensor, sizes, budgets, priors, selection, scale) -> dict:
    """Check what the selection needs and return it as keyword arguments of `selection.select`; the
    rule of a ready `BlockSelection` is "".

    `sizes` are (block_size, key_block_size), `budgets` (block_per_row, block_budget), `priors`
    (initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks).
    """
    block_per_row, block_budget = budgets
    block_size, key_block_size = check_block_sizes(*sizes)
    check_int("block_per_row", block_per_row, 1)
    if block_budget is not None:
        check_int("block_budget", block_budget, 1)
        block_budget = min(block_budget, _ENOUGH)
    priors = check_priors(*priors)
    scale = check_scale(scale, query)
    n_blocks = count_blocks(query.shape[2], block_size)
    if isinstance(selection, BlockSelection):
        shape = (*query.shape[:2], n_blocks, n_blocks * (block_size // key_block_size))
        _check_ready_selection(selection, shape, query.device, block_size, key_block_size)
    else:
        check_choice("selection", selection, SELECTION_RULES, "a BlockSelection from select_blocks")
        most = max_block_rows(block_size // key_block_size)
        if n_blocks > most:
            raise ValueError(
                f"query has {query.shape[2]} tokens in {n_blocks} blocks of {block_size}, with "
                f"key blocks of {key_block_size}; at most {most} block rows can be ranked: raise "
                "block_size or key_block_size."
            )
    return {
        "block_per_row": min(block_per_row, _ENOUGH),
        "block_budget": block_budget,
        "block_size": block_size,
        "key_block_size": key_block_size,
        "initial_prior_first_n_blocks": priors[0],
        "initial_prior_diagonal_n_blocks": priors[1],
        "rule": selection if isinstance(selection, str) else "",
        "scale": scale,
    }


def check_block_sizes(block_size, key_block_size) -> tuple[int, int]:
    """Check the tokens per block of queries and of keys, None for the same, and return both."""
    check_int("block_size", block_size, 1, MAX_BLOCK_SIZE)
    if key_block_size is None:
        return block_size, block_size
    check_int("key_block_size", key_block_size, 1)
    if block_size % key_block_size:
        raise ValueError(
            f"key_block_size must divide block_size={block_size} (8, 16 or 32 for 32), or be None "
            f"for block_size, got {key_block_size}."
        )
    return block_size, key_block_size


def check_priors(first, diagonal) -> tuple[int, int]:
    """Check the numbers of blocks that are chosen before all others; return them clamped."""
    check_int("initial_prior_first_n_blocks", first, 0)
    check_int("initial_prior_diagonal_n_blocks", diagonal, 0)
    return min(first, _ENOUGH), min(diagonal, _ENOUGH)


def check_scales(
    resolutions: Sequence[int], block_budgets: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check a chain of scales and its budgets, and return them as tuples."""
    for name, numbers in (("resolutions", resolutions), ("block_budgets", block_budgets)):
        if isinstance(numbers, str) or not isinstance(numbers, Sequence):
            raise ValueError(f"{name} must be a sequence of integers, got {numbers!r}.")
    if not resolutions:
        raise ValueError("resolutions must hold at least one scale, got none.")
    for level, size in enumerate(resolutions):
        check_int(f"resolutions[{level}]", size, 1)
    for coarse, fine in itertools.pairwise(resolutions):
        if coarse <= fine or coarse % fine:
            raise ValueError(
                "resolutions must go from coarse to fine, each dividing the one before, "
                f"got {tuple(resolutions)}: {fine} after {coarse}."
            )
    if len(block_budgets) != len(resolutions) - 1:
        raise ValueError(
            "block_budgets must hold one number for every scale but the last, "
            f"{len(resolutions) - 1} for resolutions={tuple(resolutions)}, "
            f"got {tuple(block_budgets)}."
        )
    for level, budget in enumerate(block_budgets):
        check_int(f"block_budgets[{level}]", budget, 1)
    return tuple(resolutions), tuple(min(budget, _ENOUGH) for budget in block_budgets)


def check_scheme(
    query: Tensor,
    resolutions: tuple[int, ...],
    block_budgets: tuple[int, ...],
    *,
    approx_mode,
    initial_prior_first_n_blocks,
    initial_prior_diagonal_n_blocks,
    selection,
    scale,
) -> Scheme:
    """Check what the general scheme needs besides its scales."""
    priors = check_priors(initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks)
    check_choice("approx_mode", approx_mode, APPROX_MODES)
    check_scheme_rule(selection, resolutions)
    if not is_exporting():  # an exported graph takes any length
        resolutions = fit_scales(resolutions, query.shape[2])
    padded = count_blocks(query.shape[2], resolutions[0]) * resolutions[0]
    too_fine = [size for size in resolutions[:-1] if padded // size > MAX_BLOCK_ROWS]
    if too_fine:
        raise ValueError(
            f"query has {query.shape[2]} tokens in {padded // too_fine[0]} blocks of "
            f"{too_fine[0]}; at most {MAX_BLOCK_ROWS} block rows can be ranked: "
            f"make resolutions coarser, got {resolutions}."
        )
    sparse, scale = approx_mode == "sparse", check_scale(scale, query)
    return Scheme(resolutions, block_budgets, *priors, selection, scale, sparse)


def check_scheme_rule(selection, resolutions: Sequence[int]) -> None:
    """Check that a rule can rank the blocks of other scales than two that end in 1."""
    if selection in SELECTION_RULES and selection not in SCHEME_RULES:
        raise ValueError(
            f'selection="{selection}" is for two scales that end in 1, '
            f"got resolutions={resolutions}; use one of {SCHEME_RULES}."
        )
    check_choice("selection", selection, SCHEME_RULES)


def check_scale(scale, query: Tensor) -> float:
    """Return the factor of the logits: `D ** -0.5` for None."""
    if scale is None:
        return query.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(
            f"scale must be a finite Python number or None for head_dim ** -0.5, got {scale!r}."
        )
    return float(scale)


def _check_ready_selection(
    selection: BlockSelection,
    shape: tuple[int, ...],
    device: torch.device,
    block_size: int,
    key_block_size: int,
) -> None:
    blocks = selection.blocks
    if not isinstance(blocks, Tensor):
        raise ValueError(
            f"selection.blocks must be a torch.Tensor, got {type(blocks).__name__}; "
            "make the selection with select_blocks."
        )
    for name, size in (("block_size", block_size), ("key_block_size", key_block_size)):
        of_selection = getattr(selection, name)
        if of_selection != size:
            raise ValueError(
                f"{name} is {size} but the given selection was made with {of_selection}; "
                f"pass {name}={of_selection}."
            )
    if blocks.shape != shape or blocks.dtype != torch.bool or blocks.device != device:
        raise ValueError(
            f"selection.blocks must be bool {shape} = [batch, heads, blocks, key blocks] "
            f"on {device}, got {blocks.dtype} {tuple(blocks.shape)} on {blocks.device}; "
            "make it with select_blocks from tensors of the same shape."
        )


def check_choice(name: str, value, allowed: tuple[str, ...], otherwise: str | None = None) -> None:
    """Raise a `ValueError` unless `value` is one of the `allowed` words; `otherwise` names what
    else the argument takes.
    """
    if not isinstance(value, str) or value not in allowed:
        words = ", ".join(f'"{word}"' for word in allowed)
        if otherwise is not None:
            words += f", or {otherwise}"
        raise ValueError(f"{name} must be one of {words}; got {value!r}.")


def check_int(name: str, value, lowest: int, highest: int | None = None) -> None:
    """Raise a `ValueError` unless `value` is an integer (not a bool) from `lowest` to `highest`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}.")
    if highest is not None and value > highest:
        raise ValueError(f"{name} must be at most {highest}, got {value}.")


def check_int_if_given(name: str, value, lowest: int) -> None:
    """`check_int` for an argument that may be None."""
    if value is not None:
        check_int(name, value, lowest)
