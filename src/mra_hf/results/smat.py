"""The score of AdaMRA's Table 3: speed, memory and accuracy in one number.

It compares models with one another: each of the three is scaled to 0 ... 1 over the models, so the
score of a model depends on the others.
"""

import json
from typing import TYPE_CHECKING

import numpy as np

from mra_hf.results.runs import Run, seed_groups
from mra_hf.results.tables import markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

_ACCURACY = "eval_test_accuracy"
#: Conditions that a comparison holds fixed, beside the data.
_FIXED = ("device", "threads", "processes", "train_batch_size", "dtype", "max_seq_length")


def smat_scores(
    speed: "Sequence[float]", memory: "Sequence[float]", accuracy: "Sequence[float]"
) -> list[float]:
    """S + (1 - M) + Acc, each scaled by its smallest and largest value over the models.

    Args:
        speed: of each model, more is better.
        memory: less is better.
        accuracy: more is better.

    Returns:
        A score from 0 to 3 for each model.

    Raises:
        ValueError: fewer than two models, or lists of different lengths.
    """
    if len(speed) < 2 or len({len(speed), len(memory), len(accuracy)}) > 1:
        raise ValueError(
            "the score compares two models or more, by as many speeds, memories and accuracies; "
            f"got {len(speed)}, {len(memory)} and {len(accuracy)}."
        )
    scaled = [_scaled(values) for values in (speed, memory, accuracy)]
    return (scaled[0] + (1 - scaled[1]) + scaled[2]).tolist()


def _scaled(measured: "Sequence[float]") -> np.ndarray:
    values = np.asarray(measured, float)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread else np.full_like(values, 0.5)


def smat_table(runs: "Sequence[Run]") -> str:
    """The scores of the finished Long Range Arena runs as Markdown, a table for each data set and
    machine; seeds are averaged.

    Returns:
        "" where no two results can be compared.
    """
    groups, _ = seed_groups([run for run in runs if not run.missing])
    comparable: dict[tuple, list[list[Run]]] = {}  # what is held fixed -> groups of seeds
    for group in groups:
        first = group[0].results
        measured = all(_measured(run) is not None for run in group)
        if group[0].task.startswith("lra-") and measured:
            fixed = [first.get(name) for name in _FIXED]
            fixed += [group[0].settings.get(name) for name in ("source", "task_settings", "model")]
            fixed += [sorted(first.get("data", {}).items())]
            key = (group[0].task, json.dumps(fixed, sort_keys=True, default=str))
            comparable.setdefault(key, []).append(group)
    parts = []
    for (task, _), compared in comparable.items():
        if len(compared) < 2:
            continue
        one = compared[0][0]
        device, batch, length = (
            one.results.get(name) for name in ("device", "train_batch_size", "max_seq_length")
        )
        measures = [[m for run in group if (m := _measured(run)) is not None] for group in compared]
        means = [np.mean(of_group, axis=0) for of_group in measures]
        scores = smat_scores(*np.transpose(means))
        rows = [
            (
                " ".join(filter(None, (group[0].model, group[0].settings.get("config_overrides")))),
                len(group),
                f"{speed:.1f}",
                f"{memory:.0f}",
                f"{100 * accuracy:.1f} %",
                f"{score:.2f}",
            )
            for group, (speed, memory, accuracy), score in zip(compared, means, scores, strict=True)
        ]
        columns = ("attention", "n", "examples/s", "peak MB", "test", "score")
        parts.append(
            f"{task}, up to {length} tokens, {one.settings.get('task_settings') or 'whole'}; on "
            f"{device}, batches of {batch}: training with its evaluations.\n\n"
            + markdown_table(columns, rows)
        )
    if parts:
        parts.insert(
            0, "Score: speed, little memory and accuracy, each from 0 to 1 over the models.\n"
        )
    return "\n".join(parts)


def _measured(run: Run) -> tuple[float, float, float] | None:
    """Examples per second, peak megabytes and test accuracy; None where one is missing."""
    train = run.results.get("train", {})
    speed, memory = train.get("train_samples_per_second"), train.get("peak_memory_mb")
    accuracy = run.metrics.get(_ACCURACY)
    if speed is None or memory is None or accuracy is None:
        return None
    return speed, memory, accuracy
