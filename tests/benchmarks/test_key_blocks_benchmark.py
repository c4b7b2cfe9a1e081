"""Narrow key blocks, measured: a run with a tiny model, and what it compares with."""

import torch
from long_texts import write_corpus, write_tiny_bert
from transformers import AutoModel

from benchmarks import key_blocks
from benchmarks.records import read_rows
from mra_attention import mra2_attention
from mra_attention.implementations import native_problem
from mra_hf import convert_checkpoint


def test_the_layers_are_what_the_model_computes(tmp_path):
    """Exact attention of the recorded parts, with their bias, gives the model's next states."""
    source = write_tiny_bert(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "long", max_length=1024)
    model = AutoModel.from_pretrained(tmp_path / "long").eval()
    ids = torch.randint(5, 30, (1, 1024))
    [first, *_] = key_blocks.layers_of(model, ids)
    assert first.distance_bias is not None and (first.distance_bias != 0).any()
    whole = mra2_attention(*first.parts, block_per_row=32, distance_bias=first.distance_bias)
    torch.testing.assert_close(first.exact(), whole, rtol=0, atol=1e-5)
    [(_, row)] = key_blocks.head_rows([first], [key_blocks.Setting(32, 8, "mass", 0)])
    assert row["error"] == 0 and row["heads"] == first.parts[0].shape[1]


def test_rows_are_added_once_and_drawn(tmp_path, monkeypatch, real_pictures):
    if native_problem() is not None:  # the times are of the compiled kernels
        monkeypatch.setattr(key_blocks, "time_columns", lambda length, chosen, repeats: {})
    monkeypatch.setattr(key_blocks, "LENGTHS", (128, 512))
    corpus, model = write_corpus(tmp_path / "corpus"), write_tiny_bert(tmp_path / "tiny")
    out = tmp_path / "rows.csv"
    arguments = ["--smoke", "--minilm", str(model), "--corpus", str(corpus), "--out", str(out)]
    arguments += ["--trained", f"again={key_blocks.english_checkpoint(4096)}"]
    assert key_blocks.main(arguments) == 0
    written = out.read_bytes()
    rows = read_rows(out)
    assert {(row["part"], row["model"]) for row in rows} == {
        *(("heads", "minilm"), ("heads", "english"), ("time", "")),
        *(("loss", "english, untrained"), ("loss", "again"), ("states", "minilm")),
    }
    assert key_blocks.main(arguments) == 0
    assert out.read_bytes() == written, "nothing is measured twice"
    assert key_blocks.main(["--draw", str(tmp_path), "--out", str(out)]) == 0
    assert (tmp_path / "error_against_time.png").stat().st_size > 10_000
