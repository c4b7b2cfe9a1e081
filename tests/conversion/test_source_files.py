"""What a source directory may hold: weights and tokenizers of every kind, heads without a name."""

import itertools
from fnmatch import fnmatch

import pytest
import torch
import transformers
from conversion_cases import (
    BERT_VOCABULARY,
    HEADS,
    ROBERTA_VOCABULARY,
    SOURCES,
    change_config,
    convert,
    make_source,
    rewrite,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer


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


@pytest.mark.parametrize(
    ("source_type", "head", "architectures"),
    [
        (*source, architectures)
        for source, architectures in zip(
            [
                *itertools.product(["roberta", "bert"], HEADS),
                *(("mra", head) for head in ("Model", "ForMaskedLM", *HEADS[3:5])),
            ],
            itertools.cycle([None, ["AntiBERTy"], []]),
        )
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


@pytest.mark.parametrize("source_type", [name for name in SOURCES if name != "mra"])
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
        name = f"{SOURCES[source_type].class_prefix}Tokenizer"
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

    monkeypatch.setattr("mra_hf.conversion.files.snapshot_download", download)
    report = convert("someone/roberta-tiny", tmp_path / "out")
    assert report.hub_id == report.source_name == "someone/roberta-tiny"
    assert "base_model: someone/roberta-tiny" in (tmp_path / "out" / "README.md").read_text()
    assert "model*.safetensors" in asked[0] and not any(
        fnmatch("pytorch_model.bin", name) for name in asked[0]
    )
    assert len(asked) == (1 if kind == "safetensors" else 2)
