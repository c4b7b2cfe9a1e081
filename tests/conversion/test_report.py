"""The report, the model card and the scores of source and result."""

import json

import pytest
import torch
import transformers
from conversion_cases import HEADS, LENGTH, LETTERS, ROBERTA_VOCABULARY, SIZES, convert, make_source
from transformers import AutoTokenizer

from mra_hf.conversion import REPORT_NAME
from mra_hf.evaluation import masked_token_scores
from sapiens import SPECIALS, letter_tokenizer


def test_report_and_card_state_the_facts(tmp_path):
    make_source(tmp_path / "source", "bert")
    report = convert(tmp_path / "source", tmp_path / "out", max_length=512, block_per_row=2)
    saved = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["source"] == "source" and saved["counts"] == report.counts()
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "import mra_hf",
        "AutoModelForMaskedLM",
        "32 of 256 block pairs per head (12.5%) at 512 tokens",
        "Up to 64 tokens the result is dense attention",
        "row r is learned row (r - 1) mod 40",
        "cost accuracy until training continues",
        "`bert.* -> roberta.*`",
    ):
        assert fact in card, fact
    assert "base_model" not in card and "## Scores" not in card
    for text in (card, json.dumps(saved), (tmp_path / "out" / "config.json").read_text()):
        assert str(tmp_path) not in text and "partial" not in text
    summary = report.summary()
    assert "dense up to 64 tokens" in summary and "tiled" in summary
    code = card.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(report.output)))
    exec(code, {})


@pytest.mark.parametrize("head", HEADS)
def test_code_of_the_card_runs_for_every_head(head, tmp_path):
    make_source(tmp_path / "source", "roberta", head)
    report = convert(tmp_path / "source", tmp_path / "out")
    code = report.model_card().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), {})


def test_scores_of_source_and_result_agree_at_full_budget(tmp_path):
    make_source(tmp_path / "source")
    text = "".join(LETTERS) * 20
    report = convert(tmp_path / "source", tmp_path / "out", text=[text], max_length=200)
    assert [(row.model, row.length) for row in report.scores] == [
        ("source", LENGTH),
        ("result", LENGTH),
        ("result", 200),
    ]
    source, same, longer = report.scores
    assert source.accuracy == same.accuracy and source.nll == pytest.approx(same.nll, abs=1e-5)
    assert source.n_masked == same.n_masked == longer.n_masked
    assert (source.n_chunks, longer.n_chunks) == (14, 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "untrained" in card and f"{source.nll:.3f}" in card and "untrained" in report.summary()
    (tmp_path / "text.txt").write_text(text)
    again = convert(tmp_path / "source", tmp_path / "again", text=tmp_path / "text.txt")
    assert again.scores[0] == source


def test_scores_of_a_builtin_source_use_its_own_attention(tmp_path):
    make_source(tmp_path / "source", "mra", max_position_embeddings=64)
    report = convert(tmp_path / "source", tmp_path / "out", text=["ABCDEFGH" * 40], max_length=64)
    source, result = report.scores
    assert source.attention == result.attention == "MRA-2"
    assert source.nll == pytest.approx(result.nll, abs=1e-5)


def test_the_same_tokens_are_masked_whatever_the_chunk_length(tmp_path):
    seen = {}

    class Spy(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            real = [row[m == 1].tolist() for row, m in zip(input_ids, attention_mask, strict=True)]
            assert all(row[0] == 0 and row[-1] == 2 for row in real)
            seen[self.length] = seen.get(self.length, []) + [t for row in real for t in row[1:-1]]
            logits = torch.zeros(*input_ids.shape, SIZES["vocab_size"])
            return transformers.modeling_outputs.MaskedLMOutput(logits=logits)

    tokenizer = letter_tokenizer(ROBERTA_VOCABULARY, SPECIALS, LENGTH)
    scores = []
    for length in (3, 10, 33, 1000):
        spy = Spy()
        spy.length = length
        scores.append(masked_token_scores(spy, tokenizer, ["ABCDEFGHI" * 9, "?XYZ"], length=length))
    assert len({tuple(tokens) for tokens in seen.values()}) == 1
    [stream] = {tuple(tokens) for tokens in seen.values()}
    assert stream.count(tokenizer.mask_token_id) == scores[0].n_masked > 0
    assert stream[81] == tokenizer.unk_token_id  # special tokens are never masked
    assert {score.n_masked for score in scores} == {scores[0].n_masked}
    assert [score.n_chunks for score in scores] == [85, 11, 3, 1]
    assert scores[0].nll == pytest.approx(torch.tensor(31.0).log().item(), abs=1e-5)


def test_scores_of_bad_arguments_are_refused(tmp_path):
    model = make_source(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    for texts, arguments in (
        ([""], {"length": 10}),
        (["???"], {"length": 10}),
        (["ABC"], {"length": 2}),
        (["ABC"], {"length": 10, "fraction": 0}),
        (["ABC"], {"length": 10, "batch_size": 0}),
    ):
        with pytest.raises(ValueError):
            masked_token_scores(model, tokenizer, texts, **arguments)
    scores = masked_token_scores(model, tokenizer, "A", length=10)
    assert (scores.n_masked, scores.n_chunks, scores.n_tokens) == (1, 1, 1)
    limited = masked_token_scores(model, tokenizer, "ABC" * 40, length=12, max_tokens=25)
    assert (limited.n_chunks, limited.n_tokens) == (3, 25)
    first = masked_token_scores(model, tokenizer, "ABC" * 40, length=12, max_chunks=2)
    assert (first.n_chunks, first.n_tokens) == (2, 20)


def test_agreement_takes_the_place_of_scores_without_a_masked_lm_head(tmp_path):
    make_source(tmp_path / "source", "bert", "ForSequenceClassification")
    text = "".join(LETTERS) * 20
    report = convert(tmp_path / "source", tmp_path / "out", text=[text], max_length=200)
    assert not report.scores
    assert [(row.model, row.attention, row.length) for row in report.agreement] == [
        ("source", "dense", LENGTH),
        ("result", "MRA-2", LENGTH),
        ("result", "MRA-2", 200),
    ]
    source, same, longer = report.agreement
    assert source.states == pytest.approx(same.states, abs=1e-5) and source.states < 1 - 1e-5
    assert source.pooled == pytest.approx(1) == pytest.approx(same.pooled, abs=1e-5)
    assert longer.states < 1 - 1e-5 and longer.n_tokens == 520
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Agreement with the source" in card and f"{longer.states:.3f}" in card
    assert f"states {longer.states:.3f}" in report.summary()
    saved = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert saved["agreement"][2]["pooled"] == longer.pooled


def test_agreement_with_a_source_of_this_family(tmp_path):
    make_source(tmp_path / "source", head="Model")
    convert(tmp_path / "source", tmp_path / "first", max_length=128)
    report = convert(tmp_path / "first", tmp_path / "out", max_length=128, text=["AEIOU" * 30])
    source, result = report.agreement
    assert source.attention == "MRA-2" and source[3:] == pytest.approx(result[3:], abs=1e-5)
