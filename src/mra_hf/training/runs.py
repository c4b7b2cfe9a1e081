"""What every experiment shares: arguments, checks, metadata, and the files that a run leaves."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput

import mra_hf
from mra_attention.checks import check_int
from mra_hf.attention import ATTENTION_NAMES, attention_settings
from mra_hf.evaluation.metrics import load_metric
from mra_hf.loading import read_config
from mra_hf.results.curves import plot_training_curve
from mra_hf.results.files import (
    EXPERIMENT_NAME,
    HISTORY_NAME,
    PICTURE_NAME,
    RESULTS_NAME,
    STATE_NAME,
    experiment_settings,
    save_experiment,
    source_commit,
    write_history,
    write_predictions,
    write_text,
)
from mra_hf.training.resuming import (
    ATTENTION_CONDITIONS,
    check_same_run,
    checkpoint_to_resume,
    is_at_its_end,
    output_folder,
)

#: Settings of `TrainingArguments` that count something.
_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
)
#: Rows that `data_fingerprint` reads at a time.
_FINGERPRINT_ROWS = 1000


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of arguments, with the help text that the command shows for it."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which checkpoint, and what to change about it."""

    model_name_or_path: str | None = option(None, "checkpoint to start from: a directory or hub id")
    config_overrides: str | None = option(
        None, "settings of the configuration: block_per_row=4,approx_mode=sparse"
    )
    tokenizer_name: str | None = option(None, "tokenizer; not set: the checkpoint's own")
    attn_implementation: str | None = option(
        None, "mra2, mra2_s, sdpa, ...; not set: the model's own"
    )
    paper_row: str | None = option(
        None, "id of the row of the paper's tables that this run repeats"
    )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer `tokenizer_name`, or the checkpoint's own.

        Raises:
            ValueError: the checkpoint is none, or the tokenizer has more tokens.
            OSError: there is no such checkpoint or tokenizer.
        """
        config = None
        if self.model_name_or_path:
            config = read_config(self.model_name_or_path)  # says more clearly what is missing
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name or self.model_name_or_path)
        if self.tokenizer_name and config is not None:
            last, size = max(tokenizer.get_vocab().values()), config.vocab_size
            if last >= size:
                raise ValueError(
                    f"tokenizer_name {self.tokenizer_name} gives token ids up to {last}, but "
                    f"vocab_size of {self.model_name_or_path} is {size}; the two do not belong "
                    "together: leave tokenizer_name out."
                )
        return tokenizer


@dataclass
class StoppingArguments:
    """When to stop before the last step."""

    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations without a better metric_for_best_model"
    )
    early_stopping_threshold: float = option(0.0, "how much better a metric has to be to count")

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
        # A resumed run continues the count.
        training_args.restore_callback_states_from_checkpoint = True
        return [EarlyStoppingCallback(self.early_stopping_patience, self.early_stopping_threshold)]


class ChoiceTrainer(Trainer):
    """`Trainer` for tasks with one right class per example: predicts the class with the highest
    logit, measures accuracy, and evaluates examples in their order.

    Under `train_sampling_strategy="group_by_length"` Trainer shuffles evaluations too, and
    predictions would not stand beside their examples.
    """

    def __init__(self, **arguments):
        accuracy = load_metric("accuracy")

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            return accuracy.compute(
                predictions=prediction.predictions, references=prediction.label_ids
            )

        super().__init__(
            compute_metrics=metrics,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            **arguments,
        )

    def _get_eval_sampler(self, eval_dataset) -> SequentialSampler | None:
        # None for several processes: accelerate shares out the order of the data set.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def save_predictions(
        self, set_name: str, predicted: PredictionOutput, labels: Sequence[str]
    ) -> None:
        """Write `predictions_SET.csv` with the names of the classes, in the main process."""
        if not self.is_world_process_zero():
            return
        references, answers = predicted.label_ids, predicted.predictions
        assert isinstance(references, np.ndarray) and isinstance(answers, np.ndarray)
        pairs = zip(references, answers, strict=True)
        write_predictions(
            output_folder(self.args) / f"predictions_{set_name}.csv",
            (
                (row, labels[int(label)], labels[int(prediction)])
                for row, (label, prediction) in enumerate(pairs)
            ),
        )


def check_best_metric(training_args: TrainingArguments, names: Sequence[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation gives, before an epoch is spent.

    Raises:
        ValueError: it is none of `names`, with or without "eval_".
    """
    metric = training_args.metric_for_best_model
    if metric is None or training_args.eval_strategy == "no":
        return
    allowed = [name.removeprefix("eval_") for name in names]
    if metric.removeprefix("eval_") not in allowed:
        raise ValueError(f"metric_for_best_model must be one of {allowed}, got {metric!r}.")


def check_run(training_args: TrainingArguments) -> None:
    """Refuse settings that leave nothing to do, nowhere to write, or ask for a missing package.

    Raises:
        ValueError: each with what to do.
    """
    if not training_args.do_train and not training_args.do_eval:
        raise ValueError("nothing to do; pass --do_train true, --do_eval true, or both.")
    if output_folder(training_args).is_file():
        raise ValueError(f"output_dir must be a folder, and {training_args.output_dir} is a file.")
    for name in _COUNTS:
        check_int(name, getattr(training_args, name), 1)
    epochs = training_args.num_train_epochs
    if training_args.do_train and training_args.max_steps < 1 and epochs <= 0:
        raise ValueError(
            f"num_train_epochs must be positive, got {epochs}; or pass a positive max_steps."
        )
    if training_args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {training_args.label_smoothing_factor}: "
            "the losses here have no smoothing."
        )
    usable = get_available_reporting_integrations()
    for name in training_args.report_to or []:
        # flyte and kubeflow are never listed; their callbacks report what they lack.
        if name in INTEGRATION_TO_CALLBACK and name not in (*usable, "flyte", "kubeflow"):
            package = "tensorboardX" if name == "tensorboard" else "its package"
            raise ValueError(
                f"report_to asks for {name}, which is not installed; "
                f"pip install {package}, or drop it."
            )


