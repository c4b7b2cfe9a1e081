"""What `measuring.advise` found, what follows from it, and its picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mra_hf.results.drawing import new_figure, save_figure

if TYPE_CHECKING:
    import os

#: A budget is good enough where it costs no more than this beside dense attention: nats of
#: masked-token loss, or 1 - cosine of hidden states.
LOSS_TOLERANCE, COSINE_TOLERANCE = 0.05, 0.05
#: Times that differ by less are called equal; then the better quality is taken.
_SAME_TIME = 1.05
#: Attention -> its colour in pictures, as in those of the benchmarks.
_COLOURS = {
    "dense": "#333333",
    "4 blocks": "#1b9e77",
    "8 blocks": "#d95f02",
    "16 blocks": "#7570b3",
}


class Difference(NamedTuple):
    """A mean difference of losses, token by token, and half of its 95 % interval, in nats."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} +- {self.half:.3f}"


@dataclass(frozen=True)
class AdviceRow:
    """One length and one attention.

    Args:
        length: tokens of a chunk.
        block_per_row: exact blocks per row, a list with one number a layer, or None for dense.
        seconds: of the encoder, for as many tokens as the longest length of all rows.
        peak_mb: memory that the first chunk adds to the loaded model, in MB (10^6 bytes); None
            where it cannot be measured.
        accuracy, loss: of masked tokens, in nats; None without a masked-LM head.
        cosine: mean cosine of the last hidden states to those of dense attention at this length;
            None with a masked-LM head.
        over_dense: loss above dense attention at this length.
        over_chunks: loss above dense attention in chunks of the shortest length.
    """

    length: int
    block_per_row: int | list[int] | None
    seconds: float
    peak_mb: float | None
    accuracy: float | None = None
    loss: float | None = None
    cosine: float | None = None
    over_dense: Difference | None = None
    over_chunks: Difference | None = None

    @property
    def attention(self) -> str:
        """Its name in tables."""
        match self.block_per_row:
            case None:
                return "dense"
            case int(blocks):
                return f"{blocks} block{'s' * (blocks > 1)}"
            case blocks:
                return f"{statistics.mean(blocks):.1f} blocks (list)"


@dataclass(frozen=True)
class Advice:
    """All rows, what they are about, and what follows.

    Args:
        rows: by length and rising budget, dense first.
        longest: the longest length, tokens.
        n_tokens: tokens of the text that every row read.
        n_masked: masked tokens that were scored; None without a masked-LM head.
        share_of_cores: of the time of the threads, the share that this process got; well below 1
            where other programs ran.
        recommendation: sentences.
    """

    rows: tuple[AdviceRow, ...]
    longest: int
    n_tokens: int
    n_masked: int | None
    share_of_cores: float
    recommendation: str


def recommend(rows: Sequence[AdviceRow]) -> str:
    """Return, in sentences, which row to take and why.

    At the longest length the fastest attention is taken whose quality is within the tolerance of
    dense attention there; of equal times, the best quality. It is compared with dense attention in
    chunks of the shortest length, which is how a source is used without conversion.
    """
    shortest, longest = rows[0].length, rows[-1].length
    at_longest = [row for row in rows if row.length == longest]
    dense = next(row for row in at_longest if row.block_per_row is None)
    good = [row for row in at_longest if _is_good(row)]
    fastest = min(row.seconds for row in good)
    best = min((row for row in good if row.seconds <= _SAME_TIME * fastest), key=_cost)
    sentences = [_choice(best, dense, at_longest)]
    if unclear := [row.attention for row in at_longest if _is_unclear(row)]:
        sentences.append(
            f"This text is too short to tell whether {' and '.join(unclear)} stay within "
            f"{LOSS_TOLERANCE:g} nats: pass more."
        )
    chunks = next(row for row in rows if row.length == shortest and row.block_per_row is None)
    if shortest < longest:
        sentences.append(_rival(best, chunks))
    return " ".join(sentences)


def _cost(row: AdviceRow) -> float:
    """What an attention costs beside dense attention, in nats or in 1 - cosine."""
    if row.over_dense is not None:
        return row.over_dense.mean
    assert row.cosine is not None  # there is one of the two
    return 1 - row.cosine


def _is_good(row: AdviceRow) -> bool:
    tolerance = COSINE_TOLERANCE if row.over_dense is None else LOSS_TOLERANCE
    return _cost(row) <= tolerance


