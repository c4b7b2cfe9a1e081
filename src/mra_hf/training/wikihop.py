"""WikiHop-like questions with `Trainer`: settings, examples, accuracy and predictions."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from mra_attention.checks import check_int
from mra_hf.configuration import AttentionSettings
from mra_hf.data import wikihop
from mra_hf.data.samples import check_amounts
from mra_hf.loading import check_length, load_model, override, read_config
from mra_hf.modeling import MraForCandidateChoice
from mra_hf.results.files import write_predictions, write_text
from mra_hf.training import runs
from mra_hf.training.runs import option

PREDICTIONS_NAME = "predictions.json"

#: `block_per_row` -> first block rows and columns that are always exact, as the paper's WikiHop
#: runs had it: question and candidates stand there.
PAPER_FIRST_BLOCKS = {8: 3, 16: 5}


@dataclass
class WikiHopDataArguments:
    """Which questions, and how they become sequences."""

    train_file: str | None = option(None, "questions to train on: JSON in WikiHop's schema")
    validation_file: str | None = option(None, "questions to evaluate on, in the same schema")
    max_seq_length: int = option(4096, "tokens of a sequence; longer questions take several")
    without_supports: bool = option(
        False, "control: question and candidates only, no documents to read"
    )
    shuffle_parts: bool = option(
        True, "train on candidates and supports in an order drawn from the seed"
    )
    initial_prior_first_n_blocks: int | None = option(
        None,
        "first block rows and columns that are always exact and take no distance bias: question "
        "and candidates stand there, and must see every support; not set: the paper's, 3 with 8 "
        "blocks per row, 5 with 16, else half of what fits",
    )
    max_train_samples: int | None = option(None, "train on the first so many questions")
    max_eval_samples: int | None = option(None, "evaluate on the first so many questions")


def run_wikihop(
    model_args: runs.ModelArguments,
    data_args: WikiHopDataArguments,
    stopping_args: runs.StoppingArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate `MraForCandidateChoice`; `Experiment.fit` says what is written.

    With `do_eval`, `predictions.json` holds the model's answer to each question of
    `validation_file`, by id, as WikiHop's evaluation reads it; `predictions_eval.csv` has the right
    answers beside them.

    Args:
        model_args: a checkpoint of type `mra_hf`.
        data_args: which questions.
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
    experiment = runs.Experiment("wikihop", "question", *settings)
    tokenizer = model_args.load_tokenizer()
    checkpoint = model_args.model_name_or_path
    assert checkpoint is not None  # `_check`
    model = load_model(
        MraForCandidateChoice,
        checkpoint,
        "candidate scorer",
        model_args.attn_implementation,
        model_args.config_overrides,
        new_weights=("scorer.",) if training_args.do_train else (),
        **_priors(model_args, data_args, training_args.do_train),
    )
    check_length("max_seq_length", data_args.max_seq_length, model)
    wikihop.add_markers(tokenizer)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if len(tokenizer) > embeddings.num_embeddings:
        # The new rows are drawn like all others at the start of training, as in the paper's runs.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    data = {}
    with training_args.main_process_first(desc="tokenising"):
        if training_args.do_train:
            seed = training_args.seed if data_args.shuffle_parts else None
            data["train"] = _examples(
                data_args.train_file, data_args, tokenizer, data_args.max_train_samples, seed
            )
        if training_args.do_eval:
            data["eval"] = _examples(
                data_args.validation_file, data_args, tokenizer, data_args.max_eval_samples, None
            )
    trainer = runs.ChoiceTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=wikihop.CandidateCollator(tokenizer.pad_token_id),
        train_dataset=data.get("train"),
        eval_dataset=data.get("eval"),
        callbacks=stopping_args.callbacks(training_args),
    )
    conditions: dict[str, Any] = {
        "paper_row": model_args.paper_row,
        "lengths": {name: _lengths(examples) for name, examples in data.items()},
    }
    if "eval" in data:
        conditions["guessing"] = _guessing(data["eval"])

    def evaluate() -> dict[str, Any]:
        predicted = trainer.predict(data["eval"], metric_key_prefix="eval")
        if trainer.is_world_process_zero():
            answers = predicted.predictions
            assert isinstance(answers, np.ndarray)
            _write_answers(runs.output_folder(training_args), data["eval"], answers)
        return predicted.metrics or {}

    return experiment.fit(trainer, data_args.max_seq_length, conditions, evaluate)


def _check(model_args, data_args, training_args) -> None:
    runs.check_run(training_args)
    runs.check_best_metric(training_args, ("loss", "accuracy"))
    if not model_args.model_name_or_path:
        raise ValueError(
            "there is no model to start from; "
            "pass --model_name_or_path, a checkpoint made with mra-hf convert."
        )
    evaluates = training_args.do_eval or training_args.eval_strategy != "no"
    needs_file = {"train_file": training_args.do_train, "validation_file": evaluates}
    for name, is_needed in needs_file.items():
        if is_needed and not getattr(data_args, name):
            raise ValueError(f"there are no questions to read; pass --{name}.")
    check_amounts(
        max_train_samples=data_args.max_train_samples, max_eval_samples=data_args.max_eval_samples
    )
    check_int("max_seq_length", data_args.max_seq_length, 1)


def _priors(model_args, data_args, do_train: bool) -> dict[str, int]:
    """The prior on first blocks, as a setting of the configuration that the model is loaded with.

    A model that is only evaluated keeps the prior it was trained with unless another is asked for.
    """
    config = read_config(model_args.model_name_or_path)
    if config.model_type != "mra_hf":
        raise ValueError(
            f"model_name_or_path must be a checkpoint of type mra_hf, "
            f"and {model_args.model_name_or_path} is of type {config.model_type}; "
            "convert it with mra-hf convert (attn_implementation sdpa then gives the dense model)."
        )
    if model_args.config_overrides:
        override(config, model_args.config_overrides)
    if data_args.initial_prior_first_n_blocks is not None:
        return {"initial_prior_first_n_blocks": data_args.initial_prior_first_n_blocks}
    if not do_train or config.resolutions is not None:  # the paper's priors are for two scales
        return {}
    diagonal = config.initial_prior_diagonal_n_blocks
    band = 2 * (diagonal // 2) + 1 if diagonal else 0
    block_per_row = min(AttentionSettings.of(config).layer_budgets)
    largest = max(0, (block_per_row - band - 1) // 2)
    first_blocks = PAPER_FIRST_BLOCKS.get(block_per_row, largest // 2 + largest % 2)
    return {"initial_prior_first_n_blocks": min(first_blocks, largest)}


def _examples(file, data_args, tokenizer, limit: int | None, seed: int | None) -> Dataset:
    """The questions of a file as token ids: id, candidates, input_ids (a list of sequences),
    candidate_spans, label, and length, the tokens of all sequences.
    """
    instances = wikihop.read_wikihop(file)[:limit]
    if seed is not None:
        instances = [wikihop.shuffled(instance, seed) for instance in instances]
    if data_args.without_supports:
        instances = [instance | {"supports": []} for instance in instances]
    used = ("id", "query", "answer", "candidates", "supports")
    rows = Dataset.from_list([{name: row[name] for name in used} for row in instances])

    def assembled(batch: dict[str, list]) -> dict[str, list]:
        questions = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        names = ("input_ids", "candidate_spans", "label", "length")
        columns: dict[str, list] = {name: [] for name in names}
        all_parts = wikihop.tokenize_parts(questions, tokenizer)
        for question, parts in zip(questions, all_parts, strict=True):
            sequences = wikihop.assemble(parts, tokenizer, data_args.max_seq_length, question["id"])
            columns["input_ids"].append([sequence.input_ids for sequence in sequences])
            columns["candidate_spans"].append(sequences[0].candidate_spans)
            columns["label"].append(question["candidates"].index(question["answer"]))
            columns["length"].append(sum(len(sequence.input_ids) for sequence in sequences))
        return columns

    return rows.map(
        assembled,
        batched=True,
        batch_size=100,
        remove_columns=["query", "answer", "supports"],
        desc="assembling questions",
    )


def _write_answers(folder: Path, data: Dataset, predictions: np.ndarray) -> None:
    """Write the predictions in WikiHop's format, and beside the answers."""
    rows = data.select_columns(["id", "candidates"])
    answers = {
        row["id"]: row["candidates"][int(number)]
        for row, number in zip(rows, predictions, strict=True)
    }
    text = json.dumps(answers, indent=1, ensure_ascii=False) + "\n"
    write_text(folder / PREDICTIONS_NAME, text)
    table = zip(answers, _right_answers(data), answers.values(), strict=True)
    write_predictions(folder / "predictions_eval.csv", table)


def _lengths(data: Dataset) -> dict[str, float]:
    """Tokens of the questions, and how many questions take several sequences."""
    lengths = np.array(data["length"])
    return {
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "in_several_pieces": sum(len(sequences) > 1 for sequences in data["input_ids"]),
    }


def _right_answers(data: Dataset) -> list[str]:
    return [row["candidates"][row["label"]] for row in data.select_columns(["candidates", "label"])]


def _guessing(data: Dataset) -> dict[str, float]:
    """Accuracy without reading: of a random candidate, and of the candidate that is the answer to
    most of these questions, a rule that knows the answers.
    """
    answers = _right_answers(data)
    counts = Counter(answers)
    commonest = (max(names, key=lambda name: counts[name]) for names in data["candidates"])
    return {
        "random": float(np.mean([1 / len(names) for names in data["candidates"]])),
        "majority": float(np.mean([a == b for a, b in zip(answers, commonest, strict=True)])),
    }
