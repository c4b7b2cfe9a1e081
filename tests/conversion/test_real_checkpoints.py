"""Conversion of real weights: two masked language models of antibodies and an English encoder.

Full budget equals the source. Smaller budgets and tiled positions cost something until training
continues; the measured figures are written to the output, and only bands are asserted.
"""

from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import mra_hf
import sapiens
from mra_hf.conversion import convert_checkpoint
from mra_hf.evaluation import masked_token_scores
from real_checkpoints import antiberty_checkpoint, fetched, minilm_checkpoint

LENGTH = 4096
SOURCES = {
    "sapiens": sapiens.sapiens_checkpoint,
    "antiberty": antiberty_checkpoint,
    "minilm": minilm_checkpoint,
}
SOURCE_LENGTHS = {"sapiens": 144, "antiberty": 512, "minilm": 512}
#: Sapiens is small; the others take long.
masked_lms = pytest.mark.parametrize(
    "name", ["sapiens", pytest.param("antiberty", marks=pytest.mark.slow)]
)
#: About 4600 letters: the chains one after the other, five times.
CHAINS = [*sapiens.HEAVY_CHAINS] * 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (directory of the source, directory converted to 4096 tokens), made when asked."""
    made = {}

    def folders_of(name):
        if name not in made:
            source = fetched(SOURCES[name])
            output = tmp_path_factory.mktemp("converted") / name
            report = convert_checkpoint(source, output, max_length=LENGTH)
            assert report.source_length == SOURCE_LENGTHS[name]
            made[name] = source, output, report
        return made[name]

    return folders_of


@pytest.fixture(scope="module")
def record(request):
    """Write a line to the terminal, past pytest's capture."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line):
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    return write


def with_budget(model, block_per_row):
    return mra_hf.set_attention(model, "mra2", block_per_row=block_per_row)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@masked_lms
@torch.no_grad()
def test_masked_lm_at_full_budget_equals_the_source(name, folders):
    folder, output, report = folders(name)
    layers = AutoModelForMaskedLM.from_pretrained(output).config.num_hidden_layers
    assert report.counts()["new"] == layers and report.counts()["tiled"] == 1  # distance biases
    tokenizer = AutoTokenizer.from_pretrained(output)
    source = AutoModelForMaskedLM.from_pretrained(folder).eval()
    result = with_budget(AutoModelForMaskedLM.from_pretrained(output).eval(), 16)
    batch = tokenizer(list(sapiens.HEAVY_CHAINS), return_tensors="pt", padding=True)
    real = batch["attention_mask"] == 1
    expected, got = (model(**batch).logits[real] for model in (source, result))
    assert relative_error(got, expected) < 1e-4
    length = SOURCE_LENGTHS[name] - 32  # what the bias leaves open
    one, other = (
        masked_token_scores(model, tokenizer, sapiens.HEAVY_CHAINS, length=length)
        for model in (source, result)
    )
    assert one.accuracy == other.accuracy and one.n_masked > 100
    assert other.nll == pytest.approx(one.nll, rel=1e-4)


def scores_by_budget(model, budgets, score):
    """budget or None for dense attention -> `score()`."""
    results = {}
    for block_per_row in (*budgets, None):
        if block_per_row is None:
            model.set_attn_implementation("sdpa")
        else:
            with_budget(model, block_per_row)
        results[block_per_row] = score()
    return results


def line(name, what, block_per_row, accuracy, nll, n_masked):
    kind = "dense" if block_per_row is None else f"block_per_row {block_per_row}"
    return (
        f"{name:<10} {what:<12} {kind:<16} accuracy {accuracy:.3f}  loss {nll:.3f}  "
        f"({n_masked} masked)"
    )


