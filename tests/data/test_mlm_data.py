"""Text for masked language modelling: decoders, the corpus, its tokenizer, packing."""

import gzip
import json
import os
import struct
import zlib

import pytest
import torch
from datasets import Dataset, load_dataset

from mra_hf.commands import main
from mra_hf.data import corpus, debian_text, mlm
from mra_hf.data.corpus import TextSource, build_english_corpus, train_tokenizer
from mra_hf.data.masking import SeededMasking
from mra_hf.data.mlm import load_documents, pack
from tiny_models import word_tokenizer

PROSE = "The bend of the river was seen from the tower, and nobody spoke of it again. "


def r_vector(lines: list[str]) -> bytes:
    """An R character vector in a lazy-load record: length, zlib stream."""
    strings = b"".join(
        b"\x00\x04\x00\x09" + struct.pack(">i", len(line.encode())) + line.encode()
        for line in lines
    )
    header = b"X\n\x00\x00\x00\x03\x00\x04\x02\x01\x00\x03\x05\x00\x00\x00\x00\x05UTF-8"
    data = header + b"\x00\x00\x00\x10" + struct.pack(">i", len(lines)) + strings
    return struct.pack(">I", len(data)) + zlib.compress(data)


def test_novels_come_out_of_r_data(tmp_path):
    first = ["EMMA", "", "By Jane _Austen_", "", "It was a", "long day.", "", "Then night."]
    (tmp_path / "Rdata.rdb").write_bytes(r_vector(first) + r_vector(["PERSUASION", "", "A été."]))
    documents = list(debian_text.austen_novels(tmp_path))
    assert [title for title, _ in documents] == ["Emma", "Persuasion"]
    assert documents[0][1] == "EMMA\nBy Jane Austen\nIt was a long day.\nThen night."
    assert documents[1][1] == "PERSUASION\nA été."


def test_books_come_out_of_a_sword_module(tmp_path):
    markup = (
        '<milestone n="Acts" type="x-usfm-h"/><title type="main">Acts</title><div sID="a"/>'
        "<w>In</w> <w>the</w> first book,<note>a <w>footnote</w></note> I wrote &amp; said."
        '<chapter sID="b"/>Then they <verse n="2"/>went.'
    )
    for testament, text in (("ot", "<milestone/>"), ("nt", markup)):
        packed = zlib.compress(text.encode())
        (tmp_path / f"{testament}.bzz").write_bytes(b"xx" + packed)
        (tmp_path / f"{testament}.bzs").write_bytes(struct.pack("<III", 2, len(packed), 0))
    assert list(debian_text.web_bible(tmp_path)) == [
        ("Acts", "In the first book, I wrote & said.\nThen they went.")
    ]


def test_a_dictionary_is_cut_between_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(debian_text, "DICTIONARY_DOCUMENT", 15)
    (tmp_path / "odd.dict.dz").write_bytes(
        gzip.compress(b"one\n two {link}\n\nthree\n\nfour five\n")
    )
    documents = list(debian_text.dictionary(tmp_path))
    assert documents == [("odd 0", "one two link\nthree"), ("odd 1", "four five")]


def test_only_the_prose_of_pages_is_kept(tmp_path):
    page = f"<head><title>no</title></head><p>{PROSE}</p><pre>x = 1</pre><p>short</p>"
    (tmp_path / "long.html").write_text(page + f"<p>{PROSE * 30}</p><p>{'a+1=' * 30}</p>")
    (tmp_path / "little.html").write_text(page)
    ((title, text),) = debian_text.html_pages(tmp_path)
    assert title == "long" and text.splitlines() == [PROSE.strip(), (PROSE * 30).strip()]


def test_a_package_that_is_laid_out_differently_is_named(tmp_path):
    with pytest.raises(OSError, match=r"one Rdata\.rdb, found 0"):
        list(debian_text.austen_novels(tmp_path))


