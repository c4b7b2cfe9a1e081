"""`mra-hf run-mlm`: settings, training, resuming, what is written; and the loss it trains with."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, RobertaForMaskedLM
from transformers.models.roberta.modeling_roberta import RobertaLMHead

import mra_hf
from files import read_csv, read_json, write_json_lines
from mra_hf import loading, sparse_prediction
from mra_hf.commands import main
from mra_hf.data import mlm
from mra_hf.training.initialization import init_previous_token_heads
from tiny_models import mra_config, padded_batch, roberta_config, word_tokenizer

SCRATCH = (
    "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,"
    "max_position_embeddings=66,hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
)


SETTINGS = {
    **{"config_overrides": SCRATCH, "start_with_neighbours": True, "tokenizer_name": "tokenizer"},
    **{"train_file": ["train.jsonl"], "validation_file": ["held-out.jsonl"], "max_seq_length": 64},
    **{"do_train": True, "do_eval": True, "output_dir": "run", "max_steps": 4, "save_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "learning_rate": "1e-3"},
    **{"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
}
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Here lie texts whose words follow one another by rule, a tokenizer, a YAML file."""
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    for name, documents in (("train", 40), ("held-out", 4)):
        starts = [generator.randrange(80) for _ in range(documents)]
        rows = [{"text": " ".join(f"w{10 + (s + i) % 80}" for i in range(150))} for s in starts]
        write_json_lines(f"{name}.jsonl", rows)
    word_tokenizer().save_pretrained("tokenizer")
    write_settings()
    return tmp_path


def write_settings(**changes):
    Path("mlm.yaml").write_text(yaml.safe_dump(SETTINGS | changes))


def run(*arguments, file="mlm.yaml", output_dir="run") -> dict:
    """Run with these options; return the results."""
    assert main(["run-mlm", file, "--output_dir", output_dir, *arguments]) == 0
    return read_json(f"{output_dir}/results.json")


def saved_settings(name="run") -> dict:
    return yaml.safe_load(Path(name, "experiment.yaml").read_text())


