"""Figures beyond the paper: error by selection rule, and by the order of the tokens."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mra_attention import BlockSelection, mra2_attention, select_blocks
from mra_attention.order import attend_in_order, hash_order, random_directions
from mra_attention.selection import RULES
from mra_hf.analysis.figures.drawing import Drawn, shape_of
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.baselines.measures import attention_weights, dense_attention, relative_errors
from mra_hf.results.drawing import new_figure

_BLOCK = 32
#: Arguments of `select_blocks` by name; "most mass" needs the whole matrix.
_CHOICES: dict[str, dict[str, Any]] = {
    **{rule: {"selection": rule} for rule in RULES},
    **{f"mass, 32 x {width}": {"selection": "mass", "key_block_size": width} for width in (16, 8)},
    "most mass": {},
}
_COLOURS = ("#b3273a", "#e08a3c", "#5aa0d8", "#1f5f99", "#3c8c6b", "#1b9e77", "#7a4fa3")
_ORDERS = ("as it is", "shuffled", "shuffled, then by hash")


@torch.no_grad()
def selection_rules(heads: HeadInputs) -> Drawn:
    """Error by selection rule and width of key blocks, beside the selection of the most softmax
    mass, which needs the whole matrix.
    """
    exact = dense_attention(*heads.parts, heads.scale)
    rows: list[dict[str, Any]] = []
    for blocks in _budgets(heads):
        for rule in _CHOICES:
            select = partial(_select, heads, rule, blocks)
            selection = select()
            milliseconds = None if rule == "most mass" else _median_milliseconds(select)
            for mode in ("full", "sparse"):
                settings: dict[str, Any] = {"scale": heads.scale, "selection": selection}
                settings |= {"approx_mode": mode, "key_block_size": selection.key_block_size}
                output = mra2_attention(*heads.parts, **settings)
                row = {"block_per_row": blocks, "rule": rule, "approx_mode": mode}
                row["error"] = float(relative_errors(output, exact).mean())
                rows.append(row | {"selection_milliseconds": milliseconds})
    figure = new_figure(11, 4.6)
    for axes, mode in zip(figure.subplots(1, 2), ("full", "sparse"), strict=True):
        for number, rule in enumerate(_CHOICES):
            points = [
                (row["block_per_row"], row["error"])
                for row in rows
                if row["rule"] == rule and row["approx_mode"] == mode
            ]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=rule)
        axes.set(xlabel="blocks per row", ylabel="relative error", ylim=(0, None))
        axes.set(title="MRA-2" if mode == "full" else "MRA-2-s")
        axes.legend(frameon=False)

    def mean(rule: str, key: str) -> float:
        values = [row[key] for row in rows if row["rule"] == rule and row["approx_mode"] == "full"]
        return sum(values) / len(values)

    errors = "; ".join(f"{rule} {mean(rule, 'error'):.3f}" for rule in _CHOICES)
    practical = [rule for rule in _CHOICES if rule != "most mass"]
    times = "; ".join(f"{rule} {mean(rule, 'selection_milliseconds'):.1f}" for rule in practical)
    caption = (
        f"{shape_of(heads)}. The paper ranks the blocks of a head by their mean logit (global), "
        "its code by the mean logit minus the largest of the row (row_normalized); "
        "mass is the softmax over the mean logits of a row, refined estimates it from quarters of "
        "blocks. Blocks are 32 x 32 where nothing is said; narrower ones are more, so that as many "
        "entries are exact, and no own block is kept. Mean errors of MRA-2 over "
        f"{', '.join(map(str, _budgets(heads)))} blocks per row: {errors}. Milliseconds to select "
        f"for {heads.query.shape[:2].numel()} heads ({torch.get_num_threads()} threads): {times}."
    )
    return Drawn(figure, rows, caption)


@torch.no_grad()
def locality(heads: HeadInputs) -> Drawn:
    """Error with the tokens in their order, shuffled, and shuffled but sorted by hash."""
    generator = torch.Generator().manual_seed(0)
    shuffle = torch.randperm(heads.length, generator=generator)
    directions = random_directions(heads.query.shape[-1], 8, generator)
    exact = dense_attention(*heads.parts, heads.scale)
    rows: list[dict[str, Any]] = []
    for blocks in _budgets(heads):
        attention = partial(mra2_attention, block_per_row=blocks, scale=heads.scale)
        for order in _ORDERS:
            identity = torch.arange(heads.length)
            orders = [identity, identity] if order == "as it is" else [shuffle, shuffle]
            if order.endswith("hash"):
                orders = [
                    shuffle[hash_order(x[:, :, shuffle], directions=directions)]
                    for x in (heads.query, heads.key)
                ]
            query_order, key_order = orders
            output = attend_in_order(
                attention, *heads.parts, query_order=query_order, key_order=key_order
            )
            per_head = relative_errors(output, exact).mean(0)
            rows += [
                {"block_per_row": blocks, "order": order, "head": name, "error": float(error)}
                for name, error in zip(heads.head_names, per_head, strict=True)
            ]
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    for order, colour in zip(_ORDERS, ("#b3273a", "#444444", "#1f5f99"), strict=True):
        errors = [_mean_error(rows, order, blocks) for blocks in _budgets(heads)]
        axes.plot(_budgets(heads), errors, marker="o", color=colour, label=order)
    axes.set(xlabel="blocks per row", ylabel="relative error", ylim=(0, None))
    axes.legend(frameon=False)
    blocks = _budgets(heads)[-1]
    in_words = ", ".join(f"{_mean_error(rows, order, blocks):.2f} {order}" for order in _ORDERS)
    caption = (
        f"{shape_of(heads)}, MRA-2. The paper assumes that neighbours are alike and suggests "
        "hashing where they are not, without an experiment. "
        f"Here the mean errors with {blocks} blocks per row are {in_words} "
        "(16 buckets, queries and keys by the same hash)."
    )
    return Drawn(figure, rows, caption)


def _mean_error(rows: list[dict[str, Any]], order: str, blocks: int) -> float:
    errors = [
        row["error"] for row in rows if row["order"] == order and row["block_per_row"] == blocks
    ]
    return sum(errors) / len(errors)


def _budgets(heads: HeadInputs) -> list[int]:
    return [blocks for blocks in (1, 2, 4, 8, 16) if blocks <= heads.length // 64]


def _select(heads: HeadInputs, rule: str, blocks: int) -> BlockSelection:
    if rule != "most mass":
        settings: dict[str, Any] = {"block_per_row": blocks, "scale": heads.scale}
        settings |= _CHOICES[rule]
        return select_blocks(heads.query, heads.key, **settings)
    n_blocks = -(-heads.length // _BLOCK)
    padding = n_blocks * _BLOCK - heads.length
    selected = torch.zeros(*heads.query.shape[:2], n_blocks, n_blocks, dtype=torch.bool)
    for instance, query in enumerate(heads.query):  # one instance at a time: N x N
        weights = attention_weights(query, heads.key[instance], heads.scale)
        weights = torch.nn.functional.pad(weights, (0, padding, 0, padding))
        mass = weights.unflatten(2, (n_blocks, _BLOCK)).unflatten(1, (n_blocks, _BLOCK))
        best = mass.sum((2, 4)).flatten(1).topk(min(blocks, n_blocks) * n_blocks).indices
        selected[instance].flatten(1).scatter_(1, best, True)
    return BlockSelection(selected, _BLOCK)


def _median_milliseconds(call: Callable[[], Any]) -> float:
    """Of three calls."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * sorted(times)[1]
