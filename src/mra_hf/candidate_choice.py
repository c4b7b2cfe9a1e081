"""A head that chooses one of several candidates named in the text, as WikiHop asks for.

One linear score per candidate, read off the token that opens it (Beltagy et al. 2020, appendix D,
and the MRA paper's fine-tuning), or off the candidate's own tokens. A question too long for one
sequence is several, which repeat the candidates; their scores add up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.roberta.modeling_roberta import RobertaPreTrainedModel
from transformers.utils import ModelOutput

from mra_hf.configuration import MraConfig
from mra_hf.modeling import MraModel, MraPreTrainedMixin, classifier_dropout


@dataclass
class CandidateChoiceOutput(ModelOutput):
    """Output of `MraForCandidateChoice`.

    Args:
        loss: cross-entropy over the candidates; None without labels.
        logits: `[B, candidates]`, the scores summed over the pieces; the lowest finite number
            where a question has fewer candidates.
        hidden_states: of the pieces that hold a token, if asked for.
        attentions: likewise.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MraForCandidateChoice(MraPreTrainedMixin, RobertaPreTrainedModel):
    """Choice among candidates that stand in the text: logits `[B, candidates]`.

    No Auto class of Transformers has this shape of input (multiple choice encodes every candidate
    apart), so the class is used by name. Any RoBERTa-like checkpoint of type `mra_hf` loads into
    it; `attn_implementation="sdpa"` gives the dense model.
    """

    accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch

    def __init__(self, config: MraConfig):
        super().__init__(config)
        self.roberta = MraModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.scorer = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        candidate_spans: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CandidateChoiceOutput | tuple[Tensor, ...]:
        """Score the candidates of B questions.

        Args:
            input_ids: `[B, N]`, or `[B, pieces, N]` for questions in several pieces.
            candidate_spans: `[B, candidates, 2]` or `[B, pieces, candidates, 2]`: where the token
                that opens a candidate stands and where the one that closes it, -1 for none.
            attention_mask: shaped like `input_ids`; a piece without a real token is skipped.
            labels: `[B]`, the number of the right candidate.
            num_items_in_batch: what the summed loss is divided by (default: B).
            kwargs: handed to the encoder (`output_hidden_states`, ...).

        Raises:
            ValueError: shapes that do not fit.
        """
        return_dict = kwargs.pop("return_dict", None)
        if input_ids.dim() == 2:
            input_ids = input_ids[:, None]
            candidate_spans = candidate_spans[:, None]
            attention_mask = None if attention_mask is None else attention_mask[:, None]
        shape = tuple(candidate_spans.shape)
        if len(shape) != 4 or shape[:2] != input_ids.shape[:2] or shape[3] != 2:
            raise ValueError(
                "candidate_spans must be [questions, pieces, candidates, 2] with the questions and "
                f"pieces of input_ids {tuple(input_ids.shape[:2])}, got {shape}."
            )
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        held = candidate_spans[..., 0] >= 0  # [B, pieces, candidates]
        if input_ids.shape[1] == 1:  # no piece to skip, and nothing is read on the host
            flat_ids, flat_mask, spans = (
                input_ids[:, 0],
                attention_mask[:, 0],
                candidate_spans[:, 0],
            )
        else:
            present = attention_mask.any(-1)  # [B, pieces]
            flat_ids, flat_mask = input_ids[present], attention_mask[present]
            spans = candidate_spans[present]
        outputs = self.roberta(flat_ids, attention_mask=flat_mask, return_dict=True, **kwargs)
        scored = self._scores(outputs.last_hidden_state, spans.clamp(min=0))
        if input_ids.shape[1] == 1:
            scores = scored[:, None]
        else:
            scores = scored.new_zeros(held.shape)
            scores[present] = scored
        logits = scores.masked_fill(~held, 0.0).sum(1)
        logits = logits.masked_fill(~held.any(1), torch.finfo(logits.dtype).min)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        result = CandidateChoiceOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result

    def _scores(self, states: Tensor, spans: Tensor) -> Tensor:
        """Scores `[pieces, candidates]` from states `[pieces, N, hidden]`."""
        per_token = self.scorer(self.dropout(states))[..., 0]  # [pieces, N]
        per_token = per_token.to(torch.promote_types(per_token.dtype, torch.float32))
        first, last = spans.unbind(-1)
        if self.config.candidate_pooling == "marker":
            return per_token.gather(1, first)
        # Sums over the tokens between the markers, as differences of running sums.
        sums = per_token.cumsum(1)
        inside = sums.gather(1, (last - 1).clamp(min=0)) - sums.gather(1, first)
        return inside / (last - 1 - first).clamp(min=1)
