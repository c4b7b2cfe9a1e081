"""Scores of masked language models on held-out text, agreement of encoders, and metrics."""

from mra_hf.evaluation.agreement import Agreement, SourceStates
from mra_hf.evaluation.masked_tokens import (
    MaskedTokenLosses,
    MaskedTokenScores,
    masked_token_losses,
    masked_token_scores,
    read_texts,
)

__all__ = [
    "Agreement",
    "MaskedTokenLosses",
    "MaskedTokenScores",
    "SourceStates",
    "masked_token_losses",
    "masked_token_scores",
    "read_texts",
]
