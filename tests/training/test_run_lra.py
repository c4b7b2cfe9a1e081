"""`mra-hf run-lra`: a run on a generated task, its files, its schedule, going on after a stop."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mra_hf import LraForSequenceClassification
from mra_hf.commands import main
from mra_hf.data.lra.listops import listops
from mra_hf.data.lra.pathfinder import pathfinder
from mra_hf.results.runs import find_runs
from mra_hf.results.smat import smat_scores, smat_table
from mra_hf.training.lra import PAPER_PRIORS, Collator, PixelCollator, controls, lra_config

TASK = "train=60,dev=20,test=20,min_length=10,max_length=60"
RUN = [
    *("--task", "listops", "--task_settings", TASK, "--do_train", "--do_eval", "--use_cpu"),
    *("--max_steps", "6", "--warmup_steps", "3", "--learning_rate", "1e-3"),
    *("--per_device_train_batch_size", "8", "--eval_strategy", "steps", "--eval_steps", "2"),
    *("--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "true"),
    *("--metric_for_best_model", "accuracy", "--logging_steps", "1"),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def run(out, *more):
    assert main(["run-lra", *RUN, "--output_dir", str(out), *more]) == 0
    return json.loads((out / "results.json").read_text())


def test_a_run_is_trained_chosen_and_tested(tmp_path, capsys):
    results = run(tmp_path / "run", "--attention", "adamra")
    printed = capsys.readouterr().out
    assert "test accuracy of majority" in printed and "test accuracy of root_operator" in printed
    assert results["task"] == "lra-listops" and results["attention"] == "adamra"
    assert results["segment_lengths"] == [2, 8, 32] and results["routing"] == "learned"
    assert {"eval_dev_accuracy", "eval_test_accuracy"} <= set(results["eval"])
    assert results["train"]["peak_memory_mb"] > 50
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    assert isinstance(model, LraForSequenceClassification)
    data = listops(train=60, dev=20, test=20, min_length=10, max_length=60)
    batch = Collator(True)(list(data.test))
    labels = batch.pop("labels")
    found = (model(**batch).logits.argmax(-1) == labels).float().mean().item()
    assert results["eval"]["eval_test_accuracy"] == pytest.approx(found)
    assert (tmp_path / "run" / "predictions_test.csv").read_text().count("\n") == 21
    curve = (tmp_path / "run" / "training_curve.csv").read_text().splitlines()
    shares = [name for name in curve[0].split(",") if name.startswith("share_layer_")]
    assert len(shares) == 6
    first = dict(zip(curve[0].split(","), curve[1].split(","), strict=True))
    assert sum(float(first[name]) for name in shares) == pytest.approx(2, abs=1e-3)


def test_the_published_schedule(tmp_path):
    run(tmp_path / "run", "--attention", "linear")
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=6, pct_start=0.5, anneal_strategy="linear"
    )
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-3)
    saved = torch.load(tmp_path / "run" / "checkpoint-6" / "scheduler.pt", weights_only=False)
    assert saved["cycle_momentum"], "as published, beta 1 goes the other way"
    run(tmp_path / "other", "--attention", "linear", "--one_cycle", "false")
    state = json.loads((tmp_path / "other" / "trainer_state.json").read_text())
    other = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    assert other != rates


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    whole = run(tmp_path / "whole", "--attention", "mra2")
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "part" / "checkpoint-4")
    before = {name: value for name, value in whole.items() if name not in ("train", "eval")}
    (tmp_path / "part" / "results.json").write_text(json.dumps(before))
    settings = (tmp_path / "whole" / "experiment.yaml").read_text()
    (tmp_path / "part" / "experiment.yaml").write_text(settings)
    again = run(tmp_path / "part", "--attention", "mra2", "--resume_from_checkpoint", "true")
    assert again["eval"]["eval_test_loss"] == pytest.approx(whole["eval"]["eval_test_loss"])


@pytest.mark.slow
def test_several_attentions_get_a_score(tmp_path, capsys):
    for attention in ("mra2", "linear"):
        run(tmp_path / "runs" / attention, "--attention", attention)
    for seed in (1, 2):
        run(tmp_path / "runs" / f"linear-{seed}", "--attention", "linear", "--seed", str(seed))
    table = smat_table(find_runs([tmp_path / "runs"]))
    assert "| MRA-2 | 1 |" in table and "| linear attention | 3 |" in table
    other = TASK.replace("max_length=60", "max_length=80")
    run(tmp_path / "runs" / "longer", "--attention", "linear", "--task_settings", other)
    assert smat_table(find_runs([tmp_path / "runs"])) == table, "of other data: not compared"
    assert main(["results", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Speed, memory, accuracy" in printed and "test" in printed and "±" in printed


def test_the_score_is_that_of_the_paper():
    """AdaMRA's Table 3, from its own speeds, memories and mean accuracies."""
    models = {  # examples/s, MB, accuracy, score
        "Transformer": (14.5, 6645, 58.77, 0.54),
        "BigBird": (36.4, 2917, 59.43, 1.43),
        "Reformer": (80.0, 2023, 55.04, 1.37),
        "Linformer": (111.1, 2003, 55.59, 1.61),
        "Linear": (200.0, 1353, 58.20, 2.48),
        "Performer": (142.9, 1439, 53.63, 1.67),
        "Nystromformer": (57.1, 2687, 58.95, 1.54),
        "AdaMRA": (160.0, 1475, 63.09, 2.76),
    }
    *measured, printed = zip(*models.values(), strict=True)
    assert smat_scores(*measured) == pytest.approx(printed, abs=0.011)
    with pytest.raises(ValueError, match="compares two models or more"):
        smat_scores([1], [1], [1])