def test_a_damaged_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for tool in ("apt-get", "dpkg-deb"):  # what the real one says and returns
        file = tmp_path / "bin" / tool
        file.write_text("#!/bin/sh\necho 'not a Debian format archive' >&2\nexit 2\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "some_1_all.deb").write_bytes(b"cut off")
    with pytest.raises(OSError, match=r"some_1_all\.deb is damaged.*delete it"):
        debian_text.fetch_package("some", tmp_path)


def test_a_machine_without_apt_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(debian_text.shutil, "which", lambda tool: None)
    with pytest.raises(OSError, match="train on text files of your own"):
        debian_text.fetch_package("some", tmp_path)


@pytest.fixture
def sources(monkeypatch):
    def read(folder):
        for number in range(5):
            yield f"Book {number}", f"{PROSE}\nIt was number “{number}”. " + PROSE * 40

    monkeypatch.setattr(debian_text, "fetch_package", lambda name, folder: (folder, "1.2-3"))
    return (TextSource("books", read, "public domain", frozenset({"Book 3"})),)


def test_the_corpus_appears_whole_with_its_manifest(sources, tmp_path):
    out = tmp_path / "deep" / "corpus"
    manifest = build_english_corpus(out, vocab_size=320, sources=sources)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    (row,) = manifest["sources"]
    assert (row["version"], row["licence"]) == ("1.2-3", "public domain")
    assert (row["train"]["documents"], row["heldout"]["documents"]) == (4, 1)
    held_out = [json.loads(line) for line in (out / "heldout" / "books.jsonl").open()]
    assert [document["title"] for document in held_out] == ["Book 3"]
    assert 'number "3"' in held_out[0]["text"], "quotation marks are plain"
    assert sorted(path.name for path in out.parent.iterdir()) == ["corpus"]
    with pytest.raises(ValueError, match="exists"):
        build_english_corpus(out, vocab_size=320, sources=sources)


def test_the_command_builds_it_and_says_what_it_holds(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(build_english_corpus.__kwdefaults__, "sources", sources)
    arguments = ["build-corpus", str(tmp_path / "corpus"), "--vocab-size", "320"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "books" in shown and "1.2-3" in shown and "tokenizer/" in shown
    assert (tmp_path / "corpus" / "train" / "books.jsonl").exists()
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err


def test_a_corpus_that_fails_leaves_nothing_behind(sources, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no room")

    monkeypatch.setattr(corpus, "train_tokenizer", fail)
    with pytest.raises(OSError, match="no room"):
        build_english_corpus(tmp_path / "corpus", vocab_size=320, sources=sources)
    assert list(tmp_path.iterdir()) == []


def test_the_trained_tokenizer_is_robertas_and_loses_nothing(tmp_path):
    tokenizer = train_tokenizer([PROSE] * 20, 400, tmp_path, max_length=64)
    assert len(tokenizer) <= 400 and tokenizer.model_max_length == 64
    ids = tokenizer(PROSE)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert len(ids) < len(PROSE) / 2, "merges were learned"
    assert tokenizer.decode(ids[1:-1]) == PROSE
    assert tokenizer.mask_token_id == 4 and tokenizer.pad_token_id == 1


@pytest.fixture
def files(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("w10 w11\n\nw12")
    (tmp_path / "texts" / "b.txt").write_text("w13")
    (tmp_path / "c.jsonl").write_text('{"text": "w14\\nw15", "number": 1}\n{"text": "w16"}\n')
    return tmp_path


def test_a_text_file_is_one_document_and_a_json_line_is_one(files):
    expected = ["w10 w11\n\nw12", "w13"]
    for source in (files / "texts", str(files / "texts" / "*.txt"), [files / "texts" / "a.txt"]):
        texts = [row["text"] for row in load_documents(source)]
        assert texts == (expected if len(texts) == 2 else expected[:1])
    assert list(load_documents(files / "c.jsonl")) == [{"text": "w14\nw15"}, {"text": "w16"}]
    streamed = load_documents(files / "c.jsonl", streaming=True)
    assert [row["text"] for row in streamed] == ["w14\nw15", "w16"]


def test_a_text_column_of_text_files_is_not_ignored_in_silence(files, monkeypatch):
    warnings = []
    monkeypatch.setattr(mlm.logger, "warning", warnings.append)
    assert len(load_documents(files / "texts", text_column="body")) == 2
    assert len(warnings) == 1 and "text_column='body' is not used for [" in warnings[0]
    load_documents(files / "texts")
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("c.jsonl", {"text_column": "body"}, "text_column"),
        (["c.jsonl", "texts/a.txt"], {}, "all be .txt or all be .jsonl"),
        ("nothing.txt", {}, "no text files"),
        (["texts/a.txt", "nothing.txt"], {}, "no text files in"),
        ("c.jsonl", {"text_column": "number"}, "line 1: 'number' must be a text .* got 1"),
        ("no*.txt", {}, "no text files"),
    ],
)
def test_wrong_sources_are_refused(source, options, words, files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=words):
        load_documents(source, **options)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.txt, line 1: not UTF-8"):
        load_documents(tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "w10"}\n{"text": w11}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON"):
        load_documents(tmp_path / "bad.jsonl")
    lines = [b'{"text": "w10"}\n'] * 300
    lines[150] = b'{"text": "caf\xe9"}\n'
    (tmp_path / "latin.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 151: not UTF-8"):
        load_documents(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        load_documents(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"body": "w10"}\n\n{"body": " \\n"}\n', "line 3: 'body' must be a text"),
        ("a.jsonl", '{"body": "w10"}\n{"body": null}\n', "line 2: 'body' must be a text"),
        ("a.jsonl", '{"body": "w10"}\n{"title": "w10"}\n', "line 2: 'body' must be a text"),
        ("a.jsonl", '{"body": ""}\n', "line 1: 'body' must be a text"),
        ("a.txt", " \n", "line 1: the file holds no text"),
        ("a.txt", "", "line 1: the file holds no text"),
    ],
)
def test_documents_without_text_are_named(name, content, place, streaming, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}, {place}"):
        list(load_documents(tmp_path / name, text_column="body", streaming=streaming))


def test_rows_without_text_of_a_named_data_set_are_skipped():
    documents = Dataset.from_dict({"text": ["w10 w11 w12", "", None, " ", "w13 w14 w15"]})
    packed = pack(documents, word_tokenizer(), 8)
    assert len(packed) == 1 and len(packed[0]["input_ids"]) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_keeps_every_token_in_order(streaming, tmp_path):
    tokenizer = word_tokenizer()
    texts = [" ".join(f"w{10 + (i * j) % 80}" for i in range(5 + 7 * j)) for j in range(9)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    packed = list(pack(load_documents(tmp_path / "d.jsonl", streaming=streaming), tokenizer, 32))
    assert len(packed) == len(stream) // 30 > 3
    assert all(len(row["input_ids"]) == 32 for row in packed)
    assert all((row["input_ids"][0], row["input_ids"][-1]) == (0, 2) for row in packed)
    assert [token for row in packed for token in row["input_ids"][1:-1]] == stream[
        : 30 * len(packed)
    ]
    special = [token for row in packed for token in row["special_tokens_mask"]]
    assert special == [int(token in (0, 2)) for row in packed for token in row["input_ids"]]


def test_packing_refuses_what_leaves_no_room(files):
    with pytest.raises(ValueError, match="length"):
        pack(load_documents(files / "c.jsonl"), word_tokenizer(), 2)


def test_a_stopped_packing_goes_on_with_the_part_it_was_at(tmp_path, monkeypatch):
    monkeypatch.setattr(mlm, "CACHED_DOCUMENTS", 4)
    lines = [json.dumps({"text": f"w{10 + i} " * 60}) for i in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")

    def documents():
        return load_dataset(
            "json",
            data_files=str(tmp_path / "d.jsonl"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )

    def parts():
        return {path.name for path in (tmp_path / "cache").rglob("cache-*.arrow")}

    tokenizer = word_tokenizer()
    of_all = type(tokenizer).__call__

    def stopped_in_the_third_part(self, texts, *args, **kwargs):
        if isinstance(texts, list) and any("w20" in text for text in texts):
            raise KeyboardInterrupt
        return of_all(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", stopped_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        pack(documents(), tokenizer, 32)
    done = parts()
    assert len(done) == 2
    monkeypatch.setattr(type(tokenizer), "__call__", of_all)
    packed = pack(documents(), word_tokenizer(), 32)
    assert len(parts()) == 3 and done < parts(), "two parts were taken from the cache"
    assert len(packed) == 3 * (4 * 61 // 30)


def masked(tokenizer, rows, epoch=0, **settings):
    collator = SeededMasking(tokenizer, masking_seed=3, mlm_probability=0.4, **settings)
    collator.epoch = epoch
    return collator(rows)


def test_masks_follow_from_the_example_alone():
    tokenizer = word_tokenizer()
    texts = [" ".join(f"w{10 + (i * j) % 80}" for i in range(10 + 12 * j)) for j in range(1, 4)]
    rows = [tokenizer(text, return_special_tokens_mask=True) for text in texts]
    whole = masked(tokenizer, rows)
    for number, row in enumerate(rows):
        alone = masked(tokenizer, [row])
        length = len(row["input_ids"])
        for name in ("input_ids", "labels"):
            assert torch.equal(alone[name][0], whole[name][number, :length]), (
                "its batch is no matter"
            )
        assert (whole["labels"][number, length:] == -100).all()
    again, later = masked(tokenizer, rows), masked(tokenizer, rows, epoch=1)
    assert torch.equal(again["labels"], whole["labels"])
    assert not torch.equal(later["labels"], whole["labels"])
    real = sum(len(row["input_ids"]) - 2 for row in rows)
    assert 0.2 < float((whole["labels"] != -100).sum()) / real < 0.6
    hidden = masked(tokenizer, rows, mask_replace_prob=1.0, random_replace_prob=0.0)
    chosen = hidden["labels"] != -100
    assert (hidden["input_ids"][chosen] == tokenizer.mask_token_id).all()
