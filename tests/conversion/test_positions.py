"""Learned positions are tiled, behind the rows that padding reserves."""

import pytest
import torch
from conversion_cases import (
    LENGTH,
    SIZES,
    assert_same_outputs,
    convert,
    make_source,
    open_result,
    random_inputs,
)
from safetensors.torch import load_file


@pytest.mark.parametrize("max_length", [1, 17, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 131])
@pytest.mark.parametrize(("source_type", "pad"), [("roberta", 1), ("bert", 0), ("mra", 1)])
def test_positions_follow_the_row_formula(source_type, pad, max_length, tmp_path):
    make_source(tmp_path / "source", source_type, "ForMaskedLM")
    prefix = {"bert": "bert.", "mra": "mra."}.get(source_type, "roberta.")
    name = "embeddings.position_embeddings.weight"
    old = load_file(tmp_path / "source" / "model.safetensors")[prefix + name]
    report = convert(tmp_path / "source", tmp_path / "out", max_length=max_length)
    new = load_file(tmp_path / "out" / "model.safetensors")["roberta." + name]
    p = pad + 1
    assert new.shape == (max_length + p, SIZES["hidden_size"])
    for row in range(max_length + p):
        if source_type == "bert":
            expected = torch.zeros_like(old[0]) if row < p else old[(row - p) % LENGTH]
        else:
            expected = old[row] if row < p else old[p + (row - p) % LENGTH]
        assert torch.equal(new[row], expected), row
    [record] = [record for record in report.tensors if record.name == "roberta." + name]
    unchanged = {"roberta": "copied", "mra": "renamed"}.get(source_type)
    assert record.action == (unchanged if max_length == LENGTH and unchanged else "tiled")


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("source_type", ["roberta", "bert"])
def test_other_padding_ids_move_the_positions(source_type, pad, tmp_path):
    rows = LENGTH + pad + 1 if source_type == "roberta" else LENGTH
    sizes = {"pad_token_id": pad, "max_position_embeddings": rows}
    source = make_source(tmp_path / "source", source_type, "ForMaskedLM", **sizes)
    report = convert(tmp_path / "source", tmp_path / "out")
    result = open_result(tmp_path / "out")
    inputs = random_inputs(source_type, "ForMaskedLM")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    assert_same_outputs(source, result, inputs)
    assert any("pads with id" in note for note in report.notes) == (
        pad != (0 if source_type == "bert" else 1)
    )
