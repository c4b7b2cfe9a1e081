"""Classification of texts and pairs of texts with `Trainer`: MNLI and data of the same form."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)
from transformers.utils import logging

from mra_attention.checks import check_int, check_int_if_given
from mra_hf.configuration import AttentionSettings
from mra_hf.data import classification as data
from mra_hf.data.samples import check_amounts, sample_rows
from mra_hf.distance_bias import budget_for_a_global_block
from mra_hf.evaluation.metrics import load_metric
from mra_hf.loading import (
    check_length,
    leave_out_token_types,
    load_model,
    override,
    read_config,
)
from mra_hf.sparse_prediction import cross_entropy
from mra_hf.training import runs
from mra_hf.training.runs import option

logger = logging.get_logger(__name__)

#: Prefixes of the weights of sequence classifiers' heads, which may start at random.
HEAD_WEIGHTS = ("classifier.", "score.", "pre_classifier.", "bert.pooler.", "pooler.")
#: Key of the training data beside the evaluation sets, none of which has such a name.
_TRAIN = "<train>"


@dataclass
class ClassificationDataArguments:
    """Which texts and labels, and how they become sequences."""

    train_file: list[str] | None = option(
        None, "rows to train on: .tsv, .csv or .jsonl files (also .gz, .xz)"
    )
    validation_file: list[str] | None = option(
        None, "rows to evaluate on; each file is a separate set"
    )
    held_out_rows: int | None = option(
        None, "in place of validation_file: so many rows of train_file, drawn by seed"
    )
    held_out_seed: int = option(0, "the seed they are drawn by")
    dataset_name: str | None = option(
        None, "a dataset by name in place of files: nyu-mll/multi_nli"
    )
    dataset_config_name: str | None = option(None, "configuration of that dataset: mnli, for glue")
    train_split: str = option("train", "its split to train on")
    validation_split: list[str] = option(
        ["validation_matched", "validation_mismatched"], "its splits to evaluate on"
    )
    text_columns: list[str] | None = option(
        None, "the column with the text, or the two of a pair; not set: recognised"
    )
    label_column: str | None = option(None, "the column with the label; not set: recognised")
    labels: list[str] | None = option(
        None, "all labels in their order; not set: taken from the data"
    )
    skip_faulty_rows: bool = option(
        False,
        "leave rows of files out, counted, that have an empty text, no label (or -1 beside 0 to n) "
        "or cannot be read, in place of an error",
    )
    max_seq_length: int = option(512, "longer texts and pairs are cut to so many tokens")
    pad_to_max_length: bool = option(False, "pad every batch to max_seq_length, not to its longest")
    preprocessing_num_workers: int | None = option(None, "processes that tokenise; not set: one")
    max_train_samples: int | None = option(None, "train on so many rows, drawn by held_out_seed")
    max_eval_samples: int | None = option(None, "evaluate on so many rows of each set, likewise")


def run_classification(
    model_args: runs.ModelArguments,
    data_args: ClassificationDataArguments,
    stopping_args: runs.StoppingArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate a sequence classifier; `Experiment.fit` says what is written.

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
    settings = (model_args, data_args, stopping_args, training_args)
    experiment = runs.Experiment("classification", "text", *settings)
    tokenizer = model_args.load_tokenizer()
    checkpoint = model_args.model_name_or_path
    assert checkpoint is not None  # `_check`
    config = read_config(checkpoint)
    if leave_out_token_types(tokenizer, getattr(config, "type_vocab_size", None)):
        logger.warning(
            "The tokenizer's token types are left out: the model has one type only "
            "(type_vocab_size 1)."
        )
    texts = _read_texts(data_args, training_args)
    for note in (data.left_out(texts), data.note_minus_one(texts.values(), data_args.labels or ())):
        if note:
            logger.warning(note)
    trained_labels = None if training_args.do_train else _labels_of(checkpoint)
    names = _label_names(data_args, texts, trained_labels)
    sets = _tokenise(data_args, training_args, tokenizer, names, texts)
    training = sets.pop(_TRAIN, None)
    model = load_model(
        AutoModelForSequenceClassification,
        checkpoint,
        "sequence classifier",
        model_args.attn_implementation,
        model_args.config_overrides,
        new_weights=HEAD_WEIGHTS if training_args.do_train else (),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **_global_block(model_args, training_args.do_train),
    )
    check_length("max_seq_length", data_args.max_seq_length, model)
    prefixes = {name: f"eval_{name}" if len(sets) > 1 else "eval" for name in sets}
    metrics = [f"{prefix}_{name}" for prefix in prefixes.values() for name in ("loss", "accuracy")]
    runs.check_best_metric(training_args, metrics)
    trainer = runs.ChoiceTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=_Collator(
            tokenizer, data_args.max_seq_length if data_args.pad_to_max_length else None
        ),
        train_dataset=training,
        eval_dataset=sets if len(sets) > 1 else next(iter(sets.values()), None),
        # The loss of Transformers' classifiers is a mean over a batch. Trainer takes it for a mean
        # over the whole step when it accumulates gradients or runs in several processes.
        compute_loss_func=_loss,
        callbacks=stopping_args.callbacks(training_args),
    )
    confusion = load_metric("confusion_matrix")

    def evaluate() -> dict[str, Any]:
        scores: dict[str, Any] = {}
        matrices = experiment.results["confusion_matrix"] = {}
        for name, rows in sets.items():
            predicted = trainer.predict(rows, metric_key_prefix=prefixes[name])
            scores |= predicted.metrics or {}
            answers = {"predictions": predicted.predictions, "references": predicted.label_ids}
            counts = confusion.compute(**answers, n_classes=len(names))
            matrices[name] = counts["confusion_matrix"]
            trainer.save_predictions(name, predicted, names)
        return scores

    conditions = {
        "paper_row": model_args.paper_row,
        "labels": list(names),
        "rows_without_label": sum(each.without_label for each in texts.values()),
        "rows_without_text": sum(each.without_text for each in texts.values()),
        "faulty_rows": sum(each.faulty for each in texts.values()),
        "majority": {name: _majority(rows) for name, rows in sets.items()},
    }
    return experiment.fit(trainer, data_args.max_seq_length, conditions, evaluate)


def _global_block(model_args, do_train: bool) -> dict[str, int]:
    """The prior on the first block for a new head on a model with a distance bias: the head reads
    the first token, which text beyond the window of the bias could not reach, so its block becomes
    global, as `mra-hf convert` makes it for classifiers. `config_overrides` may say otherwise.
    """
    config, overrides = read_config(model_args.model_name_or_path), ""
    if model_args.config_overrides:
        overrides = model_args.config_overrides
        override(config, overrides)
    if "initial_prior_first_n_blocks" in overrides:
        return {}
    has_head = any("SequenceClassification" in name for name in config.architectures or ())
    is_biased = getattr(config, "distance_bias_window", None) is not None
    if not do_train or has_head or not is_biased or config.initial_prior_first_n_blocks:
        return {}
    settings = AttentionSettings.of(config)
    needed = budget_for_a_global_block(settings)
    if min(settings.layer_budgets) < needed:
        logger.warning(
            f"The first block is not global: that needs a block_per_row of {needed}. The head "
            "reads the first token, which sees text beyond the distance bias's window poorly."
        )
        return {}
    logger.warning(
        "The first block is made global (initial_prior_first_n_blocks=1), so that the first token, "
        "which the new head reads, sees the whole text in spite of the distance bias."
    )
    return {"initial_prior_first_n_blocks": 1}


def _labels_of(checkpoint: str) -> tuple[str, ...] | None:
    """The labels a checkpoint was trained with; None where its configuration does not name them."""
    config = read_config(checkpoint)
    labels: dict[Any, str] = config.id2label or {}
    names = tuple(labels[number] for number in range(len(labels)))
    return None if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _loss(outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    return cross_entropy(outputs.logits, labels, num_items_in_batch)


def _majority(rows: Dataset) -> float:
    """Accuracy of always answering with the commonest label."""
    return max(Counter(rows["label"]).values()) / len(rows)


class _Collator:
    """Pads the columns that the model reads, and leaves the lengths out."""

    def __init__(self, tokenizer, max_length: int | None):
        self.names = (*tokenizer.model_input_names, "label")
        padding = True if max_length is None else "max_length"
        self.pad = DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return self.pad(
            [{name: row[name] for name in self.names if name in row} for row in features]
        )


def _evaluates(training_args: TrainingArguments) -> bool:
    return training_args.do_eval or training_args.eval_strategy != "no"


def _check(model_args, data_args, training_args) -> None:
    runs.check_run(training_args)
    check_int_if_given("preprocessing_num_workers", data_args.preprocessing_num_workers, 0)
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
    if training_args.do_train and not (data_args.train_file or data_args.dataset_name):
        raise ValueError("there are no rows to train on; pass --train_file or --dataset_name.")
    evaluates = _evaluates(training_args)
    if evaluates and not (
        data_args.validation_file or data_args.dataset_name or data_args.held_out_rows
    ):
        raise ValueError(
            "there are no rows to evaluate on; "
            "pass --validation_file, --held_out_rows or --dataset_name."
        )
    name = "validation_split" if data_args.dataset_name else "validation_file"
    sources = getattr(data_args, name) or ()
    set_names = [data.set_name(source) for source in sources]
    if evaluates and len(set(set_names)) < len(set_names):
        raise ValueError(
            f"{name} must name sets that are called differently, "
            f"got {list(sources)}, called {set_names}."
        )
    if data_args.text_columns is not None and len(data_args.text_columns) not in (1, 2):
        raise ValueError(
            f"text_columns must be one column or two, got {len(data_args.text_columns)}."
        )
    check_amounts(
        max_train_samples=data_args.max_train_samples, max_eval_samples=data_args.max_eval_samples
    )
    check_int("max_seq_length", data_args.max_seq_length, 3)


def _read_texts(
    data_args: ClassificationDataArguments, training_args: TrainingArguments
) -> dict[str, data.LabelledTexts]:
    """The rows of the training data, if there are any, and of the sets to evaluate on, by name.

    Training files are read for an evaluation too: its rows may be held out of them.
    """
    columns = data.Columns(tuple(data_args.text_columns or ()), data_args.label_column)
    declared = data_args.labels or ()
    of_files: dict[str, Any] = {"skip_faulty": data_args.skip_faulty_rows, "declared": declared}
    texts = {}
    if data_args.dataset_name:
        dataset = (data_args.dataset_name, data_args.dataset_config_name)
        if training_args.do_train:
            texts[_TRAIN] = data.read_split(*dataset, data_args.train_split, columns, declared)
        if _evaluates(training_args):
            for split in data_args.validation_split:
                texts[data.set_name(split)] = data.read_split(*dataset, split, columns, declared)
        return texts
    if data_args.train_file:
        texts[_TRAIN] = data.read_files(data_args.train_file, columns, **of_files)
    if _evaluates(training_args):
        for file in data_args.validation_file or ():
            texts[data.set_name(file)] = data.read_files([file], columns, **of_files)
    count = data_args.held_out_rows
    if count is not None:
        rows = texts[_TRAIN]
        order = np.random.default_rng(data_args.held_out_seed).permutation(len(rows.labels))
        if count >= len(order):
            raise ValueError(
                f"held_out_rows must leave rows to train on, got {count} of {len(order)}."
            )
        kept = rows.select(order[count:])
        kept = replace(
            kept,
            without_label=rows.without_label,
            without_text=rows.without_text,
            faulty=rows.faulty,
        )
        texts = {_TRAIN: kept, "held_out": rows.select(order[:count])}
    return texts


def _label_names(
    data_args: ClassificationDataArguments,
    texts: Mapping[str, data.LabelledTexts],
    trained_labels: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """Names of the labels in their order.

    Args:
        data_args: may declare them.
        texts: as `_read_texts` returns them.
        trained_labels: the labels of a checkpoint that is only evaluated, if it names them.

    Raises:
        ValueError: too few labels, two that differ only in case, or other labels than the
            checkpoint's; or some sets hold texts and others pairs.
    """
    all_texts = list(texts.values())
    # A label that only an evaluation set has beside training data is a fault, not a class.
    names = tuple(data_args.labels or trained_labels or data.label_names(all_texts[:1]))
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"labels must differ in more than their case, got {list(names)}.")
    if trained_labels and names != trained_labels:
        raise ValueError(
            f"labels must be those of the checkpoint, {list(trained_labels)}, got {list(names)}; "
            "drop --labels."
        )
    if len(names) < 2:
        raise ValueError(
            f"there must be two labels or more to learn, got {list(names)}; "
            "if the data has others elsewhere, declare all with --labels."
        )
    if len({len(each.texts[0]) for each in all_texts if each.texts}) > 1:
        raise ValueError(
            "the sets differ in whether they hold texts or pairs of texts; "
            "name the columns with --text_columns."
        )
    return names


def _tokenise(
    data_args, training_args, tokenizer, names: tuple[str, ...], texts: Mapping
) -> dict[str, Dataset]:
    """The sets as token ids, cut to `max_*_samples` rows; training data only for a training."""

    def tokenised(name: str, part: data.LabelledTexts) -> Dataset:
        is_train = name == _TRAIN
        limit = data_args.max_train_samples if is_train else data_args.max_eval_samples
        where = "the training data" if is_train else f"the set {name!r}"
        # Drawn for each set by itself, so that an evaluation without training takes the same rows.
        rows = sample_rows(len(part.labels), limit, data_args.held_out_seed)
        return data.to_dataset(part.select(rows), names, where).map(
            _tokenise_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "max_length": data_args.max_seq_length},
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=["text", "pair"],
            desc=f"tokenising {where}",
        )

    with training_args.main_process_first(desc="tokenising"):
        return {
            name: tokenised(name, part)
            for name, part in texts.items()
            if name != _TRAIN or training_args.do_train
        }


def _tokenise_batch(batch: dict[str, list], *, tokenizer, max_length: int) -> dict[str, list]:
    pairs = None if batch["pair"][0] is None else batch["pair"]
    encoded = tokenizer(batch["text"], pairs, truncation=True, max_length=max_length)
    return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}
