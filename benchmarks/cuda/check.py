"""Are the kernels right on this card? Triton against the reference in float64, and everything that
only a card can show: graphs, compilation, memory checkers, and that nothing waits for the host.

Outputs and gradients may be as far from float64 as the reference in the same dtype is, plus four
roundings of the largest value; in float32 as far as 2e-5 of it.
"""

import contextlib
import importlib.util
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda.driver import Outcome, Session, Step
from benchmarks.cuda.measure import (
    DTYPES,
    QUERY_KERNELS,
    as_graph,
    coarse_precisions,
    forms,
    patched_table,
    run_program,
    with_coarse_precision,
    with_configs,
)
from mra_attention import BlockSelection, mra2_attention, select_blocks, triton_impl
from mra_attention.selection import choose_blocks
from mra_attention.triton_impl import launching
from mra_attention.triton_impl.call import KernelCall

SKIPPED = Outcome("skipped", "skipped: dry run")
#: Length, mask and mode of a case, in turn for every dtype and head dim.
_TURNS = (
    (513, "holes", "full"),
    (4096, "none", "full"),
    (100, "right", "sparse"),
    (1, "none", "full"),
    (33, "empty sample", "full"),
    (513, "none", "sparse"),
    (4096, "holes", "sparse"),
    (100, "none", "full"),
)
#: Cases that come before the other kinds of checks: every dtype with every head dim.
_FIRST = 17
_PRIORS = {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 5}


@dataclass(frozen=True)
class Case:
    """One call: shapes, settings, and how its inputs lie in memory."""

    dtype: str = "bf16"
    dim: int = 64
    length: int = 513
    mask: str = "holes"
    mode: str = "full"
    batch: int = 2
    heads: int = 2
    block_per_row: int = 3
    priors: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        extra = " priors" * self.priors + f" {self.layout}" * (self.layout != "contiguous")
        return f"{self.dtype} D{self.dim} N{self.length} {self.mask} {self.mode}{extra}"

    def settings(self) -> dict:
        priors = _PRIORS if self.priors else {}
        return {"block_per_row": self.block_per_row, "approx_mode": self.mode, **priors}


def steps(session: Session) -> list[Step]:
    """All checks, most wanted first."""
    small = session.dry_run
    base = Case(dim=16, length=70, batch=1, heads=1, block_per_row=1) if small else Case()
    base32 = replace(base, dtype="fp32")
    agreements = [_agreement(f"agrees: {case}", case) for case in _cases(base, small)]
    found = agreements[:_FIRST]

    changes = [("items of 1 block", {"item_blocks": 1}), ("items of 2 blocks", {"item_blocks": 2})]
    for swapped in forms(session):
        form = "swapped form" if swapped else "plain form"
        changes.append((form, {"configs": with_configs(swapped=swapped)}))
        configs = with_configs(QUERY_KERNELS, swapped=swapped, query_blocks=2)
        changes.append((f"two query blocks, {form}", {"configs": configs}))
    for precision in coarse_precisions(session):
        changes.append((f"coarse products by {precision}", with_coarse_precision(precision)))
    if not small:
        changes += [(f"groups of {n}", {"configs": with_configs(group=n)}) for n in (1, 4)]
    cases = (base,) if small else (base, base32, replace(base, length=4096, batch=1, priors=True))
    for name, change in changes:
        found += [_agreement(f"agrees with {name}: {case}", case, **change) for case in cases]

    found.append(Step("scratch of NaN changes nothing", lambda s: _nan_scratch(s, base32), "bits"))
    found.append(Step("two runs give the same bits", lambda s: _two_runs(s, base), "bits"))
    found.append(Step("NaN in padding reaches nothing", lambda s: _nan_padding(s, base32), "bits"))
    for blocks in (2,) if small else (128, 17, 512):
        name = f"selection by topk, radix and on the host, {blocks} block rows"
        found.append(Step(name, lambda s, n=blocks: _selections(s, n), "selection"))
    for dim, dtype in itertools.product((32,) if small else (128, 32, 80), ("fp32", "bf16")):
        name = f"the best pair of every row scores 0, {dtype} D{dim}"
        found.append(Step(name, lambda s, t=dtype, d=dim: _best_scores(s, t, d), "selection"))
    for dtype in ("fp32", "bf16"):
        name = f"selection agrees with float64 scores, {dtype}"
        found.append(Step(name, lambda s, d=dtype: _selection_quality(s, d), "selection"))
    on_card: list[tuple[str, Callable]] = [
        ("CUDA graph of forward and backward", _graph),
        ("nothing waits for the host", _no_sync),
        ("compute-sanitizer finds nothing", _sanitizer),
        ("torch.compile gives what eager gives", _compiled),
    ]
    found += [Step(name, _skipped if small else run, name, 20) for name, run in on_card]
    found += agreements[_FIRST:]
    name = "pytest -m gpu tests/kernels"
    found.append(Step(name, _skipped if small else _pytest, name, 60))
    return found


