"""`MraConfig`: RoBERTa's configuration plus the settings of multi-resolution attention.

Field names are those that Transformers' own MRA made known and those of
`mra_attention.mra2_attention`.
"""

from collections.abc import Sequence
from typing import Any

from transformers import RobertaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from mra_attention.blocks import count_blocks
from mra_attention.checks import (
    APPROX_MODES,
    SCHEME_RULES,
    SELECTION_RULES,
    check_int,
    check_scales,
)

logger = logging.get_logger(__name__)

#: Types whose weights and configuration mean the same in our classes: they open directly.
ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")
BUILTIN_TYPE = "mra"

#: What `MraForCandidateChoice` can score.
CANDIDATE_POOLING = ("marker", "mean")

#: The attention settings and their defaults: fields of `MraConfig`, keys of `config.mra` elsewhere.
ATTENTION_DEFAULTS: dict[str, Any] = {
    "block_per_row": 8,
    "block_budget": None,
    "approx_mode": "full",
    "initial_prior_first_n_blocks": 0,
    "initial_prior_diagonal_n_blocks": 0,
    "block_size": 32,
    "selection": "row_normalized",
    "resolutions": None,
    "block_budgets": None,
}
#: The two ways to say which scales there are and what is chosen: one excludes the other, and the
#: settings of the other are None.
_TWO_SCALES = ("block_per_row", "block_budget", "block_size")
_ANY_SCALES = ("resolutions", "block_budgets")


