"""Conversion of tiny random models of every type and head, made with transformers' own classes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, pipeline
from transformers.models.mra import configuration_mra, modeling_mra

import mra_hf
from mra_hf import MraConfig
from mra_hf.conversion import REPORT_NAME, convert_checkpoint, files
from mra_hf.conversion.files import staged_directory
from mra_hf.evaluation import masked_token_scores
from sapiens import SPECIALS, letter_tokenizer

LENGTH = 40  # learned positions of every source
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
ROBERTA_VOCABULARY = ("<s>", "<pad>", "</s>", "<unk>", *LETTERS, "<mask>")
BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS)
BERT_SPECIALS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
SIZES = {
    "vocab_size": len(ROBERTA_VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 3,
}
PREFIXES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def make_source(folder, source_type="roberta", head="ForMaskedLM", save=None, **changes):
    """Write a random source with tokenizer to `folder` and return its model in evaluation mode."""
    if head == "ForQuestionAnswering":
        changes = {"num_labels": 2} | changes
    if source_type == "bert":
        config = transformers.BertConfig(**(SIZES | {"max_position_embeddings": LENGTH} | changes))
        model = getattr(transformers, f"Bert{head}")(config)
    elif source_type == "mra":
        sizes = SIZES | {"max_position_embeddings": LENGTH, "block_per_row": 4}
        model = getattr(modeling_mra, f"Mra{head}")(configuration_mra.MraConfig(**sizes | changes))
    else:
        prefix = PREFIXES[source_type]
        sizes = SIZES | {"max_position_embeddings": LENGTH + 2, "pad_token_id": 1}
        config = getattr(transformers, f"{prefix}Config")(**(sizes | changes))
        model = getattr(transformers, f"{prefix}{head}")(config)
    with torch.no_grad():  # biases and LayerNorms too, so that a swapped name shows
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, **(save or {}))
    bert = source_type == "bert"
    vocabulary, specials = (
        (BERT_VOCABULARY, BERT_SPECIALS) if bert else (ROBERTA_VOCABULARY, SPECIALS)
    )
    letter_tokenizer(vocabulary, specials, LENGTH).save_pretrained(folder)
    return model.eval()


def random_inputs(source_type, head, side="right"):
    """Two sequences of 40 and 33 tokens; for multiple choice, one sample of two choices."""
    pad = 0 if source_type == "bert" else 1
    input_ids = torch.randint(5, SIZES["vocab_size"], (2, LENGTH))
    mask = torch.ones_like(input_ids)
    mask[1, 33:] = 0
    if side == "left":
        mask = mask.flip(-1)
    inputs = {"input_ids": input_ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    if source_type == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape)
    if head == "ForMultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    return inputs


@torch.no_grad()
def outputs_of(model, inputs):
    """All float outputs, with the positions of padding zeroed."""
    mask = inputs["attention_mask"]
    outputs = []
    for tensor in model(**inputs).to_tuple():
        if tensor.shape[: mask.ndim] == mask.shape and mask.shape[-1] == LENGTH:
            tensor = tensor * mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim))
        outputs.append(tensor)
    return outputs


def convert(source, output, **arguments):
    return convert_checkpoint(source, output, **({"max_length": 300} | arguments))


def open_result(folder):
    config = json.loads((folder / "config.json").read_text())
    return getattr(mra_hf, config["architectures"][0]).from_pretrained(folder).eval()


def state_names(folder):
    return set(open_result(folder).state_dict())


def assert_report_is_complete(report, source_names, output):
    """Every source tensor is named, and every tensor of the result exactly once."""
    results = [record.name for record in report.tensors if record.action != "dropped"]
    assert sorted(results) == sorted(state_names(output))
    assert set(source_names) == {record.source for record in report.tensors} - {None}
    assert sum(report.counts().values()) == len(report.tensors)
    assert all((record.source is None) == (record.action == "new") for record in report.tensors)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("source_type", ["roberta", "xlm-roberta", "camembert", "bert"])
def test_full_budget_equals_the_source(source_type, head, tmp_path):
    source = make_source(tmp_path / "source", source_type, head)
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    assert report.model_class == type(result).__name__ == f"Mra{head}"
    inputs = random_inputs(source_type, head)
    for one, other in zip(outputs_of(source, inputs), outputs_of(result, inputs), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    per_token = head not in ("ForSequenceClassification", "ForMultipleChoice")
    if source_type != "bert" and per_token:  # padding on the left hides the first token from heads
        inputs = random_inputs(source_type, head, "left")
        one, other = outputs_of(source, inputs)[0], outputs_of(result, inputs)[0]
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    file = load_file(tmp_path / "source" / "model.safetensors")
    assert_report_is_complete(report, file, tmp_path / "out")
    assert report.counts()["new"] == report.counts()["dropped"] == 0


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
        for one, other in zip(outputs_of(source, inputs), outputs_of(result, inputs), strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    file = load_file(tmp_path / "source" / "model.safetensors")
    assert_report_is_complete(report, file, tmp_path / "out")
    assert "mra.embeddings.position_ids" in {record.source for record in report.tensors}


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


@pytest.mark.parametrize("max_length", [1, 17, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 131])
@pytest.mark.parametrize(("source_type", "pad"), [("roberta", 1), ("bert", 0), ("mra", 1)])
def test_positions_follow_the_row_formula(source_type, pad, max_length, tmp_path):
    make_source(tmp_path / "source", source_type, "ForMaskedLM")
    prefix = {"bert": "bert.", "mra": "mra."}.get(source_type, "roberta.")
    name = "embeddings.position_embeddings.weight"
    old = load_file(tmp_path / "source" / "model.safetensors")[prefix + name]
    report = convert(tmp_path / "source", tmp_path / "out", max_length=max_length)
    new = load_file(tmp_path / "out" / "model.safetensors")["roberta." + name]
    p = pad + 1
    assert new.shape == (max_length + p, SIZES["hidden_size"])
    for row in range(max_length + p):
        if source_type == "bert":
            expected = torch.zeros_like(old[0]) if row < p else old[(row - p) % LENGTH]
        else:
            expected = old[row] if row < p else old[p + (row - p) % LENGTH]
        assert torch.equal(new[row], expected), row
    [record] = [record for record in report.tensors if record.name == "roberta." + name]
    unchanged = {"roberta": "copied", "mra": "renamed"}.get(source_type)
    assert record.action == (unchanged if max_length == LENGTH and unchanged else "tiled")


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_other_padding_ids_move_the_positions(source_type, pad, tmp_path):
    rows = LENGTH + pad + 1 if source_type == "roberta" else LENGTH
    sizes = {"pad_token_id": pad, "max_position_embeddings": rows}
    source = make_source(tmp_path / "source", source_type, "ForMaskedLM", **sizes)
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    inputs = random_inputs(source_type, "ForMaskedLM")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    for one, other in zip(outputs_of(source, inputs), outputs_of(result, inputs), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert any("pads with id" in note for note in report.notes) == (
        pad != (0 if source_type == "bert" else 1)
    )


def rewrite(folder, kind):
    """Store the weights of `folder` again as `kind`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    if kind == "safetensors":
        save_file(tensors, file)
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "old bin":
        options = {"_use_new_zipfile_serialization": False}
        torch.save(tensors, folder / "pytorch_model.bin", **options)
    else:
        stem, ending = kind.split(" ")[1].split(".")
        index = {}
        for i, half in enumerate(halves):
            name = f"{stem}-{i + 1:05d}-of-00002.{ending}"
            part = {key: tensors[key] for key in half}
            (save_file if ending == "safetensors" else torch.save)(part, folder / name)
            index |= dict.fromkeys(half, name)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{ending}.index.json").write_text(text)


