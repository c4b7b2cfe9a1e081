"""`mra-hf run-mnli` and `run-wikihop`: data in, results out; going on after a stop."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mra_hf
from mra_hf.commands import main
from mra_hf.evaluation.metrics import load_metric
from mra_hf.training import runs
from tiny_models import mra_config, word_tokenizer

COMMON = {
    "model_name_or_path": "base",
    "do_train": True,
    "do_eval": True,
    "output_dir": "run",
    "max_steps": 6,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "use_cpu": True,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny encoder with its tokenizer, sentence pairs, and questions over supports."""
    monkeypatch.chdir(tmp_path)
    mra_hf.MraModel(mra_config(block_per_row=4, hidden_dropout_prob=0.1)).save_pretrained("base")
    word_tokenizer().save_pretrained("base")
    generator = random.Random(0)

    def words(count):
        return " ".join(f"w{generator.randrange(10, 90)}" for _ in range(count))

    names = ("entailment", "neutral", "contradiction")
    for file, rows in (("train.jsonl", 30), ("dev_matched.jsonl", 7), ("dev_mismatched.jsonl", 8)):
        lines = []
        for row in range(rows):
            label = names[row % 3]
            lines.append({"sentence1": words(5 + row), "sentence2": words(4), "gold_label": label})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / file).write_text(text)
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


def settings(folder, **changes) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(COMMON | changes))
    return "run.yaml"


def pairs(folder, **changes) -> str:
    files = {"train_file": ["train.jsonl"], "max_seq_length": 64}
    files["validation_file"] = ["dev_matched.jsonl", "dev_mismatched.jsonl"]
    return settings(folder, **(files | changes))


def questions(folder, **changes) -> str:
    files = {"train_file": "train.json", "validation_file": "dev.json", "max_seq_length": 100}
    return settings(folder, **(files | changes))


def results_of(folder, name="run") -> dict:
    return json.loads((folder / name / "results.json").read_text())


def curve(folder, name="run") -> list[dict]:
    with (folder / name / "training_curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_pairs_are_classified_and_scored_by_set(folder, capsys, real_pictures):
    assert main(["run-mnli", pairs(folder)]) == 0
    printed = capsys.readouterr().out
    assert "eval_mismatched_accuracy" in printed and "confusion matrix, matched" in printed
    results = results_of(folder)
    assert results["labels"] == ["entailment", "neutral", "contradiction"]
    assert results["train"]["steps"] == 6 and results["seed"] == 42
    for name, rows in (("matched", 7), ("mismatched", 8)):
        counts = results["confusion_matrix"][name]
        right = sum(counts[i][i] for i in range(3))
        assert sum(map(sum, counts)) == rows
        assert results["eval"][f"eval_{name}_accuracy"] == pytest.approx(right / rows)
        with (folder / "run" / f"predictions_{name}.csv").open() as file:
            predicted = list(csv.DictReader(file))
        assert len(predicted) == rows
        assert sum(row["label"] == row["prediction"] for row in predicted) == right
    model = AutoModelForSequenceClassification.from_pretrained("run")
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert AutoTokenizer.from_pretrained("run").mask_token == "<mask>"
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= set(curve(folder)[1])
    assert (folder / "run" / "training_curve.png").stat().st_size > 10_000


def test_a_saved_classifier_is_evaluated_alone(folder):
    assert main(["run-mnli", pairs(folder)]) == 0
    alone = pairs(folder, model_name_or_path="run", do_train=False, eval_strategy="no")
    assert main(["run-mnli", alone, "--output_dir", "again"]) == 0
    first, second = results_of(folder), results_of(folder, "again")
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert first["data"]["eval_matched"] == second["data"]["eval_matched"]
    rows = (folder / "dev_matched.jsonl").read_text().splitlines()
    two = [row for row in rows if "contradiction" not in row]
    (folder / "two.jsonl").write_text("\n".join(two) + "\n")
    of_two = {"train_file": None, "validation_file": ["two.jsonl"], "output_dir": "two"}
    alone = pairs(folder, model_name_or_path="run", do_train=False, eval_strategy="no", **of_two)
    assert main(["run-mnli", alone]) == 0
    results = results_of(folder, "two")
    assert results["labels"] == first["labels"], "the labels are those of the model"
    assert [sum(row) for row in results["confusion_matrix"]["two"]] == [3, 2, 0]
    assert main(["run-mnli", pairs(folder, do_train=False, output_dir="new")]) == 2, "no head"


def test_rows_are_held_out_by_seed_and_single_texts_classified(folder):
    single = pairs(
        folder, validation_file=None, held_out_rows=9, text_columns=["sentence1"], max_steps=2
    )
    assert main(["run-mnli", single]) == 0
    results = results_of(folder)
    assert results["data"]["train_rows"] == 21
    assert sum(map(sum, results["confusion_matrix"]["held_out"])) == 9
    assert main(["run-mnli", single, "--output_dir", "other", "--held_out_seed", "1"]) == 0
    assert results["data"]["train"] != results_of(folder, "other")["data"]["train"]


def test_questions_are_answered_and_predictions_written(folder, capsys):
    assert main(["run-wikihop", questions(folder)]) == 0
    assert "eval_accuracy" in capsys.readouterr().out
    results = results_of(folder)
    assert results["lengths"]["train"]["in_several_pieces"] > 0
    predictions = json.loads((folder / "run" / "predictions.json").read_text())
    dev = json.loads((folder / "dev.json").read_text())
    assert list(predictions) == [question["id"] for question in dev]
    right = sum(predictions[question["id"]] == question["answer"] for question in dev)
    assert results["eval"]["eval_accuracy"] == pytest.approx(right / 5)
    assert all(predictions[question["id"]] in question["candidates"] for question in dev)
    model = mra_hf.MraForCandidateChoice.from_pretrained("run")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained("run")) == 104
    assert model.config.initial_prior_first_n_blocks == 1, "what 4 blocks per row leave room for"


