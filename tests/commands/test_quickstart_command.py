"""`mra-hf quickstart` on sources of every kind, with the timing shortened."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaForMaskedLM, RobertaModel
from transformers.models.mra import configuration_mra, modeling_mra

import mra_hf
from mra_hf.commands import main, quickstart
from tiny_models import SIZES, roberta_config, word_tokenizer

TEXT = " ".join(f"w{10 + (7 * i) % 80}" for i in range(700))


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(quickstart, "_TIMED_LENGTH", 128)
    monkeypatch.setattr(quickstart, "_PICTURE_TOKENS", 256)


def source(path, kind):
    sizes = {name: SIZES[name] for name in SIZES if name != "layer_norm_eps"}
    if kind == "bert":
        model = BertForMaskedLM(
            BertConfig(**(sizes | {"pad_token_id": 1, "max_position_embeddings": 256}))
        )
    elif kind == "mra":
        sizes |= {"max_position_embeddings": 256}
        model = modeling_mra.MraForMaskedLM(configuration_mra.MraConfig(**sizes))
    elif kind == "base":
        model = RobertaModel(roberta_config())
    else:
        model = RobertaForMaskedLM(roberta_config())
    model.save_pretrained(path)
    tokenizer = word_tokenizer()
    if kind == "no length":
        tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["roberta", "no length", "bert", "mra"])
def test_the_whole_journey_runs_and_can_be_repeated(kind, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["quickstart", source(tmp_path / "source", kind), "--max-length", "512"]
    arguments += ["--output", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    assert main(arguments) == 0
    assert main(arguments) == 0  # over its own earlier result
    numbers = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    scored = numbers["masked_tokens"]
    assert [row["length"] for row in scored] == [256, 512, 512]
    assert [row["model"] for row in scored] == ["source", "untrained", "untrained"]
    assert all(row["half_interval"] > 0 for row in scored[1:])
    picture = tmp_path / "out" / "attention.png"
    if numbers["picture"] is None:  # every head errs as much as zeros would
        assert not picture.exists()
    else:
        assert numbers["picture"]["relative_error"] < 1 and picture.stat().st_size > 10_000
    model = mra_hf.MraForMaskedLM.from_pretrained(tmp_path / "out" / "checkpoint")
    assert model.config.max_tokens == 512
    assert torch.isfinite(model(torch.full((1, 300), 7)).logits).all()
    assert "MRA-2" in capsys.readouterr().out


def test_a_tokenizer_without_english_gets_words_of_its_own(tmp_path, capsys):
    arguments = ["quickstart", source(tmp_path / "source", "roberta"), "--max-length", "512"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "unknown to this tokenizer" in capsys.readouterr().out
    scores = json.loads((tmp_path / "out" / "quickstart.json").read_text())["masked_tokens"]
    assert scores[0]["masked_tokens"] > 50


@pytest.mark.parametrize("kind", ["base", "sentence encoder"])
def test_a_source_without_a_masked_lm_head_is_compared_by_its_states(kind, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    folder = source(tmp_path / "source", "base")
    if kind == "sentence encoder":
        write_cls_pooling(tmp_path / "source")
    arguments = ["quickstart", folder, "--max-length", "512", "--block-per-row", "8"]
    arguments += ["--output", str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]
    assert main(arguments) == 0
    numbers = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    rows = numbers["agreement"]
    assert [(row["model"], row["length"]) for row in rows] == [
        ("source", 256),
        ("untrained", 512),
        ("untrained", 512),
    ]
    assert [row["attention"] for row in rows] == ["dense", "dense", "MRA-2, 8 blocks"]
    assert rows[0]["pooled"] == 1 and all(0 < row["states"] <= 1 for row in rows)
    assert {row["tokens"] for row in rows} == {700}
    assert "masked_tokens" not in numbers and numbers["timing"]["milliseconds"]
    printed = capsys.readouterr().out
    assert "states" in printed and "pooled" in printed
    opener = "SentenceTransformer" if kind == "sentence encoder" else "AutoModel"
    assert f"import {opener}\n" in printed
    assert f"({'cls' if kind == 'sentence encoder' else 'mean'})" in printed


def write_cls_pooling(folder):
    rows = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(rows)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("roberta", ["--max-length", "0"], "max_length"),
        ("roberta", ["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    kind, options, words, tmp_path, capsys
):
    out = tmp_path / "out"
    status = main(["quickstart", source(tmp_path / "s", kind), "--output", str(out), *options])
    assert status == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert not (out / "checkpoint").exists()
