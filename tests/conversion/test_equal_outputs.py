"""The result computes what the source does, and the report names every tensor."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversion_cases import (
    HEADS,
    LENGTH,
    ROBERTA_VOCABULARY,
    SIZES,
    SOURCES,
    assert_report_is_complete,
    assert_same_outputs,
    change_config,
    convert,
    make_source,
    open_result,
    random_inputs,
)
from safetensors.torch import load_file, save_file
from transformers.models.mra import modeling_mra

import mra_hf
from mra_hf import MraConfig
from sapiens import SPECIALS, letter_tokenizer


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("source_type", [name for name in SOURCES if name != "mra"])
def test_full_budget_equals_the_source(source_type, head, tmp_path):
    source = make_source(tmp_path / "source", source_type, head)
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    assert report.model_class == type(result).__name__ == f"Mra{head}"
    assert_same_outputs(source, result, random_inputs(source_type, head))
    per_token = head not in ("ForSequenceClassification", "ForMultipleChoice")
    if source_type != "bert" and per_token:  # padding on the left hides the first token from heads
        assert_same_outputs(source, result, random_inputs(source_type, head, "left"), 1)
    file = load_file(tmp_path / "source" / "model.safetensors")
    assert_report_is_complete(report, file, tmp_path / "out")
    assert report.counts()["new"] == report.counts()["dropped"] == 0


def test_bert_with_padding_on_the_left_is_another_model_and_the_guide_says_so(tmp_path):
    source = make_source(tmp_path / "source", "bert")
    convert(tmp_path / "source", tmp_path / "out")
    inputs = random_inputs("bert", "ForMaskedLM", "left")
    with pytest.raises(AssertionError):
        assert_same_outputs(source, open_result(tmp_path / "out"), inputs, 1)
    guide = Path(__file__).parents[2] / "docs" / "guide" / "converting.md"
    words = " ".join(guide.read_text().split())
    assert "re-expressed exactly as RoBERTa, with padding on the right" in words


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"])
def test_builtin_mra_equals_the_source_with_dense_attention(head, tmp_path, monkeypatch):
    def dense(query, key, value, mask, *args, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, mask[:1, None, None] > 0)

    monkeypatch.setattr(modeling_mra, "mra2_attention", dense)
    source = make_source(tmp_path / "source", "mra", head)
    report = convert(tmp_path / "source", tmp_path / "out", block_per_row=16)
    result = open_result(tmp_path / "out")
    for sample in (0, 1):  # theirs mixes up the masks of a batch
        inputs = {name: tensor[sample, None] for name, tensor in random_inputs("mra", head).items()}
        assert_same_outputs(source, result, inputs)
    file = load_file(tmp_path / "source" / "model.safetensors")
    assert_report_is_complete(report, file, tmp_path / "out")
    assert "mra.embeddings.position_ids" in {record.source for record in report.tensors}


LEGACY = {"weight": "gamma", "bias": "beta"}


@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_legacy_layer_norm_names_are_renamed(source_type, tmp_path):
    source = make_source(tmp_path / "source", source_type)
    file = tmp_path / "source" / "model.safetensors"
    legacy = {
        re.sub("(?<=LayerNorm[.])(weight|bias)", lambda end: LEGACY[end[0]], name): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in legacy)
    save_file(legacy, file)
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    assert_same_outputs(source, result, random_inputs(source_type, "ForMaskedLM"))
    assert_report_is_complete(report, legacy, tmp_path / "out")


def test_bert_for_pretraining_becomes_a_masked_lm_without_next_sentences(tmp_path):
    source = make_source(tmp_path / "source", "bert", "ForPreTraining")
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    assert_same_outputs(source, result, random_inputs("bert", "ForMaskedLM"), 1)
    dropped = {record.name for record in report.tensors if record.action == "dropped"}
    assert dropped == {
        *(f"cls.seq_relationship.{part}" for part in ("weight", "bias")),
        *(f"bert.pooler.dense.{part}" for part in ("weight", "bias")),
    }
    assert "cls.seq_relationship" in report.summary()


@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_base_model_without_pooler_gets_a_new_one(source_type, tmp_path):
    make_source(tmp_path / "source", source_type, "Model")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "pooler" not in name}
    save_file(tensors, file)
    report = convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "again")
    new = {record.name for record in report.tensors if record.action == "new"}
    assert new == {"pooler.dense.weight", "pooler.dense.bias"}
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert_report_is_complete(report, tensors, tmp_path / "out")


@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_untied_and_half_tied_heads_keep_their_function(source_type, tmp_path):
    inputs = random_inputs(source_type, "ForMaskedLM")
    source = make_source(tmp_path / "source", source_type, tie_word_embeddings=False)
    convert(tmp_path / "source", tmp_path / "out")
    assert_same_outputs(source, open_result(tmp_path / "out"), inputs)
    # the config says tied, the file holds two tables: both count, as Transformers loads it
    change_config(tmp_path / "source", tie_word_embeddings=True)
    report = convert(tmp_path / "source", tmp_path / "says-tied")
    assert_same_outputs(source, open_result(tmp_path / "says-tied"), inputs)
    assert any("tie_word_embeddings" in note for note in report.notes)


def test_roberta_lm_head_may_follow_another_activation(tmp_path):
    source = make_source(tmp_path / "source", hidden_act="relu")
    convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    assert_same_outputs(source, result, random_inputs("roberta", "ForMaskedLM"))


def test_a_model_of_this_package_becomes_longer_and_keeps_its_settings(tmp_path):
    changes = {"max_position_embeddings": LENGTH + 2, "pad_token_id": 1, "embedding_size": 8}
    changes |= {"approx_mode": "sparse", "block_per_row": 4, "block_budget": 4}
    source = mra_hf.MraForMaskedLM(MraConfig(**(SIZES | changes))).eval()
    source.save_pretrained(tmp_path / "source")
    letter_tokenizer(ROBERTA_VOCABULARY, SPECIALS, LENGTH).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", initial_prior_diagonal_n_blocks=1)
    assert report.source_type == "mra_hf" and "budget of 4" in " ".join(report.notes)
    model = open_result(tmp_path / "out")
    config = model.config
    assert (config.approx_mode, config.block_per_row, config.block_budget) == ("sparse", 4, None)
    assert (config.initial_prior_diagonal_n_blocks, config.embedding_size) == (1, 8)
    assert config.max_position_embeddings == 302
    before, after = source.state_dict(), model.state_dict()
    positions = "roberta.embeddings.position_embeddings.weight"
    assert all(torch.equal(after[name], before[name]) for name in before if name != positions)
    assert torch.equal(after[positions][2 + LENGTH], before[positions][2])
    # two blocks: all are exact in both
    assert_same_outputs(source, model, random_inputs("roberta", "ForMaskedLM"))
