"""The Long Range Arena with `Trainer`: an encoder trained from scratch on a task, and tested."""

import inspect
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel, TrainingArguments

from mra_attention.benchmarking import peak_bytes
from mra_attention.checks import check_choice
from mra_hf.data.lra import TASKS, LraData
from mra_hf.data.lra.listops import root_operators
from mra_hf.encoders.configuration import LraConfig
from mra_hf.encoders.images import MraForImageClassification, MraImageConfig
from mra_hf.encoders.methods import ARENA_ATTENTIONS
from mra_hf.encoders.modeling import LraForSequenceClassification
from mra_hf.loading import override, split_settings
from mra_hf.training import runs
from mra_hf.training.runs import option

MODELS = ("encoder", "image_classifier")
#: Rows of the token table in the published runs.
_VOCABULARY = {"listops": 32}
_OTHER_VOCABULARY = 512
#: (first_n_blocks, diagonal_n_blocks) of the published runs with 8 blocks per row.
PAPER_PRIORS = {
    **{("listops", "mra2"): (1, 0), ("listops", "mra2_s"): (1, 0)},
    **{("text", "mra2"): (1, 1), ("text", "mra2_s"): (1, 1)},
    **{("retrieval", "mra2"): (1, 1), ("retrieval", "mra2_s"): (1, 1)},
    **{("image", "mra2"): (1, 0), ("image", "mra2_s"): (0, 1)},
    **{("pathfinder", "mra2"): (1, 0), ("pathfinder", "mra2_s"): (1, 1)},
}


@dataclass
class LraArguments:
    """Which task, and which attention."""

    task: str = option("listops", f"one of {', '.join(TASKS)}")
    attention: str = option("mra2", f"one of {', '.join(ARENA_ATTENTIONS)}")
    model: str = option(
        "encoder",
        'what reads the task: "encoder" (that of the arena), or for image and '
        'pathfinder "image_classifier" (that of the MRA paper\'s Table 6, on pixels)',
    )
    source: str | None = option(
        None, "folder with the data of text, retrieval or image; the others are made"
    )
    task_settings: str | None = option(
        None,
        "arguments of the task in mra_hf.data.lra: train=5000,max_length=600 or "
        "mask_zero_pixels=false",
    )
    config_overrides: str | None = option(
        None, "settings of LraConfig (MraImageConfig): pooling=mean,segment_lengths=[4,32]"
    )
    one_cycle: bool = option(
        True,
        "the published schedule: OneCycleLR, linear, from 1/25 of the rate, "
        "with the momentum going the other way; false: lr_scheduler_type",
    )