def test_priors_are_the_papers_where_the_budget_has_room(folder):
    for block_per_row, first in ((8, 3), (16, 5)):
        name = f"run{block_per_row}"
        overrides = f"block_per_row={block_per_row}"
        run = questions(folder, config_overrides=overrides, output_dir=name, max_steps=1)
        assert main(["run-wikihop", run]) == 0
        config = mra_hf.MraConfig.from_pretrained(name)
        assert (config.block_per_row, config.initial_prior_first_n_blocks) == (block_per_row, first)
    given = questions(folder, initial_prior_first_n_blocks=0, output_dir="none", max_steps=1)
    assert main(["run-wikihop", given]) == 0
    assert mra_hf.MraConfig.from_pretrained("none").initial_prior_first_n_blocks == 0
    alone = {"model_name_or_path": "none", "do_train": False, "eval_strategy": "no"}
    assert main(["run-wikihop", questions(folder, output_dir="alone", **alone)]) == 0
    evaluated = [results_of(folder, name)["eval"]["eval_loss"] for name in ("none", "alone")]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5), "with the priors of its training"


def test_without_supports_is_the_control(folder):
    assert main(["run-wikihop", questions(folder, without_supports=True, max_steps=1)]) == 0
    assert results_of(folder)["lengths"]["train"]["longest"] < 25


@pytest.mark.parametrize("task", ["mnli", "wikihop"])
def test_a_resumed_run_has_the_curve_of_an_unbroken_one(folder, task):
    run = (pairs if task == "mnli" else questions)(
        folder, train_sampling_strategy="group_by_length", save_steps=3, max_steps=12, eval_steps=3
    )
    assert main([f"run-{task}", run]) == 0
    before = curve(folder)
    assert len(before) == 12 and float(before[-1]["epoch"]) > 1
    for step in (12, 9, 6):  # as if it had been killed after step 3, or in the next epoch
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")
    (folder / "run" / "results.json").unlink()
    assert main([f"run-{task}", run, "--resume_from_checkpoint", "true"]) == 0
    assert curve(folder) == before
    assert results_of(folder)["train"]["resumed_from"] == "checkpoint-3"


