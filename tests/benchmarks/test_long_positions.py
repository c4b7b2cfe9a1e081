"""The sweep of the distance bias: the windows of the comparison, and a run with a tiny model."""

import pytest
import torch
from long_texts import write_corpus, write_tiny_bert
from transformers import AutoModel

from benchmarks import long_positions
from benchmarks.long_positions import Setting
from benchmarks.records import read_rows


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    source = write_tiny_bert(folder / "source")
    return long_positions.Converted(source, AutoModel, folder / "converted")


def test_a_setting_starts_the_bias_where_it_says(converted):
    model = converted.model(Setting(window=12, far=-6.0))
    bias = model.encoder.layer[1].attention.self.distance_bias(torch.zeros(1))
    assert bias.shape == (2, 128)
    assert (bias[:, :13] == 0).all() and (bias[:, 13:] == -6).all()
    assert converted.model(Setting(**long_positions.NO_BIAS)).config.distance_bias_window is None
    budgeted = converted.model(Setting("mra2", block_per_row=16, diagonal=3))
    assert budgeted.config.block_per_row == 16
    assert budgeted.config.initial_prior_diagonal_n_blocks == 3


def test_rows_are_added_once_and_drawn(tmp_path, capsys):
    corpus, model = write_corpus(tmp_path / "corpus"), write_tiny_bert(tmp_path / "tiny")
    out = tmp_path / "rows.csv"
    arguments = ["--smoke", "--minilm", str(model), "--corpus", str(corpus), "--out", str(out)]
    assert long_positions.main(arguments) == 0
    assert "| MRA-2, 8 blocks | 14 | -8 |" in capsys.readouterr().out
    written = out.read_bytes()
    assert long_positions.main(arguments) == 0
    assert out.read_bytes() == written, "nothing is measured twice"

    rows = read_rows(out)
    assert {(row["model"], row["attention"]) for row in rows} == {
        *(("english", "chunks"), ("english", "mra2"), ("minilm", "chunks"), ("minilm", "mra2"))
    }
    assert all(row["nll"] if row["model"] == "english" else row["cosine"] for row in rows)
    more = [row | {"window": "15"} for row in rows if row["attention"] == "mra2"]
    long_positions.draw(rows + more, tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("windows.png", "far.png"))
