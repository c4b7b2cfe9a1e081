"""`MraConfig`: RoBERTa's configuration plus the settings of multi-resolution attention.

`AttentionSettings` holds these settings, wherever a configuration keeps them. Transformers' own MRA
and `mra_attention.mra2_attention` use the same names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig, RobertaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from mra_attention.blocks import count_blocks
from mra_attention.checks import (
    APPROX_MODES,
    SCHEME_RULES,
    SELECTION_RULES,
    check_block_sizes,
    check_choice,
    check_int,
    check_int_if_given,
    check_scales,
)
from mra_hf.remote_code import OwnConfig

logger = logging.get_logger(__name__)

#: Types whose weights and configuration mean the same in our classes: they open directly.
ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")
BUILTIN_TYPE = "mra"
#: Rows of the built-in MRA's position table in front of its first position.
BUILTIN_RESERVED_ROWS = 2

#: The largest `distance_bias_far`: no logit is that large, and float16 can hold it.
MAX_DISTANCE_BIAS = 1e4
#: What `MraForCandidateChoice` can score.
CANDIDATE_POOLING = ("marker", "mean")

#: Two mutually exclusive ways to give the scales; the settings of the unused one are None.
_TWO_SCALES = ("block_per_row", "block_budget", "block_size", "key_block_size")
_ANY_SCALES = ("resolutions", "block_budgets")


@dataclass(frozen=True)
class AttentionSettings:
    """The settings of multi-resolution attention, explained at `MraConfig`.

    Without `resolutions`, a `block_per_row` of None becomes 8, a `block_size` 32, and a
    `key_block_size` the `block_size`. `check` says whether the settings can be run.
    """

    block_per_row: int | list[int] | tuple[int, ...] | None = None
    block_budget: int | None = None
    approx_mode: str = "full"
    initial_prior_first_n_blocks: int = 0
    initial_prior_diagonal_n_blocks: int = 0
    block_size: int | None = None
    key_block_size: int | None = None
    selection: str = "row_normalized"
    resolutions: Sequence[int] | None = None
    block_budgets: Sequence[int] | None = None

    def __post_init__(self):
        if self.resolutions is None:
            side = self.block_size or 32
            defaults = {"block_per_row": 8, "block_size": side, "key_block_size": side}
            for name, default in defaults.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "AttentionSettings":
        """Return the settings of `config`: fields of a `MraConfig`, else the dict `config.mra`.

        Raises:
            ValueError: `config.mra` has an unknown setting.
        """
        return cls(**explicit_settings(config))

    def replace(self, **changes: Any) -> "AttentionSettings":
        """Return a copy with `changes` and what follows from them, see `complete_changes`.

        Raises:
            ValueError: an unknown setting, or both descriptions of the scales.
        """
        return AttentionSettings(**(self.as_dict() | complete_changes(changes)))

    def as_dict(self) -> dict[str, Any]:
        """Return all settings by name."""
        return {name: getattr(self, name) for name in SETTING_NAMES}

    def write_to(self, config: "MraConfig") -> None:
        """Set the fields of `config`; squares as None, so that they follow another `block_size`."""
        squares = {"key_block_size": None} if self.key_block_size == self.block_size else {}
        for name, value in (self.as_dict() | squares).items():
            setattr(config, name, value)

    def for_operator(self) -> dict[str, Any]:
        """Return the arguments of `mra2_attention`, or of `multiresolution_attention`."""
        unused = _ANY_SCALES if self.resolutions is None else _TWO_SCALES
        settings = {name: getattr(self, name) for name in SETTING_NAMES if name not in unused}
        if self.resolutions is not None:
            settings["block_budgets"] = self.block_budgets or ()
        return settings

    def for_selection(self) -> dict[str, Any]:
        """Return the arguments of `select_blocks`, which knows two scales only."""
        return {name: x for name, x in self.for_operator().items() if name != "approx_mode"}

    def for_layer(
        self, layer_idx: int | None, num_layers: int | None = None, owner: str = "the attention"
    ) -> "AttentionSettings":
        """Return the settings of layer `layer_idx` of `num_layers`, whose `block_per_row` is one
        number.

        Raises:
            ValueError: a list has no number for this layer of `owner`.
        """
        budgets = self.block_per_row
        if not isinstance(budgets, (list, tuple)):
            return self
        num_layers = num_layers or len(budgets)
        if layer_idx is None or layer_idx >= len(budgets) or num_layers != len(budgets):
            layer = f"is layer {layer_idx} of {num_layers}"
            raise ValueError(
                f"block_per_row={list(budgets)} has one number for each layer, and {owner} "
                f"{'does not know its place among them' if layer_idx is None else layer}; "
                "give one number for all layers."
            )
        return AttentionSettings(**(self.as_dict() | {"block_per_row": budgets[layer_idx]}))

    @property
    def layer_budgets(self) -> tuple[int, ...]:
        """`block_per_row` of every layer; a single number where all layers share it."""
        budgets = self.block_per_row
        assert budgets is not None  # of two scales
        return tuple(budgets) if isinstance(budgets, (list, tuple)) else (budgets,)

    @property
    def _side(self) -> int:
        assert self.block_size is not None  # of two scales
        return self.block_size

    def density(self, length: int) -> float:
        """Return the share that the finest scale covers at `length` tokens, a mean of layers."""
        if self.resolutions is not None:
            padded = count_blocks(length, self.resolutions[0]) * self.resolutions[0]
            pairs = zip(self.block_budgets or (), self.resolutions, strict=False)
            return min([1.0, *(budget / (padded // size) ** 2 for budget, size in pairs)])
        rows = count_blocks(length, self._side)
        if self.block_budget is not None:
            return min(1.0, self.block_budget / rows**2)
        budgets = self.layer_budgets
        return sum(min(1.0, blocks / rows) for blocks in budgets) / len(budgets)

    def blocks_per_head(self, length: int) -> int:
        """Return how many blocks of a head the finest scale covers at `length` real tokens."""
        if self.resolutions is not None:
            return (self.block_budgets or (0,))[-1]
        rows = count_blocks(length, self._side)
        if self.block_budget is not None:
            return min(rows**2, self.block_budget)
        budgets = self.layer_budgets
        return round(sum(min(rows**2, rows * blocks) for blocks in budgets) / len(budgets))

    def dense_length(self, longest: int) -> int:
        """Return up to how many tokens every block pair is exact; 0 where scales end above 1."""
        if self.resolutions is not None:
            pairs = zip(self.block_budgets or (), self.resolutions, strict=False)
            sides = [math.isqrt(budget) * size for budget, size in pairs]
            side = min(sides, default=longest) if self.resolutions[-1] == 1 else 0
            return min(side - side % self.resolutions[0], longest)
        rows = math.isqrt(self.block_budget or 0) or min(self.layer_budgets)
        return min(self._side * rows, longest)

    def check(self) -> None:
        """Raise a `ValueError` unless these settings can be run."""
        check_choice("approx_mode", self.approx_mode, APPROX_MODES)
        check_choice("selection", self.selection, SELECTION_RULES)
        check_int("initial_prior_first_n_blocks", self.initial_prior_first_n_blocks, 0)
        check_int("initial_prior_diagonal_n_blocks", self.initial_prior_diagonal_n_blocks, 0)
        if self.resolutions is None and self.block_budgets is None:
            self._check_two_scales()
        else:
            self._check_any_scales()

    def _check_two_scales(self) -> None:
        if isinstance(self.block_per_row, (list, tuple)):
            if not self.block_per_row:
                raise ValueError("block_per_row must hold one number for each layer, got none.")
            for layer, blocks in enumerate(self.block_per_row):
                check_int(f"block_per_row[{layer}]", blocks, 1)
            if self.block_budget is not None:
                raise ValueError(
                    f"block_budget={self.block_budget} would replace "
                    f"block_per_row={list(self.block_per_row)}; give one of them."
                )
        else:
            check_int("block_per_row", self.block_per_row, 1)
        check_block_sizes(self.block_size, self.key_block_size)
        check_int_if_given("block_budget", self.block_budget, 1)
        first, diagonal = self.initial_prior_first_n_blocks, self.initial_prior_diagonal_n_blocks
        needed = 2 * first + (2 * (diagonal // 2) + 1 if diagonal else 0) + 1
        if min(self.layer_budgets) < needed:
            raise ValueError(
                f"block_per_row must be at least {needed} with "
                f"initial_prior_first_n_blocks={first} and "
                f"initial_prior_diagonal_n_blocks={diagonal}, got {self.block_per_row}: the "
                "data-dependent choice needs one, too. Raise block_per_row or lower the priors."
            )

    def _check_any_scales(self) -> None:
        if self.resolutions is None:
            raise ValueError(
                f"block_budgets={self.block_budgets} needs resolutions, the scales it is for; "
                "with two scales set block_per_row or block_budget instead."
            )
        _refuse_both_descriptions(self.as_dict())
        scales, _ = check_scales(self.resolutions, self.block_budgets or ())
        if self.selection not in SCHEME_RULES and (len(scales) != 2 or scales[1] != 1):
            raise ValueError(
                f'selection="{self.selection}" is for two scales that end in 1, '
                f"got resolutions={list(scales)}; use one of {SCHEME_RULES}."
            )

    def check_priors_at(self, length: int) -> None:
        """Refuse priors that take the whole budget of the coarsest of `resolutions` there."""
        first, diagonal = self.initial_prior_first_n_blocks, self.initial_prior_diagonal_n_blocks
        if not self.block_budgets or not self.resolutions or not (first or diagonal):
            return
        rows = count_blocks(length, self.resolutions[0])
        others = max(0, rows - first)  # without the first rows and columns
        pairs = rows**2 - others**2
        if diagonal:
            offsets = range(-(diagonal // 2), diagonal // 2 + 1)
            pairs += sum(max(0, others - abs(offset)) for offset in offsets)
        if self.block_budgets[0] < (needed := min(pairs + 1, rows**2)):
            raise ValueError(
                f"block_budgets[0] must be at least {needed} with "
                f"initial_prior_first_n_blocks={first} and "
                f"initial_prior_diagonal_n_blocks={diagonal}, got {self.block_budgets[0]}: "
                f"at {length} tokens, {rows} rows of blocks, the data-dependent choice needs one."
            )


SETTING_NAMES = tuple(field.name for field in fields(AttentionSettings))


def explicit_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what `config` itself says: fields of a `MraConfig`, else a copy of `config.mra`.

    Raises:
        ValueError: `config.mra` has an unknown setting.
    """
    if isinstance(config, MraConfig):
        return {name: getattr(config, name) for name in SETTING_NAMES}
    settings = dict(getattr(config, "mra", None) or {})
    _check_names(settings)
    return settings


