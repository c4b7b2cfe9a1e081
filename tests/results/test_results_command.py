"""`mra-hf results`: run directories as tables and pictures, seeds together, the paper beside."""

import csv
import json
import math
import random
import shutil

import pytest
import yaml

from mra_hf.commands import main
from mra_hf.results.files import write_history
from mra_hf.results.paper import PAPER_ROWS
from mra_hf.results.runs import T_QUANTILES, find_runs, mean_interval
from tiny_models import word_tokenizer

pytestmark = pytest.mark.usefixtures("empty_pictures")

CONDITIONS = {
    **{"task": "wikihop", "attention": "mra2", "approx_mode": "full", "block_per_row": 8},
    **{"parameters": 125_000_000, "max_seq_length": 4096, "seed": 0},
    **{"device": "cpu", "dtype": "bf16", "commit": "1234567"},
}


def write_run(folder, evaluation, settings=None, train=None, history=True, **conditions):
    """A run directory as `Experiment.fit` leaves it; `evaluation` None: the run was cut off."""
    folder.mkdir(parents=True)
    results = CONDITIONS | conditions
    given = {"model_name_or_path": "checkpoints/some-base", "seed": results["seed"]}
    given |= {"output_dir": str(folder), "max_seq_length": results["max_seq_length"]}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(given | (settings or {})))
    results["train"] = {"train_runtime": 50.0, "steps": 100} | (train or {})
    if evaluation is not None:
        results["eval"] = {f"eval_{name}": value for name, value in evaluation.items()}
    (folder / "results.json").write_text(json.dumps(results))
    if history:
        names = evaluation or {"accuracy": 0.2}
        log = [
            {"step": step, "loss": 2.0 - 0.01 * step, "epoch": 0.1} for step in range(10, 101, 10)
        ]
        log.append({"step": 50} | {f"eval_{name}": 0.1 for name in names})
        log.append({"step": 100} | {f"eval_{name}": value for name, value in names.items()})
        write_history(log, folder / "training_curve.csv")
    return folder


def table_rows(text, heading):
    """The cells of the table under a heading, a dict per line."""
    lines = text.split(f"# {heading}\n")[1].split("\n# ")[0].splitlines()
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    )
    return [dict(zip(columns, row, strict=True)) for row in rows]


def results_of(tmp_path, *arguments):
    """Run the command; return what it wrote as Markdown."""
    assert main(["results", *map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "results.md").read_text()


def test_a_line_per_run_in_markdown_and_csv(tmp_path, capsys, real_pictures):
    write_run(tmp_path / "runs" / "hop", {"accuracy": 0.305, "runtime": 1.0})
    write_run(
        tmp_path / "runs" / "nli",
        {"matched_accuracy": 0.8712, "mismatched_accuracy": 0.8733, "matched_runtime": 2.0},
        task="classification",
    )
    scratch = {"model_name_or_path": None, "model_type": "roberta"}
    mlm = {"accuracy": 0.25, "nll": 3.5, "bits_per_token": 5.049, "masked_tokens": 100}
    write_run(tmp_path / "runs" / "deep" / "mlm", mlm, scratch, task="masked-lm")
    text = results_of(tmp_path, tmp_path / "runs")
    assert text in capsys.readouterr().out
    rows = {row["run"]: row for row in table_rows(text, "Runs")}
    assert set(rows) == {"hop", "nli", "deep/mlm"}
    assert rows["hop"]["model"] == "some-base" and rows["deep/mlm"]["model"] == "new roberta"
    assert rows["hop"]["result"] == "accuracy 30.5 %"
    assert rows["nli"]["result"] == "matched 87.1 %, mismatched 87.3 %"
    assert rows["deep/mlm"]["result"] == "accuracy 25.0 %, nll 3.500, bits 5.049"
    assert (rows["hop"]["training s"], rows["hop"]["s per step"]) == ("50", "0.5")
    assert "Several seeds" not in text and "paper" not in text
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = {row["run"]: row for row in csv.DictReader(file)}
    assert lines["nli"]["eval_mismatched_accuracy"] == "0.8733" and lines["nli"]["steps"] == "100"
    assert lines["deep/mlm"]["eval_nll"] == "3.5" and lines["hop"]["eval_nll"] == ""
    assert not any(name.endswith("runtime") for name in lines["hop"])
    for task in ("wikihop", "classification", "masked-lm"):
        assert (tmp_path / "out" / f"curves_{task}.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out").iterdir())) == 5, "nothing partial is left"


