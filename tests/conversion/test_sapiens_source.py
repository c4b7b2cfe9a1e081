"""The Sapiens source: a real fairseq RoBERTa, read from a wheel into a Hugging Face directory.

Masked accuracy hides one residue at a time and asks for it. Measured on CPU in float32, top-1
accuracy and mean negative log-likelihood in nats (uniform over 20 letters: 0.05, 3.0):

    trastuzumab   0.767  1.010        nivolumab     0.894  0.528
    adalimumab    0.868  0.564        atezolizumab  0.856  0.732
    pembrolizumab 0.758  0.987        ipilimumab    0.907  0.470
    bevacizumab   0.724  1.191        durvalumab    0.967  0.263
"""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaForMaskedLM

import sapiens
from real_checkpoints import fetched

ACCURACIES = (0.767, 0.868, 0.758, 0.724, 0.894, 0.856, 0.907, 0.967)
NLLS = (1.010, 0.564, 0.987, 1.191, 0.528, 0.732, 0.470, 0.263)


@pytest.fixture(scope="module")
def folder():
    return fetched(sapiens.sapiens_checkpoint)


@torch.no_grad()
def masked_scores(model, tokenizer, text):
    """Return (top-1 accuracy, mean NLL) over all letters, each hidden once on its own."""
    ids = tokenizer(text, return_tensors="pt").input_ids  # [1, letters + 2]
    letters = ids[0, 1:-1]
    row = torch.arange(len(letters))
    masked = ids.repeat(len(letters), 1)  # row i hides letter i
    masked[row, row + 1] = tokenizer.mask_token_id
    log_probs = model(masked).logits[row, row + 1].log_softmax(-1)  # [letters, vocabulary]
    accuracy = (log_probs.argmax(-1) == letters).float().mean()
    return accuracy.item(), -log_probs[row, letters].mean().item()


def test_directory_opens_with_every_weight_matched(folder):
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, RobertaForMaskedLM)
    assert model.config.architectures == ["RobertaForMaskedLM"]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 568_985
    assert not model.roberta.embeddings.token_type_embeddings.weight.any()


def test_tokenizer_gives_one_token_per_letter_in_the_models_order(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ACDEFGHIKLMNPQRSTVWY").input_ids == [0, *range(4, 24), 2]
    assert tokenizer.convert_tokens_to_ids(list(sapiens.VOCABULARY)) == list(range(25))
    assert tokenizer.model_max_length == 144
    assert tokenizer(" E V\n<mask> L\t").input_ids == tokenizer("EV<mask>L").input_ids
    assert tokenizer("EvX1é").input_ids == [0, 7, 3, 3, 3, 3, 2]
    batch = tokenizer(["EVQ", "E"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[0, 7, 21, 17, 2], [0, 7, 2, 1, 1]]
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "EVQ"


def test_masked_accuracy_is_that_of_the_trained_model(folder):
    """Which a tensor in another's stead would lose."""
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = [masked_scores(model, tokenizer, text) for text in sapiens.HEAVY_CHAINS]
    accuracies, nlls = zip(*scores, strict=True)
    assert accuracies == pytest.approx(ACCURACIES, abs=0.01)  # a residue is 0.0085
    assert nlls == pytest.approx(NLLS, abs=0.005)
