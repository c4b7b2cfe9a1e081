"""Training with `Trainer`: the arguments of experiments, masked language modelling, result files.

An experiment is described by dataclasses: a key of its YAML file *is* a field, the command line
overrides it, and what was in force is saved beside the result.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

import mra_hf
from mra_attention.api import check_int
from mra_hf.analysis.training_curve import plot_training_curve
from mra_hf.data.mlm import load_documents, pack
from mra_hf.evaluation import masked_lm_head
from mra_hf.experiment_files import save_experiment, write_history
from mra_hf.masked_lm import (
    check_length,
    cross_entropy,
    load_masked_lm,
    override,
    predict_masked_places,
    with_attention,
)
from mra_hf.neighbour_heads import start_with_neighbours

EXPERIMENT_NAME = "experiment.yaml"
RESULTS_NAME = "results.json"
HISTORY_NAME = "training_curve.csv"
PICTURE_NAME = "training_curve.png"

#: Seed of the masks of an evaluation: the same tokens are hidden every time.
EVALUATION_SEED = 0


@dataclass
class ModelArguments:
    """Which model: a checkpoint to go on with, or sizes to start from scratch with."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "checkpoint with a masked-LM head to go on from; not set: from scratch"},
    )
    model_type: str = field(
        default="roberta", metadata={"help": "architecture from scratch: roberta, mra_hf, ..."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "settings of the configuration: hidden_size=192,num_hidden_layers=4"},
    )
    start_with_neighbours: bool = field(
        default=False,
        metadata={"help": "from scratch: heads of the first layer begin by reading neighbours"},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer; not set: that of the checkpoint"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "mra2, mra2_s, sdpa, ...; not set: the model's own"}
    )
    sparse_prediction: bool = field(
        default=True,
        metadata={"help": "while training, compute logits at the masked places alone"},
    )


