"""Every implementation gives what the reference gives, outputs and gradients, for one selection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    INTERPRETED,
    MASK_KINDS,
    MODES,
    NAMES,
    REFERENCE,
    Implementation,
    assert_agrees,
    assert_all_close,
    make_inputs,
    outputs_and_gradients,
)

from mra_attention import BlockSelection, select_blocks
from pairwise import pairwise

HALF_TYPES = (torch.bfloat16, torch.float16)


@pairwise(
    length=[1, 31, 33, 100, 257, 257 if INTERPRETED else 1000],
    dim=[16, 40, 64, 80, 128],
    mask_kind=MASK_KINDS,
    mode=MODES,
    dtype=[torch.float32, *HALF_TYPES],
)
def test_agrees_with_reference(length, dim, mask_kind, mode, dtype, fast):
    inputs, mask = fast.inputs(2, 2, length, dim, dtype=dtype), fast.mask(mask_kind, 2, length)
    assert_agrees(fast, inputs, mask, approx_mode=mode, block_per_row=2)


@pairwise(length=[1, 31, 33, 100, 257, 1000], dim=[8, 32, 144], mask_kind=MASK_KINDS, mode=MODES)
def test_agrees_with_reference_in_float64(length, dim, mask_kind, mode, general_fast):
    inputs = general_fast.inputs(2, 2, length, dim, dtype=torch.float64)
    mask = general_fast.mask(mask_kind, 2, length)
    assert_agrees(general_fast, inputs, mask, approx_mode=mode, block_per_row=2)


@pairwise(
    choice=[
        {"initial_prior_first_n_blocks": 1},
        {"initial_prior_diagonal_n_blocks": 2},
        {"initial_prior_first_n_blocks": 2, "initial_prior_diagonal_n_blocks": 1},
        {"block_budget": 1},
        {"block_budget": 13},
        {"block_budget": 10**6},
        {"selection": "global"},
    ],
    mask_kind=MASK_KINDS,
    mode=MODES,
)
def test_agrees_with_reference_for_every_choice(choice, mask_kind, mode, fast):
    inputs = fast.inputs(3, 2, 150, 16, dtype=fast.finest_dtype)
    choice = {"block_per_row": 4} | choice
    assert_agrees(fast, inputs, fast.mask(mask_kind, 3, 150), approx_mode=mode, **choice)


BUDGETS = [
    *({"block_per_row": n} for n in range(1, 6)),
    *({"block_budget": n} for n in (1, 8, 14, 15, 16, 17)),
]


@pairwise(
    budget=BUDGETS[::3] if INTERPRETED else BUDGETS,
    mask_kind=MASK_KINDS,
    mode=MODES,
)
def test_spends_every_budget_like_the_reference(budget, mask_kind, mode, fast):
    """Of 16 pairs, in 4 block rows; each implementation chooses for itself."""
    inputs, mask = fast.inputs(2, 2, 100, 16, dtype=fast.finest_dtype), fast.mask(mask_kind, 2, 100)
    expected = REFERENCE.attend(inputs, mask, approx_mode=mode, **budget)
    tolerance = 1e-10 if fast.is_general else 2e-5
    for impl in (fast, Implementation("auto")):
        results = impl.attend(inputs, mask, approx_mode=mode, **budget)
        assert_all_close(results, expected, tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_agrees_when_rows_have_no_block_or_all_blocks(mode, fast):
    inputs = fast.inputs(1, 2, 150, 16, dtype=fast.finest_dtype)
    blocks = torch.zeros(1, 2, 5, 5, dtype=torch.bool, device=fast.device)
    blocks[:, 0, 1, :] = True
    blocks[:, 0, 3, 2] = True
    blocks[:, 1, :, 2] = True
    for mask in (None, fast.mask("holes", 1, 150)):  # block 1 holds no real token
        assert_agrees(fast, inputs, mask, approx_mode=mode, selection=BlockSelection(blocks, 32))


@pairwise(block_size=[8, 16, 64], mode=MODES)
def test_agrees_with_reference_at_other_block_sizes(block_size, mode, general_fast):
    inputs = general_fast.inputs(2, 2, 257, 16, dtype=torch.float64)
    mask = general_fast.mask("holes", 2, 257)
    choice = {"block_per_row": 2, "block_size": block_size}
    assert_agrees(general_fast, inputs, mask, approx_mode=mode, **choice)


@pairwise(dtype=HALF_TYPES, mask_kind=MASK_KINDS)
def test_full_budget_in_half_types_errs_no_more_than_reference(dtype, mask_kind, fast):
    inputs, mask = fast.inputs(2, 2, 100, 64, dtype=dtype), fast.mask(mask_kind, 2, 100)
    assert_agrees(fast, inputs, mask, block_per_row=4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_nan_in_a_real_token_is_not_hidden(name, fast):
    """As by the definition: the row of a query, every row of a sample for a key or value."""
    inputs = fast.inputs(2, 1, 100, 16)
    selection = select_blocks(*inputs[:2], block_per_row=2)
    inputs[NAMES.index(name) - 1][0, 0, 70, 3] = torch.nan
    results, expected = (impl.attend(inputs, selection=selection) for impl in (fast, REFERENCE))
    assert torch.equal(results[0].isnan(), expected[0].isnan()) and results[0].isnan().any()
    for x, y in zip(results, expected, strict=True):  # a gradient spreads over the rest of a block
        assert not (y.isnan() & ~x.isnan()).any()


def test_comparison_sees_a_wrong_gradient():
    results = make_inputs(1, 1, 4, 4)
    for i, name in enumerate(NAMES):
        wrong = [x + 1e-3 * (i == j) for j, x in enumerate(results)]
        with pytest.raises(AssertionError, match=name):
            assert_all_close(wrong, results, 1e-5)


# -- sharp logits: what is rounded too early shows in the gradients


def sharp_inputs(dtype):
    """Three times larger logits."""
    query, key, value, grad = make_inputs(2, 2, 257, 80)
    return [x.to(dtype) for x in (3 * query, 3 * key, value, grad)]


def relative_errors(results, inputs, **choice):
    exact = REFERENCE.attend([x.double() for x in inputs], **choice)
    return [
        (x.double() - truth).norm() / truth.norm() for x, truth in zip(results, exact, strict=True)
    ]


@pytest.mark.parametrize("block_per_row", [2, 16])
def test_float16_loses_no_digits_to_sharp_logits(block_per_row, general_fast):
    inputs = sharp_inputs(torch.float16)
    choice = {"selection": select_blocks(*inputs[:2], block_per_row=block_per_row)}
    errors, eager_errors = (
        relative_errors(impl.attend(inputs, **choice), inputs, **choice)
        for impl in (general_fast, REFERENCE)
    )
    for error, eager in zip(errors, eager_errors, strict=True):
        assert error <= 1.02 * eager


@pytest.mark.parametrize("block_per_row", [2, 16])
def test_bfloat16_errs_no_more_than_dense_attention_in_bfloat16(block_per_row, general_fast):
    """On a CPU bfloat16 operands are multiplied as such, as dense attention does."""
    inputs = sharp_inputs(torch.bfloat16)
    choice = {"selection": select_blocks(*inputs[:2], block_per_row=block_per_row)}
    errors = relative_errors(general_fast.attend(inputs, **choice), inputs, **choice)
    everything = {"selection": select_blocks(*inputs[:2], block_per_row=9)}
    dense = outputs_and_gradients(F.scaled_dot_product_attention, *inputs)
    dense_errors = relative_errors(dense, inputs, **everything)
    for error, dense_error in zip(errors, dense_errors, strict=True):
        # The exact and the coarse part are rounded one after the other: at most twice as often.
        assert error <= 1.5 * dense_error


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pairwise(mask_kind=MASK_KINDS, mode=MODES)
def test_torch_path_agrees_with_reference_on_a_gpu(mask_kind, mode):
    torch_path = Implementation("torch", "cuda")
    inputs = torch_path.inputs(2, 2, 257, 64, dtype=torch.float64)
    mask = torch_path.mask(mask_kind, 2, 257)
    assert_agrees(torch_path, inputs, mask, approx_mode=mode, block_per_row=2)