def _cases(base: Case, small: bool) -> Iterator[Case]:
    if small:
        yield base
        yield replace(base, dtype="fp32", length=33, mask="none", mode="sparse")
        yield replace(base, dtype="fp16", priors=True, layout="transposed", mask="right")
        for dtype, length in itertools.product(DTYPES, (1, 2)):  # whose gradients cancel to 0
            yield replace(base, dtype=dtype, dim=64, length=length, mask="none")
        return
    for dtype in ("bf16", "fp32", "fp16"):
        yield replace(base, dtype=dtype)
    yield replace(base, layout="transposed")
    yield replace(base, priors=True)
    seen = {replace(base, dtype=dtype) for dtype in DTYPES}
    for turn in range(len(_TURNS)):
        for i, dim in enumerate((64, 128, 32, 80)):
            for j, dtype in enumerate(("bf16", "fp32", "fp16")):
                if turn >= 5 and (dim != 64 or dtype == "fp16"):
                    continue
                length, mask, mode = _TURNS[(turn + i + j) % len(_TURNS)]
                batch = 1 if length == 4096 else 2
                case = replace(
                    base, dtype=dtype, dim=dim, length=length, mask=mask, mode=mode, batch=batch
                )
                if case not in seen:
                    seen.add(case)
                    yield case


# -- inputs


def make_inputs(session: Session, case: Case) -> list[Tensor]:
    """Query, key, value and a gradient of the output, with a slow component besides the noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(slow: float) -> Tensor:
        noise = torch.randn(case.batch, case.heads, case.length, case.dim, generator=generator)
        shape = (case.batch, case.heads, case.length // 16 + 1, case.dim)
        level = torch.randn(shape, generator=generator).repeat_interleave(16, dim=2)
        x = (noise + slow * level[:, :, : case.length]).to(session.device, DTYPES[case.dtype])
        if case.layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x

    return [draw(0.7), draw(0.7), draw(0.5), draw(0.0)]


def make_mask(session: Session, case: Case) -> Tensor | None:
    """`[B, N]` bool or None: padding at the end, holes of whole blocks, or a sample of padding."""
    if case.mask == "none":
        return None
    position = torch.arange(case.length)
    mask = torch.ones(case.batch, case.length, dtype=torch.bool)
    for i in range(case.batch):
        if case.mask == "holes":
            mask[i] = (position * 7 + i) % 5 < 3
            mask[i, 32:65] = False
            mask[i, 0] = True
        else:
            mask[i] = position < case.length - case.length * (i + 1) // (case.batch + 1)
    if case.mask == "empty sample":
        mask[-1] = False
    return mask.to(session.device)


def results(inputs: list[Tensor], mask: Tensor | None, **settings) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    *tensors, grad = inputs
    tensors = [x.detach().requires_grad_() for x in tensors]
    output = mra2_attention(*tensors, mask, **settings)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def select_by_triton(inputs: list[Tensor], mask: Tensor | None, case: Case) -> Tensor:
    return triton_impl.select(
        *inputs[:2],
        mask,
        block_per_row=case.block_per_row,
        block_budget=None,
        initial_prior_first_n_blocks=1 if case.priors else 0,
        initial_prior_diagonal_n_blocks=5 if case.priors else 0,
        rule="row_normalized",
        scale=case.dim**-0.5,
    )


# -- checks


def _agreement(name: str, case: Case, **change) -> Step:
    def run(session: Session) -> Outcome:
        with patched_table(**change):
            return _agrees(session, case)

    return Step(name, run, "agreement")


def _agrees(session: Session, case: Case) -> Outcome:
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    chosen = BlockSelection(select_by_triton(inputs, mask, case), 32)
    given = results(inputs, mask, **case.settings(), impl="triton")
    plain = {"approx_mode": case.mode, "selection": chosen, "impl": "reference"}
    eager = results(inputs, mask, **plain)
    exact = results([x.double() for x in inputs], mask, **plain)
    worst = Outcome(max_error=0.0, allowed=1.0)
    for name, *tensors in zip(
        ("output", "query", "key", "value"), given, eager, exact, strict=True
    ):
        error, allowed = _distance(*tensors)
        if not error <= allowed:
            worst.status, worst.detail = "fail", f"{worst.detail} {name} is off by {error:.1e}"
        if not error / allowed <= worst.max_error / worst.allowed:
            worst.max_error, worst.allowed = error, allowed
    return worst


def _distance(given: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest error of `given`, and the allowed one; a NaN is infinitely far."""
    largest = float(exact.abs().max())
    error = float((given.double() - exact).abs().max())
    # Sums are float32 in every dtype, and of terms far larger than a gradient that cancels to 0.
    allowed = 2e-5 * max(1.0, largest)
    if given.dtype != torch.float32:
        allowed += float((eager.double() - exact).abs().max())
        allowed += 4 * torch.finfo(given.dtype).eps * largest
    return (error if error == error else float("inf")), allowed


