"""What each head of a model needs: its errors at several budgets, and a budget per layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mra_attention import mra2_attention, select_blocks
from mra_attention.blocks import count_blocks, upsample
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.baselines.measures import (
    attention_weights,
    dense_attention,
    relative_errors,
    row_entropies,
)

#: Budgets that `head_report` measures, in blocks per row.
REPORTED = (2, 4, 8, 16)
_BLOCK = 32


@dataclass(frozen=True)
class Proposal:
    """A budget for each layer.

    Attributes:
        block_per_row: for each layer, the smallest budget that keeps its mean error below the
            target; all block rows if no smaller budget does.
        errors: the mean error of each layer with that budget.
        uniform: one budget for all layers, with at least as many blocks in total.
        uniform_errors: the mean error of each layer with the uniform budget.
    """

    block_per_row: list[int]
    errors: list[float]
    uniform: int
    uniform_errors: list[float]


def layers_of(heads: HeadInputs) -> list[int]:
    """The layer of each instance of recorded heads.

    Raises:
        ValueError: the heads are not of a model.
    """
    found = [re.search(r"layer (\d+)$", name) for name in heads.instance_names]
    layers = [int(match[1]) for match in found if match is not None]
    if len(layers) < len(found):
        raise ValueError(f"heads must be recorded from a model, got {heads.source}.")
    return layers


@torch.no_grad()
def head_report(
    heads: HeadInputs, budgets: Sequence[int] = REPORTED, **settings: Any
) -> list[dict[str, Any]]:
    """One row per head: what it needs.

    Args:
        heads: recorded from a model, or synthetic.
        budgets: blocks per row to measure.
        settings: of `mra2_attention`, such as `approx_mode` or `selection`.

    Returns:
        Rows with instance, head, the mean entropy of a row of the softmax matrix in nats
        (`entropy`), the relative error of uniform attention (`mean_value_error`), and for each
        budget n up to the number of block rows the softmax mass in the selected blocks (`mass_n`)
        and the relative error of the output (`error_n`).
    """
    exact = dense_attention(*heads.parts, heads.scale)
    entropies = row_entropies(heads.query, heads.key, heads.scale)
    means = heads.value.mean(2, keepdim=True).expand_as(exact)
    columns: dict[str, Tensor] = {
        "entropy": entropies,
        "mean_value_error": relative_errors(means, exact),
    }
    for budget in budgets:
        if budget <= count_blocks(heads.length, _BLOCK):
            columns[f"mass_{budget}"] = _mass(heads, budget, settings)
            columns[f"error_{budget}"] = _errors(heads, exact, budget, settings)
    return [
        {"instance": instance, "head": head}
        | {name: float(values[i, j]) for name, values in columns.items()}
        for i, instance in enumerate(heads.instance_names)
        for j, head in enumerate(heads.head_names)
    ]


@torch.no_grad()
def propose(heads: HeadInputs, target_error: float, **settings: Any) -> Proposal:
    """The smallest budget of each layer with a mean error over heads and texts below a target.

    Args:
        heads: recorded from a model, on text of the kind and length that it will read.
        target_error: relative error of the output of a head, above 0 and below 1.
        settings: of `mra2_attention`, such as `approx_mode` or `selection`.

    Raises:
        ValueError: a target out of range, or heads that are not of a model.
    """
    check_target(target_error)
    layers = torch.tensor(layers_of(heads))
    n_layers = int(layers.max()) + 1
    rows = count_blocks(heads.length, _BLOCK)
    exact = dense_attention(*heads.parts, heads.scale)
    measured: dict[int, list[float]] = {}

    def errors(budget: int) -> list[float]:
        if budget not in measured:
            by_instance = _errors(heads, exact, budget, settings).mean(1)
            measured[budget] = [float(by_instance[layers == n].mean()) for n in range(n_layers)]
        return measured[budget]

    budgets = []
    for layer in range(n_layers):  # errors fall with the budget: bisect
        low, high = 1, rows
        while low < high:
            middle = (low + high) // 2
            if errors(middle)[layer] < target_error:
                high = middle
            else:
                low = middle + 1
        budgets.append(low)
    uniform = -(-sum(budgets) // n_layers)
    return Proposal(
        block_per_row=budgets,
        errors=[errors(budget)[layer] for layer, budget in enumerate(budgets)],
        uniform=uniform,
        uniform_errors=errors(uniform),
    )


def check_target(target_error: float) -> None:
    """Refuse a target error that no head could miss or meet.

    Raises:
        ValueError: it is not above 0 and below 1.
    """
    if not 0 < target_error < 1:
        raise ValueError(
            "target_error must be positive and below 1, the error of an output of zeros, got "
            f"{target_error:g}; 0.2 is 20 %."
        )


def _errors(heads: HeadInputs, exact: Tensor, budget: int, settings: dict[str, Any]) -> Tensor:
    output = mra2_attention(
        *heads.parts, block_per_row=budget, block_size=_BLOCK, scale=heads.scale, **settings
    )
    return relative_errors(output, exact)


def _mass(heads: HeadInputs, budget: int, settings: dict[str, Any]) -> Tensor:
    """Share of the softmax mass in the selected blocks, `[instances, H]`."""
    rule = {name: value for name, value in settings.items() if name != "approx_mode"}
    chosen = select_blocks(
        heads.query, heads.key, block_per_row=budget, block_size=_BLOCK, scale=heads.scale, **rule
    )
    mass = torch.empty(chosen.blocks.shape[:2])
    for instance, selected in enumerate(chosen.blocks):  # one instance at a time: N x N
        weights = attention_weights(heads.query[instance], heads.key[instance], heads.scale)
        covered = upsample(selected, _BLOCK, chosen.key_block_size)
        covered = covered[:, : heads.length, : heads.length]
        mass[instance] = (weights * covered).sum((1, 2)) / heads.length
    return mass
