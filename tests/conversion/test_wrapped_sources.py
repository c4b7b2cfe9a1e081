"""Weights that a wrapper renamed, a quantiser replaced, or that a dtype cannot hold."""

import pytest
import torch
from conversion_cases import (
    assert_same_outputs,
    change_config,
    convert,
    make_source,
    open_result,
    random_inputs,
)
from safetensors.torch import load_file, save_file

WORDS = "roberta.embeddings.word_embeddings.weight"
DENSE = "roberta.encoder.layer.0.output.dense.weight"


def rename(folder, new_name):
    """Store the weights under `new_name(name)`."""
    file = folder / "model.safetensors"
    save_file({new_name(name): tensor for name, tensor in load_file(file).items()}, file)


def changed(folder, name, number):
    """Store one weight of tensor `name` as `number`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = number
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("source_type", "head"), [("roberta", "ForMaskedLM"), ("bert", "ForSequenceClassification"),
                              ("roberta", "Model"), ("bert", "Model")],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.model."])
def test_prefixes_of_wrappers_are_removed_and_reported(source_type, head, prefix, tmp_path):
    source = make_source(tmp_path / "source", source_type, head)
    rename(tmp_path / "source", lambda name: prefix + name)
    report = convert(tmp_path / "source", tmp_path / "out")
    assert any("A wrapper had added" in note for note in report.notes)
    assert all(r.source.startswith(prefix) for r in report.tensors if r.source is not None)
    result = open_result(tmp_path / "out")
    assert_same_outputs(source, result, random_inputs(source_type, head), 1)


def test_what_is_put_inside_names_is_removed(tmp_path):
    source = make_source(tmp_path / "source")
    rename(tmp_path / "source", lambda name: name.replace("encoder.", "encoder._orig_mod."))
    report = convert(tmp_path / "source", tmp_path / "out")
    assert any("_orig_mod." in note for note in report.notes)
    assert_same_outputs(
        source, open_result(tmp_path / "out"), random_inputs("roberta", "ForMaskedLM"), 1
    )


@pytest.mark.parametrize("source_type", ["roberta", "mra"])
def test_a_wrapped_source_is_scored_with_its_own_weights(source_type, tmp_path):
    make_source(tmp_path / "source", source_type)
    text = {"text": ["A B C D E F G H " * 20], "max_length": 40}
    plain = convert(tmp_path / "source", tmp_path / "plain", **text).scores
    rename(tmp_path / "source", lambda name: "module._orig_mod." + name)
    assert convert(tmp_path / "source", tmp_path / "out", **text).scores == plain


def test_several_encoders_in_one_file_are_refused(tmp_path):
    make_source(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    towers = {f"{tower}.{name}": x for tower in ("query", "passage") for name, x in tensors.items()}
    save_file({name: x.clone() for name, x in towers.items()}, file)
    with pytest.raises(ValueError, match=r"several encoders.*'passage\.', 'query\.'"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("ending", ["qweight", "SCB", "weight_scale", "weight.absmax"])
def test_quantised_weights_are_refused_by_name(ending, tmp_path):
    make_source(tmp_path / "source")
    rename(tmp_path / "source", lambda name: name.replace("query.weight", f"query.{ending}"))
    with pytest.raises(ValueError, match=rf"is quantised: it holds .*query\.{ending}"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("method", ["gptq", "torchao", "bitsandbytes"])
def test_a_quantisation_config_is_refused_by_name(method, tmp_path):
    make_source(tmp_path / "source")
    change_config(tmp_path / "source", quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=rf"quantised \(quantization_config: {method}\)"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_adapter_that_is_not_merged_is_refused(tmp_path):
    make_source(tmp_path / "source")
    rename(tmp_path / "source", lambda name: name.replace("query.w", "query.base_layer.w"))
    with pytest.raises(ValueError, match=r"adapter that is not merged.*merge_and_unload"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [DENSE, "roberta.pooler.dense.bias"])
def test_a_source_with_values_that_are_not_finite_is_refused(number, name, tmp_path):
    make_source(tmp_path / "source", head="Model")
    changed(tmp_path / "source", name.removeprefix("roberta."), number)
    held = "NaN" if number != number else "inf"
    with pytest.raises(ValueError, match=rf"{name.removeprefix('roberta.')} of the source.*{held}"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("name", [DENSE, "roberta.embeddings.position_embeddings.weight"])
def test_values_beyond_bfloat16_are_refused_with_float32(name, tmp_path):
    make_source(tmp_path / "source")
    changed(tmp_path / "source", name, 3.4028e38)
    with pytest.raises(ValueError, match=rf"{name} holds .*bfloat16, .*--dtype float32"):
        convert(tmp_path / "source", tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("name", [DENSE, "roberta.embeddings.position_embeddings.weight"])
def test_values_beyond_a_dtype_are_refused_with_one_that_reaches(name, tmp_path):
    make_source(tmp_path / "source")
    changed(tmp_path / "source", name, -1e5)
    with pytest.raises(ValueError, match=rf"{name} holds 100000.*float16.*--dtype bfloat16"):
        convert(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(tmp_path / "source", tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert weights[name].dtype is torch.bfloat16
