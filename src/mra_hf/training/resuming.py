"""Resuming after a stop: which checkpoint, whether it is whole, and whether it is the same run."""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.utils import logging

from mra_hf.results.files import EXPERIMENT_NAME, RESULTS_NAME, STATE_NAME, read_file

logger = logging.get_logger(__name__)

#: Settings of `experiment.yaml` that shape the course of a training. Trainer restores the optimizer
#: and its schedule from a checkpoint, so most of them would be ignored silently.
_COURSE = (
    *("seed", "data_seed"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "neftune_noise_alpha"),
    *("train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip"),
    *("early_stopping_patience", "early_stopping_threshold", "metric_for_best_model"),
    *("config_overrides", "mlm_probability", "streaming"),
)

#: Settings of multi-resolution attention that `results.json` has; None for other attentions.
ATTENTION_CONDITIONS = (
    *("approx_mode", "block_per_row", "key_block_size", "resolutions", "block_budgets"),
    *("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks", "selection"),
)

#: Prefixes of the files and folders with the optimizer's state: Trainer's, FSDP's, DeepSpeed's.
_OPTIMIZER_FILES = ("optimizer", "pytorch_model_fsdp", "global_step")

#: Entries of `results.json` that shape the course of a training.
_CONDITIONS = (
    *("model_type", "parameters", "max_seq_length", "dtype", "train_batch_size"),
    *("attention", *ATTENTION_CONDITIONS),
)


def output_folder(training_args: TrainingArguments) -> Path:
    """The folder of a run; `TrainingArguments` names one where none was given."""
    assert training_args.output_dir is not None
    return Path(training_args.output_dir)


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for; earlier results are never overwritten.

    A run that was stopped after its last step is resumed too: it has still to save and to evaluate.

    Raises:
        ValueError: results are in the way, there is no such run or checkpoint, it is damaged or
            has no optimizer state, the run is finished, or nothing is to be trained.
    """
    request = str(training_args.resume_from_checkpoint or "false")
    output = output_folder(training_args)
    is_empty = not output.is_dir() or not any(output.iterdir())
    results = _read(output / RESULTS_NAME)
    if request.lower() == "false":
        if not is_empty:
            can_go_on = _checkpoints(output) or _is_at_its_beginning(output, results)
            is_offered = training_args.do_train and can_go_on
            resume = "go on with --resume_from_checkpoint true, or " if is_offered else ""
            raise ValueError(f"output_dir {output} is not empty; {resume}name another folder.")
        return None
    if not training_args.do_train:
        raise ValueError(
            f"resume_from_checkpoint={request!r} goes on with a training, and do_train is false; "
            "to evaluate a checkpoint, name it with --model_name_or_path."
        )
    if request.lower() == "true":
        last = _last_checkpoint(output, results)
        if last is None:
            return None
        checkpoint = last
    else:
        checkpoint = Path(request)
        if not (checkpoint / STATE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint must be true or a checkpoint folder, got {request!r}."
            )
        if not is_empty and checkpoint.resolve().parent != output.resolve():
            raise ValueError(
                f"output_dir {output} is not empty, and {checkpoint} is of another run; "
                "name an empty folder, or the one that the checkpoint is in."
            )
    _check_whole(checkpoint)
    state = json.loads((checkpoint / STATE_NAME).read_text())
    is_finished = bool(results.get("train")) and (
        bool(results.get("eval")) or not training_args.do_eval
    )
    if is_finished and _target_steps(state, training_args) <= state["max_steps"]:
        raise ValueError(
            f"{output} holds a finished run ({results['train'].get('steps')} steps); "
            "name another output_dir, or raise max_steps to train further."
        )
    return str(checkpoint)


def _is_at_its_beginning(output: Path, results: dict[str, Any]) -> bool:
    """Whether a run began in this folder and has nothing to show yet, not even a checkpoint."""
    has_settings = (output / EXPERIMENT_NAME).is_file() and bool(results)
    return has_settings and not results.keys() & {"train", "eval"}


def _last_checkpoint(output: Path, results: dict[str, Any]) -> Path | None:
    """The last checkpoint of a run; None where the run was stopped before its first one.

    Raises:
        ValueError: there is none, and the run is finished or there never was one.
    """
    checkpoints = _checkpoints(output)
    if checkpoints:
        return checkpoints[-1]
    if "train" in results:
        raise ValueError(f"output_dir {output} holds a finished run and no checkpoint to resume.")
    if not _is_at_its_beginning(output, results):
        raise ValueError(
            f"output_dir {output} holds no run to resume; correct the folder, or leave "
            "resume_from_checkpoint out and start a run in an empty one."
        )
    logger.warning(f"{output} has no checkpoint yet: the training starts again at step 0.")
    return None


def _check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that cannot be resumed.

    Raises:
        ValueError: it is damaged, or has no optimizer state.
    """
    damage = _damage(checkpoint)
    if damage:
        others = [path for path in _checkpoints(checkpoint.parent) if path != checkpoint]
        usable = next((path for path in reversed(others) if not _damage(path)), None)
        remedy = "start anew in another output_dir"
        if usable is not None:
            remedy = f"go on from the one before with --resume_from_checkpoint {usable}"
        raise ValueError(f"{checkpoint} is damaged ({damage}); {remedy}.")
    if not any(path.name.startswith(_OPTIMIZER_FILES) for path in checkpoint.iterdir()):
        raise ValueError(
            f"{checkpoint} holds no state of the optimizer (save_only_model?), "
            "and without it this would be another run; start anew in another output_dir, "
            "from this checkpoint with --model_name_or_path."
        )


