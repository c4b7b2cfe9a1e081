"""Masked language modelling with `Trainer`: settings, examples, loss and metrics."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from mra_attention.checks import check_int, check_int_if_given
from mra_hf.data.masking import NewMasksEveryEpoch, SeededMasking
from mra_hf.data.mlm import check_files, is_unreadable, load_documents, pack
from mra_hf.data.samples import check_amounts
from mra_hf.loading import check_length, load_masked_lm, override, with_attention
from mra_hf.sparse_prediction import cross_entropy, labelled_logits, predict_labelled_positions
from mra_hf.training import runs
from mra_hf.training.initialization import init_previous_token_heads
from mra_hf.training.runs import option

#: Seed of the masks of an evaluation: the same tokens are hidden every time.
EVALUATION_SEED = 0


@dataclass
class MaskedLMModelArguments(runs.ModelArguments):
    """Which model: a checkpoint to train further, or sizes to start from scratch with."""

    model_type: str = option("roberta", "architecture from scratch: roberta, mra_hf, ...")
    start_with_neighbours: bool = option(
        False, "from scratch: heads of the first layer begin by reading neighbours"
    )
    sparse_prediction: bool = option(
        True, "while training, compute logits at masked positions only"
    )


@dataclass
class MaskedLMDataArguments:
    """Which text, and how it becomes examples."""

    train_file: list[str] | None = option(
        None, "text: .txt or .jsonl files, folders of them, or glob patterns"
    )
    validation_file: list[str] | None = option(None, "held-out text, as train_file")
    dataset_name: str | None = option(None, "a dataset by name, in place of files")
    dataset_config_name: str | None = option(None, "configuration of that dataset")
    train_split: str = option("train", "its split to train on")
    validation_split: str = option("validation", "its split to evaluate on")
    text_column: str = option("text", "the column with the text")
    max_seq_length: int = option(512, "tokens of an example, special tokens included")
    mlm_probability: float = option(0.15, "share of the tokens to predict while training")
    streaming: bool = option(False, "read the training text while training; needs max_steps")
    preprocessing_num_workers: int | None = option(None, "processes that tokenise; not set: one")
    max_train_samples: int | None = option(None, "train on the first so many examples")
    max_eval_samples: int | None = option(None, "evaluate on the first so many examples")


def run_masked_lm(
    model_args: MaskedLMModelArguments,
    data_args: MaskedLMDataArguments,
    stopping_args: runs.StoppingArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train and evaluate a masked language model; `Experiment.fit` says what is written.

    Args:
        model_args: which model.
        data_args: which text.
        stopping_args: when to stop early.
        training_args: of `Trainer`; `do_train` and `do_eval` say what is done.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: settings that contradict one another, each with what to do.
        OSError: no such checkpoint.
    """
    _check(model_args, data_args, training_args)
    settings = (model_args, data_args, stopping_args, training_args)
    experiment = runs.Experiment("masked-lm", "masked token", *settings)
    tokenizer = model_args.load_tokenizer()
    model = _masked_lm(model_args, tokenizer)
    check_length(
        "max_seq_length",
        data_args.max_seq_length,
        model,
        "convert the checkpoint to a longer one with mra-hf convert --max-length"
        if model_args.model_name_or_path
        else "give the new model more with --config_overrides max_position_embeddings=N (RoBERTa: "
        "tokens + 2)",
    )
    with _naming_faults(data_args):
        training, validation = _examples(data_args, training_args, tokenizer)
    masking = SeededMasking(
        tokenizer, masking_seed=training_args.seed, mlm_probability=data_args.mlm_probability
    )
    trainer = MaskedLMTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=masking,
        train_dataset=training,
        eval_dataset=validation,
        compute_metrics=masked_lm_metrics,
        compute_loss_func=None if model_args.sparse_prediction else _loss_at_labels,
        callbacks=[NewMasksEveryEpoch(masking), *stopping_args.callbacks(training_args)],
    )
    trainer.model_accepts_loss_kwargs = True  # both ways of computing the loss divide by the count
    if model_args.sparse_prediction:
        predict_labelled_positions(model)
    conditions = {"paper_row": model_args.paper_row, "vocabulary": len(tokenizer)}
    with _naming_faults(data_args):
        return experiment.fit(trainer, data_args.max_seq_length, conditions, trainer.evaluate)


class MaskedLMTrainer(Trainer):
    """`Trainer` whose evaluations hide the same tokens every time, all behind the mask token, and
    compute logits at those positions only: full logits of a long example can take gigabytes.
    """

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s, with a collator for evaluation: 15 % of the tokens, a fixed seed."""
        training_collator = self.data_collator
        self.data_collator = SeededMasking(
            self.processing_class,
            masking_seed=EVALUATION_SEED,
            mlm_probability=0.15,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
        )
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss, (correct, nll) and the labels, all three `[B, N]`: per position, whether
        the label has the highest logit, and its negative log-likelihood in nats.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        labelled = labels != -100
        plain = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast(), labelled_logits(plain):
            logits = model(**inputs, labels=labels).logits
        log_probabilities = logits.float().log_softmax(-1)  # [labelled, vocabulary]
        targets = labels[labelled]
        correct = torch.zeros(labels.shape, device=labels.device)
        nll = torch.zeros_like(correct)
        correct[labelled] = (log_probabilities.argmax(-1) == targets).float()
        nll[labelled] = -log_probabilities.gather(1, targets[:, None])[:, 0]
        loss = nll.sum() / max(1, len(targets))
        return (loss, None, None) if prediction_loss_only else (loss, (correct, nll), labels)


def _loss_at_labels(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """The loss from full logits `[B, N, vocabulary]`, as with `sparse_prediction`."""
    labelled = labels != -100
    return cross_entropy(outputs.logits[labelled], labels[labelled], num_items_in_batch)


def masked_lm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood in nats, and bits per masked token."""
    predictions: Any = prediction.predictions
    correct, nll = predictions
    labels = prediction.label_ids
    assert isinstance(labels, np.ndarray)
    labelled = labels != -100
    mean = float(nll[labelled].mean())
    return {
        "accuracy": float(correct[labelled].mean()),
        "nll": mean,
        "bits_per_token": mean / math.log(2),
        "masked_tokens": int(labelled.sum()),
    }


