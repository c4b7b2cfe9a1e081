"""`mra-hf run-classification` and `run-wikihop`: data in, results out; going on after a stop."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    RobertaModel,
)

import mra_hf
from files import read_csv, read_json, write_json_lines
from mra_hf.commands import main
from mra_hf.evaluation.metrics import load_metric
from mra_hf.loading import leave_out_token_types
from mra_hf.training import runs
from tiny_models import mra_config, roberta_config, word_tokenizer

COMMON = {
    **{"model_name_or_path": "base", "output_dir": "run", "do_train": True, "do_eval": True},
    **{"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    **{"learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True},
    **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Here lie a tiny encoder with its tokenizer, sentence pairs, and questions over supports."""
    monkeypatch.chdir(tmp_path)
    mra_hf.MraModel(mra_config(block_per_row=4, hidden_dropout_prob=0.1)).save_pretrained("base")
    word_tokenizer().save_pretrained("base")
    generator = random.Random(0)

    def words(count):
        return " ".join(f"w{generator.randrange(10, 90)}" for _ in range(count))

    names = ("entailment", "neutral", "contradiction")
    for file, rows in (("train.jsonl", 30), ("dev_matched.jsonl", 7), ("dev_mismatched.jsonl", 8)):
        lines = [
            {"sentence1": words(5 + row), "sentence2": words(4), "gold_label": names[row % 3]}
            for row in range(rows)
        ]
        write_json_lines(file, lines)
    for file, rows in (("train.json", 16), ("dev.json", 5)):
        questions = []
        for row in range(rows):
            candidates = [f"w{number}" for number in generator.sample(range(10, 90), 2 + row % 3)]
            questions.append(
                {
                    "id": f"{file}-{row}",
                    "query": f"next {words(1)}",
                    "answer": generator.choice(candidates),
                    "candidates": candidates,
                    "supports": [words(20 + row) for _ in range(6)],
                }
            )
        (tmp_path / file).write_text(json.dumps(questions, indent=1))
    return tmp_path


DATA = {
    "mnli": {"train_file": ["train.jsonl"], "max_seq_length": 64}
    | {"validation_file": ["dev_matched.jsonl", "dev_mismatched.jsonl"]},
    "wikihop": {"train_file": "train.json", "validation_file": "dev.json", "max_seq_length": 100},
}
#: Changes that evaluate what another run has trained.
EVALUATED = {"model_name_or_path": "run", "do_train": False, "eval_strategy": "no"}


def command(task, *arguments, **changes) -> list[str]:
    """The command that runs a task with these changes of its settings."""
    Path("run.yaml").write_text(yaml.safe_dump(COMMON | DATA[task] | changes))
    return [f"run-{task}", "run.yaml", *arguments]


def run(task, *arguments, output_dir="run", **changes) -> dict:
    """Run it; return its results."""
    assert main(command(task, *arguments, output_dir=output_dir, **changes)) == 0
    return read_json(f"{output_dir}/results.json")


def curve() -> list[dict]:
    return read_csv("run/training_curve.csv")


def test_pairs_are_classified_and_scored_by_set(capsys, real_pictures):
    results = run("mnli")
    printed = capsys.readouterr().out
    assert "eval_mismatched_accuracy" in printed and "confusion matrix, matched" in printed
    assert results["labels"] == ["entailment", "neutral", "contradiction"]
    assert results["train"]["steps"] == 6 and results["seed"] == 42
    for name, rows in (("matched", 7), ("mismatched", 8)):
        counts = results["confusion_matrix"][name]
        right = sum(counts[i][i] for i in range(3))
        assert sum(map(sum, counts)) == rows
        assert results["eval"][f"eval_{name}_accuracy"] == pytest.approx(right / rows)
        predicted = read_csv(f"run/predictions_{name}.csv")
        assert len(predicted) == rows
        assert sum(row["label"] == row["prediction"] for row in predicted) == right
    model = AutoModelForSequenceClassification.from_pretrained("run")
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert AutoTokenizer.from_pretrained("run").mask_token == "<mask>"
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= set(curve()[1])
    assert Path("run/training_curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "overrides", "first"),
    [
        ({}, None, 0),  # no bias
        ({"distance_bias_window": 2}, None, 1),
        ({"distance_bias_window": 2, "block_per_row": 2}, None, 0),  # no room for it
        ({"distance_bias_window": 2}, "initial_prior_first_n_blocks=0", 0),
        ({"distance_bias_window": 2}, "block_per_row=2", 0),
        ({"distance_bias_window": 2, "block_per_row": 2}, "block_per_row=4", 1),
    ],
)
def test_a_new_classifier_on_a_biased_model_gets_a_global_first_block(changes, overrides, first):
    config = mra_config(**({"block_per_row": 4} | changes))
    mra_hf.MraModel(config).save_pretrained("base")
    settings = {} if overrides is None else {"config_overrides": overrides}
    run("mnli", max_steps=2, **settings)
    config = AutoModelForSequenceClassification.from_pretrained("run").config
    assert config.initial_prior_first_n_blocks == first
    # A classifier that was trained keeps what it was trained with.
    run("mnli", output_dir="again", max_steps=2, model_name_or_path="run")
    config = AutoModelForSequenceClassification.from_pretrained("again").config
    assert config.initial_prior_first_n_blocks == first


