"""Which budget at which length: time, memory and quality of a checkpoint, here and on a text.

A row is a length and an attention, dense or MRA-2 with a budget. Every row reads the same tokens in
chunks of its length, one chunk at a time, so that all rows compare: seconds are those of one
document of the longest length, read whole or in chunks.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_attention.benchmarking import added_since, reset_peak
from mra_attention.checks import check_int
from mra_hf.analysis.advice import Advice, AdviceRow, Difference, recommend
from mra_hf.attention import ATTENTION_NAMES, set_attention
from mra_hf.configuration import AttentionSettings
from mra_hf.evaluation import MaskedTokenLosses, masked_token_losses, read_texts
from mra_hf.evaluation.agreement import pieces, states_of_pieces
from mra_hf.evaluation.masked_tokens import token_stream
from mra_hf.loading import check_length

#: Exact blocks per row that are compared unless others are named.
BUDGETS = (4, 8, 16)
#: Lengths that are compared unless others are named, as far as the model reads them.
SHORTEST, LONGEST = 512, 4096
#: Below this share of the cores' time, other programs disturbed the times.
UNDISTURBED = 0.7
#: All rows of a document take about so many times the dense pass over it.
_PASSES = 9
_MOST_DOCUMENTS = 16


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
        check_int("lengths", length, 3)
        check_length(
            *("lengths", length, model),
            remedy="pass shorter ones, or convert the checkpoint to a longer one with "
            "mra-hf convert --max-length if it takes the type",
        )
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
        check_int("max_tokens", max_tokens, 1)
        if max_tokens < per_document:
            raise ValueError(
                f"max_tokens must be at least {per_document}, the longest of lengths without its "
                f"special tokens, got {max_tokens}; raise it, or pass shorter lengths."
            )
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
    share = round(used / (wall * torch.get_num_threads()), 3)
    text = recommend(rows)
    if share < UNDISTURBED:
        text = (
            f"Other programs took part of the cores ({share:.0%} were left): times are too "
            "long, and the choice between budgets is a guess. Run it again on an idle machine. "
            + text
        )
    n_masked = None if reader.chunks is None else len(reader.chunks.nll)
    return Advice(tuple(rows), longest, len(reader.stream), n_masked, share, text)


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
        places = pieces(len(self.stream), length - sum(map(len, self.borders)))
        with _Watch(encoder) as watch:
            if self.masked_lm:
                measured = self._masked_tokens(length, is_dense=blocks is None)
            else:
                states = list(states_of_pieces(encoder, self.stream, self.borders, places))
                measured = {"cosine": self._cosine(states, is_dense=blocks is None)}
            if len(watch.full_passes()) == 1:  # the first pass is a cold one
                list(states_of_pieces(encoder, self.stream, self.borders, places[:1]))
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

    def full_passes(self) -> list[float]:
        """Seconds per token of the passes over whole chunks; the rest of a text is short, and takes
        longer per token with one attention and less long with another.
        """
        full = 0.9 * max(self.tokens)
        return [s / n for s, n in zip(self.seconds, self.tokens, strict=True) if n >= full]

    def seconds_per_token(self) -> float:
        """The median over whole chunks; the first one is for warming up where there are more."""
        passes = self.full_passes()
        return statistics.median(passes[1:] or passes)
