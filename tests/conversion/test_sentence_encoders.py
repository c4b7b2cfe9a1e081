"""Directories of sentence-transformers: what opens the source opens the result, equal results."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from files import read_json
from mra_hf import MraModel, convert_checkpoint
from tiny_models import SIZES, TOKENS, roberta_config, word_tokenizer

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer import modules as models

LONGER = 512
#: Up to the 32 tokens less than the source has positions that a conversion keeps exact.
TEXTS = [" ".join(f"w{4 + (7 * i + n) % 90}" for i in range(n)) for n in (1, 40, 150, TOKENS - 34)]
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2]), (TEXTS[2], TEXTS[0])]


def write_encoder(folder, model=None, seed=0):
    """A random encoder in which biases, norms and positions matter, and its tokenizer."""
    torch.manual_seed(seed)
    model = model or RobertaModel(roberta_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "LayerNorm.weight" in name  # around 1, else every text looks the same
            parameter.normal_(1.0 if is_scale else 0.0, 0.3)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def modules_of(kind):
    width = SIZES["hidden_size"]
    return {
        "mean": lambda: [models.Pooling(width, "mean")],
        "cls": lambda: [models.Pooling(width, "cls")],
        "cls and mean": lambda: [models.Pooling(width, ("cls", "mean"))],
        "normalize": lambda: [models.Pooling(width, "mean"), models.Normalize()],
        "dense": lambda: [models.Pooling(width, "cls"), models.Dense(width, 8), models.Normalize()],
        "norm": lambda: [
            models.Pooling(width, "max"),
            models.Dropout(0.1),
            models.LayerNorm(width),
        ],
    }[kind]()


def write_sentence_encoder(folder, kind="mean", **settings):
    encoder = models.Transformer(str(write_encoder(folder.with_name("encoder"))))
    model = SentenceTransformer(modules=[encoder, *modules_of(kind)], device="cpu", **settings)
    model.save(str(folder))
    return model


def open_sentences(folder, **options):
    return SentenceTransformer(str(folder), device="cpu", **options)


def assert_same_embeddings(source, result):
    expected, found = (x.encode(TEXTS, convert_to_tensor=True) for x in (source, result))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.cosine_similarity(found, expected).min() > 0.9999
    assert torch.cosine_similarity(expected[1:], expected[:-1]).max() < 0.999  # of different texts


@pytest.mark.parametrize("kind", ["mean", "cls", "cls and mean", "normalize", "dense", "norm"])
def test_modules_are_kept_and_embeddings_equal(kind, tmp_path):
    source = write_sentence_encoder(
        tmp_path / "source", kind, prompts={"query": "w5 w6 "}, similarity_fn_name="dot"
    )
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    result = open_sentences(tmp_path / "out")
    assert [type(x).__name__ for x in result] == [type(x).__name__ for x in source]
    assert [name.split()[0] for name in report.modules] == [type(x).__name__ for x in source]
    assert type(result[0].model) is MraModel
    assert result[1].pooling_mode == source[1].pooling_mode
    assert result.max_seq_length == LONGER
    assert result.prompts == source.prompts and result.prompts["query"] == "w5 w6 "
    assert result.similarity_fn_name == "dot"
    assert_same_embeddings(source, result)
    expected, found = (x.encode(TEXTS[:2], prompt_name="query") for x in (source, result))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    longer = result.encode([" ".join(TEXTS[2:])], convert_to_tensor=True)
    assert not torch.allclose(longer, result.encode(TEXTS[2:3], convert_to_tensor=True))


def to_old_layout(folder):
    """As sentence-transformers 0.3 wrote it: the encoder in a folder, a field per pooling mode."""
    moved = folder / "0_Transformer"
    moved.mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(moved / file.name)
    settings = json.dumps({"max_seq_length": 128, "do_lower_case": False})
    (moved / "sentence_bert_config.json").unlink()
    (moved / "sentence_roberta_config.json").write_text(settings)
    modes = {"word_embedding_dimension": SIZES["hidden_size"], "pooling_mode_cls_token": True}
    modes |= {f"pooling_mode_{mode}": False for mode in ("mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (moved / "modules.json").unlink()
    (moved / "config_sentence_transformers.json").unlink()
    write_rows(folder, [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")])
    (folder / "config.json").write_text('{"__version__": "0.3.8"}')


def write_rows(folder, modules, prefix="sentence_transformers.models."):
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": prefix + kind}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))


def test_an_encoder_in_a_folder_of_its_own(tmp_path):
    source = write_sentence_encoder(tmp_path / "source", "cls")
    to_old_layout(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    assert report.modules == ("Transformer", "Pooling (cls)")
    assert report.source_name == "source"
    assert [row["path"] for row in json.loads((tmp_path / "out" / "modules.json").read_text())] == [
        "",
        "1_Pooling",
    ]
    result = open_sentences(tmp_path / "out")
    assert result.max_seq_length == LONGER  # not 128
    assert result[1].pooling_mode == "cls"
    assert_same_embeddings(source, result)
    write_encoder(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).unlink()
    convert_checkpoint(tmp_path / "plain", tmp_path / "other", tokenizer=tmp_path / "source")


def test_a_normalize_without_a_folder_and_modules_in_float16(tmp_path):
    source = write_sentence_encoder(tmp_path / "source", "normalize")
    shutil.rmtree(tmp_path / "source" / "2_Normalize")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER, dtype="bfloat16")
    result = open_sentences(tmp_path / "out")
    assert result[0].model.dtype == torch.bfloat16
    found = result.float().encode(TEXTS, convert_to_tensor=True)
    expected = source.encode(TEXTS, convert_to_tensor=True)
    assert torch.cosine_similarity(found, expected).min() > 0.999


def test_the_first_block_is_global_even_with_a_masked_lm_head(tmp_path):
    write_sentence_encoder(tmp_path / "source", "cls")
    write_encoder(tmp_path / "source", RobertaForMaskedLM(roberta_config()))
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    assert report.model_class == "MraForMaskedLM"
    assert report.settings["initial_prior_first_n_blocks"] == 1
    assert_same_embeddings(open_sentences(tmp_path / "source"), open_sentences(tmp_path / "out"))


def write_cross_encoder(folder, activation):
    sizes = {name: SIZES[name] for name in SIZES if name != "layer_norm_eps"} | {"pad_token_id": 1}
    if activation is None:  # the sigmoid of a single label
        config = BertConfig(**sizes, num_labels=1)
        write_encoder(folder.with_name("encoder"), BertForSequenceClassification(config))
        model = CrossEncoder(str(folder.with_name("encoder")), device="cpu")
    else:
        config = roberta_config(num_labels=1)
        write_encoder(folder.with_name("encoder"), RobertaForSequenceClassification(config))
        options = {"activation_fn": activation, "device": "cpu"}
        model = CrossEncoder(str(folder.with_name("encoder")), **options)
    model.save(str(folder))
    return model


@pytest.mark.parametrize("activation", [None, torch.nn.Tanh()])
def test_a_cross_encoder_scores_as_before(activation, tmp_path):
    source = write_cross_encoder(tmp_path / "source", activation)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    assert report.opened_by == "CrossEncoder" and report.model_class.endswith("Classification")
    result = CrossEncoder(str(tmp_path / "out"), device="cpu")
    expected = source.predict(PAIRS)
    assert expected.std() > 1e-4
    torch.testing.assert_close(result.predict(PAIRS), expected, atol=1e-5, rtol=1e-4)
    assert type(result.activation_fn) is type(source.activation_fn)
    assert result.max_seq_length == LONGER


@pytest.mark.parametrize("field", ["sentence_transformers", "sbert_ce_default_activation_function"])
def test_the_activation_that_older_cross_encoders_keep_in_the_config(field, tmp_path):
    source = write_cross_encoder(tmp_path / "source", torch.nn.Tanh())
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (tmp_path / "source" / name).unlink()
    config, path = (
        read_json(tmp_path / "source" / "config.json"),
        "torch.nn.modules.activation.Tanh",
    )
    config[field] = {"activation_fn": path} if field == "sentence_transformers" else path
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    result = CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert type(result.activation_fn) is torch.nn.Tanh
    found, expected = (x.predict(PAIRS) for x in (result, source))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


POOLED = [("", "Transformer"), ("1_Pooling", "Pooling")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*POOLED, ("2_CNN", "CNN")], "'sentence_transformers.models.CNN' at place 2"),
        ([*POOLED, ("2_Transformer", "Transformer")], "at place 2"),
        ([("0_BoW", "BoW")], "must be the first module"),
        ([("../other", "Transformer")], "only folders below it"),
        ([("/", "Transformer")], "only folders below it"),
        ([*POOLED, ("2_Dense", "Dense")], "2_Dense has no config.json"),
        ([POOLED[0], ("", "Pooling")], "a folder of its own"),
        ([], "must be a list of modules"),
    ],
)
def test_modules_that_cannot_be_carried_over_are_refused_by_name(rows, said, tmp_path):
    write_sentence_encoder(tmp_path / "source")
    write_rows(tmp_path / "source", rows)
    with pytest.raises((ValueError, OSError), match=said):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_of_somebody_else_is_refused(tmp_path):
    write_sentence_encoder(tmp_path / "source")
    write_rows(tmp_path / "source", [("", "Transformer")], prefix="custom_st.")
    with pytest.raises(ValueError, match=r"custom_st\.Transformer"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("sentence_bert_config.json", {"model_args": {"dtype": "float16"}}, "model_args"),
        ("sentence_bert_config.json", {"tokenizer_name_or_path": "x"}, "tokenizer_name_or_path"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
        ("sentence_bert_config.json", {"modality_config": {"image": {}}}, "only text"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
    ],
)
def test_settings_that_the_result_would_not_follow_are_refused(file, settings, said, tmp_path):
    write_sentence_encoder(tmp_path / "source")
    path = tmp_path / "source" / file
    path.write_text(json.dumps(read_json(path) | settings))
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")


def test_the_report_and_the_card_say_how_to_open_it(tmp_path):
    write_sentence_encoder(tmp_path / "source", "dense")
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "out", max_length=LONGER, text=[" ".join(TEXTS)]
    )
    assert "modules    Transformer, Pooling (cls), Dense, Normalize" in report.summary()
    assert "agreement with the source" in report.summary()
    saved = read_json(tmp_path / "out" / "conversion_report.json")
    assert saved == json.loads(json.dumps(report.to_dict()))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "sentence-similarity" in card
    code = card.split("```python\n")[1].split("```")[0]
    namespace = {}
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), namespace)
    assert namespace["outputs"].shape == (1, 8)


def test_a_converted_encoder_trains_and_is_saved(tmp_path):
    write_sentence_encoder(tmp_path / "source", "normalize")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    model = open_sentences(tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    long = [" ".join(f"w{5 + (i * k) % 80}" for i in range(300)) for k in (1, 3, 7, 11)]
    rows = {"sentence": [f"w{n} w9" for n in range(10, 14)], "document": long}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            **{"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            **{"report_to": "none", "save_strategy": "no", "use_cpu": True},
        ),
        train_dataset=Dataset.from_dict(rows),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    assert trainer.train().global_step == 2
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert any("distance_bias" in name for name in changed)
    model.save(str(tmp_path / "trained"))
    again = open_sentences(tmp_path / "trained")
    assert again.max_seq_length == LONGER
    found, expected = (x.encode(long, convert_to_tensor=True) for x in (again, model))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import mra_hf", "options = {'trust_remote_code': True}"])
def test_a_new_process_opens_the_result(first, tmp_path):
    source = write_sentence_encoder(tmp_path / "source", "cls")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", max_length=LONGER)
    code = f"""
options = {{}}
{first}
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", **options)
print(json.dumps([model.max_seq_length, *model.encode({TEXTS[1]!r}).tolist()]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    length, *found = json.loads(printed.splitlines()[-1])
    assert length == LONGER
    torch.testing.assert_close(found, source.encode(TEXTS[1]).tolist(), atol=1e-4, rtol=1e-4)


def test_a_result_is_made_longer_still(tmp_path):
    source = write_sentence_encoder(tmp_path / "source", "dense")
    convert_checkpoint(tmp_path / "source", tmp_path / "first", max_length=LONGER)
    convert_checkpoint(tmp_path / "first", tmp_path / "out", max_length=2 * LONGER)
    result = open_sentences(tmp_path / "out")
    assert result.max_seq_length == 2 * LONGER
    assert_same_embeddings(source, result)