def test_a_saved_classifier_is_evaluated_alone():
    first = run("mnli")
    second = run("mnli", output_dir="again", **EVALUATED)
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert first["data"]["eval_matched"] == second["data"]["eval_matched"]
    rows = Path("dev_matched.jsonl").read_text().splitlines()
    two = [row for row in rows if "contradiction" not in row]
    Path("two.jsonl").write_text("\n".join(two) + "\n")
    of_two = {"train_file": None, "validation_file": ["two.jsonl"]}
    results = run("mnli", output_dir="two", **EVALUATED, **of_two)
    assert results["labels"] == first["labels"], "the labels are those of the model"
    assert [sum(row) for row in results["confusion_matrix"]["two"]] == [3, 2, 0]
    assert main(command("mnli", do_train=False, output_dir="new")) == 2, "no head"


def test_rows_are_held_out_by_seed_and_single_texts_classified():
    single = {"validation_file": None, "text_columns": ["sentence1"], "max_steps": 2}
    results = run("mnli", held_out_rows=9, **single)
    assert results["data"]["train_rows"] == 21
    assert sum(map(sum, results["confusion_matrix"]["held_out"])) == 9
    other = run("mnli", output_dir="other", held_out_rows=9, held_out_seed=1, **single)
    assert results["data"]["train"] != other["data"]["train"]


def test_questions_are_answered_and_predictions_written(capsys):
    results = run("wikihop")
    assert "eval_accuracy" in capsys.readouterr().out
    assert results["lengths"]["train"]["in_several_pieces"] > 0
    predictions, dev = read_json("run/predictions.json"), read_json("dev.json")
    assert list(predictions) == [question["id"] for question in dev]
    right = sum(predictions[question["id"]] == question["answer"] for question in dev)
    assert results["eval"]["eval_accuracy"] == pytest.approx(right / 5)
    assert all(predictions[question["id"]] in question["candidates"] for question in dev)
    model = mra_hf.MraForCandidateChoice.from_pretrained("run")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained("run")) == 104
    assert model.config.initial_prior_first_n_blocks == 1, "what 4 blocks per row leave room for"


