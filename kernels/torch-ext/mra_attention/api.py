"""The public functions: checks in words, then one `match` on the implementation.

Letters: B batch, H heads, N tokens, D head dim, M queries per block, R = ceil(N / M) blocks, W keys
per key block, C = R * M / W key blocks.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import exported, multiresolution, ops, reference
from .blocks import count_blocks, is_exporting
from .checks import (
    APPROX_MODES,
    MAX_BLOCK_SIZE,
    check_choice,
    check_distance_bias,
    check_scales,
    check_scheme,
    check_settings,
    check_tensors,
    refuse_distance_bias,
    refuse_tracing,
    to_token_mask,
)
from .implementations import FAST, IMPLEMENTATIONS, resolve_impl
from .multiresolution_reference import multiresolution_matrix
from .selection import SELECTION_RULES, BlockSelection, select


def mra2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    block_per_row: int = 8,
    block_budget: int | None = None,
    approx_mode: Literal["full", "sparse"] = "full",
    block_size: int = 32,
    key_block_size: int | None = None,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    selection: str | BlockSelection = "row_normalized",
    distance_bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multi-resolution self-attention with the scales {block_size, 1}: MRA-2 and MRA-2-s.

    ICML 2022 paper, section 4 and Algorithms 1 and 2 with R = {32, 1}.

    A block pair that is selected is computed exactly; every other pair contributes the product of
    its block means ("full") or nothing ("sparse"). Up to `block_size * block_per_row` tokens every
    pair is selected, so the result *is* dense softmax attention.

    Args:
        query, key, value: `[B, H, N, D]`, any strides, one dtype of float32, bfloat16, float16,
            float64. Under autocast they are cast to its dtype first (float64 stays, as elsewhere
            in torch).
        attention_mask: `[B, N]` bool or integer, nonzero at real tokens, any pattern; None means
            all are real. Padded queries give zeros, padded keys are never attended, even when they
            hold NaN.
        block_per_row: budget, in exact blocks per block row that holds a real token; the blocks are
            chosen over the whole matrix of a head.
        block_budget: budget in exact blocks per head; replaces `block_per_row`. Clamped to the live
            pairs of a sample.
        approx_mode: `"full"` is MRA-2. `"sparse"` is MRA-2-s: it keeps the *high* resolution only.
        block_size: queries per block.
        key_block_size: keys per block, a divisor of `block_size`; None is `block_size`, the squares
            of the paper. What a head needs are few keys for many queries: with 8 the same number of
            exact entries has less error, best with `selection="mass"` and the own block of each
            row kept (`initial_prior_diagonal_n_blocks=1`). Budgets and priors keep counting
            squares: a square of the budget is `block_size / key_block_size` narrower pairs, and a
            prior takes all pairs of a square.
        initial_prior_first_n_blocks: the first n block rows and columns that hold a real token are
            chosen before all others.
        initial_prior_diagonal_n_blocks: pairs with `abs(row - column) <= n // 2` are chosen first
            too; 0 is off.
        selection: the rule that ranks pairs, by its name in `mra_attention.selection.RULES`, where
            every row says in a sentence what it ranks by. The default `"row_normalized"` takes the
            coarse logit minus the largest one of its row, so that every row gets its best pair
            when the budget allows one each; `"global"`, `"mass"` and `"refined"` are others. Or a
            ready `BlockSelection` from `select_blocks`; the budget and the priors given here are
            then not used to select.
        distance_bias: `[H, K]`, any floating dtype, differentiable, finite: entry
            `[h, min(abs(x - y), K - 1)]` is added to the logits of all token pairs of the block
            pair (x, y), exact or not, and counts in the selection. It is constant on blocks, so
            that low resolution loses nothing of it. Pairs in the first
            `initial_prior_first_n_blocks` live block rows and columns are global and take none.
        scale: factor of the logits, default `D ** -0.5`.
        impl: `"reference"` (the definition, O(N^2) memory), `"torch"` (fast, no N x N buffer),
            `"native"` (compiled kernels for CPU tensors: float32, bfloat16, float16, head dims up
            to 256, block_size 32), `"triton"` (kernels for CUDA and ROCm tensors: the same dtypes,
            head dims 16 to 128, block_size 32), or `"auto"`: native or triton for such tensors
            where they are there, else torch. An explicit choice is never replaced. While
            `torch.export` traces, none of them: the graph of standard operators in `exported.py`
            is used, which takes every length and costs what the budget costs.

    Returns:
        `[B, H, N, D]` in the dtype of the inputs (of autocast, where that is on). Two runs give the
        same bits.

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or value; the message says
            what to pass.
        RuntimeError: double backward, `torch.vmap` or forward-mode differentiation through
            `impl="torch"`, `"native"` or `"triton"`.
    """
    query, key, value = check_tensors(query, key, value)
    budgets = (block_per_row, block_budget)
    priors = (initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks)
    sizes = (block_size, key_block_size)
    settings = check_settings(query, sizes, budgets, priors, selection, scale)
    check_choice("approx_mode", approx_mode, APPROX_MODES)
    check_choice("impl", impl, IMPLEMENTATIONS)
    token_mask = to_token_mask(attention_mask, query)
    bias = _bias_by_distance(distance_bias, query, block_size)
    arguments = _arguments_of(settings, approx_mode)
    tensors = (query, key, value, token_mask)

    if is_exporting():
        return _exported_attention(*tensors, selection, bias, settings, arguments)
    match resolve_impl(impl, query, block_size, key_block_size):
        case "reference":
            refuse_tracing('impl="reference"', 'use impl="auto"')
            blocks = _reference_blocks(query, key, token_mask, selection, bias, settings)
            return _reference_attention(*tensors, blocks, bias, arguments)
        case fast:
            return _fast_attention(fast, *tensors, selection, bias, settings, arguments)


