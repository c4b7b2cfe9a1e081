"""Models as the commands need them: loaded whole, told which attention to use, long enough."""

import re
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mra_hf.attention import ATTENTION_NAMES, set_attention
from mra_hf.configuration import ATTENTION_DEFAULTS, MraConfig, one_description, with_defaults

if TYPE_CHECKING:
    import os

#: The commas between settings, and not those in a list.
_OUTSIDE_OF_LISTS = re.compile(r",(?![^\[]*\])")

logger = logging.get_logger(__name__)


def load_masked_lm(
    name: "str | os.PathLike[str]", attention: str | None = None, overrides: str | None = None
) -> PreTrainedModel:
    """Load a masked language model in float32 with all of its weights; see `load_model`."""
    return load_model(AutoModelForMaskedLM, name, "masked-LM head", attention, overrides)


def load_model(
    model_class: Any,
    name: "str | os.PathLike[str]",
    head: str,
    attention: str | None = None,
    overrides: str | None = None,
    *,
    new_weights: tuple[str, ...] = (),
    **settings: Any,
) -> PreTrainedModel:
    """Load a model in float32 and say what it lacks instead of filling it in at random.

    Args:
        model_class: an Auto class or a model class.
        name: a directory or hub id.
        head: what the class puts on the encoder, for the error message.
        attention: "sdpa", "mra2", ...; the model's own if not given.
        overrides: settings of the configuration, "name=value,name=value".
        new_weights: prefixes of weights that may be missing and then start at random.
        settings: further settings of the configuration, by name; they come before `overrides`.

    Raises:
        ValueError: the checkpoint lacks other weights, settings change the shape of weights, or
            the model cannot use `attention`.
    """
    config = AutoConfig.from_pretrained(name, **settings)
    if overrides:
        override(config, overrides)
    if isinstance(config, MraConfig):
        config.validate()  # Transformers sets fields one by one, which together may not fit
    try:
        model, info = model_class.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:
        if (overrides or settings) and "mismatch" in str(error):
            changed = overrides or ", ".join(f"{key}={value}" for key, value in settings.items())
            raise ValueError(
                f"config_overrides {changed!r} change the shape of weights of {name}; sizes can "
                "only be chosen from scratch (without model_name_or_path)."
            ) from error
        raise
    if attention is None and getattr(config, "mra", None):
        logger.warning(
            f"{name} holds settings of multi-resolution attention but is read with "
            f'{model.config._attn_implementation!r}; choose "mra2" to use them.'
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new_weights))
    if missing:
        listed = ", ".join(missing[:3])
        raise ValueError(f"{name} has no {head} or lacks other weights ({listed}, ...).")
    return with_attention(model, attention)


def split_settings(name: str, settings: str) -> list[tuple[str, str]]:
    """Names and values of "name=value,name=value"; lists are written [16,4,1].

    Raises:
        ValueError: not of that form; it names the argument `name`.
    """
    if not settings:
        return []
    given = [tuple(part.split("=", 1)) for part in _OUTSIDE_OF_LISTS.split(settings)]
    if any(len(pair) != 2 for pair in given):
        raise ValueError(f"{name} must be name=value,name=value, got {settings!r}.")
    return given


def override(config: PreTrainedConfig, overrides: str) -> None:
    """Apply "name=value,name=value" to `config`; lists are written [16,4,1].

    A setting that is None there (embedding_size, block_budget) or a list takes the value that YAML
    reads.

    Raises:
        ValueError: not of that form, no such setting, or a value of another type.
    """
    given = split_settings("config_overrides", overrides)
    try:
        unset = {
            name
            for name, value in given
            if getattr(config, name, "") is None or value.startswith("[")
        }
        for name, value in given:
            if name in unset:
                getattr(config, name)  # there is no such setting
                setattr(config, name, yaml.safe_load(value))
        if isinstance(config, MraConfig):  # what is asked for replaces the other description
            described = one_description(dict(given))
            for name in set(described) - {name for name, _ in given}:
                setattr(config, name, described[name])
        others = ",".join(f"{name}={value}" for name, value in given if name not in unset)
        if others:
            config.update_from_string(others)
        if isinstance(config, MraConfig):
            own = {name: getattr(config, name) for name in ATTENTION_DEFAULTS}
            for name, value in with_defaults(own).items():
                setattr(config, name, value)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"config_overrides must be name=value,name=value, got {overrides!r}: {error}"
        ) from error


def with_attention(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """`model` with the attention of that name, or as it is."""
    if attention in ATTENTION_NAMES:
        return set_attention(model, attention)
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except ImportError as error:
            raise ValueError(f"attention {attention!r} cannot be used here: {error}") from error
    return model


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens that the learned positions of `model` have room for; None if it has none."""
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, torch.nn.Embedding):
        return None
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - reserved


def check_length(
    name: str,
    length: int,
    model: PreTrainedModel,
    remedy: str = "convert the checkpoint to a longer one with mra-hf convert --max-length",
) -> None:
    """Raise a `ValueError` that names the argument if `length` is too long for `model`."""
    room = longest_input(model)
    if room is not None and length > room:
        raise ValueError(
            f"{name} must be at most {room}, the positions of this model, got {length}; {remedy}."
        )
