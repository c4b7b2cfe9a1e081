"""Ceilings of the GPU, the table against dense attention, variants of the kernels, whole models.

`bench.csv` has the columns of `run.py`. `pass` is "fwd" or "fwd+bwd", followed by " graph" where a
CUDA graph is replayed. Providers: `mra2`; `sdpa_flash` and `sdpa_cudnn`, which are dense; and
`flex_exact_part`, FlexAttention over the blocks that MRA-2 selected, without the selection and
without the coarse part. `peak_mb` is measured above inputs and the gradient of the output,
`rel_error` against dense attention in float32 on the first sample. Rows of op "variant" and
"selection" time one part or one setting, named in the provider; rows of op "model" have passes of
their own (`models.py`).

`ceilings.csv` holds what the GPU can do: `megabytes` are moved (or `gigaflop` computed) in
`ms_median`; `rate` is their quotient in GB/s or TFLOP/s. `gather` reads random blocks of 4 KB (32
keys x 64 channels in 16 bits), or of 1 KB (8 keys), out of a footprint that fits the L2 cache, or
does not; `copy` counts what is read and written; float32
products are IEEE.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.cuda import models, summary
from benchmarks.cuda.driver import Outcome, Session, Skipped, Step
from benchmarks.cuda.measure import (
    Shape,
    add_timing,
    attention_inputs,
    coarse_precisions,
    forms,
    graphed,
    patched_table,
    peak_megabytes,
    pictures,
    select_blocks,
    time_calls,
    with_coarse_precision,
    with_configs,
)
from benchmarks.records import COLUMNS, CONDITIONS, KEYS, Records
from mra_attention import mra2_attention, ops
from mra_attention.benchmarking import DTYPES

CEILING_COLUMNS = (
    *CONDITIONS,
    *("name", "megabytes", "footprint_mb", "gigaflop"),
    *("ms_median", "ms_p20", "ms_p80", "rate", "unit"),
)
#: Priors of the released 4096-token checkpoints, which make rows uneven.
_PRIORS = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 5}
_DENSE = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


def steps(session: Session) -> list[Step]:
    """Ceilings, the table, variants, models: most wanted first."""
    records = Records(session.out / "bench.csv", COLUMNS, KEYS)
    shapes, budgets = _shapes(session)

    def table(shape: Shape, provider: str, budget: int | None = None, mode: str = "full") -> Step:
        name = f"table: {shape} {provider}" + (f" {budget} {mode}" if budget else "")
        return Step(name, partial(_table, session, records, shape, provider, budget, mode))

    first, *others = budgets
    flexible = [x for x in shapes[2:] if x.length >= 2048 and x.batch == 1]
    providers = (("mra2", first), ("sdpa_flash", None), ("sdpa_cudnn", None))
    return [
        *ceiling_steps(session),
        *(table(shape, *provider) for shape in shapes for provider in providers),
        *(table(shape, "flex_exact_part", first) for shape in shapes[:2]),
        *(table(shape, "mra2", n) for shape in shapes for n in others),
        *(table(shape, "mra2", first, "sparse") for shape in shapes[:2]),
        *_variant_steps(session, records, shapes[0], first),
        *models.steps(session, records),
        *(table(shape, "flex_exact_part", first) for shape in flexible),
    ]


def _shapes(session: Session) -> tuple[list[Shape], tuple[int, ...]]:
    """Shapes, most informative first; budgets, likewise."""
    if session.dry_run:
        return [Shape(96, 1, 1, 16), Shape(64, 2, 1, 16)], (1, 2)
    first = [(4096, 8), (16384, 1), (8192, 1), (2048, 8), (65536, 1), (512, 8)]
    first += [(4096, 1), (1024, 8), (512, _largest_batch(512)), (16384, 8), (8192, 8)]
    first += [(2048, 1), (1024, 1), (512, 1), (65536, 8)]
    return [Shape(*x) for x in first], (8, 4, 16)


def _largest_batch(length: int) -> int:
    """The largest power of 2 for which 16 tensors `[B, 12, length, 64]` in bf16 fit the GPU."""
    samples = torch.cuda.get_device_properties(0).total_memory // (16 * 12 * length * 64 * 2)
    return 1 << (int(samples).bit_length() - 1)


# -- ceilings


@triton.jit
def gather_kernel(X, INDEX, OUT, blocks_each, WORDS: tl.constexpr):
    """One program adds `blocks_each` blocks of WORDS numbers, listed in INDEX."""
    program = tl.program_id(0)
    words = tl.arange(0, WORDS)
    sums = tl.zeros([WORDS], tl.float32)
    for i in range(0, blocks_each):
        block = tl.load(INDEX + program * blocks_each + i).to(tl.int64)
        sums += tl.load(X + block * WORDS + words)
    tl.store(OUT + program * WORDS + words, sums)


def ceiling_steps(session: Session) -> list[Step]:
    """The steps that write `ceilings.csv`."""
    records = Records(session.out / "ceilings.csv", CEILING_COLUMNS, ("name",))
    small = session.dry_run
    sizes = [(1, 4), (1, 1)] if small else [(8, 4), (24, 4), (40, 4), (1024, 4), (24, 1)]
    measures = {
        f"gather of {size} KB blocks from {n} MB": partial(_gather, session, n, size)
        for n, size in sizes
    }
    measures["copy"] = partial(_copy, session)
    for dtype, sizes in (("bf16", (8192, 4096)), ("fp32", (4096,))):
        for size in (64,) if small else sizes:
            measures[f"matmul {dtype} {size}"] = partial(_matmul, session, size, DTYPES[dtype])
    return [
        Step(f"ceiling: {name}", partial(_ceiling, session, records, name, measure))
        for name, measure in measures.items()
    ]


def _ceiling(session: Session, records: Records, name: str, measure) -> Outcome | None:
    if records.has({"name": name}):
        return None
    row, run = measure()
    row |= time_calls(session, run)
    amount, unit = ("megabytes", "GB/s") if "megabytes" in row else ("gigaflop", "TFLOP/s")
    row |= {"name": name, "rate": row[amount] / row["ms_median"], "unit": unit}
    row = {key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}
    records.add(session.where | row)
    return Outcome(detail=f"{row['rate']} {unit}")


def _gather(session: Session, megabytes: int, kilobytes: int) -> tuple[dict, Callable[[], None]]:
    words = 256 * kilobytes  # float32
    programs, each = (2, 3) if session.dry_run else (132 * 16, 256 // kilobytes)
    blocks = megabytes * 2**20 // (4 * words)
    device = session.device
    x = torch.ones(blocks, words, device=device)
    index = torch.randint(0, blocks, (programs, each), device=device, dtype=torch.int32)
    out = torch.empty(programs, words, device=device)

    def run() -> None:
        gather_kernel[(programs,)](x, index, out, each, WORDS=words, num_warps=4)

    run()
    assert bool((out == each).all()), "the gathered sums are wrong"
    return {"megabytes": programs * each * 4 * words / 1e6, "footprint_mb": x.nbytes / 1e6}, run


def _copy(session: Session) -> tuple[dict, Callable[[], Tensor]]:
    x = torch.ones(2**10 if session.dry_run else 2**30, dtype=torch.uint8, device=session.device)
    out = torch.empty_like(x)
    moved = 2 * x.nbytes / 1e6
    return {"megabytes": moved, "footprint_mb": moved}, lambda: out.copy_(x)


def _matmul(session: Session, size: int, dtype: torch.dtype) -> tuple[dict, Callable[[], Tensor]]:
    x = torch.randn(size, size, device=session.device, dtype=dtype)
    out = torch.empty_like(x)
    row = {"gigaflop": 2 * size**3 / 1e9, "footprint_mb": 3 * x.nbytes / 1e6}
    return row, lambda: torch.mm(x, x, out=out)


# -- the table


def _provider(
    session: Session, name: str, inputs: tuple[Tensor, ...], budget: int | None, mode: str
) -> tuple[Callable[..., Tensor], contextlib.AbstractContextManager]:
    """Attention of query, key and value, and the context it is to be timed in."""
    if name in _DENSE:
        backend = SDPBackend.MATH if session.dry_run else _DENSE[name]
        return F.scaled_dot_product_attention, sdpa_kernel(backend)
    if name == "flex_exact_part":
        return _flex(session, inputs, budget), contextlib.nullcontext()
    settings = {"block_per_row": budget, "approx_mode": mode, "impl": "triton"}
    return partial(mra2_attention, **settings), contextlib.nullcontext()


def _flex(session: Session, inputs: tuple[Tensor, ...], budget: int) -> Callable[..., Tensor]:
    """FlexAttention over the lists of 32-token blocks that MRA-2 would select."""
    query, key = (x.detach() for x in inputs[:2])
    blocks = select_blocks(query, key, budget)
    counts = blocks.sum(-1, dtype=torch.int32)  # [B, H, R]
    listed = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    lists = (torch.zeros_like(counts), torch.zeros_like(listed), counts, listed)
    length = query.shape[2]
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=32, seq_lengths=(length, length))
    if session.dry_run:  # no backward on a CPU, and the lists are ignored where not compiled
        raise Skipped("dry run")
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    options = dict.fromkeys(names, 32)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=mask, kernel_options=options)


def _table(session, records, shape, provider, budget, mode) -> Outcome | None:
    """Forward and forward+backward, eager and as a graph: up to four rows."""
    if provider in _DENSE:
        budget, mode = None, ""
    elif provider == "flex_exact_part":
        mode = "sparse"
    about = shape.row(op="attention", provider=provider, block_per_row=budget, mode=mode)
    names = ("fwd", "fwd+bwd", "fwd graph", "fwd+bwd graph")
    missing = [name for name in names if not records.has(about | {"pass": name})]
    if not missing:
        return None
    *inputs, grad = attention_inputs(session, shape)
    function, context = _provider(session, provider, inputs, budget, mode)
    with context:
        passes = _passes(function, inputs, grad)
        error = f"{_relative_error(session, shape, passes['fwd'](), inputs):.3e}"
        shown, errors = [], []
        for name in missing:
            run = passes[name.removesuffix(" graph")]
            row = session.where | about | {"pass": name, "rel_error": error}
            try:
                if not name.endswith(" graph"):
                    row["peak_mb"] = peak_megabytes(session, run)
                elif session.dry_run:
                    session.log(f"{provider} {shape} {name}: skipped: dry run")
                    continue
                else:
                    run = graphed(session, run)
                timing = time_calls(session, run)
            except Exception as problem:
                session.log(f"{provider} {shape} {name}: {problem!r}")
                shown.append(f"{name}: {type(problem).__name__}")
                errors.append(problem)
                if session.device == "cuda":
                    torch.cuda.synchronize()  # raises where the device is broken
                    torch.cuda.empty_cache()
                continue
            records.add(row | timing)
            shown.append(f"{name} {timing['ms_median']:.3f}")
    detail = ", ".join(shown)
    if any(not isinstance(x, torch.OutOfMemoryError) for x in errors):
        return Outcome("fail", detail)
    return Outcome("skipped" if errors else "pass", detail)


def _passes(function: Callable[..., Tensor], inputs, grad: Tensor) -> dict[str, Callable]:
    return {
        "fwd": torch.no_grad()(partial(function, *inputs)),
        "fwd+bwd": lambda: torch.autograd.grad(function(*inputs), inputs, grad),
    }


@torch.no_grad()
def _relative_error(session: Session, shape: Shape, output: Tensor, inputs) -> float:
    """Error of the first sample against dense attention in float32, by Frobenius norms."""
    if session.kept.get("exact_of") != shape:
        # Not in the provider's context, whose backend takes no float32.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            exact = F.scaled_dot_product_attention(*(x[:1].float() for x in inputs))
        session.kept |= {"exact_of": shape, "exact": exact}
    exact = session.kept["exact"]
    return float((output[:1].float() - exact).norm() / exact.norm())


# -- variants


def _variant_steps(session: Session, records: Records, shape: Shape, budget: int) -> Iterator[Step]:
    """Forms, groups and stages; narrow key blocks; coarse products; lengths of work items; topk or
    radix.
    """
    small = session.dry_run

    def variant(label: str, settings: dict | None = None, **change) -> Step:
        run = partial(_variant, session, records, shape, budget, label, settings or {}, change)
        return Step(f"variant: {label}", run)

    for swapped in forms(session):
        for group in (2,) if small else (2, 4):
            for stages in (2,) if small else (2, 3):
                configs = with_configs(swapped=swapped, group=group, num_stages=stages)
                label = f"{'swapped' if swapped else 'plain'} group={group} stages={stages}"
                yield variant(label, configs=configs)
    for size in (16, 8):
        yield variant(f"key blocks of {size}", {"key_block_size": size})
        by_mass = {"key_block_size": size, "selection": "mass"}
        yield variant(f"key blocks of {size} by mass", by_mass)
    for precision in coarse_precisions(session):
        yield variant(f"coarse products by {precision}", **with_coarse_precision(precision))
    for blocks in (1, 2) if small else (8, 16, 32):
        yield variant(f"item_blocks={blocks}", item_blocks=blocks)
        yield variant(f"item_blocks={blocks} priors", _PRIORS, item_blocks=blocks)
    for rows in (3,) if small else (128, 512, 2048):
        one = Shape(32 * rows, 1, shape.heads, shape.dim)
        for way in ("topk", "radix"):
            row = one.row(op="selection", provider=way, block_per_row=budget, mode="")
            measure = partial(time_selection, session, one, budget, way)
            run = partial(add_timing, session, records, row | {"pass": "select"}, measure)
            yield Step(f"selection: {rows} block rows by {way}", run)


def _variant(session, records, shape, budget, label, settings, change) -> Outcome:
    about = {"provider": f"mra2[{label}]", "block_per_row": budget, "mode": "full"}
    *inputs, grad = attention_inputs(session, shape)
    attend = partial(mra2_attention, block_per_row=budget, impl="triton", **settings)
    shown = []
    with patched_table(**change):
        for name, run in _passes(attend, inputs, grad).items():
            columns = {"op": "variant", "pass": name + " graph" * (not session.dry_run)}
            row = session.where | shape.row(**about, **columns)
            if not records.has(row):
                timing = time_calls(session, graphed(session, run))
                records.add(row | timing)
                shown.append(f"{name} {timing['ms_median']:.3f}")
    return Outcome(detail=", ".join(shown))


def time_selection(session: Session, shape: Shape, budget: int, way: str) -> dict[str, float]:
    """Time scores and selection of block pairs by "topk" or "radix", given the summaries."""
    query, key = (x.detach() for x in attention_inputs(session, shape)[:2])
    summaries = ops.mra2_summarize(query, key, key, None)
    always = {"topk_up_to_rows": 2**30, "recompute_from_length": 2**30}
    with patched_table(**(always if way == "topk" else {"topk_up_to_rows": 0})):
        run = graphed(session, lambda: select_blocks(query, key, budget, summaries=summaries))
        return time_calls(session, run)


# -- tables and pictures


def finish(session: Session) -> None:
    """Print the tables; draw attention, as eager calls and as CUDA graphs."""
    summary.print_bench(session.out)
    plot = pictures(session)
    if plot is None:
        return
    rows = plot.drawable(Records(session.out / "bench.csv", COLUMNS, KEYS).rows())
    rows = [row for row in rows if row["op"] == "attention"]
    for graph, name in ((False, "bench.png"), (True, "bench_graph.png")):
        if any(row["pass"].endswith(" graph") == graph for row in rows):
            plot.draw_lengths(rows, session.out / name, graph=graph)
