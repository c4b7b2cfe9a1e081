"""Multi-resolution attention behind Transformers' attention interface.

Two names, `"mra2"` and `"mra2_s"`, each an attention function and a mask function. The mask
function hands the 2-D padding mask on (never N x N); the attention function reads its settings from
the model's config and refuses what it cannot serve.
"""

import inspect
import re
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function
from transformers.utils import logging

from mra_attention import (
    mra2_attention,
    mra2_attention_matrix,
    multiresolution_attention,
    multiresolution_attention_matrix,
    select_blocks,
)
from mra_attention.implementations import IMPLEMENTATIONS
from mra_hf.configuration import AttentionSettings, MraConfig, complete_changes, explicit_settings

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.get_logger(__name__)

ATTENTION_NAMES = ("mra2", "mra2_s")
#: Longest sequence whose attention matrices are returned.
MAX_MATRIX_TOKENS = 2048

_RELATIVE_BIAS = (
    "use_relative_position_bias",
    "use_shared_relative_position_bias",
    "relative_attention_num_buckets",
)
_REFUSED_KEYWORDS = {
    "sliding_window": "a sliding window",
    "softcap": "capped logits",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the logits",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
}
#: How a model's code shows that it makes its padding mask [B, 1, 1, N] itself.
_EXPANDS_MASK = re.compile(
    r"get_extended_attention_mask\(|unsqueeze\(1\)\.unsqueeze\(2\)|\[:, None, None, :\]"
)


class Implementation(str, Enum):
    """The `impl` that `set_attention` leaves on attention modules.

    Of this package, so that a process that unpickles a stock model (a spawned worker, `torch.load`)
    imports it, which registers the attention names.
    """

    AUTO, REFERENCE, TORCH, NATIVE, TRITON = "auto", "reference", "torch", "native", "triton"


def mra2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function `"mra2"`; the settings say which `approx_mode`.

    Args:
        module: the attention module; `module.config` holds the settings.
        query, key, value: `[B, H, N, D]`.
        attention_mask: `[B, N]` bool or None.
        dropout: must be 0.
        scaling: factor of the logits, None for `D ** -0.5`.

    Returns:
        The output `[B, N, H, D]`, and the matrices `[B, H, N, N]` when the call has
        `output_attentions=True`.

    Raises:
        ValueError: dropout, a causal or windowed module, a mask that is not `[B, N]`, or matrices
            of more than 2048 tokens.
    """
    kwargs |= {"dropout": dropout, "scaling": scaling}
    return _attend("mra2", module, query, key, value, attention_mask, **kwargs)


def mra2_s_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function `"mra2_s"`: as `mra2_attention_forward` with `approx_mode="sparse"`."""
    return _attend("mra2_s", module, query, key, value, attention_mask, **kwargs)


def mra2_mask(
    *args: Any, attention_mask: Tensor | None = None, mask_function=None, **kwargs: Any
) -> Tensor | None:
    """Mask function of both names: the padding mask `[B, N]` bool as it is, or None.

    Raises:
        ValueError: the model asked for a causal, sliding-window or other structured mask.
    """
    if mask_function not in (None, bidirectional_mask_function):
        raise ValueError(
            'attn_implementation="mra2" is for bidirectional encoders, but this model asked for a '
            'causal, sliding-window or other structured mask; use attn_implementation="sdpa".'
        )
    return attention_mask


def attention_settings(config: PreTrainedConfig, name: str) -> AttentionSettings:
    """Return the settings with which a model of `config` attends under the name `name`.

    Fields of a `MraConfig`; on any other config the dict `config.mra`, with `MraConfig`'s defaults
    where it is silent.

    Raises:
        ValueError: unknown or impossible settings, or `"mra2_s"` with `approx_mode="full"`.
    """
    settings = AttentionSettings.of(config)
    settings.check()
    if name != "mra2_s":
        return settings
    if not isinstance(config, MraConfig):
        approx_mode = explicit_settings(config).get("approx_mode", "sparse")
        if approx_mode != "sparse":
            raise ValueError(
                f'config.mra has approx_mode="{approx_mode}", but "mra2_s" is the sparse mode; '
                'use attn_implementation="mra2", or remove approx_mode.'
            )
    return settings.replace(approx_mode="sparse")


