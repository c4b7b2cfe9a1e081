"""Triton's kernels on a GPU: every dtype by the float64 yardstick, every row and form of the launch
table, and what only a GPU can show.

`benchmarks/run.py check` runs these tests together with the others that carry the marker `gpu`, and
shows the properties "max_error" and "allowed". Under `TRITON_INTERPRET=1` the small cases run on
CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import (
    INTERPRETED,
    MODES,
    NAMES,
    REFERENCE,
    assert_all_equal,
    outputs_and_gradients,
)
from triton_cases import ON_A_GPU, TRITON, needs_triton, only_on_a_gpu

from mra_attention import BlockSelection, ops, select_blocks

pytest.importorskip("triton")

from mra_attention.triton_impl import launching

DEVICE = torch.device(TRITON.device)
ARCHITECTURE = launching.architecture(DEVICE) if INTERPRETED or ON_A_GPU else "sm_80"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

pytestmark = needs_triton


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: shapes, settings, and the memory layout of its inputs."""

    dtype: str = "bf16"
    dim: int = 64
    length: int = 513
    mask: str = "holes"
    mode: str = "full"
    priors: tuple[int, int] = (0, 0)
    is_transposed: bool = False

    def __str__(self) -> str:
        extra = "-priors" * any(self.priors) + "-transposed" * self.is_transposed
        return f"{self.dtype}-D{self.dim}-N{self.length}-{self.mask}-{self.mode}{extra}"

    def tensors(self):
        """Query, key, value and a gradient of the output; the mask or None."""
        batch = 1 if INTERPRETED or self.length > 1000 else 2
        heads = 1 if INTERPRETED else 2
        inputs = TRITON.inputs(batch, heads, self.length, self.dim, dtype=DTYPES[self.dtype])
        if self.is_transposed:
            inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        return inputs, TRITON.mask(self.mask, batch, self.length)

    def select(self, inputs, mask, block_budget=None, block_per_row=3):
        """The pairs that the kernels select."""
        numbers = (block_per_row, block_budget, 32, *self.priors)
        settings = ("row_normalized", self.dim**-0.5, "triton")
        return ops.mra2_select(*inputs[:2], mask, *numbers, *settings)

    def attend(self, inputs, mask):
        """Output and gradients by the kernels."""
        names = ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks")
        priors = dict(zip(names, self.priors, strict=True))
        return TRITON.attend(inputs, mask, block_per_row=3, approx_mode=self.mode, **priors)


def assert_as_right_as_the_reference(case, record_property):
    """Outputs and gradients may be as far from float64 as the reference in the same dtype is, plus
    four roundings of the largest value; in float32 as far as 2e-5 of it.
    """
    inputs, mask = case.tensors()
    selection = BlockSelection(case.select(inputs, mask), 32)
    plain = {"approx_mode": case.mode, "selection": selection}
    eager = REFERENCE.attend(inputs, mask, **plain)
    exact = REFERENCE.attend([x.double() for x in inputs], mask, **plain)
    worst, failures = (0.0, 1.0), []
    for name, result, rough, right in zip(
        NAMES, case.attend(inputs, mask), eager, exact, strict=True
    ):
        assert result.isfinite().all(), f"{name} is not finite"
        largest = float(right.abs().max())
        error = float((result - right).abs().max())
        # Sums are float32 in every dtype, and of terms far larger than a gradient that cancels.
        allowed = 2e-5 * max(1.0, largest)
        if result.dtype != torch.float32:
            allowed += float((rough - right).abs().max())
            allowed += 4 * torch.finfo(result.dtype).eps * largest
        worst = max(worst, (error, allowed), key=lambda pair: pair[0] / pair[1])
        if error > allowed:
            failures.append(f"{name} is off by {error:.1e}, allowed {allowed:.1e}")
    record_property("max_error", worst[0])
    record_property("allowed", worst[1])
    assert not failures, "; ".join(failures)


# -- agreement

