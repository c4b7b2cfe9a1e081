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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda.bench import Shape, time_selection
from benchmarks.cuda.driver import Outcome, Session, Step
from benchmarks.cuda.measure import (
    QUERY_KERNELS,
    Passes,
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
_DTYPES = {2: "bf16", 4: "fp32"}
#: A table-wide setting gives way to another that is faster by more than this factor.
_WORTH = 0.98


def steps(session: Session) -> list[Step]:
    """Head dim 64 in bf16 and the shared settings first."""
    records = Records(session.out / "tune.csv", TUNE_COLUMNS, _KEYS)
    sizes = [(16, 4)] if session.dry_run else list(itertools.product((64, 128, 32, 16), (2, 4)))
    sizes.sort(key=lambda size: (size[1], (64, 128, 32, 16).index(size[0])))
    tuning_steps = []
    for position, (dim, width) in enumerate(sizes):
        for kernel, query_blocks in _TILES:
            about = {"kernel": kernel, "dim": dim, "width": width, "query_blocks": query_blocks}
            run = partial(_tune, records=records, **about)
            name = f"{kernel} D{dim} {_DTYPES[width]}" + ", two query blocks" * (query_blocks == 2)
            tuning_steps.append(Step(name, run, 15, limit=300))
        if position == 0:
            tuning_steps += _shared_steps(session, records)
    return tuning_steps


def _shared_steps(session: Session, records: Records) -> Iterator[Step]:
    for n in (1, 2) if session.dry_run else (8, 16, 32, 64):
        yield Step(f"item_blocks {n}", partial(_item_blocks, records=records, n=n), 8)
    for precision in coarse_precisions(session):
        run = partial(_coarse_precision, records=records, precision=precision)
        yield Step(f"coarse products by {precision}", run, 8)
    for n in (2, 3) if session.dry_run else (16, 32, 64, 128, 256, 512):
        run = partial(_topk, records=records, rows=n)
        yield Step(f"topk or radix at {n} block rows", run, 5)


def candidates(session: Session, query_blocks: int) -> list[launching.LaunchConfig]:
    """The settings to try for a kernel whose tiles are owned by so many query blocks."""
    groups, warps, stages = ((2,), (4,), (2,)) if session.dry_run else ((1, 2, 4), (4, 8), (2, 3))
    choices = itertools.product(forms(session), groups, warps, stages, (query_blocks,))
    return [launching.LaunchConfig(*choice) for choice in choices]


def _passes(session: Session, dim: int, dtype: str, priors: bool = False) -> Passes:
    """4096 tokens, 12 heads, 8 blocks per row; batch 8, or 4 in float32."""
    length, batch, heads, budget = (96, 1, 1, 1) if session.dry_run else (4096, 8, 12, 8)
    if dtype == "fp32":
        batch = max(1, batch // 2)
    return Passes(session, length, batch, heads, dim, dtype, budget, priors)


def _tune(
    session: Session, records: Records, kernel: str, dim: int, width: int, query_blocks: int
) -> Outcome | None:
    architecture = launching.architecture(session.device)
    key = (architecture, kernel, dim, width)
    about = dict(zip(("architecture", "kernel", "head_dim", "operand_bytes"), key, strict=True))
    missing = [
        config
        for config in candidates(session, query_blocks)
        if not records.has(about | dataclasses.asdict(config))
    ]
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
            if session.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is broken: the step fails
            continue
        medians[config] = timing.median
        records.add(row | timing.columns())
    if not medians:
        return Outcome("fail", "no candidate could be run")
    best = min(medians, key=medians.get)
    return Outcome(detail=f"{medians[best]:.3f} ms with {best}")


def _item_blocks(session: Session, records: Records, n: int) -> Outcome | None:
    """Time both passes, with even and with uneven rows."""
    row = session.where | {"setting": f"item_blocks={n}"}
    row |= {"architecture": launching.architecture(session.device)}
    if records.has(row):
        return None
    total = []
    for priors in (False, True):
        dim, dtype = (16, "fp32") if session.dry_run else (64, "bf16")
        passes = _passes(session, dim, dtype, priors)
        with patched_table(item_blocks=n):
            for run in (passes.forward, passes.backward):
                total.append(time_calls(session, graphed(session, run), seconds=0.2))
    columns = [timing.columns() for timing in total]
    sums = {name: round(sum(x[name] for x in columns), 4) for name in columns[0]}
    records.add(row | sums)
    return Outcome(detail=f"{sums['ms_median']:.3f} ms")


def _coarse_precision(session: Session, records: Records, precision: str) -> Outcome | None:
    """Time all passes where the coarse part counts most: 16384 tokens, one sample."""
    row = session.where | {"setting": f"coarse_precision={precision}"}
    row |= {"architecture": launching.architecture(session.device)}
    if records.has(row):
        return None
    length, heads, dim, budget = (96, 1, 16, 1) if session.dry_run else (16384, 12, 64, 8)
    with patched_table(**with_coarse_precision(precision)):
        passes = Passes(session, length, 1, heads, dim, "bf16", budget)

        def run() -> object:
            return passes.select(), passes.forward(), passes.backward()

        columns = time_calls(session, graphed(session, run)).columns()
    records.add(row | columns)
    return Outcome(detail=f"{columns['ms_median']:.3f} ms")


def _topk(session: Session, records: Records, rows: int) -> Outcome | None:
    details = []
    for way in ("topk", "radix"):
        row = session.where | {"setting": f"{way}_at_rows={rows}"}
        row |= {"architecture": launching.architecture(session.device)}
        if records.has(row):
            continue
        shape = Shape(32 * rows, 1, 1, 16) if session.dry_run else Shape(32 * rows, 1)
        timing = time_selection(session, shape, 1 if session.dry_run else 8, way)
        records.add(row | timing.columns())
        details.append(f"{way} {timing.median:.3f} ms")
    return Outcome(detail=", ".join(details))


# -- the table


def finish(session: Session, write_table: bool) -> None:
    """Write the table, with `write_table` into the package too."""
    records = Records(session.out / "tune.csv", TUNE_COLUMNS, _KEYS)
    shipped = Path(launching.__file__).with_name("launch_configs.json")
    content = tuned(json.loads(shipped.read_text()), records.rows())
    launching.parse_table(content)
    for path in [session.out / shipped.name, *([shipped] if write_table else [])]:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(as_text(content))
        temporary.replace(path)
        session.say(f"wrote {path}")


def tuned(content: dict, rows: list[dict[str, str]]) -> dict:
    """The shipped content with the fastest settings among `rows` of tune.csv."""
    measured = [row for row in rows if row["ms_median"]]
    if not measured:
        return content
    by_key: dict[tuple, list[dict[str, str]]] = {}
    for row in measured:
        if not row["setting"]:
            key = (row["architecture"], row["kernel"], row["head_dim"], row["operand_bytes"])
            by_key.setdefault(key, []).append(row)
    configs = []
    for row in content["configs"]:
        key = (row["architecture"], row["kernel"], row["head_dim"], row["operand_bytes"])
        candidates_measured = by_key.get(tuple(str(x) for x in key))
        if candidates_measured:
            best = min(candidates_measured, key=lambda x: float(x["ms_median"]))
            numbers = {name: int(best[name]) for name in _CONFIG[1:]}
            row = row | {"swapped": best["swapped"] == "True", **numbers, "source": _source(best)}
        configs.append(row)
    settings = {row["setting"]: float(row["ms_median"]) for row in measured if row["setting"]}
    source = (
        "measured by benchmarks/run.py: rows that name a source, there; "
        f"shared settings on {_source(measured[-1])}; "
        f"others: {_without_nesting(content['source'])}"
    )
    return content | {
        "source": source,
        "item_blocks": _best_item_blocks(settings, content["item_blocks"]),
        "topk_up_to_rows": _topk_up_to(settings, content["topk_up_to_rows"]),
        "coarse_precision": content["coarse_precision"]
        | _best_precision(settings, content["coarse_precision"], measured[-1]["architecture"]),
        "configs": configs,
    }


def _source(row: dict[str, str]) -> str:
    return f"{row['device']}, torch {row['torch']}, triton {row['triton']}, {row['date']}"


def _without_nesting(source: str) -> str:
    return source.rpartition("; others: ")[2]


def _best_item_blocks(settings: dict[str, float], shipped: int) -> int:
    """The fastest; the shipped one where that is as good."""
    return int(_best(_values(settings, "item_blocks"), str(shipped)))


def _best_precision(
    settings: dict[str, float], shipped: dict[str, str], architecture: str
) -> dict[str, str]:
    """The faster one for this architecture; nothing where none was measured."""
    times = _values(settings, "coarse_precision")
    return {architecture: _best(times, shipped[architecture])} if times else {}


def _values(settings: dict[str, float], name: str) -> dict[str, float]:
    """Value -> milliseconds of the settings "NAME=VALUE"."""
    named = {tuple(setting.split("=")): ms for setting, ms in settings.items()}
    return {value: ms for (key, value), ms in named.items() if key == name}


def _best(times: dict[str, float], shipped: str) -> str:
    """The fastest value; the shipped one where that is about as good, or nothing was measured."""
    best = min(times, key=times.get, default=shipped)
    return best if times and times[best] < _WORTH * times.get(shipped, float("inf")) else shipped


def _topk_up_to(settings: dict[str, float], shipped: int) -> int:
    """The most block rows up to which topk was never slower than radix."""
    topk, radix = _values(settings, "topk_at_rows"), _values(settings, "radix_at_rows")
    if not topk:
        return shipped
    largest = 0
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