def _is_unclear(row: AdviceRow) -> bool:
    """Whether a wide interval lies on both sides of the tolerance."""
    if row.over_dense is None or row.block_per_row is None:
        return False
    mean, half = row.over_dense
    return half > LOSS_TOLERANCE / 2 and abs(mean - LOSS_TOLERANCE) < half


def _quality(row: AdviceRow) -> str:
    if row.over_dense is None:
        return f"cosine {row.cosine:.3f} to the hidden states of dense attention"
    return f"loss {row.loss:.3f}, {row.over_dense} beside dense attention"


def _choice(best: AdviceRow, dense: AdviceRow, at_longest: Sequence[AdviceRow]) -> str:
    others = [row for row in at_longest if row.block_per_row is not None and row is not best]
    if best is dense:
        if not others:
            return f"At {dense.length} tokens every budget holds all blocks: dense attention."
        largest = others[-1]
        if _is_good(largest):
            reason = f"{largest.attention} per row take {largest.seconds:.2g} s"
        else:
            reason = f"even {largest.attention} per row have {_quality(largest)}"
        return (
            f'At {dense.length} tokens take dense attention (attn_implementation="sdpa"): '
            f"{dense.seconds:.2g} s a document; {reason}."
        )
    text = (
        f"At {best.length} tokens take block_per_row={best.block_per_row}: {_quality(best)}, "
        f"{best.seconds:.2g} s a document, {dense.seconds / best.seconds:.1f} times as fast as "
        "dense attention"
    )
    cheaper = [row for row in others if row.seconds < best.seconds]
    if cheaper:
        next_one = min(cheaper, key=_cost)
        text += f"; {next_one.attention} are faster, but with {_quality(next_one)}"
    allowed = f"a cosine of {1 - COSINE_TOLERANCE:g} to dense attention"
    if best.over_dense is not None:
        allowed = f"{LOSS_TOLERANCE:g} nats of dense attention"
    return f"{text}. It is the fastest within {allowed}."


def _rival(best: AdviceRow, chunks: AdviceRow) -> str:
    """What reading in chunks gives instead."""
    time_of_chunks = (
        f"Chunks of {chunks.length} tokens with dense attention take {chunks.seconds:.2g} s"
    )
    if best.over_chunks is None:
        return (
            f"{time_of_chunks}. A cosine does not tell which of the two serves your task better: "
            "compare both there."
        )
    difference, half = best.over_chunks
    interval = f"{difference - half:+.3f} to {difference + half:+.3f}"
    if difference + half < 0:
        return (
            f"{time_of_chunks}; reading the document whole lowers the loss by {-difference:.3f} "
            f"nats (95 % interval of the difference {interval})."
        )
    if difference - half > 0:
        return (
            f"{time_of_chunks} and have a loss {difference:.3f} nats lower (95 % interval of the "
            f"difference {interval}): on this text the checkpoint does not use what is far away "
            "yet. Continue masked-LM training at this length, or keep chunks where nothing needs "
            "the whole document in one pass."
        )
    return (
        f"{time_of_chunks} and have about the same loss (95 % interval of the difference "
        f"{interval}): read a document whole where the task needs it; to gain more from its "
        "length, continue masked-LM training at this length."
    )


def plot_advice(advice: Advice, path: "str | os.PathLike[str]", title: str) -> None:
    """Write a PNG: seconds, peak memory and quality against length, a line for each attention."""
    has_loss = advice.n_masked is not None
    panels = {
        f"seconds for {advice.longest} tokens": lambda row: row.seconds,
        "peak memory of a chunk, MB": lambda row: row.peak_mb,
        ("masked-token loss, nats" if has_loss else "cosine of states to dense attention"): (
            lambda row: row.loss if has_loss else row.cosine
        ),
    }
    figure = new_figure(12, 3.8)
    all_axes = figure.subplots(1, 3)
    names = list(dict.fromkeys(row.attention for row in advice.rows))
    for axes, (label, value) in zip(all_axes, panels.items(), strict=True):
        for name in names:
            rows = [row for row in advice.rows if row.attention == name]
            points = [(row.length, value(row)) for row in rows if value(row) is not None]
            axes.plot(
                *zip(*points, strict=True),
                marker="s" if name == "dense" else "o",
                color=_COLOURS.get(name, "#e7298a"),
                label="dense" if name == "dense" else f"{name} per row",
            )
        axes.set_xscale("log", base=2)
        lengths = sorted({row.length for row in advice.rows})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of a chunk")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if not label.startswith(("masked", "cosine")):
            axes.set_ylim(bottom=0)
    all_axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, Path(path))
