"""What the benchmark measures: attention, modules, models, mixed lengths, scales, AdaMRA.

Every section times its providers in turn on the same inputs and returns rows of the CSV. Dense SDPA
is always among them, and `ratio` is its median time divided by the row's.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import peak_megabytes
from benchmarks.providers import (
    HEAD_DIM,
    HEADS,
    PADDING,
    Providers,
    arena_layers,
    attention_providers,
    candidate_choice_steps,
    self_attention_modules,
    whole_models,
)
from benchmarks.records import timing_columns
from benchmarks.variable_lengths import BATCH, training_passes
from mra_attention import mra2_attention, multiresolution_attention
from mra_attention.benchmarking import DTYPES, interleaved_milliseconds, topical_inputs
from mra_attention.implementations import BLOCK_SIZE, FAST

#: Heads of the longest inputs: dense attention takes minutes there.
SCALES_HEADS = 2
#: Tokens up to which scales are compared with dense attention a second time, for their error.
_LONGEST_ERROR = 32768
#: Tokens up to which a training step in bfloat16 is timed on a CPU without instructions for it:
#: torch has no fast kernel for the products of the backward pass there, and a step of RoBERTa-base
#: takes two minutes at 512 tokens.
_LONGEST_SLOW_STEP = 512


@dataclass(frozen=True)
class Case:
    """The conditions of one section.

    Attributes:
        length: tokens.
        dtype: a key of `DTYPES`.
        budgets: `block_per_row` of MRA-2.
        device: "cpu" or "cuda".
        repeats: interleaved rounds.
        memory: measure the peak memory of each provider too; only the section "attention" does.
    """

    length: int
    dtype: str
    budgets: tuple[int, ...]
    device: str
    repeats: int
    memory: bool = False


def attention(case: Case) -> list[dict]:
    """Attention on ready query, key and value: SDPA and MRA-2, and MRA-2 with a padding mask."""
    inputs = topical_inputs(case.length, dtype=DTYPES[case.dtype], device=case.device)
    providers = attention_providers(case.length, case.budgets, case.device)
    errors = _relative_errors(providers, inputs)
    peaks = {}
    if case.memory:
        arguments = (case.device, case.length, case.dtype, case.budgets)
        peaks = {name: peak_megabytes(*arguments, name) for name in providers}
    return _both_passes("attention", case, providers, inputs, errors, peaks)


def implementations(case: Case) -> list[dict]:
    """Attention by each fast implementation that runs here, and SDPA."""
    inputs = topical_inputs(case.length, dtype=DTYPES[case.dtype], device=case.device)
    providers: Providers = {("sdpa", None): F.scaled_dot_product_attention}
    for name, implementation in FAST.items():
        if implementation.refusal(inputs[0], BLOCK_SIZE, BLOCK_SIZE) is None:
            for block_per_row in case.budgets:
                function = partial(mra2_attention, block_per_row=block_per_row, impl=name)
                providers[f"mra2_{name}", block_per_row] = function
    return _both_passes("implementations", case, providers, inputs)


def self_attention(case: Case) -> list[dict]:
    """Whole self-attention modules, projections included, hidden size 768: MRA-2 and its peers."""
    dtype, generator = DTYPES[case.dtype], torch.Generator().manual_seed(0)
    hidden = torch.randn(1, case.length, HEADS * HEAD_DIM, generator=generator)
    hidden = hidden.to(case.device, dtype).requires_grad_()
    providers = self_attention_modules(case.length, dtype, case.budgets, case.device)
    return _both_passes("self_attention", case, providers, (hidden,))


def model(case: Case) -> list[dict]:
    """RoBERTa-base with a masked-LM head: a forward pass, and a training step with AdamW."""
    rows = []
    passes = [("fwd", False), ("step", True)]
    if case.dtype == "bf16" and case.length > _LONGEST_SLOW_STEP and not _multiplies_bf16(case):
        passes = passes[:1]
    for name, training in passes:
        arguments = (case.length, case.budgets, case.device, training, DTYPES[case.dtype])
        providers, inputs = whole_models(*arguments)
        # One pass of a long model takes a minute: it warms itself up.
        samples = _timed(case, providers, inputs, warm_up=case.length < 4096)
        rows += _rows("model", case, name, samples)
    return rows


def _multiplies_bf16(case: Case) -> bool:
    if case.device != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def candidate_choice(case: Case) -> list[dict]:
    """A training step of WikiHop's kind with a model of MiniLM's sizes."""
    assert case.dtype == "fp32"
    steps, inputs = candidate_choice_steps(case.length, case.budgets, case.device)
    return _rows("candidate_choice", case, "step", _timed(case, steps, inputs), head_dim=32)


def mixed_lengths(case: Case) -> list[dict]:
    """Forward and backward over texts of 50 to `length` tokens; `mode` says how many tokens."""
    assert case.dtype == "fp32"
    passes, tokens = training_passes(case.length, case.budgets, case.device)
    samples = _timed(case, passes, (torch.zeros(()),), warm_up=case.length < 4096)
    rows = _rows("mixed_lengths", case, "fwd+bwd", samples, batch=BATCH, heads=3)
    for row in rows:
        row["mode"] = f"{row['mode']}, {tokens} tokens".lstrip(", ")
        row["tokens_per_second"] = 1000 * tokens / row["ms_median"]
    return rows


def scales(case: Case) -> list[dict]:
    """Forward pass with the scales {32, 1}, whose pooled matrix grows quadratically, and with a
    coarser scale before them, {1024, 32, 1}. `block_per_row` says how many blocks are cut per row
    of the first scale, and how many per row of 32 are exact.
    """
    assert case.dtype == "fp32"
    length = case.length
    with torch.no_grad():
        inputs = topical_inputs(length, heads=SCALES_HEADS, device=case.device)
        providers = attention_providers(length, case.budgets, case.device)
        for block_per_row in case.budgets:
            budgets = (max(1, length // 1024) * block_per_row, length // 32 * block_per_row)
            providers["mra_1024_32_1", block_per_row] = partial(
                multiresolution_attention, resolutions=(1024, 32, 1), block_budgets=budgets
            )
        samples = _timed(case, providers, inputs, warm_up=length < 65536)
        errors = _relative_errors(providers, inputs) if length <= _LONGEST_ERROR else None
    return _rows("scales", case, "fwd", samples, errors, heads=SCALES_HEADS)


def adamra(case: Case) -> list[dict]:
    """Whole attention layers of the Long Range Arena's width 64, forward and backward: AdaMRA,
    linear attention, MRA-2 and dense attention.
    """
    assert case.dtype == "fp32"
    hidden = torch.randn(1, case.length, 64, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(case.device).requires_grad_()
    providers = arena_layers(case.budgets, case.device)
    samples = _timed(case, providers, (hidden,), backward=True)
    return _rows("adamra", case, "fwd+bwd", samples, heads=2, head_dim=32)


@torch.no_grad()
def _relative_errors(providers: Providers, inputs: tuple[Tensor, ...]) -> dict:
    """Norm of the difference from dense attention in float32 over the norm of dense attention, at
    real tokens; providers with padding are compared with dense attention over the real tokens.
    """
    inputs32 = [x.float() for x in inputs]
    exact = F.scaled_dot_product_attention(*inputs32)
    exact_unpadded = F.scaled_dot_product_attention(*(x[:, :, :-PADDING] for x in inputs32))

    def error(provider: str, output: Tensor) -> float:
        dense = exact_unpadded if provider == "mra2_padded" else exact
        return float((output.float()[:, :, : dense.shape[2]] - dense).norm() / dense.norm())

    return {name: error(name[0], function(*inputs)) for name, function in providers.items()}


def _timed(case: Case, providers: Providers, inputs, *, backward: bool = False, warm_up=True):
    return interleaved_milliseconds(
        providers, inputs, backward=backward, repeats=case.repeats, warm_up=warm_up
    )


def _both_passes(op: str, case: Case, providers: Providers, inputs, errors=None, peaks=None):
    forward, both = (_timed(case, providers, inputs, backward=x) for x in (False, True))
    rows = _rows(op, case, "fwd", forward, errors)
    return rows + _rows(op, case, "fwd+bwd", both, errors, peaks)


def _rows(op: str, case: Case, name: str, samples, errors=None, peaks=None, **columns):
    """A row per provider; `columns` replace those of batch 1 and of RoBERTa-base's heads."""
    dense = statistics.median(samples["sdpa", None])
    shape = {"batch": 1, "heads": HEADS, "length": case.length, "head_dim": HEAD_DIM}
    return [
        {"op": op, "provider": provider, "dtype": case.dtype}
        | {**shape, "block_per_row": block_per_row, "pass": name}
        | {"mode": "full" if provider.startswith(("mra2", "mra_")) else ""}
        | timing_columns(times)
        | {"peak_mb": (peaks or {}).get((provider, block_per_row))}
        | {"rel_error": f"{errors[provider, block_per_row]:.2e}" if errors else None}
        | {"ratio": dense / statistics.median(times)}
        | columns
        for (provider, block_per_row), times in samples.items()
    ]


SECTIONS = {
    section.__name__: section
    for section in (
        *(attention, implementations, self_attention, model, candidate_choice),
        *(mixed_lengths, scales, adamra),
    )
}
