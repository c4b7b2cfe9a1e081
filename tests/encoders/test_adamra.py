"""AdaMRA: against its text, against what it reduces to, and as a model of Transformers."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from mra_hf import AdaMraAttention, AdaMraConfig, AdaMraForSequenceClassification, AdaMraModel

SIZES = {"hidden_size": 16, "segment_lengths": [1, 3, 8], "num_subheads": 2, "vocab_size": 30}
SIZES |= {"hidden_dropout_prob": 0.0, "max_position_embeddings": 64, "intermediate_size": 24}


def layer_and_states(length=37, batch=3, masked=True, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = AdaMraAttention(AdaMraConfig(**SIZES | settings), 1).to(dtype).eval()
    states = torch.randn(batch, length, 16, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, length) < 0.7
        mask[-1] = False
    return layer, states, mask


def by_the_text(layer, states, mask):
    """Every head for every token, one after another, masked by the router's choice."""
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    output = torch.zeros_like(states)
    width = states.shape[-1] // layer.num_subheads
    for sample in range(len(states)):
        query, key, value = (part(states[sample]) for part in (layer.query, layer.key, layer.value))
        probabilities = torch.softmax(layer.router(query), -1)
        chosen = probabilities.argmax(-1)
        for head, tokens in enumerate(layer.segment_lengths):
            keys, values = [], []
            for first in range(0, len(query), tokens):
                real = mask[sample, first : first + tokens]
                if real.any():
                    keys.append(key[first : first + tokens][real].mean(0))
                    values.append(value[first : first + tokens][real].mean(0))
            if not keys:
                continue
            own = [
                x @ weights[head]
                for x, weights in (
                    (query, layer.head_query),
                    (torch.stack(keys), layer.head_key),
                    (torch.stack(values), layer.head_value),
                )
            ]
            parts = []
            for sub in range(layer.num_subheads):
                q, k, v = (x[:, sub * width : (sub + 1) * width] for x in own)
                if layer.feature_map == "softmax":
                    weights = torch.softmax(q @ k.T / width**0.5, -1)
                else:
                    phi = F.relu if layer.feature_map == "relu" else lambda x: F.elu(x) + 1
                    scores = phi(q) @ phi(k).T
                    total = scores.sum(-1, keepdim=True)
                    weights = torch.where(total > 0, scores / total.clamp_min(1e-300), 0)
                parts.append(weights @ v)
            gate = (chosen == head).double()
            if layer.router_gate == "prob":
                gate = gate * probabilities[:, head]
            elif layer.router_gate == "straight_through":
                gate = gate * (1 + probabilities[:, head] - probabilities[:, head].detach())
            output[sample] += gate[:, None] * torch.cat(parts, -1)
    return layer.output(output).masked_fill(~mask[..., None], 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", ["straight_through", "prob", "none"])
@pytest.mark.parametrize("feature_map", ["relu", "elu1", "softmax"])
def test_a_layer_is_what_the_text_says(feature_map, gate, masked):
    settings = {"feature_map": feature_map, "router_gate": gate}
    layer, states, mask = layer_and_states(masked=masked, **settings)
    grad = torch.randn_like(states)
    results = []
    for call in (lambda x: layer(x, mask)[0], lambda x: by_the_text(layer, x, mask)):
        x = states.clone().requires_grad_()
        layer.zero_grad()
        output = call(x)
        (output * grad).sum().backward()
        weights = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append((output, x.grad, weights))
    (actual, actual_x, actual_w), (expected, expected_x, expected_w) = results
    tolerance = {"rtol": 1e-5, "atol": 1e-7}  # the router's softmax is float32
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(actual_x, expected_x, **tolerance)
    has_gradient = gate != "none"
    assert ("router.weight" in actual_w) == has_gradient
    for name, gradient in expected_w.items():
        torch.testing.assert_close(actual_w[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("routing", ["learned", "random"])
def test_every_query_by_its_own_head_is_every_head_masked(routing, length):
    layer, states, _ = layer_and_states(length, masked=False, routing=routing)
    query, key, value = (part(states) for part in (layer.query, layer.key, layer.value))
    decided = layer.route(query, None)
    memories = [layer._memory(head, key, value, None) for head in range(3)]
    own = layer._attend_routed(query, memories, decided)
    torch.testing.assert_close(own, layer._attend_all(query, memories, decided))


def test_every_query_pays_for_its_own_head_alone():
    """Rows of the projections of all heads together: the tokens, and a tile for each head."""
    layer, states, _ = layer_and_states(500, batch=4, masked=False)
    rows = []
    read = layer._read

    def counting(head, query, memory):
        rows.append(query.shape[0] * query.shape[1])
        return read(head, query, memory)

    layer._read = counting
    layer(states)
    assert 4 * 500 <= sum(rows) <= 4 * (500 + 3 * 32)


def test_one_resolution_of_single_tokens_is_the_linear_transformer():
    layer, states, mask = layer_and_states(segment_lengths=[1], feature_map="elu1", num_subheads=1)
    output, _ = layer(states, mask)
    query = layer.query(states) @ layer.head_query[0]
    key, value = (
        getattr(layer, name)(states) @ getattr(layer, f"head_{name}")[0]
        for name in ("key", "value")
    )
    phi_query, phi_key = (F.elu(x) + 1 for x in (query, key))
    phi_key = phi_key * mask[..., None]
    numerator = phi_query @ (phi_key.mT @ value)
    denominator = phi_query @ phi_key.sum(1)[..., None]
    expected = layer.output(numerator / denominator.clamp_min(1e-12)) * mask[..., None]
    torch.testing.assert_close(output[:2], expected[:2], rtol=1e-5, atol=1e-6)


def test_a_constant_value_comes_through_and_zero_denominators_give_zeros():
    layer, states, _ = layer_and_states(masked=False, feature_map="elu1")
    with torch.no_grad():
        layer.value.weight.zero_()
    output, routing = layer(states)
    for head in range(3):
        own = layer.output(layer.value.bias @ layer.head_value[head])
        mine = output[routing.heads == head]
        torch.testing.assert_close(mine, own.expand_as(mine), rtol=1e-5, atol=1e-6)
    layer, states, _ = layer_and_states(masked=False)
    with torch.no_grad():
        layer.head_key.copy_(-torch.eye(16).expand(3, -1, -1))
        layer.key.weight.zero_()
        layer.key.bias.fill_(1.0)  # every feature of every key is 0
    output, _ = layer(states.requires_grad_())
    torch.testing.assert_close(output, layer.output.bias.expand_as(output))
    output.sum().backward()
    assert torch.isfinite(states.grad).all()


def test_tokens_may_change_places_within_a_segment_of_all_heads():
    layer, states, _ = layer_and_states(32, masked=False, segment_lengths=[2, 4])
    order = torch.arange(32).view(8, 2, 2).flip(2).flatten()  # pairs within pairs
    output, moved = layer(states)[0], layer(states[:, order])[0]
    torch.testing.assert_close(moved, output[:, order])


@pytest.mark.parametrize("routing", ["learned", "random", "soft"])
def test_padding_and_neighbours_change_nothing(routing):
    layer, states, mask = layer_and_states(routing=routing)
    states.requires_grad_()
    output, decided = layer(states, mask)
    output.square().sum().backward()
    clean = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    dirty = states.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    again, shares = layer(dirty, mask)
    again.square().sum().backward()
    torch.testing.assert_close(again, output)
    torch.testing.assert_close(dirty.grad, states.grad)
    for name, gradient in clean.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient)
    torch.testing.assert_close(shares.shares, decided.shares)
    assert (output[~mask] == 0).all()
    torch.testing.assert_close(layer(states, mask.long())[0], output)
    alone, _ = layer(states[:1], mask[:1])
    torch.testing.assert_close(alone, output[:1])
    longer = F.pad(states, (0, 0, 0, 30)), F.pad(mask, (0, 30))
    torch.testing.assert_close(layer(*longer)[0][:, :37], output)


def test_shares_and_the_balance_loss():
    layer, states, mask = layer_and_states()
    _, routing = layer(states, mask)
    counts = torch.bincount(routing.heads[mask], minlength=3) / mask.sum()
    torch.testing.assert_close(routing.shares, counts.float())
    mean = routing.probabilities[mask].mean(0)
    torch.testing.assert_close(routing.balance_loss, 3 * (counts * mean).sum())
    with torch.no_grad():
        layer.router.weight.zero_()
    assert layer(states, mask)[1].balance_loss.item() == pytest.approx(1)


def test_random_routing_is_drawn_in_training_and_fixed_in_evaluation():
    layer, states, _ = layer_and_states(300, masked=False, routing="random")
    first, second = (layer(states)[1].heads for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first[0], first[1])
    assert torch.equal(layer(states[:, :100])[1].heads, first[:, :100])
    assert torch.bincount(first[0], minlength=3).min() > 60
    layer.train()
    assert not torch.equal(layer(states)[1].heads, layer(states)[1].heads)


@pytest.mark.parametrize(
    "routing",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "soft")), "learned"],
)
def test_a_compiled_layer_has_one_graph(routing):
    layer, states, mask = layer_and_states(dtype=torch.float32, routing=routing)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states, mask)[0], layer(states, mask)[0])