def _same_bits(given: list[Tensor], expected: list[Tensor]) -> Outcome:
    for name, x, y in zip(("output", "query", "key", "value"), given, expected, strict=True):
        if not torch.equal(x, y):
            error = float((x.double() - y.double()).abs().max())
            return Outcome("fail", f"{name} differs", error, 0.0)
    return Outcome(max_error=0.0, allowed=0.0)


@contextlib.contextmanager
def scratch_of_nan() -> Iterator[None]:
    """Everything that the kernels get to fill holds NaN before."""
    empty = KernelCall.empty

    def filled(self, shape, dtype=torch.float32):
        x = empty(self, shape, dtype)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    KernelCall.empty = filled
    try:
        yield
    finally:
        KernelCall.empty = empty


def _nan_scratch(session: Session, case: Case) -> Outcome:
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    with patched_table(item_blocks=2):
        expected = results(inputs, mask, **settings)
        with scratch_of_nan():
            return _same_bits(results(inputs, mask, **settings), expected)


def _two_runs(session: Session, case: Case) -> Outcome:
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    first = results(inputs, mask, **settings)
    for _ in range(1 if session.dry_run else 20):
        outcome = _same_bits(results(inputs, mask, **settings), first)
        if outcome.status != "pass":
            break
    return outcome


def _nan_padding(session: Session, case: Case) -> Outcome:
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    expected = results(inputs, mask, **settings)
    padding = ~mask[:, None, :, None]
    spoiled = [x.masked_fill(padding, torch.nan) for x in inputs]
    return _same_bits(results(spoiled, mask, **settings), expected)


def _selections(session: Session, blocks: int) -> Outcome:
    """One set of scores, three ways to choose, and scores that are computed again."""
    heads, dim = (1, 16) if session.dry_run else (12, 64)
    case = Case("fp32", dim, 32 * blocks - 7, "holes", batch=1 if blocks > 200 else 2, heads=heads)
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    stored, recomputed = (_ranked(inputs, mask, case, length) for length in (2**30, 0))
    with launching.on_device_of(inputs[0]):
        by_topk, by_radix = stored.choose_by_topk(), stored.choose_by_radix()
        again = recomputed.choose_by_radix()
    call = stored.call
    by_host = choose_blocks(
        stored.scores.view(call.batch, call.heads, blocks, blocks).cpu(),
        (stored.flags > 0).cpu(),
        stored.budgets.cpu(),
        largest_budget=None,
        **_PRIORS,
    )
    found = {"topk": by_topk, "radix": by_radix, "radix on recomputed scores": again}
    wrong = [name for name, x in found.items() if not torch.equal(x.cpu(), by_host)]
    return Outcome("fail" if wrong else "pass", f"differs: {', '.join(wrong)}" if wrong else "")


