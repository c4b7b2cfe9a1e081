"""Training of a long encoder and of the mean of chunks: same data, same tokens, and a whole run."""

import json
import random
import shutil

import pytest
import torch
from long_texts import WORDS, write_corpus, write_tiny_bert
from transformers import AutoModel, AutoTokenizer

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer

from benchmarks import embedding_training, retrieval
from benchmarks.records import read_rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of both kinds on both sides of the split."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    generator = random.Random(1)

    def text():
        lines = [" ".join(generator.choices(WORDS, k=10)).capitalize() + "." for _ in range(500)]
        return "\n".join(lines)

    for package in ("sqlite3-doc", "dict-devil"):
        rows = [json.dumps({"title": f"text {i}", "text": text()}) for i in range(10)]
        (folder / "train" / f"{package}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("tiny") / "source")


def count_words(texts):
    return [len(text.split()) for text in texts]


def test_no_batch_holds_a_document_twice_and_none_is_tested(corpus):
    options = {"rows": 12, "batch": 2, "per_set": 2, "seed": 0}
    rows = embedding_training.training_rows(corpus, count_words, **options)
    assert len(rows) == 12 and set(rows[0]) == {"document", *(f"query_{i}" for i in range(4))}
    beginnings = [row["document"][:200] for row in rows]
    assert all(a != b for a, b in zip(beginnings[::2], beginnings[1::2], strict=True))
    belongs = {"belongs": embedding_training.is_for_tests}
    tested = embedding_training.build_documents(corpus, count_words, per_set=2, **belongs)
    sentences = {line for document in tested for line in document.text.split("\n")}
    assert sentences
    assert not any(line in sentences for row in rows for line in row["document"].split("\n"))
    with pytest.raises(ValueError, match="fewer than a batch of 5"):
        embedding_training.training_rows(corpus, count_words, **(options | {"batch": 5}))


def test_rows_and_chunks_give_the_means_of_the_other_benchmark(source):
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=n)) for n in (1200, 300, 510)]
    model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    expected = torch.tensor(retrieval.chunk_means(model, tokenizer, texts, 512)).float()
    encoder = SentenceTransformer(str(source), device="cpu")
    encoder.max_seq_length = 4096
    plain = encoder.encode(texts[1:], convert_to_tensor=True)
    embedding_training.read_by_rows(encoder[0], 512)
    found = encoder.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1:], plain, atol=1e-5, rtol=1e-4)


def test_a_run_is_continued_and_repeats_no_step(corpus, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedding_training, "_SAVE_STEPS", 1)
    out = tmp_path / "rows.csv"
    arguments = ["--smoke", "--model", str(source), "--corpus", str(corpus), "--draws", "50"]
    arguments += ["--folder", str(tmp_path / "runs"), "--out", str(out)]
    assert embedding_training.main(arguments) == 0
    assert "| 16 | 0 | 2 | mra2 | 4 both |" in capsys.readouterr().out
    rows = read_rows(out)
    assert {(row["step"], row["system"]) for row in rows} == {
        (step, system) for step in ("0", "2") for system in embedding_training.SYSTEMS
    }
    trained = [row for row in rows if row["step"] == "2"]
    assert all(float(row["cpu_seconds_per_step"]) > 0 for row in trained)
    [run] = (tmp_path / "runs").iterdir()
    biases = AutoModel.from_pretrained(run / "mra2" / "checkpoint-2").state_dict()
    assert any((biases[name].abs() > 0).any() for name in biases if "distance_bias" in name)

    # As after a kill between the first checkpoint and the end.
    (run / "mra2" / "ranks-2.json").unlink()
    shutil.rmtree(run / "mra2" / "checkpoint-2")
    assert embedding_training.main(arguments) == 0
    assert "mra2: goes on from checkpoint-1" in capsys.readouterr().out
    for system, expected in (("chunks", [1, 2]), ("mra2", [1, 2, 2])):
        lines = (run / system / "steps.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [row["step"] for row in steps] == expected
    assert steps[1]["loss"] == pytest.approx(steps[2]["loss"], abs=1e-4)
    assert read_rows(out) == rows