def complete_changes(changes: dict[str, Any]) -> dict[str, Any]:
    """Return `changes` with None for every setting that they replace.

    `resolutions` replaces the settings of two scales, and the other way round; a new
    `block_per_row` clears a `block_budget`, a new `block_size` a `key_block_size`.

    Raises:
        ValueError: an unknown setting, or both descriptions of the scales.
    """
    _check_names(changes)
    _refuse_both_descriptions(changes)
    follows = {"block_per_row": "block_budget", "block_size": "key_block_size"}
    replaced = tuple(earlier for name, earlier in follows.items() if name in changes)
    if changes.get("resolutions") is not None:
        replaced = _TWO_SCALES
    elif any(changes.get(name) is not None for name in _TWO_SCALES):
        replaced += _ANY_SCALES
    return dict.fromkeys(replaced) | changes


def _check_names(settings: dict[str, Any]) -> None:
    unknown = sorted(settings.keys() - set(SETTING_NAMES))
    if unknown:
        raise ValueError(f"unknown MRA settings {unknown}; known are {sorted(SETTING_NAMES)}.")


def _refuse_both_descriptions(settings: dict[str, Any]) -> None:
    for name in _TWO_SCALES:
        if settings.get("resolutions") is not None and settings.get(name) is not None:
            raise ValueError(
                f"resolutions and {name} describe the same thing; give one of them, got "
                f"resolutions={list(settings['resolutions'])} and {name}={settings[name]}."
            )


