"""Agreement of a long encoder with the short one: windows, chunks, pooled embeddings."""

import pytest
import torch
from transformers import RobertaModel

from mra_hf.evaluation.agreement import (
    SourceStates,
    most_central,
    pieces,
    states_in_windows,
    states_of_pieces,
    windows,
)
from tiny_models import TOKENS, VOCABULARY, roberta_config, word_tokenizer

BORDERS = (torch.tensor([0]), torch.tensor([2]))
TEXTS = [" ".join(f"w{5 + (i * k) % 80}" for i in range(n)) for k, n in ((3, 700), (7, 120))]


def test_windows_overlap_and_end_with_the_text():
    assert windows(1000, 510, 256) == [(0, 510), (256, 766), (490, 1000)]
    assert windows(300, 510, 256) == [(0, 300)]


def test_each_token_is_read_where_it_is_most_central():
    places = windows(1000, 510, 256)
    chosen = most_central(places, 1000)
    for token in (0, 254, 383, 500, 640, 999):
        middles = [(start + end - 1) / 2 for start, end in places]
        holding = [row for row, (start, end) in enumerate(places) if start <= token < end]
        assert chosen[token] == min(holding, key=lambda row: abs(token - middles[row]))


def test_pieces_cover_the_text():
    assert pieces(10, 4) == [(0, 4), (4, 8), (8, 10)]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    model = RobertaModel(roberta_config(hidden_dropout_prob=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "LayerNorm.weight" in name  # around 1, else every text looks the same
            parameter.normal_(1.0 if is_scale else 0.0, 0.3)
    return model.train()


@torch.no_grad()
def test_states_of_a_text_that_fits_one_window_are_those_of_the_model(encoder):
    ids = torch.randint(5, VOCABULARY, (100,))
    states = states_in_windows(encoder.eval(), ids, BORDERS, 110, 50)
    whole = torch.cat([BORDERS[0], ids, BORDERS[1]])[None]
    torch.testing.assert_close(states, encoder(whole).last_hidden_state[0, 1:-1])
    [piece] = states_of_pieces(encoder, ids, BORDERS, [(0, 100)])
    torch.testing.assert_close(piece[1:-1], states)


def source_states(encoder, **changes):
    arguments = {"width": TOKENS, "longest": 500} | changes
    return SourceStates(encoder, word_tokenizer(), TEXTS, **arguments)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_source_agrees_with_itself_where_one_window_holds_the_document(pooling, encoder):
    states = source_states(encoder, longest=TOKENS, pooling=pooling)
    found = states.agreement(encoder, TOKENS)
    assert found.states == pytest.approx(1, abs=1e-5)
    assert found.pooled == pytest.approx(1, abs=1e-5)
    assert (found.n_tokens, found.n_documents) == (820, 4)
    assert encoder.training


def test_documents_are_cut_and_their_middle_differs_from_chunks(encoder):
    states = source_states(encoder)
    assert [len(ids) for ids in states.documents] == [498, 202, 120]
    found = states.agreement(encoder, TOKENS)
    assert found.pooled == pytest.approx(1, abs=1e-5)  # the same chunks
    assert 0 < found.states < 0.9999
    other = RobertaModel(roberta_config()).eval()
    assert abs(states.agreement(other, TOKENS).states) < 0.6


def test_only_the_first_tokens_are_read(encoder):
    states = source_states(encoder, max_tokens=150)
    assert [len(ids) for ids in states.documents] == [150]


def test_the_embedding_of_the_first_token_is_the_mean_over_chunks(encoder):
    states = source_states(encoder, pooling="cls", max_tokens=300)
    pieces_of_it = [(0, TOKENS - 2), (TOKENS - 2, 300)]
    with torch.no_grad():
        whole = states_of_pieces(encoder.eval(), states.documents[0], BORDERS, pieces_of_it)
        expected = torch.stack([x[0] for x in whole]).mean(0)
    torch.testing.assert_close(states.pooled[0].float(), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, cls"),
        ({"width": 2}, "width"),
        ({"longest": 20}, "longest"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, said, encoder):
    with pytest.raises(ValueError, match=said):
        source_states(encoder, **changes)
