"""Figures 4, 5 and 7 and Table 7 of the paper: error against work, entropy and length."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mra_attention import mra2_attention
from mra_attention.benchmarking import added_peak_bytes
from mra_hf.analysis.figures.drawing import STYLES, Drawn, shape_of, sheet
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.analysis.paper_errors import TABLE_7
from mra_hf.baselines.measures import dense_attention, relative_errors, row_entropies
from mra_hf.baselines.methods import METHODS, Method
from mra_hf.baselines.optimal import optimal_sparse, truncated_svd

#: Factors of the logits by which heads are made more and less diffuse.
TEMPERATURES = tuple(2.0**power for power in range(-4, 5))

#: Methods in the figures of error against entropy; the others fail by any measure.
_BY_ENTROPY = ("mra2", "mra2_s", "longformer", "bigbird", "nystromformer", "h_transformer")
#: Tokens up to which the best sparse and low-rank matrices are found, N^3 operations each.
_LONGEST_OPTIMUM = 1024


def error_and_time(heads: HeadInputs) -> Drawn:
    """Figure 4: what each method needs for its error."""
    rows = _measured(heads)
    dense = next(row for row in rows if row["method"] == "dense")
    figure = sheet(8.5, 5.6)
    axes = figure.subplots()
    largest = max(row["megabytes"] or 0 for row in rows) or 1
    for name, method in METHODS.items():
        own = [row for row in rows if row["method"] == name and row["milliseconds"]]
        if name == "dense" or not own:
            continue
        colour, mark = STYLES[name]
        points = [(row["milliseconds"], row["error"]) for row in own]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1)
        areas = [20 + 180 * (row["megabytes"] or 0) / largest for row in own]
        axes.scatter(
            *zip(*points, strict=True), s=areas, color=colour, marker=mark, label=method.label
        )
    axes.axvline(dense["milliseconds"], color="#444444", linestyle="--", linewidth=1, label="dense")
    axes.set(
        xscale="log",
        ylim=(0, 1.5),
        xlabel="ms per instance, forward and backward",
        ylabel="relative error",
    )
    axes.legend(frameon=False, fontsize=8)
    limit = dense["milliseconds"]
    faster = [row for row in rows if row["milliseconds"] and row["milliseconds"] < limit]
    best = min(faster, key=lambda row: row["error"], default=None)
    found = "no other method is faster"
    if best is not None:
        method = METHODS[best["method"]]
        found = (
            f"of what is faster the lowest error is that of {method.label} ({best['size']} "
            f"{method.size_name}): {best['error']:.2f} in {best['milliseconds']:.0f} ms"
        )
    caption = (
        f"{shape_of(heads)}, {_device()}; areas: memory above the inputs. In the paper (RTX 3090) "
        "MRA-2 and MRA-2-s have the lowest error for their time. Here dense attention takes "
        f"{limit:.0f} ms, and {found}."
    )
    return Drawn(figure, rows, caption)


def table_7(heads: HeadInputs) -> Drawn:
    """Table 7: error, time and memory of every method at every size, beside the paper's errors."""
    rows = _measured(heads)
    for row in rows:
        row["paper_error"] = TABLE_7.get((row["method"], heads.length, row["size"]))
    figure = sheet(9, 0.26 * len(rows) + 1.2)
    axes = figure.subplots()
    axes.axis("off")
    columns = ["method", "size", "error", "paper", "ms", "MB"]
    cells = [
        [
            METHODS[row["method"]].label,
            f"{row['size']} {METHODS[row['method']].size_name}".strip(),
            f"{row['error']:.3f}",
            "" if row["paper_error"] is None else f"{row['paper_error']:.2f}",
            "" if row["milliseconds"] is None else f"{row['milliseconds']:.1f}",
            "" if row["megabytes"] is None else f"{row['megabytes']:.0f}",
        ]
        for row in rows
    ]
    axes.table(cells, colLabels=columns, loc="center", cellLoc="left").auto_set_column_width(
        range(len(columns))
    )
    both = [
        row for row in rows if row["paper_error"] is not None and row["method"].startswith("mra2")
    ]
    caption = (
        f"{shape_of(heads)}, {_device()}; time and memory of forward and backward of an instance. "
        + (
            "The paper has no errors at this length."
            if not both
            else "MRA-2 and MRA-2-s are on average "
            f"{sum(r['error'] / r['paper_error'] for r in both) / len(both):.2f} times the paper's "
            "errors, which are of a RoBERTa-base."
        )
        + " Linformer's projections are random here and there; Performer is corrected here."
    )
    return Drawn(figure, rows, caption)


