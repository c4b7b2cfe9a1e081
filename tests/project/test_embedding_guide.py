"""The Python of the guide on embeddings runs as pasted, and its table is that of the rows."""

import csv
import re
from pathlib import Path

import pytest
import torch
from transformers import RobertaModel

from tiny_models import roberta_config, word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide" / "embedding.md"


def write_source(folder):
    """A tiny random stand-in for the model that the guide names."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(0)
    RobertaModel(roberta_config(max_position_embeddings=514)).save_pretrained(folder / "encoder")
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder / "encoder")
    encoder = modules.Transformer(str(folder / "encoder"))
    model = SentenceTransformer(modules=[encoder, modules.Pooling(32)], device="cpu")
    model.save(str(folder / "sentence-transformers" / "all-MiniLM-L6-v2"))


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    write_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert len(blocks) == 2
    assert len(blocks[0].strip().splitlines()) <= 11
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, GUIDE.name, "exec"), namespace)
    assert namespace["model"].max_seq_length == 4096
    assert namespace["documents"].shape == (2, 32)
    assert namespace["trainer"].state.global_step == 2
    assert (tmp_path / "minilm-4096-trained" / "modules.json").is_file()


def test_the_table_is_that_of_the_rows():
    with (ROOT / "benchmarks" / "results" / "retrieval.csv").open(newline="") as file:
        rows = {
            row["system"]: row
            for row in csv.DictReader(file)
            if (row["set"], row["part"]) == ("both", "all")
        }
    found = re.findall(r"^\| ([^|]+) \| (0\.\d{3}) \| (0\.\d{3}) \|", GUIDE.read_text(), re.M)
    systems = ("first_512", "chunks", "mra2_16_first1", "mra2_8_first1", "dense")
    assert len(found) == len(systems)
    for system, (_, recall, mrr) in zip(systems, found, strict=True):
        assert float(rows[system]["recall_1"]) == pytest.approx(float(recall), abs=6e-4)
        assert float(rows[system]["mrr"]) == pytest.approx(float(mrr), abs=6e-4)


def test_every_local_link_exists():
    for link in re.findall(r"\]\(([^)#:]+)[)#]", GUIDE.read_text()):
        assert (GUIDE.parent / link).exists(), link