@dataclass
class MaskedLMDataArguments:
    """Which text, and how it becomes examples."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "text: .txt or .jsonl files, folders of them, or glob patterns"},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "held-out text, as train_file"}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "a dataset by name, in place of files"}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration of that dataset"}
    )
    train_split: str = field(default="train", metadata={"help": "its split to train on"})
    validation_split: str = field(
        default="validation", metadata={"help": "its split to evaluate on"}
    )
    text_column: str = field(default="text", metadata={"help": "the column with the text"})
    max_seq_length: int = field(
        default=512, metadata={"help": "tokens of an example, special tokens included"}
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "share of the tokens to predict while training"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the training text while training; needs max_steps"}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "processes that tokenise; not set: one"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "train on the first so many examples"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on the first so many examples"}
    )


def run_masked_lm(
    model_args: ModelArguments, data_args: MaskedLMDataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """Train and evaluate a masked language model; write everything to `output_dir`.

    `output_dir` gets the model and its tokenizer, `experiment.yaml` (the settings in force),
    `results.json` (the metrics and their conditions), `training_curve.csv` and its picture.

    Args:
        model_args: which model.
        data_args: which text.
        training_args: of `Trainer`; `do_train` and `do_eval` say what is done.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: settings that contradict one another, each with what to do.
        OSError: no such checkpoint.
    """
    _check(model_args, data_args, training_args)
    last_checkpoint = _checkpoint_to_resume(training_args)
    training_args.remove_unused_columns = False  # the collator reads special_tokens_mask
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path
    )
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
    training, validation = _examples(data_args, training_args, tokenizer)
    trainer = MaskedLMTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=data_args.mlm_probability
        ),
        train_dataset=training,
        eval_dataset=validation,
        compute_metrics=masked_lm_metrics,
        compute_loss_func=None if model_args.sparse_prediction else _loss_at_labels,
    )
    trainer.model_accepts_loss_kwargs = True  # both ways of computing the loss divide by the count
    if model_args.sparse_prediction:
        predict_masked_places(model)
    results = _conditions(model, tokenizer, data_args, training_args)
    output = Path(training_args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    settings = (model_args, data_args, training_args)
    if training_args.do_train:
        trained = trainer.train(resume_from_checkpoint=last_checkpoint)
        results["train"] = trained.metrics | {"steps": trainer.state.global_step}
        if last_checkpoint is not None:  # the runtime is that of the steps since
            results["train"]["resumed_from"] = Path(last_checkpoint).name
        trainer.save_model()
        trainer.save_state()
        _write(trainer, output, settings, results)  # the last evaluation may fail
    if training_args.do_eval:
        results["eval"] = trainer.evaluate()
    _write(trainer, output, settings, results)
    return results


def _write(trainer: Trainer, output: Path, settings: tuple, results: dict[str, Any]) -> None:
    """Settings, results, curve and its picture, by one process."""
    if not trainer.is_world_process_zero():
        return
    save_experiment(output / EXPERIMENT_NAME, *settings)
    (output / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n")
    if trainer.args.do_train:
        rows = write_history(trainer.state.log_history, output / HISTORY_NAME)
        title = f"{results['model_type']}, {results['max_seq_length']} tokens"
        plot_training_curve(rows, output / PICTURE_NAME, title)


class MaskedLMTrainer(Trainer):
    """`Trainer` whose evaluations hide the same tokens every time, all behind the mask token, and
    compute logits at those places alone: all of a long example can take gigabytes.
    """

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s, with a collator of its own: 15 % of the tokens, a fixed seed."""
        of_training = self.data_collator
        self.data_collator = DataCollatorForLanguageModeling(
            self.processing_class,
            mlm_probability=0.15,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            seed=EVALUATION_SEED,
        )
        # The generator of the masks belongs to one pass of one process.
        workers, self.args.dataloader_num_workers = self.args.dataloader_num_workers, 0
        persistent = self.args.dataloader_persistent_workers
        self.args.dataloader_persistent_workers = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = of_training
            self.args.dataloader_num_workers = workers
            self.args.dataloader_persistent_workers = persistent

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss; per place, is the label the highest logit and its negative
        log-likelihood, both `[B, N]`; and the labels.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        labelled = labels != -100
        plain = self.accelerator.unwrap_model(model)
        head = masked_lm_head(plain)
        with torch.no_grad(), self.accelerator.autocast():
            if head is None:
                logits = plain(**inputs).logits[labelled]
            else:
                logits = head(plain.base_model(**inputs).last_hidden_state[labelled])
        log_probabilities = logits.float().log_softmax(-1)  # [labelled, vocabulary]
        targets = labels[labelled]
        correct = torch.zeros(labels.shape, device=labels.device)
        nll = torch.zeros_like(correct)
        correct[labelled] = (log_probabilities.argmax(-1) == targets).float()
        nll[labelled] = -log_probabilities.gather(1, targets[:, None])[:, 0]
        loss = nll.sum() / max(1, len(targets))
        return (loss, None, None) if prediction_loss_only else (loss, (correct, nll), labels)