def test_time_per_step_is_over_the_steps_since_a_resumed_checkpoint(tmp_path):
    write_run(tmp_path / "run", {"accuracy": 0.3}, train={"resumed_from": "checkpoint-75"})
    (row,) = table_rows(results_of(tmp_path, tmp_path / "run"), "Runs")
    assert (row["training s"], row["s per step"]) == ("50 since checkpoint-75", "2")


def test_runs_that_differ_in_seed_alone_are_put_together(tmp_path):
    accuracies = (0.50, 0.52, 0.57)
    for seed, accuracy in enumerate(accuracies):
        write_run(tmp_path / "runs" / f"seed{seed}", {"accuracy": accuracy}, seed=seed)
    write_run(tmp_path / "runs" / "rate", {"accuracy": 0.9}, {"learning_rate": 1e-3}, seed=3)
    write_run(tmp_path / "runs" / "cut", None, seed=4)
    (row,) = table_rows(results_of(tmp_path, tmp_path / "runs"), "Several seeds")
    assert (row["n"], row["seeds"], row["runs"]) == ("3", "0, 1, 2", "seed0, seed1, seed2")
    mean = sum(accuracies) / 3
    deviation = math.sqrt(sum((one - mean) ** 2 for one in accuracies) / 2)
    half = 4.303 * deviation / math.sqrt(3)
    assert row["result"] == f"accuracy {100 * mean:.1f} ± {100 * half:.1f} %"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 0}, "a seed twice"),
        ({"seed": 1, "commit": "7654321"}, "another commit"),
        ({"seed": 1, "data": {"eval": "abc"}}, "another evaluation data"),
    ],
)
def test_runs_that_only_look_alike_stay_single(changes, words, tmp_path):
    write_run(tmp_path / "runs" / "a", {"accuracy": 0.5})
    write_run(tmp_path / "runs" / "b", {"accuracy": 0.6}, **changes)
    text = results_of(tmp_path, tmp_path / "runs")
    assert f"a, b: {'a seed' if changes['seed'] == 0 else 'the same settings'}" in text
    assert words in text and "±" not in text


def test_the_interval_is_that_of_student():
    two = mean_interval([1.0, 3.0])
    assert two == (2.0, pytest.approx(12.706, abs=1e-3))
    assert len(T_QUANTILES) == 30 and list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)
    many = mean_interval([0.0, 1.0] * 50)
    assert many[1] == pytest.approx(2.042 * math.sqrt(0.25 / 99), rel=1e-3)


def test_unfinished_runs_are_listed(tmp_path):
    write_run(tmp_path / "runs" / "whole", {"accuracy": 0.5})
    write_run(tmp_path / "runs" / "trained", None)
    write_run(tmp_path / "runs" / "configured", None, history=False)
    (tmp_path / "runs" / "configured" / "results.json").unlink()
    for step in (50, 200, 1000):
        checkpoint = tmp_path / "runs" / "going" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
    text = results_of(tmp_path, tmp_path / "runs")
    rows = {row["run"]: row["result"] for row in table_rows(text, "Runs")}
    assert rows == {
        "whole": "accuracy 50.0 %",
        "trained": "unfinished: not evaluated",
        "configured": "unfinished: running or stopped, no checkpoint",
        "going": "unfinished: running or stopped, last checkpoint at step 1000",
    }
    with (tmp_path / "out" / "results.csv").open() as file:
        status = {row["run"]: row["status"] for row in csv.DictReader(file)}
    assert status["whole"] == "finished" and status["trained"] == "not evaluated"


def test_a_run_is_read_once_and_equal_names_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x/run", "y/run", "z"):
        write_run(tmp_path / folder, {"accuracy": 0.5})
    found = find_runs(["x", "y", "x/run", "z", "."])
    assert [run.name for run in found] == ["x/run", "y/run", "z"]
    (one,) = find_runs(["x/run"])
    assert one.name == "run"
    monkeypatch.chdir("x/run")
    assert [run.name for run in find_runs(["."])] == ["run"]


