"""The tokenizer of a result gives the ids of the source's at any length, or is refused."""

import json

import pytest
import transformers
from conversion_cases import convert, make_source
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mra_hf import MraForSequenceClassification
from mra_hf.conversion import tokenizers as saved_tokenizers

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 66}
CODES = "h e 10\nhe l 9\nhel l 8\nhell o</w> 7\nw o 6\nwo r 5\nwor l 4\nworl d</w> 3\n"
WORDS = ("hello", "world", "he@@", "l@@", "lo", "h@@", "e@@", "o")


def bertweet(folder):
    """A source whose tokenizer saves its vocabulary in another order than it reads it."""
    folder.mkdir()
    (folder / "bpe.codes").write_text(CODES)
    (folder / "vocab.txt").write_text("".join(f"{word} 1\n" for word in WORDS))
    config = transformers.RobertaConfig(**SIZES, vocab_size=13, tokenizer_class="BertweetTokenizer")
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)


def klue(folder):
    """RoBERTa with BERT's tokenizer, which gives token types, and a single type."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(95))]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    config = transformers.RobertaConfig(**SIZES, vocab_size=100, type_vocab_size=1)
    transformers.RobertaModel(config).save_pretrained(folder)


def test_a_tokenizer_that_does_not_survive_saving_is_copied(tmp_path):
    bertweet(tmp_path / "source")
    source = AutoTokenizer.from_pretrained(tmp_path / "source")
    texts = ["hello world", "hello hell", "worlds <mask> o"]
    expected = [source(text).input_ids for text in texts]
    source.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(texts[0]).input_ids != expected[0], "survives: take another tokenizer here"
    convert(tmp_path / "source", tmp_path / "out", max_length=128)
    result = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [result(text).input_ids for text in texts] == expected
    assert result(*texts[:2]).input_ids == source(*texts[:2]).input_ids
    assert result.model_max_length == 128


def test_a_tokenizer_that_can_be_neither_saved_nor_copied_is_refused(tmp_path, monkeypatch):
    make_source(tmp_path / "source")

    class Other(AutoTokenizer):
        @classmethod
        def from_pretrained(cls, folder):
            opened = AutoTokenizer.from_pretrained(folder)
            return lambda *texts, **kwargs: {
                name: [0, *numbers] for name, numbers in opened(*texts, **kwargs).items()
            }

    monkeypatch.setattr(saved_tokenizers, "AutoTokenizer", Other)
    with pytest.raises(ValueError, match=r"does not survive being saved.*--tokenizer"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_truncation_and_padding_in_tokenizer_json_are_removed(source_type, tmp_path):
    make_source(tmp_path / "source", source_type)
    file = tmp_path / "source" / "tokenizer.json"
    text = " ".join("ABCDEFGHIJ" * 6)
    tokenizer = Tokenizer.from_file(str(file))
    expected = tokenizer.encode(text).ids
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=1, pad_token="<pad>")
    tokenizer.save(str(file))
    assert len(Tokenizer.from_file(str(file)).encode(text).ids) == 16
    report = convert(tmp_path / "source", tmp_path / "out")
    assert (
        Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == expected
    )
    assert any("truncation to 16 tokens and padding to 16" in note for note in report.notes)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 300
    assert not settings.keys() & {"max_length", "stride", "truncation_strategy"}
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(text).input_ids == expected and len(opened(text, padding=True).input_ids) > 16


def test_token_types_are_left_out_where_the_model_has_one(tmp_path):
    klue(tmp_path / "source")
    source = AutoTokenizer.from_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert any("type_vocab_size 1" in note for note in report.notes)
    result = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert source("w1", "w2")["token_type_ids"] == [0, 0, 0, 1, 1]
    pair = result("w1", "w2", return_tensors="pt")
    assert set(pair) == {"input_ids", "attention_mask"}
    assert pair["input_ids"][0].tolist() == source("w1", "w2").input_ids
    MraForSequenceClassification.from_pretrained(tmp_path / "out")(**pair)


def test_token_types_stay_where_the_model_has_two(tmp_path):
    make_source(tmp_path / "source", "bert")
    before = AutoTokenizer.from_pretrained(tmp_path / "source").model_input_names
    report = convert(tmp_path / "source", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_input_names == before
    assert not any("type_vocab_size" in note for note in report.notes)