def error_and_entropy(heads: HeadInputs) -> Drawn:
    """Figure 5: at equal work, error against the entropy of the head."""
    shares = (1 / 4, 1 / 8)
    rows = []
    figure = sheet(12, 5)
    panels = figure.subplots(1, len(shares), sharey=True)
    for axes, share in zip(panels, shares, strict=True):
        sizes = {
            name: max(
                (
                    size
                    for size in METHODS[name].sizes_at(heads.length)
                    if METHODS[name].computed(heads.length, size) <= share + 1e-3
                ),
                default=None,
            )
            for name in _BY_ENTROPY
        }
        own = list(_over_temperatures(heads, {name: size for name, size in sizes.items() if size}))
        rows += [{"share_computed": share, **row} for row in own]
        for name in _BY_ENTROPY:
            _smooth(axes, [row for row in own if row["method"] == name], name)
        axes.set(
            xlabel="mean entropy of a row, nats",
            ylim=(0, 1.5),
            title=f"at most {share:.0%} of the pairs computed",
        )
    panels[0].set_ylabel("relative error")
    panels[0].legend(frameon=False, fontsize=8)
    caption = (
        f"{shape_of(heads)}, logits times 1/16 to 16. The paper compares the largest sizes of "
        "equal time on its card; here those of equal work. The paper finds MRA-2 low at every "
        "entropy, Nystromformer failing at low entropy and local patterns at high. "
        + _extremes(rows, 1 / 4)
    )
    return Drawn(figure, rows, caption)


def work_and_length(heads: HeadInputs) -> Drawn:
    """Figure 7: the work that an error takes, against length; and error against entropy with a
    quarter of the entries, ranks or blocks.
    """
    lengths = [n for n in (128, 256, 512, 1024) if n <= heads.length]
    kinds = {"mra2": "MRA-2", "sparse": "best sparse", "low_rank": "best low rank"}
    rows: list[dict[str, Any]] = []
    for length in lengths:
        some = heads.first_tokens(length)
        exact = _exact(some)
        for name in kinds:
            for limit in (0.05, 0.10):
                share = _least_share(some, exact, name, limit)
                rows.append(
                    {
                        "part": "work",
                        "length": length,
                        "method": name,
                        "limit": limit,
                        "share": share,
                    }
                )
    figure = sheet(12, 5)
    left, right = figure.subplots(1, 2)
    for name, label in kinds.items():
        for limit, line in ((0.05, "-"), (0.10, "--")):
            own = [row for row in rows if row["method"] == name and row["limit"] == limit]
            points = [(row["length"], row["share"] * row["length"] ** 2) for row in own]
            left.plot(
                *zip(*points, strict=True),
                line,
                color=STYLES[name][0],
                marker=STYLES[name][1],
                label=f"{label}, error < {limit:g}",
            )
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="least work, pairs of N x N")
    left.set_xticks(lengths, lengths)
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    part = heads.first_tokens(min(heads.length, 512))
    own = list(_over_temperatures(part, dict.fromkeys(kinds)))
    rows += [{"part": "entropy", **row} for row in own]
    for name in kinds:
        _smooth(right, [row for row in own if row["method"] == name], name)
    right.set(xlabel="mean entropy of a row, nats", ylabel="relative error", ylim=(0, 1))
    right.set_title("a quarter of the entries, ranks or blocks", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    last = {
        name: next(
            row["share"]
            for row in rows
            if row.get("limit") == 0.10 and row["method"] == name and row["length"] == lengths[-1]
        )
        for name in kinds
    }
    caption = (
        f"{shape_of(heads)}; left over the first {', '.join(map(str, lengths))} tokens, right "
        f"over the first {part.length}. In the paper the work of low rank grows faster than "
        "linearly and that of MRA-2 nearly linearly; low rank fails at low entropy, the best "
        "sparse matrix at high. Here an error below 0.1 takes at "
        f"{lengths[-1]} tokens {last['mra2']:.0%} (MRA-2), {last['sparse']:.0%} (best sparse) and "
        f"{last['low_rank']:.0%} (best low rank) "
        "of the work. " + _extremes([row | {"share_computed": 1 / 4} for row in own], 1 / 4)
    )
    return Drawn(figure, rows, caption)


def _measured(heads: HeadInputs) -> list[dict[str, Any]]:
    """Error, time and memory of every method at every size; at great lengths without the optima."""
    exact = _exact(heads)
    rows = []
    for name, method in METHODS.items():
        if not method.is_practical and heads.length > _LONGEST_OPTIMUM:
            continue
        for size in method.sizes_at(heads.length):
            milliseconds, megabytes = _cost(method, heads, size)
            rows.append(
                {
                    "method": name,
                    "size": size if method.size_name else "",
                    "length": heads.length,
                    "error": float(relative_errors(_attend(method, heads, size), exact).mean()),
                    "milliseconds": milliseconds,
                    "megabytes": megabytes,
                }
            )
    return rows


@torch.no_grad()
def _attend(method: Method, heads: HeadInputs, size: int) -> Tensor:
    parts = (heads.query, heads.key, heads.value)
    return method.attend(*parts, scale=heads.scale, size=size, seed=0)


@torch.no_grad()
def _exact(heads: HeadInputs) -> Tensor:
    return dense_attention(heads.query, heads.key, heads.value, heads.scale)


def _cost(method: Method, heads: HeadInputs, size: int) -> tuple[float | None, float | None]:
    """Median milliseconds of three runs of one instance, and MB above the inputs; None for methods
    that are no way to compute attention.
    """
    if not method.is_practical:
        return None, None
    parts = [x[:1].clone().requires_grad_() for x in (heads.query, heads.key, heads.value)]

    def run() -> None:
        output = method.attend(*parts, scale=heads.scale, size=size, seed=0)
        torch.autograd.grad(output.sum(), parts)

    times = []

    def timed_runs() -> None:
        for _ in range(3):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)

    run()
    peak = added_peak_bytes(timed_runs)
    return 1000 * sorted(times)[1], None if peak is None else peak / 2**20


