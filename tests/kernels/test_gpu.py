"""Triton's kernels on a GPU: every row and form of the launch table, and what only a GPU can show.

`benchmarks/run.py check` runs these tests together with the others that carry the marker `gpu`, and
shows the properties "max_error" and "allowed". Under `TRITON_INTERPRET=1` the small cases run on
CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import INTERPRETED, REFERENCE, assert_all_equal, assert_as_good_as_eager
from triton_cases import ON_A_GPU, TRITON, needs_triton, only_on_a_gpu

from mra_attention import BlockSelection, ops, select_blocks

pytest.importorskip("triton")

from mra_attention.triton_impl import launching

pytestmark = needs_triton

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ARCHITECTURE = (
    launching.architecture(torch.device(TRITON.device)) if INTERPRETED or ON_A_GPU else "sm_80"
)


def make_case(dtype, length, dim):
    """Query, key, value, a gradient of the output, and a mask."""
    batch, heads = (1, 1) if INTERPRETED else (1 if length > 1000 else 2, 2)
    inputs = TRITON.inputs(batch, heads, length, dim, dtype=DTYPES[dtype])
    return inputs, TRITON.mask("holes", batch, length)


def select(query, key, mask, *, block_per_row=3, block_budget=None, priors=(0, 0)):
    """The pairs that the kernels select."""
    numbers = (block_per_row, block_budget, 32, *priors)
    settings = ("row_normalized", query.shape[-1] ** -0.5, "triton")
    return ops.mra2_select(query, key, mask, *numbers, *settings)


def assert_as_right_as_the_reference(
    record_property, dtype, length, dim, priors=(0, 0), mode="full"
):
    """The kernels choose for themselves; the tensor that comes nearest to what is allowed is shown
    in the row of the test.
    """
    inputs, mask = make_case(dtype, length, dim)
    names = ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks")
    settings = dict(zip(names, priors, strict=True))
    results = TRITON.attend(inputs, mask, block_per_row=3, approx_mode=mode, **settings)
    selection = BlockSelection(select(*inputs[:2], mask, priors=priors), 32)
    eager, exact = (
        REFERENCE.attend(x, mask, approx_mode=mode, selection=selection)
        for x in (inputs, [x.double() for x in inputs])
    )
    errors = [assert_as_good_as_eager(*x) for x in zip(results, eager, exact, strict=True)]
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    record_property("max_error", error)
    record_property("allowed", allowed)


# -- selection


@pytest.mark.parametrize("dim", [32] if INTERPRETED else [128, 32, 80])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_best_pairs_of_all_rows_tie(dtype, dim):
    """Their scores are exactly 0: no rounding comes between a logit and itself. So a budget below
    one pair per row takes the best pairs of those rows where they are nearest to the diagonal.
    """
    length = 200 if INTERPRETED else 4096
    (query, key, *_), mask = make_case(dtype, length, dim)
    live_rows = -(-length // 32) - 1  # the mask hides one whole block
    best = select(query, key, mask, block_budget=live_rows).cpu()
    few = select(query, key, mask, block_budget=live_rows // 2).cpu()
    for pairs, nearest in zip(best.flatten(0, 1), few.flatten(0, 1), strict=True):
        assert pairs.sum(-1).tolist() == [1, 0, *[1] * (live_rows - 1)]
        order = sorted(pairs.nonzero().tolist(), key=lambda pair: (abs(pair[0] - pair[1]), *pair))
        assert nearest.nonzero().tolist() == sorted(order[: live_rows // 2])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_select_what_float64_scores_select(dtype):
    """But for near-ties: up to 0.1 % of the pairs, each counted in both selections."""
    length, dim, budget = (100, 16, 2) if INTERPRETED else (4096, 64, 8)
    (query, key, *_), mask = make_case(dtype, length, dim)
    pairs = select(query, key, mask, block_per_row=budget).cpu()
    exact = select_blocks(query.cpu(), key.cpu(), mask.cpu(), block_per_row=budget).blocks
    assert (pairs ^ exact).sum() <= 2e-3 * exact.sum()


@only_on_a_gpu
@pytest.mark.parametrize("rows", [17, 128, 512])
def test_selection_takes_the_same_pairs_by_every_route(rows, table):
    """By top-k, by radix, and by radix on scores that are computed again."""
    inputs, mask = make_case("fp32", 32 * rows - 7, 64)
    query, key = (x.repeat(1, 6, 1, 1) for x in inputs[:2])
    table(topk_up_to_rows=2**30, recompute_from_length=2**30)
    by_topk = select(query, key, mask, priors=(1, 5))
    for recompute_from_length in (2**30, 0):
        table(topk_up_to_rows=0, recompute_from_length=recompute_from_length)
        assert torch.equal(select(query, key, mask, priors=(1, 5)), by_topk)


# -- what only a GPU can show


@only_on_a_gpu
def test_a_cuda_graph_serves_other_inputs():
    inputs, mask = make_case("bf16", 1000, 64)
    buffers = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        TRITON.attend(buffers, mask, block_per_row=3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = TRITON.attend(buffers, mask, block_per_row=3)
    for buffer, x in zip(buffers, inputs, strict=True):
        buffer.copy_(x.flip(0) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_all_equal(captured, TRITON.attend([x.clone() for x in buffers], mask, block_per_row=3))


@only_on_a_gpu
def test_nothing_waits_for_the_host():
    inputs, mask = make_case("bf16", 1000, 64)
    TRITON.attend(inputs, mask, block_per_row=3)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        TRITON.attend(inputs, mask, block_per_row=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- the launch table

CONFIGS = launching.table().configs
QUERY_KERNELS = ("forward", "query_gradient")
FORMS = {"plain": False, "swapped": True}
if not (INTERPRETED or ARCHITECTURE == "sm_90"):
    del FORMS["swapped"]


def with_configs(kernels=(*QUERY_KERNELS, "key_gradient"), **changes):
    """The change to the table that changes the rows of some kernels."""
    changed = {
        key: dataclasses.replace(config, **changes)
        for key, config in CONFIGS.items()
        if key[1] in kernels
    }
    return {"configs": CONFIGS | changed}


TABLE_CHANGES = {"as shipped": {}}
for n in (1, 2):
    TABLE_CHANGES[f"items of {n}"] = {"item_blocks": n}
for form, swapped in FORMS.items():
    TABLE_CHANGES[f"{form} form"] = with_configs(swapped=swapped)
    two = with_configs(QUERY_KERNELS, swapped=swapped, query_blocks=2)
    TABLE_CHANGES[f"two query blocks, {form} form"] = two
for precision in launching.COARSE_PRECISIONS[: 1 if ARCHITECTURE == "gfx942" else None]:
    precisions = dict.fromkeys(launching.table().coarse_precision, precision)
    TABLE_CHANGES[f"coarse products by {precision}"] = {"coarse_precision": precisions}
for n in (1, 4):
    TABLE_CHANGES[f"groups of {n}"] = with_configs(group=n)

#: Dtype, length, head dim, priors, mode.
SWEPT_CASES = [
    ("bf16", 513, 64),
    ("fp32", 513, 64),
    ("bf16", 4096, 64, (1, 5)),
    ("fp16", 4096, 64, (1, 5), "sparse"),
]
if INTERPRETED:
    SWEPT_CASES = [("bf16", 70, 16)]


@pytest.mark.parametrize("case", SWEPT_CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("change", TABLE_CHANGES)
def test_launch_settings_change_no_result_beyond_rounding(change, case, table, record_property):
    table(**TABLE_CHANGES[change])
    assert_as_right_as_the_reference(record_property, *case)


@only_on_a_gpu
@pytest.mark.parametrize(
    ("architecture", "dim", "operand_bytes"), sorted({(key[0], *key[2:]) for key in CONFIGS})
)
def test_rows_of_every_architecture_are_right_here(
    architecture, dim, operand_bytes, table, record_property
):
    rows = {key: config for key, config in CONFIGS.items() if key[0] == architecture}
    table(configs={(ARCHITECTURE, *key[1:]): config for key, config in rows.items()})
    dtype = "fp32" if operand_bytes == 4 else "bf16"
    assert_as_right_as_the_reference(record_property, dtype, 513, dim)
