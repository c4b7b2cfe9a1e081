"""Scores of candidates that are named in the text, as WikiHop asks for.

One linear score per candidate, read off the token that opens it (Beltagy et al. 2020, appendix D,
and the MRA paper's fine-tuning), or off the candidate's own tokens. A question too long for one
sequence is several chunks, which repeat the candidates; their scores add up.
`modeling.MraForCandidateChoice` is the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class CandidateChoiceOutput(ModelOutput):
    """Output of `MraForCandidateChoice`.

    Args:
        loss: cross-entropy over the candidates; None without labels.
        logits: `[B, candidates]`, the scores summed over the chunks; the lowest finite number
            where a question has fewer candidates.
        hidden_states: of the chunks that hold a token, if asked for.
        attentions: likewise.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def candidate_logits(
    token_scores: Tensor, candidate_spans: Tensor, present: "Tensor | tuple", pooling: str
) -> Tensor:
    """Return the logits `[B, candidates]`, sums over the chunks of a question.

    Args:
        token_scores: `[present chunks, N]`.
        candidate_spans: `[B, chunks, candidates, 2]`, the positions of the tokens that open and
            close a candidate, -1 for none.
        present: index into `[B, chunks]` of the chunks that have token scores.
        pooling: "marker" or "mean", see `MraConfig.candidate_pooling`.
    """
    is_named = candidate_spans[..., 0] >= 0  # [B, chunks, candidates]
    chunk_scores = _candidate_scores(token_scores, candidate_spans[present].clamp(min=0), pooling)
    scores = chunk_scores.new_zeros(is_named.shape)
    scores[present] = chunk_scores
    logits = scores.masked_fill(~is_named, 0.0).sum(1)
    return logits.masked_fill(~is_named.any(1), torch.finfo(logits.dtype).min)


def _candidate_scores(token_scores: Tensor, spans: Tensor, pooling: str) -> Tensor:
    """Candidate scores `[chunks, candidates]` from token scores `[chunks, N]`."""
    token_scores = token_scores.to(torch.promote_types(token_scores.dtype, torch.float32))
    first, last = spans.unbind(-1)
    if pooling == "marker":
        return token_scores.gather(1, first)
    # Sums over the tokens between the markers, as differences of running sums.
    sums = token_scores.cumsum(1)
    inside = sums.gather(1, (last - 1).clamp(min=0)) - sums.gather(1, first)
    return inside / (last - 1 - first).clamp(min=1)
