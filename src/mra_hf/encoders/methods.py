"""All approximations of softmax attention in one table, to compare MRA-2 with.

A row of `METHODS` says everything about an approximation: the function that figures, Table 7 and
benchmarks call, the layer that the Long Range Arena encoder trains, its size, and its look in
figures. A new approximation is one row here plus its function or layer. Where Transformers
implements a method that accepts queries, keys and values, its code runs.

Not in the table, and why: **Reformer** has one projection for queries and keys, so it cannot attend
with separate ones. **SOFT** ignores the keys. **YOSO** normalises queries, keys and outputs to unit
length, so it approximates another function than softmax. These can only be compared as trained
models. **Scatterbrain** has no maintained package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mra_attention import mra2_attention
from mra_hf.baselines.hierarchical import h_transformer
from mra_hf.baselines.kernelized import linformer, performer
from mra_hf.baselines.measures import dense_attention
from mra_hf.baselines.optimal import optimal_sparse, truncated_svd
from mra_hf.baselines.stock import bigbird, longformer, nystromformer
from mra_hf.encoders.adamra import AdaMraAttention
from mra_hf.encoders.layers import (
    DenseAttention,
    LinearAttention,
    LinformerAttention,
    LongformerLayer,
    Mra2Attention,
    NystromformerLayer,
    PerformerAttention,
    multi_head,
)


@dataclass(frozen=True)
class Method:
    """One approximation.

    Attributes:
        label: name in figures and tables.
        colour, mark: of its lines and points in figures, as matplotlib writes them.
        attend: `(query, key, value, *, scale, size, seed) -> output` on tensors `[B, H, N, D]`
            without padding, where `size` is the one number that trades work for accuracy; None if
            the method only exists as a trained layer.
        layer: `(config, layer_idx) -> module`, the attention layer of the Long Range Arena encoder;
            None if the method is not trained there.
        size_name: what `size` counts; empty if the method has no size.
        sizes: the sizes in the paper's Table 7.
        arena_size: default of `LraConfig.attention_size`; None if `layer` has no size.
        largest_share: the largest useful size, as a share of the length.
        work: pairs of the N x N scores computed per query and unit of size; for methods that
            compute something else, the number of pairs that cost as much.
        is_practical: whether it avoids N x N matrices, so that its time is meaningful.
        fits: whether a length and a size go together.
    """

    label: str
    colour: str
    mark: str
    attend: Callable[..., Tensor] | None = None
    layer: Callable[[PreTrainedConfig, int], nn.Module] | None = None
    size_name: str = ""
    sizes: tuple[int, ...] = tuple(2**power for power in range(4, 11))
    arena_size: int | None = None
    largest_share: float = 1 / 4
    work: int = 1
    is_practical: bool = True
    fits: Callable[[int, int], bool] = lambda length, size: True

    def sizes_at(self, length: int) -> tuple[int, ...]:
        """The useful sizes at a length; empty if `attend` is None or cannot take that length."""
        sizes = self.sizes if self.attend else ()
        return tuple(
            size
            for size in sizes
            if size <= self.largest_share * length and self.fits(length, size)
        )

    def computed(self, length: int, size: int) -> float:
        """The share of the N x N scores that is computed."""
        return self.work * size / length if self.size_name else 1.0


def _dense(query, key, value, *, scale, size=0, seed=0):
    return dense_attention(query, key, value, scale)


def _mra2(query, key, value, *, scale, size, seed=0):
    return mra2_attention(query, key, value, block_per_row=size, scale=scale)


def _mra2_s(query, key, value, *, scale, size, seed=0):
    return mra2_attention(query, key, value, block_per_row=size, scale=scale, approx_mode="sparse")


def _mra2_narrow(query, key, value, *, scale, size, seed=0):
    narrow: dict[str, Any] = {"key_block_size": 8, "selection": "mass"}
    return mra2_attention(query, key, value, block_per_row=size, scale=scale, **narrow)


_BLOCKS = (8, 16, 32, 64, 128)
_MRA: dict[str, Any] = {
    "size_name": "blocks per row",
    "sizes": tuple(2**power for power in range(7)),
    "largest_share": 1 / 64,
    "work": 32,
    "layer": multi_head(Mra2Attention),
}


def _divides(length: int, size: int) -> bool:
    return length % size == 0


def _halves(length: int, size: int) -> bool:
    return length % size == 0 and (length // size).bit_count() == 1


# fmt: off
METHODS: dict[str, Method] = {
    "dense": Method(
        "dense", "#444444", "*", _dense, multi_head(DenseAttention),
        sizes=(1,), largest_share=1.0,
    ),
    "mra2": Method("MRA-2", "#b3273a", "o", _mra2, **_MRA),
    "mra2_s": Method("MRA-2-s", "#e08a3c", "o", _mra2_s, **_MRA),
    "mra2_narrow": Method(
        "MRA-2, 32 x 8", "#a6611a", "o", _mra2_narrow, **_MRA | {"layer": None},
    ),
    "longformer": Method(
        "Longformer", "#1f5f99", "s", longformer, LongformerLayer,
        size_name="window", arena_size=64, fits=_divides,
    ),
    "bigbird": Method(
        "BigBird", "#5aa0d8", "s", bigbird,
        size_name="block", sizes=_BLOCKS, largest_share=1 / 16, work=8, fits=_divides,
    ),
    "nystromformer": Method(
        "Nystromformer", "#3c8c6b", "^", nystromformer, NystromformerLayer,
        size_name="landmarks", arena_size=64, fits=_divides,
    ),
    "performer": Method(
        "Performer", "#8fc7a9", "^", performer, multi_head(PerformerAttention),
        size_name="features", arena_size=256,
    ),
    "linformer": Method(
        "Linformer", "#b9b9b9", "v", linformer, multi_head(LinformerAttention),
        size_name="projected length", arena_size=256,
    ),
    "linear": Method("linear attention", "#66a3d2", "<", None, multi_head(LinearAttention)),
    "adamra": Method("AdaMRA", "#1b9e77", "p", None, AdaMraAttention),
    "h_transformer": Method(
        "H-Transformer-1D", "#7a4fa3", "D", h_transformer,
        size_name="block", sizes=_BLOCKS, fits=_halves,
        work=3,  # the diagonal, and a geometric sum over the coarser levels
    ),
    "sparse": Method(
        "best sparse", "#c9a227", "P", optimal_sparse,
        size_name="entries per row", is_practical=False,
    ),
    "low_rank": Method(
        "best low rank", "#8c564b", "X", truncated_svd,
        size_name="rank", is_practical=False,
    ),
}
# fmt: on

#: Names of the methods that the Long Range Arena encoder can use.
ARENA_ATTENTIONS = tuple(name for name, method in METHODS.items() if method.layer is not None)
