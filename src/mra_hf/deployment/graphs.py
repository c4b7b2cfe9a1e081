"""What a graph of each head takes and returns: tensors by name, an example, sizes that may vary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Heads whose inputs are not [batch, tokens] only, and outputs that are not named "logits".
_CHOICES, _CANDIDATES = "MraForMultipleChoice", "MraForCandidateChoice"
_OUTPUTS = {
    "MraForQuestionAnswering": ("start_logits", "end_logits"),
    "MraModel": ("last_hidden_state",),
}
#: Modes of pooling that a graph can hold.
POOLING_MODES = ("mean", "cls")


class Graph(nn.Module):
    """A model with tensors in and a tuple of tensors out.

    Args:
        model: of the family, in eval mode.
        pooling: of a sentence encoder, None or one of `POOLING_MODES`: adds the output
            `sentence_embedding` `[B, hidden_size]`.
        normalize: divide that embedding by its length.
    """

    def __init__(self, model: PreTrainedModel, pooling: str | None = None, normalize: bool = False):
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize
        head = type(model).__name__
        self.output_names = _OUTPUTS.get(head, ("logits",))
        self.input_names: tuple[str, ...] = ("input_ids", "attention_mask")
        if head == _CANDIDATES:
            self.input_names += ("candidate_spans",)
        elif model.config.type_vocab_size > 1:
            self.input_names += ("token_type_ids",)
        if head == "MraModel" and model.pooler is not None:
            self.output_names += ("pooler_output",)
        if pooling is not None:
            self.output_names += ("sentence_embedding",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Tensor | None = None):
        """Tensors in the order of `input_names`; returns those of `output_names`."""
        inputs: dict[str, Tensor | None] = {"input_ids": input_ids}
        inputs["attention_mask"] = attention_mask
        if len(self.input_names) == 3:
            inputs[self.input_names[2]] = other
        outputs = self.model(**inputs, return_dict=True)
        named = [outputs[name] for name in self.output_names if name != "sentence_embedding"]
        if self.pooling is not None:
            named.append(self._pool(named[0], attention_mask))
        return tuple(named)

    def _pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            embedding = states[:, 0]
        else:
            real = attention_mask[..., None].to(states.dtype)
            embedding = (states * real).sum(1) / real.sum(1).clamp_min(1e-9)
        return F.normalize(embedding, dim=-1) if self.normalize else embedding

    def example(self, batch: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs; the last sample is padded by a third on the right."""
        config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        head = type(self.model).__name__
        shape = (batch, 2, tokens) if head == _CHOICES else (batch, tokens)
        lowest = min(config.pad_token_id + 1, config.vocab_size - 1)
        ids = torch.randint(lowest, config.vocab_size, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, ..., tokens - tokens // 3 :] = 0
        ids = ids.masked_fill(mask == 0, config.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.input_names[-1] == "token_type_ids":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        if head == _CANDIDATES:
            spans = torch.tensor([[0, 1], [1, 2], [0, 2]]).clamp(max=tokens - 1)
            inputs["candidate_spans"] = spans.expand(batch, -1, -1).clone()
        return inputs

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Of each input: dimension -> the size that may vary."""
        batch = torch.export.Dim("batch")
        tokens = torch.export.Dim("tokens", min=2, max=self.model.config.max_tokens)
        head = type(self.model).__name__
        of_text: dict[int, Any] = {0: batch, 1: tokens}
        if head == _CHOICES:
            of_text = {0: batch, 1: torch.export.Dim("choices"), 2: tokens}
        shapes = dict.fromkeys(self.input_names, of_text)
        if head == _CANDIDATES:
            shapes["candidate_spans"] = {0: batch, 1: torch.export.Dim("candidates")}
        return shapes
