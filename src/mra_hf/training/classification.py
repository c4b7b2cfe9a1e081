"""Classification of texts and pairs of texts with `Trainer`: MNLI and whatever has its form."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from mra_attention.checks import check_int
from mra_hf.data import classification as data
from mra_hf.evaluation.metrics import load_metric
from mra_hf.loading import check_length, load_model
from mra_hf.results.files import write_predictions
from mra_hf.sparse_prediction import cross_entropy
from mra_hf.training import resuming, runs

#: Weights of the heads of sequence classifiers, which may start at random.
HEAD_WEIGHTS = ("classifier.", "score.", "pre_classifier.", "bert.pooler.", "pooler.")


@dataclass
class ClassificationDataArguments:
    """Which texts and labels, and how they become sequences."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "rows to train on: .tsv, .csv or .jsonl files (also .gz, .xz)"},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "rows to evaluate on; each file is a set of its own"}
    )
    held_out_rows: int | None = field(
        default=None,
        metadata={"help": "in place of validation_file: so many rows of train_file, drawn by seed"},
    )
    held_out_seed: int = field(default=0, metadata={"help": "the seed they are drawn by"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "a dataset by name in place of files: nyu-mll/multi_nli"}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration of that dataset: mnli, for glue"}
    )
    train_split: str = field(default="train", metadata={"help": "its split to train on"})
    validation_split: list[str] = field(
        default_factory=lambda: ["validation_matched", "validation_mismatched"],
        metadata={"help": "its splits to evaluate on"},
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "the column with the text, or the two of a pair; not set: recognised"},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "the column with the label; not set: recognised"}
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "all labels in their order; not set: those of the data"}
    )
    max_seq_length: int = field(
        default=512, metadata={"help": "longer texts and pairs are cut to so many tokens"}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "pad every batch to max_seq_length, not to its longest"}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "processes that tokenise; not set: one"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on so many rows, drawn by held_out_seed"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on so many rows of each set, likewise"}
    )