def _check(model_args, data_args, training_args) -> None:
    runs.check_run(training_args)
    check_int_if_given("preprocessing_num_workers", data_args.preprocessing_num_workers, 0)
    runs.check_best_metric(training_args, ("loss", "accuracy", "nll", "bits_per_token"))
    if str(training_args.metric_for_best_model).removeprefix("eval_") in ("nll", "bits_per_token"):
        training_args.greater_is_better = False  # Trainer knows this only of names ending in "loss"
    if not model_args.model_name_or_path and not model_args.tokenizer_name:
        raise ValueError(
            "training from scratch needs a tokenizer; pass --tokenizer_name, "
            "or a checkpoint with --model_name_or_path."
        )
    if model_args.model_name_or_path is None and not training_args.do_train:
        raise ValueError("there is no model to evaluate; pass --model_name_or_path.")
    if model_args.model_name_or_path and model_args.start_with_neighbours:
        raise ValueError("start_with_neighbours is for training from scratch; drop it.")
    if model_args.sparse_prediction and training_args.n_gpu > 1:
        raise ValueError(
            "one process cannot train on several GPUs with sparse_prediction; "
            "start it with torchrun or accelerate launch."
        )
    check_amounts(
        max_train_samples=data_args.max_train_samples, max_eval_samples=data_args.max_eval_samples
    )
    check_int("max_seq_length", data_args.max_seq_length, 3)
    if not 0 < data_args.mlm_probability < 1:
        raise ValueError(
            f"mlm_probability must lie in (0, 1), got {data_args.mlm_probability}; 0.15 is usual."
        )
    needs_file = {"train_file": training_args.do_train, "validation_file": training_args.do_eval}
    for name, is_needed in needs_file.items():
        files = getattr(data_args, name)
        if files and data_args.dataset_name:
            raise ValueError(f"{name} and dataset_name are both given; keep one of them.")
        if is_needed and not files and not data_args.dataset_name:
            raise ValueError(f"there is no text to read; pass --{name} or --dataset_name.")
    if data_args.streaming and data_args.dataset_name and "[" in data_args.train_split:
        raise ValueError(
            f"a slice of a split cannot be streamed, got train_split={data_args.train_split!r}; "
            "name a whole split, or leave streaming off."
        )
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("streaming text has no known length; say how long with --max_steps.")


@contextlib.contextmanager
def _naming_faults(data_args: MaskedLMDataArguments) -> Iterator[None]:
    """Where streamed text turns out to be faulty, raise an error that names file and line."""
    try:
        yield
    except (ValueError, RuntimeError, StopIteration) as error:
        if data_args.streaming and data_args.train_file and is_unreadable(error):
            check_files(data_args.train_file, data_args.text_column)
        raise


def _masked_lm(model_args: MaskedLMModelArguments, tokenizer) -> PreTrainedModel:
    if model_args.model_name_or_path:
        choices = (model_args.attn_implementation, model_args.config_overrides)
        return load_masked_lm(model_args.model_name_or_path, *choices)
    config = AutoConfig.for_model(
        model_args.model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if model_args.config_overrides:
        override(config, model_args.config_overrides)
    model = AutoModelForMaskedLM.from_config(config)
    if model_args.start_with_neighbours:
        init_previous_token_heads(model)
    return with_attention(model, model_args.attn_implementation)


def _examples(data_args: MaskedLMDataArguments, training_args, tokenizer):
    """The packed datasets for training and evaluation; None for one that is not asked for."""

    def packed(files, split: str, limit: int | None, streaming: bool = False):
        source = files or data_args.dataset_name
        assert source is not None  # `_check`
        documents = load_documents(
            source,
            config_name=data_args.dataset_config_name,
            split=split,
            text_column=data_args.text_column,
            streaming=streaming,
        )
        workers = data_args.preprocessing_num_workers
        with training_args.main_process_first(desc="packing"):
            examples = pack(documents, tokenizer, data_args.max_seq_length, workers=workers)
        if limit is not None:
            examples = examples.take(limit if streaming else min(limit, len(examples)))
        is_empty = next(iter(examples), None) is None if streaming else len(examples) == 0
        if is_empty:
            raise ValueError(
                f"the text ({files or split}) is shorter than one example of "
                f"{data_args.max_seq_length} tokens; pass more text or a smaller max_seq_length."
            )
        return examples

    training = validation = None
    if training_args.do_train:
        limit, streaming = data_args.max_train_samples, data_args.streaming
        training = packed(data_args.train_file, data_args.train_split, limit, streaming)
        if data_args.streaming:
            training = training.shuffle(seed=training_args.seed, buffer_size=1000)
    if training_args.do_eval:
        validation = packed(
            data_args.validation_file, data_args.validation_split, data_args.max_eval_samples
        )
    return training, validation