def multiresolution_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    resolutions: Sequence[int] = (16, 4, 1),
    block_budgets: Sequence[int],
    approx_mode: Literal["full", "sparse"] = "full",
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    selection: str = "row_normalized",
    distance_bias: Tensor | None = None,
    scale: float | None = None,
    impl: Literal["auto", "reference", "torch"] = "auto",
) -> Tensor:
    """Multi-resolution self-attention with any chain of scales.

    ICML 2022 paper, Algorithms 1 and 2. The matrix is covered by blocks of side `resolutions[0]`;
    the best `block_budgets[0]` of them per head are cut into blocks of side `resolutions[1]`, of
    which the best `block_budgets[1]` are cut again, and so on. Every block that is left contributes
    the product of its means.

    `(32, 1)` is MRA-2 and takes its kernels. Budgets that cover everything with a last scale of 1
    give softmax attention. A last scale s above 1 gives a result that is constant over s queries.
    With N tokens, scales s_i and budgets m_i the cost is
    N + (N / s_0)^2 + sum_i m_i (s_(i-1) / s_i)^2: a coarser first scale keeps it linear where the
    pooled matrix of (32, 1) would dominate.

    Args:
        query, key, value, attention_mask, scale: as in `mra2_attention`.
        resolutions: sides of blocks in tokens, from the coarsest on; each divides the one before.
        block_budgets: blocks per head that are cut, one number for every scale but the last;
            clamped to the number of blocks.
        approx_mode: `"full"`, or `"sparse"`: only blocks of the last scale contribute.
        initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks: priors as in
            `mra2_attention`, on the blocks of the coarsest scale.
        selection: the rule that ranks blocks: `"row_normalized"` by the logit minus the largest one
            among the candidates of its row, `"global"` by the logit itself. Two scales that end in
            1 take every rule of `mra2_attention`.
        distance_bias: as in `mra2_attention`, for two scales that end in 1 only.
        impl: `"reference"` (the definition, O(N^2) memory), `"torch"` (no N x N buffer), or
            `"auto"`: torch, and for two scales that end in 1 what `mra2_attention` takes.

    Returns:
        `[B, H, N, D]` in the dtype of the inputs (of autocast, where that is on).

    Raises:
        ValueError: an argument of the wrong type, shape, dtype, device or value; the message says
            what to pass.
    """
    settings: dict[str, Any] = {
        "approx_mode": approx_mode,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "initial_prior_diagonal_n_blocks": initial_prior_diagonal_n_blocks,
        "selection": selection,
        "scale": scale,
    }
    resolutions, block_budgets = check_scales(resolutions, block_budgets)
    check_choice("impl", impl, ("auto", "reference", "torch"))
    if _are_two_scales(resolutions):
        check_choice("selection", selection, SELECTION_RULES)
        settings |= {"block_budget": block_budgets[0], "block_size": resolutions[0]}
        settings |= {"distance_bias": distance_bias, "impl": impl}
        return mra2_attention(query, key, value, attention_mask, **settings)
    refuse_distance_bias(distance_bias, resolutions)
    refuse_tracing(f"resolutions={list(resolutions)}", "use two scales that end in 1")
    query, key, value = check_tensors(query, key, value)
    scheme = check_scheme(query, resolutions, block_budgets, **settings)
    token_mask = to_token_mask(attention_mask, query)
    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference" or query.shape[0] == 0 or query.shape[1] == 0:
            matrix = multiresolution_matrix(query, key, token_mask, scheme)
            return reference.apply_matrix(matrix, value, token_mask)
        return multiresolution.attention(query, key, value, token_mask, scheme)


