"""Names of weights as wrappers and other libraries leave them: removed where that is all they did,
refused by name where the weights themselves are other ones.
"""

import re
from collections.abc import Iterable

#: What torch.compile, FSDP and checkpointing put into names, at any place.
_INSERTED = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
#: Endings that only quantised or otherwise compressed weights have.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_(scale|scale_inv|packed|zero_point))$"
    r"|\.weight\.(absmax|quant_map|quant_state\S*|nested_\S+)$|\.weight_format$"
)
_ADAPTER = re.compile(r"\.lora_[A-Za-z]+\.|\.base_layer\.|\.modules_to_save\.")


def wrapper_patterns(names: Iterable[str], encoder: str, label: str) -> dict[str, str]:
    """Return patterns -> replacements that remove what wrappers added to the names of weights.

    Args:
        names: of all weights.
        encoder: what stands in front of the names of the encoder's weights: "roberta".
        label: the source, for messages.

    Raises:
        ValueError: there are several encoders, each behind a prefix of its own.
    """
    names, patterns = list(names), {}
    if any(re.search(_INSERTED, name) for name in names):
        patterns[_INSERTED] = ""
        names = [re.sub(_INSERTED, "", name) for name in names]
    first = re.compile(rf"(.*?)(?:{encoder}\.)?embeddings\.word_embeddings\.weight")
    prefixes = sorted({match[1] for name in names if (match := first.fullmatch(name))})
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(
            f"SOURCE {label} holds several encoders, behind {', '.join(map(repr, prefixes))}; "
            "save the one to convert by itself, with its save_pretrained."
        )
    if len(prefixes) == 1 and prefixes[0]:
        patterns[rf"^{re.escape(prefixes[0])}"] = ""
    return patterns


def wrapper_note(names: Iterable[str], encoder: str, label: str) -> list[str]:
    """A sentence on what was removed from the names of weights; none where nothing was."""
    patterns = wrapper_patterns(names, encoder, label)
    if not patterns:
        return []
    added = [re.sub(r"[\^\\]", "", pattern) for pattern in patterns if pattern != _INSERTED]
    added += ["_orig_mod."] * (_INSERTED in patterns)
    return [
        f"A wrapper had added {' and '.join(map(repr, added))} to the names of the weights; "
        "it is removed."
    ]


def refuse_other_weights(names: Iterable[str], label: str) -> None:
    """Refuse quantised weights and adapters that are not merged, by their names.

    Raises:
        ValueError: there are such weights.
    """
    for name in names:
        if _QUANTISED.search(name):
            raise ValueError(
                f"SOURCE {label} is quantised: it holds {name}. Convert the checkpoint that it "
                "was made from, or dequantise it and save it again."
            )
        if _ADAPTER.search(name):
            raise ValueError(
                f"SOURCE {label} holds an adapter that is not merged into its weights: {name}. "
                "Merge it (merge_and_unload of PEFT) and save the model."
            )


def refuse_quantisation(raw_config: dict, label: str) -> None:
    """Refuse a config.json that says that its weights are quantised.

    Raises:
        ValueError: it has a quantization_config.
    """
    for name in ("quantization_config", "compression_config"):
        settings = raw_config.get(name)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise ValueError(
                f"SOURCE {label} is quantised ({name}: {method}). Convert the checkpoint that it "
                "was made from, or dequantise it (model.dequantize()) and save it again."
            )