def run_lra(
    lra_args: LraArguments, stopping_args: runs.StoppingArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """Train an encoder on a task, choose a checkpoint by dev accuracy, and test it.

    `Experiment.fit` says what is written; `predictions_test.csv` is added. The results hold the
    accuracies on dev and test under "eval", the accuracies of answers that need no reading under
    "controls", and speed and peak memory under "train". Where the attention routes tokens to heads,
    each head's share of the tokens is logged.

    Args:
        lra_args: which task and attention.
        stopping_args: when to stop early.
        training_args: of `Trainer`; `metric_for_best_model` may be accuracy or loss.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: settings that contradict one another, or faulty data.
    """
    runs.check_run(training_args)
    if not training_args.do_train:
        raise ValueError("there is no trained model to evaluate here; pass --do_train true.")
    check_choice("task", lra_args.task, tuple(TASKS))
    check_choice("attention", lra_args.attention, ARENA_ATTENTIONS)
    check_choice("model", lra_args.model, MODELS)
    runs.check_best_metric(training_args, ("loss", "accuracy"))
    if lra_args.one_cycle and training_args.max_steps > 0:
        _warmup(training_args, training_args.max_steps)
    settings = (lra_args, stopping_args, training_args)
    experiment = runs.Experiment(f"lra-{lra_args.task}", "text", *settings)
    with training_args.main_process_first(desc="data"):
        data = load_task(lra_args.task, lra_args.source, lra_args.task_settings)
    reads_pixels = lra_args.model == "image_classifier"
    if reads_pixels:
        config: LraConfig | MraImageConfig = image_config(lra_args.attention, data)
        model_class: type[PreTrainedModel] = MraForImageClassification
    else:
        config = lra_config(lra_args.task, lra_args.attention, data)
        model_class = LraForSequenceClassification
    if lra_args.config_overrides:
        override(config, lra_args.config_overrides)
        config.check()
        _check_fits(config, data)
    trainer = LraTrainer(
        one_cycle=lra_args.one_cycle,
        model=model_class(config),
        args=training_args,
        data_collator=PixelCollator(data) if reads_pixels else Collator(data.masks_zero),
        train_dataset=data.train,
        eval_dataset=data.dev,
        callbacks=stopping_args.callbacks(training_args),
    )
    conditions = {
        **_conditions_of_attention(config),
        "split": data.split,
        "labels": list(data.labels),
        "controls": controls(lra_args.task, data),
    }

    def evaluate() -> dict[str, Any]:
        results = experiment.results
        results["train"]["peak_memory_mb"] = peak_bytes(training_args.device) / 2**20
        scores = trainer.predict(data.dev, metric_key_prefix="eval_dev").metrics
        predicted = trainer.predict(data.test, metric_key_prefix="eval_test")
        trainer.save_predictions("test", predicted, data.labels)
        return (scores or {}) | (predicted.metrics or {})

    return experiment.fit(trainer, data.max_length, conditions, evaluate)


def load_task(task: str, source: str | None, settings: str | None) -> LraData:
    """The data of a task.

    Args:
        task: a key of `mra_hf.data.lra.TASKS`.
        source: its folder, for tasks that read one.
        settings: arguments of the task's function as "name=value,name=value".

    Raises:
        ValueError: a source is missing or not needed, an argument that the task does not have,
            or faulty data.
    """
    parameters = dict(inspect.signature(TASKS[task]).parameters)
    needs_source = parameters.pop("source", None) is not None
    if needs_source != (source is not None):
        what = "a folder of its data" if needs_source else "no source: it is made here"
        raise ValueError(f"task {task} needs {what}; --source is {source!r}.")
    arguments = {}
    for name, text in split_settings("task_settings", settings or ""):
        if name not in parameters:
            raise ValueError(
                f"task_settings: task {task} has no {name!r}; it has {', '.join(parameters)}."
            )
        value = arguments[name] = yaml.safe_load(text)
        default = parameters[name].default
        kind = int if default is None else type(default)  # None is the default of limits
        if type(value) is not kind and not (default is None and value is None):
            raise ValueError(
                f"task_settings: {name} must be of type {kind.__name__}, got {text!r}."
            )
    return TASKS[task](*([source] if needs_source else []), **arguments)


def lra_config(task: str, attention: str, data: LraData) -> LraConfig:
    """The encoder of the published runs for a task."""
    first, diagonal = PAPER_PRIORS.get((task, attention), (0, 0))
    return LraConfig(
        attention=attention,
        vocab_size=max(data.vocab_size, _VOCABULARY.get(task, _OTHER_VOCABULARY)),
        max_position_embeddings=2 ** math.ceil(math.log2(data.max_length)),
        grid=data.grid if attention in ("mra2", "mra2_s") else None,
        initial_prior_first_n_blocks=first,
        initial_prior_diagonal_n_blocks=diagonal,
        two_tower=data.two_tower,
        id2label=dict(enumerate(data.labels)),
        label2id={name: number for number, name in enumerate(data.labels)},
    )


def image_config(attention: str, data: LraData) -> MraImageConfig:
    """The classifier of the paper's Table 6 with a token for every grey pixel.

    Raises:
        ValueError: the data are not square images.
    """
    if data.grid is None or data.grid[0] != data.grid[1]:
        raise ValueError('model="image_classifier" is for the tasks image and pathfinder.')
    return MraImageConfig(
        attention=attention,
        image_size=data.grid[0],
        num_channels=1,
        stem_kernel_size=1,
        stem_stride=1,
        stem_padding=0,
        id2label=dict(enumerate(data.labels)),
        label2id={name: number for number, name in enumerate(data.labels)},
    )


def controls(task: str, data: LraData) -> dict[str, float]:
    """Test accuracy of answers that need no reading: the commonest label of the training rows, and
    for ListOps the commonest label of each root operator, the first symbol.
    """
    train, test = (np.array(part["label"]) for part in (data.train, data.test))
    accuracies = {"majority": float((test == Counter(train.tolist()).most_common(1)[0][0]).mean())}
    if task == "listops":
        by_root: dict[int, Counter] = defaultdict(Counter)
        for root, label in zip(root_operators(data.train), train, strict=True):
            by_root[root][label] += 1
        best = {root: counts.most_common(1)[0][0] for root, counts in by_root.items()}
        guesses = np.array([best.get(root, -1) for root in root_operators(data.test)])
        accuracies["root_operator"] = float((guesses == test).mean())
    return accuracies


class Collator:
    """Makes a batch of rows, padded with 0 to the longest: ids `[B, N]`, mask `[B, N]`, labels.

    Args:
        masks_zero: hide every id 0 from attention; else hide nothing.
    """

    def __init__(self, masks_zero: bool):
        self.masks_zero = masks_zero

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"labels": torch.tensor([row["label"] for row in features])}
        for side in ("", "_2"):  # pairs have two texts
            name = f"input_ids{side}"
            if name not in features[0]:
                continue
            rows = [torch.as_tensor(row[name]).long() for row in features]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            batch[name] = ids
            mask = ids != 0 if self.masks_zero else torch.ones_like(ids, dtype=torch.bool)
            batch[f"attention_mask{side}"] = mask
        return batch