class MraConfig(OwnConfig, RobertaConfig):
    """Configuration of the models of this package, `model_type` "mra_hf".

    Reads directories of type `roberta`, `xlm-roberta`, `camembert` as they are, and of
    Transformers' own type `mra`, such as
    [uw-madison/mra-base-512-4](https://huggingface.co/uw-madison/mra-base-512-4), with the meaning
    they were trained with. Other fields: see `RobertaConfig`.

    Args:
        block_per_row: budget, in exact blocks per block row that holds a real token (default 8); a
            list has one number for each layer, see `mra-hf calibrate`.
        block_budget: exact blocks per head, in place of `block_per_row` (default None: not used).
        approx_mode: "full" (MRA-2, default) or "sparse" (MRA-2-s: blocks in high resolution only).
        initial_prior_first_n_blocks: first block rows and columns, always exact (default 0).
        initial_prior_diagonal_n_blocks: blocks of the always exact diagonal band (default 0).
        block_size: queries per block (default 32).
        key_block_size: keys per block, 8, 16 or 32 (default None: `block_size`, 32). Budgets and
            priors count squares; narrow ones go with the selection "mass" and a diagonal prior.
        selection: the rule that ranks blocks, a name in `mra_attention.selection.RULES` (default
            "row_normalized").
        resolutions: scales from coarse to fine in place of (block_size, 1), see
            `mra_attention.multiresolution_attention` (default None). Priors then are on blocks of
            the coarsest scale, and the four settings of (block_size, 1) are None.
        block_budgets: blocks per head that are cut, one number for each of `resolutions` but the
            last (default None).
        distance_bias_window: every head learns a bias for each distance of up to so many blocks,
            from 0, and for ranges beyond, from `distance_bias_far` (default None: no bias).
        distance_bias_far: where the bias starts beyond the window (default -8: closed).
        embedding_size: width of the embeddings when it differs from `hidden_size`; a projection
            follows their sum (the papers' small models). None: `hidden_size`.
        sparse_prediction: masked-LM training computes logits at labelled positions only.
        candidate_pooling: what `MraForCandidateChoice` scores: "marker", the state of the token
            that opens a candidate (the paper), or "mean", the mean over the candidate's tokens.
        max_position_embeddings: rows of the position table, as in RoBERTa: 514 for 512 tokens.
        attention_probs_dropout_prob: dropout on attention weights; MRA runs with 0 (default) only.

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
    key_block_size: int | None = None
    selection: str = "row_normalized"
    resolutions: list[int] | tuple[int, ...] | None = None
    block_budgets: list[int] | tuple[int, ...] | None = None
    distance_bias_window: int | None = None
    distance_bias_far: float | int = -8.0
    embedding_size: int | None = None
    sparse_prediction: bool = False
    candidate_pooling: str = "marker"

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        AttentionSettings.of(self).write_to(self)  # fills in the defaults
        self.check()

    def validate(self):
        """Check all fields; also called by `save_pretrained`."""
        super().validate()
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` unless the fields of this class fit together."""
        settings = AttentionSettings.of(self)
        settings.check()
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            check_int(name, getattr(self, name), 1)
        budgets, layers = self.block_per_row, self.num_hidden_layers
        if isinstance(budgets, (list, tuple)) and len(budgets) != layers:
            raise ValueError(
                f"block_per_row must hold one number for each of {layers} layers, "
                f"got {len(budgets)}: {list(budgets)}."
            )
        if self.hidden_size % self.num_attention_heads:
            given = f"{self.hidden_size} and {self.num_attention_heads}"
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {given}.")
        check_int_if_given("embedding_size", self.embedding_size, 1)
        if not isinstance(sparse := self.sparse_prediction, bool):
            raise ValueError(f"sparse_prediction must be True or False, got {sparse!r}.")
        self._check_distance_bias()
        check_choice("candidate_pooling", self.candidate_pooling, CANDIDATE_POOLING)
        self._check_positions()
        settings.check_priors_at(self.max_tokens)
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(f"{name} must be False, got True: MRA is for encoders only.")

    def _check_distance_bias(self) -> None:
        far, window, scales = self.distance_bias_far, self.distance_bias_window, self.resolutions
        if type(far) not in (int, float) or not abs(far) <= MAX_DISTANCE_BIAS:  # or NaN
            raise ValueError(f"distance_bias_far must be in +-{MAX_DISTANCE_BIAS:g}, got {far!r}.")
        check_int_if_given("distance_bias_window", window, 0)
        if window is not None and scales is not None:
            raise ValueError(
                f"distance_bias_window={window} is for the scales (block_size, 1), got "
                f"resolutions={list(scales)}; leave resolutions out, or set the window to None."
            )

    def _check_positions(self) -> None:
        if not isinstance(self.pad_token_id, int):
            given = f"{self.pad_token_id!r}: positions count from pad_token_id + 1, as in RoBERTa"
            raise ValueError(f"pad_token_id must be an integer, got {given}.")
        check_int("max_position_embeddings", self.max_position_embeddings, 1)
        if self.max_tokens < 1:
            raise ValueError(
                f"max_position_embeddings must exceed pad_token_id + 1 = {self.pad_token_id + 1}, "
                f"got {self.max_position_embeddings}; it counts rows: tokens + pad_token_id + 1."
            )

    @property
    def max_tokens(self) -> int:
        """The longest sequence, in tokens: table rows less the `pad_token_id + 1` reserved ones."""
        assert self.pad_token_id is not None  # `_check_positions`
        return self.max_position_embeddings - (self.pad_token_id + 1)

    @property
    def output_attentions(self) -> bool | None:
        """To be passed per call; the attention function refuses a model that has it set here."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        # The base class would switch the model to dense "eager" attention here without a word.
        self._output_attentions = value

    def density(self, length: int | None = None) -> float:
        """Return `AttentionSettings.density` at `length` real tokens (default: the longest)."""
        return AttentionSettings.of(self).density(length or self.max_tokens)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As the base class; another type is translated, or refused where that would be wrong."""
        config_dict = dict(config_dict)
        source_type = config_dict.get("model_type", cls.model_type)
        if source_type in (BUILTIN_TYPE, *ROBERTA_TYPES):
            config_dict = _translate(config_dict, source_type)
        elif source_type != cls.model_type:
            raise ValueError(
                f'This configuration is of model_type "{source_type}", but MraConfig reads '
                f'"{cls.model_type}", "{BUILTIN_TYPE}" and {ROBERTA_TYPES}. '
                "Convert BERT checkpoints with `mra-hf convert SOURCE OUT`."
            )
        if "max_position_embeddings" in kwargs:
            config_dict["block_budget"] = None  # a fixed budget is for the length it was set for
        if kwargs.keys() & {*_TWO_SCALES, *_ANY_SCALES}:
            # The base class sets `kwargs` one by one, after the check; these must change together.
            changes = {name: kwargs.pop(name) for name in SETTING_NAMES if name in kwargs}
            config_dict |= complete_changes(changes)
        return super().from_dict(config_dict, **kwargs)


