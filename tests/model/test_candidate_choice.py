"""`MraForCandidateChoice`: scores, chunks, gradients, saving."""

import pytest
import torch
import torch.nn.functional as F

import mra_hf
from mra_hf import MraForCandidateChoice
from tiny_models import mra_config, padded_batch

LOWEST = torch.finfo(torch.float32).min


def question(chunks=1, length=100, candidates=3):
    """Two questions; the second lacks its last candidate and, of several, its last chunk."""
    input_ids = torch.randint(5, 100, (2, chunks, length))
    mask = torch.ones_like(input_ids)
    first = torch.arange(candidates) * 5 + 1
    spans = torch.stack([first, first + 3], -1).expand(2, chunks, candidates, 2).clone()
    spans[1, :, -1] = -1
    if chunks > 1:
        mask[1, -1] = 0
        spans[1, -1] = -1
    return {
        "input_ids": input_ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "candidate_spans": spans,
    }


def model_of(**changes) -> MraForCandidateChoice:
    torch.manual_seed(0)
    return MraForCandidateChoice(mra_config(initializer_range=0.2, **changes)).eval()


@pytest.mark.parametrize("pooling", ["marker", "mean"])
def test_scores_are_linear_in_the_states_of_the_candidates(pooling):
    model, batch = model_of(candidate_pooling=pooling), question()
    output = model(**batch, labels=torch.tensor([2, 0]))
    states = model.roberta(batch["input_ids"][:, 0]).last_hidden_state
    expected = torch.full((2, 3), LOWEST)
    for row in range(2):
        for number in range(3 - row):
            first, last = batch["candidate_spans"][row, 0, number]
            pooled = states[row, first]
            if pooling == "mean":
                pooled = states[row, first + 1 : last].mean(0)
            expected[row, number] = model.scorer(pooled)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(expected, torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)
    flat = {name: tensor[:, 0] for name, tensor in batch.items()}
    torch.testing.assert_close(model(**flat).logits, output.logits)


@pytest.mark.parametrize("pooling", ["marker", "mean"])
def test_scores_of_chunks_add_up(pooling):
    model, batch = model_of(candidate_pooling=pooling), question(chunks=3)
    logits = model(**batch).logits
    parts = [
        model(**{name: tensor[:, i : i + 1] for name, tensor in batch.items()}).logits
        for i in range(3)
    ]
    torch.testing.assert_close(logits[0], sum(part[0] for part in parts), rtol=1e-4, atol=1e-4)
    both = parts[0][1, :2] + parts[1][1, :2]  # its third chunk holds nothing
    torch.testing.assert_close(logits[1, :2], both, rtol=1e-4, atol=1e-4)
    assert logits[1, 2] == LOWEST


def test_padding_changes_nothing():
    model, batch = model_of(), question(chunks=2)
    wider = {
        "input_ids": F.pad(batch["input_ids"], (0, 40), value=1),
        "attention_mask": F.pad(batch["attention_mask"], (0, 40)),
        "candidate_spans": F.pad(batch["candidate_spans"], (0, 0, 0, 2), value=-1),
    }
    logits = model(**wider).logits
    assert (logits[:, 3:] == LOWEST).all()
    torch.testing.assert_close(logits[:, :3], model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_every_weight_gets_a_gradient_and_the_loss_is_divided_by_the_count():
    model, batch = model_of().train(), question(chunks=2)
    model(**batch, labels=torch.tensor([1, 0])).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []
    model.eval()
    labels = torch.tensor([1, 0])
    whole = model(**batch, labels=labels).loss
    halves = model(**batch, labels=labels, num_items_in_batch=4).loss
    torch.testing.assert_close(halves * 2, whole)


def test_it_is_saved_and_loaded_whole(tmp_path):
    model, batch = model_of(candidate_pooling="mean"), question()
    model.save_pretrained(tmp_path)
    loaded, info = MraForCandidateChoice.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.candidate_pooling == "mean"
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    dense = MraForCandidateChoice.from_pretrained(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(dense(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)
    encoder = mra_hf.MraForMaskedLM(mra_config())
    encoder.save_pretrained(tmp_path / "mlm")
    _, info = MraForCandidateChoice.from_pretrained(tmp_path / "mlm", output_loading_info=True)
    assert info["missing_keys"] == {"scorer.weight"}


def test_tuples_and_hidden_states_as_usual():
    model, batch = model_of(), question()
    as_tuple = model(**batch, labels=torch.tensor([0, 1]), return_dict=False)
    assert len(as_tuple) == 2 and as_tuple[1].shape == (2, 3)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3


def test_wrong_spans_and_settings_are_refused():
    model, batch = model_of(), question(chunks=2)
    with pytest.raises(ValueError, match=r"candidate_spans must be .* got \(2, 1, 3, 2\)"):
        model(**(batch | {"candidate_spans": batch["candidate_spans"][:, :1]}))
    with pytest.raises(ValueError, match="candidate_pooling must be one of"):
        mra_config(candidate_pooling="last")
    with pytest.raises(ValueError, match="sparse_prediction must be True or False"):
        mra_config(sparse_prediction="yes")


def test_the_model_itself_can_predict_labelled_positions_only():
    model = mra_hf.MraForMaskedLM(mra_config())
    batch = padded_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 3:20:4] = batch["input_ids"][:, 3:20:4]
    grads = []
    for sparse in (False, True):
        model.config.sparse_prediction = sparse
        model.train().zero_grad()
        torch.manual_seed(1)
        output = model(**batch, labels=labels)
        output.loss.backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
        assert output.logits.shape == ((15, 100) if sparse else (3, 100, 100))
    for dense, sparse in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)
    assert model.eval()(**batch, labels=labels).logits.shape == (3, 100, 100)
