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


def rows_over_everything(table):
    with (ROOT / "benchmarks" / "results" / table).open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["set"], row["part"]) == ("both", "all")]


def numbers_of_the_guide(heading):
    """The numbers of each row of the table whose first line begins with `heading`."""
    table = GUIDE.read_text().split(f"\n| {heading} |")[1].split("\n\n")[0]
    cells = [line.split("|")[2:] for line in table.splitlines()[2:]]
    return [[float(number) for number in re.findall(r"-?\d\.\d+", "|".join(row))] for row in cells]


def numbers_of_the_row(row, *names):
    return pytest.approx([float(row[name]) for name in names], abs=6e-4)  # three digits are shown


DIFFERENCE = ("mrr_difference", "mrr_difference_low", "mrr_difference_high")


def test_the_retrieval_table_is_that_of_the_rows():
    rows = {row["system"]: row for row in rows_over_everything("retrieval.csv")}
    systems = ("first_512", "chunks", "mra2_16_first1", "mra2_8_first1", "dense")
    table = numbers_of_the_guide("one vector per document")
    for system, numbers in zip(systems, table, strict=True):
        difference = () if system == "chunks" else DIFFERENCE
        assert numbers == numbers_of_the_row(rows[system], "recall_1", "mrr", *difference)


def test_the_table_of_training_is_that_of_the_rows():
    rows = {
        (row["system"], row["step"]): row for row in rows_over_everything("embedding_training.csv")
    }
    chunks, converted, difference = numbers_of_the_guide("MRR | before")
    for column, step in enumerate(("0", "20")):
        assert [chunks[column]] == numbers_of_the_row(rows["chunks", step], "mrr")
        assert [converted[column]] == numbers_of_the_row(rows["mra2", step], "mrr")
        shown = difference[3 * column : 3 * column + 3]
        assert shown == numbers_of_the_row(rows["mra2", step], *DIFFERENCE)


def test_every_local_link_exists():
    for link in re.findall(r"\]\(([^)#:]+)[)#]", GUIDE.read_text()):
        assert (GUIDE.parent / link).exists(), link
