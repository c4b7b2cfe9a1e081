"""Directories of Transformers' own type "mra": opened with the meaning they were trained with."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mra import configuration_mra, modeling_mra

import mra_hf
from mra_hf import MraConfig
from tiny_models import SIZES, mra_config, padded_batch

KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
KEPT += ("intermediate_size",)
BUILTIN_SIZES = {name: SIZES[name] for name in KEPT}
BUILTIN_SIZES |= {"max_position_embeddings": 256, "block_per_row": 4}


def builtin_directory(path, head="MraForMaskedLM", **changes):
    model = getattr(modeling_mra, head)(configuration_mra.MraConfig(**(BUILTIN_SIZES | changes)))
    model.save_pretrained(path)
    return model.eval()


def minimal_config(path):
    """Keep of config.json only what differs from the defaults of the type."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: config[name] for name in ("model_type", *KEPT)}))


@pytest.fixture
def builtin_replaced():
    before = CONFIG_MAPPING._extra_content.get("mra")
    mra_hf.replace_builtin_mra()
    yield
    if before is None:
        CONFIG_MAPPING._extra_content.pop("mra")


@pytest.mark.parametrize(
    "head", ["MraModel", "MraForMaskedLM", "MraForTokenClassification", "MraForQuestionAnswering"]
)
def test_directories_load_completely_through_our_classes(head, tmp_path):
    source = builtin_directory(tmp_path, head)
    model, info = getattr(mra_hf, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == "mra_hf"
    assert model.config.max_tokens == 256
    theirs, ours = source.state_dict(), model.state_dict()
    weight = "encoder.layer.1.attention.self.query.weight"
    prefix, own = ("", "") if head == "MraModel" else ("mra.", "roberta.")
    assert torch.equal(theirs[prefix + weight], ours[own + weight])


def test_full_budget_equals_roberta_with_the_same_weights(tmp_path):
    builtin_directory(tmp_path, block_per_row=8)
    model = mra_hf.MraForMaskedLM.from_pretrained(tmp_path).eval()
    roberta = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            **(BUILTIN_SIZES | {"max_position_embeddings": 258}),
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    ).eval()
    roberta.load_state_dict(model.state_dict())
    batch = padded_batch(length=256)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        model(**batch).logits[real], roberta(**batch).logits[real], atol=1e-5, rtol=0
    )


def test_the_budget_follows_the_configured_length_as_they_were_trained(tmp_path):
    builtin_directory(tmp_path)
    config = MraConfig.from_pretrained(tmp_path)
    assert (config.block_per_row, config.block_budget) == (4, 32)
    assert config.max_position_embeddings == 258
    assert config.attention_probs_dropout_prob == 0


def test_a_minimal_file_takes_the_defaults_of_its_own_type(tmp_path):
    builtin_directory(tmp_path, max_position_embeddings=512)
    minimal_config(tmp_path)
    model, info = mra_hf.MraForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.max_position_embeddings == 514
    assert (model.config.block_per_row, model.config.block_budget) == (4, 64)
    assert model.config.layer_norm_eps == 1e-5


@pytest.mark.parametrize("head", ["MraForSequenceClassification", "MraForMultipleChoice"])
@pytest.mark.parametrize("minimal", [False, True])
def test_heads_that_mean_something_else_are_refused(head, minimal, tmp_path):
    builtin_directory(tmp_path, head, max_position_embeddings=512)
    if minimal:
        minimal_config(tmp_path)
    with pytest.raises(ValueError, match=r"transformers\.models\.mra"):
        getattr(mra_hf, head).from_pretrained(tmp_path)


def test_heads_in_a_subfolder_are_refused_as_well(tmp_path):
    builtin_directory(tmp_path / "sub", "MraForSequenceClassification")
    with pytest.raises(ValueError, match="tanh"):
        mra_hf.MraForSequenceClassification.from_pretrained(tmp_path, subfolder="sub")


def test_an_lm_head_of_another_activation_is_refused_but_its_encoder_opens(tmp_path):
    builtin_directory(tmp_path, hidden_act="relu")
    with pytest.raises(ValueError, match="gelu"):
        mra_hf.MraForMaskedLM.from_pretrained(tmp_path)
    assert mra_hf.MraModel.from_pretrained(tmp_path).config.hidden_act == "relu"


def test_asking_for_blocks_per_row_replaces_the_fixed_budget(tmp_path):
    builtin_directory(tmp_path)
    config = MraConfig.from_pretrained(tmp_path, block_per_row=8)
    assert (config.block_per_row, config.block_budget) == (8, None)
    model = mra_hf.MraForMaskedLM.from_pretrained(tmp_path)
    assert model.config.block_budget == 32
    mra_hf.set_attention(model, block_per_row=6)
    assert (model.config.block_per_row, model.config.block_budget) == (6, None)


def test_positions_of_another_padding_id_are_refused(tmp_path):
    builtin_directory(tmp_path, pad_token_id=0)
    with pytest.raises(ValueError, match="pad_token_id"):
        MraConfig.from_pretrained(tmp_path)


def test_a_new_classifier_may_start_from_their_encoder(tmp_path):
    builtin_directory(tmp_path)
    model, info = mra_hf.MraForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert all(key.startswith("classifier.") for key in info["missing_keys"])
    assert model.classifier.out_proj.out_features == 3


def test_auto_classes_open_them_after_replace_builtin_mra(tmp_path, builtin_replaced):
    builtin_directory(tmp_path / "theirs")
    mra_hf.replace_builtin_mra()  # may be repeated
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")
    assert type(model) is mra_hf.MraForMaskedLM
    assert model.config.block_budget == 32
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "mra_hf"
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert again.config.max_position_embeddings == 258  # not shifted a second time
    assert again.config.block_budget == 32


def test_without_replacing_auto_classes_keep_the_builtin(tmp_path):
    builtin_directory(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is modeling_mra.MraForMaskedLM


def test_trainer_resumes_from_a_checkpoint_saved_after_such_a_load(tmp_path):
    builtin_directory(tmp_path / "theirs")
    model = mra_hf.MraForMaskedLM.from_pretrained(tmp_path / "theirs")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 99, (16, 40))]

    def trainer(model, steps):
        settings = {"save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        aside = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path / "run", max_steps=steps, **settings, **aside)
        return Trainer(model=model, args=arguments, train_dataset=rows)

    trainer(model, 2).train()
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    fresh = mra_hf.MraForMaskedLM(mra_config(block_budget=32))
    resumed = trainer(fresh, 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, trained[name]), name