def builtin_block_budget(max_tokens: int, block_per_row: int) -> int:
    """Return the blocks per head of Transformers' own MRA: they follow its configured length."""
    return max_tokens // 32 * block_per_row


def _translate(config_dict: dict[str, Any], source_type: str) -> dict[str, Any]:
    """Return a foreign `config.json` in our meaning, completed by the defaults of its type."""
    if source_type == BUILTIN_TYPE:
        from transformers.models.mra.configuration_mra import MraConfig as BuiltinConfig

        defaults = BuiltinConfig().to_dict()
    else:
        defaults = CONFIG_MAPPING[source_type]().to_dict()
    shared = set(MraConfig().to_dict()) - {"model_type", "transformers_version", "dtype"}
    translated = {name: value for name, value in defaults.items() if name in shared} | config_dict
    if source_type == BUILTIN_TYPE:
        if translated["pad_token_id"] != 1:
            raise ValueError(
                "pad_token_id must be 1 in a configuration of type mra, "
                f"got {translated['pad_token_id']}: its positions start at row 2 whatever the "
                "padding id, ours at pad_token_id + 1. Convert it with `mra-hf convert SOURCE OUT`."
            )
        tokens = translated["max_position_embeddings"]  # theirs counts usable tokens
        translated["max_position_embeddings"] = tokens + BUILTIN_RESERVED_ROWS
        translated["block_budget"] = builtin_block_budget(tokens, translated["block_per_row"])
    translated |= translated.pop("mra", None) or {}  # settings of a stock model, see set_attention
    translated["model_type"] = MraConfig.model_type
    if translated.get("attention_probs_dropout_prob"):
        logger.warning_once(
            f"attention_probs_dropout_prob {translated['attention_probs_dropout_prob']} "
            f"of this {source_type} configuration is set to 0: "
            "multi-resolution attention has no dropout on attention weights."
        )
        translated["attention_probs_dropout_prob"] = 0.0
    return translated
