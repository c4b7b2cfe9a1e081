"""Configurations of the small encoders: their sizes, the attention and its settings."""

import math
from typing import ClassVar

from transformers import PreTrainedConfig

from mra_attention.checks import SELECTION_RULES, check_choice, check_int
from mra_hf.encoders.methods import ARENA_ATTENTIONS, METHODS
from mra_hf.encoders.prenorm import NO_PREDICTIONS
from mra_hf.remote_code import OwnConfig

FEATURE_MAPS = ("relu", "elu1", "softmax")
ROUTINGS = ("learned", "random", "soft")
ROUTER_GATES = ("straight_through", "prob", "none")
POOLINGS = ("mean", "mean_over_all")


class SmallEncoderConfig(OwnConfig, PreTrainedConfig):
    """Base class: the sizes that all small encoders have. Subclasses extend `check`."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    intermediate_size: int = 128
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
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
        self.check_ints("hidden_size", "num_hidden_layers", "intermediate_size")
        self.check_ints("classifier_hidden_size")

    def check_ints(self, *names: str, least: int = 1) -> None:
        """Raise a `ValueError` unless these fields are integers of at least `least`."""
        for name in names:
            check_int(name, getattr(self, name), least)

    def check_texts(self) -> None:
        """The same for the fields that describe texts."""
        self.check_ints("vocab_size", "max_position_embeddings")
        check_choice("pooling", self.pooling, POOLINGS)

    def check_mra(self) -> None:
        """The same for the number of heads and the settings of MRA-2."""
        self.check_ints("num_attention_heads", "block_per_row")
        priors = ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks")
        self.check_ints(*priors, least=0)
        check_choice("selection", self.selection, SELECTION_RULES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                f"and {self.num_attention_heads}."
            )

    def check_adamra(self) -> None:
        """The same for the settings of AdaMRA."""
        lengths = self.segment_lengths
        if not isinstance(lengths, (list, tuple)) or not lengths:
            raise ValueError(
                "segment_lengths must hold one number for each head, [2, 8, 32] for three, "
                f"got {lengths!r}."
            )
        for head, tokens in enumerate(lengths):
            check_int(f"segment_lengths[{head}]", tokens, 1)
        self.check_ints("num_subheads")
        if self.hidden_size % self.num_subheads:
            raise ValueError(
                f"hidden_size must be a multiple of num_subheads, got {self.hidden_size} and "
                f"{self.num_subheads}."
            )
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("routing", self.routing, ROUTINGS)
        check_choice("router_gate", self.router_gate, ROUTER_GATES)
        coefficient = self.router_aux_loss_coef
        is_number = isinstance(coefficient, (int, float)) and not isinstance(coefficient, bool)
        if not is_number or not 0 <= coefficient < float("inf"):
            raise ValueError(
                f"router_aux_loss_coef must be a number from 0 on, got {coefficient!r}."
            )


class AdaMraConfig(SmallEncoderConfig):
    """Configuration of the AdaMRA models, `model_type` "adamra_hf".

    "Adaptive Multi-Resolution Attention with Linear Complexity" (2021): every head sees keys and
    values at a resolution of its own, and a router sends every query to one head. The defaults are
    the sizes of that paper's Long Range Arena models.

    Args:
        vocab_size: rows of the token table.
        hidden_size: width d.
        num_hidden_layers: pre-norm layers.
        intermediate_size: width of the feed-forward part.
        segment_lengths: for each head, how many tokens are averaged into one key: 1 / c_h of the
            paper, [2, 8, 32] for its c = (1/2, 1/8, 1/32). Equal numbers are its ablation with a
            single resolution.
        num_subheads: S, kernel attentions side by side in a head, each of width d / S.
        feature_map: phi: "relu" (the paper), "elu1" (its ablation ELU + 1), or "softmax": ordinary
            attention to the compressed keys, whose cost is tokens times keys.
        routing: "learned" (top-1 of the router), "random" (each query to any head: drawn anew in
            training, fixed by the position in evaluation), or "soft" (all heads, weighted by the
            router's probabilities).
        router_gate: the factor of the selected head's output, which the paper does not specify:
            "straight_through" (1, with the gradient of the probability), "prob" (the probability),
            or "none" (1: a learned router then gets no gradient).
        router_aux_loss_coef: factor of the load-balancing loss of Switch Transformers, H times the
            sum over heads of share times mean probability (default 0: none).
        max_position_embeddings: rows of the position table, one for each token.
        hidden_dropout_prob: dropout on the embeddings and on the output of each sublayer.
        layer_norm_eps: of the layer norms.
        initializer_range: standard deviation of token and position embeddings.
        pooling: of the classifier: "mean" over real tokens, or "mean_over_all", their sum divided
            by max_position_embeddings, as in the published Long Range Arena code.
        classifier_hidden_size: width of the classifier's hidden layer.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    model_type = "adamra_hf"
    keys_to_ignore_at_inference: ClassVar = [*NO_PREDICTIONS]
    # What the models share with `LraConfig` and is fixed here.
    attention: ClassVar[str] = "adamra"
    grid: ClassVar[None] = None
    two_tower: ClassVar[bool] = False

    vocab_size: int = 512
    segment_lengths: list[int] | tuple[int, ...] = (2, 8, 32)
    num_subheads: int = 2
    feature_map: str = "relu"
    routing: str = "learned"
    router_gate: str = "straight_through"
    router_aux_loss_coef: float | int = 0.0
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    pooling: str = "mean"

    def check(self) -> None:
        super().check()
        self.check_texts()
        self.check_adamra()


class LraConfig(SmallEncoderConfig):
    """Configuration of the Long Range Arena encoder, `model_type` "lra".

    The defaults are the sizes of the two papers: two pre-norm layers of width 64 with two heads.

    Args:
        attention: one of `ARENA_ATTENTIONS`.
        attention_size: size of an attention that has one: the projected length of Linformer (256),
            the landmarks of Nystromformer (64), the features of Performer (256), the window of
            Longformer (64); None for the number in parentheses.
        attention_probs_dropout_prob: dropout on the weights of dense attention (only), as in the
            published runs.
        grid: (height, width) of an image read row by row: tokens are rearranged into patches of
            4 x 8, one MRA block each, before the layers, and back after them. None: no grid.
        block_per_row, block_size, selection: of MRA-2 and MRA-2-s, see `MraConfig`.
        initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks: likewise.
        segment_lengths, num_subheads, feature_map, routing, router_gate, router_aux_loss_coef: of
            AdaMRA, see `AdaMraConfig`.
        pooling: "mean_over_all", the sum over tokens divided by max_position_embeddings (as
            published, where every text is padded to that length), or "mean" over real tokens.
        two_tower: classify pairs of texts, (input_ids, input_ids_2), by the features of both.
        vocab_size, max_position_embeddings: of the embeddings.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the layers.
        hidden_dropout_prob, layer_norm_eps, initializer_range: as in RoBERTa.
        classifier_hidden_size: width of the classifier's hidden layer.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    model_type = "lra"
    keys_to_ignore_at_inference: ClassVar = [*NO_PREDICTIONS]

    vocab_size: int = 512
    num_attention_heads: int = 2
    max_position_embeddings: int = 4096
    attention_probs_dropout_prob: float | int = 0.1
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

    def check(self) -> None:
        super().check()
        check_choice("attention", self.attention, ARENA_ATTENTIONS)
        self.check_texts()
        self.check_ints("block_size")
        self.check_mra()
        if self.attention_size is not None:
            if METHODS[self.attention].arena_size is None:
                with_size = [name for name in ARENA_ATTENTIONS if METHODS[name].arena_size]
                raise ValueError(
                    f"attention_size is for {with_size}, got {self.attention_size} with "
                    f"attention={self.attention!r}; drop it."
                )
            self.check_ints("attention_size")
        if self.attention == "longformer" and (self.size or 0) % 2:
            raise ValueError(
                f"attention_size must be even, got {self.size}: "
                "half of Longformer's window lies on each side."
            )
        if self.grid is not None:
            self._check_grid()
        self.check_adamra()

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
        return self.attention_size or METHODS[self.attention].arena_size
