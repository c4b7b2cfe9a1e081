"""What every run shares: which model, its conditions, and the files that a run leaves."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import pyarrow as pa
import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

import mra_hf
from mra_attention.checks import check_int
from mra_hf.attention import ATTENTION_NAMES, attention_settings
from mra_hf.results.curves import plot_training_curve
from mra_hf.results.files import (
    EXPERIMENT_NAME,
    HISTORY_NAME,
    PICTURE_NAME,
    RESULTS_NAME,
    experiment_settings,
    save_experiment,
    source_commit,
    write_history,
    write_text,
)
from mra_hf.training.resuming import STATE_NAME, check_same_run, is_at_its_end

#: Rows that `data_fingerprint` reads at a time.
_FINGERPRINT_ROWS = 1000


@dataclass
class ModelArguments:
    """Which checkpoint, and what to change about it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to start from: a directory or hub id"}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "settings of the configuration: block_per_row=4,approx_mode=sparse"},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer; not set: that of the checkpoint"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "mra2, mra2_s, sdpa, ...; not set: the model's own"}
    )
    paper_row: str | None = field(
        default=None,
        metadata={"help": "id of the row of the paper's tables that this run repeats"},
    )


@dataclass
class StoppingArguments:
    """When to stop before the last step."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "stop after so many evaluations without a better metric_for_best_model"},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "how much better a metric has to be to count"}
    )

    def callbacks(self, training_args: TrainingArguments) -> list[TrainerCallback]:
        """The callback that stops, if one is asked for.

        Raises:
            ValueError: there is nothing to compare, or no best model to go back to.
        """
        if self.early_stopping_patience is None:
            return []
        check_int("early_stopping_patience", self.early_stopping_patience, 1)
        if not training_args.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience needs --load_best_model_at_end true with an eval_strategy "
                "and the same save_strategy, and a metric_for_best_model (default: the loss)."
            )
        # A resumed run counts on from where it was.
        training_args.restore_callback_states_from_checkpoint = True
        return [EarlyStoppingCallback(self.early_stopping_patience, self.early_stopping_threshold)]


class InOrder(Trainer):
    """`Trainer` that evaluates examples in their order, so that predictions stand beside them.

    Under `train_sampling_strategy="group_by_length"` Trainer shuffles evaluations too.
    """

    def _get_eval_sampler(self, eval_dataset) -> SequentialSampler | None:
        # None for several processes: accelerate shares out the order of the data set.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def check_best_metric(training_args: TrainingArguments, names: Sequence[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation gives, before an epoch is spent.

    Raises:
        ValueError: it is none of `names`, with or without "eval_".
    """
    given = training_args.metric_for_best_model
    if given is None or training_args.eval_strategy == "no":
        return
    allowed = [name.removeprefix("eval_") for name in names]
    if given.removeprefix("eval_") not in allowed:
        raise ValueError(f"metric_for_best_model must be one of {allowed}, got {given!r}.")


def check_run(training_args: TrainingArguments) -> None:
    """Refuse settings that leave nothing to do, nowhere to write, or ask for a missing package.

    Raises:
        ValueError: each with what to do.
    """
    if not training_args.do_train and not training_args.do_eval:
        raise ValueError("nothing to do; pass --do_train true, --do_eval true, or both.")
    if Path(training_args.output_dir).is_file():
        raise ValueError(f"output_dir must be a folder, and {training_args.output_dir} is a file.")
    if training_args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0, got "
            f"{training_args.label_smoothing_factor}: the losses here have no smoothing."
        )
    usable = get_available_reporting_integrations()
    for name in training_args.report_to or []:
        # Of the two that are never listed the callbacks say themselves what they lack.
        if name in INTEGRATION_TO_CALLBACK and name not in (*usable, "flyte", "kubeflow"):
            package = "tensorboardX" if name == "tensorboard" else "its package"
            raise ValueError(
                f"report_to asks for {name}, which is not installed; pip install {package}, or "
                "drop it."
            )


