"""The embedded English checkpoints: what they are, that they load anywhere, that they read."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaForMaskedLM, pipeline

import mra_hf
from mra_hf.english import (
    LENGTHS,
    english_checkpoint,
    english_passage,
    english_sample,
    write_half,
)
from mra_hf.evaluation import masked_token_scores


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(english_checkpoint())


def test_both_are_small_and_load_in_float32(tokenizer):
    classes = {512: RobertaForMaskedLM, 4096: mra_hf.MraForMaskedLM}
    assert tuple(classes) == LENGTHS
    for length, kind in classes.items():
        folder = english_checkpoint(length)
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
        model = AutoModelForMaskedLM.from_pretrained(folder)
        assert isinstance(model, kind) and model.dtype == torch.float32
        assert model.config.max_position_embeddings == length + 2
        assert AutoTokenizer.from_pretrained(folder).model_max_length == length
        assert len(tokenizer) == model.config.vocab_size


def test_another_length_is_refused():
    with pytest.raises(ValueError, match="512, 4096"):
        english_checkpoint(1024)


def test_the_sample_is_a_document_of_about_4000_tokens(tokenizer):
    ids = tokenizer(english_sample(), verbose=False)["input_ids"]
    assert 3900 <= len(ids) <= 4096 and tokenizer.unk_token_id not in ids


def test_it_reads_english(tokenizer):
    fill = pipeline("fill-mask", model=str(english_checkpoint()))
    for text, word in (
        ("She was so happy that she <mask> not speak a word.", "could"),
        ("They went out of the house and walked to the <mask>.", None),
        ("He sat down by the side <mask> the road.", "of"),
    ):
        best = fill(text)
        assert word is None or word in [guess["token_str"].strip() for guess in best[:2]]


def test_a_conversion_loses_little_and_training_gives_more_back(tokenizer, tmp_path):
    mra_hf.convert_checkpoint(english_checkpoint(), tmp_path / "untrained", block_per_row=16)
    text = english_passage()
    nll = {}
    for name, folder, length in (
        ("source", english_checkpoint(), 512),
        ("untrained", tmp_path / "untrained", 4096),
        ("continued", english_checkpoint(4096), 4096),
    ):
        model = AutoModelForMaskedLM.from_pretrained(folder)
        nll[name] = masked_token_scores(model, tokenizer, text, length=length, max_tokens=16384).nll
    assert nll["untrained"] < nll["source"] + 0.06
    assert nll["continued"] < nll["source"]


def test_the_passage_is_of_about_32000_tokens_and_holds_the_sample(tokenizer):
    ids = tokenizer(english_passage(), verbose=False)["input_ids"]
    assert 32_000 <= len(ids) <= 32_768 and tokenizer.unk_token_id not in ids
    assert english_sample()[200:400] in english_passage()


def test_half_on_disk_is_float32_in_memory(tmp_path):
    write_half(english_checkpoint(), tmp_path / "copy")
    ours, copy = (
        AutoModelForMaskedLM.from_pretrained(folder)
        for folder in (english_checkpoint(), tmp_path / "copy")
    )
    assert copy.dtype == torch.float32
    for mine, theirs in zip(ours.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)
