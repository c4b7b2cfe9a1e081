"""Logits at the labelled places alone: all of a long training example take most of its memory."""

import contextlib
import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


def predict_masked_places(model: PreTrainedModel) -> None:
    """Make `model` compute logits at the labelled places alone while it trains.

    Loss and gradients are those of all logits: places labelled -100 take no part in either. The
    logits of a training step are then `[labelled, vocabulary]`; evaluation is not changed.

    Raises:
        ValueError: the model has no head apart from its encoder.
    """
    if masked_lm_head(model) is None:
        raise ValueError(
            f"sparse_prediction needs a model with an lm_head, and {type(model).__name__} has "
            "none; pass --sparse_prediction false."
        )
    _let_predict_labels_alone(model)["training"] = True


@contextlib.contextmanager
def labelled_logits(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a call of `model` with labels returns logits `[labelled, vocabulary]`.

    The call itself stays one of the whole model, whatever wraps it: its parts cannot be called
    alone where their weights are sharded.
    """
    if masked_lm_head(model) is None:
        all_logits = model.forward

        @functools.wraps(all_logits)
        def forward(*args, labels, **kwargs):
            output = all_logits(*args, **kwargs)
            return MaskedLMOutput(logits=output.logits[labels != -100])

        model.forward = forward
        try:
            yield
        finally:
            model.forward = all_logits
        return
    wanted = _let_predict_labels_alone(model)
    wanted["always"] = True
    try:
        yield
    finally:
        wanted["always"] = False


def _let_predict_labels_alone(model: PreTrainedModel) -> dict[str, bool]:
    """Replace the forward of `model` by one that obeys the returned switches."""
    wanted = getattr(model.forward, "labels_alone", None)
    if wanted is not None:
        return wanted
    wanted = {"training": False, "always": False}
    all_logits, head = model.forward, masked_lm_head(model)

    @functools.wraps(all_logits)
    def forward(input_ids=None, *args, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None or not (wanted["always"] or (wanted["training"] and model.training)):
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return all_logits(input_ids, *args, labels=labels, **kwargs)
        states = model.base_model(input_ids, *args, **kwargs).last_hidden_state  # [B, N, hidden]
        return output_at_labels(head, states, labels, num_items_in_batch)

    forward.labels_alone = wanted
    model.forward = forward
    return wanted


def masked_lm_head(model: PreTrainedModel) -> nn.Module | None:
    """The part of a masked language model that turns hidden states into logits, if it is apart."""
    return getattr(model, "lm_head", None) or getattr(model, "cls", None)


def output_at_labels(
    head: nn.Module, states: Tensor, labels: Tensor, num_items_in_batch: "Tensor | int | None"
) -> MaskedLMOutput:
    """Loss and logits `[labelled, vocabulary]` of states `[B, N, hidden]` where labels are not
    -100.
    """
    labelled = labels != -100
    logits = head(states[labelled])
    return MaskedLMOutput(
        loss=cross_entropy(logits, labels[labelled], num_items_in_batch), logits=logits
    )


def cross_entropy(logits: Tensor, targets: Tensor, count) -> Tensor:
    """Summed over the targets, divided by `count` (default None: their number)."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(1, len(targets)) if count is None else count)
