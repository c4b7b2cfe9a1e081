"""The Long Range Arena encoder with every attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from mra_hf import LraConfig, LraForSequenceClassification, LraModel
from mra_hf.encoders.layers import NystromformerLayer, iterative_inverse
from mra_hf.encoders.methods import ARENA_ATTENTIONS

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_labels": 3}
SIZES |= {"max_position_embeddings": 128, "hidden_dropout_prob": 0.0}
SIZES |= {"attention_probs_dropout_prob": 0.0}
#: Sizes that fit short texts.
OWN = {"linformer": 16, "nystromformer": 8, "performer": 32, "longformer": 8}


def config(attention, **settings):
    return LraConfig(
        **SIZES | {"attention": attention, "attention_size": OWN.get(attention)} | settings
    )


def texts(length=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    ids = torch.randint(1, 40, (3, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attention", ARENA_ATTENTIONS)
def test_every_attention_trains_and_comes_back(attention, tmp_path):
    model = LraForSequenceClassification(config(attention))
    inputs, labels = texts(), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # What is built and never reached: Longformer's values of global queries have no other use.
    assert not {name for name, grad in grads.items() if grad is None}
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, LraForSequenceClassification)
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("attention", ARENA_ATTENTIONS)
def test_neighbours_and_what_padding_holds_change_nothing(attention):
    model = LraForSequenceClassification(config(attention)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name:
                parameter.mul_(4)
    inputs, other = texts(), texts(seed=1)
    logits = model(**inputs).logits
    joined = {name: torch.cat([other[name], x]) for name, x in inputs.items()}
    torch.testing.assert_close(model(**joined).logits[3:], logits, rtol=1e-4, atol=1e-5)
    embeds = model.lra.embeddings.tokens(inputs["input_ids"])
    hidden = inputs["attention_mask"] == 0
    embeds = embeds.masked_fill(hidden[..., None], torch.nan)
    dirty = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(dirty.logits, logits, rtol=1e-4, atol=1e-5)
    dirty.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_iterated_inverse_is_one():
    matrix = torch.softmax(2 * torch.randn(3, 2, 8, 8, dtype=torch.float64), -1)
    identity = torch.eye(8, dtype=torch.float64).expand_as(matrix)
    torch.testing.assert_close(iterative_inverse(matrix, 40) @ matrix, identity, atol=1e-6, rtol=0)


def test_masked_keys_count_for_nothing_in_nystromformer():
    """Landmarks see zeros at padding; keys and values there are not attended at all."""
    layer = NystromformerLayer(config("nystromformer")).eval()
    mask = texts()["attention_mask"].bool()
    states = torch.randn(3, 100, 32)
    before = layer(states, mask)[0]
    with torch.no_grad():
        layer.attend.value.bias.add_(1)  # all that padding has
    after = layer(states, mask)[0]
    shift = layer.output(torch.ones(32)) - layer.output.bias
    torch.testing.assert_close((after - before)[1, :50], shift.expand(50, -1), atol=2e-2, rtol=0)


@pytest.mark.parametrize("attention", ARENA_ATTENTIONS)
def test_half_precision_is_finite_at_full_length(attention):
    longest = config(attention, max_position_embeddings=4096)
    model = LraForSequenceClassification(longest).eval()
    ids = torch.randint(1, 40, (1, 4096))
    exact = model(ids).logits
    with torch.autocast("cpu", torch.float16):
        output = model(ids).logits
    assert (output.float() - exact).abs().max() < 0.02
    if attention not in ("longformer", "nystromformer"):  # Transformers' own layers
        assert torch.isfinite(model.to(torch.bfloat16)(ids).logits).all()


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(name, marks=() if name in ("mra2", "adamra") else pytest.mark.slow)
        for name in ARENA_ATTENTIONS
        if name != "longformer"
    ],
)
def test_models_compile_without_a_graph_break(attention):
    model = LraModel(config(attention)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = texts()
    torch.testing.assert_close(
        compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state
    )


@pytest.mark.parametrize("pooling", ["mean", "mean_over_all"])
@pytest.mark.parametrize(
    "attention", [name for name in ARENA_ATTENTIONS if name != "nystromformer"]
)
def test_padding_reaches_no_token(attention, pooling):
    model = LraModel(config(attention)).eval()
    inputs = texts()
    states = model(**inputs).last_hidden_state
    short = {name: x[1:2, :50] for name, x in inputs.items()}
    alone = model(**short).last_hidden_state
    torch.testing.assert_close(states[1:2, :50], alone, rtol=1e-4, atol=1e-5)
    assert (states[1, 50:] == 0).all()


def test_the_layer_is_that_of_the_papers():
    model = LraModel(config("dense")).eval()
    inputs = texts()
    mask = inputs["attention_mask"].bool()
    x = model.embeddings.tokens(inputs["input_ids"]) + model.embeddings.positions.weight[:100]
    for layer in model.encoder.layers:
        normed = layer.attention_norm(x)
        own = layer.attention
        query, key, value = (
            part(normed).unflatten(-1, (2, 16)).transpose(1, 2)
            for part in (own.query, own.key, own.value)
        )
        logits = query @ key.mT / 4
        weights = torch.softmax(logits.masked_fill(~mask[:, None, None], -torch.inf), -1)
        x = x + own.output((weights @ value).transpose(1, 2).flatten(2))
        x = x + layer.down(F.gelu(layer.up(layer.feed_forward_norm(x))))
    expected = model.encoder.norm(x) * mask[..., None]
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_full_budgets_are_dense_attention():
    dense = LraModel(config("dense")).eval()
    for attention in ("mra2", "mra2_s"):
        model = LraModel(config(attention, block_per_row=4)).eval()
        model.load_state_dict(dense.state_dict())
        torch.testing.assert_close(
            model(**texts()).last_hidden_state,
            dense(**texts()).last_hidden_state,
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_grid_is_read_patch_by_patch():
    settings = {"block_per_row": 1, "grid": [16, 8]}
    model = LraModel(config("mra2", **settings)).eval()
    plain = LraModel(config("mra2", block_per_row=1)).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(1, 40, (2, 128))
    # A column of patches of 4 x 8 that is as wide as the grid stands in its order already.
    torch.testing.assert_close(model(ids).last_hidden_state, plain(ids).last_hidden_state)
    wide = LraModel(config("mra2", block_per_row=1, grid=[8, 16])).eval()
    wide.load_state_dict(model.state_dict())
    states = wide(ids).last_hidden_state
    assert not torch.allclose(states, plain(ids).last_hidden_state, atol=1e-4)
    dense = LraModel(config("dense", grid=[8, 16])).eval()
    dense.load_state_dict(model.state_dict())
    without = LraModel(config("dense")).eval()
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        dense(ids).last_hidden_state, without(ids).last_hidden_state, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="8 x 16 = 128 positions of the grid, got 64"):
        wide(ids[:, :64])


def test_pairs_are_classified_by_both_texts():
    model = LraForSequenceClassification(config("mra2", two_tower=True)).eval()
    first, second = texts(seed=1), texts(60, seed=2)
    pair = {f"{name}_2": x for name, x in second.items()}
    logits = model(**first, **pair).logits
    means = [model.lra(**x).last_hidden_state.sum(1) / 128 for x in (first, second)]
    features = torch.cat([*means, means[0] * means[1], means[0] - means[1]], -1)
    torch.testing.assert_close(logits, model.classifier(features))
    with pytest.raises(ValueError, match="input_ids_2 is the second text of a pair"):
        model(**first)
    single = LraForSequenceClassification(config("mra2"))
    with pytest.raises(ValueError, match="two_tower=True, which is False"):
        single(**first, **pair)


def test_dropout_on_weights_is_only_for_dense_attention_in_training():
    model = LraModel(config("dense", attention_probs_dropout_prob=0.5))
    first, second = (model(**texts()).last_hidden_state for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    torch.testing.assert_close(*(model(**texts()).last_hidden_state for _ in range(2)))


def test_an_empty_text_is_no_nan():
    inputs = texts()
    inputs["attention_mask"][2] = 0
    for attention in ("dense", "mra2", "adamra", "linear", "linformer", "performer", "longformer"):
        model = LraForSequenceClassification(config(attention))
        loss = model(**inputs, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "sdpa"}, "attention must be one of"),
        ({"attention": "mra2", "attention_size": 4}, "attention_size is for"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
        ({"grid": [32]}, "grid must be .height, width."),
        ({"grid": [30, 32]}, "grid must be made of patches of 4 x 8"),
        ({"grid": [32, 32]}, "has 1024 tokens"),
        ({"pooling": "cls"}, "pooling must be one of"),
        ({"attention": "longformer", "attention_size": 7}, "attention_size must be even, got 7"),
        ({"block_per_row": 0}, "block_per_row must be an integer of at least 1"),
        ({"segment_lengths": [0]}, r"segment_lengths\[0\]"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LraConfig(**SIZES | settings)


def test_one_class_and_other_problems_are_refused():
    for settings, message in (
        ({"num_labels": 1}, "num_labels must be at least 2"),
        ({"problem_type": "multi_label_classification"}, "problem_type must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            LraForSequenceClassification(LraConfig(**SIZES | settings))
    with pytest.raises(ValueError, match="at least one token"):
        LraModel(LraConfig(**SIZES))(torch.zeros(1, 0, dtype=torch.long))
