"""The reference against Transformers' own MRA-2, wherever the latter is well defined.

Inputs carry a positive offset, so that the largest coarse logit of every row is positive and
blocks of padding, which the built-in function counts as 0, never become a row's maximum. Budgets
beyond the priors leave one pair for each block row: the best pair of every row scores the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from builtin_mra import BLOCK_SIZE, builtin_mra2_attention, builtin_selection, emulated_kernel

import mra_attention
from pairwise import pairwise

HEADS = 2
OUTPUT_TOLERANCE = 5e-6  # absolute
GRADIENT_TOLERANCE = 5e-6  # of the gradient's norm


@dataclass(frozen=True)
class Case:
    """A batch padded on the right to `tokens`, `lengths` real tokens each (None: no mask)."""

    tokens: int
    block_budget: int
    lengths: tuple[int, ...] | None = None
    first: int = 0
    diagonal: int = 0

    @property
    def batch(self) -> int:
        return 2 if self.lengths is None else len(self.lengths)

    @property
    def attention_mask(self) -> torch.Tensor | None:
        if self.lengths is None:
            return None
        return torch.arange(self.tokens) < torch.tensor(self.lengths)[:, None]  # [B, N]

    @property
    def budget_and_priors(self) -> dict[str, int]:
        return {
            "block_budget": self.block_budget,
            "initial_prior_first_n_blocks": self.first,
            "initial_prior_diagonal_n_blocks": self.diagonal,
        }


CASES = {
    "64 tokens": Case(64, 2),
    "64 tokens, padded inside a block": Case(64, 3, lengths=(64, 40, 57)),
    "64 tokens, padded by a block": Case(64, 2, lengths=(64, 32)),
    "64 tokens, first block": Case(64, 3, lengths=(64, 40), first=1),
    "64 tokens, diagonal": Case(64, 2, diagonal=1),
    "64 tokens, full budget": Case(64, 4, lengths=(64, 40)),
    "512 tokens": Case(512, 64),
    "512 tokens, padded by whole blocks": Case(512, 64, lengths=(512, 384, 288)),
    "512 tokens, padded inside a block": Case(512, 64, lengths=(333, 512, 271)),
    "512 tokens, first block and diagonal": Case(512, 72, first=1, diagonal=1),
    "512 tokens, first block and three diagonals": Case(512, 96, first=1, diagonal=3),
    "512 tokens, priors and padding": Case(512, 96, (333, 320, 512), first=1, diagonal=3),
    "512 tokens, full budget": Case(512, 256),
    "512 tokens, full budget and padding": Case(512, 256, lengths=(512, 160, 333)),
}


@pytest.fixture(autouse=True)
def builtin_attention_has_its_kernel():
    with emulated_kernel():
        yield


@pairwise(name=CASES, head_dim=[32, 64], approx_mode=["full", "sparse"])
def test_reference_equals_the_builtin_function(name, head_dim, approx_mode):
    case = CASES[name]
    query, key, value, grad_output = make_inputs(case, head_dim)
    mask = case.attention_mask
    assert_same_blocks(query, key, case)

    results = {}
    for name in ("reference", "builtin"):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if name == "reference":
            output = mra_attention.mra2_attention(
                *inputs, mask, approx_mode=approx_mode, **case.budget_and_priors, impl="reference"
            )
        else:
            output = builtin_mra2_attention(
                *inputs, mask, approx_mode=approx_mode, **case.budget_and_priors
            )
        results[name] = (output, *torch.autograd.grad(output, inputs, grad_output))

    output, *gradients = results["reference"]
    expected_output, *expected_gradients = results["builtin"]
    real = real_rows(case)
    error = ((output - expected_output) * real).abs().max()
    assert error <= OUTPUT_TOLERANCE, f"output is off by {error:.1e}"
    for name, gradient, expected in zip("qkv", gradients, expected_gradients, strict=True):
        error = ((gradient - expected) * real).norm() / (expected * real).norm()
        assert error <= GRADIENT_TOLERANCE, f"d{name} is off by {error:.1e} of its norm"


@pytest.mark.parametrize("approx_mode", ["full", "sparse"])
def test_builtin_function_is_dense_attention_at_full_budget(approx_mode):
    case = CASES["512 tokens, full budget and padding"]
    query, key, value, _ = make_inputs(case, head_dim=64)
    output = builtin_mra2_attention(
        query, key, value, case.attention_mask, block_budget=256, approx_mode=approx_mode
    )
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=case.attention_mask[:, None, None, :]
    )
    assert ((output - dense) * real_rows(case)).abs().max() <= OUTPUT_TOLERANCE


def make_inputs(case, head_dim):
    """Query, key, value and output gradient; queries and keys vary by block and by token."""
    generator = torch.Generator().manual_seed(case.tokens + head_dim)
    blocks = case.tokens // BLOCK_SIZE

    def noise(tokens):
        return torch.randn(case.batch, HEADS, tokens, head_dim, generator=generator)

    query, key = (
        0.75 + 0.5 * noise(blocks).repeat_interleave(BLOCK_SIZE, dim=2) + noise(case.tokens)
        for _ in range(2)
    )
    return query, key, noise(case.tokens), noise(case.tokens) * real_rows(case)


def real_rows(case):
    """`[B, 1, N, 1]`, True where a token is real."""
    if case.lengths is None:
        return torch.ones(case.batch, 1, case.tokens, 1, dtype=torch.bool)
    return case.attention_mask[:, None, :, None]


def assert_same_blocks(query, key, case):
    """Both functions compute the same block pairs of real tokens exactly."""
    live = real_rows(case).unflatten(2, (-1, BLOCK_SIZE)).any(dim=3)  # [B, 1, R, 1]
    builtin = builtin_selection(query, key, case.attention_mask, **case.budget_and_priors)
    selection = mra_attention.select_blocks(
        query,
        key,
        case.attention_mask,
        block_size=BLOCK_SIZE,
        selection="row_normalized",
        **case.budget_and_priors,
    )
    differing = int((selection.blocks != (builtin & live & live.mT)).sum())
    assert differing == 0, f"{differing} block pairs are chosen by one function only"