def _over_temperatures(heads: HeadInputs, sizes: dict[str, int | None]) -> Iterator[dict[str, Any]]:
    """Entropy and error of every head at every temperature; without a size, a quarter."""
    for factor in TEMPERATURES:
        scaled = heads.at_temperature(factor)
        exact = _exact(scaled)
        entropies = row_entropies(scaled.query, scaled.key, scaled.scale)
        for name, size in sizes.items():
            if size is None:
                output = _with_share(scaled, name, 1 / 4)
            else:
                output = _attend(METHODS[name], scaled, size)
            errors = relative_errors(output, exact)
            for place in torch.cartesian_prod(*map(torch.arange, errors.shape)).tolist():
                yield {
                    "method": name,
                    "size": size or "a quarter",
                    "factor": factor,
                    "instance": heads.instance_names[place[0]],
                    "head": heads.head_names[place[1]],
                    "entropy": float(entropies[tuple(place)]),
                    "error": float(errors[tuple(place)]),
                }


@torch.no_grad()
def _with_share(heads: HeadInputs, name: str, share: float) -> Tensor:
    """The output with a share of the entries, of the ranks or of the blocks."""
    length = heads.length
    parts = (heads.query, heads.key, heads.value)
    if name == "mra2":
        budget = max(1, round(share * (length / 32) ** 2))
        return mra2_attention(*parts, block_budget=budget, scale=heads.scale)
    attend = {"sparse": optimal_sparse, "low_rank": truncated_svd}[name]
    return attend(*parts, scale=heads.scale, size=max(1, round(share * length)))


def _least_share(heads: HeadInputs, exact: Tensor, name: str, limit: float) -> float:
    """The least share of a grid of 1/64, 1/32, ... with a mean error below `limit`; 1 if none."""
    for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8):
        if float(relative_errors(_with_share(heads, name, share), exact).mean()) < limit:
            return share
    return 1.0


def _smooth(axes, rows: list[dict[str, Any]], name: str) -> None:
    """The points, and their mean under the kernel exp(-5 d^2) of the paper's figure."""
    if not rows:
        return
    entropy, error = (torch.tensor([row[key] for row in rows]) for key in ("entropy", "error"))
    grid = torch.linspace(float(entropy.min()), float(entropy.max()), 100)
    weights = torch.exp(-5 * (grid[:, None] - entropy) ** 2)
    colour, _ = STYLES[name]
    axes.scatter(entropy, error, s=3, color=colour, alpha=0.25)
    axes.plot(
        grid,
        (weights * error).sum(1) / weights.sum(1),
        color=colour,
        label=f"{METHODS[name].label} ({rows[0]['size']})",
    )


def _extremes(rows: list[dict[str, Any]], share: float) -> str:
    """Mean errors of the third of the heads of least and of most entropy, in words."""
    own = [row for row in rows if row["share_computed"] == share]
    order = sorted(row["entropy"] for row in own)
    low, high = order[len(order) // 3], order[2 * len(order) // 3]

    def mean(name: str, keep) -> str:
        errors = [row["error"] for row in own if row["method"] == name and keep(row["entropy"])]
        return f"{sum(errors) / len(errors):.2f}" if errors else "-"

    names = dict.fromkeys(row["method"] for row in own)
    listed = "; ".join(
        f"{METHODS[name].label} {mean(name, lambda e: e <= low)} and "
        f"{mean(name, lambda e: e >= high)}"
        for name in names
    )
    return (
        f"Mean errors at entropies below {low:.1f} and above {high:.1f} nats, a quarter computed: "
        f"{listed}."
    )


def _device() -> str:
    return f"CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"