def test_a_run_writes_model_results_curve_and_settings(capsys, real_pictures):
    results = run()
    assert "eval_bits_per_token" in capsys.readouterr().out
    model = AutoModelForMaskedLM.from_pretrained("run")
    assert isinstance(model, RobertaForMaskedLM) and model.config.hidden_size == 32
    assert results["train"]["steps"] == 4 and results["max_seq_length"] == 64
    assert 0 <= results["eval"]["eval_accuracy"] <= 1
    nll, bits = results["eval"]["eval_nll"], results["eval"]["eval_bits_per_token"]
    assert bits == pytest.approx(nll / 0.693147, rel=1e-4)
    rows = read_csv("run/training_curve.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert rows[1]["eval_nll"] and not rows[0]["eval_nll"] and rows[0]["loss"]
    assert Path("run/training_curve.png").stat().st_size > 10_000


def test_the_smoke_experiment_runs_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = ["run-mlm", "configs/smoke/mlm.yaml", "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, "--max_steps", "2"]) == 0
    results = read_json(tmp_path / "run" / "results.json")
    assert results["attention"] == "mra2" and results["eval"]["eval_accuracy"] > 0.1


def test_the_saved_settings_repeat_the_run():
    run("--max_steps", "2", "--max_train_samples", "50")
    saved = saved_settings()
    assert saved["max_steps"] == 2 and saved["max_train_samples"] == 50, "the command line wins"
    assert saved["learning_rate"] == 1e-3
    run(file="run/experiment.yaml", output_dir="again")
    first, second = (
        AutoModelForMaskedLM.from_pretrained(name).state_dict() for name in ("run", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_run_goes_on_from_its_last_checkpoint():
    run("--learning_rate", "1e-4")
    shutil.rmtree("run/checkpoint-4")
    Path("run/results.json").unlink()
    weights = "run/checkpoint-2/model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.bias"] += 0.5  # leaves a trace of where the run went on
    save_file(tensors, weights, {"format": "pt"})
    before = Path("run/training_curve.csv").read_text().splitlines()
    run("--learning_rate", "1e-4", *RESUME)
    after = Path("run/training_curve.csv").read_text().splitlines()
    assert after[:2] == before[:2] and len(after) == len(before) == 5
    bias = AutoModelForMaskedLM.from_pretrained("run").lm_head.bias
    assert (bias - 0.5).abs().max() < 0.01
    assert Path("run/checkpoint-4").is_dir()


def test_a_dataset_is_read_by_name_split_and_column(monkeypatch):
    asked = []

    def hub(name, config_name, *, split, streaming):
        asked.append((name, config_name, split, streaming))
        words = [" ".join(f"w{10 + (start + i) % 80}" for i in range(150)) for start in range(9)]
        return Dataset.from_dict({"body": words, "title": words})

    monkeypatch.setattr(mlm, "load_dataset", hub)
    named = {"dataset_name": "some/books", "dataset_config_name": "en", "text_column": "body"}
    write_settings(train_file=None, validation_file=None, validation_split="test", **named)
    data = run("--max_steps", "1")["data"]
    assert asked == [("some/books", "en", split, False) for split in ("train", "test")]
    assert data["train"] and data["train"] == data["eval"]


def test_a_resumed_run_has_the_curve_of_an_unbroken_one():
    dropout = SCRATCH.replace("hidden_dropout_prob=0.0", "hidden_dropout_prob=0.1")
    arguments = ["--config_overrides", dropout, "--max_steps", "8"]
    arguments += ["--max_train_samples", "20"]  # five steps an epoch
    run(*arguments)
    before = Path("run/training_curve.csv").read_text()
    assert len(before.splitlines()) == 9
    for step in (8, 6):  # as if it had been killed after step 4
        shutil.rmtree(f"run/checkpoint-{step}")
    Path("run/results.json").unlink()
    run(*arguments, *RESUME)
    assert Path("run/training_curve.csv").read_text() == before


def test_an_mra_checkpoint_is_trained_and_evaluated():
    mra_hf.MraForMaskedLM(mra_config(block_per_row=2)).save_pretrained("mra")
    write_settings(model_name_or_path="mra", config_overrides=None, start_with_neighbours=False)
    assert run("--max_seq_length", "256", "--max_steps", "1")["attention"] == "mra2"
    assert isinstance(AutoModelForMaskedLM.from_pretrained("run"), mra_hf.MraForMaskedLM)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output_dir", "."], "is not empty"),
        (["--max_seq_length", "100"], "max_seq_length must be at most 64"),
        (["--mlm_probability", "0"], "mlm_probability"),
        (["--do_train", "no", "--do_eval", "no", "--eval_strategy", "no"], "nothing to do"),
        (["--dataset_name", "some/text"], "both given"),
        (["--tokenizer_name", ""], "tokenizer"),
        (["--streaming", "true", "--max_steps", "-1"], "max_steps"),
        (["--resume_from_checkpoint", "nowhere"], "checkpoint folder"),
        (["--validation_file", "none.txt"], "no text files"),
        (["--train_file", "train.jsonl", "none.txt"], "no text files in ['none.txt']"),
        (["--max_train_samples", "0"], "max_train_samples"),
        (["--config_overrides", "hidden_size=wide"], "config_overrides"),
        (["--attn_implementation", "flash_attention_2"], "flash_attention_2"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, words, refused):
    assert words in refused("run-mlm", "mlm.yaml", *arguments)
    assert not Path("run").exists()


def test_another_text_column_and_a_generous_limit_are_fine():
    for name in ("train", "held-out"):
        file = Path(f"{name}.jsonl")
        file.write_text(file.read_text().replace('"text"', '"body"'))
    run("--text_column", "body", "--max_eval_samples", "999", "--max_steps", "1")


def test_a_model_without_head_is_refused_and_scores_are_appended(refused, capsys):
    model = RobertaForMaskedLM(roberta_config())
    model.save_pretrained("whole")
    model.roberta.save_pretrained("bare")
    for name in ("whole", "bare"):
        word_tokenizer().save_pretrained(name)
    arguments = ["score", "--text", "held-out.jsonl", "--length", "128", "--out", "scores.csv"]
    assert main([*arguments, "whole"]) == 0
    assert main([*arguments, "whole", "--attention", "mra2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("nll: their mean loss in nats") == 2 and not printed.err
    assert "masked-LM head" in refused(*arguments, "bare")
    assert not capsys.readouterr().out, "no heading without a row"
    rows = read_csv("scores.csv")
    assert [row["attention"] for row in rows] == ["sdpa", "mra2"]
    assert rows[0]["masked_tokens"] == rows[1]["masked_tokens"]


def test_scores_need_a_length_that_the_model_can_read(refused):
    RobertaForMaskedLM(roberta_config()).save_pretrained("whole")  # 64 positions
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained("whole")
    arguments = ["score", "whole", "--text", "held-out.jsonl", "--out", "scores.csv"]
    room = loading.longest_input(RobertaForMaskedLM(roberta_config()))
    assert main(arguments) == 0, "the model knows its length"
    assert f"at most {room}" in refused(*arguments, "--length", str(room + 1))
    (row,) = read_csv("scores.csv")
    assert row["length"] == str(room) and row["approx_mode"] == row["block_per_row"] == ""
    assert main([*arguments, "--attention", "mra2_s"]) == 0
    row = read_csv("scores.csv")[-1]
    assert (row["approx_mode"], row["block_per_row"]) == ("sparse", "8")
    Path("scores.csv").write_text("model,accuracy\n")
    assert "other columns" in refused(*arguments)


def test_an_evaluation_computes_no_logits_but_those_it_scores(monkeypatch):
    shapes = []
    all_places = RobertaLMHead.forward

    def forward(self, features, **kwargs):
        shapes.append((self.training, features.shape[:-1]))
        return all_places(self, features, **kwargs)

    monkeypatch.setattr(RobertaLMHead, "forward", forward)
    run("--sparse_prediction", "false")
    in_evaluation = [shape for training, shape in shapes if not training]
    assert in_evaluation and all(len(shape) == 1 for shape in in_evaluation)
    assert {len(shape) for training, shape in shapes if training} == {2}, "as it was asked for"


def test_sizes_are_chosen_from_scratch_alone(refused):
    RobertaForMaskedLM(roberta_config()).save_pretrained("whole")
    arguments = ["--model_name_or_path", "whole", "--start_with_neighbours", "false"]
    arguments += ["--max_steps", "1", "--config_overrides"]
    error = refused("run-mlm", "mlm.yaml", *arguments, "hidden_size=64")
    assert "change the shape of weights" in error
    run(*arguments, "hidden_dropout_prob=0.0")


def test_a_finished_run_is_not_trained_on_by_accident(refused):
    results = run()
    again = ["run-mlm", "mlm.yaml"]
    assert "finished run (4 steps)" in refused(*again, *RESUME)
    refused(*again, "--resume_from_checkpoint", "run/checkpoint-4")
    assert read_json("run/results.json") == results
    train = run(*RESUME, "--max_steps", "6")["train"]
    assert (train["steps"], train["resumed_from"]) == (6, "checkpoint-4")
    assert "resume_from_checkpoint" not in saved_settings()
    again += ["--do_train", "false", "--model_name_or_path", "run"]
    assert "not empty; name another folder" in refused(*again, "--start_with_neighbours", "false")


def test_settings_given_as_false_or_zero_are_saved():
    arguments = ["--metric_for_best_model", "eval_nll", "--greater_is_better", "false"]
    arguments += ["--data_seed", "0", "--accelerator_config", '{"even_batches": false}']
    run("--max_steps", "1", *arguments)
    settings = saved_settings()
    assert settings["greater_is_better"] is False and settings["data_seed"] == 0
    assert settings["accelerator_config"]["even_batches"] is False
    run(file="run/experiment.yaml", output_dir="again")
    assert saved_settings("again") == settings | {"output_dir": "again"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("true: 1", "True"),
        ("max_steps: [1, 2]", "max_steps must be one value"),
        (None, "bad.yaml"),
    ],
)
def test_a_yaml_key_that_does_not_exist_is_named(content, words, refused):
    if content:
        Path("bad.yaml").write_text(content)
    assert words in refused("run-mlm", "bad.yaml")


@pytest.mark.parametrize("kind", ["roberta", "mra"])
def test_logits_at_masked_places_alone_give_the_same_loss_and_gradients(kind):
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "roberta":
        model = RobertaForMaskedLM(roberta_config(**config))
    else:
        model = mra_hf.MraForMaskedLM(mra_config(block_per_row=2, **config))
    batch = padded_batch()
    labels = torch.where(torch.rand(batch["input_ids"].shape) < 0.2, batch["input_ids"], -100)
    model.train()
    expected = model(**batch, labels=labels)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sparse_prediction.predict_labelled_positions(model)
    actual = model(**batch, labels=labels)
    actual.loss.backward()
    assert actual.logits.shape == (int((labels != -100).sum()), model.config.vocab_size)
    torch.testing.assert_close(actual.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    # Accumulated over two batches, the loss of each is divided by the labels of both.
    halved = model(**batch, labels=labels, num_items_in_batch=2 * (labels != -100).sum())
    torch.testing.assert_close(2 * halved.loss, expected.loss)
    model.eval()
    assert model(**batch, labels=labels).logits.shape[:2] == labels.shape


def test_an_evaluation_hides_the_same_tokens_every_time():
    results = run("--max_steps", "1", "--learning_rate", "0", "--eval_steps", "1")
    (row,) = read_csv("run/training_curve.csv")
    assert float(row["eval_nll"]) == pytest.approx(results["eval"]["eval_nll"], abs=1e-6)


def test_heads_of_the_first_layer_begin_with_neighbours():
    config = roberta_config(
        initializer_range=0.05, hidden_size=192, num_attention_heads=3, attn_implementation="eager"
    )
    model = RobertaForMaskedLM(config).eval()
    init_previous_token_heads(model)
    assert model.roberta.embeddings.position_embeddings.weight[1].abs().max() == 0, "padding"
    ids = torch.randint(5, 99, (4, 100))
    weights = model(ids, output_attentions=True).attentions[0]  # [B, H, N, N]
    for head, offset in enumerate((-1, 1, -2)):
        diagonal = weights[:, head].diagonal(offset, -2, -1).mean()
        assert diagonal > 3 * weights[:, head].diagonal(0, -2, -1).mean()
        assert diagonal > 0.2


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (b'{"text": null}\n', "'text' must be a text"),
        (b'{"text": "caf\xe9 w10"}\n', "not UTF-8"),
        (b'{"text": "w10 w1', "not JSON"),
    ],
)
def test_a_fault_in_streamed_text_is_named_by_its_line(refused, fault, place, workers):
    line = json.dumps({"text": " ".join(f"w{10 + i % 80}" for i in range(120))}).encode() + b"\n"
    Path("streamed.jsonl").write_bytes(line * 40 + fault)
    arguments = ["--train_file", "streamed.jsonl", "--streaming", "true", "--max_steps", "200"]
    arguments += ["--dataloader_num_workers", workers]
    message = refused("run-mlm", "mlm.yaml", *arguments)
    assert f"streamed.jsonl, line 41: {place}" in message


def test_the_best_model_is_the_one_with_the_fewest_bits():
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "bits_per_token"]
    run("--max_steps", "6", *best)
    state = read_json("run/trainer_state.json")
    bits = [row["eval_bits_per_token"] for row in state["log_history"] if "eval_loss" in row]
    assert state["best_metric"] == min(bits[:3]) != max(bits[:3])


def test_streamed_text_shorter_than_an_example_is_refused(refused):
    Path("short.jsonl").write_text('{"text": "w10 w11"}\n')
    arguments = ["--train_file", "short.jsonl", "--streaming", "true"]
    assert "shorter than one example of 64 tokens" in refused("run-mlm", "mlm.yaml", *arguments)
