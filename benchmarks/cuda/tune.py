"""Measure launch settings on this card and write them as a table that `triton_impl` ships.

For every kernel, padded head dim and operand width a whole forward or backward pass is timed, as a
CUDA graph, with one row of the table changed, so that lists, which depend on the query blocks a
tile, are counted; `tune.csv` keeps all of it. `launch_configs.json` in
the output folder has the fastest settings in the rows of this card's architecture (each with the
`source` it was measured on) and the shipped ones elsewhere.
"""

import dataclasses
import itertools
import json
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

#: Kernels, and the query blocks that own a tile of theirs.
_TILES = (*itertools.product(QUERY_KERNELS, (1, 2)), ("key_gradient", 1))
_CONFIG = ("swapped", "group", "num_warps", "num_stages", "query_blocks")
_KEYS = ("architecture", "kernel", "head_dim", "operand_bytes", *_CONFIG, "setting")
TUNE_COLUMNS = (*CONDITIONS, *_KEYS, "ms_median", "ms_p20", "ms_p80")
_DTYPES = {2: "bf16", 4: "fp32"}
#: A table-wide setting gives way to another that is faster by more than this factor.
_WORTH = 0.98


def steps(session: Session) -> list[Step]:
    """Head dim 64 in bf16 and what all share first."""
    records = Records(session.out / "tune.csv", TUNE_COLUMNS, _KEYS)
    sizes = [(16, 4)] if session.dry_run else list(itertools.product((64, 128, 32, 16), (2, 4)))
    sizes.sort(key=lambda size: (size[1], (64, 128, 32, 16).index(size[0])))
    found = []
    for position, (dim, width) in enumerate(sizes):
        for kernel, query_blocks in _TILES:

            def run(
                s: Session, kernel=kernel, dim=dim, width=width, query_blocks=query_blocks
            ) -> Outcome | None:
                return _tune(s, records, kernel, dim, width, query_blocks)

            name = f"{kernel} D{dim} {_DTYPES[width]}" + ", two query blocks" * (query_blocks == 2)
            found.append(Step(name, run, "config", 15))
        if position == 0:
            found += _shared_steps(session, records)
    return found


def _shared_steps(session: Session, records: Records) -> list[Step]:
    item_blocks = (1, 2) if session.dry_run else (8, 16, 32, 64)
    rows = (2, 3) if session.dry_run else (16, 32, 64, 128, 256, 512)
    found = []
    for n in item_blocks:
        run = lambda s, n=n: _item_blocks(s, records, n)  # noqa: E731
        found.append(Step(f"item_blocks {n}", run, "shared", 8))
    for precision in coarse_precisions(session):
        run = lambda s, p=precision: _coarse_precision(s, records, p)  # noqa: E731
        found.append(Step(f"coarse products by {precision}", run, "shared", 8))
    for n in rows:
        run = lambda s, n=n: _topk(s, records, n)  # noqa: E731
        found.append(Step(f"topk or radix at {n} block rows", run, "shared", 5))
    return found


def candidates(session: Session, query_blocks: int) -> list[launching.LaunchConfig]:
    """What is tried for a kernel whose tiles are owned by so many query blocks."""
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
        if session.warm or not records.has(about | dataclasses.asdict(config))
    ]
    if not missing:
        return None
    passes = _passes(session, dim, _DTYPES[width])
    run = passes.forward if kernel == "forward" else passes.backward
    found: dict[launching.LaunchConfig, float] = {}
    for config in missing:
        row = session.where | about | dataclasses.asdict(config)
        try:
            with patched_table(configs=launching.table().configs | {key: config}):
                # The device's errors of too much shared memory come before the launch.
                timing = time_calls(session, graphed(session, run), seconds=0.15)
        except Exception as error:
            session.log(f"{key} {config}: {type(error).__name__}: {error}")
            if not session.warm:
                records.add(row)
            if session.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the device is broken: the step fails
            continue
        found[config] = timing.median
        if not session.warm:
            records.add(row | timing.columns())
    if not found:
        return Outcome("fail", "no candidate could be run")
    best = min(found, key=found.get)
    return Outcome(detail=f"{found[best]:.3f} ms with {best}")


def _item_blocks(session: Session, records: Records, n: int) -> Outcome | None:
    """Both passes with even and with uneven rows, one after the other."""
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
    if not session.warm:
        records.add(row | sums)
    return Outcome(detail=f"{sums['ms_median']:.3f} ms")


def _coarse_precision(session: Session, records: Records, precision: str) -> Outcome | None:
    """All passes where the coarse part weighs: 16384 tokens, one sample."""
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
    if not session.warm:
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
        if not session.warm:
            records.add(row | timing.columns())
        details.append(f"{way} {timing.median:.3f} ms")
    return Outcome(detail=", ".join(details))


# -- the table


def finish(session: Session, write_table: bool) -> None:
    """Write the table; into the package too where asked to."""
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
    """The shipped content with what `rows` of tune.csv found to be fastest."""
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
        found = by_key.get(tuple(str(x) for x in key))
        if found:
            best = min(found, key=lambda x: float(x["ms_median"]))
            numbers = {name: int(best[name]) for name in _CONFIG[1:]}
            row = row | {"swapped": best["swapped"] == "True", **numbers, "source": _source(best)}
        configs.append(row)
    settings = {row["setting"]: float(row["ms_median"]) for row in measured if row["setting"]}
    return content | {
        "source": f"measured by benchmarks/run.py: rows that name a source, there; shared "
        f"settings on {_source(measured[-1])}; others: {_without_nesting(content['source'])}",
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
    prefix = "item_blocks="
    found = {int(x.removeprefix(prefix)): ms for x, ms in settings.items() if x.startswith(prefix)}
    if not found:
        return shipped
    best = min(found, key=found.get)
    return best if found[best] < _WORTH * found.get(shipped, float("inf")) else shipped


def _best_precision(
    settings: dict[str, float], shipped: dict[str, str], architecture: str
) -> dict[str, str]:
    """The faster one for this architecture, the shipped one where that is as good; nothing where
    none was measured.
    """
    prefix = "coarse_precision="
    found = {x.removeprefix(prefix): ms for x, ms in settings.items() if x.startswith(prefix)}
    if not found:
        return {}
    best, before = min(found, key=found.get), shipped[architecture]
    is_worth_it = found[best] < _WORTH * found.get(before, float("inf"))
    return {architecture: best if is_worth_it else before}


def _topk_up_to(settings: dict[str, float], shipped: int) -> int:
    """The most block rows up to which topk was never slower than radix."""
    last = None
    rows = sorted(int(x.partition("=")[2]) for x in settings if x.startswith("topk_at_rows="))
    for n in rows:
        radix = settings.get(f"radix_at_rows={n}")
        if radix is None or settings[f"topk_at_rows={n}"] > radix:
            return last or 0
        last = n
    return shipped if last is None else last


def as_text(content: dict) -> str:
    """JSON with one configuration a line."""
    head = {name: x for name, x in content.items() if name != "configs"}
    lines = [f"  {json.dumps(name)}: {json.dumps(x)}," for name, x in head.items()]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["configs"])
    return "\n".join(["{", *lines, '  "configs": [', rows, "  ]", "}"]) + "\n"