@masked_lms
def test_masked_lm_with_small_budgets_on_single_chains(name, folders, record):
    """One chain at a time: about 120 tokens, 4 block rows."""
    _, output, _ = folders(name)
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForMaskedLM.from_pretrained(output).eval()

    def score():
        scores = [
            masked_token_scores(model, tokenizer, chain, length=SOURCE_LENGTHS[name], fraction=0.3)
            for chain in sapiens.HEAVY_CHAINS
        ]
        total = sum(one.n_masked for one in scores)
        accuracy = sum(one.accuracy * one.n_masked for one in scores) / total
        return accuracy, sum(one.nll * one.n_masked for one in scores) / total, total

    record("")
    results = scores_by_budget(model, (1, 2, 3, 4), score)
    for block_per_row, result in results.items():
        record(line(name, "single chains", block_per_row, *result))
    dense = results[None]
    assert results[4] == pytest.approx(dense, rel=1e-4)
    assert results[2][0] > dense[0] - 0.2 and results[2][1] < dense[1] + 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sapiens", "antiberty"])
def test_masked_lm_with_small_budgets_on_joined_chains(name, folders, record):
    """Chains joined to the source's length and to 4096 tokens.

    No source has seen chains one after the other, so dense attention does badly here as well: it
    is the yardstick of each row.
    """
    _, output, _ = folders(name)
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForMaskedLM.from_pretrained(output).eval()
    record("")
    for length in (SOURCE_LENGTHS[name], LENGTH):

        def score(length=length):
            scores = masked_token_scores(
                model, tokenizer, CHAINS, length=length, max_tokens=LENGTH - 2
            )
            return scores.accuracy, scores.nll, scores.n_masked

        results = scores_by_budget(model, (4, 8), score)
        for block_per_row, result in results.items():
            record(line(name, f"{length} tokens", block_per_row, *result))
        for block_per_row in (4, 8):
            assert results[block_per_row][0] > results[None][0] - 0.1
            assert results[block_per_row][1] < results[None][1] + 0.3


def english_ids(tokenizer):
    """`[1, 4096]`: the beginning of the language reference that comes with Python."""
    text = "\n".join(topics[name] for name in sorted(topics))[:40000]
    ids = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    assert ids.shape == (1, LENGTH)
    return ids


@torch.no_grad()
def hidden_states(model, ids):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@pytest.mark.slow
def test_english_encoder_at_full_budget_equals_the_source(folders):
    folder, output, report = folders("minilm")
    assert report.counts()["new"] == 6  # distance biases
    # What the bias leaves open: 15 blocks.
    ids = english_ids(AutoTokenizer.from_pretrained(output)).view(-1, 512)[:2, :480]
    source = AutoModel.from_pretrained(folder).eval()
    result = with_budget(AutoModel.from_pretrained(output).eval(), 16)
    expected, got = hidden_states(source, ids), hidden_states(result, ids)
    assert relative_error(got, expected) < 1e-5
    types = torch.zeros_like(ids)
    types[:, 100:] = 1
    pair = {"input_ids": ids, "token_type_ids": types}
    with torch.no_grad():
        expected, got = source(**pair).pooler_output, result(**pair).pooler_output
    assert relative_error(got, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "bands"),
    [(512, {4: 0.85, 8: 0.93, 16: 0.9999}), (LENGTH, {4: 0.8, 8: 0.8, 128: 0.9999})],
)
def test_english_encoder_with_small_budgets_stays_near_dense(length, bands, folders, record):
    """Cosine of the last hidden states with those of dense attention, mean over tokens."""
    _, output, _ = folders("minilm")
    ids = english_ids(AutoTokenizer.from_pretrained(output)).view(-1, length)
    model = AutoModel.from_pretrained(output).eval()
    model.set_attn_implementation("sdpa")
    dense = hidden_states(model, ids)
    record("")
    for block_per_row, band in bands.items():
        states = hidden_states(with_budget(model, block_per_row), ids)
        cosine = F.cosine_similarity(states, dense, dim=-1).mean().item()
        record(
            f"minilm     {length:>5} tokens  block_per_row {block_per_row:<3} cosine {cosine:.4f}"
        )
        assert cosine > band