def set_attention(
    model: PreTrainedModel, name: str = "mra2", *, impl: str = "auto", **settings: Any
) -> PreTrainedModel:
    """Switch any bidirectional encoder of Transformers to multi-resolution attention, in place.

    Settings go to `config.mra` (to the fields of a `MraConfig`) and are saved with the model;
    `impl` is a choice of this process and is not. `block_per_row` without `block_budget` clears an
    earlier `block_budget`; `block_size` without `key_block_size` clears an earlier
    `key_block_size`; `resolutions` takes the place of an earlier `block_per_row`, `block_budget`,
    `block_size` and `key_block_size`, and the other way round. Dropout on attention weights is set
    to 0, with one log line.

    Args:
        model: for example a `RobertaForMaskedLM`.
        name: `"mra2"` or `"mra2_s"`.
        impl: implementation of `mra_attention.mra2_attention`.
        **settings: any of `block_per_row`, `block_budget`, `approx_mode`, `block_size`,
            `key_block_size`, `initial_prior_first_n_blocks`, `initial_prior_diagonal_n_blocks`,
            `selection`, `resolutions`, `block_budgets`.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown name, setting or implementation, or a model that would ignore the
            attention function or be served wrongly by it (DeBERTa-v2, MPNet, sliding windows,
            causal models and towers, masks expanded by the model, relative position biases, grouped
            key heads), or a wrapper (PEFT, ...), with the call to make instead; other scales for a
            model with a distance bias.
    """
    if name not in ATTENTION_NAMES:
        raise ValueError(
            f"name must be one of {ATTENTION_NAMES}, got {name!r}; for dense attention call "
            'model.set_attn_implementation("sdpa").'
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}.")
    if name == "mra2_s" and settings.get("approx_mode", "sparse") != "sparse":
        raise ValueError(
            f'approx_mode={settings["approx_mode"]!r} disagrees with name="mra2_s", '
            'which is the sparse mode; use name="mra2".'
        )
    attention_modules = supported_attention_modules(model)
    changes = complete_changes(settings)
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(x): x for x in found if isinstance(x, PreTrainedConfig)}.values()
    for config in configs:
        new = AttentionSettings.of(config).replace(**changes)
        new.check()
        _check_distance_bias(config, new)
    if isinstance(changes.get("block_per_row"), (list, tuple)):
        _check_layers(attention_modules, changes["block_per_row"])
    model.set_attn_implementation(name)
    for config in configs:
        _store_settings(config, name, changes)
    for module in attention_modules:
        vars(module)["mra_impl"] = Implementation(impl)
    _remove_attention_dropout(attention_modules, configs)
    return model


def _check_distance_bias(config: PreTrainedConfig, new: AttentionSettings) -> None:
    """Refuse scales that the distance bias of a model does not count in."""
    size = getattr(config, "block_size", None)
    if getattr(config, "distance_bias_window", None) is not None and new.block_size != size:
        given = new.resolutions or new.block_size
        raise ValueError(
            f"the distance bias of this model counts in blocks of {size} tokens, got scales of "
            f"{given}; keep block_size, or convert with distance_bias=False."
        )


def supported_attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of `model` that call the attention function.

    Raises:
        ValueError: there are none, or `model` would be served wrongly.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a Transformers PreTrainedModel, got {type(model).__name__}"
            f"{_inner_model(model)}."
        )
    try:
        return _supported_attention_modules(model)
    except ValueError as error:
        fitting = _fitting_parts(model)
        if not fitting:
            raise
        raise ValueError(f"{error} Switch only what it can serve: {fitting}.") from None


