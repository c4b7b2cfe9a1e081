"""Record the queries, keys and values of a model that reads text."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from mra_attention.checks import check_int
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.attention import supported_attention_modules
from mra_hf.baselines.measures import dense_attention
from mra_hf.data.mlm import load_documents, pack
from mra_hf.distance_bias import MraSelfAttention
from mra_hf.loading import check_length, naming_damaged_weights, read_config

if TYPE_CHECKING:
    import os

_NAME = "mra_hf_recording"
#: Attention module -> (query, key, value, scale) of its calls, while `_recording` is entered.
_RECORDS: dict[nn.Module, list[tuple[Tensor, Tensor, Tensor, float]]] = {}


@torch.no_grad()
def record_heads(model: PreTrainedModel, texts: Sequence[Tensor], source: str) -> HeadInputs:
    """Queries, keys and values of all heads of a model, which attends densely meanwhile.

    Args:
        model: any bidirectional encoder of Transformers that uses its attention interface.
        texts: token ids, `[N]` each, all of one length without padding, special tokens included.
        source: where model and text come from, for captions.

    Returns:
        One instance for each text and layer, layers varying fastest.

    Raises:
        ValueError: a model whose attention cannot be recorded, or texts of several lengths.
    """
    if any(isinstance(module, MraSelfAttention) for module in model.modules()):
        raise ValueError(
            "this model has a distance bias, and queries and keys alone would not show it; record "
            "the source of the conversion at its own length, or a conversion without bias "
            "(mra-hf convert --no-distance-bias)."
        )
    if len({len(ids) for ids in texts}) != 1:
        raise ValueError("texts must have one length; cut them with mra_hf.data.mlm.pack.")
    model.eval()
    with _recording(model) as modules:
        for ids in texts:
            model(input_ids=ids[None])
        records = [_RECORDS[module][number] for number in range(len(texts)) for module in modules]
    query, key, value = map(torch.cat, list(zip(*records, strict=True))[:3])
    names = tuple(
        f"text {number} layer {layer}"
        for number in range(len(texts))
        for layer in range(len(modules))
    )
    return HeadInputs(
        query,
        key,
        value,
        scale=records[0][3],
        source=source,
        instance_names=names,
        head_names=tuple(f"head {head}" for head in range(query.shape[1])),
    )


def record_checkpoint(
    checkpoint: "str | os.PathLike[str]",
    text: "str | os.PathLike[str]",
    *,
    length: int,
    texts: int = 2,
) -> HeadInputs:
    """Record a checkpoint on chunks of a text file, evenly spread over it.

    Args:
        checkpoint: directory or hub id of an encoder with its tokenizer.
        text: a `.txt` or `.jsonl` file, or a folder of them.
        length: tokens per chunk, special tokens included.
        texts: number of chunks.

    Raises:
        ValueError: a text that is too short, a length beyond the positions of the checkpoint, or a
            model that cannot be recorded.
    """
    check_int("texts", texts, 1)
    read_config(checkpoint)  # says more clearly what is missing
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with naming_damaged_weights(checkpoint):
        model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    check_length("length", length, model)
    chunks = pack(load_documents(str(text)), tokenizer, length)
    if len(chunks) < texts:
        raise ValueError(
            f"text must have {texts} chunks of {length} tokens, and {text} has {len(chunks)}; "
            "pass more text, or ask for fewer or shorter chunks."
        )
    numbers = [number * len(chunks) // texts for number in range(texts)]
    ids = [torch.tensor(chunks[number]["input_ids"]) for number in numbers]
    return record_heads(model, ids, f"{Path(checkpoint).name} on {Path(text).name}")


@contextlib.contextmanager
def _recording(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """Record every call of the attention function; yields its modules in the order of layers."""
    modules = supported_attention_modules(model)
    AttentionInterface.register(_NAME, _record)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    implementation = model.config._attn_implementation
    _RECORDS.update((module, []) for module in modules)
    try:
        model.set_attn_implementation(_NAME)
        yield modules
    finally:
        model.set_attn_implementation(implementation)
        for module in modules:
            del _RECORDS[module]


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    _RECORDS[module].append((query.float(), key.float(), value.float(), scale))
    output = dense_attention(query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None