def test_autocast_keeps_the_kernel_sums_in_float32():
    layer, states, mask = layer_and_states(dtype=torch.float32)
    exact, _ = layer(states, mask)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(states, mask)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.05 * exact.norm()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    return {"input_ids": torch.randint(1, 30, (2, 40)), "attention_mask": mask}


def test_models_come_back_from_their_directories(batch, tmp_path):
    model = AdaMraForSequenceClassification(AdaMraConfig(**SIZES, num_labels=4)).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AdaMraConfig)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, AdaMraForSequenceClassification)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, AdaMraModel)
    states = body(**batch, output_hidden_states=True, output_router_probs=True)
    assert states.last_hidden_state.shape == (2, 40, 16) and len(states.hidden_states) == 3
    assert states.routing_shares.shape == (2, 3) and states.router_probs[0].shape == (2, 40, 3)
    torch.testing.assert_close(states.routing_shares.sum(-1), torch.ones(2))
    new_head = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True
    )
    assert torch.isfinite(new_head(**batch).logits).all()


def test_parameters_are_those_of_the_paper():
    layer = AdaMraAttention(AdaMraConfig())
    width, heads = 64, 3
    biases = 4 * width
    count = sum(p.numel() for p in layer.parameters())
    assert count == (4 + 3 * heads) * width**2 + width * heads + biases