def _supported_attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    kind = type(model).__name__
    attention_modules = [
        m
        for m in model.modules()
        if _calls_attention_interface(type(m))  # type: ignore[arg-type]  # a class is hashable
    ]
    if not type(model)._can_set_attn_implementation() or not attention_modules:
        raise ValueError(
            f"{kind} does not use Transformers' attention interface and would ignore the request; "
            "mra2 needs one that does, such as RoBERTa, BERT, XLM-R, ELECTRA, DistilBERT or ViT."
        )
    _check_masks(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(module, "is_causal", False) or getattr(config, "is_decoder", False):
            raise ValueError(f"{kind} attends causally; mra2 is for bidirectional encoders only.")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{kind} has a decoder; mra2 is for encoders only.")
        windows = [getattr(config, field, None) for field in ("sliding_window", "local_attention")]
        if any(window is not None for window in windows) or "sliding_attention" in (
            getattr(config, "layer_types", None) or ()
        ):
            raise ValueError(
                f"{kind} has sliding windows, which mra2 would replace by full attention; "
                "it is for encoders whose layers all attend to the whole sequence."
            )
        biased = [name for name in _RELATIVE_BIAS if getattr(config, name, None)]
        biased += [
            name for name, _ in module.named_parameters(recurse=False) if "bias_table" in name
        ]
        if biased:
            raise ValueError(
                f"{kind} adds relative position biases ({biased[0]}), which mra2 would drop; "
                "it is for encoders with positions in their embeddings or rotations."
            )
        heads = getattr(config, "num_attention_heads", None)
        if (getattr(config, "num_key_value_heads", None) or heads) != heads:
            raise ValueError(f"{kind} has grouped key heads; mra2 needs one key head a query head.")
    return attention_modules


def _check_masks(model: PreTrainedModel) -> None:
    """Refuse a model of which some part asks for a causal mask, or expands the mask itself."""
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        problem = _mask_problem(type(part))  # type: ignore[arg-type]  # a class is hashable
        if problem is not None:
            kind = type(model).__name__
            raise ValueError(f"{kind}, in its {name}, {problem}" if name else f"{kind} {problem}")


@cache
def _mask_problem(model_class: type[PreTrainedModel]) -> str | None:
    """Why the masks of a model class do not fit, by its source; None if they do."""
    try:
        source = inspect.getsource(model_class)
    except (OSError, TypeError):  # a class without source: its first forward call is refused
        return None
    if "create_bidirectional_mask(" in source:
        return None
    if "create_causal_mask(" in source and "is_decoder" not in source:
        return "attends causally; mra2 is for bidirectional encoders only."
    if _EXPANDS_MASK.search(source):
        return (
            "expands its padding mask itself, and mra2 needs it as [batch, tokens]; keep "
            'attn_implementation="sdpa" or "eager" for this model.'
        )
    return None


def _fitting_parts(model: PreTrainedModel) -> str:
    """The calls that switch the parts of `model` that can be served, empty if there are none."""
    parts: list[str] = []
    for name, part in model.named_modules():
        if name and isinstance(part, PreTrainedModel) and not name.startswith(tuple(parts)):
            try:
                _supported_attention_modules(part)
            except ValueError:
                continue
            parts.append(f"{name}.")
    return ", ".join(f"mra_hf.set_attention({_path(name[:-1])}, ...)" for name in parts)


def _inner_model(wrapper: Any) -> str:
    """Where a wrapper (PEFT, DistributedDataParallel, ...) has its model, as words; none for what
    is no wrapper.
    """
    path = None
    if callable(getattr(wrapper, "get_base_model", None)):
        path = "model.get_base_model()"
    elif isinstance(wrapper, nn.Module):
        inner = (n for n, part in wrapper.named_modules() if isinstance(part, PreTrainedModel))
        path = next(map(_path, inner), None)
    return f", which wraps one: call mra_hf.set_attention({path}, ...)" if path else ""


def _path(name: str) -> str:
    """The expression for a submodule of `model`."""
    is_plain = all(part.isidentifier() for part in name.split("."))
    return f"model.{name}" if is_plain else f'model.get_submodule("{name}")'


def _store_settings(config: PreTrainedConfig, name: str, changes: dict[str, Any]) -> None:
    """Apply `changes` to the fields of a `MraConfig`, or to what `config.mra` says."""
    if isinstance(config, MraConfig):
        if name == "mra2_s":
            changes = changes | {"approx_mode": "sparse"}
        AttentionSettings.of(config).replace(**changes).write_to(config)
        return
    explicit = explicit_settings(config)
    if name == "mra2_s":
        explicit.pop("approx_mode", None)
    explicit |= changes
    config.mra = {setting: value for setting, value in explicit.items() if value is not None}


def _check_layers(
    attention_modules: list[nn.Module], block_per_row: list[int] | tuple[int, ...]
) -> None:
    """Refuse a list of budgets that does not fit the layers of a model."""
    layers = {getattr(module, "layer_idx", None) for module in attention_modules}
    if len(layers) != len(block_per_row) and None not in layers:
        raise ValueError(
            f"block_per_row must hold one number for each of {len(layers)} layers, "
            f"got {len(block_per_row)}: {list(block_per_row)}."
        )
    settings = AttentionSettings(block_per_row=block_per_row)
    for module in attention_modules:
        _for_module(settings, module)


def _for_module(settings: AttentionSettings, module: nn.Module) -> AttentionSettings:
    return settings.for_layer(
        getattr(module, "layer_idx", None),
        getattr(module.config, "num_hidden_layers", None),
        owner=type(module).__name__,
    )


def _attend(name, module, query, key, value, attention_mask, **kwargs):
    _refuse(module, kwargs)
    settings = _for_module(attention_settings(module.config, name), module)
    scaling, output_attentions = kwargs.get("scaling"), kwargs.get("output_attentions")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask reached {type(module).__name__} as {tuple(attention_mask.shape)}, "
            "but mra2 needs it as [batch, tokens]: pass the tokenizer's 2-D mask; a model that "
            'expands its mask itself or adds a bias there needs attn_implementation="sdpa".'
        )
    if output_attentions and query.shape[2] > MAX_MATRIX_TOKENS:
        raise ValueError(
            "output_attentions=True builds [batch, heads, tokens, tokens] matrices "
            f"and is allowed up to {MAX_MATRIX_TOKENS} tokens, got {query.shape[2]}; shorten the "
            "input, or call mra_attention.select_blocks for the chosen blocks only."
        )
    attend: Callable[..., Tensor] = mra2_attention
    matrix_of: Callable[..., Tensor] = mra2_attention_matrix
    if settings.resolutions is not None:
        attend, matrix_of = multiresolution_attention, multiresolution_attention_matrix
    shared: dict[str, Any] = {"scale": scaling}
    if getattr(module, "distance_bias", None) is not None:
        shared["distance_bias"] = module.distance_bias(query)
    arguments = settings.for_operator() | shared
    matrices = None
    if output_attentions:
        if settings.resolutions is None:  # choose once, for the matrices and the output
            arguments["selection"] = select_blocks(
                query, key, attention_mask, **settings.for_selection(), **shared
            )
        matrices = matrix_of(query, key, attention_mask, **arguments)
    impl = getattr(module, "mra_impl", Implementation.AUTO)
    output = attend(query, key, value, attention_mask, impl=impl.value, **arguments)
    return output.transpose(1, 2).contiguous(), matrices


