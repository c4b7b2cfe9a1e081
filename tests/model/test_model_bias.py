"""A model's distance bias: its buckets, its start, and everything that must carry it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import mra_hf
from mra_hf import MraConfig, MraForMaskedLM, MraModel, set_attention
from mra_hf.analysis.attention_maps import matrices_of_all_heads
from mra_hf.analysis.recording import record_heads
from mra_hf.distance_bias import BIAS_PER_WEIGHT, DistanceBias, bucket_widths
from tiny_models import TOKENS, mra_config, padded_batch, roberta_config

WINDOW = 2


def biased_config(**changes) -> MraConfig:
    return mra_config(**({"distance_bias_window": WINDOW} | changes))


def bias_modules(model) -> list[DistanceBias]:
    return [module for module in model.modules() if isinstance(module, DistanceBias)]


def draw_biases(model):
    """Give every bias its own value, of order 2."""
    with torch.no_grad():
        for module in bias_modules(model):
            module.weight.normal_(0, 2 / BIAS_PER_WEIGHT)
    return model.eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return draw_biases(MraForMaskedLM(biased_config()))


# -- buckets and start


@pytest.mark.parametrize(
    ("window", "n_distances", "beyond"),
    [
        (14, 128, [7, 8, 13, 17, 25, 35, 8]),
        (3, 4, []),
        (3, 5, [1]),
        (14, 10, []),
        (0, 9, [1, 1, 1, 2, 2, 1]),
    ],
)
def test_one_bucket_per_distance_inside_and_two_per_doubling_beyond(window, n_distances, beyond):
    widths = bucket_widths(window, n_distances)
    inside = min(window + 1, n_distances)
    assert widths == [1] * inside + beyond and sum(widths) == n_distances


def test_it_starts_at_zero_inside_the_window_and_closed_beyond():
    for module in bias_modules(MraModel(biased_config(distance_bias_far=-5))):
        bias = module(torch.zeros(1))
        assert bias.shape == (2, 8)  # 256 tokens
        assert (bias[:, : WINDOW + 1] == 0).all()
        torch.testing.assert_close(bias[:, WINDOW + 1 :], torch.full((2, 5), -5.0))


def test_there_is_none_by_default():
    config = mra_config()
    assert config.distance_bias_window is None
    assert not bias_modules(MraForMaskedLM(config))


def test_a_roberta_directory_opens_with_a_new_bias(tmp_path):
    from transformers import RobertaForMaskedLM

    RobertaForMaskedLM(roberta_config()).save_pretrained(tmp_path)
    config = MraConfig.from_pretrained(tmp_path, distance_bias_window=WINDOW)
    model = MraForMaskedLM.from_pretrained(tmp_path, config=config)
    expected = bias_modules(MraForMaskedLM(config))[0].weight
    assert all(torch.equal(module.weight, expected) for module in bias_modules(model))


# -- the attention it reaches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_dense_attention_applies_it_too(name, first, side, model):
    model.config.block_per_row, model.config.initial_prior_first_n_blocks = 8, first
    inputs = padded_batch(3, 250, side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(name)
        results = model(**inputs).logits
    torch.testing.assert_close(results[real], expected[real], rtol=0, atol=1e-5)


def test_dense_attention_without_padding_and_its_gradient(model):
    model.config.block_per_row = 8
    ids = padded_batch(1, 200)["input_ids"]
    gradients = []
    for name in ("mra2", "sdpa", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        gradients.append([module.weight.grad.clone() for module in bias_modules(model)])
    for other in gradients[1:]:
        for x, y in zip(gradients[0], other, strict=True):
            assert x.abs().max() > 0
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_other_attention_functions_are_refused(model):
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="would ignore the distance bias"):
        model(torch.full((1, 8), 5))


def test_it_changes_what_is_computed(model):
    ids = padded_batch(1, 250)["input_ids"]
    before = model(ids).logits
    with torch.no_grad():
        bias_modules(model)[0].weight.zero_()
    assert not torch.allclose(model(ids).logits, before, atol=1e-4)


def test_returned_matrices_hold_it(model):
    ids = padded_batch(1, 200)["input_ids"]
    with torch.no_grad():
        bias_modules(model)[0].weight[:, 1:] = -1.0
        matrix = model.roberta(ids, output_attentions=True).attentions[0]
    assert matrix[..., :32, 32:].abs().max() < 1e-6


def test_pictures_hold_it_and_recordings_refuse_it(model):
    model.config.block_per_row = 8
    ids = padded_batch(1, 200)["input_ids"]
    for matrices in matrices_of_all_heads(model, {"input_ids": ids}):
        assert matrices.relative_error < 1e-5  # all blocks are exact
    with pytest.raises(ValueError, match="distance bias"):
        record_heads(model, [ids[0]], "a test")


def test_set_attention_knows_the_attention_of_biased_models(model):
    set_attention(model, "mra2_s", block_per_row=4)
    assert model.config.approx_mode == "sparse"


# -- saving, loading, training


def test_it_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = padded_batch(1, 250)["input_ids"]
    expected = model(ids).logits
    for opened in (
        MraForMaskedLM.from_pretrained(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path),
        AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert torch.equal(opened(ids).logits, expected)
    name = "roberta.encoder.layer.0.attention.self.distance_bias.weight"
    assert model.state_dict()[name].shape == (2, WINDOW + 1 + 3)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for x, y in zip(bias_modules(classifier), bias_modules(model), strict=True):
        assert torch.equal(x.weight, y.weight)


def test_config_round_trip_and_old_configs(tmp_path):
    biased_config(distance_bias_far=-6.5).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.distance_bias_window, config.distance_bias_far) == (WINDOW, -6.5)
    old = mra_config().to_dict()
    for name in ("distance_bias_window", "distance_bias_far"):
        old.pop(name)
    assert MraConfig.from_dict(old).distance_bias_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance_bias_window": -1}, "distance_bias_window must be an integer of at least 0"),
        ({"distance_bias_window": 1.5}, "distance_bias_window must be an integer"),
        *(
            ({"distance_bias_far": far}, r"distance_bias_far must be in \+-10000, got")
            for far in (float("inf"), float("nan"), -1e5, "low", True)
        ),
        (
            {"resolutions": [16, 4, 1], "block_budgets": [8, 8]},
            "distance_bias_window=2 is for the scales",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        biased_config(**changes)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, model):
    inputs = padded_batch(2, 200)
    model.train()

    def gradients():
        torch.manual_seed(0)  # of dropout
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return [module.weight.grad.clone() for module in bias_modules(model)]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for x, y in zip(gradients(), expected, strict=True):
        assert torch.equal(x, y) and x.abs().max() > 0


def make_trainer(folder, model, **arguments):
    ids = [torch.randint(5, 90, (TOKENS,)) for _ in range(8)]
    examples = [{"input_ids": x, "labels": x} for x in ids]
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2} | arguments
    arguments |= {"output_dir": str(folder), "report_to": [], "use_cpu": True, "save_steps": 2}
    arguments |= {"weight_decay": 0.5, "lr_scheduler_type": "constant", "disable_tqdm": True}
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=examples)


@pytest.mark.parametrize("learning_rate", [3e-5, 5e-4])
def test_trainer_moves_it_at_usual_learning_rates_without_weight_decay(learning_rate, tmp_path):
    torch.manual_seed(0)
    model = MraForMaskedLM(biased_config())
    before = [module(torch.zeros(1)) for module in bias_modules(model)]
    trainer = make_trainer(tmp_path, model, learning_rate=learning_rate)
    decayed = trainer.get_decay_parameter_names(model)
    assert not any("distance_bias" in name for name in decayed)
    trainer.train()
    for module, start in zip(bias_modules(model), before, strict=True):
        moved = (module(torch.zeros(1)) - start).abs().max()
        # Adam's step is about the learning rate, times BIAS_PER_WEIGHT here.
        assert 2 * learning_rate * BIAS_PER_WEIGHT <= moved <= 5 * learning_rate * BIAS_PER_WEIGHT


def test_a_resumed_run_ends_like_one_without_a_break(tmp_path):
    torch.manual_seed(0)
    start = MraForMaskedLM(biased_config(hidden_dropout_prob=0.0))

    def run(folder, **arguments):
        torch.manual_seed(1)
        trainer = make_trainer(folder, copy.deepcopy(start), seed=1, learning_rate=1e-3)
        trainer.train(**arguments)
        return [module.weight.detach() for module in bias_modules(trainer.model)]

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for x, y in zip(whole, resumed, strict=True):
        assert torch.equal(x, y)


def test_a_copy_of_the_module_can_stand_in_for_it(model):
    """PEFT's modules_to_save replaces modules by wrappers that hand their input on."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.copy = copy.deepcopy(module)

        def forward(self, x, *args, **kwargs):
            return self.copy(x, *args, **kwargs)

    ids = padded_batch(1, 250)["input_ids"]
    expected = model(ids).logits
    for layer in model.roberta.encoder.layer:
        attention = layer.attention.self
        attention.distance_bias = Wrapper(attention.distance_bias)
    assert torch.equal(model(ids).logits, expected)


def test_it_compiles(model):
    ids = padded_batch(1, 200)["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_the_public_names_know_it():
    assert "distance_bias_window" in mra_hf.MraConfig.__doc__


@pytest.mark.parametrize(
    "changes", [{"block_size": 16}, {"resolutions": (16, 4, 1), "block_budgets": (9, 9)}]
)
def test_other_scales_are_refused_and_change_nothing(changes, model):
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="counts in blocks of 32 tokens"):
        set_attention(model, **changes)
    assert model.config.to_dict() == before
    set_attention(model, block_size=32, block_per_row=3)
