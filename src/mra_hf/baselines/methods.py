"""Other ways to approximate softmax attention, behind one interface, to compare MRA-2 with.

A method is a function `attend(query, key, value, *, scale, size, seed)` of tensors `[B, H, N, D]`
without padding, where `size` is the one number that trades work for accuracy. `METHODS` lists them
by name. Where Transformers has a method that runs on given queries, keys and values, that is what
runs.

Not among them, and why: **Reformer** has one projection for queries and keys and cannot attend by
given ones; **SOFT** ignores the keys; **YOSO** normalises queries, keys and outputs to unit length
and approximates another function than softmax. These can be compared as trained models alone.
**Scatterbrain** has no kept package (its own needs one that does not build on current torch), and
its sum of a sparse and a feature-map part is left out until somebody wants it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mra_attention import mra2_attention
from mra_hf.baselines.hierarchical import h_transformer
from mra_hf.baselines.kernelized import linformer, performer
from mra_hf.baselines.measures import dense_attention
from mra_hf.baselines.optimal import optimal_sparse, truncated_svd
from mra_hf.baselines.stock import bigbird, longformer, nystromformer


@dataclass(frozen=True)
class Method:
    """One way to attend.

    Attributes:
        label: what it is called in figures.
        attend: `(query, key, value, *, scale, size, seed) -> output`, tensors `[B, H, N, D]`.
        size_name: what `size` counts; empty where everything is computed and there is none.
        sizes: those that the paper's Table 7 has.
        largest_share: the largest size that makes sense, as a share of the length.
        work: pairs of the N x N scores that are computed for each query and unit of size; for
            methods that compute others instead, the work of as many.
        is_practical: whether it needs no N x N matrix, so that its time means something.
        fits: whether a length and a size go together.
        colour: of its lines in figures.
    """

    label: str
    attend: Callable[..., Tensor]
    size_name: str
    sizes: tuple[int, ...] = tuple(2**power for power in range(4, 11))
    largest_share: float = 1 / 4
    work: int = 1
    is_practical: bool = True
    fits: Callable[[int, int], bool] = lambda length, size: True
    colour: str = "#444444"

    def sizes_at(self, length: int) -> tuple[int, ...]:
        """The sizes that make sense at a length; none where the method cannot take it."""
        return tuple(
            size
            for size in self.sizes
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


_MRA = {
    "size_name": "blocks per row",
    "sizes": tuple(2**power for power in range(7)),
    "largest_share": 1 / 64,
    "work": 32,
}
_BLOCKS = (8, 16, 32, 64, 128)


def _divides(length: int, size: int) -> bool:
    return length % size == 0


def _halves(length: int, size: int) -> bool:
    return length % size == 0 and (length // size).bit_count() == 1


METHODS: dict[str, Method] = {
    "dense": Method("dense", _dense, "", (1,), 1.0),
    "mra2": Method("MRA-2", _mra2, **_MRA),
    "mra2_s": Method("MRA-2-s", _mra2_s, **_MRA),
    "longformer": Method("Longformer", longformer, "window", fits=_divides, colour="#1f5f99"),
    "bigbird": Method("BigBird", bigbird, "block", _BLOCKS, 1 / 16, 8, fits=_divides),
    "nystromformer": Method("Nystromformer", nystromformer, "landmarks", fits=_divides),
    "performer": Method("Performer", performer, "features"),
    "linformer": Method("Linformer", linformer, "projected length"),
    # The diagonal, and a geometric sum over the coarser levels.
    "h_transformer": Method(
        "H-Transformer-1D", h_transformer, "block", _BLOCKS, work=3, fits=_halves
    ),
    "linear": Method("linear attention", None, "", (), colour="#66a3d2"),
    "adamra": Method("AdaMRA", None, "", (), colour="#1b9e77"),
    "sparse": Method("best sparse", optimal_sparse, "entries per row", is_practical=False),
    "low_rank": Method("best low rank", truncated_svd, "rank", is_practical=False),
}
