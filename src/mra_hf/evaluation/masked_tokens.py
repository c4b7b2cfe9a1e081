"""How well a masked language model fills in hidden tokens: accuracy and negative log-likelihood.

The texts become one stream of T tokens. A fixed share of the tokens is drawn for masking before the
stream is cut into chunks, so scores at different chunk lengths are about the same tokens. A text
that fits into a chunk is never cut: a chunk holds as many whole texts as fit, or part of a longer
one.
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_attention.checks import check_int
from mra_hf.data.samples import check_amounts
from mra_hf.sparse_prediction import masked_lm_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Tokens of one batch when `batch_size` is not given.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MaskedTokenScores:
    """Result of `masked_token_scores`.

    Args:
        accuracy: share of masked tokens whose highest logit is the right one.
        nll: mean negative log-likelihood of the right token, in nats.
        n_masked: masked tokens scored.
        n_chunks: chunks read.
        length: tokens of a chunk, special tokens included.
        n_tokens: tokens of the text that were read, special tokens excluded.
    """

    accuracy: float
    nll: float
    n_masked: int
    n_chunks: int
    length: int
    n_tokens: int


@dataclass(frozen=True)
class MaskedTokenLosses:
    """Result of `masked_token_losses`: one entry per masked token, in the order of the text.

    Args:
        nll: `[masked]` float64, negative log-likelihood of the right token, in nats.
        correct: `[masked]` bool, whether the highest logit is the right token's.
        places: `[masked]` int64, which tokens of `stream` were hidden.
        stream: `[T]` int64, the tokens that were read.
        n_chunks, length, n_tokens: as in `MaskedTokenScores`.
    """

    nll: Tensor
    correct: Tensor
    places: Tensor
    stream: Tensor
    n_chunks: int
    length: int
    n_tokens: int

    def scores(self) -> MaskedTokenScores:
        """The means."""
        return MaskedTokenScores(
            accuracy=self.correct.double().mean().item(),
            nll=self.nll.mean().item(),
            n_masked=len(self.nll),
            n_chunks=self.n_chunks,
            length=self.length,
            n_tokens=self.n_tokens,
        )

    def difference(self, others: "MaskedTokenLosses") -> tuple[float, float]:
        """The mean difference to other losses of the same tokens, and half of its 95 % interval."""
        differences = self.nll - others.nll
        deviation = differences.std().item() if len(differences) > 1 else float("nan")
        return differences.mean().item(), 1.96 * deviation / len(differences) ** 0.5


def masked_token_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: "str | Sequence[str]",
    *,
    length: int,
    **options,
) -> MaskedTokenScores:
    """Accuracy and mean loss of the tokens that `masked_token_losses` hides.

    Takes its arguments, `options` being the further ones, and raises its errors.
    """
    return masked_token_losses(model, tokenizer, texts, length=length, **options).scores()


@torch.no_grad()
def masked_token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: "str | Sequence[str]",
    *,
    length: int,
    fraction: float = 0.15,
    seed: int = 0,
    batch_size: int | None = None,
    max_chunks: int | None = None,
    max_tokens: int | None = None,
) -> MaskedTokenLosses:
    """Hide tokens of `texts` behind the mask token and score what `model` puts there.

    The same tokens are hidden at every length and for every model with this tokenizer, so that the
    losses of two models can be compared token by token.

    Args:
        model: a masked language model; it is put into evaluation mode for the call.
        tokenizer: its tokenizer, with a mask token.
        texts: one text or several, in this order; a text is cut only if it is longer than a chunk.
        length: the most tokens of a chunk, with the special tokens the tokenizer puts around each.
        fraction: share of the tokens that is masked; at least one is, special tokens never are.
        seed: which tokens are masked; the same ones at every `length`.
        batch_size: chunks per forward pass (default None: about 4096 tokens).
        max_chunks: score only the first chunks (default None: all).
        max_tokens: read only the first tokens of the stream (default None: all); unlike
            `max_chunks` this scores the same tokens at every `length`.

    Returns:
        The loss of every masked token, computed in float32.

    Raises:
        ValueError: no mask token, no text, a fraction outside (0, 1], or a length that leaves no
            room for text.
    """
    texts = read_texts([texts] if isinstance(texts, str) else texts)
    if not isinstance(fraction, (int, float)):
        raise ValueError(f"fraction must be a number in (0, 1], got {fraction!r}; 0.15 is usual.")
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer must have a mask token to score masked tokens; it has none.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}; 0.15 is usual.")
    check_amounts(batch_size=batch_size, max_chunks=max_chunks, max_tokens=max_tokens)
    stream, ends, before, after = token_stream(tokenizer, texts)
    stream = stream[:max_tokens]  # [T]
    check_int("length", length, 1 + len(before) + len(after))
    masked = _draw_mask(stream, tokenizer, fraction, seed)  # [T]

    per_chunk = length - len(before) - len(after)
    chunks = _pack(ends, len(stream), per_chunk)[:max_chunks]
    batch_size = batch_size or max(1, BATCH_TOKENS // length)
    correct: list[Tensor] = []
    nll: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for group in (chunks[i : i + batch_size] for i in range(0, len(chunks), batch_size)):
            rows = [(stream[start:end], masked[start:end]) for start, end in group]
            for logits, targets in _predictions(model, tokenizer, rows, before, after):
                log_probabilities = logits.float().log_softmax(-1)  # [masked, vocabulary]
                correct.append((log_probabilities.argmax(-1) == targets).cpu())
                nll.append(-log_probabilities.gather(1, targets[:, None])[:, 0].double().cpu())
    finally:
        model.train(was_training)
    if not nll:
        raise ValueError(f"the first {max_chunks} chunks hold no masked token; raise max_chunks.")
    read = chunks[-1][1]
    places = masked[:read].nonzero()[:, 0]
    by_token = (torch.cat(nll), torch.cat(correct), places, stream[:read])
    return MaskedTokenLosses(*by_token, len(chunks), length, n_tokens=read)


def read_texts(text: "str | os.PathLike[str] | Sequence[str]") -> list[str]:
    """Return the texts of a UTF-8 file or of a list of strings.

    Raises:
        OSError: there is no such file.
        ValueError: not UTF-8, not strings, or nothing but white space.
    """
    if isinstance(text, (str, os.PathLike)):
        file = Path(text).expanduser()
        if not file.is_file():
            raise OSError(f"text must be a file or a list of strings, and {file} is no file.")
        try:
            texts = [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"text {file} is not UTF-8 ({error}); convert it first.") from error
    else:
        texts = list(text) if isinstance(text, Iterable) else [None]
        if not all(isinstance(content, str) for content in texts):
            raise ValueError("text must be a file or a list of strings, got a list of other types.")
    if not any(content.strip() for content in texts):
        raise ValueError("text holds nothing to score; pass a text of a few sentences at least.")
    return texts


def _pack(ends: list[int], total: int, per_chunk: int) -> list[tuple[int, int]]:
    """Cut a stream of `total` tokens, whose texts end at `ends`, into chunks (start, end)."""
    chunks, start, end = [], 0, 0
    for text_end in ends:
        text_end = min(text_end, total)
        if text_end - start > per_chunk and end > start:  # does not fit beside the texts before it
            chunks.append((start, end))
            start = end
        while text_end - start > per_chunk:
            chunks.append((start, start + per_chunk))
            start += per_chunk
        end = text_end
    return [*chunks, (start, end)] if end > start else chunks


def token_stream(tokenizer, texts: list[str]) -> tuple[Tensor, list[int], list[int], list[int]]:
    """All tokens `[T]`, the ends of the texts, and the special tokens before and after a chunk."""

    def encode(text: str, special: bool) -> list[int]:
        options = {"add_special_tokens": special, "truncation": False, "padding": False}
        return tokenizer(text, verbose=False, **options)["input_ids"]

    encoded = [encode(text, False) for text in texts]
    stream = [token for tokens in encoded for token in tokens]
    if not stream:
        raise ValueError("texts must hold at least one token, got none; pass a longer text.")
    plain, text = min(
        ((tokens, text) for tokens, text in zip(encoded, texts, strict=True) if tokens),
        key=lambda pair: len(pair[0]),
    )
    wrapped = encode(text, True)
    starts = (i for i in range(len(wrapped)) if wrapped[i : i + len(plain)] == plain)
    first = next(starts, None)
    if first is None:
        raise ValueError("tokenizer cuts a text differently when it adds special tokens.")
    ends = list(itertools.accumulate(map(len, encoded)))
    return torch.tensor(stream), ends, wrapped[:first], wrapped[first + len(plain) :]


def _draw_mask(stream: Tensor, tokenizer, fraction: float, seed: int) -> Tensor:
    """The tokens of the stream to mask, `[T]` bool."""
    draws = torch.rand(len(stream), generator=torch.Generator().manual_seed(seed))
    draws[torch.isin(stream, torch.tensor(tokenizer.all_special_ids))] = 2.0
    if draws.min() > 1:
        raise ValueError(
            "texts hold nothing but special and unknown tokens of this tokenizer; "
            "pass a text in the language and alphabet of the model (--text FILE)."
        )
    return (draws < fraction) | (draws == draws.min())


def _predictions(model, tokenizer, rows, before, after) -> "Iterator[tuple[Tensor, Tensor]]":
    """Logits `[masked, vocabulary]` and right tokens `[masked]`, row by row of one batch."""
    width = max(len(tokens) for tokens, _ in rows) + len(before) + len(after)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, (tokens, masked) in enumerate(rows):
        hidden = tokens.masked_fill(masked, tokenizer.mask_token_id)
        whole = torch.cat([torch.tensor(before).long(), hidden, torch.tensor(after).long()])
        input_ids[row, : len(whole)] = whole
        attention_mask[row, : len(whole)] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    # The head sees masked tokens only: the logits of all of 4096 tokens can take gigabytes.
    head = masked_lm_head(model)
    states = model(**inputs).logits if head is None else model.base_model(**inputs)[0]
    for row, (tokens, masked) in enumerate(rows):
        if masked.any():
            masked_states = states[row, len(before) + masked.nonzero()[:, 0].to(states.device)]
            logits = masked_states if head is None else head(masked_states)
            yield logits, tokens[masked].to(states.device)