def _ranked(
    inputs: list[Tensor], mask: Tensor | None, case: Case, recompute_from_length: int
) -> triton_impl.Ranking:
    with (
        launching.on_device_of(inputs[0]),
        patched_table(recompute_from_length=recompute_from_length),
    ):
        call = KernelCall(*inputs[:3], mask)
        budget = {"block_per_row": case.block_per_row, "block_budget": None}
        ranking = triton_impl.Ranking(call, **budget, **_PRIORS)
        ranking.score(normalized=True, scale=case.dim**-0.5)
    return ranking


def _best_scores(session: Session, dtype: str, dim: int) -> Outcome:
    """Exactly 0 in every row, so that the best pairs of rows tie: no rounding may be between a
    logit and itself.
    """
    case = Case(dtype, dim, 70 if session.dry_run else 4096, "holes")
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    ranking = _ranked(inputs, mask, case, 2**30)
    rows = ranking.flags.shape[-1]
    live = ranking.flags[:, None] > 0
    scores = ranking.scores.view(case.batch, case.heads, rows, rows)
    best = scores.masked_fill(~live[:, :, None], -torch.inf).amax(-1)
    error = float(best.masked_fill(~live, 0).abs().max())
    return Outcome("pass" if error == 0 else "fail", "", error, 0.0)


def _selection_quality(session: Session, dtype: str) -> Outcome:
    """The scores of the kernels choose what float64 scores choose, but for ties of rounding."""
    case = Case(dtype, 64, 4096, "holes", heads=12, block_per_row=8)
    if session.dry_run:
        case = Case(dtype, 16, 100, "holes", batch=1, heads=1, block_per_row=2)
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    chosen = select_by_triton(inputs, mask, case)
    budget = {"block_per_row": case.block_per_row}
    expected = select_blocks(*(x.cpu() for x in inputs[:2]), _on_host(mask), **budget).blocks
    share = float((chosen.cpu() ^ expected).sum() / expected.sum())
    # of 0.1 % of the pairs, each counted in both selections
    return Outcome("pass" if share <= 2e-3 else "fail", "share that differs", share, 2e-3)


def _on_host(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.cpu()


# -- checks that need a card


def _skipped(session: Session) -> Outcome:
    return SKIPPED


def _graph(session: Session) -> Outcome:
    """Replayed on other inputs, a graph of both passes gives what eager calls give."""
    case = Case(length=1000)
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    buffers = [x.clone() for x in inputs]
    replay, captured = as_graph(lambda: results(buffers, mask, **settings))
    for buffer, x in zip(buffers, inputs, strict=True):
        buffer.copy_(x.flip(0) * 0.5)
    replay()
    torch.cuda.synchronize()
    return _same_bits(captured, results([x.clone() for x in buffers], mask, **settings))


def _no_sync(session: Session) -> Outcome:
    case = Case(length=1000)
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    results(inputs, mask, **settings)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(inputs, mask, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Outcome()


_SANITIZED = """
import torch
from mra_attention import mra2_attention
q, k, v = (torch.randn(2, 2, 100, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
mask = torch.arange(100, device="cuda").expand(2, 100) < torch.tensor([[100], [70]], device="cuda")
mra2_attention(q, k, v, mask, block_per_row=2, impl="triton").sum().backward()
torch.cuda.synchronize()
"""


def _sanitizer(session: Session) -> Outcome:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return Outcome("skipped", "skipped: no compute-sanitizer")
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        _SANITIZED,
    ]
    return run_program(session, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _compiled(session: Session) -> Outcome:
    case = Case(length=1000)
    inputs, mask = make_inputs(session, case), make_mask(session, case)
    settings = case.settings() | {"impl": "triton"}
    expected = results(inputs, mask, **settings)
    *tensors, grad = [x.detach().requires_grad_() for x in inputs]
    function = torch.compile(
        lambda q, k, v: mra2_attention(q, k, v, mask, **settings), fullgraph=True
    )
    output = function(*tensors)
    return _same_bits([output.detach(), *torch.autograd.grad(output, tensors, grad)], expected)


def _pytest(session: Session) -> Outcome:
    missing = [x for x in ("pytest", "hypothesis") if importlib.util.find_spec(x) is None]
    if missing:
        return Outcome("skipped", f"skipped: no {' and no '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    return run_program(session, command, {}, nothing=5)
