"""Figures 4, 5 and 7 and Table 7 of the paper: error against work, entropy and length."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mra_attention import mra2_attention
from mra_attention.benchmarking import added_peak_bytes
from mra_hf.analysis.figures.drawing import Drawn, shape_of
from mra_hf.analysis.head_inputs import HeadInputs
from mra_hf.analysis.paper_errors import TABLE_7
from mra_hf.baselines.measures import dense_attention, relative_errors, row_entropies
from mra_hf.baselines.optimal import optimal_sparse, truncated_svd
from mra_hf.encoders.methods import METHODS, Method
from mra_hf.results.drawing import new_figure

#: Factors of the logits that make heads less or more diffuse.
TEMPERATURES = tuple(2.0**power for power in range(-4, 5))

#: Methods in the figures of error against entropy; the others fail at every entropy.
_BY_ENTROPY = ("mra2", "mra2_s", "longformer", "bigbird", "nystromformer", "h_transformer")
#: Longest input in tokens for the best sparse and low-rank matrices, N^3 operations each.
_LONGEST_OPTIMUM = 1024


def error_and_time(heads: HeadInputs) -> Drawn:
    """Figure 4: what each method needs for its error."""
    rows = _measured(heads)
    dense = next(row for row in rows if row["method"] == "dense")
    figure = new_figure(8.5, 5.6)
    axes = figure.subplots()
    largest = max(row["megabytes"] or 0 for row in rows) or 1
    for name, method in METHODS.items():
        timed = [row for row in rows if row["method"] == name and row["milliseconds"]]
        if name == "dense" or not timed:
            continue
        times, errors = [row["milliseconds"] for row in timed], [row["error"] for row in timed]
        axes.plot(times, errors, color=method.colour, linewidth=1)
        areas = [20 + 180 * (row["megabytes"] or 0) / largest for row in timed]
        look: dict[str, Any] = {"color": method.colour, "marker": method.mark}
        axes.scatter(times, errors, s=areas, label=method.label, **look)
    dense_style: dict[str, Any] = {
        "color": METHODS["dense"].colour,
        "linestyle": "--",
        "linewidth": 1,
    }
    axes.axvline(dense["milliseconds"], label="dense", **dense_style)
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
    finding = "no other method is faster"
    if best is not None:
        method = METHODS[best["method"]]
        finding = (
            f"among the faster methods {method.label} ({best['size']} {method.size_name}) has the "
            f"lowest error: {best['error']:.2f} in {best['milliseconds']:.0f} ms"
        )
    caption = (
        f"{shape_of(heads)}, {_device()}; areas: memory above the inputs. In the paper (RTX 3090) "
        "MRA-2 and MRA-2-s have the lowest error for their time. Here dense attention takes "
        f"{limit:.0f} ms, and {finding}."
    )
    return Drawn(figure, rows, caption)


def table_7(heads: HeadInputs) -> Drawn:
    """Table 7: error, time and memory of every method at every size, beside the paper's errors."""
    rows = _measured(heads)
    for row in rows:
        row["paper_error"] = TABLE_7.get((row["method"], heads.length, row["size"]))
    figure = new_figure(9, 0.26 * len(rows) + 1.2)
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
    ratios = [
        row["error"] / row["paper_error"]
        for row in rows
        if row["paper_error"] is not None and row["method"].startswith("mra2")
    ]
    comparison = "The paper has no errors at this length."
    if ratios:
        comparison = (
            f"The errors of MRA-2 and MRA-2-s are on average {sum(ratios) / len(ratios):.2f} times "
            "the paper's, which are of a RoBERTa-base."
        )
    caption = (
        f"{shape_of(heads)}, {_device()}; time and memory of forward and backward of an instance. "
        f"{comparison} Linformer's projections are random here as in the paper; Performer is "
        "corrected here."
    )
    return Drawn(figure, rows, caption)


def error_and_entropy(heads: HeadInputs) -> Drawn:
    """Figure 5: error against the entropy of the head, at equal work."""
    shares = (1 / 4, 1 / 8)
    rows = []
    figure = new_figure(12, 5)
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
        panel = list(_over_temperatures(heads, {name: n for name, n in sizes.items() if n}))
        rows += [{"share_computed": share, **row} for row in panel]
        for name in _BY_ENTROPY:
            _smooth(axes, [row for row in panel if row["method"] == name], name)
        title = f"at most {share:.0%} of the pairs computed"
        axes.set(xlabel="mean entropy of a row, nats", ylim=(0, 1.5), title=title)
    panels[0].set_ylabel("relative error")
    panels[0].legend(frameon=False, fontsize=8)
    caption = (
        f"{shape_of(heads)}, logits times 1/16 to 16. "
        "The paper compares sizes of equal time on its GPU; this figure compares sizes of equal "
        "work. In the paper MRA-2 has low errors at every entropy, while Nystromformer fails at "
        "low entropy and local patterns at high. "
        + _extremes([row for row in rows if row["share_computed"] == 1 / 4])
    )
    return Drawn(figure, rows, caption)


