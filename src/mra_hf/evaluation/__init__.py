"""Scores of masked language models on held-out text, and the metrics of the commands."""

from mra_hf.evaluation.masked_tokens import (
    MaskedTokenLosses,
    MaskedTokenScores,
    masked_token_losses,
    masked_token_scores,
    read_texts,
)

__all__ = [
    "MaskedTokenLosses",
    "MaskedTokenScores",
    "masked_token_losses",
    "masked_token_scores",
    "read_texts",
]
