"""The settings under configs/lra: read as `run-lra` reads them, and held against the papers."""

import inspect
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from mra_hf.commands import experiments, run_lra
from mra_hf.training.lra import load_task

FILES = sorted((Path(__file__).parents[2] / "configs" / "lra").glob("*.yaml"))
#: Steps, warm-up, batch, evaluation every: both papers', after their common code.
PUBLISHED = {
    "listops": (5000, 1000, 32, 50),
    "text": (20_000, 8000, 32, 500),
    "retrieval": (30_000, 800, 32, 300),
    "image": (35_000, 175, 256, 175),
    "pathfinder": (62_400, 312, 256, 312),
}


def settings(path, *more):
    parser = HfArgumentParser(run_lra.DATACLASSES)
    run_lra.add_arguments(parser)
    args = experiments.parse(parser, [str(path), "--use_cpu", *more])
    return experiments.dataclasses_of(args, run_lra.DATACLASSES)


def test_there_is_a_file_for_every_task():
    assert set(PUBLISHED) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_the_papers_say(path):
    lra, _, training = settings(path)
    assert lra.task == path.stem.removeprefix("small_").split("_")[0] and lra.one_cycle
    # Table 6 of the MRA paper has another decay than the arena.
    assert training.weight_decay == (0.05 if lra.model == "image_classifier" else 0)
    assert training.adam_epsilon == 1e-6
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    assert training.max_grad_norm == 0 and training.load_best_model_at_end
    assert (
        training.metric_for_best_model == "accuracy" and training.save_steps == training.eval_steps
    )
    if path.stem in PUBLISHED:
        steps, warmup, batch, every = PUBLISHED[path.stem]
        assert (training.max_steps, training.warmup_steps) == (steps, warmup)
        assert training.per_device_train_batch_size == batch and training.eval_steps == every
        assert training.learning_rate == 1e-4 and lra.config_overrides is None


def test_task_settings_are_arguments_of_the_task(monkeypatch):
    from mra_hf.data import lra as tasks

    for path in FILES:
        lra, *_ = settings(path)
        seen = {}
        original = tasks.TASKS[lra.task]

        def record(*source, seen=seen, **given):
            seen.update(given)

        record.__signature__ = inspect.signature(original)
        monkeypatch.setitem(tasks.TASKS, lra.task, record)
        source = "folder" if lra.task in ("text", "retrieval", "image") else None
        load_task(lra.task, source, lra.task_settings)
        assert len(seen) == len((lra.task_settings or "").split(",")) - (not lra.task_settings)