def test_the_best_model_is_kept_and_training_stops_early(folder):
    run = pairs(
        folder,
        load_best_model_at_end=True,
        metric_for_best_model="eval_matched_accuracy",
        greater_is_better=True,
        early_stopping_patience=1,
        max_steps=40,
        learning_rate=1e-9,  # nothing gets better
    )
    assert main(["run-mnli", run]) == 0
    assert results_of(folder)["train"]["steps"] == 4
    state = json.loads((folder / "run" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2


@pytest.mark.parametrize(
    ("command", "change", "message"),
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
    ],
)
def test_bad_settings_are_one_sentence(folder, capsys, monkeypatch, command, change, message):
    if "report_to" in change:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = (pairs if command == "mnli" else questions)(folder, **change)
    assert main([f"run-{command}", run]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "run").exists() or not list((folder / "run").iterdir())


def test_a_faulty_row_stops_a_run_before_it_begins(folder, capsys):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("neutral", "neutrall")
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["run-mnli", pairs(folder)]) == 2
    assert "train.jsonl, line 5: label 'neutrall'" in capsys.readouterr().err
    text = (folder / "dev.json").read_text()
    (folder / "dev.json").write_text(text[: len(text) // 2])
    assert main(["run-wikihop", questions(folder)]) == 2
    assert "dev.json, line" in capsys.readouterr().err


def test_another_type_of_checkpoint_is_refused_with_the_way_out(folder, capsys):
    from transformers import RobertaModel

    from tiny_models import roberta_config

    RobertaModel(roberta_config()).save_pretrained("dense")
    word_tokenizer().save_pretrained("dense")
    assert main(["run-wikihop", questions(folder, model_name_or_path="dense")]) == 2
    assert "mra-hf convert" in capsys.readouterr().err


def test_metrics_are_read_from_the_package():
    accuracy = load_metric("accuracy").compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert accuracy == {"accuracy": 0.75}
    matrix = load_metric("confusion_matrix").compute(
        predictions=[0, 1, 2, 2], references=[0, 1, 1, 2], n_classes=3
    )
    assert matrix["confusion_matrix"] == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["run_mnli", "run_wikihop"])
def test_scripts_are_the_commands(name):
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    assert f'run_command("{name.replace("_", "-")}")' in script.read_text()


def test_two_runs_are_compared_on_the_same_examples(folder, capsys):
    assert main(["run-mnli", pairs(folder, max_steps=1)]) == 0
    assert main(["run-mnli", pairs(folder, max_steps=1, output_dir="other", seed=1)]) == 0
    capsys.readouterr()
    assert main(["compare", "run", "other"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["set", "matched", "mismatched"]
    rows = (folder / "other" / "predictions_matched.csv").read_text().splitlines()
    (folder / "other" / "predictions_matched.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert main(["compare", "run", "other"]) == 2
    assert "other examples" in capsys.readouterr().err
    assert main(["compare", "run", "base"]) == 2
    assert "predictions_SET.csv of the same set" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["pairs", "questions"])
def test_predictions_stand_beside_their_examples_when_lengths_are_grouped(folder, task):
    command = "run-mnli" if task == "pairs" else "run-wikihop"
    make = pairs if task == "pairs" else questions
    assert main([command, make(folder, output_dir="trained")]) == 0
    names = {}
    for strategy in ("random", "group_by_length"):
        again = make(
            folder,
            model_name_or_path="trained",
            do_train=False,
            eval_strategy="no",
            train_sampling_strategy=strategy,
            per_device_eval_batch_size=2,
            output_dir=strategy,
        )
        assert main([command, again]) == 0
        files = sorted((folder / strategy).glob("predictions*"))
        names[strategy] = [(file.name, file.read_bytes()) for file in files]
    assert names["random"] and names["random"] == names["group_by_length"]


@pytest.mark.parametrize(
    ("command", "given", "allowed"),
    [("run-mnli", "eval_right", "accuracy"), ("run-wikihop", "eval_matched_accuracy", "accuracy")],
)
def test_a_metric_that_no_evaluation_gives_is_refused_at_once(
    folder, capsys, command, given, allowed
):
    make = pairs if command == "run-mnli" else questions
    file = make(folder, eval_strategy="epoch", metric_for_best_model=given)
    assert main([command, file]) == 2
    error = capsys.readouterr().err
    assert "metric_for_best_model must be one of ['" in error and allowed in error
    assert not list(folder.glob("run/checkpoint-*"))


def test_an_evaluation_alone_takes_the_rows_of_the_run_it_belongs_to(folder):
    sample = {"max_train_samples": 6, "max_eval_samples": 3}
    assert main(["run-mnli", pairs(folder, **sample)]) == 0
    alone = pairs(
        folder,
        **sample,
        model_name_or_path="run",
        do_train=False,
        eval_strategy="no",
        output_dir="alone",
    )
    assert main(["run-mnli", alone]) == 0
    first, second = (results_of(folder, name)["data"] for name in ("run", "alone"))
    evaluated = {name for name in first if name.startswith("eval")}
    assert evaluated and all(first[name] == second[name] for name in evaluated)


def test_fields_that_no_one_reads_may_hold_anything(folder):
    questions_of = json.loads((folder / "train.json").read_text())
    for number, question in enumerate(questions_of):
        question["year"] = number if number % 2 else "unknown"
    (folder / "train.json").write_text(json.dumps(questions_of))
    assert main(["run-wikihop", questions(folder, max_steps=1)]) == 0


def test_one_file_need_not_be_a_list_and_smoothing_is_refused(folder, capsys):
    one = pairs(folder, train_file="train.jsonl", validation_file="dev_matched.jsonl", max_steps=1)
    assert main(["run-mnli", one]) == 0
    assert results_of(folder)["rows_without_label"] == 0
    assert main(["run-mnli", one, "--label_smoothing_factor", "0.1"]) == 2
    assert "label_smoothing_factor must be 0, got 0.1" in capsys.readouterr().err


def test_a_run_that_fails_says_how_to_repeat_it(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.ChoiceTrainer, "train", interrupted)
    assert main(["run-mnli", pairs(folder)]) == 130
    written = yaml.safe_load((folder / "run" / "experiment.yaml").read_text())
    assert written["learning_rate"] == COMMON["learning_rate"]
    assert written["train_file"] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 2.5}, "run.yaml: max_steps must be of type int, got 2.5"),
        ({"seed": None}, "run.yaml: seed must be set, got None"),
        ({"max_seq_length": "64x"}, "run.yaml: max_seq_length must be of type int, got '64x'"),
        ({"learning_rate": "fast"}, "run.yaml: learning_rate must be of type float, got 'fast'"),
        ({"eval_strategy": "daily"}, "run.yaml: eval_strategy must be one of"),
        ({"do_train": "perhaps"}, "run.yaml: do_train must be of type"),
    ],
)
def test_values_of_a_wrong_type_are_one_sentence(folder, capsys, changes, message):
    assert main(["run-mnli", pairs(folder, **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["Pos", "pos", "neg"], [], "differ in more than their case"),
        (["pos", "pos", "pos"], [], "two labels or more"),
        (["a", "b", "a"], ["--labels", "a", "b", "a"], "differ in more than their case"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(folder, capsys, labels, arguments, message):
    rows = [{"text": f"w{10 + row}", "label": label} for row, label in enumerate(labels * 3)]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = pairs(folder, train_file="some.jsonl", validation_file="some.jsonl")
    assert main(["run-mnli", run, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_labels_of_a_checkpoint_are_not_renamed(folder, capsys):
    assert main(["run-mnli", pairs(folder, max_steps=1)]) == 0
    alone = pairs(folder, do_train=False, model_name_or_path="run", output_dir="alone")
    other = ["--labels", "contradiction", "neutral", "entailment"]
    assert main(["run-mnli", alone, *other]) == 2
    assert "labels must be those of the checkpoint" in capsys.readouterr().err
    (folder / "one.jsonl").write_text('{"text": "w10", "label": "neutral"}\n')
    assert main(["run-mnli", pairs(folder, validation_file="one.jsonl", output_dir="new")]) == 2
    assert "pairs of texts" in capsys.readouterr().err
