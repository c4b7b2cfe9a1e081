"""Other approximations of attention: each has a property that follows from what it is."""

import numpy as np
import pytest
import torch

from mra_hf.analysis.head_inputs import synthetic_heads
from mra_hf.baselines.kernelized import linformer
from mra_hf.baselines.measures import attention_weights, dense_attention, relative_errors
from mra_hf.baselines.optimal import largest_entries, low_rank
from mra_hf.encoders.methods import METHODS

#: Methods on given queries, keys and values; the others are trained layers only.
FUNCTIONS = [name for name, method in METHODS.items() if method.attend]


@pytest.fixture(scope="module")
def heads():
    return synthetic_heads(256, instances=1, head_dim=16, common_value=0.25)


def attend(name, heads, size, **changes):
    inputs = {part: changes.get(part, getattr(heads, part)) for part in ("query", "key", "value")}
    return METHODS[name].attend(**inputs, scale=heads.scale, size=size, seed=0)


def exact(heads):
    return dense_attention(heads.query, heads.key, heads.value, heads.scale)


def smallest(name):
    return METHODS[name].sizes_at(256)[0]


#: Whose rows are weights: a low-rank matrix and an iterated inverse come near it, no more.
WEIGHTS = [name for name in FUNCTIONS if name not in ("linformer", "low_rank", "nystromformer")]


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weights_of_a_row_sum_to_one(heads, name):
    constant = torch.ones_like(heads.value)
    output = attend(name, heads, METHODS[name].sizes_at(256)[-1], value=constant)
    if name in ("sparse", "mra2_s"):  # rows of which nothing was chosen are zero
        output = output[output.abs().sum(-1) > 0]
    assert (output - 1).abs().max() < 1e-4


# The inverse of Nystromformer starts from a maximum over all heads, in Transformers too.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "nystromformer"])
def test_an_example_and_a_head_do_not_see_one_another(heads, name):
    size = smallest(name)
    both = attend(name, heads, size)
    if name == "bigbird":  # each head has random blocks of its own, the first in order
        first = both[:, :1]
        assert torch.isfinite(both).all()
        changed = heads.value.clone()
        changed[:, 1:] += 1
        torch.testing.assert_close(attend(name, heads, size, value=changed)[:, :1], first)
        return
    for head in (0, 7):
        one = heads.head(0, head)
        torch.testing.assert_close(
            attend(name, one, size), both[:, head : head + 1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mra2", 8),
        ("mra2_s", 8),
        ("nystromformer", 256),
        ("h_transformer", 256),
        ("h_transformer", 128),
        ("sparse", 256),
        ("low_rank", 256),
    ],
)
def test_the_largest_size_is_softmax_attention(heads, name, size):
    torch.testing.assert_close(attend(name, heads, size), exact(heads), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["mra2", "mra2_s", "longformer", "h_transformer", "sparse", "low_rank", "performer"]
)
def test_more_work_gives_a_smaller_error(heads, name):
    errors = [
        float(relative_errors(attend(name, heads, size), exact(heads)).mean())
        for size in METHODS[name].sizes_at(256)
    ]
    assert len(errors) >= 3 and errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_longformer_is_a_window_with_one_global_token(heads):
    size, length = 32, 256
    position = torch.arange(length)
    seen = (position[:, None] - position).abs() <= size // 2
    seen[0] = seen[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads.query, heads.key, heads.value, attn_mask=seen, scale=heads.scale
    )
    torch.testing.assert_close(attend("longformer", heads, size), expected, rtol=1e-4, atol=1e-5)


def test_bigbird_is_softmax_over_the_blocks_it_reads(heads):
    size, length = 16, 256
    n_blocks = length // size
    # What a row reads shows in the gradient of its output.
    value = heads.value.clone().requires_grad_()
    output = attend("bigbird", heads, size, value=value)
    middle = 5
    (grad,) = torch.autograd.grad(output[0, 0, middle * size].sum(), value)
    read = grad[0, 0].abs().sum(-1).unflatten(0, (n_blocks, size)).sum(-1) > 0
    assert {0, middle - 1, middle, middle + 1, n_blocks - 1} <= set(read.nonzero()[:, 0].tolist())
    assert int(read.sum()) == 8, "three random ones besides"
    keys = read.repeat_interleave(size)
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads.query[0, 0, middle * size, None],
        heads.key[0, 0, keys],
        heads.value[0, 0, keys],
        scale=heads.scale,
    )
    torch.testing.assert_close(output[0, 0, middle * size], expected[0], rtol=1e-4, atol=1e-5)