def is_at_its_end(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Whether no step is left after a checkpoint."""
    state = json.loads((Path(checkpoint) / STATE_NAME).read_text(encoding="utf-8"))
    return state["global_step"] >= _target_steps(state, training_args)


def _target_steps(state: dict[str, Any], training_args: TrainingArguments) -> int:
    return training_args.max_steps if training_args.max_steps > 0 else state["max_steps"]


def check_same_run(
    checkpoint: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Refuse to resume from a checkpoint of a run with other data, model or settings.

    The length of a run may differ, when it logs, saves and evaluates, and on which data it
    evaluates. A checkpoint without `experiment.yaml` and `results.json` beside it is not compared.

    Args:
        checkpoint: as `checkpoint_to_resume` returns it.
        settings: of this run, as in `experiment.yaml`.
        results: the conditions and data of this run, as in `results.json`.

    Raises:
        ValueError: the message says what differs, and how.
    """
    folder = Path(checkpoint).parent
    settings_before = _read(folder / EXPERIMENT_NAME)
    results_before = _read(folder / RESULTS_NAME)
    compared: list[tuple[str, Any, Any]] = []
    if settings_before:
        compared += [(name, settings_before.get(name), settings.get(name)) for name in _COURSE]
    if results_before:
        compared += [
            (name, results_before[name], results.get(name))
            for name in _CONDITIONS
            if name in results_before
        ]
        before, now = results_before.get("data", {}), results["data"]
        for name in ("train", "train_rows"):
            compared.append((f"training data ({name})", before.get(name), now.get(name)))
    if settings_before and settings.get("streaming"):  # streamed text has no fingerprint
        before, now = (_names(each.get("train_file")) for each in (settings_before, settings))
        compared.append(("train_file", before, now))
    differing = [
        f"{name} {_shown(before)} (here {_shown(now)})"
        for name, before, now in compared
        if before != now
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} belongs to a run with {'; '.join(differing)}. "
            f"Go on with the settings and data of {folder / EXPERIMENT_NAME}, "
            "or start anew in another output_dir."
        )


def _checkpoints(output: Path) -> list[Path]:
    """Checkpoints in the order of their steps, without those that were cut off: the state is
    written last.
    """
    steps = {}
    for path in output.glob(f"checkpoint-*/{STATE_NAME}"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
        if match is None:
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning(f"{path.parent} was not written to its end and is passed over.")
            continue
        steps[int(match[1])] = path.parent
    return [steps[step] for step in sorted(steps)]


def _damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if they look whole."""
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and file.is_file():
                with zipfile.ZipFile(file) as archive:
                    archive.namelist()
            elif file.name == STATE_NAME:
                state = json.loads(file.read_text(encoding="utf-8"))
                state["global_step"], state["max_steps"]
        except (SafetensorError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
            return f"{file.name}: {error}"
    return ""


def _read(file: Path) -> dict[str, Any]:
    """The mapping in a file; empty if there is no file or no mapping."""
    content = read_file(file, "name another output_dir") if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _names(files: Any) -> list[str] | None:
    return None if not files else [Path(file).name for file in files]


def _shown(value: Any) -> str:
    return "at its default" if value is None else repr(value)