def test_runs_with_and_without_curves_and_of_one_or_two_sets_share_a_picture(tmp_path):
    runs = tmp_path / "runs"
    for number in range(9):
        write_run(runs / f"with-a-rather-long-name-{number}", {"accuracy": 0.05 * number})
    write_run(runs / "two", {"a_accuracy": 0.3, "b_accuracy": 0.4})
    write_run(runs / "two-losses", {"loss": float("nan")})
    write_run(runs / "evaluated-alone", {"accuracy": 0.3}, history=False, task="masked-lm")
    results_of(tmp_path, runs)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"results.md", "results.csv", "curves_wikihop.png"}


def test_the_rows_of_the_paper_are_named_and_whole():
    assert len(PAPER_ROWS) == 15 + 10 + 10 + 10
    assert PAPER_ROWS["table1/base-512/mra2-4/mnli"].figures == (86.8, 87.1)
    assert PAPER_ROWS["table1/base-512/dense/mlm-before"].figures == (73.1,)
    assert PAPER_ROWS["table3/base-4096/mra2_s-16/wikihop"].figures == (74.1,)
    for row in PAPER_ROWS.values():
        assert len(row.figures) == len(row.metrics)
        assert all(figure is None or 50 < figure < 90 for figure in row.figures)


def test_only_runs_that_name_their_row_stand_beside_the_paper(tmp_path):
    name = "table3/base-4096/mra2-8/wikihop"
    write_run(tmp_path / "runs" / "stand-in", {"accuracy": 0.9})
    write_run(tmp_path / "runs" / "one", {"accuracy": 0.70}, {"paper_row": name})
    rows = table_rows(results_of(tmp_path, tmp_path / "runs", "--paper"), "The paper and our runs")
    by_name = {row["paper_row"]: row for row in rows}
    assert set(by_name) == set(PAPER_ROWS)
    row = by_name.pop(name)
    assert (row["paper"], row["ours"], row["runs"]) == ("71.2", "70.0", "one")
    assert {row["ours"] for row in by_name.values()} == {"not run"}
    assert by_name["table1/base-512/mra2-4/mnli"]["paper"] == "86.8 / 87.1"
    assert by_name["table2/small-512/mra2-4/mnli"]["paper"] == "73.2 / ?"


def test_seeds_of_a_row_of_the_paper_are_averaged(tmp_path):
    name = "table1/base-512/mra2_s-8/mnli"
    kind = {"task": "classification", "approx_mode": "sparse", "max_seq_length": 512}
    for seed, accuracy in enumerate((0.86, 0.88)):
        scores = {"matched_accuracy": accuracy, "mismatched_accuracy": accuracy + 0.01}
        write_run(tmp_path / "runs" / f"s{seed}", scores, paper_row=name, seed=seed, **kind)
    write_run(tmp_path / "runs" / "cut", None, paper_row=name, seed=2, **kind)
    rows = table_rows(results_of(tmp_path, tmp_path / "runs", "--paper"), "The paper and our runs")
    (row,) = (row for row in rows if row["paper_row"] == name)
    assert row["ours"] == "87.0 ± 12.7 / 88.0 ± 12.7 (n = 2)" and row["runs"] == "s0, s1"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("table3/base-4096/mra2-9/wikihop", {}, "such are ['table3/base-4096/mra2-8/wikihop'"),
        ("table3/base-4096/mra2-16/wikihop", {}, "has block_per_row 16 and the run 8"),
        ("table3/base-4096/mra2_s-8/wikihop", {}, "has attention 'mra2_s' and the run 'mra2'"),
        ("table3/base-4096/mra2-8/mlm", {}, "has task 'masked-lm' and the run 'wikihop'"),
        ("table3/base-4096/mra2-8/wikihop", {"max_seq_length": 512}, "has max_seq_length 4096"),
        ("table3/base-4096/mra2-8/wikihop", {"parameters": 3_000_000}, "120 to 130 million"),
        ("table4/small-4096/mra2-8/wikihop", {}, "12 to 16 million"),
        ("table3/base-4096/mra2-8/wikihop", {"data": {"train_rows": 8000}}, "43000 or more"),
        (
            "table3/base-4096/mra2-8/wikihop",
            {"settings": {"max_eval_samples": 100}},
            "has max_eval_samples None and the run 100",
        ),
        (
            "table1/base-512/mra2-8/mlm-before",
            {"task": "masked-lm", "max_seq_length": 512},
            "has trained False",
        ),
        (
            "table1/base-512/mra2-8/mnli",
            {"task": "classification", "max_seq_length": 512},
            "needs eval_matched_accuracy and eval_mismatched_accuracy",
        ),
    ],
)
def test_a_run_that_names_a_row_it_does_not_repeat_is_refused(
    name, changes, words, tmp_path, refused
):
    write_run(tmp_path / "run", {"accuracy": 0.5}, paper_row=name, **changes)
    out = tmp_path / "out"
    message = refused("results", str(tmp_path / "run"), "--paper", "--out", str(out))
    assert words in message and str(tmp_path / "run" / "results.json") in message
    assert not out.exists(), "nothing is written"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("results.json", '{"task": "wiki', "cannot be read"),
        ("results.json", "[1, 2]", "must hold names and values"),
        ("results.json", '{"accuracy": 0.5}', 'names no "task"'),
        ("results.json", '{"task": "wikihop", "eval": 0.5}', "must be objects"),
        ("experiment.yaml", "seed: [", "cannot be read"),
        ("experiment.yaml", None, "no experiment.yaml"),
        ("training_curve.csv", "step,loss\n10,low\n", "is not the curve of a run"),
        ("training_curve.csv", "epoch,loss\n10,1.0\n", "a row has no step"),
    ],
)
def test_a_broken_file_is_named(file, content, words, tmp_path, refused):
    run = write_run(tmp_path / "run", {"accuracy": 0.5})
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    message = refused("results", str(run), "--out", str(tmp_path / "out"))
    assert words in message and str(run) in message
    assert file in message