def _loss_at_labels(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """The same loss from all logits `[B, N, vocabulary]`."""
    labelled = labels != -100
    return cross_entropy(outputs.logits[labelled], labels[labelled], num_items_in_batch)


def masked_lm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood in nats, and bits per masked token."""
    correct, nll = prediction.predictions
    labelled = prediction.label_ids != -100
    mean = float(nll[labelled].mean())
    return {
        "accuracy": float(correct[labelled].mean()),
        "nll": mean,
        "bits_per_token": mean / math.log(2),
        "masked_tokens": int(labelled.sum()),
    }


def _check(model_args, data_args, training_args) -> None:
    if not training_args.do_train and not training_args.do_eval:
        raise ValueError("nothing to do; pass --do_train true, --do_eval true, or both.")
    if not model_args.model_name_or_path and not model_args.tokenizer_name:
        raise ValueError(
            "training from scratch needs a tokenizer; pass --tokenizer_name, or a checkpoint with "
            "--model_name_or_path."
        )
    if model_args.model_name_or_path is None and not training_args.do_train:
        raise ValueError("there is no model to evaluate; pass --model_name_or_path.")
    if model_args.model_name_or_path and model_args.start_with_neighbours:
        raise ValueError("start_with_neighbours is for training from scratch; drop it.")
    if model_args.sparse_prediction and training_args.n_gpu > 1:
        raise ValueError(
            "one process cannot train on several GPUs with sparse_prediction; start it with "
            "torchrun or accelerate launch."
        )
    if Path(training_args.output_dir).is_file():
        raise ValueError(f"output_dir must be a folder, and {training_args.output_dir} is a file.")
    for name in ("max_train_samples", "max_eval_samples"):
        limit = getattr(data_args, name)
        if limit is not None:
            check_int(name, limit, 1)
    check_int("max_seq_length", data_args.max_seq_length, 3)
    if not 0 < data_args.mlm_probability < 1:
        raise ValueError(
            f"mlm_probability must lie in (0, 1), got {data_args.mlm_probability}; 0.15 is usual."
        )
    wanted = {"train_file": training_args.do_train, "validation_file": training_args.do_eval}
    for name, needed in wanted.items():
        given = getattr(data_args, name)
        if given and data_args.dataset_name:
            raise ValueError(f"{name} and dataset_name are both given; keep one of them.")
        if needed and not given and not data_args.dataset_name:
            raise ValueError(f"there is no text to read; pass --{name} or --dataset_name.")
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("streaming text has no known length; say how long with --max_steps.")


def _checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """The checkpoint `resume_from_checkpoint` asks for; earlier results are never overwritten."""
    wanted = str(training_args.resume_from_checkpoint or "false")
    output = Path(training_args.output_dir)
    if not training_args.do_train or wanted.lower() == "false":
        if output.is_dir() and any(output.iterdir()):
            resume = "go on with --resume_from_checkpoint true, or " * training_args.do_train
            raise ValueError(f"output_dir {output} is not empty; {resume}name another folder.")
        return None
    if wanted.lower() == "true":
        # The state is written last: a folder without it was cut off.
        steps = {
            int(match[1]): path.parent
            for path in output.glob("checkpoint-*/trainer_state.json")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
        }
        if not steps and (output / RESULTS_NAME).exists():
            raise ValueError(
                f"output_dir {output} holds a finished run and no checkpoint to resume."
            )
        if not steps:
            return None  # the run was stopped before its first checkpoint
        checkpoint = steps[max(steps)]
    else:
        checkpoint = Path(wanted)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint must be true or a checkpoint folder, got {wanted!r}."
            )
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    wanted_steps = training_args.max_steps if training_args.max_steps > 0 else state["max_steps"]
    if state["global_step"] >= wanted_steps:
        raise ValueError(
            f"{checkpoint} is the end of a finished run ({state['global_step']} steps); name "
            "another output_dir, or raise max_steps to train further."
        )
    return str(checkpoint)


def _masked_lm(model_args: ModelArguments, tokenizer) -> PreTrainedModel:
    if model_args.model_name_or_path:
        return load_masked_lm(
            model_args.model_name_or_path,
            model_args.attn_implementation,
            model_args.config_overrides,
        )
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
        start_with_neighbours(model)
    return with_attention(model, model_args.attn_implementation)


def _examples(data_args: MaskedLMDataArguments, training_args, tokenizer):
    """The packed datasets for training and evaluation; None where not asked for."""

    def read(files, split, streaming, limit):
        documents = load_documents(
            files or data_args.dataset_name,
            config_name=data_args.dataset_config_name,
            split=split,
            text_column=data_args.text_column,
            streaming=streaming,
        )
        with training_args.main_process_first(desc="packing"):
            examples = pack(
                documents,
                tokenizer,
                data_args.max_seq_length,
                workers=data_args.preprocessing_num_workers,
            )
        if limit is not None:
            examples = (
                examples.take(limit)
                if streaming
                else examples.select(range(min(limit, len(examples))))
            )
        if not streaming and len(examples) == 0:
            raise ValueError(
                f"the text ({files or split}) is shorter than one example of "
                f"{data_args.max_seq_length} tokens; pass more text or a smaller max_seq_length."
            )
        return examples

    training = validation = None
    if training_args.do_train:
        training = read(
            data_args.train_file,
            data_args.train_split,
            data_args.streaming,
            data_args.max_train_samples,
        )
        if data_args.streaming:
            training = training.shuffle(seed=training_args.seed, buffer_size=1000)
    if training_args.do_eval:
        validation = read(
            data_args.validation_file,
            data_args.validation_split,
            False,
            data_args.max_eval_samples,
        )
    return training, validation


def _conditions(model, tokenizer, data_args, training_args) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    device = training_args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "model_type": model.config.model_type,
        "attention": model.config._attn_implementation,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "max_seq_length": data_args.max_seq_length,
        "device": name,
        "threads": torch.get_num_threads(),
        "eval_batch_size": training_args.eval_batch_size,  # which tokens are hidden depends on it
        "dtype": "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32",
        "mra_hf": mra_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
