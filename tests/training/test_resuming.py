"""Going on after a stop: a killed process, a damaged checkpoint, another run's checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

import mra_hf
from files import read_csv, read_json, write_json_lines
from mra_hf.commands import main
from mra_hf.training import resuming
from tiny_models import enter_copy, mra_config, word_tokenizer

ROOT = Path(__file__).parents[2]
RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny encoder with dropout, texts, and a YAML file of a run of 24 steps."""
    folder = tmp_path_factory.mktemp("prepared")
    model = mra_hf.MraForMaskedLM(mra_config(block_per_row=3, hidden_dropout_prob=0.1))
    model.save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    write_texts(folder / "train.jsonl")
    settings = {
        **{"model_name_or_path": "base", "train_file": ["train.jsonl"], "max_seq_length": 100},
        **{"do_train": True, "output_dir": "run", "max_steps": 24, "save_steps": 2},
        **{"logging_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
        **{"use_cpu": True, "disable_tqdm": True},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def prepared_and_stopped(prepared, tmp_path_factory):
    """The same after a run that looks as if it had been killed after step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        enter_copy(prepared, folder, patch)
        assert main(["run-mlm", "run.yaml", "--max_steps", "4"]) == 0
        results = read_json("run/results.json")
        Path("run/results.json").write_text(json.dumps(results | {"train": {}}))
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    return enter_copy(prepared, tmp_path, monkeypatch)


@pytest.fixture
def stopped(prepared_and_stopped, tmp_path, monkeypatch):
    return enter_copy(prepared_and_stopped, tmp_path, monkeypatch)


def write_texts(path: Path, step: int = 1) -> None:
    documents = [" ".join(f"w{10 + (i * j * step) % 80}" for i in range(500)) for j in range(1, 5)]
    write_json_lines(path, [{"text": text} for text in documents])


def curve(name: str) -> list[dict[str, str]]:
    return read_csv(Path(name, "training_curve.csv"))


def checkpoint(step: int) -> Path:
    return Path("run", f"checkpoint-{step}")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(folder, streaming):
    arguments = ["run.yaml", "--streaming", streaming]
    assert main(["run-mlm", *arguments, "--output_dir", "unbroken"]) == 0
    script = [sys.executable, str(ROOT / "scripts" / "run_mlm.py")]
    running = subprocess.Popen([*script, *arguments], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (checkpoint(4) / "trainer_state.json").is_file() and time.monotonic() < end:
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "it was killed in its middle"
    assert "train" not in read_json("run/results.json")
    assert not Path("run/training_curve.csv").exists()
    assert main(["run-mlm", *arguments, *RESUME]) == 0
    assert curve("run") == curve("unbroken") and len(curve("run")) == 24
    assert read_json("run/results.json")["train"]["resumed_from"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_stopped_before_its_first_checkpoint_starts_again(folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop)
        assert main(["run-mlm", "run.yaml"]) != 0
    warnings = []
    monkeypatch.setattr(resuming.logger, "warning", warnings.append)
    assert main(["run-mlm", "run.yaml", *RESUME, "--max_steps", "1"]) == 0
    assert any("run has no checkpoint yet" in warning for warning in warnings)


def test_where_nothing_ran_nothing_is_resumed_and_nothing_is_touched(stopped, refused):
    """A mistyped folder, notes, models, the parent of runs, a checkpoint, an evaluation."""
    Path("empty").mkdir()
    Path("notes").mkdir()
    Path("notes/plan.txt").write_text("to do")
    Path("evaluated").mkdir()
    Path("evaluated/experiment.yaml").write_text("do_eval: true")
    Path("evaluated/results.json").write_text('{"eval": {"loss": 1.0}}')
    shutil.copytree("base", "trained")  # its results.json was moved away
    Path("trained/experiment.yaml").write_text("do_train: true")
    for name in ("rnu", "empty", "notes", "base", ".", "run/checkpoint-4", "evaluated", "trained"):
        before = contents(Path())
        error = refused("run-mlm", "run.yaml", *RESUME, "--output_dir", name)
        assert f"output_dir {name} holds no run to resume" in error
        assert contents(Path()) == before and not Path("rnu").exists()
    assert "go on with" not in refused("run-mlm", "run.yaml", "--output_dir", "base")
    assert "go on with --resume" in refused("run-mlm", "run.yaml")


@pytest.mark.parametrize("checkpoint", ["true", "run/checkpoint-4"])
def test_an_evaluation_does_not_resume(stopped, refused, checkpoint):
    evaluation = ("--do_train", "false", "--do_eval", "true", "--validation_file", "train.jsonl")
    error = refused("run-mlm", "run.yaml", *evaluation, "--resume_from_checkpoint", checkpoint)
    assert "do_train is false" in error and "--model_name_or_path" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learning_rate 5e-4", "learning_rate 0.001 (here 0.0005)"),
        ("--seed 3", "seed at its default (here 3)"),
        ("--bf16 true", "dtype 'fp32' (here 'bf16')"),
        ("--per_device_train_batch_size 2", "train_batch_size 4 (here 2)"),
        ("--mlm_probability 0.3", "mlm_probability 0.15 (here 0.3)"),
        ("--config_overrides block_per_row=4", "block_per_row 3 (here 4)"),
        ("--train_file other.jsonl", "training data (train)"),
        ("--config_overrides initial_prior_first_n_blocks=1", "first_n_blocks 0 (here 1)"),
        ("--dataloader_drop_last true", "dataloader_drop_last at its default (here True)"),
        (
            "--early_stopping_patience 3 --load_best_model_at_end true --eval_strategy steps "
            "--do_eval true --validation_file train.jsonl",
            "early_stopping_patience at its default (here 3)",
        ),
        ("--streaming true", "streaming False (here True)"),
    ],
)
def test_another_run_is_not_gone_on_with(stopped, refused, arguments, message):
    write_texts(Path("other.jsonl"), 3)
    before = contents(Path("run"))
    error = refused("run-mlm", "run.yaml", *RESUME, *arguments.split())
    assert message in error and "Go on with the settings and data of run/experiment.yaml" in error
    assert contents(Path("run")) == before


def test_what_does_not_change_the_course_may_differ(stopped):
    shutil.move("train.jsonl", "moved.jsonl")
    shutil.move("base", "moved")
    arguments = ["--train_file", "moved.jsonl", "--model_name_or_path", "moved"]
    arguments += ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "2"]
    arguments += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert main(["run-mlm", "run.yaml", *RESUME, *arguments]) == 0
    assert read_json("run/results.json")["train"]["steps"] == 6


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(stopped, refused, name):
    file = checkpoint(4) / name
    os.truncate(file, file.stat().st_size // 2)
    error = refused("run-mlm", "run.yaml", *RESUME)
    assert f"run/checkpoint-4 is damaged ({name}: " in error
    assert "--resume_from_checkpoint run/checkpoint-2" in error
    explicit = ["--resume_from_checkpoint", "run/checkpoint-2", "--max_steps", "5"]
    assert main(["run-mlm", "run.yaml", *explicit]) == 0
    shutil.rmtree(checkpoint(2))
    os.truncate(file, 7)
    shutil.rmtree("run/checkpoint-5", ignore_errors=True)
    assert "start anew in another output_dir" in refused("run-mlm", "run.yaml", *RESUME)


def test_a_checkpoint_that_was_cut_off_is_passed_over(stopped, refused):
    file = checkpoint(4) / "trainer_state.json"
    os.truncate(file, file.stat().st_size // 2)
    explicit = ["--resume_from_checkpoint", "run/checkpoint-4"]
    assert "run/checkpoint-4 is damaged (trainer_state.json: " in refused(
        "run-mlm", "run.yaml", *explicit
    )
    assert main(["run-mlm", "run.yaml", *RESUME, "--max_steps", "5"]) == 0
    train = read_json("run/results.json")["train"]
    assert train["resumed_from"] == "checkpoint-2"


def test_a_logger_that_is_not_installed_is_refused(folder, refused):
    assert "report_to asks for wandb, which is not installed" in refused(
        "run-mlm", "run.yaml", "--report_to", "wandb"
    )
    assert not Path("run").exists()


def test_a_run_stopped_after_its_last_step_is_finished(stopped):
    Path("run/model.safetensors").unlink()
    Path("run/training_curve.csv").unlink()
    evaluated = ["--do_eval", "true", "--validation_file", "train.jsonl"]
    assert main(["run-mlm", "run.yaml", *RESUME, "--max_steps", "4", *evaluated]) == 0
    results = read_json("run/results.json")
    assert results["train"]["steps"] == 4 and results["eval"]["eval_loss"] > 0
    assert len(curve("run")) == 4
    first, second = (load_file(f"{name}/model.safetensors") for name in ("run", checkpoint(4)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_results_of_another_run_are_not_overwritten(stopped, refused):
    arguments = ["run-mlm", "run.yaml", "--resume_from_checkpoint", "run/checkpoint-4"]
    Path("other").mkdir()
    Path("other/results.json").write_text("{}")
    assert "other is not empty, and run/checkpoint-4 is of another run" in refused(
        *arguments, "--output_dir", "other"
    )
    assert main([*arguments, "--output_dir", "new", "--max_steps", "5"]) == 0
    assert len(curve("new")) == 5


def test_a_checkpoint_without_its_optimizer_is_refused(stopped, refused):
    (checkpoint(4) / "optimizer.pt").unlink()
    assert "holds no state of the optimizer" in refused("run-mlm", "run.yaml", *RESUME)


def test_early_stopping_counts_on(folder, refused):
    arguments = ["run-mlm", "run.yaml", "--do_eval", "true", "--validation_file", "train.jsonl"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    arguments += ["--load_best_model_at_end", "true", "--early_stopping_patience", "3"]
    arguments += ["--learning_rate", "1e-12", "--metric_for_best_model", "accuracy"]
    assert main(arguments) == 0
    stopped_at = read_json("run/results.json")["train"]["steps"]
    assert stopped_at == 4
    assert "holds a finished run (4 steps)" in refused(*arguments, *RESUME)
    shutil.rmtree(checkpoint(4))
    Path("run/results.json").unlink()
    assert main([*arguments, *RESUME]) == 0
    assert read_json("run/results.json")["train"]["steps"] == stopped_at
