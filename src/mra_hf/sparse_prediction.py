"""LM logits at labelled positions only; full logits would dominate memory on long sequences."""

import contextlib
import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


def predict_labelled_positions(model: PreTrainedModel) -> None:
    """Make `model` compute logits at labelled positions only while it trains.

    Loss and gradients stay the same: positions labelled -100 take no part in either. The logits of
    a training step are then `[labelled, vocabulary]`; evaluation is not changed.

    Raises:
        ValueError: the model has no head apart from its encoder.
    """
    if masked_lm_head(model) is None:
        raise ValueError(
            "sparse_prediction needs a model with an lm_head, "
            f"and {type(model).__name__} has none; pass --sparse_prediction false."
        )
    _switches_of(model)["training"] = True


@contextlib.contextmanager
def labelled_logits(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a call of `model` with labels returns logits `[labelled, vocabulary]`.

    The caller still calls the whole model, whatever wraps it: encoder and head cannot be called
    separately where their weights are sharded.
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
    switches = _switches_of(model)
    switches["always"] = True
    try:
        yield
    finally:
        switches["always"] = False


def _switches_of(model: PreTrainedModel) -> dict[str, bool]:
    """Replace the forward of `model`, once, by one that obeys the returned switches."""
    switches = getattr(model.forward, "labelled_only", None)
    if switches is not None:
        return switches
    switches = {"training": False, "always": False}
    all_logits, head = model.forward, masked_lm_head(model)

    @functools.wraps(all_logits)
    def forward(input_ids=None, *args, labels=None, num_items_in_batch=None, **kwargs):
        labelled_only = switches["always"] or (switches["training"] and model.training)
        if labels is None or not labelled_only:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return all_logits(input_ids, *args, labels=labels, **kwargs)
        states = model.base_model(input_ids, *args, **kwargs).last_hidden_state  # [B, N, hidden]
        assert head is not None  # `labelled_logits` and `sparse_prediction` are for models with one
        return output_at_labels(head, states, labels, num_items_in_batch)

    vars(forward)["labelled_only"] = switches
    model.forward = forward
    return switches


def masked_lm_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the head that turns hidden states into logits; None if the model does not name it."""
    return getattr(model, "lm_head", None) or getattr(model, "cls", None)


def output_at_labels(
    head: nn.Module, states: Tensor, labels: Tensor, num_items_in_batch: "Tensor | int | None"
) -> MaskedLMOutput:
    """Return the loss and the logits `[labelled, vocabulary]` of states `[B, N, hidden]` where
    labels `[B, N]` are not -100.
    """
    labelled = labels != -100
    logits = head(states[labelled])
    return MaskedLMOutput(
        loss=cross_entropy(logits, labels[labelled], num_items_in_batch), logits=logits
    )


def cross_entropy(logits: Tensor, targets: Tensor, count: "Tensor | int | None") -> Tensor:
    """Return the sum over the targets, divided by `count` (default None: their number)."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(1, len(targets)) if count is None else count)