def _refuse(module: nn.Module, keywords: dict[str, Any]) -> None:
    """Raise a `ValueError` for a call that multi-resolution attention cannot serve."""
    if keywords.get("dropout"):
        raise ValueError(
            f"dropout on attention weights is {keywords['dropout']}, but multi-resolution "
            "attention has none: set attention_probs_dropout_prob (attention_dropout on some "
            "models) to 0 in the config before the model is built, "
            "or call mra_hf.set_attention(model), which does it."
        )
    if getattr(module, "is_causal", False) or keywords.get("is_causal"):
        raise ValueError(
            f"{type(module).__name__} attends causally; mra2 is for bidirectional encoders only."
        )
    if keywords.get("global_attention_mask") is not None:
        raise ValueError(
            "global_attention_mask is an argument of Longformer, which mra2 does not take: it "
            "chooses by itself which blocks see one another. Leave it out; "
            "initial_prior_first_n_blocks=1 (in the config, or by mra_hf.set_attention) makes the "
            "first block global, as Longformer's mask does for the first token."
        )
    for keyword, meaning in _REFUSED_KEYWORDS.items():
        if keywords.get(keyword) is not None:
            raise ValueError(
                f"{type(module).__name__} passed {keyword} ({meaning}), "
                'which mra2 cannot honour; use attn_implementation="sdpa" for this model.'
            )
    if getattr(module.config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions is set, "
            "under which Transformers returns no matrices with a custom attention; "
            "leave it off and pass output_attentions=True to the forward call."
        )


@cache
def _calls_attention_interface(module_class: type[nn.Module]) -> bool:
    """Whether the code of `module_class`, or of a module that it extends, looks up the attention
    function (by its source).
    """
    bases = [x for x in module_class.__mro__[1:] if not issubclass(x, PreTrainedModel)]
    for owner in (module_class, *bases):
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(owner):
                return True
        except (OSError, TypeError):  # a built-in, or a class without source
            continue
    return False


def _remove_attention_dropout(attention_modules: list[nn.Module], configs) -> None:
    removed = set()  # the probabilities that were not 0
    for config in configs:
        for field in ("attention_probs_dropout_prob", "attention_dropout"):
            if getattr(config, field, 0):
                removed.add(getattr(config, field))
                setattr(config, field, 0.0)
    for module in attention_modules:
        for field in ("dropout", "attention_dropout", "dropout_prob"):
            dropout = getattr(module, field, None)
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
            elif isinstance(dropout, float):
                setattr(module, field, 0.0)
    if removed:
        logger.warning(
            f"Dropout on attention weights ({', '.join(map(str, sorted(removed)))}) is set to 0: "
            "multi-resolution attention has none."
        )
