"""How much a long encoder agrees with the short one it was made from: cosines of hidden states.

For models without a masked-LM head, which have no loss to compare. The reference is the short model
in overlapping windows: every token of a document takes its state from the window in whose middle it
stands. The pooled embedding of a document is compared with the short model's mean over chunks.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_attention.checks import check_int
from mra_hf.evaluation.masked_tokens import read_texts, token_stream

#: Poolings that embeddings are compared by: the mean over all tokens, or the state of the first.
POOLINGS = ("mean", "cls")


class Agreement(NamedTuple):
    """Means over tokens and over documents of one model at one chunk length.

    Args:
        states: mean cosine of the last hidden states to those in windows of the source.
        pooled: mean cosine of a document's embedding to the source's mean over chunks.
        n_tokens: tokens compared, without special tokens.
        n_documents: documents compared.
    """

    states: float
    pooled: float
    n_tokens: int
    n_documents: int


class SourceStates:
    """Documents, and what a source makes of them.

    Args:
        model: an encoder without head, its output has `last_hidden_state`; read in evaluation mode.
        tokenizer: its tokenizer, which puts the same special tokens around every text.
        texts: one text or several; cut into documents of `longest` tokens.
        width: tokens of a window and of a chunk, special tokens included.
        longest: most tokens of a document, special tokens included; at least `width`.
        pooling: one of `POOLINGS`.
        max_tokens: read only the first tokens of the texts; None: all.

    Raises:
        ValueError: no text, a width that leaves no room for text, or another pooling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: str | Sequence[str],
        *,
        width: int,
        longest: int,
        pooling: str = "mean",
        max_tokens: int | None = None,
    ):
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}.")
        self.pooling = pooling
        texts = read_texts([texts] if isinstance(texts, str) else texts)
        stream, ends, before, after = token_stream(tokenizer, texts)
        self.borders = (torch.tensor(before).long(), torch.tensor(after).long())
        self.n_special = len(before) + len(after)
        check_int("width", width, 1 + self.n_special)
        check_int("longest", longest, width)
        stream, size = stream[:max_tokens], longest - self.n_special
        starts = [0, *(end for end in ends if end < len(stream))]
        self.documents = [
            piece
            for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)
            for piece in stream[start:end].split(size)
        ]
        stride = max(1, width // 2)
        width -= self.n_special
        with _evaluation_mode(model):
            self.wanted = [
                states_in_windows(model, ids, self.borders, width, stride) for ids in self.documents
            ]
            self.pooled = [self._pooled(model, x, width) for x in self.documents]

    def agreement(self, model: PreTrainedModel, length: int) -> Agreement:
        """Compare `model` on chunks of `length` tokens, special tokens included."""
        size = length - self.n_special
        states, pooled = [], []
        with _evaluation_mode(model):
            for ids, wanted, other in zip(self.documents, self.wanted, self.pooled, strict=True):
                whole = list(states_of_pieces(model, ids, self.borders, pieces(len(ids), size)))
                found = torch.cat([x[self._inside(x)] for x in whole])
                states.append(torch.cosine_similarity(found, wanted, dim=-1))
                pooled.append(torch.cosine_similarity(self._mean(whole), other, dim=0))
        n_tokens = sum(map(len, self.documents))
        means = (torch.cat(states).mean().item(), torch.stack(pooled).mean().item())
        return Agreement(*means, n_tokens, len(self.documents))

    def _inside(self, states: Tensor) -> slice:
        return slice(len(self.borders[0]), len(states) - len(self.borders[1]))

    def _pooled(self, model: PreTrainedModel, ids: Tensor, width: int) -> Tensor:
        return self._mean(states_of_pieces(model, ids, self.borders, pieces(len(ids), width)))

    def _mean(self, states: Iterable[Tensor]) -> Tensor:
        """The embedding of a document from the states of its pieces, `[D]`."""
        chosen = [x if self.pooling == "mean" else x[:1] for x in states]
        return torch.cat(chosen).double().mean(0)


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, and no dropout in `model`; its mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def pieces(total: int, width: int) -> list[tuple[int, int]]:
    """Cut `total` tokens into pieces (start, end) of `width`; the last one may be shorter."""
    return [(start, min(start + width, total)) for start in range(0, total, width)]


def windows(total: int, width: int, stride: int) -> list[tuple[int, int]]:
    """Return overlapping windows (start, end) over `total` tokens; the last one ends with them."""
    starts = [*range(0, max(1, total - width), stride), max(0, total - width)]
    return [(start, min(start + width, total)) for start in dict.fromkeys(starts)]


def most_central(places: Sequence[tuple[int, int]], total: int) -> Tensor:
    """The window of which each token is nearest the middle, `[total]`."""
    middles = torch.tensor([(start + end - 1) / 2 for start, end in places])
    inside = torch.zeros(len(places), total, dtype=torch.bool)
    for row, (start, end) in enumerate(places):
        inside[row, start:end] = True
    distance = (torch.arange(total) - middles[:, None]).abs()
    return distance.masked_fill(~inside, torch.inf).argmin(0)


def states_of_pieces(
    model: PreTrainedModel,
    ids: Tensor,
    borders: tuple[Tensor, Tensor],
    places: Iterable[tuple[int, int]],
) -> Iterator[Tensor]:
    """Yield the last hidden states of pieces (start, end) of a text, `[tokens, D]` each.

    Args:
        ids: `[N]`, without special tokens.
        borders: special tokens before and after a piece; their states are part of the result.
        places: the pieces.
    """
    first, last = borders
    for start, end in places:
        row = torch.cat([first, ids[start:end], last])[None].to(model.device)
        yield model(row, attention_mask=torch.ones_like(row)).last_hidden_state[0].float().cpu()


def states_in_windows(
    model: PreTrainedModel, ids: Tensor, borders: tuple[Tensor, Tensor], width: int, stride: int
) -> Tensor:
    """States of every token, each from the window of `width` in whose middle it stands, `[N, D]`;
    windows begin `stride` tokens apart.
    """
    places = windows(len(ids), width, min(stride, width))
    chosen = most_central(places, len(ids))
    result = torch.zeros(len(ids), model.config.hidden_size)
    found = states_of_pieces(model, ids, borders, places)
    skipped = len(borders[0])
    for row, ((start, end), states) in enumerate(zip(places, found, strict=True)):
        mine = chosen[start:end] == row
        result[start:end][mine] = states[skipped : skipped + end - start][mine]
    return result
