"""Queries, keys and values of attention heads, synthetic or recorded, to test approximations on."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mra_attention.checks import check_int

if TYPE_CHECKING:
    import os

_TENSORS = ("query", "key", "value")

#: Heads of an instance of `synthetic_heads` by kind: how many, and the gain of their logits.
KINDS = {"local": (6, 9.0), "topic": (3, 6.0), "sink": (2, 7.0), "mix": (1, 8.0)}


@dataclass(frozen=True)
class HeadInputs:
    """The inputs of attention heads.

    Attributes:
        query, key, value: `[instances, H, N, D]` float32.
        scale: factor of the logits.
        source: where they come from, for captions.
        instance_names: a name for each instance, which is a draw or a layer of a model.
        head_names: a name for each of the H heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    source: str
    instance_names: tuple[str, ...]
    head_names: tuple[str, ...]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def length(self) -> int:
        """Tokens N."""
        return self.query.shape[2]

    def at_temperature(self, factor: float) -> "HeadInputs":
        """The same heads with all logits times `factor`."""
        return replace(self, scale=self.scale * factor)

    def first_tokens(self, length: int) -> "HeadInputs":
        """The same heads on the first `length` tokens."""
        return replace(self, **{name: getattr(self, name)[:, :, :length] for name in _TENSORS})

    def head(self, instance: int, head: int) -> "HeadInputs":
        """A single head, `[1, 1, N, D]`."""
        at = (slice(instance, instance + 1), slice(head, head + 1))
        parts = {name: getattr(self, name)[at] for name in _TENSORS}
        names = (self.instance_names[instance],), (self.head_names[head],)
        return replace(self, **parts, instance_names=names[0], head_names=names[1])

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write them as safetensors, completely or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        metadata = {
            "scale": repr(self.scale),
            "source": self.source,
            "instance_names": json.dumps(self.instance_names),
            "head_names": json.dumps(self.head_names),
        }
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, partial, metadata)
        partial.replace(path)


def load_heads(path: "str | os.PathLike[str]") -> HeadInputs:
    """Read what `HeadInputs.save` wrote.

    Raises:
        ValueError: a file of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        return HeadInputs(
            **tensors,
            scale=float(metadata["scale"]),
            source=metadata["source"],
            instance_names=tuple(json.loads(metadata["instance_names"])),
            head_names=tuple(json.loads(metadata["head_names"])),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no file of mra-hf record ({error}).") from error


def synthetic_heads(
    length: int = 512,
    *,
    instances: int = 2,
    head_dim: int = 64,
    common_value: float = 0.0,
    seed: int = 0,
) -> HeadInputs:
    """Heads that attend like the heads of a pretrained encoder, without a checkpoint.

    An instance has twelve heads: six attend at an offset of a few tokens, three to segments of the
    same topic, two to a few tokens that attract all queries, one by a mixture of topics. The errors
    of MRA-2 on them are close to the paper's for RoBERTa-base (Table 7).

    Args:
        length: tokens N.
        instances: independent draws.
        head_dim: D.
        common_value: size of a component that all values share; at 0 the mean value is small.
        seed: of all random numbers.
    """
    check_int("length", length, 1)
    check_int("instances", instances, 1)
    check_int("head_dim", head_dim, 2)
    generator = torch.Generator().manual_seed(seed)
    draws = [_instance(length, head_dim, common_value, generator) for _ in range(instances)]
    query, key, value = (torch.stack(parts) for parts in zip(*draws, strict=True))
    instance_names = tuple(f"draw {number}" for number in range(instances))
    head_names = tuple(f"{kind} {n}" for kind, (count, _) in KINDS.items() for n in range(count))
    source = f"synthetic heads, seed {seed}"
    return HeadInputs(query, key, value, 1.0, source, instance_names, head_names)


def _instance(
    length: int, dim: int, common_value: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each `[H, N, D]`."""
    heads = [
        _head(kind, gain, length, dim, common_value, generator)
        for kind, (count, gain) in KINDS.items()
        for _ in range(count)
    ]
    query, key, value = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return query, key, value


def _head(
    kind: str, gain: float, length: int, dim: int, common_value: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * dim**-0.5

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    segments = _segments(length, generator)
    topics = noise(12, dim)
    topic_of = torch.randint(12, (int(segments.max()) + 1,), generator=generator)
    topic = topics[topic_of[segments]]
    match kind:
        case "local":
            width = between(1.5, 12.0)
            offset = int(torch.randint(-2, 3, (), generator=generator))
            position = torch.arange(length, dtype=torch.float32)
            query, key = _fourier_features(position, position + offset, width, dim, generator)
        case "topic":
            query, key = (topic + 0.3 * noise(length, dim) for _ in range(2))
        case "sink":
            center = torch.nn.functional.normalize(noise(dim), dim=0)
            query = 0.8 * center + 0.5 * noise(length, dim)
            key = 0.5 * noise(length, dim)
            sinks = torch.randperm(length, generator=generator)[: max(1, round(0.03 * length))]
            key[sinks] += 0.8 * center
            key[0] += center
        case "mix":
            query, key = (0.5 * topic + 0.7 * noise(length, dim) for _ in range(2))
        case other:
            raise AssertionError(f"no kind of head named {other}")
    query, key = (x + 0.25 * noise(length, dim) for x in (query, key))
    root = math.sqrt(gain * between(0.6, 1.6))
    value = 0.6 * noise(length, dim) + 0.8 * noise(int(segments.max()) + 1, dim)[segments]
    value = value + common_value * noise(dim)
    return root * query, root * key, value


def _segments(length: int, generator: torch.Generator) -> Tensor:
    """`[N]`, the segment number of each token; all segments of a head have one length, 8 to 39."""
    size = int(torch.randint(8, 40, (), generator=generator))
    return torch.arange(length) // size


def _fourier_features(
    keys_at: Tensor, queries_at: Tensor, width: float, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random features with products near exp(-distance^2 / (2 width^2)) (Rahimi and Recht 2007)."""
    frequencies = torch.randn(dim // 2, generator=generator) / width

    def features(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1) * (2 / dim) ** 0.5

    return features(queries_at), features(keys_at)
