"""What the benchmark measures: attention, modules, models, mixed lengths, scales, AdaMRA.

Every section times its providers in turn on the same inputs and returns rows of the CSV; dense SDPA
is always among them, and `ratio` is its median time over that of the row.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_megabytes
from benchmarks.providers import arena_layers, self_attention_modules, whole_models
from benchmarks.variable_lengths import BATCH, training_passes
from mra_attention import mra2_attention, multiresolution_attention
from mra_attention.benchmarking import interleaved_milliseconds, topical_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD_DIM = 12, 64
#: Heads of the longest inputs: dense attention takes minutes there.
SCALES_HEADS = 2

#: Tokens up to which scales are compared with dense attention once more, for their error.
_LONGEST_ERROR = 32768

#: Tokens that the mask of "mra2_padded" hides at the end: one block and a half.
PADDING = 48

#: (provider, block_per_row or None) -> function
Providers = dict[tuple[str, int | None], Callable[..., Tensor]]


def attention(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """Attention on ready query, key and value: SDPA and MRA-2, and MRA-2 with a padding mask."""
    inputs = topical_inputs(length, dtype=DTYPES[dtype], device=device)
    providers = attention_providers(length, budgets, device)
    errors = _relative_errors(providers, inputs, length)
    peaks = {}
    if memory:
        peaks = {name: peak_megabytes(device, length, dtype, budgets, name) for name in providers}
    return _both_passes("attention", length, dtype, providers, inputs, repeats, errors, peaks)


def attention_providers(length: int, budgets: tuple[int, ...], device: str) -> Providers:
    """SDPA, MRA-2 with each budget, and with 8 blocks and a block and a half of padding."""
    providers: Providers = {("sdpa", None): F.scaled_dot_product_attention}
    for block_per_row in budgets:
        providers["mra2", block_per_row] = lambda q, k, v, n=block_per_row: mra2_attention(
            q, k, v, block_per_row=n
        )
    if length > PADDING and 8 in budgets:
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
        mask[:, -PADDING:] = False
        providers["mra2_padded", 8] = lambda q, k, v: mra2_attention(q, k, v, mask, block_per_row=8)
    return providers


def self_attention(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """Whole self-attention modules, projections included, hidden size 768: MRA-2 and its peers."""
    assert not memory
    hidden = torch.randn(1, length, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device, DTYPES[dtype]).requires_grad_()
    providers = self_attention_modules(length, DTYPES[dtype], budgets, device)
    return _both_passes("self_attention", length, dtype, providers, (hidden,), repeats)


def model(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """RoBERTa-base with a masked-LM head: a forward pass, and a training step with AdamW."""
    assert not memory and dtype == "fp32"
    rows = []
    for name, training in (("fwd", False), ("step", True)):
        providers, inputs = whole_models(length, budgets, device, training)
        # One pass of a long model takes a minute: it warms itself up.
        samples = interleaved_milliseconds(
            providers, inputs, backward=False, repeats=repeats, warm_up=length < 4096
        )
        rows += _rows("model", length, dtype, training, samples, passes=name)
    return rows


def mixed_lengths(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """Forward and backward over texts of 50 to `length` tokens; `mode` says how many tokens."""
    assert not memory and dtype == "fp32"
    passes, tokens = training_passes(length, budgets, device)
    samples = interleaved_milliseconds(
        passes, (torch.zeros(()),), backward=False, repeats=repeats, warm_up=length < 4096
    )
    rows = _rows("mixed_lengths", length, dtype, True, samples)
    for row in rows:
        row |= {"batch": BATCH, "heads": 3, "mode": f"{row['mode']}, {tokens} tokens".lstrip(", ")}
        row["tokens_per_second"] = 1000 * tokens / row["ms_median"]
    return rows


def scales(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """Forward with the scales {32, 1}, whose pooled matrix grows quadratically, and with a coarser
    one before them, {1024, 32, 1}: `block_per_row` says how many blocks are cut per row of the
    first scale, and how many per row of 32 are exact.
    """
    assert not memory and dtype == "fp32"
    with torch.no_grad():
        inputs = topical_inputs(length, heads=SCALES_HEADS, device=device)
        providers: Providers = {("sdpa", None): F.scaled_dot_product_attention}
        for block_per_row in budgets:
            providers["mra2", block_per_row] = lambda q, k, v, n=block_per_row: mra2_attention(
                q, k, v, block_per_row=n
            )
            budget = {
                "resolutions": (1024, 32, 1),
                "block_budgets": (
                    max(1, length // 1024) * block_per_row,
                    length // 32 * block_per_row,
                ),
            }
            providers["mra_1024_32_1", block_per_row] = lambda q, k, v, budget=budget: (
                multiresolution_attention(q, k, v, **budget)
            )
        samples = interleaved_milliseconds(
            providers, inputs, backward=False, repeats=repeats, warm_up=length < 65536
        )
        errors = None
        if length <= _LONGEST_ERROR:
            errors = _relative_errors(providers, inputs, length)
    rows = _rows("scales", length, dtype, False, samples, errors)
    for row in rows:
        row["heads"] = SCALES_HEADS
        row["mode"] = "" if row["provider"] == "sdpa" else "full"
    return rows


def adamra(
    length: int,
    dtype: str,
    budgets: tuple[int, ...],
    device: str,
    repeats: int,
    memory: bool,
) -> list[dict]:
    """Whole attention layers of the Long Range Arena's width 64, forward and backward: AdaMRA,
    linear attention, MRA-2 and dense attention.
    """
    assert not memory and dtype == "fp32"
    hidden = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device).requires_grad_()
    providers = arena_layers(budgets, device)
    samples = interleaved_milliseconds(providers, (hidden,), backward=True, repeats=repeats)
    rows = _rows("adamra", length, dtype, True, samples)
    for row in rows:
        row |= {"heads": 2, "head_dim": 32}
    return rows


@torch.no_grad()
def _relative_errors(providers: Providers, inputs: tuple[Tensor, ...], length: int) -> dict:
    """Norm of the difference from dense attention in float32, with padding if the provider has it,
    over the norm of dense attention; at real tokens.
    """
    query, key, value = (x.float() for x in inputs)
    exact = F.scaled_dot_product_attention(query, key, value)
    real = slice(0, length - PADDING)
    of_real_tokens = F.scaled_dot_product_attention(
        query[:, :, real], key[:, :, real], value[:, :, real]
    )

    def error(provider: str, output: Tensor) -> float:
        wanted = of_real_tokens if provider == "mra2_padded" else exact
        return float((output.float()[:, :, : wanted.shape[2]] - wanted).norm() / wanted.norm())

    return {name: error(name[0], function(*inputs)) for name, function in providers.items()}


def _both_passes(op, length, dtype, providers, inputs, repeats, errors=None, peaks=None):
    rows = []
    for backward in (False, True):
        samples = interleaved_milliseconds(providers, inputs, backward=backward, repeats=repeats)
        rows += _rows(op, length, dtype, backward, samples, errors, peaks)
    return rows


def _rows(op, length, dtype, backward, samples, errors=None, peaks=None, passes=None) -> list[dict]:
    dense = statistics.median(samples["sdpa", None])
    rows = []
    for (provider, block_per_row), times in samples.items():
        ordered = sorted(times)
        median = statistics.median(ordered)
        rows.append(
            {
                "op": op,
                "provider": provider,
                "dtype": dtype,
                "batch": 1,
                "heads": HEADS,
                "length": length,
                "head_dim": HEAD_DIM,
                "block_per_row": block_per_row,
                "mode": "full" if provider.startswith("mra2") else "",
                "pass": passes or ("fwd+bwd" if backward else "fwd"),
                "ms_median": round(median, 3),
                "ms_p20": round(ordered[int(0.2 * (len(ordered) - 1))], 3),
                "ms_p80": round(ordered[round(0.8 * (len(ordered) - 1))], 3),
                "peak_mb": (peaks or {}).get((provider, block_per_row)) if backward else None,
                "rel_error": f"{errors[provider, block_per_row]:.2e}" if errors else None,
                "ratio": dense / median,
            }
        )
    return rows


SECTIONS = {
    "attention": attention,
    "self_attention": self_attention,
    "model": model,
    "mixed_lengths": mixed_lengths,
    "scales": scales,
    "adamra": adamra,
}
