"""The same training in other ways: accumulated, in processes, sharded, compiled, in bfloat16."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import mra_hf
from files import read_json, write_json_lines
from mra_hf.commands import main
from tiny_models import mra_config, padded_batch, word_tokenizer

ROOT = Path(__file__).parents[2]

#: Plain steps of gradient descent, whose result shows the gradient itself.
COMMON = {
    **{"model_name_or_path": "base", "do_train": True, "output_dir": "run", "max_steps": 2},
    **{"learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant"},
    **{"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"},
    **{"per_device_train_batch_size": 4, "save_steps": 100, "use_cpu": True},
}
TASKS = ("mlm", "mnli", "wikihop")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tiny encoders without dropout, and data of every task with examples of unequal length."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = mra_config(block_per_row=3, hidden_dropout_prob=0.0)
    mra_hf.MraForMaskedLM(config).save_pretrained("base")
    word_tokenizer().save_pretrained("base")
    documents = [" ".join(f"w{10 + (i * j) % 80}" for i in range(700)) for j in range(1, 4)]
    write_json_lines("train.jsonl", [{"text": text} for text in documents])
    rows = [
        {"sentence1": " ".join(f"w{10 + (i * j) % 80}" for i in range(20 + 9 * j))}
        | {"sentence2": f"w{10 + j} w9", "label": j % 3}
        for j in range(16)
    ]
    write_json_lines("pairs.jsonl", rows)
    questions = [
        {
            "id": f"q{j}",
            "query": f"next w{10 + j}",
            "answer": "w20",
            "candidates": ["w20", "w21", "w22"][: 2 + j % 2],
            "supports": [" ".join(f"w{30 + (i + j) % 60}" for i in range(15 + 5 * j))] * 3,
        }
        for j in range(16)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return tmp_path


def settings(task: str, name: str, **changes) -> str:
    data = {
        "mlm": {"train_file": ["train.jsonl"], "max_seq_length": 128},
        "mnli": {"train_file": ["pairs.jsonl"], "max_seq_length": 256},
        "wikihop": {"train_file": "questions.json", "max_seq_length": 120, "shuffle_parts": False},
    }[task]
    Path(f"{name}.yaml").write_text(yaml.safe_dump(COMMON | data | {"output_dir": name} | changes))
    return f"{name}.yaml"


def trained(task: str, name: str, **changes) -> dict[str, torch.Tensor]:
    assert main([f"run-{task}", settings(task, name, **changes)]) == 0
    return load_file(f"{name}/model.safetensors")


def python_module(*arguments: str) -> str:
    """Run `python -m` with these arguments; return what it prints."""
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched(task: str, name: str, *launcher: str, **changes) -> dict[str, torch.Tensor]:
    """Train in two processes, started by `launcher`, a Python module and its arguments."""
    script = ROOT / "scripts" / f"run_{task}.py"
    python_module(*launcher, str(script), settings(task, name, **changes))
    assert read_json(f"{name}/results.json")["processes"] == 2
    return load_file(f"{name}/model.safetensors")


def accelerate(config: str) -> tuple[str, ...]:
    file = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    return ("accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def assert_same_training(first, second, base="base/model.safetensors"):
    """The weights agree far better than they moved."""
    start = load_file(base)
    moved = max(
        float((first[name] - start[name]).abs().max())
        for name in first
        if name in start and first[name].shape == start[name].shape
    )
    assert moved > 1e-3, "training did something"
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=moved * 1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_accumulated_gradients_are_those_of_the_whole_batch(folder, task):
    whole = trained(task, "whole")
    parts = trained(task, "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_training(whole, parts)


def test_a_plain_trainer_accumulates_right(folder):
    rows = [
        {name: tensor[row] for name, tensor in padded_batch(4).items()}
        | {"labels": torch.tensor(row % 2)}
        for row in (0, 1, 0, 1)
    ]
    weights = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = mra_hf.MraForSequenceClassification(mra_config(hidden_dropout_prob=0.0))
        descent = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        aside = {"use_cpu": True, "report_to": "none", "save_strategy": "no"}
        arguments = TrainingArguments("plain", **descent, **batch, **aside)
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_train_like_one(folder, task):
    one = trained(task, "one")
    two = launched(task, "two", *accelerate("cpu_2_processes"), per_device_train_batch_size=2)
    assert_same_training(one, two)


@pytest.mark.slow
def test_two_processes_share_streamed_text(folder):
    streamed = {"streaming": True, "per_device_train_batch_size": 2}
    one = trained("mlm", "one", **streamed | {"per_device_train_batch_size": 4})
    two = launched("mlm", "two", *accelerate("cpu_2_processes"), **streamed)
    assert_same_training(one, two)


@pytest.mark.slow
def test_torchrun_does_too_and_evaluates_the_same(folder):
    evaluated = {"do_eval": True, "validation_file": ["pairs.jsonl"]}
    one = trained("mnli", "one", **evaluated)
    two = launched("mnli", "two", *TORCHRUN, per_device_train_batch_size=2, **evaluated)
    assert_same_training(one, two)
    first, second = (read_json(f"{name}/results.json") for name in ("one", "two"))
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert first["eval"]["eval_loss"] == pytest.approx(second["eval"]["eval_loss"], rel=1e-3)


def test_a_command_leaves_its_process_group(folder):
    # A process that ends with the group's threads at work may abort, before others have saved.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    try:
        assert main(["compare", "nowhere", "nowhere"]) == 2
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


SHARDED = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mra_hf
from mra_hf.sparse_prediction import labelled_logits, predict_labelled_positions

dist.init_process_group("gloo")
rank = dist.get_rank()
ids, labels = torch.load("batch.pt")
biased = {"distance_bias_window": 2, "distance_bias_far": -2.0}
plain = mra_hf.MraForMaskedLM.from_pretrained("base", **biased)
predict_labelled_positions(plain)
plain.train()(input_ids=ids, labels=labels).loss.backward()

model = mra_hf.MraForMaskedLM.from_pretrained("base", **biased)
predict_labelled_positions(model)
model.gradient_checkpointing_enable()
mesh = init_device_mesh("cpu", (2,))
for layer in model.roberta.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
mine = slice(rank * 2, rank * 2 + 2)
# Gradients are averaged over the processes: each divides by its share of all labels.
count = (labels != -100).sum() / 2
model.train()(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=count).loss.backward()
expected = {name: weight.grad for name, weight in plain.named_parameters()}
for name, weight in model.named_parameters():
    assert isinstance(weight.grad, DTensor), name
    torch.testing.assert_close(weight.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
with torch.no_grad(), labelled_logits(model), labelled_logits(plain):
    sharded = model.eval()(input_ids=ids, labels=labels).logits
    whole = plain.eval()(input_ids=ids, labels=labels).logits
torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-5)
print("the gradients agree", rank)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_and_checkpointed_layers_have_the_gradients_of_one_process(folder):
    # accelerate does not shard on a CPU: this is torch's FSDP2 itself.
    ids = torch.randint(5, 99, (4, 200))
    torch.save((ids, torch.where(torch.rand(4, 200) < 0.2, ids, -100)), "batch.pt")
    Path("sharded.py").write_text(SHARDED)
    assert python_module(*TORCHRUN, "sharded.py").count("the gradients agree") == 2


@pytest.mark.parametrize("task", ["mlm", "mnli"])
def test_checkpointed_layers_train_the_same(folder, task):
    assert_same_training(
        trained(task, "plain"), trained(task, "saved", gradient_checkpointing=True)
    )


def test_bfloat16_trains_nearly_the_same(folder):
    exact = trained("mlm", "exact")
    half = trained("mlm", "half", bf16=True)
    for name, tensor in exact.items():
        torch.testing.assert_close(half[name], tensor, rtol=0.05, atol=5e-3)
    assert any(not torch.equal(half[name], exact[name]) for name in exact)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_training_is_the_same(folder):
    assert_same_training(trained("mlm", "plain"), trained("mlm", "compiled", torch_compile=True))


def test_tensorboard_is_written_when_asked_for(folder):
    trained("mnli", "run", report_to="tensorboard", logging_steps=1)
    assert list(Path("run").rglob("events.out.tfevents.*"))


def test_a_run_directory_says_what_it_takes_to_repeat_it(folder):
    trained("mnli", "run", seed=7)
    results = read_json("run/results.json")
    for name in ("mra_hf", "torch", "transformers", "accelerate", "datasets", "dtype", "threads"):
        assert results[name], name
    assert results["seed"] == 7 and len(results["data"]["train"]) == 16
    assert "commit" in results and results["data"]["train_rows"] == 16
    before = load_file("run/model.safetensors")
    assert main(["run-mnli", "run/experiment.yaml", "--output_dir", "again"]) == 0
    again = load_file("again/model.safetensors")
    assert all(torch.equal(before[name], again[name]) for name in before)
    data = read_json("again/results.json")["data"]
    assert data == results["data"]
    rows = Path("pairs.jsonl").read_text().replace("w11", "w12")
    Path("pairs.jsonl").write_text(rows)
    trained("mnli", "other", seed=7)
    assert read_json("other/results.json")["data"] != data
