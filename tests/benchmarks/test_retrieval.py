"""Retrieval of long documents: the choice of queries, the ranks, and a run with a tiny model."""

import re

import numpy as np
import pytest
import torch
from long_texts import write_corpus, write_tiny_bert
from transformers import AutoModel, AutoTokenizer

from benchmarks import long_documents, retrieval
from benchmarks.records import read_rows


def count_words(texts):
    return [len(re.findall(r"\w+|\.", text)) for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_documents_are_the_same_for_the_same_seed(corpus):
    first, again, other = (
        long_documents.build_documents(corpus, count_words, per_set=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert [x.set for x in first] == ["pages", "pages", "sections", "sections"]
    assert {x.name.split(":")[0] for x in first[:2]} == {"sqlite3-doc", "r-cran-janeaustenr"}


def test_queries_are_taken_out_of_every_part_of_the_document(corpus):
    for document in long_documents.build_documents(corpus, count_words, per_set=2):
        assert long_documents.SHORTEST <= document.tokens <= long_documents.LONGEST
        assert document.tokens == count_words([document.text])[0]
        assert len(document.queries) == long_documents.QUERIES
        for part, query in enumerate(document.queries):
            assert query.text not in document.text
            expected = (part + 0.5) / long_documents.QUERIES
            assert abs(query.offset / document.tokens - expected) < 0.2


def test_sentences_end_where_a_reader_would_end_them():
    line = (
        'Mr. A. Elliot met Mrs. Clay. "Is it so?" He asked e.g. nothing! (Nobody knew.) So it was.'
    )
    assert long_documents.split_sentences(line) == [
        "Mr. A. Elliot met Mrs. Clay.",
        '"Is it so?"',
        "He asked e.g. nothing!",
        "(Nobody knew.)",
        "So it was.",
    ]
    assert long_documents.can_be_query("This one has eight words, which is enough.", 10)
    assert not long_documents.can_be_query("this one has eight words but no beginning.", 10)
    assert not long_documents.can_be_query("Too short for that.", 5)


def test_a_corpus_that_is_too_small_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="ask for fewer"):
        long_documents.build_documents(corpus, count_words, per_set=50)
    with pytest.raises(OSError, match="build-corpus"):
        long_documents.build_documents(tmp_path, count_words)


def test_a_tie_counts_against_the_own_document():
    documents = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    queries = np.array([[3.0, 1.0], [0.0, 1.0], [1.0, 1.1]])
    assert retrieval.ranks(queries, documents, np.array([0, 1, 0])).tolist() == [1, 2, 3]


def test_differences_are_taken_document_by_document():
    def row(document, offset, chunks, mra):
        name = {"set": "pages", "document": document, "offset": offset}
        return name | {"chunks": chunks, "mra2_8": mra}

    rows = [row("a", 10, 1, 2), row("a", 900, 1, 1), row("b", 800, 2, 4)]
    found = retrieval.summaries(rows, ["chunks", "mra2_8"], 511, draws=100)
    by_key = {(x["set"], x["part"], x["system"]): x for x in found}
    mra = by_key["pages", "all", "mra2_8"]
    assert (mra["documents"], mra["queries"]) == (2, 3)
    assert mra["mrr"] == 0.5 and mra["mrr_difference"] == -0.25, "documents count alike"
    assert by_key["both", "first", "mra2_8"]["mrr"] == 0.5
    assert by_key["both", "beyond", "mra2_8"]["recall_1"] == 0.5
    assert mra["mrr_difference_low"] == mra["mrr_difference_high"] == -0.25
    assert "mrr_difference" not in by_key["both", "all", "chunks"]


def test_means_leave_padding_out_and_chunks_hold_every_token(tmp_path):
    folder = write_tiny_bert(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["Ban den. " * 100, "Fin."]
    together = retrieval.mean_vectors(model.eval(), tokenizer, texts, 512)
    apart = [retrieval.mean_vectors(model, tokenizer, [text], 512)[0] for text in texts]
    np.testing.assert_allclose(together, apart, atol=1e-6)

    whole = retrieval.chunk_means(model, tokenizer, texts, 512)
    np.testing.assert_allclose(whole, together, atol=1e-6)
    chunked = retrieval.chunk_means(model, tokenizer, texts[:1], 102)[0]  # three of 100 tokens
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"][0, 1:-1]
    borders = [torch.tensor([token]) for token in (2, 3)]
    rows = torch.stack([torch.cat([borders[0], part, borders[1]]) for part in ids.split(100)])
    with torch.no_grad():
        expected = model(rows).last_hidden_state.flatten(0, 1).mean(0)
    np.testing.assert_allclose(chunked, expected, atol=1e-6)


def test_a_run_can_be_continued_with_other_systems(corpus, tmp_path, capsys):
    model, out = write_tiny_bert(tmp_path / "tiny"), tmp_path / "retrieval.csv"
    arguments = ["--model", str(model), "--corpus", str(corpus), "--out", str(out)]
    arguments += ["--documents", "2", "--draws", "50", "--systems"]
    assert retrieval.main([*arguments, "chunks", "mra2_8"]) == 0
    before = read_rows(tmp_path / "retrieval_ranks.csv")
    assert len(before) == 4 * long_documents.QUERIES
    assert all(1 <= int(row["mra2_8"]) <= 4 for row in before)

    assert retrieval.main([*arguments, "dense", "--resume"]) == 0
    rows = read_rows(out)
    assert {row["system"] for row in rows} == {"chunks", "mra2_8", "dense"}
    assert {row["set"] for row in rows} == {"pages", "sections", "both"}
    assert all(row["torch"] and row["device"] for row in rows)
    after = read_rows(tmp_path / "retrieval_ranks.csv")
    assert [row["chunks"] for row in after] == [row["chunks"] for row in before]
    assert "converted, exact attention" in capsys.readouterr().out

    png = tmp_path / "retrieval.png"
    assert retrieval.main(["--out", str(out), "--draw", str(png)]) == 0
    assert png.stat().st_size > 10_000
    with pytest.raises(SystemExit):
        retrieval.main([*arguments, "dense", "--resume", "--seed", "1"])
    assert "other queries" in capsys.readouterr().err