class MraConfig(RobertaConfig):
    """Configuration of the models of this package, `model_type` "mra_hf".

    Reads directories of type `roberta`, `xlm-roberta`, `camembert` as they are, and of
    Transformers' own type `mra`, such as
    [uw-madison/mra-base-512-4](https://huggingface.co/uw-madison/mra-base-512-4), with the meaning
    they were trained with. Other fields are those of `RobertaConfig`.

    Args:
        block_per_row: budget, in exact blocks per block row that holds a real token (default 8); a
            list has one number for each layer, see `mra-hf calibrate`.
        block_budget: budget in exact blocks per head, in place of `block_per_row` (default None:
            not used).
        approx_mode: "full" (MRA-2, default) or "sparse" (MRA-2-s: blocks in high resolution only).
        initial_prior_first_n_blocks: first block rows and columns that are always exact (default
            0).
        initial_prior_diagonal_n_blocks: width in blocks of the diagonal band that is always exact
            (default 0).
        block_size: tokens per block (default 32).
        selection: "row_normalized" (default), "global" or "refined", the rule that ranks blocks.
        resolutions: scales from coarse to fine in place of (block_size, 1), see
            `mra_attention.multiresolution_attention` (default None). Priors then are on blocks of
            the coarsest scale, and block_per_row, block_budget and block_size are None.
        block_budgets: blocks per head that are cut, one number for each of `resolutions` but the
            last (default None).
        embedding_size: width of the embeddings when it differs from `hidden_size`; a projection
            follows their sum (the papers' small models). None: `hidden_size`.
        sparse_prediction: masked-LM training computes logits at the labelled places alone.
        candidate_pooling: what `MraForCandidateChoice` scores: "marker", the state of the token
            that opens a candidate (the paper), or "mean", the mean over the candidate's tokens.
        max_position_embeddings: rows of the position table, as in RoBERTa: 514 for 512 tokens, 4098
            for 4096.
        attention_probs_dropout_prob: dropout on attention weights; MRA has none, so only 0
            (default) can run with it.

    Raises:
        ValueError: a field of the wrong type or out of range, or priors that leave no budget for
            the data.
    """

    model_type = "mra_hf"

    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    attention_probs_dropout_prob: float | int = 0.0
    block_per_row: int | list[int] | tuple[int, ...] | None = None
    block_budget: int | None = None
    approx_mode: str = "full"
    initial_prior_first_n_blocks: int = 0
    initial_prior_diagonal_n_blocks: int = 0
    block_size: int | None = None
    selection: str = "row_normalized"
    resolutions: list[int] | tuple[int, ...] | None = None
    block_budgets: list[int] | tuple[int, ...] | None = None
    embedding_size: int | None = None
    sparse_prediction: bool = False
    candidate_pooling: str = "marker"

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        own = {name: getattr(self, name) for name in ATTENTION_DEFAULTS}
        for name, value in with_defaults(own).items():
            setattr(self, name, value)
        self.check()

    def validate(self):
        """Check all fields; also called by `save_pretrained`."""
        super().validate()
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` unless the fields of this class fit together."""
        check_attention_settings({name: getattr(self, name) for name in ATTENTION_DEFAULTS})
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            check_int(name, getattr(self, name), 1)
        if isinstance(self.block_per_row, (list, tuple)) and (
            len(self.block_per_row) != self.num_hidden_layers
        ):
            raise ValueError(
                f"block_per_row must hold one number for each of {self.num_hidden_layers} layers, "
                f"got {len(self.block_per_row)}: {list(self.block_per_row)}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} "
                "and "
                f"{self.num_attention_heads}."
            )
        if self.embedding_size is not None:
            check_int("embedding_size", self.embedding_size, 1)
        if not isinstance(self.sparse_prediction, bool):
            raise ValueError(
                f"sparse_prediction must be True or False, got {self.sparse_prediction!r}."
            )
        if self.candidate_pooling not in CANDIDATE_POOLING:
            raise ValueError(
                f"candidate_pooling must be one of {CANDIDATE_POOLING}, got "
                f"{self.candidate_pooling!r}."
            )
        if not isinstance(self.pad_token_id, int):
            raise ValueError(
                f"pad_token_id must be an integer, got {self.pad_token_id!r}: positions are "
                "counted from "
                "pad_token_id + 1, as in RoBERTa."
            )
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        self._check_priors_of_scales()
        if self.max_tokens < 1:
            raise ValueError(
                f"max_position_embeddings must exceed pad_token_id + 1 = {self.pad_token_id + 1}, "
                "got "
                f"{self.max_position_embeddings}; it counts table rows: tokens + pad_token_id + 1."
            )
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} must be False, got True: MRA is attention of an encoder to itself."
                )

    def _check_priors_of_scales(self) -> None:
        """Refuse priors that take the whole budget of the coarsest scale at the longest length."""
        first, diagonal = self.initial_prior_first_n_blocks, self.initial_prior_diagonal_n_blocks
        if not self.block_budgets or not (first or diagonal) or self.max_tokens < 1:
            return
        rows = count_blocks(self.max_tokens, self.resolutions[0])
        others = max(0, rows - first)  # without the first rows and columns
        pairs = rows**2 - others**2
        if diagonal:
            pairs += sum(
                max(0, others - abs(d)) for d in range(-(diagonal // 2), diagonal // 2 + 1)
            )
        if self.block_budgets[0] < min(pairs + 1, rows**2):
            raise ValueError(
                f"block_budgets[0] must be at least {min(pairs + 1, rows**2)} with "
                f"initial_prior_first_n_blocks={first} and "
                f"initial_prior_diagonal_n_blocks={diagonal}, got {self.block_budgets[0]}: at "
                f"{self.max_tokens} tokens, {rows} rows of blocks, the blocks that are always cut "
                "would leave none for the data-dependent choice."
            )

    @property
    def max_tokens(self) -> int:
        """The longest sequence, in tokens: table rows less the `pad_token_id + 1` reserved ones."""
        return self.max_position_embeddings - (self.pad_token_id + 1)

    @property
    def output_attentions(self) -> bool | None:
        """Ask for the matrices per call; set here, the first forward is refused (see the attention
        function).
        """
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        # The base class would switch the model to dense "eager" attention here without a word.
        self._output_attentions = value

    def density(self, length: int | None = None) -> float:
        """Return the share of the matrix that the finest scale covers, for `length` real tokens
        (default: the longest sequence); the mean over layers where they differ.
        """
        length = length or self.max_tokens
        if self.resolutions is not None:
            rows = count_blocks(length, self.resolutions[0]) * self.resolutions[0]
            pairs = [(rows // size) ** 2 for size in self.resolutions]
            share = 1.0  # of the matrix, that a scale covers
            for budget, of_scale in zip(self.block_budgets or (), pairs, strict=False):
                share = min(share, budget / of_scale)
            return share
        rows = count_blocks(length, self.block_size)
        if self.block_budget is not None:
            return min(1.0, self.block_budget / rows**2)
        layers = of_layers(self.block_per_row)
        return sum(min(1.0, blocks / rows) for blocks in layers) / len(layers)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the base class; a directory of another type is translated, or refused where that would
        be wrong.
        """
        source_type = config_dict.get("model_type", cls.model_type)
        config_dict = dict(config_dict)
        if source_type in (BUILTIN_TYPE, *ROBERTA_TYPES):
            config_dict = _translate(config_dict, source_type)
        elif source_type != cls.model_type:
            raise ValueError(
                f'This configuration is of model_type "{source_type}", but MraConfig reads '
                f'"{cls.model_type}", "{BUILTIN_TYPE}" and {ROBERTA_TYPES}. Convert BERT '
                "checkpoints with `mra-hf convert SOURCE OUT`."
            )
        if {"block_per_row", "max_position_embeddings"} & kwargs.keys():
            config_dict["block_budget"] = None  # else it would silently stand above what is asked
        if kwargs.keys() & {*_TWO_SCALES, *_ANY_SCALES}:
            # What belongs together is set together; other settings may be followed by overrides.
            config_dict |= one_description(
                {name: kwargs.pop(name) for name in ATTENTION_DEFAULTS if name in kwargs}
            )
        return super().from_dict(config_dict, **kwargs)


def _translate(config_dict: dict[str, Any], source_type: str) -> dict[str, Any]:
    """Fields of a foreign `config.json` in our meaning; fields it leaves out take the defaults of
    its own type.
    """
    if source_type == BUILTIN_TYPE:
        from transformers.models.mra.configuration_mra import MraConfig as BuiltinConfig

        defaults = BuiltinConfig().to_dict()
    else:
        defaults = CONFIG_MAPPING[source_type]().to_dict()
    shared = set(MraConfig().to_dict()) - {"model_type", "transformers_version", "dtype"}
    fields = {name: value for name, value in defaults.items() if name in shared} | config_dict
    if source_type == BUILTIN_TYPE:
        # Theirs counts usable tokens, the table has two rows more. The budget they were trained
        # with follows the configured length, whatever the length of the input.
        if fields["pad_token_id"] != 1:
            raise ValueError(
                f"pad_token_id must be 1 in a configuration of type mra, got "
                f"{fields['pad_token_id']}: its positions start at row 2 whatever the padding id, "
                "ours at pad_token_id + 1. Convert it with `mra-hf convert SOURCE OUT`."
            )
        tokens = fields["max_position_embeddings"]
        fields["max_position_embeddings"] = tokens + 2
        fields["block_budget"] = tokens // 32 * fields["block_per_row"]
    fields |= fields.pop("mra", None) or {}  # the settings of a stock model, see set_attention
    fields["model_type"] = MraConfig.model_type
    if fields.get("attention_probs_dropout_prob"):
        logger.warning_once(
            f"attention_probs_dropout_prob {fields['attention_probs_dropout_prob']} of this "
            f"{source_type} configuration "
            "is set to 0: multi-resolution attention has no dropout on attention weights."
        )
        fields["attention_probs_dropout_prob"] = 0.0
    return fields


def one_description(asked: dict[str, Any]) -> dict[str, Any]:
    """`asked` with None for the other description of the scales: what is asked for replaces it.

    Raises:
        ValueError: both are asked for.
    """
    _refuse_both(asked)
    if asked.get("resolutions") is not None:
        other = _TWO_SCALES
    elif any(asked.get(name) is not None for name in _TWO_SCALES):
        other = _ANY_SCALES
    else:
        other = ()
    return dict.fromkeys(other) | asked


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The full set of settings, where `given` is silent with the defaults of its description."""
    if given.get("resolutions") is not None:
        return ATTENTION_DEFAULTS | dict.fromkeys(_TWO_SCALES) | given
    unset = {name for name in _TWO_SCALES if given.get(name) is None}
    return ATTENTION_DEFAULTS | {name: value for name, value in given.items() if name not in unset}


def _refuse_both(settings: dict[str, Any]) -> None:
    if settings.get("resolutions") is None:
        return
    both = [name for name in _TWO_SCALES if settings.get(name) is not None]
    if both:
        raise ValueError(
            f"resolutions and {both[0]} describe the same thing; give one of them, got "
            f"resolutions={list(settings['resolutions'])} and {both[0]}={settings[both[0]]}."
        )


def of_layers(block_per_row: int | Sequence[int]) -> tuple[int, ...]:
    """The budgets of the layers; one number where it is that of all."""
    return (block_per_row,) if isinstance(block_per_row, int) else tuple(block_per_row)


def check_attention_settings(settings: dict[str, Any]) -> None:
    """Raise a `ValueError` unless `settings`, a full set of `ATTENTION_DEFAULTS`, can be run."""
    unknown = sorted(set(settings) - set(ATTENTION_DEFAULTS))
    if unknown:
        raise ValueError(f"unknown MRA settings {unknown}; known are {sorted(ATTENTION_DEFAULTS)}.")
    for name, allowed in (("approx_mode", APPROX_MODES), ("selection", SELECTION_RULES)):
        if settings[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {settings[name]!r}.")
    check_int("initial_prior_first_n_blocks", settings["initial_prior_first_n_blocks"], 0)
    check_int("initial_prior_diagonal_n_blocks", settings["initial_prior_diagonal_n_blocks"], 0)
    if settings["resolutions"] is None and settings["block_budgets"] is None:
        _check_two_scales(settings)
    else:
        _check_scales(settings)


def _check_two_scales(settings: dict[str, Any]) -> None:
    if isinstance(settings["block_per_row"], (list, tuple)):
        if not settings["block_per_row"]:
            raise ValueError("block_per_row must hold one number for each layer, got none.")
        for layer, blocks in enumerate(settings["block_per_row"]):
            check_int(f"block_per_row[{layer}]", blocks, 1)
        if settings["block_budget"] is not None:
            raise ValueError(
                f"block_budget={settings['block_budget']} would replace block_per_row="
                f"{list(settings['block_per_row'])}; give one of them."
            )
    else:
        check_int("block_per_row", settings["block_per_row"], 1)
    check_int("block_size", settings["block_size"], 1)
    if settings["block_budget"] is not None:
        check_int("block_budget", settings["block_budget"], 1)
    first = settings["initial_prior_first_n_blocks"]
    diagonal = settings["initial_prior_diagonal_n_blocks"]
    needed = 2 * first + (2 * (diagonal // 2) + 1 if diagonal else 0) + 1
    if min(of_layers(settings["block_per_row"])) < needed:
        raise ValueError(
            f"block_per_row must be at least {needed} with initial_prior_first_n_blocks={first} "
            "and "
            f"initial_prior_diagonal_n_blocks={diagonal}, got {settings['block_per_row']}: the "
            "blocks that are always exact "
            "would leave none for the data-dependent choice. Raise block_per_row or lower the "
            "priors."
        )


def _check_scales(settings: dict[str, Any]) -> None:
    if settings["resolutions"] is None:
        raise ValueError(
            f"block_budgets={settings['block_budgets']} needs resolutions, the scales it is for; "
            "with two scales set block_per_row or block_budget instead."
        )
    _refuse_both(settings)
    scales, _ = check_scales(settings["resolutions"], settings["block_budgets"] or ())
    if settings["selection"] == "refined" and (len(scales) != 2 or scales[1] != 1):
        raise ValueError(
            f'selection="refined" is for two scales that end in 1, got resolutions={list(scales)}; '
            f"use one of {SCHEME_RULES}."
        )