class PixelCollator:
    """Makes images `[B, 1, height, width]`, values from -1 to 1, of rows of grey values."""

    def __init__(self, data: LraData):
        assert data.grid is not None  # `image_config`
        self.grid = data.grid
        self.black = 0 if data.masks_zero else 1

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = torch.tensor(np.array([row["input_ids"] for row in features], dtype=np.float32))
        pixels = (rows - self.black) / 127.5 - 1
        return {
            "pixel_values": pixels.view(-1, 1, *self.grid),
            "labels": torch.tensor([row["label"] for row in features]),
        }


class LraTrainer(runs.ChoiceTrainer):
    """`Trainer` with the published schedule, which logs where a router sends the tokens."""

    def __init__(self, *, one_cycle: bool, **arguments):
        super().__init__(**arguments)
        self.one_cycle = one_cycle
        self._shares: list[Tensor] = []

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if not self.one_cycle or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = _warmup(self.args, num_training_steps)
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = OneCycleLR(  # type: ignore[assignment]  # Trainer steps any scheduler
            optimizer,
            max_lr=self.args.learning_rate,
            total_steps=num_training_steps,
            pct_start=warmup / num_training_steps,
            anneal_strategy="linear",
        )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        shares = outputs.get("routing_shares")
        if model.training and shares is not None:
            self._shares.append(shares.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._shares and "loss" in logs:
            shares = torch.stack(self._shares).mean(0).cpu().tolist()
            self._shares.clear()
            for layer, heads in enumerate(shares):
                for head, share in enumerate(heads):
                    logs[f"share_layer_{layer}_head_{head}"] = round(share, 4)
        super().log(logs, *args, **kwargs)


def _check_fits(config: LraConfig | MraImageConfig, data: LraData) -> None:
    """Raise a `ValueError` where an override made the model too small for its task."""
    needed = {"num_labels": len(data.labels)}
    if isinstance(config, LraConfig):
        needed |= {"vocab_size": data.vocab_size, "max_position_embeddings": data.max_length}
    for name, least in needed.items():
        size = getattr(config, name)
        if size < least:
            raise ValueError(
                f"config_overrides: {name} must be at least {least} for this task, got {size}."
            )


def _warmup(training_args: TrainingArguments, steps: int) -> int:
    """Warm-up steps of a run of `steps`.

    Raises:
        ValueError: OneCycleLR cannot use them.
    """
    warmup = training_args.get_warmup_steps(steps)
    if steps < 3:
        raise ValueError(
            f"max_steps must be at least 3 for the one-cycle schedule, got {steps}; or pass "
            "--one_cycle false."
        )
    if not 2 <= warmup < steps:
        raise ValueError(
            f"warmup_steps must be from 2 to {steps - 1}, below the steps of the run, "
            f"got {warmup}; or pass --one_cycle false."
        )
    return warmup


def _conditions_of_attention(config: LraConfig | MraImageConfig) -> dict[str, Any]:
    """What of the configuration names the attention, in place of Transformers' own word."""
    is_encoder = isinstance(config, LraConfig)
    is_mra = config.attention in ("mra2", "mra2_s")
    is_adamra = config.attention == "adamra"
    conditions = {
        "attention": config.attention,
        "approx_mode": {"mra2": "full", "mra2_s": "sparse"}.get(config.attention),
        "block_per_row": config.block_per_row if is_mra else None,
        "attention_size": config.size if is_encoder else None,
        "pooling": config.pooling if is_encoder else "mean",
    }
    if is_mra:
        names: tuple[str, ...] = (
            "initial_prior_first_n_blocks",
            "initial_prior_diagonal_n_blocks",
            "selection",
        )
        conditions |= {name: getattr(config, name) for name in names}
    if is_adamra:
        names = ("segment_lengths", "num_subheads", "feature_map", "routing", "router_gate")
        conditions |= {name: getattr(config, name) for name in names}
    return conditions
