"""Measure launch settings on this GPU and write them as a table that `triton_impl` ships.

For every kernel, padded head dim and operand width a whole forward or backward pass is timed as a
CUDA graph with one row of the table changed; a whole pass, because lists depend on the query blocks
that own a tile. `tune.csv` keeps all timings. `launch_configs.json` in the output folder has the
fastest settings in the rows of this GPU's architecture (each with the `source` it was measured on)
and the shipped settings elsewhere.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda.bench import time_selection
from benchmarks.cuda.driver import Outcome, Session, Step
from benchmarks.cuda.measure import (
    QUERY_KERNELS,
    Passes,
    Shape,
    add_timing,
    architecture,
    coarse_precisions,
    forms,
    graphed,
    patched_table,
    time_calls,
    with_coarse_precision,
)
from benchmarks.records import CONDITIONS, Records
from mra_attention.triton_impl import launching

#: Kernels, and how many query blocks own one of their tiles.
_TILES = (*itertools.product(QUERY_KERNELS, (1, 2)), ("key_gradient", 1))
_CONFIG = ("swapped", "group", "num_warps", "num_stages", "query_blocks")
_KEYS = ("architecture", "kernel", "head_dim", "operand_bytes", *_CONFIG, "setting")
TUNE_COLUMNS = (*CONDITIONS, *_KEYS, "ms_median", "ms_p20", "ms_p80")
_DIMS = (64, 128, 32, 16)
_DTYPES = {2: "bf16", 4: "fp32"}
#: A table-wide setting gives way to another that is faster by more than this factor.
_WORTH = 0.98


def steps(session: Session) -> list[Step]:
    """Head dim 64 in bf16 and the shared settings first."""
    records = Records(session.out / "tune.csv", TUNE_COLUMNS, _KEYS)
    tuning_steps = []
    for width, dim in [(4, 16)] if session.dry_run else itertools.product((2, 4), _DIMS):
        for kernel, query_blocks in _TILES:
            name = f"{kernel} D{dim} {_DTYPES[width]}" + ", two query blocks" * (query_blocks == 2)
            run = partial(_tune, session, records, kernel, dim, width, query_blocks)
            tuning_steps.append(Step(name, run))
        if len(tuning_steps) == len(_TILES):
            tuning_steps += _shared_steps(session, records)
    return tuning_steps


def _shared_steps(session: Session, records: Records) -> Iterator[Step]:
    """Time a value of a table-wide setting each."""

    def step(name: str, setting: str, measure: Callable[[], dict[str, float]]) -> Step:
        row = {"architecture": architecture(session), "setting": setting}
        return Step(name, partial(add_timing, session, records, row, measure))

    for n in (1, 2) if session.dry_run else (8, 16, 32, 64):
        yield step(f"item_blocks {n}", f"item_blocks={n}", partial(_item_blocks, session, n))
    for precision in coarse_precisions(session):
        measure = partial(_coarse_precision, session, precision)
        yield step(f"coarse products by {precision}", f"coarse_precision={precision}", measure)
    for n in (2, 3) if session.dry_run else (16, 32, 64, 128, 256, 512):
        shape, budget = (Shape(32 * n, 1, 1, 16), 1) if session.dry_run else (Shape(32 * n, 1), 8)
        for way in ("topk", "radix"):
            measure = partial(time_selection, session, shape, budget, way)
            yield step(f"{way} at {n} block rows", f"{way}_at_rows={n}", measure)


def candidates(session: Session, query_blocks: int) -> list[launching.LaunchConfig]:
    """The settings to try for a kernel whose tiles are owned by so many query blocks."""
    groups, warps, stages = ((2,), (4,), (2,)) if session.dry_run else ((1, 2, 4), (4, 8), (2, 3))
    choices = itertools.product(forms(session), groups, warps, stages, (query_blocks,))
    return [launching.LaunchConfig(*choice) for choice in choices]


def _passes(session: Session, dim: int, dtype: str, priors: bool = False) -> Passes:
    """4096 tokens, 12 heads, 8 blocks per row; batch 8, or 4 in float32."""
    if session.dry_run:
        return Passes(session, Shape(96, 1, 1, dim), dtype, 1, priors)
    return Passes(session, Shape(4096, 4 if dtype == "fp32" else 8, 12, dim), dtype, 8, priors)


def _tune(
    session: Session, records: Records, kernel: str, dim: int, width: int, query_blocks: int
) -> Outcome | None:
    key = (architecture(session), kernel, dim, width)
    about = dict(zip(_KEYS[:4], key, strict=True))
    choices = candidates(session, query_blocks)
    missing = [x for x in choices if not records.has(about | dataclasses.asdict(x))]
    if not missing:
        return None
    passes = _passes(session, dim, _DTYPES[width])
    run = passes.forward if kernel == "forward" else passes.backward
    medians: dict[launching.LaunchConfig, float] = {}
    for config in missing:
        row = session.where | about | dataclasses.asdict(config)
        try:
            with patched_table(configs=launching.table().configs | {key: config}):
                # Too much shared memory is an error before the launch: the device stays usable.
                timing = time_calls(session, graphed(session, run), seconds=0.15)
        except Exception as error:
            session.log(f"{key} {config}: {type(error).__name__}: {error}")
            records.add(row)
            if session.device == "cuda":
                torch.cuda.synchronize()  # raises where the device is broken: the step fails
            continue
        medians[config] = timing["ms_median"]
        records.add(row | timing)
    if not medians:
        return Outcome("fail", "no candidate could be run")
    best = min(medians, key=medians.get)
    return Outcome(detail=f"{medians[best]:.3f} ms with {best}")


def _item_blocks(session: Session, n: int) -> dict[str, float]:
    """Time both passes, with even and with uneven rows."""
    timings = []
    for priors in (False, True):
        passes = _passes(session, *((16, "fp32") if session.dry_run else (64, "bf16")), priors)
        with patched_table(item_blocks=n):
            for run in (passes.forward, passes.backward):
                timings.append(time_calls(session, graphed(session, run), seconds=0.2))
    return {name: round(sum(x[name] for x in timings), 4) for name in timings[0]}


def _coarse_precision(session: Session, precision: str) -> dict[str, float]:
    """Time all passes where the coarse part counts most: 16384 tokens, one sample."""
    shape, budget = (Shape(96, 1, 1, 16), 1) if session.dry_run else (Shape(16384, 1), 8)
    with patched_table(**with_coarse_precision(precision)):
        passes = Passes(session, shape, "bf16", budget)

        def run() -> object:
            return passes.select(), passes.forward(), passes.backward()

        return time_calls(session, graphed(session, run))


# -- the table


def finish(session: Session) -> None:
    """Write the table, with `write_table` into the package too."""
    records = Records(session.out / "tune.csv", TUNE_COLUMNS, _KEYS)
    shipped = Path(launching.__file__).with_name("launch_configs.json")
    content = tuned(json.loads(shipped.read_text()), records.rows())
    launching.parse_table(content)
    for path in [session.out / shipped.name, *([shipped] if session.write_table else [])]:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(as_text(content))
        temporary.replace(path)
        session.say(f"wrote {path}")


def tuned(content: dict, rows: list[dict[str, str]]) -> dict:
    """The shipped content with the fastest settings among `rows` of tune.csv."""
    measured = [row for row in rows if row["ms_median"]]
    if not measured:
        return content
    fastest: dict[tuple, dict[str, str]] = {}
    for row in sorted(measured, key=lambda row: -float(row["ms_median"])):
        fastest[tuple(row[name] for name in _KEYS[:4])] = row  # the last one is the fastest
    configs = []
    for row in content["configs"]:
        best = fastest.get(tuple(str(row[name]) for name in _KEYS[:4]))
        if best is not None:
            numbers = {name: int(best[name]) for name in _CONFIG[1:]}
            row = row | {"swapped": best["swapped"] == "True", **numbers, "source": _source(best)}
        configs.append(row)
    settings = {row["setting"]: float(row["ms_median"]) for row in measured if row["setting"]}
    source = (
        "measured by benchmarks/run.py: rows that name a source, there; "
        f"shared settings on {_source(measured[-1])}; "
        f"others: {content['source'].rpartition('; others: ')[2]}"
    )
    here, precisions = measured[-1]["architecture"], content["coarse_precision"]
    precision = best_value(settings, "coarse_precision", precisions[here])
    return content | {
        "source": source,
        "item_blocks": int(best_value(settings, "item_blocks", str(content["item_blocks"]))),
        "topk_up_to_rows": topk_up_to(settings, content["topk_up_to_rows"]),
        "coarse_precision": precisions | {here: precision},
        "configs": configs,
    }


def _source(row: dict[str, str]) -> str:
    return f"{row['device']}, torch {row['torch']}, triton {row['triton']}, {row['date']}"


def _values(settings: dict[str, float], name: str) -> dict[str, float]:
    """Value -> milliseconds of the settings "NAME=VALUE"."""
    named = {tuple(setting.split("=")): ms for setting, ms in settings.items()}
    return {value: ms for (key, value), ms in named.items() if key == name}


def best_value(settings: dict[str, float], name: str, shipped: str) -> str:
    """The fastest value; the shipped one where that is about as good, or nothing was measured."""
    times = _values(settings, name)
    best = min(times, key=times.get, default=shipped)
    return best if times and times[best] < _WORTH * times.get(shipped, float("inf")) else shipped


def topk_up_to(settings: dict[str, float], shipped: int) -> int:
    """The most block rows up to which topk was never slower than radix."""
    topk, radix = _values(settings, "topk_at_rows"), _values(settings, "radix_at_rows")
    largest = 0 if topk else shipped
    for rows in sorted(topk, key=int):
        if topk[rows] > radix.get(rows, 0.0):
            break
        largest = int(rows)
    return largest


def as_text(content: dict) -> str:
    """JSON with one configuration per line."""
    head = {name: x for name, x in content.items() if name != "configs"}
    lines = [f"  {json.dumps(name)}: {json.dumps(x)}," for name, x in head.items()]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["configs"])
    return "\n".join(["{", *lines, '  "configs": [', rows, "  ]", "}"]) + "\n"