class Experiment:
    """A run of any task, from its checked settings to the files it leaves.

    A task checks its settings, begins an experiment, makes a model and a trainer, and calls `fit`.
    To begin is to find the checkpoint to resume and to seed all generators.

    Args:
        task: its name in `results.json`.
        unit: what the loss is a mean over, for the picture of the curves.
        settings: the dataclasses that describe the run, `TrainingArguments` last.

    Attributes:
        results: what `results.json` holds; the last evaluation may add to it.

    Raises:
        ValueError: `output_dir` is not free, or the checkpoint cannot be resumed.
    """

    def __init__(self, task: str, unit: str, *settings: Any):
        self.task, self.unit, self.settings = task, unit, settings
        self.training_args: TrainingArguments = settings[-1]
        self.results: dict[str, Any] = {}
        self.resume_from = checkpoint_to_resume(self.training_args)
        self.training_args.remove_unused_columns = False  # collators and samplers read more
        set_seed(self.training_args.seed)

    def fit(
        self,
        trainer: Trainer,
        max_seq_length: int,
        conditions: dict[str, Any],
        evaluate: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Train and evaluate as `TrainingArguments` say; write everything to `output_dir`.

        `output_dir` gets the model and its tokenizer, `experiment.yaml` (the settings in force),
        `results.json` (the metrics and their conditions), `training_curve.csv` and its picture.
        All but the last evaluation is written before that evaluation begins.

        Args:
            trainer: with its model and data.
            max_seq_length: tokens of an example at most.
            conditions: of this task, added to `run_metadata`.
            evaluate: the last evaluation, metrics by name.

        Returns:
            What `results.json` holds: metadata, conditions, "data", "train" and "eval".

        Raises:
            ValueError: the checkpoint to resume belongs to another run.
        """
        args, results, resume_from = self.training_args, self.results, self.resume_from
        output_folder(args).mkdir(parents=True, exist_ok=True)
        model = trainer.model
        assert isinstance(model, PreTrainedModel)
        results |= run_metadata(self.task, model, args, max_seq_length)
        results |= conditions
        results["data"] = _describe_data(trainer)
        if args.do_train:
            if resume_from is not None:
                check_same_run(resume_from, experiment_settings(*self.settings), results)
            self._write_settings(trainer)  # also for a run that is stopped
            if resume_from is not None and is_at_its_end(resume_from, args):
                _restore(trainer, resume_from)
                results["train"] = {}
            else:
                results["train"] = trainer.train(resume_from_checkpoint=resume_from).metrics
            results["train"]["steps"] = trainer.state.global_step
            if resume_from is not None:  # its runtime covers only the steps since then
                results["train"]["resumed_from"] = Path(resume_from).name
            trainer.save_model()
            trainer.save_state()
            self._write(trainer)  # the last evaluation may fail
        if args.do_eval:
            results["eval"] = evaluate()
        self._write(trainer)
        return results

    def _write_settings(self, trainer: Trainer) -> None:
        if trainer.is_world_process_zero():
            output = output_folder(self.training_args)
            save_experiment(output / EXPERIMENT_NAME, *self.settings)
            write_text(output / RESULTS_NAME, json.dumps(self.results, indent=2) + "\n")

    def _write(self, trainer: Trainer) -> None:
        """Settings, results, curve and its picture, in the main process."""
        self._write_settings(trainer)
        if trainer.is_world_process_zero() and self.training_args.do_train:
            output, results = output_folder(self.training_args), self.results
            rows = write_history(trainer.state.log_history, output / HISTORY_NAME)
            title = f"{self.task}, {results['attention']}, {results['max_seq_length']} tokens"
            plot_training_curve(rows, output / PICTURE_NAME, title, self.unit)


def run_metadata(
    task: str, model: PreTrainedModel, training_args: TrainingArguments, max_seq_length: int
) -> dict[str, Any]:
    """What the numbers of a run depend on: the first part of its `results.json`."""
    device = training_args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = model.config._attn_implementation
    settings = {}
    if attention in ATTENTION_NAMES:
        settings = attention_settings(model.config, attention).for_operator()
    return {
        "task": task,
        "model_type": model.config.model_type,
        "attention": attention,
        **{name: settings.get(name) for name in ATTENTION_CONDITIONS},
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
    """First 16 digits of the SHA-256 of the rows of a dataset; None for streamed text."""
    if not isinstance(data, datasets.Dataset):
        return None
    digest = hashlib.sha256()
    for batch in data.with_format("arrow").iter(batch_size=_FINGERPRINT_ROWS):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema.remove_metadata()) as stream:
            stream.write_table(batch.replace_schema_metadata().combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def _describe_data(trainer: Trainer) -> dict[str, Any]:
    """Fingerprints of the training and evaluation data, and the number of training rows."""
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    sets = {"eval": held_out}
    if isinstance(held_out, dict):
        sets = {f"eval_{name}": rows for name, rows in held_out.items()}
    return {
        "train": data_fingerprint(train),
        "train_rows": len(train) if isinstance(train, datasets.Dataset) else None,
        **{name: data_fingerprint(rows) for name, rows in sets.items()},
    }


def _restore(trainer: Trainer, checkpoint: str) -> None:
    """Load the state of `checkpoint`, at which training was over: asked to resume there, `Trainer`
    would take one more step.
    """
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE_NAME))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)
