"""`AdaMraConfig`: sizes of an AdaMRA encoder and the choices that its paper leaves open."""

from typing import ClassVar

from transformers import PreTrainedConfig

from mra_attention.checks import check_choice, check_int
from mra_hf.encoders.prenorm import NO_PREDICTIONS

FEATURE_MAPS = ("relu", "elu1", "softmax")
ROUTINGS = ("learned", "random", "soft")
ROUTER_GATES = ("straight_through", "prob", "none")
POOLINGS = ("mean", "mean_over_all")


class AdaMraConfig(PreTrainedConfig):
    """Configuration of the AdaMRA models, `model_type` "adamra_hf".

    "Adaptive Multi-Resolution Attention with Linear Complexity" (2021): every head sees keys and
    values at a resolution of its own, and a router sends every query to one head. The defaults are
    the sizes of that paper's Long Range Arena models.

    Args:
        vocab_size: rows of the token table.
        hidden_size: width d.
        num_hidden_layers: pre-norm layers.
        intermediate_size: width of the feed-forward part.
        segment_lengths: for each head, how many tokens one of its keys is the mean of: 1 / c_h of
            the paper, [2, 8, 32] for its c = (1/2, 1/8, 1/32). Equal numbers are its ablation with
            a single resolution.
        num_subheads: S, kernel attentions side by side in a head, of width d / S each.
        feature_map: phi: "relu" (the paper), "elu1" (its ablation ELU + 1), or "softmax": ordinary
            attention to the compressed keys, which costs tokens times keys.
        routing: "learned" (top-1 of the router), "random" (each query to any head: drawn anew in
            training, the same for a position in evaluation), or "soft" (all heads, weighted by the
            router's probabilities).
        router_gate: what multiplies the output of the chosen head, on which the paper is silent:
            "straight_through" (1, with the gradient of the probability), "prob" (the probability),
            or "none" (1: a learned router then gets no gradient).
        router_aux_loss_coef: factor of the load-balancing loss of Switch Transformers, H times the
            sum over heads of share times mean probability (default 0: none).
        max_position_embeddings: rows of the position table, one for each token.
        hidden_dropout_prob: dropout on embeddings and on what a layer adds.
        layer_norm_eps: of the layer norms.
        initializer_range: standard deviation of token and position embeddings.
        pooling: of the classifier: "mean" over real tokens, or "mean_over_all", their sum over
            max_position_embeddings, as the published Long Range Arena code has it.
        classifier_hidden_size: width of the classifier's hidden layer.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    model_type = "adamra_hf"
    keys_to_ignore_at_inference: ClassVar = [*NO_PREDICTIONS]

    vocab_size: int = 512
    hidden_size: int = 64
    num_hidden_layers: int = 2
    intermediate_size: int = 128
    segment_lengths: list[int] | tuple[int, ...] = (2, 8, 32)
    num_subheads: int = 2
    feature_map: str = "relu"
    routing: str = "learned"
    router_gate: str = "straight_through"
    router_aux_loss_coef: float | int = 0.0
    max_position_embeddings: int = 4096
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    pooling: str = "mean"
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
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
            *("num_subheads", "max_position_embeddings", "classifier_hidden_size"),
        ):
            check_int(name, getattr(self, name), 1)
        check_adamra(self)
        check_choice("pooling", self.pooling, POOLINGS)


def check_adamra(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless the fields that `AdaMraAttention` reads fit together."""
    lengths = config.segment_lengths
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise ValueError(
            f"segment_lengths must hold one number for each head, [2, 8, 32] for three, got "
            f"{lengths!r}."
        )
    for head, tokens in enumerate(lengths):
        check_int(f"segment_lengths[{head}]", tokens, 1)
    check_int("num_subheads", config.num_subheads, 1)
    if config.hidden_size % config.num_subheads:
        raise ValueError(
            f"hidden_size must be a multiple of num_subheads, got {config.hidden_size} and "
            f"{config.num_subheads}."
        )
    check_choice("feature_map", config.feature_map, FEATURE_MAPS)
    check_choice("routing", config.routing, ROUTINGS)
    check_choice("router_gate", config.router_gate, ROUTER_GATES)
    coefficient = config.router_aux_loss_coef
    if (
        isinstance(coefficient, bool)
        or not isinstance(coefficient, (int, float))
        or (not 0 <= coefficient < float("inf"))
    ):
        raise ValueError(f"router_aux_loss_coef must be a number from 0 on, got {coefficient!r}.")