def select_blocks(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None = None,
    *,
    block_per_row: int = 8,
    block_budget: int | None = None,
    block_size: int = 32,
    key_block_size: int | None = None,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    selection: str = "row_normalized",
    distance_bias: Tensor | None = None,
    scale: float | None = None,
) -> BlockSelection:
    """Return which block pairs `mra2_attention` computes exactly for the same arguments.

    For plots, for tests, and to hand one choice to several calls (`mra2_attention(...,
    selection=selection)`). No gradient. Chosen as by `impl="auto"`: the Triton kernels score in
    float32, from float32 means, torch in float64, so that near-ties can differ between the two.

    Raises:
        ValueError: as `mra2_attention`.
    """
    query, key, _ = check_tensors(query, key, key)
    if isinstance(selection, BlockSelection):
        raise ValueError(
            f"selection must be the name of a rule here, one of {SELECTION_RULES}; "
            "got a ready BlockSelection, which is what this function returns. "
            "Pass it to mra2_attention instead."
        )
    budgets = (block_per_row, block_budget)
    priors = (initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks)
    sizes = (block_size, key_block_size)
    settings = check_settings(query, sizes, budgets, priors, selection, scale)
    token_mask = to_token_mask(attention_mask, query)
    impl = resolve_impl("auto", query, block_size, key_block_size)
    impl = impl if impl in FAST else "torch"
    bias = _bias_by_distance(distance_bias, query, block_size)
    settings |= {"distance_bias": None if bias is None else bias.detach(), "impl": impl}
    blocks = ops.mra2_select(query.detach(), key.detach(), token_mask, **settings)
    return BlockSelection(blocks, block_size, settings["key_block_size"])


