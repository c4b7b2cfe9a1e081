"""Models for the commands: loaded with all weights, the right attention and enough positions."""

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mra_hf.attention import ATTENTION_NAMES, set_attention
from mra_hf.configuration import SETTING_NAMES, AttentionSettings, MraConfig
from mra_hf_cli import suggestion

if TYPE_CHECKING:
    import os

#: A comma between settings, not one inside a list.
_BETWEEN_SETTINGS = re.compile(r",(?![^\[]*\])")

logger = logging.get_logger(__name__)


def load_masked_lm(
    name: "str | os.PathLike[str]", attention: str | None = None, overrides: str | None = None
) -> PreTrainedModel:
    """Load a masked language model in float32 with all of its weights; see `load_model`."""
    return load_model(AutoModelForMaskedLM, name, "masked-LM head", attention, overrides)


def read_config(name: "str | os.PathLike[str]", **settings: Any) -> PreTrainedConfig:
    """Read the configuration of a checkpoint, a directory or hub id, with changed `settings`.

    Raises:
        ValueError: a directory or a file that is no checkpoint.
        OSError: there is no such directory, and no such model could be fetched.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(
            f"{name} is a file; pass the directory that holds config.json and weights."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"{name} is no model directory: it has no config.json. Pass the folder that "
            "save_pretrained, mra-hf convert or a run wrote."
        )
    if not path.is_dir():
        try:  # asks the hub once; AutoConfig repeats the question for half a minute
            snapshot_download(str(name), allow_patterns="config.json")
        except Exception as error:  # the client raises errors of several libraries
            raise OSError(
                f"{name} is neither a directory here nor a model that could be fetched: "
                f"{why_not_fetched(error)}, or pass a directory."
            ) from error
    return AutoConfig.from_pretrained(name, **settings)


def why_not_fetched(error: Exception) -> str:
    """What the hub's client ran into, and what to do, as the middle of a sentence."""
    match error:
        case GatedRepoError():
            return "the repository on the hub is gated: accept its terms there and log in"
        case RepositoryNotFoundError():
            return (
                "the hub has no repository of this name that can be read without logging in: check "
                "the name, or log in if it is private"
            )
        case ConnectionError() | LocalEntryNotFoundError() if is_offline_mode():
            return "the hub's client is offline (HF_HUB_OFFLINE) and has no copy: unset it"
        # The client looks into its cache last: what is missing there could not be fetched before.
        case ConnectionError() | LocalEntryNotFoundError():
            return "the hub could not be reached: check the name and the connection"
        case _:
            return (
                f"the hub's client failed ({type(error).__name__}: {first_line(error)}): try again"
            )


