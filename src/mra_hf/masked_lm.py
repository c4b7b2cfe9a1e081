"""Masked language models as the commands need them: loaded whole, told which attention to use,
with logits at the places that have a label alone.
"""

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import logging

from mra_hf.attention import ATTENTION_NAMES, set_attention
from mra_hf.evaluation import masked_lm_head

if TYPE_CHECKING:
    import os

logger = logging.get_logger(__name__)


def load_masked_lm(
    name: "str | os.PathLike[str]", attention: str | None = None, overrides: str | None = None
) -> PreTrainedModel:
    """Load a masked language model in float32 with all of its weights.

    Args:
        name: a directory or hub id.
        attention: "sdpa", "mra2", ...; the model's own if not given.
        overrides: settings of the configuration, "name=value,name=value".

    Raises:
        ValueError: the checkpoint has no masked-LM head, `overrides` change the shape of weights,
            or the model cannot use `attention`.
    """
    config = AutoConfig.from_pretrained(name)
    if overrides:
        override(config, overrides)
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:
        if overrides and "mismatch" in str(error):
            raise ValueError(
                f"config_overrides {overrides!r} change the shape of weights of {name}; sizes can "
                "only be chosen from scratch (without model_name_or_path)."
            ) from error
        raise
    if attention is None and getattr(config, "mra", None):
        logger.warning(
            f"{name} holds settings of multi-resolution attention but is read with "
            f'{model.config._attn_implementation!r}; choose "mra2" to use them.'
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{name} has no masked-LM head or lacks other weights ({missing}, ...).")
    return with_attention(model, attention)


def override(config: PreTrainedConfig, overrides: str) -> None:
    """Apply "name=value,name=value" to `config`.

    Raises:
        ValueError: not of that form, no such setting, or a value of another type.
    """
    try:
        config.update_from_string(overrides)
    except (ValueError, AttributeError) as error:
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


def predict_masked_places(model: PreTrainedModel) -> None:
    """Make `model` compute logits at the labelled places alone while it trains.

    Loss and gradients are those of all logits: places labelled -100 take no part in either. The
    logits of a training step are then `[labelled, vocabulary]`; evaluation is not changed.

    Raises:
        ValueError: the model has no head apart from its encoder.
    """
    head = masked_lm_head(model)
    if head is None:
        raise ValueError(
            f"sparse_prediction needs a model with an lm_head, and {type(model).__name__} has "
            "none; pass --sparse_prediction false."
        )
    all_logits = model.forward

    @functools.wraps(all_logits)
    def forward(input_ids=None, *args, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None or not model.training:
            return all_logits(input_ids, *args, labels=labels, **kwargs)
        states = model.base_model(input_ids, *args, **kwargs).last_hidden_state  # [B, N, hidden]
        labelled = labels != -100
        logits = head(states[labelled])  # [labelled, vocabulary]
        loss = cross_entropy(logits, labels[labelled], num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)

    model.forward = forward


def cross_entropy(logits: Tensor, targets: Tensor, count) -> Tensor:
    """Summed over the targets, divided by `count` (default None: their number)."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(1, len(targets)) if count is None else count)
