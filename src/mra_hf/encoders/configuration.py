"""`LraConfig`: the encoder of the Long Range Arena and the attention in it."""

import math
from typing import ClassVar

from transformers import PreTrainedConfig

from mra_attention.checks import SELECTION_RULES, check_choice, check_int
from mra_hf.encoders.adamra_configuration import POOLINGS, check_adamra
from mra_hf.encoders.prenorm import NO_PREDICTIONS

#: Attentions, and what `attention_size` counts for those that have a size; its default.
ATTENTIONS: dict[str, tuple[str, int] | None] = {
    "dense": None,
    "mra2": None,
    "mra2_s": None,
    "adamra": None,
    "linear": None,
    "linformer": ("projected length", 256),
    "nystromformer": ("landmarks", 64),
    "performer": ("features", 256),
    "longformer": ("window", 64),
}


class LraConfig(PreTrainedConfig):
    """Configuration of the Long Range Arena encoder, `model_type` "lra".

    The defaults are the sizes of the two papers: two pre-norm layers of width 64 with two heads.

    Args:
        attention: a key of `ATTENTIONS`.
        attention_size: projected length of Linformer (256), landmarks of Nystromformer (64),
            features of Performer (256), window of Longformer (64); None: that.
        attention_probs_dropout_prob: dropout on the weights of dense attention, which alone has it
            in the published runs.
        grid: (height, width) of an image read row by row: tokens are put in patches of 4 x 8, one
            MRA block each, before the layers and back behind them. None: no grid.
        block_per_row, block_size, initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks,
            selection: of MRA-2 and MRA-2-s, see `MraConfig`.
        segment_lengths, num_subheads, feature_map, routing, router_gate, router_aux_loss_coef: of
            AdaMRA, see `AdaMraConfig`.
        pooling: "mean_over_all", the sum over tokens by max_position_embeddings (as published,
            where every text is padded to so many places), or "mean" over real tokens.
        two_tower: classify pairs of texts, (input_ids, input_ids_2), by the features of both.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
            max_position_embeddings, hidden_dropout_prob, layer_norm_eps, initializer_range,
            classifier_hidden_size: sizes.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    model_type = "lra"
    keys_to_ignore_at_inference: ClassVar = [*NO_PREDICTIONS]

    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 128
    max_position_embeddings: int = 4096
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    attention: str = "mra2"
    attention_size: int | None = None
    grid: list[int] | tuple[int, int] | None = None
    block_per_row: int = 8
    block_size: int = 32
    initial_prior_first_n_blocks: int = 0
    initial_prior_diagonal_n_blocks: int = 0
    selection: str = "row_normalized"
    segment_lengths: list[int] | tuple[int, ...] = (2, 8, 32)
    num_subheads: int = 2
    feature_map: str = "relu"
    routing: str = "learned"
    router_gate: str = "straight_through"
    router_aux_loss_coef: float | int = 0.0
    pooling: str = "mean_over_all"
    two_tower: bool = False
    classifier_hidden_size: int = 128

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    def validate(self):
        """Check all fields; also called by `save_pretrained`."""
        super().validate()
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` unless the fields of this class fit together."""
        check_choice("attention", self.attention, tuple(ATTENTIONS))
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("selection", self.selection, SELECTION_RULES)
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "max_position_embeddings", "classifier_hidden_size"),
            *("block_per_row", "block_size"),
        ):
            check_int(name, getattr(self, name), 1)
        for name in ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks"):
            check_int(name, getattr(self, name), 0)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}."
            )
        if self.attention_size is not None:
            if ATTENTIONS[self.attention] is None:
                raise ValueError(
                    f"attention_size is for {[n for n, size in ATTENTIONS.items() if size]}, got "
                    f"{self.attention_size} with attention={self.attention!r}; drop it."
                )
            check_int("attention_size", self.attention_size, 1)
        if self.attention == "longformer" and self.size % 2:
            raise ValueError(
                f"attention_size must be even, got {self.size}: half of Longformer's window lies "
                "on each side."
            )
        if self.grid is not None:
            self._check_grid()
        check_adamra(self)

    def _check_grid(self) -> None:
        if not isinstance(self.grid, (list, tuple)) or len(self.grid) != 2:
            raise ValueError(f"grid must be [height, width], got {self.grid!r}.")
        height, width = self.grid
        check_int("grid[0]", height, 4)
        check_int("grid[1]", width, 8)
        if height % 4 or width % 8:
            raise ValueError(f"grid must be made of patches of 4 x 8, got {list(self.grid)}.")
        if math.prod(self.grid) > self.max_position_embeddings:
            raise ValueError(
                f"grid={list(self.grid)} has {math.prod(self.grid)} tokens, and "
                f"max_position_embeddings is {self.max_position_embeddings}."
            )

    @property
    def size(self) -> int | None:
        """`attention_size`, or the default of the attention; None where it has no size."""
        known = ATTENTIONS[self.attention]
        return None if known is None else self.attention_size or known[1]