def test_controls_need_no_reading():
    data = listops(train=400, dev=20, test=100, min_length=10, max_length=60)
    found = controls("listops", data)
    labels = np.array(data.test["label"])
    majority = np.bincount(data.train["label"]).argmax()
    assert found["majority"] == (labels == majority).mean() < found["root_operator"] < 0.6


def test_the_encoder_of_a_task_is_that_of_the_published_runs():
    data = listops(train=60, dev=20, test=20, min_length=10, max_length=60)
    config = lra_config("listops", "mra2", data)
    assert (config.vocab_size, config.max_position_embeddings) == (32, 64)
    assert (config.initial_prior_first_n_blocks, config.block_per_row) == (1, 8)
    assert config.pooling == "mean_over_all" and config.num_labels == 10
    assert config.grid is None


def test_images_are_read_in_patches_with_the_priors_of_the_published_runs():
    data = pathfinder(count=20, paddles=6)
    for (task, attention), priors in PAPER_PRIORS.items():
        if task not in ("image", "pathfinder"):
            continue
        config = lra_config(task, attention, data)
        assert config.grid == (32, 32) and config.max_position_embeddings == 1024
        found = (config.initial_prior_first_n_blocks, config.initial_prior_diagonal_n_blocks)
        assert found == priors
    assert {
        (task, attention): priors
        for task, both in {
            "listops": ((1, 0), (1, 0)),
            "text": ((1, 1), (1, 1)),
            "retrieval": ((1, 1), (1, 1)),
            "image": ((1, 0), (0, 1)),
            "pathfinder": ((1, 0), (1, 1)),
        }.items()
        for attention, priors in zip(("mra2", "mra2_s"), both, strict=True)
    } == PAPER_PRIORS
    batch = PixelCollator(data)(list(data.test))
    assert batch["pixel_values"].shape == (2, 1, 32, 32)
    pixels = torch.tensor(data.test[0]["input_ids"]).view(32, 32)
    torch.testing.assert_close((batch["pixel_values"][0, 0] + 1) * 127.5, pixels.float())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--attention", "sdpa"), "attention must be one of"),
        (("--do_train", "false"), "no trained model to evaluate here"),
        (("--task", "maze"), "task must be one of"),
        (("--task_settings", "size=3"), "has no 'size'"),
        (("--config_overrides", "segment_lengths=[0]"), r"segment_lengths[0] must be"),
        (("--config_overrides", "colour=red"), "has no 'colour'"),
        (("--config_overrides", "num_labels=3"), "num_labels must be at least 10 for this task"),
        (("--config_overrides", "vocab_size=3"), "vocab_size must be at least 16 for this task"),
        (("--warmup_steps", "6"), "warmup_steps must be from 2 to 5"),
        (("--metric_for_best_model", "f1"), "metric_for_best_model must be one of"),
        (("--model", "image_classifier"), "is for the tasks image and pathfinder"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, capsys, more, message):
    assert main(["run-lra", *RUN, "--output_dir", str(tmp_path / "run"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


def test_images_are_read_by_the_classifier_of_the_paper_too(tmp_path):
    more = ("--task", "pathfinder", "--task_settings", "count=30,paddles=6")
    results = run(
        tmp_path / "run",
        *more,
        *("--model", "image_classifier", "--attention", "mra2_s", "--max_steps", "4"),
        *("--config_overrides", "num_hidden_layers=1,hidden_size=16,block_per_row=2"),
    )
    assert results["model_type"] == "mra_image_hf" and results["approx_mode"] == "sparse"