def work_and_length(heads: HeadInputs) -> Drawn:
    """Figure 7: the work needed for an error against length, and error against entropy with a
    quarter of the entries, ranks or blocks.
    """
    lengths = [n for n in (128, 256, 512, 1024) if n <= heads.length]
    kinds = ("mra2", "sparse", "low_rank")
    rows: list[dict[str, Any]] = []
    for length in lengths:
        first = heads.first_tokens(length)
        exact = _exact(first)
        for name in kinds:
            for limit in (0.05, 0.10):
                share = _least_share(first, exact, name, limit)
                rows.append(
                    {
                        "part": "work",
                        "length": length,
                        "method": name,
                        "limit": limit,
                        "share": share,
                    }
                )
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    for name in kinds:
        method = METHODS[name]
        for limit, line in ((0.05, "-"), (0.10, "--")):
            points = [
                (row["length"], row["share"] * row["length"] ** 2)
                for row in rows
                if row["method"] == name and row["limit"] == limit
            ]
            left.plot(
                *zip(*points, strict=True),
                line,
                color=method.colour,
                marker=method.mark,
                label=f"{method.label}, error < {limit:g}",
            )
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="least work, pairs of N x N")
    left.set_xticks(lengths, lengths)
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    first = heads.first_tokens(min(heads.length, 512))
    by_entropy = list(_over_temperatures(first, dict.fromkeys(kinds)))
    rows += [{"part": "entropy", **row} for row in by_entropy]
    for name in kinds:
        _smooth(right, [row for row in by_entropy if row["method"] == name], name)
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
        f"over the first {first.length}. In the paper the work of low rank grows faster than "
        "linearly, the work of MRA-2 nearly linearly; low rank fails at low entropy, the best "
        f"sparse matrix at high. Here an error below 0.1 at {lengths[-1]} tokens takes "
        f"{last['mra2']:.0%} (MRA-2), {last['sparse']:.0%} (best sparse) and "
        f"{last['low_rank']:.0%} (best low rank) of the work. " + _extremes(by_entropy)
    )
    return Drawn(figure, rows, caption)


def _measured(heads: HeadInputs) -> list[dict[str, Any]]:
    """Error, time and memory of every method at every size; without the optima at great lengths."""
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
    assert method.attend is not None  # `sizes_at`
    return method.attend(*heads.parts, scale=heads.scale, size=size, seed=0)


@torch.no_grad()
def _exact(heads: HeadInputs) -> Tensor:
    return dense_attention(*heads.parts, heads.scale)


def _cost(method: Method, heads: HeadInputs, size: int) -> tuple[float | None, float | None]:
    """Median milliseconds of three runs of one instance, and MB above the inputs; None for
    impractical methods.
    """
    if not method.is_practical:
        return None, None
    parts = [x[:1].clone().requires_grad_() for x in heads.parts]
    attend = method.attend
    assert attend is not None  # `sizes_at`

    def run() -> None:
        output = attend(*parts, scale=heads.scale, size=size, seed=0)
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
    """Entropy and error of every head at every temperature; size None means a quarter."""
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
            for instance, head in torch.cartesian_prod(*map(torch.arange, errors.shape)).tolist():
                yield {
                    "method": name,
                    "size": size or "a quarter",
                    "factor": factor,
                    "instance": heads.instance_names[instance],
                    "head": heads.head_names[head],
                    "entropy": float(entropies[instance, head]),
                    "error": float(errors[instance, head]),
                }


@torch.no_grad()
def _with_share(heads: HeadInputs, name: str, share: float) -> Tensor:
    """The output with this share of the entries, ranks or blocks."""
    length = heads.length
    if name == "mra2":
        budget = max(1, round(share * (length / 32) ** 2))
        return mra2_attention(*heads.parts, block_budget=budget, scale=heads.scale)
    attend = {"sparse": optimal_sparse, "low_rank": truncated_svd}[name]
    return attend(*heads.parts, scale=heads.scale, size=max(1, round(share * length)))


def _least_share(heads: HeadInputs, exact: Tensor, name: str, limit: float) -> float:
    """The least share of 1/64, 1/32, ..., 7/8 with a mean error below `limit`; 1 if none."""
    for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8):
        if float(relative_errors(_with_share(heads, name, share), exact).mean()) < limit:
            return share
    return 1.0


def _smooth(axes, rows: list[dict[str, Any]], name: str) -> None:
    """Plot the points, and their mean under the kernel exp(-5 d^2) of the paper's figure."""
    if not rows:
        return
    entropy, error = (torch.tensor([row[key] for row in rows]) for key in ("entropy", "error"))
    grid = torch.linspace(float(entropy.min()), float(entropy.max()), 100)
    weights = torch.exp(-5 * (grid[:, None] - entropy) ** 2)
    method = METHODS[name]
    axes.scatter(entropy, error, s=3, color=method.colour, alpha=0.25)
    mean = (weights * error).sum(1) / weights.sum(1)
    axes.plot(grid, mean, color=method.colour, label=f"{method.label} ({rows[0]['size']})")


def _extremes(rows: list[dict[str, Any]]) -> str:
    """Mean errors of the thirds of the heads with the least and the most entropy, in words."""
    entropies = sorted(row["entropy"] for row in rows)
    low, high = entropies[len(rows) // 3], entropies[2 * len(rows) // 3]

    def mean(name: str, keep) -> str:
        errors = [row["error"] for row in rows if row["method"] == name and keep(row["entropy"])]
        return f"{sum(errors) / len(errors):.2f}" if errors else "-"

    listed = "; ".join(
        f"{METHODS[name].label} {mean(name, lambda entropy: entropy <= low)} and "
        f"{mean(name, lambda entropy: entropy >= high)}"
        for name in dict.fromkeys(row["method"] for row in rows)
    )
    return (
        f"Mean errors at entropies below {low:.1f} and above {high:.1f} nats, a quarter computed: "
        f"{listed}."
    )


def _device() -> str:
    return f"CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"