def mra2_attention_matrix(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None = None,
    *,
    block_per_row: int = 8,
    block_budget: int | None = None,
    approx_mode: Literal["full", "sparse"] = "full",
    block_size: int = 32,
    key_block_size: int | None = None,
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    selection: str | BlockSelection = "row_normalized",
    distance_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the row-normalised matrix A-hat `[B, H, N, N]` that `mra2_attention` applies.

    Computed by the reference, in O(N^2) memory; float32, or float64 for float64 inputs. Rows of
    padding are zero.

    Raises:
        ValueError: as `mra2_attention`.
    """
    refuse_tracing("the matrix", "leave output_attentions off")
    query, key, _ = check_tensors(query, key, key)
    budgets = (block_per_row, block_budget)
    priors = (initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks)
    sizes = (block_size, key_block_size)
    settings = check_settings(query, sizes, budgets, priors, selection, scale)
    check_choice("approx_mode", approx_mode, APPROX_MODES)
    token_mask = to_token_mask(attention_mask, query)
    bias = _bias_by_distance(distance_bias, query, block_size)
    blocks = _reference_blocks(query, key, token_mask, selection, bias, settings)
    with torch.autocast(query.device.type, enabled=False):
        arguments = _arguments_of(settings, approx_mode)
        return reference.attention_matrix(query, key, token_mask, blocks, bias, **arguments)


def multiresolution_attention_matrix(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None = None,
    *,
    resolutions: Sequence[int] = (16, 4, 1),
    block_budgets: Sequence[int],
    approx_mode: Literal["full", "sparse"] = "full",
    initial_prior_first_n_blocks: int = 0,
    initial_prior_diagonal_n_blocks: int = 0,
    selection: str = "row_normalized",
    distance_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the row-normalised matrix A-hat `[B, H, N, N]` that `multiresolution_attention`
    applies.

    Computed by the reference, in O(N^2) memory; float32, or float64 for float64 inputs. Rows of
    padding are zero.

    Raises:
        ValueError: as `multiresolution_attention`.
    """
    settings: dict[str, Any] = {
        "approx_mode": approx_mode,
        "initial_prior_first_n_blocks": initial_prior_first_n_blocks,
        "initial_prior_diagonal_n_blocks": initial_prior_diagonal_n_blocks,
        "selection": selection,
        "scale": scale,
    }
    resolutions, block_budgets = check_scales(resolutions, block_budgets)
    if _are_two_scales(resolutions):
        check_choice("selection", selection, SELECTION_RULES)
        settings |= {"block_budget": block_budgets[0], "block_size": resolutions[0]}
        settings |= {"distance_bias": distance_bias}
        return mra2_attention_matrix(query, key, attention_mask, **settings)
    refuse_distance_bias(distance_bias, resolutions)
    refuse_tracing("the matrix", "leave output_attentions off")
    query, key, _ = check_tensors(query, key, key)
    scheme = check_scheme(query, resolutions, block_budgets, **settings)
    token_mask = to_token_mask(attention_mask, query)
    with torch.autocast(query.device.type, enabled=False):
        return multiresolution_matrix(query, key, token_mask, scheme)


def _are_two_scales(resolutions: tuple[int, ...]) -> bool:
    """Whether these scales are what `mra2_attention` computes."""
    return len(resolutions) == 2 and resolutions[1] == 1 and resolutions[0] <= MAX_BLOCK_SIZE


def _arguments_of(settings: dict, approx_mode: str) -> dict:
    """What attention to selected blocks needs besides tensors."""
    shared = ("scale", "block_size", "key_block_size", "initial_prior_first_n_blocks")
    return {"sparse": approx_mode == "sparse"} | {name: settings[name] for name in shared}


def _bias_by_distance(
    distance_bias: Tensor | None, query: Tensor, block_size: int
) -> Tensor | None:
    """The checked bias as `[H, R]`, one column per distance that occurs; for an exported graph,
    whose R is not known, as it was given.
    """
    bias = check_distance_bias(distance_bias, query)
    if bias is None or is_exporting():
        return bias
    if torch.jit.is_tracing():  # the next length may have other distances
        distances = torch.arange(count_blocks(query.shape[2], block_size), device=bias.device)
        return bias[:, distances.clamp(max=bias.shape[1] - 1)]
    # Not by an index: its gradient would be summed by atomics on a GPU.
    missing = count_blocks(query.shape[2], block_size) - bias.shape[1]
    if missing <= 0:
        return bias[:, : bias.shape[1] + missing]
    return torch.cat([bias, bias[:, -1:].expand(-1, missing)], dim=1)


def _fast_attention(
    impl, query, key, value, token_mask, selection, bias, settings, arguments
) -> Tensor:
    """Attention by an implementation of `FAST`."""
    _refuse_forward_mode(query, key, value, *(() if bias is None else (bias,)))
    shared = {"impl": impl}
    # Neither operator has a gradient: the backward pass holds the gradient of the coarse part.
    detached = [x.detach() for x in (query, key, value)]
    if FAST[impl].shares_summaries:
        key_block_size = settings["key_block_size"]
        summaries = ops.mra2_summarize(*detached, token_mask, key_block_size)
        shared["vectors"], shared["counts"] = summaries
    if isinstance(selection, BlockSelection):
        blocks, largest_budget = selection.blocks, None
    else:
        n_blocks = count_blocks(query.shape[2], settings["block_size"])
        squares = settings["block_budget"]
        if squares is None:
            squares = n_blocks * settings["block_per_row"]
        blocks = None  # every live pair, whatever the values
        # A traced graph is run at other lengths, too, so that it always has to choose.
        is_traced = torch.jit.is_tracing()
        if is_traced or squares < n_blocks**2:
            selection_bias = None if bias is None else bias.detach()
            blocks = ops.mra2_select(
                *detached[:2], token_mask, **settings, **shared, distance_bias=selection_bias
            )
        per_block = settings["block_size"] // settings["key_block_size"]
        largest_budget = None if is_traced else squares * per_block
    arguments = arguments | shared | {"largest_budget": largest_budget, "distance_bias": bias}
    output, _ = ops.mra2_forward(query, key, value, token_mask, blocks, **arguments)
    return output.to(query.dtype)


def _refuse_forward_mode(*inputs: Tensor) -> None:
    """Raise where forward-mode differentiation would silently see a derivative of zero."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "mra2_attention has no forward-mode derivative in the fast implementations; "
            'pass impl="reference", which torch differentiates in every mode.'
        )


def _reference_blocks(query, key, token_mask, selection, bias, settings) -> Tensor:
    """The selected pairs `[B, H, R, C]` bool: of a ready selection, or chosen by torch."""
    if isinstance(selection, BlockSelection):
        return selection.blocks
    return select(query, key, token_mask, **settings, distance_bias=bias)


def _exported_attention(
    query, key, value, token_mask, selection, bias, settings, arguments
) -> Tensor:
    """The operator in a graph that `torch.export` can keep symbolic for every N >= 1."""
    if isinstance(selection, BlockSelection):  # of one length, and of any number of pairs
        attend: Callable[..., Tensor] = partial(
            reference.attention, blocks=selection.blocks, **arguments
        )
    else:
        attend = partial(exported.export_attention, sparse=arguments["sparse"], **settings)
    device = query.device.type
    # Where autocast is off anyway, a region of it would hide the graph in a submodule.
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        return attend(query, key, value, token_mask, distance_bias=bias)


def _reference_attention(query, key, value, token_mask, blocks, bias, arguments) -> Tensor:
    tensors = (query, key, value, token_mask, blocks, bias)
    if torch.is_autocast_enabled(query.device.type):
        return _ReferenceUnderAutocast.apply(*tensors, arguments)
    return reference.attention(*tensors, **arguments)


class _ReferenceUnderAutocast(torch.autograd.Function):
    """The reference with autocast off, forward and backward, even when `backward()` is called
    inside the context.
    """

    @staticmethod
    def forward(ctx, query, key, value, token_mask, blocks, bias, arguments):
        ctx.save_for_backward(query, key, value, token_mask, blocks, bias)
        ctx.arguments = arguments
        with torch.autocast(query.device.type, enabled=False):
            return reference.attention(query, key, value, token_mask, blocks, bias, **arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, token_mask, blocks, bias = ctx.saved_tensors
        given = (query, key, value) if bias is None else (query, key, value, bias)
        inputs = [x.detach().requires_grad_() for x in given]
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            arguments = (*inputs[:3], token_mask, blocks, *inputs[3:])
            output = reference.attention(*arguments, **ctx.arguments)
            grads = torch.autograd.grad(output, inputs, grad_output)
        grad_bias = None if bias is None else grads[3]
        return *grads[:3], None, None, grad_bias, None
