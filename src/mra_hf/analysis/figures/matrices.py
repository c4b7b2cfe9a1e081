"""Figures 1, 2, 3, 6 and 8 of the paper: attention matrices and their approximations."""

from typing import Any

import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from torch import Tensor

from mra_attention import multiresolution_attention_matrix, select_blocks
from mra_hf.analysis import frame
from mra_hf.analysis.figures.drawing import Drawn
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.baselines.measures import attention_weights
from mra_hf.baselines.optimal import low_rank
from mra_hf.results.drawing import new_figure

#: Pictures of whole matrices are cut to at most this side; the Haar transform takes a power of 2.
_LARGEST_SIDE = 1024
_STAGES = ((16,), (16, 4), (16, 4, 1))
_BY_TENTH = ("haar", "sparse", "low_rank")


def haar_coefficients(heads: HeadInputs) -> Drawn:
    """Figure 1: a softmax matrix has few large Haar coefficients."""
    heads = _of_power_of_2(heads)
    rows: list[dict[str, Any]] = []
    for head, name in enumerate(heads.head_names):
        weights = _weights(heads, 0, head)
        coefficients = frame.haar_2d(weights)
        tenth = weights.numel() // 10
        rows.append(
            {
                "head": name,
                "tiny_coefficients": float((coefficients.abs() < 0.005).double().mean()),
                "haar_error": float(coefficients.abs().flatten().sort().values[:-tenth].norm()),
                "sparse_error": float(weights.flatten().sort().values[:-tenth].norm()),
                "low_rank_error": float((low_rank(weights, len(weights) // 10) - weights).norm()),
            }
        )
    median = sorted(range(len(rows)), key=lambda head: rows[head]["haar_error"])[len(rows) // 2]
    weights = _weights(heads, 0, median)
    coefficients = frame.haar_2d(weights)
    figure = new_figure(13, 7)
    axes = figure.subplots(2, 3)
    norm = _log_scale(weights)
    pictures = [("softmax attention", weights)]
    for share in (0.05, 0.10):
        largest = coefficients.abs().flatten().topk(int(share * coefficients.numel())).indices
        kept = torch.zeros_like(coefficients).flatten()
        kept[largest] = coefficients.flatten()[largest]
        matrix = frame.inverse_haar_2d(kept.view_as(weights))
        pictures.append((f"largest {share:.0%} of Haar coefficients", matrix))
    for panel, (title, matrix) in zip(axes[0], pictures, strict=True):
        _show(panel, matrix, title, norm)
    axes[1, 0].hist(coefficients.abs().flatten().log10().clamp_min(-9).numpy(), bins=60, log=True)
    axes[1, 0].axvline(torch.tensor(0.005).log10().item(), color="#b3273a", linewidth=1)
    axes[1, 0].set(xlabel="log10 of a Haar coefficient", ylabel="coefficients")
    ticks = list(range(len(rows)))
    for number, name in enumerate(_BY_TENTH):
        axes[1, 1].bar(
            [tick + 0.27 * number for tick in ticks],
            [row[f"{name}_error"] for row in rows],
            0.27,
            label=name.replace("_", " "),
        )
    axes[1, 1].set_xticks(ticks, heads.head_names, rotation=90, fontsize=7)
    axes[1, 1].set(ylabel="error with a tenth kept (Frobenius)", yscale="log")
    axes[1, 1].legend(frameon=False)
    axes[1, 2].bar(ticks, [row["tiny_coefficients"] for row in rows])
    axes[1, 2].set_xticks(ticks, heads.head_names, rotation=90, fontsize=7)
    axes[1, 2].set(ylabel="share of coefficients below 0.005", ylim=(0, 1))
    winners = [min((row[f"{name}_error"], name) for name in _BY_TENTH)[1] for row in rows]
    means = {name: _mean(rows, f"{name}_error") for name in _BY_TENTH}
    caption = (
        f"Instance {heads.instance_names[0]}, {len(rows)} heads, {heads.length} tokens; pictures "
        f"of {heads.head_names[median]}. The paper's matrix has over 95 % of its Haar coefficients "
        "below 0.005, and with a tenth kept errors of 0.30 (Haar), 0.39 (largest entries) and 1.24 "
        f"(low rank). Here {_mean(rows, 'tiny_coefficients'):.1%} are below 0.005, and the errors "
        f"are {means['haar']:.2f}, {means['sparse']:.2f} and {means['low_rank']:.2f} (means over "
        f"heads). Haar is the best for {winners.count('haar')} heads, the largest entries for "
        f"{winners.count('sparse')}, low rank for {winners.count('low_rank')}."
    )
    return Drawn(figure, rows, caption)


def frame_and_haar(_: HeadInputs) -> Drawn:
    """Figure 2: the frame and the Haar basis of an 8 x 8 matrix."""
    side = 8
    scales = (1, 2, 4, 8)
    figure = new_figure(11, 6)
    axes = figure.subplots(2, len(scales))
    rows: list[dict[str, Any]] = []
    members = list(frame.components(side))
    for column, scale in enumerate(scales):
        count = sum(member.scale == scale for member in members)
        details = 3 * (side // scale) ** 2 if scale > 1 else 1
        rows.append({"scale": scale, "frame": count, "haar": details})
        _grid(axes[0, column], side, scale, f"scale {scale}: {count}")
        title = f"scale {scale}: 3 x {details // 3}" if scale > 1 else "constant: 1"
        _grid(axes[1, column], side, scale if scale > 1 else side, title, signs=scale > 1)
    totals = {name: sum(row[name] for row in rows) for name in ("frame", "haar")}
    axes[0, 0].set_ylabel(f"frame: {totals['frame']}")
    axes[1, 0].set_ylabel(f"Haar basis: {totals['haar']}")
    caption = (
        f"Components of the frame and of the Haar basis of 8 x 8 matrices: {totals['frame']} and "
        f"{totals['haar']}, as in the paper (85 and 64). "
        "A component of the frame has one sign; a Haar detail has two."
    )
    return Drawn(figure, rows, caption)


def stages_in_logarithms(heads: HeadInputs) -> Drawn:
    """Figure 3: the approximation after each scale of {16, 4, 1}, in logarithmic colours."""
    return _stages(heads, linear=False)


def stages(heads: HeadInputs) -> Drawn:
    """Figure 6: the same in linear colours."""
    return _stages(heads, linear=True)


def _stages(heads: HeadInputs, *, linear: bool) -> Drawn:
    heads = _of_power_of_2(heads)
    rows: list[dict[str, Any]] = []
    for instance in range(heads.query.shape[0]):
        for head, name in enumerate(heads.head_names):
            exact = _weights(heads, instance, head)
            errors = [
                float((_stage(heads, instance, head, scales) - exact).norm() / exact.norm())
                for scales in _STAGES
            ]
            named = {
                f"error_{'_'.join(map(str, s))}": e for s, e in zip(_STAGES, errors, strict=True)
            }
            rows.append({"instance": heads.instance_names[instance], "head": name, **named})
    keys = [key for key in rows[0] if key.startswith("error")]
    median = sorted(range(len(rows)), key=lambda row: rows[row][keys[-1]])[len(rows) // 2]
    instance, head = divmod(median, len(heads.head_names))
    exact = _weights(heads, instance, head)
    pictures = [("softmax attention", exact)] + [
        (
            f"R = {{{', '.join(map(str, scales))}}}, error {rows[median][key]:.2f}",
            _stage(heads, instance, head, scales),
        )
        for scales, key in zip(_STAGES, keys, strict=True)
    ]
    figure = new_figure(16, 4.4)
    norm = Normalize(0, float(exact.flatten().quantile(0.999))) if linear else _log_scale(exact)
    for panel, (title, matrix) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
        image = _show(panel, matrix, title, norm)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="attention weight")
    falls = sum(row[keys[0]] >= row[keys[1]] >= row[keys[2]] for row in rows)
    means = ", ".join(f"{_mean(rows, key):.2f}" for key in keys)
    caption = (
        f"{heads.instance_names[instance]}, {heads.head_names[head]}, {heads.length} tokens; "
        "a quarter of the blocks of 16 is cut to blocks of 4, and a quarter of these to entries. "
        f"In the paper the error falls with each stage. Here its means over {len(rows)} heads are "
        f"{means} (relative, of the matrix), and it falls with each stage for {falls} of them."
    )
    return Drawn(figure, rows, caption)


def supports(heads: HeadInputs) -> Drawn:
    """Figure 8: the largest fifth of the entries beside the blocks that MRA-2 computes exactly."""
    length = heads.length - heads.length % 32
    budget = round(0.2 * (length // 32) ** 2)
    rows: list[dict[str, Any]] = []
    masks: list[tuple[Tensor, Tensor]] = []
    for instance in range(heads.query.shape[0]):
        for head, name in enumerate(heads.head_names):
            one = _cut(heads.head(instance, head), length)
            weights = attention_weights(one.query, one.key, one.scale)[0, 0]
            best = torch.zeros_like(weights, dtype=torch.bool).flatten()
            best[weights.flatten().topk(round(0.2 * weights.numel())).indices] = True
            best = best.view_as(weights)
            selection = select_blocks(one.query, one.key, block_budget=budget, scale=one.scale)
            blocks = selection.blocks[0, 0]
            # The blocks of most softmax mass: the best that a selection can do.
            mass = weights.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).sum((1, 3))
            ideal = torch.zeros_like(blocks).flatten()
            ideal[mass.flatten().topk(budget).indices] = True
            ideal = ideal.view_as(blocks)
            full = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
            rows.append(
                {
                    "instance": heads.instance_names[instance],
                    "head": name,
                    "mass_of_best_entries": float((weights * best).sum() / length),
                    "mass_of_mra2": float((weights * full).sum() / length),
                    "squares_of_mra2_over_best": float(
                        (weights[full] ** 2).sum() / (weights[best] ** 2).sum()
                    ),
                    "blocks_iou_with_best_blocks": float(
                        (blocks & ideal).sum() / (blocks | ideal).sum()
                    ),
                }
            )
            masks.append((best, full))
    order = sorted(range(len(rows)), key=lambda row: rows[row]["squares_of_mra2_over_best"])
    shown = [order[len(order) * quarter // 4] for quarter in (1, 2, 3)]
    figure = new_figure(11, 7.4)
    axes = figure.subplots(2, 3)
    for column, row in enumerate(shown):
        title = f"{rows[row]['instance']} {rows[row]['head']}"
        names = ("largest 20 % of entries", "blocks of MRA-2, 20 %")
        for panel, mask, name in zip(axes[:, column], masks[row], names, strict=True):
            panel.imshow(mask.numpy(), cmap="Greys", interpolation="antialiased")
            panel.set_title(f"{title}\n{name}", fontsize=9)
    caption = (
        f"{len(rows)} heads, {length} tokens; the heads shown are the quartiles. The paper shows "
        "supports of similar shape: bands, blocks and vertical stripes. Here MRA-2 holds "
        f"{_mean(rows, 'squares_of_mra2_over_best'):.0%} of the squared weight of the best fifth "
        f"of the entries and {_mean(rows, 'mass_of_mra2'):.0%} of all weight (the best entries: "
        f"{_mean(rows, 'mass_of_best_entries'):.0%}), and shares "
        f"{_mean(rows, 'blocks_iou_with_best_blocks'):.0%} of its blocks (intersection over union) "
        "with the blocks of most weight."
    )
    return Drawn(figure, rows, caption)


def _stage(heads: HeadInputs, instance: int, head: int, scales: tuple[int, ...]) -> Tensor:
    one = heads.head(instance, head)
    first = (heads.length // 16) ** 2 // 4
    budgets = (first, first * 16 // 4)[: len(scales) - 1]
    return multiresolution_attention_matrix(
        one.query,
        one.key,
        resolutions=scales,
        block_budgets=budgets,
        selection="global",
        scale=one.scale,
    )[0, 0]


def _weights(heads: HeadInputs, instance: int, head: int) -> Tensor:
    one = heads.head(instance, head)
    return attention_weights(one.query, one.key, one.scale)[0, 0].double()


def _of_power_of_2(heads: HeadInputs) -> HeadInputs:
    return _cut(heads, min(_LARGEST_SIDE, 2 ** (heads.length.bit_length() - 1)))


def _cut(heads: HeadInputs, length: int) -> HeadInputs:
    return heads if heads.length == length else heads.first_tokens(length)


def _show(panel, matrix: Tensor, title: str, norm: Normalize):
    """Draw a matrix and return the image, for a colour bar."""
    panel.set_title(title, fontsize=10)
    return panel.imshow(matrix.clamp_min(1e-12).numpy(), norm=norm, cmap="magma")


def _log_scale(weights: Tensor) -> LogNorm:
    return LogNorm(vmin=0.02 / len(weights), vmax=float(weights.max()))


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _grid(axes, side: int, scale: int, title: str, *, signs: bool = False) -> None:
    for row in range(0, side, scale):
        for column in range(0, side, scale):
            axes.add_patch(
                Rectangle((column, row), scale, scale, edgecolor="#444444", facecolor="#dce6f0")
            )
            if signs:
                half = scale / 2
                axes.add_patch(Rectangle((column, row), half, scale, facecolor="#e6b8bd"))
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
