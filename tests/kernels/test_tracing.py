"""`torch.jit.trace`: a graph traced at one length is right at all others, or refused."""

import warnings

import pytest
import torch
from attention_cases import make_bias, make_inputs

from mra_attention import (
    mra2_attention,
    mra2_attention_matrix,
    multiresolution_attention,
    multiresolution_attention_matrix,
)


def tensors(length, batch=2):
    """query, key, value and a mask that hides the end of the last sample."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    return (*make_inputs(batch, 2, length, 16, amplitude=2.0)[:3], mask)


def traced(attend, length):
    example = (*tensors(length)[:3], torch.ones(2, length, dtype=torch.bool))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: tracing is deprecated, shapes are read
        return torch.jit.trace(attend, example, check_trace=False)


@pytest.mark.parametrize("example", [40, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("budget", [{"block_per_row": 3}, {"block_budget": 9}])
def test_a_graph_traced_at_one_length_is_right_at_others(fast, budget, biased, example):
    settings = budget | {"impl": fast.name, "initial_prior_first_n_blocks": 1}
    if biased:  # fewer columns than some lengths have distances
        settings["distance_bias"] = make_bias(2, 5)

    def attend(query, key, value, mask):
        return mra2_attention(query, key, value, mask, **settings)

    graph = traced(attend, example)
    for length in (7, 96, 290):
        inputs = tensors(length, batch=3)
        torch.testing.assert_close(graph(*inputs), attend(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v, mask: mra2_attention(q, k, v, mask, impl="reference"),
        lambda q, k, v, mask: multiresolution_attention(q, k, v, mask, block_budgets=(4, 8)),
        lambda q, k, v, mask: mra2_attention_matrix(q, k, mask),
        lambda q, k, v, mask: multiresolution_attention_matrix(q, k, mask, block_budgets=(4, 8)),
    ],
)
def test_what_would_be_fixed_to_one_length_is_refused(attend):
    with pytest.raises(ValueError, match=r"torch\.jit\.trace would fix.*torch\.export"):
        traced(attend, 40)