def run_classification(
    model_args: runs.ModelArguments,
    data_args: ClassificationDataArguments,
    stopping_args: runs.StoppingArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate a sequence classifier; `runs.fit` says what is written.

    The attention mask is passed: padding is never attended. With `do_eval`, each set's accuracy is
    under "eval" of the results, its confusion matrix under "confusion_matrix", and the predictions
    are in `predictions_SET.csv`. Several sets carry their names ("eval_matched_accuracy").

    Args:
        model_args: a checkpoint; one without a classifier gets a new one.
        data_args: which texts.
        stopping_args: when to stop early.
        training_args: of `Trainer`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: settings that contradict one another, or faulty data, with file and line.
        OSError: no such checkpoint.
    """
    _check(model_args, data_args, training_args)
    resume_from = resuming.checkpoint_to_resume(training_args)
    training_args.remove_unused_columns = False  # the sampler reads the lengths
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path
    )
    known = None if training_args.do_train else _labels_of(model_args.model_name_or_path)
    names, training, sets, without_label = _examples(data_args, training_args, tokenizer, known)
    model = load_model(
        AutoModelForSequenceClassification,
        model_args.model_name_or_path,
        "sequence classifier",
        model_args.attn_implementation,
        model_args.config_overrides,
        new_weights=HEAD_WEIGHTS if training_args.do_train else (),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    check_length("max_seq_length", data_args.max_seq_length, model)
    prefixes = [f"{name}_" for name in sets] if len(sets) > 1 else [""]
    runs.check_best_metric(
        training_args, [prefix + name for prefix in prefixes for name in ("loss", "accuracy")]
    )
    accuracy, confusion = load_metric("accuracy"), load_metric("confusion_matrix")

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return accuracy.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trainer = runs.InOrder(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=_Collator(
            tokenizer, data_args.max_seq_length if data_args.pad_to_max_length else None
        ),
        train_dataset=training,
        eval_dataset=sets if len(sets) > 1 else next(iter(sets.values()), None),
        compute_metrics=metrics,
        # The loss of Transformers' classifiers is a mean over a batch, which Trainer takes for one
        # over the whole step when it accumulates gradients or runs in several processes.
        compute_loss_func=_loss,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=stopping_args.callbacks(training_args),
    )
    results = runs.run_metadata("classification", model, training_args, data_args.max_seq_length)
    results["paper_row"] = model_args.paper_row
    results["labels"] = list(names)
    results["rows_without_label"] = without_label
    results["majority"] = {name: _majority(rows) for name, rows in sets.items()}

    def evaluate() -> dict[str, Any]:
        scores: dict[str, Any] = {}
        results["confusion_matrix"] = {}
        for name, rows in sets.items():
            prefix = f"eval_{name}" if len(sets) > 1 else "eval"
            predicted = trainer.predict(rows, metric_key_prefix=prefix)
            scores |= predicted.metrics
            chosen, right = predicted.predictions, predicted.label_ids
            results["confusion_matrix"][name] = confusion.compute(
                predictions=chosen, references=right, n_classes=len(names)
            )["confusion_matrix"]
            if trainer.is_world_process_zero():
                file = Path(training_args.output_dir) / f"predictions_{name}.csv"
                pairs = enumerate(zip(right, chosen, strict=True))
                write_predictions(
                    file, ((row, names[int(a)], names[int(b)]) for row, (a, b) in pairs)
                )
        return scores

    settings = (model_args, data_args, stopping_args, training_args)
    return runs.fit(trainer, settings, results, resume_from, evaluate, "text")


def _labels_of(checkpoint: str) -> tuple[str, ...] | None:
    """The labels a checkpoint was trained with; None where its configuration has no names."""
    config = AutoConfig.from_pretrained(checkpoint)
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    return None if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _loss(outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    return cross_entropy(outputs.logits, labels, num_items_in_batch)


def _majority(rows: Dataset) -> float:
    """Accuracy of always choosing the commonest label."""
    return max(Counter(rows["label"]).values()) / len(rows)


class _Collator:
    """Pads what the model reads, and leaves the lengths out."""

    def __init__(self, tokenizer, max_length: int | None):
        self.names = (*tokenizer.model_input_names, "label")
        padding = True if max_length is None else "max_length"
        self.pad = DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return self.pad(
            [{name: row[name] for name in self.names if name in row} for row in features]
        )


def _check(model_args, data_args, training_args) -> None:
    runs.check_run(training_args)
    if not model_args.model_name_or_path:
        raise ValueError("there is no model to start from; pass --model_name_or_path.")
    files = data_args.train_file or data_args.validation_file
    if files and data_args.dataset_name:
        raise ValueError("files and dataset_name are both given; keep one of them.")
    if data_args.held_out_rows is not None:
        check_int("held_out_rows", data_args.held_out_rows, 1)
        if data_args.validation_file or data_args.dataset_name or not data_args.train_file:
            raise ValueError(
                "held_out_rows takes rows of train_file; drop validation_file and dataset_name."
            )
    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    if training_args.do_train and not (data_args.train_file or data_args.dataset_name):
        raise ValueError("there are no rows to train on; pass --train_file or --dataset_name.")
    if evaluates and not (
        data_args.validation_file or data_args.dataset_name or data_args.held_out_rows
    ):
        raise ValueError(
            "there are no rows to evaluate on; pass --validation_file, --held_out_rows or "
            "--dataset_name."
        )
    name = "validation_split" if data_args.dataset_name else "validation_file"
    sources = getattr(data_args, name) or ()
    called = [data.set_name(source) for source in sources]
    if evaluates and len(set(called)) < len(called):
        raise ValueError(
            f"{name} must name sets that are called differently, got {list(sources)}, called "
            f"{called}."
        )
    if data_args.text_columns is not None and len(data_args.text_columns) not in (1, 2):
        raise ValueError(
            f"text_columns must be one column or two, got {len(data_args.text_columns)}."
        )
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(data_args, name) is not None:
            check_int(name, getattr(data_args, name), 1)
    check_int("max_seq_length", data_args.max_seq_length, 3)


def _examples(
    data_args: ClassificationDataArguments,
    training_args: TrainingArguments,
    tokenizer,
    known_labels: tuple[str, ...] | None,
) -> tuple[tuple[str, ...], Dataset | None, dict[str, Dataset]]:
    """Names of the labels, the examples to train on, and the sets to evaluate on by name."""
    columns = data.Columns(tuple(data_args.text_columns or ()), data_args.label_column)
    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    training, sets = None, {}
    if data_args.dataset_name:
        name, config = data_args.dataset_name, data_args.dataset_config_name
        if training_args.do_train:
            training = data.read_split(name, config, data_args.train_split, columns)
        if evaluates:
            for split in data_args.validation_split:
                sets[data.set_name(split)] = data.read_split(name, config, split, columns)
    else:
        if data_args.train_file:
            training = data.read_files(data_args.train_file, columns)
        if evaluates:
            for file in data_args.validation_file or ():
                sets[data.set_name(file)] = data.read_files([file], columns)
    seed = data_args.held_out_seed
    if data_args.held_out_rows is not None:
        order = np.random.default_rng(seed).permutation(len(training.labels))
        if data_args.held_out_rows >= len(order):
            raise ValueError(
                f"held_out_rows must leave rows to train on, got {data_args.held_out_rows} of "
                f"{len(order)}."
            )
        sets["held_out"] = training.part(order[: data_args.held_out_rows])
        training = training.part(order[data_args.held_out_rows :])
    parts = [part for part in (training, *sets.values()) if part is not None]
    without_label = sum(part.without_label for part in parts)
    # A label that only the evaluation knows is a fault, not a class.
    names = tuple(data_args.labels or known_labels or data.label_names(parts[:1]))
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"labels must differ in more than their case, got {list(names)}.")
    if known_labels and names != known_labels:
        raise ValueError(
            f"labels must be those of the checkpoint, {list(known_labels)}, got {list(names)}; "
            "drop --labels."
        )
    if len(names) < 2:
        raise ValueError(
            f"there must be two labels or more to learn, got {list(names)}; if the data has others "
            "elsewhere, declare all with --labels."
        )
    if len({len(part.texts[0]) for part in parts if part.texts}) > 1:
        raise ValueError(
            "the sets differ in whether they hold texts or pairs of texts; name the columns with "
            "--text_columns."
        )
    if not training_args.do_train:
        training = None

    def tokenised(part: data.LabelledTexts, where: str, limit: int | None) -> Dataset:
        if limit is not None and limit < len(part.labels):
            # Drawn for each part alone: an evaluation by itself takes the same rows.
            drawn = np.random.default_rng(seed).permutation(len(part.labels))
            part = part.part(np.sort(drawn[:limit]))
        return data.to_dataset(part, names, where).map(
            _tokenised,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": data_args.max_seq_length},
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=["text", "pair"],
            desc=f"tokenising {where}",
        )

    with training_args.main_process_first(desc="tokenising"):
        if training is not None:
            training = tokenised(training, "the training data", data_args.max_train_samples)
        sets = {
            name: tokenised(part, f"the set {name!r}", data_args.max_eval_samples)
            for name, part in sets.items()
        }
    return names, training, sets, without_label


def _tokenised(batch: dict[str, list], *, tokenizer, max_length: int) -> dict[str, list]:
    pairs = None if batch["pair"][0] is None else batch["pair"]
    encoded = tokenizer(batch["text"], pairs, truncation=True, max_length=max_length)
    return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}
