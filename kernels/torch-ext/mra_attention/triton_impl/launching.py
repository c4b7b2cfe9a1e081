"""How kernels are launched: the shipped launch configurations, and the one door of all launches.

`launch_configs.json` has one row per (architecture, kernel, padded head dim, operand width),
measured on a GPU by `benchmarks/run.py --tune`, or estimated where its `source` says so.
"""

import contextlib
import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import triton

from .primitives import product

_TABLE = Path(__file__).with_name("launch_configs.json")
COARSE_PRECISIONS = ("ieee", "tf32x3")


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is compiled.

    Args:
        swapped: whether gathered tokens are the M side of the products, as sm_90's tensor cores
            need.
        group: blocks gathered at a time.
        num_warps, num_stages: Triton's.
        query_blocks: adjacent query blocks that own a tile, 1 or 2; 1 for "key_gradient", where a
            key block owns it.
    """

    swapped: bool
    group: int
    num_warps: int
    num_stages: int
    query_blocks: int


@dataclass(frozen=True)
class Table:
    """The content of `launch_configs.json`.

    Args:
        item_blocks: blocks in a work item, at most.
        topk_up_to_rows: selections of up to this many block rows use `torch.topk`.
        recompute_from_length: from this many tokens on, every pass computes the coarse scores
            instead of reading stored ones.
        coarse_precision: architecture -> Triton's `input_precision` for products of float32
            summaries: "ieee", or "tf32x3", three products on tensor cores that lose a bit or two.
        configs: (architecture, kernel, padded head dim, bytes of an operand) -> config.
    """

    item_blocks: int
    topk_up_to_rows: int
    recompute_from_length: int
    coarse_precision: dict[str, str]
    configs: dict[tuple[str, str, int, int], LaunchConfig]


@cache
def table() -> Table:
    return parse_table(json.loads(_TABLE.read_text()))


def parse_table(content: dict) -> Table:
    configs = {}
    for row in content["configs"]:
        key = (row["architecture"], row["kernel"], row["head_dim"], row["operand_bytes"])
        config = LaunchConfig(**{field.name: row[field.name] for field in fields(LaunchConfig)})
        allowed = (1,) if row["kernel"] == "key_gradient" else (1, 2)
        if config.query_blocks not in allowed:
            raise ValueError(
                f"launch configurations: query_blocks must be one of {allowed} for "
                f"{row['kernel']}, got {config.query_blocks!r} in the row {key}."
            )
        configs[key] = config
    for architecture_name, precision in content["coarse_precision"].items():
        if precision not in COARSE_PRECISIONS:
            raise ValueError(
                f"launch configurations: coarse_precision must be one of {COARSE_PRECISIONS}, got "
                f"{precision!r} for {architecture_name}."
            )
    return Table(
        content["item_blocks"],
        content["topk_up_to_rows"],
        content["recompute_from_length"],
        content["coarse_precision"],
        configs,
    )


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 at its first import)."""
    return not isinstance(product, triton.JITFunction)


def architecture(device: torch.device) -> str:
    """The architecture whose rows of the table serve a device; sm_80's for the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"


def config_for(
    kernel: str, device: torch.device, padded_dim: int, dtype: torch.dtype
) -> LaunchConfig:
    """Return the shipped configuration of "forward", "query_gradient" or "key_gradient"."""
    return table().configs[architecture(device), kernel, padded_dim, dtype.itemsize]


def coarse_precision(device: torch.device, dtype: torch.dtype) -> str:
    """Triton's name for how summaries of inputs of a dtype are multiplied; exactly for float32."""
    return table().coarse_precision[architecture(device)] if dtype.itemsize == 2 else "ieee"


def float32_precision() -> str:
    """Triton's name for torch's setting of float32 matrix products: "ieee" or "tf32"."""
    # Not `allow_tf32`: reading it raises once the newer setting was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel, programs: int, *, num_warps: int = 4, num_stages: int = 2, **arguments):
    """Start `programs` programs on the current device; arguments by the kernel's names for them."""
    assert len(arguments) == len(kernel.arg_names), set(arguments) ^ set(kernel.arg_names)
    # By position, because Triton takes microseconds longer to bind names.
    by_position = map(arguments.__getitem__, kernel.arg_names)
    kernel[(programs,)](*by_position, num_warps=num_warps, num_stages=num_stages)


def on_device_of(x: torch.Tensor):
    """Context in which launches go to the device of `x`, whichever was current before."""
    if x.device.type == "cpu" and not is_interpreted():
        raise RuntimeError(
            "TRITON_INTERPRET=1 was set after triton had been imported, which is too late: set it "
            "before Python starts."
        )
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


# Triton's own versions also work inside kernels, and take several microseconds outside them.


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def padded_dim(dim: int) -> int:
    return max(16, next_power_of_2(dim))
