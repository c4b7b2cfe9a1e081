"""AdaMRA's attention layer: compressed keys and values, a router, kernelized attention.

"Adaptive Multi-Resolution Attention with Linear Complexity" (2021), sections on compression,
routing and kernel attention. Letters: B batch, N tokens, d width, H heads, S subheads of width
d / S, m segments per head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mra_attention.blocks import compute_dtype, count_blocks
from mra_hf.encoders.prenorm import Routing

#: Queries of one sample and head that are computed together.
_TILE = 32


class AdaMraAttention(nn.Module):
    """Self-attention whose cost is linear in the number of tokens.

    Parameters: (4 + 3 H) d^2 + d H and 4 d biases; a vanilla layer has 4 d^2.

    Args:
        config: an `AdaMraConfig`, or another configuration with its AdaMRA settings.
        layer_idx: number of the layer; random routing in evaluation depends on it.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int = 0):
        super().__init__()
        width, heads = config.hidden_size, len(config.segment_lengths)
        self.segment_lengths = tuple(config.segment_lengths)
        self.num_subheads = config.num_subheads
        self.feature_map = config.feature_map
        self.routing = config.routing
        self.router_gate = config.router_gate
        self.layer_idx = layer_idx
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.router = nn.Linear(width, heads, bias=False)
        # One projection per head, applied after the shared projections.
        self.head_query, self.head_key, self.head_value = (
            nn.Parameter(torch.empty(heads, width, width)) for _ in range(3)
        )
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Draw the projections of the heads like linear layers (Glorot uniform)."""
        bound = (6 / (2 * self.query.in_features)) ** 0.5
        for weights in (self.head_query, self.head_key, self.head_value):
            # Whole parameters, since Transformers marks loaded parameters, not slices of them.
            nn.init.uniform_(weights, -bound, bound)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Attend.

        Args:
            hidden_states: `[B, N, d]`.
            token_mask: `[B, N]` bool or integer, nonzero at real tokens, any pattern; None: all.

        Returns:
            `[B, N, d]`, 0 at padding, and the router's decisions.
        """
        token_mask = None if token_mask is None else token_mask.bool()
        padding = None if token_mask is None else ~token_mask[..., None]
        if padding is not None:  # it may hold NaN
            hidden_states = hidden_states.masked_fill(padding, 0)
        query, key, value = (
            project(hidden_states) for project in (self.query, self.key, self.value)
        )
        if padding is not None:  # where the projections left their bias
            key, value = (x.masked_fill(padding, 0) for x in (key, value))
        routing = self.route(query, token_mask)
        memories = [
            self._memory(head, key, value, token_mask) for head in range(len(self.segment_lengths))
        ]
        if routing.heads is None or torch.compiler.is_compiling():
            attended = self._attend_all(query, memories, routing)
        else:
            attended = self._attend_routed(query, memories, routing)
        output = self.output(attended.to(hidden_states.dtype))
        if padding is not None:
            output = output.masked_fill(padding, 0)
        return output, routing

    def route(self, query: Tensor, token_mask: Tensor | None) -> Routing:
        """Route the projected queries `[B, N, d]`."""
        batch, length, _ = query.shape
        n_heads = len(self.segment_lengths)
        if self.routing == "random":
            probabilities = query.new_full((batch, length, n_heads), 1 / n_heads).float()
            heads: Tensor | None = self._random_heads(batch, length, query.device)
        else:
            probabilities = torch.softmax(self.router(query).float(), dim=-1)
            heads = probabilities.argmax(-1) if self.routing == "learned" else None
        one_hot = None if heads is None else F.one_hot(heads, n_heads).float()
        assignment = probabilities.detach() if one_hot is None else one_hot
        real = query.new_ones(batch, length, 1, dtype=torch.float32)
        if token_mask is not None:
            real = real * token_mask[..., None]
        count = real.sum().clamp_min(1)
        shares = (assignment * real).sum((0, 1)) / count
        balance = n_heads * (shares * (probabilities * real).sum((0, 1)) / count).sum()
        return Routing(probabilities, heads, shares, balance)

    def _random_heads(self, batch: int, length: int, device: torch.device) -> Tensor:
        n_heads = len(self.segment_lengths)
        if self.training:
            return torch.randint(n_heads, (batch, length), device=device)
        # Multiplicative hashing of the position: independent of batch and length, and traceable.
        positions = torch.arange(1, length + 1, device=device) + 7919 * self.layer_idx
        hashed = (positions * 2654435761) % 2**32
        return ((hashed >> 16) % n_heads).expand(batch, -1)

    def _memory(
        self, head: int, key: Tensor, value: Tensor, token_mask: Tensor | None
    ) -> "_Sums | _Compressed":
        """What the queries of a head read, from `[B, N, d]` keys and values, zero at padding."""
        tokens = self.segment_lengths[head]
        means, live = segment_means((key, value), token_mask, tokens)
        # Means commute with projections, and there are fewer of them.
        keys, values = (
            self._subheads(_widened(mean @ weights[head]))  # [B, S, m, d / S]
            for mean, weights in zip(means, (self.head_key, self.head_value), strict=True)
        )
        if self.feature_map == "softmax":
            return _Compressed(keys, values, live)
        features = self._features(keys) * live[:, None, :, None]
        with torch.autocast(key.device.type, enabled=False):
            return _Sums(features.mT @ values, features.sum(2))

    def _subheads(self, x: Tensor) -> Tensor:
        """`[..., n, d]` -> `[..., S, n, d / S]`."""
        return x.unflatten(-1, (self.num_subheads, -1)).transpose(-3, -2)

    def _features(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.feature_map == "relu" else F.elu(x) + 1

    def _read(self, head: int, query: Tensor, memory: "_Sums | _Compressed") -> Tensor:
        """`[G, n, d]` queries of one head, each of the G groups with a memory of its own ->
        `[G, n, d]` float32 or float64.
        """
        query = self._subheads(_widened(query @ self.head_query[head]))
        if self.feature_map != "softmax":
            query = self._features(query)
        with torch.autocast(query.device.type, enabled=False):
            return memory.read(query).transpose(-3, -2).flatten(-2)

    def _attend_all(self, query: Tensor, memories: list, routing: Routing) -> Tensor:
        """Every head for every query, weighted by the router: the text of the paper."""
        if routing.heads is None:
            gates = routing.probabilities
        else:
            is_routed = F.one_hot(routing.heads, len(memories)).float()
            gates = is_routed * self._gate(routing)[..., None]
        reads = [self._read(head, query, memory) for head, memory in enumerate(memories)]
        parts = [gates[..., head, None] * read for head, read in enumerate(reads)]
        return sum(parts[1:], parts[0])

    def _attend_routed(self, query: Tensor, memories: list, routing: Routing) -> Tensor:
        """The same result, computing only the selected head of each query.

        The queries of a sample are sorted by head into tiles, each of one head; a head leaves at
        most one tile partly empty.
        """
        batch, _, width = query.shape
        n_heads = len(memories)
        assert routing.heads is not None
        slot_of_query, head_of_tile = _tiles(routing.heads, n_heads)
        n_tiles = head_of_tile.shape[1]
        slots = query.new_zeros(batch, n_tiles * _TILE, width)
        index = slot_of_query[..., None].expand_as(query)
        tiles = slots.scatter(1, index, query).view(batch * n_tiles, _TILE, width)
        results = torch.zeros_like(tiles, dtype=compute_dtype(tiles.dtype))
        for head, memory in enumerate(memories):
            tiles_of_head = (head_of_tile.flatten() == head).nonzero()[:, 0]
            memories_of_tiles = memory.of_samples(tiles_of_head // n_tiles)
            read = self._read(head, tiles[tiles_of_head], memories_of_tiles)
            results = results.index_copy(0, tiles_of_head, read)
        attended = results.view_as(slots).gather(1, index)
        return attended * self._gate(routing)[..., None]

    def _gate(self, routing: Routing) -> Tensor:
        """Factor of the selected head's output, `[B, N]`."""
        assert routing.heads is not None
        probability = routing.probabilities.gather(-1, routing.heads[..., None])[..., 0]
        if self.router_gate == "prob" and self.routing == "learned":
            return probability
        if self.router_gate == "straight_through" and self.routing == "learned":
            return 1 + probability - probability.detach()
        return torch.ones_like(probability)


def _widened(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


class _Sums(NamedTuple):
    """Sums over the keys in kernelized attention: features times values `[B, S, f, v]`, and
    features `[B, S, f]`.
    """

    products: Tensor
    features: Tensor

    def of_samples(self, samples: Tensor) -> "_Sums":
        return _Sums(self.products[samples], self.features[samples])

    def read(self, query: Tensor) -> Tensor:
        """`[B, S, n, f]` query features -> `[B, S, n, v]`; 0 where the denominator is 0."""
        numerator = query @ self.products
        denominator = query @ self.features[..., None]
        is_positive = denominator > 0
        return torch.where(is_positive, numerator / torch.where(is_positive, denominator, 1), 0)


class _Compressed(NamedTuple):
    """Compressed keys and values `[B, S, m, d / S]`, and which segments are live, `[B, m]`."""

    keys: Tensor
    values: Tensor
    live: Tensor

    def of_samples(self, samples: Tensor) -> "_Compressed":
        return _Compressed(self.keys[samples], self.values[samples], self.live[samples])

    def read(self, query: Tensor) -> Tensor:
        logits = query @ self.keys.mT * query.shape[-1] ** -0.5
        logits = logits.masked_fill(~self.live[:, None, None], torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, -1) * self.live[:, None, None]
        return weights @ self.values


def segment_means(
    tensors: tuple[Tensor, ...], token_mask: Tensor | None, segment_length: int
) -> tuple[list[Tensor], Tensor]:
    """Means over the real tokens of each segment, and which segments hold a real token.

    Args:
        tensors: `[B, N, d]` each, zero at padding.
        token_mask: `[B, N]` bool or None.
        segment_length: tokens per segment; the last segment may be shorter.

    Returns:
        `[B, m, d]` for each tensor with m = ceil(N / segment_length), zeros for empty segments; and
        `[B, m]` bool.
    """
    batch, length, _ = tensors[0].shape
    segments = count_blocks(length, segment_length)
    missing = segments * segment_length - length
    if token_mask is None:
        token_mask = torch.ones(batch, length, dtype=torch.bool, device=tensors[0].device)
    counts = F.pad(token_mask, (0, missing)).unflatten(1, (segments, segment_length)).sum(-1)
    means = []
    for x in tensors:
        sums = F.pad(x, (0, 0, 0, missing)).unflatten(1, (segments, segment_length)).sum(2)
        means.append(sums / counts.clamp_min(1)[..., None].to(x.dtype))
    return means, counts > 0


def _tiles(heads: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Sort queries by head into tiles.

    Args:
        heads: `[B, N]` int64.

    Returns:
        The slot of each query, `[B, N]`, and the head of each tile, `[B, T]` (`n_heads` for empty
        tiles); a tile has `_TILE` slots, and T depends on N and H only.
    """
    length = heads.shape[1]
    one_hot = F.one_hot(heads, n_heads)
    tiles = (one_hot.sum(1) + _TILE - 1) // _TILE  # of each head, [B, H]
    ends = tiles.cumsum(-1)
    rank = (one_hot.cumsum(1) - 1).gather(-1, heads[..., None])[..., 0]
    slot_of_query = (ends - tiles).gather(-1, heads) * _TILE + rank
    numbers = torch.arange(length // _TILE + n_heads, device=heads.device)
    head_of_tile = (numbers[None, :, None] >= ends[:, None]).sum(-1)
    return slot_of_query, head_of_tile