def test_best_sparse_and_low_rank_are_the_best(heads):
    weights = attention_weights(heads.query, heads.key, heads.scale)[0, 5]
    singular = torch.linalg.svdvals(weights)
    error = (low_rank(weights, 20) - weights).norm()
    torch.testing.assert_close(error, singular[20:].norm(), rtol=1e-3, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    selected = largest_entries(weights, 8) > 0
    assert selected.sum() == 8 * 256
    dropped = weights[~selected].norm()
    for _ in range(5):
        other = torch.zeros(256 * 256, dtype=torch.bool)
        other[torch.randperm(256 * 256, generator=generator)[: 8 * 256]] = True
        assert dropped < weights.flatten()[~other].norm()


def test_performer_is_right_on_average(heads):
    head = heads.head(0, 6)
    weights = attention_weights(head.query, head.key, head.scale)
    value = torch.eye(256)[None, None]
    estimates = [
        METHODS["performer"].attend(
            head.query, head.key, value, scale=head.scale, size=256, seed=seed
        )
        for seed in range(40)
    ]
    one = (estimates[0] - weights).norm() / weights.norm()
    mean = (torch.stack(estimates).mean(0) - weights).norm() / weights.norm()
    assert mean < 0.4 * one


def test_linformer_with_nothing_projected_away_is_attention(heads):
    parts = (heads.query, heads.key, heads.value)
    output = linformer(*parts, scale=heads.scale, size=256, projection=torch.eye(256))
    torch.testing.assert_close(output, exact(heads), rtol=1e-4, atol=1e-5)
    assert relative_errors(attend("linformer", heads, 16), exact(heads)).mean() > 1, "untrained"


def test_h_transformer_reads_every_key_and_is_exact_where_segments_are_constant(heads):
    segment = 64
    query, key = (
        x[:, :, ::segment].repeat_interleave(segment, dim=2) for x in (heads.query, heads.key)
    )
    output = attend("h_transformer", heads, 64, query=query, key=key)
    expected = dense_attention(query, key, heads.value, heads.scale)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    value = heads.value.clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        attend("h_transformer", heads, 16, value=value)[0, 0, 0].sum(), value
    )
    assert (grad[0, 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ["longformer", "bigbird", "nystromformer", "h_transformer"])
def test_lengths_that_do_not_fit_are_refused(name):
    heads = synthetic_heads(250, instances=1, head_dim=16)
    with pytest.raises(ValueError, match=r"the length must be .*, got 250 and 16"):
        attend(name, heads, 16)


def test_bigbird_names_too_few_blocks_and_leaves_numpy_as_it_was():
    heads = synthetic_heads(112, instances=1, head_dim=16)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    with pytest.raises(ValueError, match="7 blocks do not leave 3 to draw"):
        attend("bigbird", heads, 16)
    assert np.random.rand() == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_scale_is_a_factor_of_the_logits(heads, name):
    """Larger queries and keys with a smaller scale have the same logits; the scale counts."""
    size = smallest(name)
    parts = {"query": 2 * heads.query, "key": 2 * heads.key, "value": heads.value}
    method = METHODS[name].attend
    same = method(**parts, scale=heads.scale / 4, size=size, seed=0)
    expected = attend(name, heads, size)
    torch.testing.assert_close(same, expected, rtol=1e-3, atol=1e-3)
    other = method(heads.query, heads.key, heads.value, scale=heads.scale / 4, size=size, seed=0)
    assert (other - expected).norm() > 0.05 * expected.norm()


def test_sizes_fit_the_length():
    for name, method in METHODS.items():
        for length in (128, 200, 384, 509):
            heads = synthetic_heads(length, instances=1, head_dim=8)
            for size in method.sizes_at(length)[:2]:
                assert torch.isfinite(attend(name, heads, size)).all()
    assert METHODS["h_transformer"].sizes_at(384) == () == METHODS["longformer"].sizes_at(509)
    assert METHODS["h_transformer"].sizes_at(512) == (8, 16, 32, 64, 128)