@pytest.mark.parametrize(
    "kind",
    ["safetensors", "bin", "old bin", "sharded model.safetensors", "sharded pytorch_model.bin"],
)
def test_weights_are_read_from_every_kind_of_file(kind, tmp_path):
    make_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "expected")
    rewrite(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "out")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_legacy_layer_norm_names_are_renamed(source_type, tmp_path):
    source = make_source(tmp_path / "source", source_type)
    file = tmp_path / "source" / "model.safetensors"
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(name.endswith("gamma") for name in legacy)
    save_file(legacy, file)
    report = convert(tmp_path / "source", tmp_path / "out")
    inputs = random_inputs(source_type, "ForMaskedLM")
    [expected], [got] = (
        outputs_of(source, inputs),
        outputs_of(open_result(tmp_path / "out"), inputs),
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert_report_is_complete(report, legacy, tmp_path / "out")


def test_bert_for_pretraining_becomes_a_masked_lm_without_next_sentences(tmp_path):
    source = make_source(tmp_path / "source", "bert", "ForPreTraining")
    report = convert(tmp_path / "source", tmp_path / "out")
    inputs = random_inputs("bert", "ForMaskedLM")
    result = open_result(tmp_path / "out")
    torch.testing.assert_close(
        outputs_of(result, inputs)[0], outputs_of(source, inputs)[0], atol=1e-5, rtol=1e-5
    )
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


def change_config(folder, **changes):
    """Set fields of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    config = {name: field for name, field in config.items() if field is not None}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("architectures", [None, ["AntiBERTy"], []])
@pytest.mark.parametrize(
    ("source_type", "head"),
    [
        *itertools.product(["roberta", "bert"], HEADS),
        *(("mra", head) for head in ("Model", "ForMaskedLM", *HEADS[3:5])),
    ],
)
def test_head_is_inferred_where_architectures_does_not_say(
    source_type, head, architectures, tmp_path
):
    make_source(tmp_path / "source", source_type, head)
    change_config(tmp_path / "source", architectures=architectures)
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.model_class == f"Mra{head}"
    assert any("architectures" in note for note in report.notes)


def test_untied_and_half_tied_heads_keep_their_function(tmp_path):
    inputs = random_inputs("bert", "ForMaskedLM")
    for name, source_type in (("plain", "roberta"), ("bert", "bert")):
        source = make_source(tmp_path / name, source_type, tie_word_embeddings=False)
        if source_type == "roberta":
            inputs = random_inputs("roberta", "ForMaskedLM")
        convert(tmp_path / name, tmp_path / f"{name}-out")
        result = open_result(tmp_path / f"{name}-out")
        expected = outputs_of(source, inputs)[0]
        torch.testing.assert_close(outputs_of(result, inputs)[0], expected, atol=1e-5, rtol=1e-5)
        # the config says tied, the file holds two tables: both count, as Transformers loads it
        change_config(tmp_path / name, tie_word_embeddings=True)
        report = convert(tmp_path / name, tmp_path / f"{name}-says-tied")
        result = open_result(tmp_path / f"{name}-says-tied")
        torch.testing.assert_close(outputs_of(result, inputs)[0], expected, atol=1e-5, rtol=1e-5)
        assert any("tie_word_embeddings" in note for note in report.notes)
        inputs = random_inputs("bert", "ForMaskedLM")


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


def test_rest_of_the_config_is_kept(tmp_path):
    labels = {0: "no", 1: "maybe", 2: "yes"}
    changes = {
        "id2label": labels,
        "label2id": {name: i for i, name in labels.items()},
        "problem_type": "multi_label_classification",
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.3,
        "classifier_dropout": 0.2,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-7,
        "initializer_range": 0.05,
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
    report = convert(
        tmp_path / "source",
        tmp_path / "out",
        max_length=512,
        block_per_row=6,
        approx_mode="sparse",
        initial_prior_first_n_blocks=1,
        initial_prior_diagonal_n_blocks=2,
    )
    config = MraConfig.from_pretrained(tmp_path / "out")
    assert report.settings == {name: getattr(config, name) for name in report.settings}
    assert (config.block_per_row, config.approx_mode, config.block_budget) == (6, "sparse", None)
    assert report.blocks_per_head == 96 and report.density == 96 / 256
    assert report.dense_length == 6 * 32


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


@pytest.mark.parametrize("source_type", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_tokenizer_keeps_its_own_class(source_type, tmp_path):
    make_source(tmp_path / "source", source_type, vocab_size=40)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / file).unlink()
    if source_type == "bert":
        vocabulary = {token: i for i, token in enumerate(BERT_VOCABULARY)}
        tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    elif source_type == "roberta":
        vocabulary = {token: i for i, token in enumerate(ROBERTA_VOCABULARY)}
        tokenizer = transformers.RobertaTokenizer(vocab=vocabulary, merges=[])
    else:
        name = f"{PREFIXES[source_type]}Tokenizer"
        pieces = [(token, -1.0) for token in ROBERTA_VOCABULARY]
        tokenizer = getattr(transformers, name)(vocab=pieces)
    tokenizer.save_pretrained(tmp_path / "source")
    before = AutoTokenizer.from_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after) is type(before) is type(tokenizer)
    assert after.get_vocab() == before.get_vocab()
    assert after("ABC")["input_ids"] == before("ABC")["input_ids"]
    assert after.model_max_length == 300


def test_tokenizer_can_come_from_elsewhere(tmp_path):
    make_source(tmp_path / "source")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).rename(tmp_path / "tokenizer" / name)
    with pytest.raises(OSError, match="no tokenizer files"):
        convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<mask>"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_hub_id_is_fetched_without_what_is_not_needed(kind, tmp_path, monkeypatch):
    make_source(tmp_path / "cache" / "abc123")
    rewrite(tmp_path / "cache" / "abc123", kind)
    asked = []

    def download(repository, allow_patterns):
        assert repository == "someone/roberta-tiny"
        asked.append(allow_patterns)
        return str(tmp_path / "cache" / "abc123")

    monkeypatch.setattr(files, "snapshot_download", download)
    report = convert("someone/roberta-tiny", tmp_path / "out")
    assert report.hub_id == report.source_name == "someone/roberta-tiny"
    assert "base_model: someone/roberta-tiny" in (tmp_path / "out" / "README.md").read_text()
    assert "model*.safetensors" in asked[0] and not any("bin" in name for name in asked[0])
    assert len(asked) == (1 if kind == "safetensors" else 2)


# Report, card, scores


def test_report_and_card_state_the_facts(tmp_path):
    make_source(tmp_path / "source", "bert")
    report = convert(tmp_path / "source", tmp_path / "out", max_length=512, block_per_row=2)
    saved = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["source"] == "source" and saved["counts"] == report.counts()
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "import mra_hf",
        "AutoModelForMaskedLM",
        "32 of 256 block pairs per head (12.5%) at 512 tokens",
        "Up to 64 tokens the result is dense attention",
        "row r is learned row (r - 1) mod 40",
        "cost accuracy until training continues",
        "`bert.* -> roberta.*`",
    ):
        assert fact in card, fact
    assert "base_model" not in card and "## Scores" not in card
    for text in (card, json.dumps(saved), (tmp_path / "out" / "config.json").read_text()):
        assert str(tmp_path) not in text and "partial" not in text
    summary = report.summary()
    assert "dense up to 64 tokens" in summary and "tiled" in summary
    code = card.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(report.output)))
    exec(code, {})


@pytest.mark.parametrize("head", HEADS)
def test_code_of_the_card_runs_for_every_head(head, tmp_path):
    make_source(tmp_path / "source", "roberta", head)
    report = convert(tmp_path / "source", tmp_path / "out")
    code = report.model_card().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), {})


def test_scores_of_source_and_result_agree_at_full_budget(tmp_path):
    make_source(tmp_path / "source")
    text = "".join(LETTERS) * 20
    report = convert(tmp_path / "source", tmp_path / "out", text=[text], max_length=200)
    assert [(row.model, row.length) for row in report.scores] == [
        ("source", LENGTH),
        ("result", LENGTH),
        ("result", 200),
    ]
    source, same, longer = report.scores
    assert source.accuracy == same.accuracy and source.nll == pytest.approx(same.nll, abs=1e-5)
    assert source.n_masked == same.n_masked == longer.n_masked
    assert (source.n_chunks, longer.n_chunks) == (14, 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "untrained" in card and f"{source.nll:.3f}" in card and "untrained" in report.summary()
    (tmp_path / "text.txt").write_text(text)
    again = convert(tmp_path / "source", tmp_path / "again", text=tmp_path / "text.txt")
    assert again.scores[0] == source


def test_scores_of_a_builtin_source_use_its_own_attention(tmp_path):
    make_source(tmp_path / "source", "mra", max_position_embeddings=64)
    report = convert(tmp_path / "source", tmp_path / "out", text=["ABCDEFGH" * 40], max_length=64)
    source, result = report.scores
    assert source.attention == result.attention == "MRA-2"
    assert source.nll == pytest.approx(result.nll, abs=1e-5)


def test_the_same_tokens_are_masked_whatever_the_chunk_length(tmp_path):
    seen = {}

    class Spy(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            real = [row[m == 1].tolist() for row, m in zip(input_ids, attention_mask, strict=True)]
            assert all(row[0] == 0 and row[-1] == 2 for row in real)
            seen[self.length] = seen.get(self.length, []) + [t for row in real for t in row[1:-1]]
            logits = torch.zeros(*input_ids.shape, SIZES["vocab_size"])
            return transformers.modeling_outputs.MaskedLMOutput(logits=logits)

    tokenizer = letter_tokenizer(ROBERTA_VOCABULARY, SPECIALS, LENGTH)
    scores = []
    for length in (3, 10, 33, 1000):
        spy = Spy()
        spy.length = length
        scores.append(masked_token_scores(spy, tokenizer, ["ABCDEFGHI" * 9, "?XYZ"], length=length))
    assert len({tuple(tokens) for tokens in seen.values()}) == 1
    [stream] = {tuple(tokens) for tokens in seen.values()}
    assert stream.count(tokenizer.mask_token_id) == scores[0].n_masked > 0
    assert stream[81] == tokenizer.unk_token_id  # special tokens are never masked
    assert {score.n_masked for score in scores} == {scores[0].n_masked}
    assert [score.n_chunks for score in scores] == [85, 11, 3, 1]
    assert scores[0].nll == pytest.approx(torch.tensor(31.0).log().item(), abs=1e-5)


def test_scores_of_bad_arguments_are_refused(tmp_path):
    model = make_source(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    for texts, arguments in (
        ([""], {"length": 10}),
        (["???"], {"length": 10}),
        (["ABC"], {"length": 2}),
        (["ABC"], {"length": 10, "fraction": 0}),
        (["ABC"], {"length": 10, "batch_size": 0}),
    ):
        with pytest.raises(ValueError):
            masked_token_scores(model, tokenizer, texts, **arguments)
    scores = masked_token_scores(model, tokenizer, "A", length=10)
    assert (scores.n_masked, scores.n_chunks, scores.n_tokens) == (1, 1, 1)
    limited = masked_token_scores(model, tokenizer, "ABC" * 40, length=12, max_tokens=25)
    assert (limited.n_chunks, limited.n_tokens) == (3, 25)
    first = masked_token_scores(model, tokenizer, "ABC" * 40, length=12, max_chunks=2)
    assert (first.n_chunks, first.n_tokens) == (2, 20)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_length": True}, "max_length"),
        ({"max_length": 40.0}, "max_length"),
        ({"max_length": "40"}, "max_length"),
        ({"block_per_row": 0}, "block_per_row"),
        ({"approx_mode": "dense"}, "approx_mode"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks"),
        ({"initial_prior_first_n_blocks": 4}, "block_per_row must be at least 9"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"text": [" "]}, "nothing to score"),
        ({"text": [1]}, "list of strings"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("source_type", "head", "changes", "said"),
    [
        ("roberta", "ForMaskedLM", {"model_type": "gpt2"}, "allowed are roberta"),
        ("roberta", "ForMaskedLM", {"model_type": None}, "allowed are roberta"),
        ("roberta", "ForMaskedLM", {"architectures": ["RobertaForCausalLM"]}, "decoder"),
        ("roberta", "ForMaskedLM", {"is_decoder": True}, "decoder"),
        ("bert", "ForMaskedLM", {"architectures": ["BertLMHeadModel"]}, "decoder"),
        ("bert", "ForMaskedLM", {"add_cross_attention": True}, "decoder"),
        ("bert", "Model", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", "ForMaskedLM", {"hidden_act": "relu"}, 'hidden_act.*"gelu"'),
        ("mra", "ForMaskedLM", {"hidden_act": "relu"}, 'hidden_act.*"gelu"'),
        ("mra", "ForSequenceClassification", {}, "tanh"),
        ("mra", "ForMultipleChoice", {}, "pre_classifier"),
        ("bert", "ForMaskedLM", {"vocab_size": 500}, "word_embeddings"),
        ("bert", "ForMaskedLM", {"max_position_embeddings": 41}, "position_embeddings"),
        ("bert", "ForMaskedLM", {"vocab_size": 12}, "vocab_size"),
        ("bert", "ForMaskedLM", {"num_hidden_layers": 3}, "lacks 16 tensors"),
        ("roberta", "ForMaskedLM", {"hidden_size": "big"}, "config.json is not a valid"),
        ("roberta", "Model", {"architectures": ["RobertaForMaskedLM"]}, "lacks"),
        ("roberta", "ForMaskedLM", {"hidden_act": "abs"}, "hidden_act"),
        ("roberta", "ForMaskedLM", {"max_position_embeddings": 2}, "no positions"),
    ],
)
def test_sources_that_cannot_be_converted_are_refused(source_type, head, changes, said, tmp_path):
    make_source(tmp_path / "source", source_type, head)
    change_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_roberta_lm_head_may_follow_another_activation(tmp_path):
    source = make_source(tmp_path / "source", hidden_act="relu")
    convert(tmp_path / "source", tmp_path / "out")
    inputs = random_inputs("roberta", "ForMaskedLM")
    result = open_result(tmp_path / "out")
    torch.testing.assert_close(
        outputs_of(result, inputs)[0], outputs_of(source, inputs)[0], atol=1e-5, rtol=1e-5
    )


def test_text_needs_a_masked_lm_head(tmp_path):
    make_source(tmp_path / "source", head="Model")
    with pytest.raises(ValueError, match="masked-LM head"):
        convert(tmp_path / "source", tmp_path / "out", text=["ABC"])
    with pytest.raises(OSError, match="no file"):
        convert(tmp_path / "source", tmp_path / "out", text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8"):
        convert(tmp_path / "source", tmp_path / "out", text=tmp_path / "latin.txt")


def damage(folder, how):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif how == "missing":
        file.unlink()
    else:
        rewrite(folder, "bin")
        file = folder / "pytorch_model.bin"
        content = file.read_bytes()
        if how == "truncated bin":
            file.write_bytes(content[: len(content) // 2])
        elif how == "garbage bin":
            file.write_bytes(b"not a pickle")
        elif how == "object bin":
            torch.save({"model": MraConfig()}, file)
        elif how == "nested bin":
            torch.save({"state_dict": {}, "epoch": 3}, file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("pointer", "git lfs pull"),
        ("missing", "no weights"),
        ("truncated bin", "pytorch_model.bin"),
        ("garbage bin", "pytorch_model.bin"),
        ("object bin", "pytorch_model.bin"),
        ("nested bin", "pytorch_model.bin"),
    ],
)
def test_damaged_weights_are_named(how, said, tmp_path):
    make_source(tmp_path / "source")
    damage(tmp_path / "source", how)
    with pytest.raises((OSError, ValueError), match=said):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_shards_and_bad_indexes_are_named(tmp_path):
    make_source(tmp_path / "source")
    rewrite(tmp_path / "source", "sharded model.safetensors")
    index = tmp_path / "source" / "model.safetensors.index.json"
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002"):
        convert(tmp_path / "source", tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map"):
        convert(tmp_path / "source", tmp_path / "out")
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(tmp_path / "source", tmp_path / "out")


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(OSError, match="no directory"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(OSError, match="neither a directory here nor a repository"):
        convert("no-such-user/no-such-model", tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="SOURCE must be a directory"):
        convert(tmp_path / "file", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_an_empty_tokenizer_is_refused(tmp_path):
    make_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    (tmp_path / "source" / "vocab.txt").write_text("A\nB\n")  # RoBERTa reads another file
    with pytest.raises(OSError, match="tokenizer"):
        convert(tmp_path / "source", tmp_path / "out")


# Writing all or nothing


def test_output_is_refused_or_replaced(tmp_path):
    make_source(tmp_path / "source")
    out = tmp_path / "deep" / "er" / "out"
    out.mkdir(parents=True)
    convert(tmp_path / "source", out)  # empty is free
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="force"):
        convert(tmp_path / "source", out, max_length=50)
    with pytest.raises(ValueError, match="block_per_row"):
        convert(tmp_path / "source", out, block_per_row=0, force=True)
    assert (out / "mine.txt").read_text() == "keep"
    convert(tmp_path / "source", out, max_length=50, force=True)
    assert not (out / "mine.txt").exists()
    assert MraConfig.from_pretrained(out).max_tokens == 50
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_output_in_around_or_at_the_source_is_refused(force, tmp_path, monkeypatch):
    source = tmp_path / "a" / "source"
    make_source(source)
    for output in (source, source / "inside", tmp_path / "a", source / ".." / "source"):
        with pytest.raises(ValueError, match="OUT"):
            convert(source, output, force=force)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="OUT must be a directory"):
        convert(source, tmp_path / "file", force=force)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "now").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "now")
    with pytest.raises(ValueError, match="OUT"):
        convert(source, tmp_path / "here", force=force)
    assert load_file(source / "model.safetensors")


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing(error, tmp_path, monkeypatch):
    make_source(tmp_path / "source")

    def fail(*args):
        assert (tmp_path / f".out.partial-{os.getpid()}").is_dir()
        raise error

    monkeypatch.setattr("mra_hf.conversion.convert._write_report", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(type(error)):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    kind = type(out)
    real = kind.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(kind, "rename", rename)
    with pytest.raises(OSError, match="no"), staged_directory(out, force=True) as folder:
        (folder / "new").write_text("new")
    monkeypatch.undo()
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_works_in_another_thread_and_once_at_a_time(tmp_path):
    make_source(tmp_path / "source")
    errors = []

    def work():
        try:
            convert(tmp_path / "source", tmp_path / "out")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and (tmp_path / "out" / "config.json").is_file()
    with staged_directory(tmp_path / "other"):
        thread = threading.Thread(target=lambda: errors.append(_staging_error(tmp_path / "other")))
        thread.start()
        thread.join()
    assert isinstance(errors[0], ValueError) and "another thread" in str(errors[0])


def _staging_error(output):
    try:
        with staged_directory(output):
            return None
    except ValueError as error:
        return error


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent = os.getppid()
    for name in (f".out.partial-{dead.pid}", f".out.partial-{parent}", ".other.partial-1"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out.replaced-{dead.pid}").mkdir()
    (tmp_path / f".out.replaced-{dead.pid}" / "old").write_text("old")
    with pytest.raises(ValueError, match="force"), staged_directory(tmp_path / "out"):
        pass  # killed between the two renames: the old directory is back and not empty
    assert (tmp_path / "out" / "old").read_text() == "old"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([f".out.partial-{parent}", ".other.partial-1", "out"])


SLOW = """
    import sys, time
    from mra_hf.conversion import convert

    def wait(report, folder):
        assert (folder / "model.safetensors").is_file()
        print("waiting", flush=True)
        time.sleep(60)

    convert._write_report = wait
    convert.convert_checkpoint(sys.argv[1], sys.argv[2], max_length=64, force=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_output(number, tmp_path):
    make_source(tmp_path / "source")
    out = tmp_path / "out"
    if number == signal.SIGTERM:
        out.mkdir()
        (out / "old").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path / "source"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"waiting\n"
        partial = tmp_path / f".out.partial-{process.pid}"
        assert partial.is_dir()
        started = time.monotonic()
        process.send_signal(number)
        code = process.wait(timeout=30)
    assert time.monotonic() - started < 20
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert not partial.exists() and (out / "old").read_text() == "old"
    else:
        assert partial.is_dir() and not out.exists()
    convert(tmp_path / "source", out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


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
    inputs = random_inputs("roberta", "ForMaskedLM")  # two blocks: all are exact in both
    for got, wanted in zip(outputs_of(model, inputs), outputs_of(source, inputs), strict=True):
        torch.testing.assert_close(got, wanted)
