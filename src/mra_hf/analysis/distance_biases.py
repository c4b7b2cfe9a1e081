"""The distance biases of a model: which heads opened to which distances."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mra_hf.distance_bias import DistanceBias
from mra_hf.results.drawing import new_figure, save_figure

if TYPE_CHECKING:
    import os


@torch.no_grad()
def distance_biases(model: PreTrainedModel) -> Tensor:
    """The biases of all layers, `[layers, heads, distances]` float32, distances in blocks.

    Raises:
        ValueError: the model has no distance bias.
    """
    modules = [module for module in model.modules() if isinstance(module, DistanceBias)]
    if not modules:
        raise ValueError(
            "model has no distance bias; mra-hf convert gives it to models with repeated positions."
        )
    return torch.stack([module(module.weight).float().cpu() for module in modules])


def plot_distance_biases(
    model: PreTrainedModel, path: "str | os.PathLike[str]", title: str = "distance bias"
) -> None:
    """Write a PNG with a row per head: the bias over the distance in tokens."""
    biases = distance_biases(model)
    layers, heads, n_distances = biases.shape
    size = model.config.block_size
    largest = float(biases.abs().max())
    figure = new_figure(9, 0.9 + 0.28 * layers * heads)
    axes = figure.subplots()
    image = axes.imshow(
        biases.flatten(0, 1).numpy(),
        cmap="RdBu_r",
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        interpolation="nearest",
        extent=(0, n_distances * size, layers * heads, 0),
    )
    names = [f"layer {layer}, head {head}" for layer in range(layers) for head in range(heads)]
    axes.set_yticks([row + 0.5 for row in range(layers * heads)], names, fontsize=8)
    for layer in range(1, layers):
        axes.axhline(layer * heads, color="black", linewidth=0.8)
    axes.axvline((model.config.distance_bias_window + 1) * size, color="black", linestyle=":")
    axes.set_xlabel("distance of the blocks of two tokens, in tokens (dotted: end of the window)")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="added to the logit")
    save_figure(figure, Path(path))