def test_folders_without_runs_are_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for given, words in (("empty", "no run found"), ("file", "not a folder"), ("none", "none")):
        assert words in refused("results", str(tmp_path / given), "--out", str(tmp_path / "out"))
    write_run(tmp_path / "run", {"accuracy": 0.5})
    assert "must be a folder" in refused(
        "results", str(tmp_path / "run"), "--out", str(tmp_path / "file")
    )


def test_what_run_mlm_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    words = " ".join(f"w{generator.randrange(10, 90)}" for _ in range(600))
    (tmp_path / "text.txt").write_text(words + "\n")
    word_tokenizer().save_pretrained("tokenizer")
    sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
    settings = {
        **{"config_overrides": f"{sizes},max_position_embeddings=66", "max_seq_length": 64},
        **{"tokenizer_name": "tokenizer", "train_file": "text.txt", "validation_file": "text.txt"},
        **{"do_train": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1},
        **{"max_steps": 2, "save_steps": 1, "logging_steps": 1, "use_cpu": True},
    }
    (tmp_path / "mlm.yaml").write_text(yaml.safe_dump(settings))
    for seed in ("0", "1"):
        output = f"runs/seed{seed}"
        assert main(["run-mlm", "mlm.yaml", "--output_dir", output, "--seed", seed]) == 0
    shutil.copytree("runs/seed1", "runs/stopped")
    (tmp_path / "runs" / "stopped" / "results.json").unlink()
    text = results_of(tmp_path, "runs")
    rows = {row["run"]: row for row in table_rows(text, "Runs")}
    assert rows["seed0"]["task"] == "masked-lm" and rows["seed0"]["model"] == "new roberta"
    assert (rows["seed1"]["seed"], rows["seed1"]["steps"]) == ("1", "2")
    assert "bits" in rows["seed0"]["result"]
    assert rows["stopped"]["result"].endswith("last checkpoint at step 2")
    (together,) = table_rows(text, "Several seeds")
    assert (together["n"], together["runs"]) == ("2", "seed0, seed1")
    assert (tmp_path / "out" / "curves_masked-lm.png").exists()


def test_a_run_of_the_arena_is_called_by_its_method(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, {"test_accuracy": 0.5})
    settings = {"task": "listops", "attention": "adamra"}
    settings["config_overrides"] = "segment_lengths=[4,32]"
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
    (row,) = table_rows(results_of(tmp_path, folder), "Runs")
    assert row["model"] == "AdaMRA"
    assert "segment_lengths" in (tmp_path / "out" / "results.csv").read_text()