BASE = Case(dim=16, length=70) if INTERPRETED else Case()
PRIORS = {"priors": (1, 5)}
#: Length, mask and mode; every dtype meets all of them, every head dim most of them.
SHAPES = (
    (513, "holes", "full"),
    (4096, "none", "full"),
    (100, "right", "sparse"),
    (1, "none", "full"),
    (33, "empty sample", "full"),
    (513, "none", "sparse"),
    (4096, "holes", "sparse"),
    (100, "none", "full"),
)
SMALL_CASES = [
    BASE,
    dataclasses.replace(BASE, dtype="fp32", length=33, mask="none", mode="sparse"),
    dataclasses.replace(BASE, dtype="fp16", mask="right", is_transposed=True, **PRIORS),
    # Gradients of one or two tokens cancel to 0.
    *(Case(dtype, 64, n, "none") for dtype in DTYPES for n in (1, 2)),
]
GPU_CASES = [
    *(Case(dtype, is_transposed=True) for dtype in DTYPES),
    *(Case(dtype, **PRIORS) for dtype in DTYPES),
    *(
        Case(dtype, dim, *SHAPES[(i + 4 * turn + 3 * j) % len(SHAPES)])
        for turn in range(2)
        for i, dim in enumerate((64, 128, 32, 80))
        for j, dtype in enumerate(DTYPES)
    ),
]


@pytest.mark.parametrize("case", SMALL_CASES if INTERPRETED else GPU_CASES, ids=str)
def test_errors_are_no_larger_than_the_reference_makes(case, record_property):
    assert_as_right_as_the_reference(case, record_property)


# -- bits


def test_many_runs_give_the_same_bits():
    inputs, mask = BASE.tensors()
    first = BASE.attend(inputs, mask)
    for _ in range(1 if INTERPRETED else 20):
        assert_all_equal(BASE.attend(inputs, mask), first)


# -- selection