def run_metadata(
    task: str, model: PreTrainedModel, training_args: TrainingArguments, max_seq_length: int
) -> dict[str, Any]:
    """What the numbers of a run depend on, the first part of its `results.json`."""
    device = training_args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = model.config._attn_implementation
    settings = attention_settings(model.config, attention) if attention in ATTENTION_NAMES else {}
    return {
        "task": task,
        "model_type": model.config.model_type,
        "attention": attention,
        "approx_mode": settings.get("approx_mode"),
        "block_per_row": settings.get("block_per_row"),
        "resolutions": settings.get("resolutions"),
        "block_budgets": settings.get("block_budgets"),
        "initial_prior_first_n_blocks": settings.get("initial_prior_first_n_blocks"),
        "initial_prior_diagonal_n_blocks": settings.get("initial_prior_diagonal_n_blocks"),
        "selection": settings.get("selection"),
        "parameters": model.num_parameters(),
        "max_seq_length": max_seq_length,
        "seed": training_args.seed,
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": training_args.world_size,
        "train_batch_size": training_args.train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size,
        "eval_batch_size": training_args.eval_batch_size,
        "dtype": "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32",
        "mra_hf": mra_hf.__version__,
        "commit": source_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
    }


def data_fingerprint(data: "datasets.Dataset | datasets.IterableDataset | None") -> str | None:
    """SHA-256 of the rows of a dataset, its first 16 digits; None for text that is streamed."""
    if not isinstance(data, datasets.Dataset):
        return None
    digest = hashlib.sha256()
    for batch in data.with_format("arrow").iter(batch_size=_FINGERPRINT_ROWS):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema.remove_metadata()) as stream:
            stream.write_table(batch.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def fit(
    trainer: Trainer,
    settings: Sequence[Any],
    results: dict[str, Any],
    resume_from: str | None,
    evaluate: Callable[[], dict[str, Any]],
    unit: str,
) -> dict[str, Any]:
    """Train and evaluate as `TrainingArguments` say; write everything to `output_dir`.

    `output_dir` gets the model and its tokenizer, `experiment.yaml` (the settings in force),
    `results.json` (the metrics and their conditions), `training_curve.csv` and its picture. All of
    it but the evaluation is written before the evaluation begins.

    Args:
        trainer: with its data.
        settings: dataclasses of the experiment.
        results: the conditions; "train" and "eval" are added.
        resume_from: as `resuming.checkpoint_to_resume` returns it.
        evaluate: the last evaluation, metrics by name.
        unit: what the loss is a mean over, for the picture.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: `resume_from` belongs to another run.
    """
    args = trainer.args
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results["data"] = {
        "train": data_fingerprint(trainer.train_dataset),
        "train_rows": _rows(trainer.train_dataset),
    } | (
        {f"eval_{name}": data_fingerprint(part) for name, part in trainer.eval_dataset.items()}
        if isinstance(trainer.eval_dataset, dict)
        else {"eval": data_fingerprint(trainer.eval_dataset)}
    )
    if args.do_train:
        if resume_from is not None:
            check_same_run(resume_from, experiment_settings(*settings), results)
        if trainer.is_world_process_zero():  # a run that is stopped says what it was, too
            save_experiment(output / EXPERIMENT_NAME, *settings)
            write_text(output / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
        if resume_from is not None and is_at_its_end(resume_from, args):
            _restore(trainer, resume_from)
            results["train"] = {}
        else:
            results["train"] = trainer.train(resume_from_checkpoint=resume_from).metrics
        results["train"]["steps"] = trainer.state.global_step
        if resume_from is not None:  # the runtime is that of the steps since
            results["train"]["resumed_from"] = Path(resume_from).name
        trainer.save_model()
        trainer.save_state()
        _write(trainer, output, settings, results, unit)  # the last evaluation may fail
    if args.do_eval:
        results["eval"] = evaluate()
    _write(trainer, output, settings, results, unit)
    return results


def _restore(trainer: Trainer, checkpoint: str) -> None:
    """Leave `trainer` as training left it, where nothing but the end of a run was missing: asked to
    go on, `Trainer` would take one step more.
    """
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)


def _rows(data) -> int | None:
    return len(data) if isinstance(data, datasets.Dataset) else None


def _write(trainer: Trainer, output: Path, settings, results: dict[str, Any], unit: str) -> None:
    """Settings, results, curve and its picture, by one process."""
    if not trainer.is_world_process_zero():
        return
    save_experiment(output / EXPERIMENT_NAME, *settings)
    write_text(output / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
    if trainer.args.do_train:
        rows = write_history(trainer.state.log_history, output / HISTORY_NAME)
        title = f"{results['task']}, {results['attention']}, {results['max_seq_length']} tokens"
        plot_training_curve(rows, output / PICTURE_NAME, title, unit)