def first_line(error: Exception) -> str:
    """The first line of what an error says; empty if it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]


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
    """Load a model in float32; missing weights are an error, not random.

    Args:
        model_class: an Auto class or a model class.
        name: a directory or hub id.
        head: what the class puts on the encoder, for the error message.
        attention: "sdpa", "mra2", ...; None: the model's own.
        overrides: settings of the configuration, "name=value,name=value".
        new_weights: prefixes of weights that may be missing and then start at random.
        settings: further settings of the configuration, applied before `overrides`.

    Raises:
        OSError: there is no such checkpoint, or a file of weights is damaged.
        ValueError: the checkpoint lacks other weights or is of a type without such a head, settings
            change the shape of weights, or the model cannot use `attention`.
    """
    config = read_config(name, **settings)
    if overrides:
        override(config, overrides)
    if isinstance(config, MraConfig):
        config.validate()  # Transformers sets fields one by one; together they may not fit
    try:
        with naming_damaged_weights(name):
            model, info = model_class.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{name} is of model_type {config.model_type!r}, for which Transformers has no {head}; "
            "pass a checkpoint of another type, such as roberta or bert."
        ) from error
    except RuntimeError as error:
        if (overrides or settings) and "mismatch" in str(error):
            changed = overrides or ", ".join(f"{key}={value}" for key, value in settings.items())
            raise ValueError(
                f"config_overrides {changed!r} change the shape of weights of {name}; "
                "sizes can only be chosen from scratch (without model_name_or_path)."
            ) from error
        raise
    if attention is None and getattr(config, "mra", None):
        logger.warning(
            f"{name} holds settings of multi-resolution attention "
            f'but is read with {model.config._attn_implementation!r}; choose "mra2" to use them.'
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new_weights))
    if missing:
        listed = ", ".join(missing[:3])
        raise ValueError(
            f"{name} has no {head} or lacks other weights ({listed}, ...); "
            f"pass a checkpoint that was trained with a {head}."
        )
    return with_attention(model, attention)


@contextlib.contextmanager
def naming_damaged_weights(name: "str | os.PathLike[str]") -> Iterator[None]:
    """While the weights of the checkpoint `name` are read: say so where a file is damaged.

    Raises:
        OSError: a file of weights is truncated or corrupt.
    """
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the weights of {name} cannot be read, a file is truncated or corrupt ({reason}); "
            "fetch them again."
        ) from error


def split_settings(name: str, settings: str) -> list[tuple[str, str]]:
    """Return the names and values of "name=value,name=value"; lists are written [16,4,1].

    Raises:
        ValueError: not of that form; it names the argument `name`.
    """
    if not settings:
        return []
    pairs = [tuple(setting.split("=", 1)) for setting in _BETWEEN_SETTINGS.split(settings)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{name} must be name=value,name=value, got {settings!r}.")
    return pairs


def override(config: PreTrainedConfig, overrides: str) -> None:
    """Apply "name=value,name=value" to `config`; lists are written [16,4,1].

    A setting that is None there (embedding_size, block_budget) or a list takes the value that YAML
    reads.

    Raises:
        ValueError: not of that form, no such setting, or a value of another type.
    """
    values = dict(split_settings("config_overrides", overrides))
    for name in values:
        if not hasattr(config, name):
            raise ValueError(_no_such_setting(config, name))
    before = AttentionSettings.of(config) if isinstance(config, MraConfig) else None
    try:
        by_yaml = {
            name
            for name, value in values.items()
            if getattr(config, name, "") is None or value.startswith("[")
        }
        for name in by_yaml:
            setattr(config, name, yaml.safe_load(values[name]))
        others = ",".join(
            f"{name}={value}" for name, value in values.items() if name not in by_yaml
        )
        if others:
            config.update_from_string(others)
        if before is not None and isinstance(config, MraConfig):
            changes = {name: getattr(config, name) for name in SETTING_NAMES if name in values}
            before.replace(**changes).write_to(config)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"config_overrides {overrides!r} cannot be applied: {error}") from error


def _no_such_setting(config: PreTrainedConfig, name: str) -> str:
    """What to say of a setting that `config` has not."""
    message = f"config_overrides: a configuration of type {config.model_type} has no {name!r}"
    if name in SETTING_NAMES:
        return f"{message}; convert the checkpoint first (mra-hf convert), which sets it."
    return f"{message}{suggestion(name, tuple(vars(config)))}."


def with_attention(model: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """Return `model` with the attention of that name; None: as it is.

    Raises:
        ValueError: the model cannot use it.
    """
    if attention in ATTENTION_NAMES:
        return set_attention(model, attention)
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            # A wrong name is answered with every name there is, which says no more than ours.
            is_unknown = "The only possible arguments are" in str(error)
            reason = "" if is_unknown else f" ({' '.join(str(error).split()).rstrip('.')})"
            raise ValueError(
                f"attention {attention!r} cannot be used here; take one of "
                f"{', '.join((*ATTENTION_NAMES, 'sdpa', 'eager'))}{reason}."
            ) from error
    return model


def longest_input(model: PreTrainedModel) -> int | None:
    """Return how many tokens the learned positions of `model` hold; None if it has none."""
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
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise ValueError(
            f"{name} must be at most {longest}, the positions of this model, "
            f"got {length}; {remedy}."
        )


def leave_out_token_types(tokenizer: PreTrainedTokenizerBase, type_vocab_size: int | None) -> bool:
    """Keep a tokenizer from giving token types to a model that has one type only; return whether
    that changed it.

    Raises:
        ValueError: the tokenizer gives types that a model of several types has not.
    """
    types = tokenizer("a", "a").get("token_type_ids") or [0]
    if type_vocab_size is None or max(types) < type_vocab_size:
        return False
    if type_vocab_size > 1:
        raise ValueError(
            f"the tokenizer gives token types up to {max(types)}, but type_vocab_size of the model "
            f"is {type_vocab_size}; the two do not belong together: pass the model's own tokenizer."
        )
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names  # what is saved
    return True
