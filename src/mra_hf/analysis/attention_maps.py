"""The attention matrix of a head, exact and approximated, from the same queries and keys."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_attention import BlockSelection, mra2_attention_matrix, select_blocks
from mra_attention.blocks import upsample
from mra_hf.attention import attention_settings
from mra_hf.distance_bias import MraSelfAttention
from mra_hf.results.drawing import new_figure, save_figure


@dataclass(frozen=True)
class HeadMatrices:
    """One head of one layer.

    Attributes:
        exact: `[N, N]` softmax attention, with the model's distance bias if it has one.
        approximate: `[N, N]` MRA-2 of the same queries, keys and bias, rows normalised.
        selection: the pairs in high resolution, of one head: `blocks` `[R, C]` bool.
        layer, head: numbers of the layer and the head, from 0.
    """

    exact: Tensor
    approximate: Tensor
    selection: BlockSelection
    layer: int
    head: int

    @property
    def chosen_tokens(self) -> Tensor:
        """`[N, N]` bool, True at the token pairs that are exact."""
        sizes = (self.selection.block_size, self.selection.key_block_size)
        length = self.exact.shape[0]
        return upsample(self.selection.blocks, *sizes)[:length, :length]

    @property
    def relative_error(self) -> float:
        """||approximate - exact|| / ||exact|| in the Frobenius norm."""
        return float((self.approximate - self.exact).norm() / self.exact.norm())


@torch.no_grad()
def matrices_of_all_heads(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[HeadMatrices]:
    """Return the matrices of every head of a model of this family, for one sample without padding.

    Queries and keys are recorded in one dense forward pass, so both matrices of a head come from
    the same ones.

    Args:
        model: a model with a head or the bare encoder; its config holds the MRA settings.
        inputs: `input_ids` `[1, N]`, without padding.

    Raises:
        ValueError: the configuration has other scales than two (`resolutions`).
    """
    encoder = getattr(model, "roberta", model)
    layers = encoder.get_submodule("encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    projections: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []
    for layer, module in enumerate(layers):
        attention = module.get_submodule("attention.self")
        for name in ("query", "key"):

            def record(_module, _inputs, output, layer=layer, name=name):
                projections[layer][name] = output

            handles.append(getattr(attention, name).register_forward_hook(record))
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
        encoder(input_ids=inputs["input_ids"])
    finally:
        model.set_attn_implementation(implementation)
        for handle in handles:
            handle.remove()

    settings = attention_settings(model.config, "mra2")
    if settings.resolutions is not None:
        raise ValueError(
            "pictures are of two scales, and the configuration has "
            f"resolutions={settings.resolutions}; set block_per_row instead."
        )
    heads = model.config.num_attention_heads
    matrices = []
    for layer, recorded in enumerate(projections):
        query, key = (
            recorded[name].unflatten(-1, (heads, -1)).transpose(1, 2).float()
            for name in ("query", "key")
        )
        attention = layers[layer].get_submodule("attention.self")
        arguments = settings.for_layer(layer).for_operator()
        if isinstance(attention, MraSelfAttention):
            arguments["distance_bias"] = attention.distance_bias(query)
        approx_mode = arguments.pop("approx_mode")
        selection = select_blocks(query, key, **arguments)
        arguments["selection"] = selection
        approximate = mra2_attention_matrix(query, key, **arguments, approx_mode=approx_mode)[0]
        everything = torch.ones_like(selection.blocks)
        arguments["selection"] = dataclasses.replace(selection, blocks=everything)
        exact = mra2_attention_matrix(query, key, **arguments)[0]
        matrices += [
            HeadMatrices(exact[head], approximate[head], of_head, layer, head)
            for head in range(heads)
            for of_head in [dataclasses.replace(selection, blocks=selection.blocks[0, head])]
        ]
    return matrices


def plot_two_resolutions(matrices: HeadMatrices, path: Path, title: str) -> None:
    """Write a PNG of the exact matrix beside its approximation, in one logarithmic scale."""
    from matplotlib.colors import LogNorm

    length = matrices.exact.shape[0]
    scale = LogNorm(vmin=0.02 / length, vmax=float(matrices.exact.max()))
    figure = new_figure(11, 5.6)
    left, right = figure.subplots(1, 2, sharey=True)
    blocks = matrices.selection.blocks
    exact_pairs, all_pairs = int(blocks.sum()), blocks.numel()
    mode = "MRA-2-s" if bool((matrices.approximate == 0).any()) else "MRA-2"
    approximation = (
        f"{mode}: {exact_pairs} of {all_pairs} blocks exact ({exact_pairs / all_pairs:.0%}), "
        f"relative error {matrices.relative_error:.2f}"
    )
    for axes, matrix, name in (
        (left, matrices.exact, "exact softmax attention"),
        (right, matrices.approximate, approximation),
    ):
        image = axes.imshow(
            matrix.clamp_min(1e-12).numpy(), norm=scale, cmap="magma", interpolation="nearest"
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("key token")
    left.set_ylabel("query token")
    figure.colorbar(image, ax=(left, right), label="attention weight (log scale)", shrink=0.85)
    figure.suptitle(f"{title}, layer {matrices.layer}, head {matrices.head}", fontsize=12)
    save_figure(figure, path, dpi=100)
