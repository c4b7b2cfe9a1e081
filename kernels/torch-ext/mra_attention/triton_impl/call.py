"""One call as the kernels see it: inputs with their strides, block summaries, lists of blocks."""

import torch
from torch import Tensor

from ..blocks import count_blocks
from ..implementations import BLOCK_SIZE, Summaries
from . import block_lists, launching, pooling


def summary_shapes(shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of both for inputs `[B, H, N, D]`."""
    batch, heads, length, dim = shape
    n_blocks = count_blocks(length, BLOCK_SIZE)
    return (3, batch * heads, n_blocks, launching.padded_dim(dim)), (batch, n_blocks)


class KernelCall:
    """Shapes and summaries of one call: what every kernel is told."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        token_mask: Tensor | None,
        summaries: Summaries | None = None,
    ):
        self.inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        self.strides = [stride for x in self.inputs for stride in x.stride()[:3]]
        self.batch, self.heads, self.length, self.dim = query.shape
        self.all_heads = self.batch * self.heads
        self.n_blocks = count_blocks(self.length, BLOCK_SIZE)
        self.padded_dim = launching.padded_dim(self.dim)
        self.device, self.dtype = query.device, query.dtype
        self.has_mask = token_mask is not None
        mask = token_mask.contiguous().view(torch.uint8) if self.has_mask else query
        self.mask = mask
        self.summaries = self._summarize() if summaries is None else summaries
        self.query_means, self.key_means, self.value_sums = self.summaries.vectors
        self.counts = self.summaries.counts

    def _summarize(self) -> Summaries:
        vectors, counts = summary_shapes(self.inputs[0].shape)
        summaries = Summaries(self.empty(vectors), self.empty(counts, torch.int32))
        launching.launch(
            pooling.pool_kernel,
            self.all_heads * self.n_blocks,
            *self.inputs,
            self.mask,
            *summaries.vectors,
            summaries.counts,
            *self.strides,
            self.length,
            self.n_blocks,
            self.heads,
            **self.of_tokens(),
        )
        return summaries

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def of_tokens(self) -> dict:
        """Constants of kernels that visit tokens."""
        sizes = {"M": BLOCK_SIZE, "D": self.dim, "D_PAD": self.padded_dim}
        return {"HAS_MASK": self.has_mask, **sizes}

    def config_of(self, kernel: str) -> launching.LaunchConfig:
        return launching.config_for(kernel, self.device, self.padded_dim, self.dtype)

    def of_items(self, kernel: str) -> dict:
        """Constants and launch configuration of kernels that run over work items."""
        config = self.config_of(kernel)
        return {
            "GROUP": config.group,
            "SWAPPED": config.swapped,
            "WIDEN": launching.is_interpreted() and self.dtype == torch.bfloat16,
            "PRECISION": launching.float32_precision(),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def of_summaries(self) -> dict:
        """Constants and launch configuration of kernels that multiply summaries, each program those
        of a strip of rows with all columns: the largest tiles whose IEEE products keep everything
        in registers.
        """
        rows, stages = (32, 2) if self.padded_dim == 64 else (16, 1)
        sizes = {"ROWS": rows, "COLUMNS": 16, **self.of_coarse_products()}
        return {"num_warps": 8, "num_stages": stages, **sizes}

    def of_summary_columns(self) -> dict:
        """The same where each program has a strip of columns and visits all rows."""
        products = self.of_coarse_products()
        if self.padded_dim == 128:
            products["PRECISION"] = "ieee"  # three products of that width spill at any tile
        side = 32 if self.padded_dim == 64 and products["PRECISION"] == "ieee" else 16
        warps = 4 if self.padded_dim == 16 else 8
        return {"ROWS": side, "COLUMNS": side, "num_warps": warps, "num_stages": 1, **products}

    def of_coarse_products(self) -> dict:
        """Constants of kernels that multiply summaries."""
        precision = launching.coarse_precision(self.device, self.dtype)
        return {"D_PAD": self.padded_dim, "PRECISION": precision}

    def strips(self, rows: int) -> int:
        """Programs of kernels that visit a strip of that many blocks against all others each."""
        return self.all_heads * launching.ceil_div(self.n_blocks, rows)


class BlockLists:
    """The selected pairs as lists in one or both directions, cut into work items. Those of
    direction 0 belong to bundles of `query_blocks` adjacent query blocks.
    """

    def __init__(
        self,
        call: KernelCall,
        blocks: Tensor,
        largest_budget: int | None,
        *,
        directions: int,
        query_blocks: int,
    ):
        rows, lines = call.n_blocks, (directions, call.all_heads)
        self.capacity = rows**2 if largest_budget is None else min(largest_budget, rows**2)
        # Longer items where so much may be selected that partial sums would outgrow the inputs.
        longest = launching.next_power_of_2(launching.ceil_div(self.capacity, 4 * rows))
        self.item_blocks = max(launching.table().item_blocks, longest if rows > 64 else 1)
        self.own_blocks = (query_blocks, 1)[:directions]
        self.owners = [launching.ceil_div(rows, n) for n in self.own_blocks]
        # A union of lists is no longer than their sum, so that `capacity` bounds it too.
        self.max_items = [n + self.capacity // self.item_blocks for n in self.owners]
        self.may_split = rows > self.item_blocks
        self.sizes, self.starts, self.first_items = call.empty((3, *lines, rows), torch.int32)
        self.lists = call.empty((*lines, max(1, self.capacity)), torch.int32)
        self.items = call.empty((call.all_heads * sum(self.max_items),), torch.int32)
        self.item_counts = call.empty(lines, torch.int32)
        tile = {"QUERY_BLOCKS": query_blocks, "OWN": 32, "OTHER": 64, "num_warps": 8}
        strips = directions * call.strips(tile["OWN"])
        shape = (call.all_heads, rows, call.heads)
        launching.launch(
            block_lists.count_kernel, strips, blocks, call.counts, self.sizes, *shape, **tile
        )
        launching.launch(
            block_lists.plan_kernel,
            directions * call.all_heads,
            self.sizes,
            self.starts,
            self.first_items,
            self.items,
            self.item_counts,
            call.all_heads,
            rows,
            self.max_items[0],
            self.max_items[-1],
            QUERY_BLOCKS=query_blocks,
            R_PAD=launching.next_power_of_2(rows),
            ITEM_BLOCKS=self.item_blocks,
        )
        launching.launch(
            block_lists.fill_kernel,
            strips,
            blocks,
            call.counts,
            self.starts,
            self.lists,
            *shape,
            self.capacity,
            **tile,
        )

    def of(self, direction: int) -> list[Tensor]:
        """Sizes, starts, lists, first items, items, item counts."""
        lines = len(self.item_counts[direction])
        items = self.items.split([lines * n for n in self.max_items])[direction]
        first = [x[direction] for x in (self.sizes, self.starts, self.lists, self.first_items)]
        return [*first, items, self.item_counts[direction]]

    def parts(self, call: KernelCall, direction: int, channels: int) -> Tensor:
        """Partial sums of owners that have several items, `[G, items, own tokens, channels]`."""
        items = self.max_items[direction] if self.may_split else 0
        tokens = self.own_blocks[direction] * BLOCK_SIZE
        return call.empty((call.all_heads, items, tokens, channels))


def as_bytes(call: KernelCall, blocks: Tensor | None) -> Tensor:
    """The selection as int8 `[G, R, R]`; every pair for None."""
    shape = (call.batch, call.heads, call.n_blocks, call.n_blocks)
    if blocks is None:
        return torch.ones(shape, dtype=torch.int8, device=call.device)
    return blocks.expand(shape).contiguous().view(torch.int8)