@pytest.mark.parametrize("dim", [32] if INTERPRETED else [128, 32, 80])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_best_pairs_of_all_rows_tie(dtype, dim):
    """Their scores are exactly 0: no rounding comes between a logit and itself. So a budget below
    one pair per row takes the best pairs of those rows where they are nearest to the diagonal.
    """
    case = Case(dtype, dim, 200 if INTERPRETED else 4096)
    inputs, mask = case.tensors()
    live_rows = -(-case.length // 32) - 1  # the mask hides one whole block
    best = case.select(inputs, mask, block_budget=live_rows).cpu()
    few = case.select(inputs, mask, block_budget=live_rows // 2).cpu()
    for pairs, nearest in zip(best.flatten(0, 1), few.flatten(0, 1), strict=True):
        assert pairs.sum(-1).tolist() == [1, 0, *[1] * (live_rows - 1)]
        order = sorted(pairs.nonzero().tolist(), key=lambda pair: (abs(pair[0] - pair[1]), *pair))
        assert nearest.nonzero().tolist() == sorted(order[: live_rows // 2])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_select_what_float64_scores_select(dtype):
    """But for near-ties: up to 0.1 % of the pairs, each counted in both selections."""
    case = Case(dtype, 16, 100) if INTERPRETED else Case(dtype, 64, 4096)
    inputs, mask = case.tensors()
    pairs = case.select(inputs, mask, block_per_row=2 if INTERPRETED else 8).cpu()
    query, key = (x.cpu() for x in inputs[:2])
    exact = select_blocks(query, key, mask.cpu(), block_per_row=2 if INTERPRETED else 8).blocks
    assert (pairs ^ exact).sum() <= 2e-3 * exact.sum()


@only_on_a_gpu
@pytest.mark.parametrize("rows", [17, 128, 512])
def test_selection_takes_the_same_pairs_by_every_route(rows, table):
    """By top-k, by radix, and by radix on scores that are computed again."""
    case = Case("fp32", 64, 32 * rows - 7, **PRIORS)
    inputs, mask = case.tensors()
    inputs = [x.repeat(1, 6, 1, 1) for x in inputs[:2]]
    table(topk_up_to_rows=2**30, recompute_from_length=2**30)
    by_topk = case.select(inputs, mask)
    for recompute_from_length in (2**30, 0):
        table(topk_up_to_rows=0, recompute_from_length=recompute_from_length)
        assert torch.equal(case.select(inputs, mask), by_topk)


# -- what only a GPU can show


@only_on_a_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1000, 4096, 8192])  # the last two take five and six digits
def test_a_cuda_graph_serves_other_inputs(length, mode):
    case = Case(length=length, mode=mode)
    inputs, mask = case.tensors()
    buffers = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.attend(buffers, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.attend(buffers, mask)
    for buffer, x in zip(buffers, inputs, strict=True):
        buffer.copy_(x.flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_all_equal(captured, case.attend([x.clone() for x in buffers], mask))


@only_on_a_gpu
def test_nothing_waits_for_the_host():
    case = Case(length=1000)
    inputs, mask = case.tensors()
    case.attend(inputs, mask)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.attend(inputs, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_on_a_gpu
def test_inductor_compiles_one_graph_with_the_bits_of_eager():
    case = Case(length=1000)
    inputs, mask = case.tensors()
    compiled = torch.compile(TRITON.attention(mask, block_per_row=3), fullgraph=True)
    assert_all_equal(outputs_and_gradients(compiled, *inputs), case.attend(inputs, mask))


# -- the launch table

CONFIGS = launching.table().configs
FORMS = {"plain": False, "swapped": True}
if not (INTERPRETED or ARCHITECTURE == "sm_90"):
    del FORMS["swapped"]


def with_configs(kernels=("forward", "query_gradient", "key_gradient"), **changes):
    """The change to the table that changes the rows of some kernels."""
    changed = {
        key: dataclasses.replace(config, **changes)
        for key, config in CONFIGS.items()
        if key[1] in kernels
    }
    return {"configs": CONFIGS | changed}


QUERY_KERNELS = ("forward", "query_gradient")
TABLE_CHANGES = {
    **{f"items of {n}": {"item_blocks": n} for n in (1, 2)},
    **{f"{form} form": with_configs(swapped=swapped) for form, swapped in FORMS.items()},
    **{
        f"two query blocks, {form} form": with_configs(
            QUERY_KERNELS, swapped=swapped, query_blocks=2
        )
        for form, swapped in FORMS.items()
    },
    **{
        f"coarse products by {precision}": {
            "coarse_precision": dict.fromkeys(launching.table().coarse_precision, precision)
        }
        for precision in launching.COARSE_PRECISIONS[: 1 if ARCHITECTURE == "gfx942" else None]
    },
    **{f"groups of {n}": with_configs(group=n) for n in (1, 4)},
}
LONG_CASE = Case(length=4096, **PRIORS)
SWEPT_CASES = [BASE] if INTERPRETED else [BASE, Case("fp32"), LONG_CASE]


@pytest.mark.parametrize("case", SWEPT_CASES, ids=str)
@pytest.mark.parametrize("change", TABLE_CHANGES)
def test_launch_settings_change_no_result_beyond_rounding(change, case, table, record_property):
    table(**TABLE_CHANGES[change])
    assert_as_right_as_the_reference(case, record_property)


@only_on_a_gpu
@pytest.mark.parametrize(
    ("architecture", "dim", "operand_bytes"), sorted({(key[0], *key[2:]) for key in CONFIGS})
)
def test_rows_of_every_architecture_are_right_here(
    architecture, dim, operand_bytes, table, record_property
):
    rows = {key: config for key, config in CONFIGS.items() if key[0] == architecture}
    table(configs={(ARCHITECTURE, *key[1:]): config for key, config in rows.items()})
    case = Case("fp32" if operand_bytes == 4 else "bf16", dim)
    assert_as_right_as_the_reference(case, record_property)
