"""Which budget at which length: time, memory and quality of a checkpoint, here and on a text.

A row is a length and an attention, dense or MRA-2 with a budget. Every row reads the same tokens in
chunks of its length, one chunk at a time, so that all rows compare: seconds are those of one
document of the longest length, read whole or in chunks.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_attention.benchmarking import added_since, reset_peak
from mra_attention.checks import check_int
from mra_hf.attention import ATTENTION_NAMES, set_attention
from mra_hf.configuration import AttentionSettings
from mra_hf.evaluation import MaskedTokenLosses, masked_token_losses, read_texts
from mra_hf.evaluation.agreement import pieces, states_of_pieces
from mra_hf.evaluation.masked_tokens import token_stream
from mra_hf.loading import check_length
from mra_hf.results.drawing import new_figure, save_figure

if TYPE_CHECKING:
    import os

#: Exact blocks per row that are compared unless others are named.
BUDGETS = (4, 8, 16)
#: Lengths that are compared unless others are named, as far as the model reads them.
SHORTEST, LONGEST = 512, 4096
#: A budget is good enough where it measurably costs no more than this beside dense attention:
#: nats of masked-token loss, or 1 - cosine of hidden states.
LOSS_TOLERANCE, COSINE_TOLERANCE = 0.05, 0.05
#: All rows of a document take about so many times the dense pass over it.
_PASSES = 9
_MOST_DOCUMENTS = 16
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
                return f"{blocks} blocks"
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


def lengths_up_to(longest: int) -> list[int]:
    """512 and its doublings below `longest`, and `longest`; not beyond 4096."""
    longest = min(longest, LONGEST)
    doublings = itertools.takewhile(
        lambda length: length < longest, (SHORTEST * 2**power for power in itertools.count())
    )
    return [*doublings, longest]


def advise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    lengths: Sequence[int],
    block_per_row: Sequence[int] | None = None,
    masked_lm: bool,
    max_tokens: int | None = None,
    minutes: float = 3.5,
    progress: Callable[[str], None] | None = None,
) -> Advice:
    """Measure every length and budget on `texts`, and recommend one.

    Args:
        model: an encoder that `set_attention` takes. It is put into evaluation mode, and left with
            the last attention that was measured.
        tokenizer: its tokenizer.
        texts: one text or several, at least as long as the longest length.
        lengths: tokens of a chunk, in any order.
        block_per_row: budgets, exact blocks per row (default None: 4, 8, 16 and the model's own).
            What covers every block of a length is dense attention, and is left out there.
        masked_lm: score masked tokens; False: compare hidden states with dense attention.
        max_tokens: tokens to read (default None: as many as take about `minutes`, two documents
            of the longest length at least, where the text has them).
        minutes: see there.
        progress: called with a line of text before each row.

    Raises:
        ValueError: a text shorter than the longest length, a length or a budget that the model
            cannot take, or a model with other scales than two.
    """
    say = progress or (lambda line: None)
    lengths = sorted(set(lengths))
    for length in lengths:
        check_int("lengths", length, 1)
        check_length("lengths", length, model)
    longest = lengths[-1]
    wanted = _budgets(model, block_per_row)
    name = model.config._attn_implementation
    name = name if name in ATTENTION_NAMES else ATTENTION_NAMES[0]
    texts = read_texts([texts] if isinstance(texts, str) else texts)
    stream, _, before, after = token_stream(tokenizer, list(texts))
    per_document = longest - len(before) - len(after)
    if len(stream) < per_document:
        raise ValueError(
            f"text must hold at least {longest} tokens, the longest of lengths, got {len(stream)}; "
            "pass a longer text, or shorter lengths."
        )
    reader = _Reader(model.eval(), tokenizer, texts, stream, (before, after), masked_lm)
    plan = [
        (length, blocks)
        for length in lengths
        for blocks in (None, *(x for x in wanted if _is_approximate(model, x, length)))
    ]
    if max_tokens is None:
        say(f"a first pass over {longest} tokens, dense")
        model.set_attn_implementation("sdpa")
        seconds = reader.time_of(per_document)
        documents = int(60 * minutes / (_PASSES * seconds))
        max_tokens = per_document * max(2, min(_MOST_DOCUMENTS, documents))
    else:
        check_int("max_tokens", max_tokens, per_document)
    reader.stream = stream[:max_tokens]

    rows: list[AdviceRow] = []
    wall, used = time.perf_counter(), time.process_time()
    for done, (length, blocks) in enumerate(plan):
        if blocks is None:
            model.set_attn_implementation("sdpa")
        else:
            set_attention(model, name, block_per_row=blocks)
        say(f"{done + 1} of {len(plan)}: {length} tokens, {_words(blocks)}")
        rows.append(reader.row(length, blocks, longest))
    wall, used = time.perf_counter() - wall, time.process_time() - used
    return Advice(
        tuple(rows),
        longest,
        len(reader.stream),
        None if reader.chunks is None else len(reader.chunks.nll),
        round(used / (wall * torch.get_num_threads()), 3),
        recommend(rows),
    )


def _words(blocks: int | list[int] | None) -> str:
    return "dense attention" if blocks is None else f"block_per_row={blocks}"


def _budgets(model: PreTrainedModel, budgets: Sequence[int] | None) -> list[int | list[int]]:
    """The budgets to compare, rising: those given, or the usual ones and the model's own."""
    settings = AttentionSettings.of(model.config)
    if settings.resolutions is not None:
        raise ValueError(
            f"model must have two scales, got resolutions={list(settings.resolutions)}: budgets of "
            "blocks per row are compared, and more scales have none."
        )
    if budgets is not None:
        for blocks in budgets:
            check_int("block_per_row", blocks, 1)
            settings.replace(block_per_row=blocks).check()
        return sorted(set(budgets))
    chosen: list[int | list[int]] = [x for x in BUDGETS if _fits(settings, x)]
    own = settings.block_per_row if settings.block_budget is None else None
    own = list(own) if isinstance(own, tuple) else own
    if own is not None and own not in chosen:
        chosen.append(own)
    return sorted(chosen, key=lambda x: statistics.mean(x) if isinstance(x, list) else x)


def _fits(settings: AttentionSettings, blocks: int) -> bool:
    """Whether the priors of a model leave room in a budget."""
    try:
        settings.replace(block_per_row=blocks).check()
    except ValueError:
        return False
    return True


def _is_approximate(model: PreTrainedModel, blocks: int | list[int], length: int) -> bool:
    smallest = min(blocks) if isinstance(blocks, list) else blocks
    size = AttentionSettings.of(model.config).block_size
    assert size is not None  # there are two scales
    return smallest * size < length


class _Reader:
    """Reads one stream of tokens at every length."""

    def __init__(self, model, tokenizer, texts, stream: Tensor, borders, masked_lm: bool):
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.stream, self.masked_lm = stream, masked_lm
        before, after = (torch.tensor(ids).long() for ids in borders)
        self.borders = (before, after)
        #: Of dense attention in chunks of the shortest length, and at the present length.
        self.chunks: MaskedTokenLosses | None = None
        self.dense: MaskedTokenLosses | None = None
        self.dense_states: list[Tensor] = []

    @torch.no_grad()
    def time_of(self, tokens: int) -> float:
        """Seconds of the encoder for one chunk of so many tokens of the text."""
        with _Watch(self.model.base_model) as watch:
            list(states_of_pieces(self.model.base_model, self.stream, self.borders, [(0, tokens)]))
        return watch.seconds[0]

    @torch.no_grad()
    def row(self, length: int, blocks: int | list[int] | None, longest: int) -> AdviceRow:
        """Read all of the stream in chunks of `length` with the present attention."""
        encoder = self.model.base_model
        measured: dict[str, Any] = {}
        with _Watch(encoder) as watch:
            if self.masked_lm:
                measured = self._masked_tokens(length, is_dense=blocks is None)
            else:
                places = pieces(len(self.stream), length - sum(map(len, self.borders)))
                states = list(states_of_pieces(encoder, self.stream, self.borders, places))
        if not self.masked_lm:
            measured = {"cosine": self._cosine(states, is_dense=blocks is None)}
        seconds = longest * watch.seconds_per_token()
        peak = None if watch.peak is None else watch.peak / 1e6
        return AdviceRow(length, blocks, seconds, peak, **measured)

    def _masked_tokens(self, length: int, *, is_dense: bool) -> dict[str, Any]:
        losses = masked_token_losses(
            self.model,
            self.tokenizer,
            self.texts,
            length=length,
            max_tokens=len(self.stream),
            batch_size=1,
        )
        scores = losses.scores()
        if is_dense:
            self.dense = losses
            self.chunks = self.chunks or losses
        assert self.dense is not None and self.chunks is not None  # dense attention is first
        return {
            "accuracy": scores.accuracy,
            "loss": scores.nll,
            "over_dense": Difference(*losses.difference(self.dense)),
            "over_chunks": Difference(*losses.difference(self.chunks)),
        }

    def _cosine(self, states: list[Tensor], *, is_dense: bool) -> float:
        if is_dense:
            self.dense_states = states
        cosines = [
            torch.cosine_similarity(x, dense, dim=-1)
            for x, dense in zip(states, self.dense_states, strict=True)
        ]
        return torch.cat(cosines).mean().item()


class _Watch:
    """While it is open: seconds of every forward pass of an encoder, and peak memory of the first.

    Attributes:
        seconds: of each pass.
        tokens: of each pass.
        peak: bytes that the first pass added; None where that cannot be measured.
    """

    def __init__(self, encoder: PreTrainedModel):
        self.encoder = encoder
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.peak: int | None = None

    def __enter__(self) -> "_Watch":
        self._hooks = (
            self.encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.encoder.register_forward_hook(self._end),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, encoder, inputs, named) -> None:
        ids = named["input_ids"] if "input_ids" in named else inputs[0]
        self.tokens.append(ids.numel())
        if not self.seconds:
            self._before = reset_peak(ids.device)
        self._start = self._now(ids.device)

    def _end(self, encoder, inputs, output) -> None:
        device = output[0].device
        self.seconds.append(self._now(device) - self._start)
        if len(self.seconds) == 1:
            self.peak = added_since(self._before, device)

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def seconds_per_token(self) -> float:
        """The median over the passes; the first one is for warming up where there are more."""
        passes = [s / n for s, n in zip(self.seconds, self.tokens, strict=True)]
        return statistics.median(passes[1:] or passes)


def recommend(rows: Sequence[AdviceRow]) -> str:
    """Return, in sentences, which row to take and why.

    At the longest length the fastest attention is taken whose quality is within the tolerance of
    dense attention there. It is compared with dense attention in chunks of the shortest length,
    which is how a source is used without conversion.
    """
    shortest, longest = rows[0].length, rows[-1].length
    at_longest = [row for row in rows if row.length == longest]
    dense = next(row for row in at_longest if row.block_per_row is None)
    good = [row for row in at_longest if _is_good(row)]
    best = min(good, key=lambda row: row.seconds)
    sentences = [_choice(best, dense, at_longest)]
    chunks = next(row for row in rows if row.length == shortest and row.block_per_row is None)
    if shortest < longest:
        sentences.append(_rival(best, chunks))
    return " ".join(sentences)


def _is_good(row: AdviceRow) -> bool:
    """Whether a budget costs little beside dense attention."""
    if row.over_dense is None:
        return row.cosine is not None and 1 - row.cosine <= COSINE_TOLERANCE
    return row.over_dense.mean - row.over_dense.half <= LOSS_TOLERANCE


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
        next_one = max(cheaper, key=lambda row: row.seconds)
        text += f"; {next_one.attention} are faster, but with {_quality(next_one)}"
    return f"{text}."


def _rival(best: AdviceRow, chunks: AdviceRow) -> str:
    """What reading in chunks gives instead."""
    time_of_chunks = (
        f"Chunks of {chunks.length} tokens with dense attention take {chunks.seconds:.2g} s"
    )
    if best.over_chunks is None:
        return (
            f"{time_of_chunks}. Which of the two serves your task better no cosine tells: "
            "compare them there, with the mean over chunks."
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
            "yet. Train it further at this length, or keep chunks where nothing needs the whole "
            "document in one pass."
        )
    return (
        f"{time_of_chunks} and have about the same loss (95 % interval of the difference "
        f"{interval}): read a document whole where the task needs it, or train further."
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