def test_priors_are_the_papers_where_the_budget_has_room():
    for blocks, first in ((8, 3), (16, 5)):
        run("wikihop", config_overrides=f"block_per_row={blocks}", output_dir="new", max_steps=1)
        config = mra_hf.MraConfig.from_pretrained("new")
        assert (config.block_per_row, config.initial_prior_first_n_blocks) == (blocks, first)
        shutil.rmtree("new")
    trained = run("wikihop", initial_prior_first_n_blocks=0, max_steps=1)
    assert mra_hf.MraConfig.from_pretrained("run").initial_prior_first_n_blocks == 0
    losses = [
        results["eval"]["eval_loss"]
        for results in (trained, run("wikihop", output_dir="alone", **EVALUATED))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "with the priors of its training"


def test_without_supports_is_the_control():
    results = run("wikihop", without_supports=True, max_steps=1)
    assert results["lengths"]["train"]["longest"] < 25


@pytest.mark.parametrize("task", DATA)
def test_a_resumed_run_has_the_curve_of_an_unbroken_one(task):
    steps = {"save_steps": 3, "max_steps": 12, "eval_steps": 3}
    steps["train_sampling_strategy"] = "group_by_length"
    run(task, **steps)
    before = curve()
    assert len(before) == 12 and float(before[-1]["epoch"]) > 1
    for step in (12, 9, 6):  # as if it had been killed after step 3, or in the next epoch
        shutil.rmtree(f"run/checkpoint-{step}")
    Path("run/results.json").unlink()
    results = run(task, "--resume_from_checkpoint", "true", **steps)
    assert curve() == before
    assert results["train"]["resumed_from"] == "checkpoint-3"


def test_the_best_model_is_kept_and_training_stops_early():
    best = {"load_best_model_at_end": True, "greater_is_better": True, "early_stopping_patience": 1}
    best |= {"metric_for_best_model": "eval_matched_accuracy", "max_steps": 40}
    results = run("mnli", learning_rate=1e-9, **best)  # nothing gets better
    assert results["train"]["steps"] == 4
    assert read_json("run/trainer_state.json")["best_global_step"] == 2


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("mnli", {"model_name_or_path": None}, "no model to start from"),
        ("mnli", {"train_file": None}, "no rows to train on"),
        ("mnli", {"validation_file": None}, "no rows to evaluate on"),
        ("mnli", {"dataset_name": "glue"}, "both given"),
        ("mnli", {"held_out_rows": 3}, "drop validation_file"),
        ("mnli", {"held_out_rows": 30, "validation_file": None}, "leave rows to train on"),
        ("mnli", {"text_columns": ["a", "b", "c"]}, "one column or two, got 3"),
        ("mnli", {"text_columns": ["premise"]}, "train.jsonl, line 1 has no column for 'premise'"),
        ("mnli", {"max_seq_length": 500}, "max_seq_length must be at most 256"),
        ("mnli", {"labels": ["entailment", "neutral"]}, "train.jsonl, line 3: label"),
        ("mnli", {"early_stopping_patience": 2}, "needs --load_best_model_at_end"),
        ("mnli", {"validation_file": ["dev_matched.jsonl"] * 2}, "called differently"),
        ("mnli", {"report_to": "tensorboard"}, "tensorboard"),
        (
            "mnli",
            {"dataset_name": "glue", "validation_split": ["a", "a"], "do_train": False}
            | {"validation_file": None, "train_file": None},
            "validation_split must name sets that are called differently",
        ),
        ("wikihop", {"model_name_or_path": None}, "no model to start from"),
        ("wikihop", {"train_file": None}, "no questions to read; pass --train_file"),
        ("wikihop", {"validation_file": None}, "no questions to read; pass --validation_file"),
        ("wikihop", {"max_seq_length": 20}, "leave room for the supports"),
        ("wikihop", {"max_seq_length": 300}, "max_seq_length must be at most 256"),
        ("wikihop", {"initial_prior_first_n_blocks": 9}, "block_per_row"),
        ("wikihop", {"max_train_samples": 0}, "max_train_samples"),
        ("mnli", {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        (
            "mnli",
            {"eval_strategy": "epoch", "metric_for_best_model": "eval_right"},
            "metric_for_best_model must be one of ['",
        ),
        (
            "wikihop",
            {"eval_strategy": "epoch", "metric_for_best_model": "eval_matched_accuracy"},
            "metric_for_best_model must be one of ['",
        ),
        ("mnli", {"max_steps": 2.5}, "run.yaml: max_steps must be of type int, got 2.5"),
        ("mnli", {"seed": None}, "run.yaml: seed must be set, got None"),
        ("mnli", {"max_seq_length": "64x"}, "max_seq_length must be of type int, got '64x'"),
        ("mnli", {"learning_rate": "fast"}, "learning_rate must be of type float, got 'fast'"),
        ("mnli", {"eval_strategy": "daily"}, "run.yaml: eval_strategy must be one of"),
        ("mnli", {"do_train": "perhaps"}, "run.yaml: do_train must be of type"),
    ],
)
def test_bad_settings_are_one_sentence(folder, refused, monkeypatch, task, change, message):
    if "report_to" in change:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(*command(task, **change))
    assert message in error and error.count("\n") == 1
    assert not list(folder.glob("run/*"))


def test_a_faulty_row_stops_a_run_before_it_begins(refused):
    lines = Path("train.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("neutral", "neutrall")
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    assert "train.jsonl, line 5: label 'neutrall'" in refused(*command("mnli"))
    text = Path("dev.json").read_text()
    Path("dev.json").write_text(text[: len(text) // 2])
    assert "dev.json, line" in refused(*command("wikihop"))


def test_rows_left_out_are_counted_in_the_results():
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    lines[4]["sentence2"], lines[5]["gold_label"] = " ", ""
    write_json_lines("train.jsonl", lines)
    results = run("mnli", skip_faulty_rows=True, max_steps=1)
    assert (results["rows_without_text"], results["rows_without_label"]) == (1, 1)
    assert results["data"]["train_rows"] == 28


def test_token_types_are_left_out_where_the_model_has_one():
    """BERT's tokenizer on a RoBERTa, as KLUE-RoBERTa comes; converted or not."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(5, 100))]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    assert max(tokenizer("w5", "w6")["token_type_ids"]) == 1
    tokenizer.save_pretrained("base")
    run("mnli", max_steps=1)
    saved = AutoTokenizer.from_pretrained("run")
    assert set(saved("w5", "w6")) == {"input_ids", "attention_mask"}


def test_token_types_beyond_the_models_are_refused():
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert not leave_out_token_types(tokenizer, 1), "all of one type"
    assert "token_type_ids" in tokenizer.model_input_names
    with pytest.raises(ValueError, match=r"token types up to 2, but type_vocab_size .* is 2"):
        leave_out_token_types(lambda *texts: {"token_type_ids": [0, 2]}, 2)


def test_another_type_of_checkpoint_is_refused_with_the_way_out(refused):
    RobertaModel(roberta_config()).save_pretrained("dense")
    word_tokenizer().save_pretrained("dense")
    assert "mra-hf convert" in refused(*command("wikihop", model_name_or_path="dense"))


def test_metrics_are_read_from_the_package():
    accuracy = load_metric("accuracy").compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert accuracy == {"accuracy": 0.75}
    matrix = load_metric("confusion_matrix").compute(
        predictions=[0, 1, 2, 2], references=[0, 1, 1, 2], n_classes=3
    )
    assert matrix["confusion_matrix"] == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["run_classification", "run_mnli", "run_wikihop"])
def test_scripts_are_the_commands(name):
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    assert f'run_command("{name.replace("_", "-")}")' in script.read_text()


def test_two_runs_are_compared_on_the_same_examples(capsys, refused):
    run("mnli", max_steps=1)
    run("mnli", max_steps=1, output_dir="other", seed=1)
    said = capsys.readouterr().out
    assert "written to other: the model, results.json, experiment.yaml" in said
    assert "predictions_matched.csv, predictions_mismatched.csv" in said
    assert re.search(r"train_runtime +[\d.]+ s\n", said)
    assert main(["compare", "run", "other"]) == 0
    *printed, meaning = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["set", "matched", "mismatched"]
    assert "the first minus the second, in percentage points" in meaning
    rows = Path("other/predictions_matched.csv").read_text().splitlines()
    Path("other/predictions_matched.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert "other examples" in refused("compare", "run", "other")
    assert "predictions_SET.csv of the same set" in refused("compare", "run", "base")


@pytest.mark.parametrize("task", DATA)
def test_predictions_stand_beside_their_examples_when_lengths_are_grouped(task):
    run(task, max_steps=2)
    predictions = []
    for strategy in ("random", "group_by_length"):
        grouped = {"train_sampling_strategy": strategy, "per_device_eval_batch_size": 2}
        run(task, output_dir=strategy, **EVALUATED, **grouped)
        files = sorted(Path(strategy).glob("predictions*"))
        predictions.append([(file.name, file.read_bytes()) for file in files])
    assert predictions[0] and predictions[0] == predictions[1]


def test_an_evaluation_alone_takes_the_rows_of_the_run_it_belongs_to():
    sample = {"max_train_samples": 6, "max_eval_samples": 3}
    first = run("mnli", **sample)["data"]
    second = run("mnli", output_dir="alone", **sample, **EVALUATED)["data"]
    evaluated = {name for name in first if name.startswith("eval")}
    assert evaluated and all(first[name] == second[name] for name in evaluated)


def test_fields_that_no_one_reads_may_hold_anything():
    questions = read_json("train.json")
    for number, question in enumerate(questions):
        question["year"] = number if number % 2 else "unknown"
    Path("train.json").write_text(json.dumps(questions))
    run("wikihop", max_steps=1)


def test_one_file_need_not_be_a_list():
    one = {"train_file": "train.jsonl", "validation_file": "dev_matched.jsonl"}
    assert run("mnli", max_steps=1, **one)["rows_without_label"] == 0


def test_a_run_that_fails_says_how_to_repeat_it(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.ChoiceTrainer, "train", interrupted)
    assert main(command("mnli")) == 130
    written = yaml.safe_load(Path("run/experiment.yaml").read_text())
    assert written["learning_rate"] == COMMON["learning_rate"]
    assert written["train_file"] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["Pos", "pos", "neg"], [], "differ in more than their case"),
        (["pos", "pos", "pos"], [], "two labels or more"),
        (["a", "b", "a"], ["--labels", "a", "b", "a"], "differ in more than their case"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(refused, labels, arguments, message):
    rows = [{"text": f"w{10 + row}", "label": label} for row, label in enumerate(labels * 3)]
    write_json_lines("some.jsonl", rows)
    some = {"train_file": "some.jsonl", "validation_file": "some.jsonl"}
    assert message in refused(*command("mnli", *arguments, **some))


def test_the_labels_of_a_checkpoint_are_not_renamed(refused):
    run("mnli", max_steps=1)
    other = ["--labels", "contradiction", "neutral", "entailment"]
    alone = command("mnli", *other, output_dir="alone", **EVALUATED)
    assert "labels must be those of the checkpoint" in refused(*alone)
    write_json_lines("one.jsonl", [{"text": "w10", "label": "neutral"}])
    new = command("mnli", validation_file="one.jsonl", output_dir="new")
    assert "pairs of texts" in refused(*new)