@pytest.mark.parametrize("pooling", ["mean", "mean_over_all"])
def test_pooling(pooling, batch):
    model = AdaMraForSequenceClassification(AdaMraConfig(**SIZES, pooling=pooling)).eval()
    states = model.adamra(**batch).last_hidden_state
    places = 64 if pooling == "mean_over_all" else batch["attention_mask"].sum(1, keepdim=True)
    torch.testing.assert_close(model(**batch).logits, model.classifier(states.sum(1) / places))


@pytest.mark.parametrize("settings", [{}, {"routing": "soft"}, {"router_aux_loss_coef": 0.1}])
def test_it_learns(settings, batch):
    config = AdaMraConfig(**SIZES | settings)
    model = AdaMraForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.tensor([0, 1])
    losses = []
    for _ in range(40):
        output = model(**batch, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] - config.router_aux_loss_coef * output.balance_loss.item() < 0.1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("routing", ["learned", "soft"])
def test_checkpointed_layers_have_the_same_gradients(routing, reentrant, batch):
    model = AdaMraForSequenceClassification(
        AdaMraConfig(**SIZES, router_aux_loss_coef=1.0, routing=routing)
    ).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_lengths": []}, "segment_lengths must hold one number for each head"),
        ({"segment_lengths": [2, 0]}, r"segment_lengths\[1\] must be an integer of at least 1"),
        ({"num_subheads": 3}, "hidden_size must be a multiple of num_subheads"),
        ({"feature_map": "gelu"}, "feature_map must be one of"),
        ({"routing": "top2"}, "routing must be one of"),
        ({"router_gate": "hard"}, "router_gate must be one of"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef must be a number from 0 on"),
        ({"pooling": "cls"}, "pooling must be one of"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaMraConfig(**SIZES | settings)


def test_impossible_inputs_are_refused(batch):
    model = AdaMraModel(AdaMraConfig(**SIZES))
    for arguments, message in (
        ({}, "either input_ids or inputs_embeds"),
        (batch | {"inputs_embeds": torch.zeros(2, 40, 16)}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": torch.ones(1, 65, dtype=torch.long)},
            "65 tokens, and the position table 64",
        ),
        (batch | {"attention_mask": torch.zeros(2, 40)}, "attention_mask must be"),
        (batch | {"attention_mask": torch.ones(2, 9, dtype=torch.long)}, "attention_mask must be"),
        (batch | {"output_attentions": True}, "matrices that this attention never has"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_what_a_file_holds_is_kept_beside_what_it_lacks(tmp_path):
    model = AdaMraModel(AdaMraConfig(**SIZES))
    model.save_pretrained(tmp_path)
    missing = "encoder.layers.0.attention.router.weight"
    kept = load_file(tmp_path / "model.safetensors")
    del kept[missing]
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again = AdaMraModel.from_pretrained(tmp_path).state_dict()
    assert set(again) == {*kept, missing}
    for name, weight in kept.items():
        torch.testing.assert_close(again[name], weight)
