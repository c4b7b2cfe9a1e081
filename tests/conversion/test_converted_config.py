"""Settings and dtype of the result, and the ways to open it."""

import json

import pytest
import torch
import transformers
from conversion_cases import SIZES, convert, make_source
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

import mra_hf
from mra_hf import MraConfig


def test_builtin_mra_keeps_its_settings_and_its_budget_at_its_length(tmp_path):
    settings = {"block_per_row": 3, "approx_mode": "sparse", "initial_prior_first_n_blocks": 1}
    make_source(tmp_path / "source", "mra", max_position_embeddings=64, **settings)
    same = convert(tmp_path / "source", tmp_path / "same", max_length=64)
    assert same.settings["block_budget"] == 2 * 3
    longer = convert(tmp_path / "source", tmp_path / "longer", max_length=128)
    assert longer.settings["block_budget"] is None
    assert any("budget" in note for note in longer.notes)
    chosen = convert(tmp_path / "source", tmp_path / "chosen", max_length=64, block_per_row=5)
    assert chosen.settings["block_budget"] is None and chosen.settings["block_per_row"] == 5
    for report in (same, longer, chosen):
        assert report.settings["approx_mode"] == "sparse"
        assert report.settings["initial_prior_first_n_blocks"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_dtype_is_applied_or_that_of_the_source(dtype, tmp_path):
    source = make_source(tmp_path / "source")
    chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    report = convert(tmp_path / "source", tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {chosen}
    assert report.dtype == str(chosen).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == report.dtype
    source.to(chosen).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "own").dtype == report.dtype


def test_weights_stored_in_half_precision_are_for_the_dtype_of_the_config(tmp_path):
    """As Transformers opens them, and as the embedded checkpoints are stored."""
    source = make_source(tmp_path / "source")
    source.half().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}))
    assert convert(tmp_path / "source", tmp_path / "out").dtype == "float32"
    assert convert(tmp_path / "source", tmp_path / "half", dtype="float16").dtype == "float16"


def test_rest_of_the_config_is_kept(tmp_path):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    changes = {
        **{"id2label": labels, "label2id": {name: i for i, name in labels.items()}},
        **{"problem_type": "multi_label_classification", "hidden_act": "relu"},
        **{"hidden_dropout_prob": 0.3, "classifier_dropout": 0.2, "layer_norm_eps": 1e-7},
        **{"attention_probs_dropout_prob": 0.1, "initializer_range": 0.05},
    }
    make_source(tmp_path / "source", "roberta", "ForSequenceClassification", **changes)
    report = convert(tmp_path / "source", tmp_path / "out")
    config = MraConfig.from_pretrained(tmp_path / "out")
    for name, value in changes.items():
        expected = 0.0 if name == "attention_probs_dropout_prob" else value
        assert getattr(config, name) == expected, name
    assert config.num_labels == 3 and config.max_tokens == 300
    assert any("attention_probs_dropout_prob" in note for note in report.notes)


def test_bert_takes_its_border_tokens_from_the_tokenizer(tmp_path):
    make_source(tmp_path / "source", "bert")
    convert(tmp_path / "source", tmp_path / "out")
    config = MraConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 3, 0)
    assert config.type_vocab_size == 2 and config.layer_norm_eps == 1e-12


def test_attention_settings_reach_the_config(tmp_path):
    make_source(tmp_path / "source")
    priors = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 2}
    settings = {"max_length": 512, "block_per_row": 6, "approx_mode": "sparse"} | priors
    settings |= {"key_block_size": 8, "selection": "mass"}
    report = convert(tmp_path / "source", tmp_path / "out", **settings)
    config = MraConfig.from_pretrained(tmp_path / "out")
    assert report.settings == {name: getattr(config, name) for name in report.settings}
    assert (config.block_per_row, config.approx_mode, config.block_budget) == (6, "sparse", None)
    assert (config.key_block_size, config.selection) == (8, "mass")
    assert "each cut into key blocks of 8" in report.summary()
    assert report.blocks_per_head == 96 and report.density == 96 / 256
    assert report.dense_length == 6 * 32


def test_the_longest_result_is_that_of_the_key_blocks_of_the_source(tmp_path):
    make_source(tmp_path / "source")
    narrow = {"key_block_size": 8, "selection": "mass"}
    convert(tmp_path / "source", tmp_path / "narrow", max_length=512, **narrow)
    with pytest.raises(ValueError, match=r"at most 370720, .* 8 keys"):
        convert(tmp_path / "narrow", tmp_path / "out", max_length=400_000)
    assert not (tmp_path / "out").exists()


def test_result_opens_through_auto_classes_and_fills_a_mask(tmp_path):
    make_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 300
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model) is mra_hf.MraForMaskedLM
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert len(fill("AB<mask>DE")) == 5
    ids = torch.randint(5, 30, (1, 300))
    assert model(input_ids=ids).logits.shape == (1, 300, SIZES["vocab_size"])
    with pytest.raises(ValueError, match="301 tokens"):
        model(input_ids=torch.randint(5, 30, (1, 301)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_length": 20}, "max_length 20 is less than the 40 tokens"),
        ({"max_length": 512, "block_per_row": 16}, "Every block is exact up to max_length 512"),
        ({"max_length": 512, "block_per_row": 15}, None),
        ({"max_length": 40}, None),
    ],
)
def test_what_is_seldom_meant_is_noted(arguments, said, tmp_path):
    make_source(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", **arguments)
    doubts = [note for note in report.notes if "max_length" in note]
    assert [said in note for note in doubts] == ([True] if said else [])
