"""What cannot be converted is refused with a sentence, and nothing is written."""

import json

import httpx
import pytest
import torch
from conversion_cases import change_config, convert, make_source, rewrite
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from mra_hf import MraConfig, loading
from mra_hf.conversion import files


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_length": 0}, "max_length.*at least 1"),
        ({"max_length": 10**14}, "max_length.*at most"),
        ({"max_length": True}, "max_length"),
        ({"max_length": 40.0}, "max_length"),
        ({"max_length": "40"}, "max_length"),
        ({"block_per_row": 0}, "block_per_row"),
        ({"approx_mode": "dense"}, "approx_mode.*sparse"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks"),
        ({"initial_prior_first_n_blocks": 4}, "block_per_row must be at least 9.*Raise"),
        ({"dtype": "int8"}, "dtype must be one of.*float32"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"text": [" "]}, "nothing to score"),
        ({"text": [1]}, "list of strings"),
        ({"text": 3}, "text.*file or a list"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("source_type", "head", "changes", "said"),
    [
        ("roberta", "ForMaskedLM", {"model_type": "gpt2"}, "gpt2.*allowed are roberta"),
        ("roberta", "ForMaskedLM", {"model_type": ["roberta"]}, "model_type.*allowed are"),
        ("roberta", "ForMaskedLM", {"architectures": [3]}, "architectures.*list"),
        ("roberta", "ForMaskedLM", {"model_type": None}, "allowed are roberta"),
        ("roberta", "ForMaskedLM", {"architectures": ["RobertaForCausalLM"]}, "decoder"),
        ("roberta", "ForMaskedLM", {"is_decoder": True}, "is_decoder"),
        ("bert", "ForMaskedLM", {"architectures": ["BertLMHeadModel"]}, "decoder"),
        ("bert", "ForMaskedLM", {"add_cross_attention": True}, "decoder"),
        ("bert", "Model", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert", "ForMaskedLM", {"hidden_act": "relu"}, 'hidden_act.*"gelu"'),
        ("mra", "ForMaskedLM", {"hidden_act": "relu"}, 'hidden_act.*"gelu"'),
        ("mra", "ForSequenceClassification", {}, "tanh"),
        ("mra", "ForMultipleChoice", {}, "pre_classifier"),
        ("bert", "ForMaskedLM", {"vocab_size": 500}, "word_embeddings"),
        ("bert", "ForMaskedLM", {"max_position_embeddings": 41}, "position_embeddings"),
        ("bert", "ForMaskedLM", {"vocab_size": 12}, "vocab_size"),
        ("bert", "ForMaskedLM", {"num_hidden_layers": 3}, "lacks 16 tensors"),
        ("bert", "ForMaskedLM", {"num_hidden_layers": 1}, "num_hidden_layers.*raise that"),
        ("bert", "ForMaskedLM", {"intermediate_size": 40}, "intermediate"),
        ("roberta", "ForMaskedLM", {"hidden_size": "big"}, "config.json is not a valid"),
        ("roberta", "Model", {"architectures": ["RobertaForMaskedLM"]}, "lacks"),
        ("roberta", "ForMaskedLM", {"hidden_act": "abs"}, "hidden_act"),
        ("roberta", "ForMaskedLM", {"max_position_embeddings": 2}, "no positions"),
    ],
)
def test_sources_that_cannot_be_converted_are_refused(source_type, head, changes, said, tmp_path):
    make_source(tmp_path / "source", source_type, head)
    change_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_text_that_cannot_be_read_is_refused(tmp_path):
    make_source(tmp_path / "source", head="Model")
    with pytest.raises(OSError, match="no file"):
        convert(tmp_path / "source", tmp_path / "out", text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8"):
        convert(tmp_path / "source", tmp_path / "out", text=tmp_path / "latin.txt")


def damage(folder, how):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "pointer":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif how == "missing":
        file.unlink()
    elif how == "NaN":
        tensors = load_file(file)
        tensors["lm_head.bias"][3] = float("nan")
        save_file(tensors, file)
    elif how == "config":
        (folder / "config.json").write_text('{"model_type": "rob')
    else:
        rewrite(folder, "bin")
        file = folder / "pytorch_model.bin"
        content = file.read_bytes()
        if how == "truncated bin":
            file.write_bytes(content[: len(content) // 2])
        elif how == "garbage bin":
            file.write_bytes(b"not a pickle")
        elif how == "object bin":
            torch.save({"model": MraConfig()}, file)
        elif how == "nested bin":
            torch.save({"state_dict": {}, "epoch": 3}, file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("pointer", "git lfs pull"),
        ("missing", "no weights.*model.safetensors"),
        ("NaN", "holds NaN"),
        ("config", "config.json"),
        ("truncated bin", "pytorch_model.bin"),
        ("garbage bin", "pytorch_model.bin"),
        ("object bin", "pytorch_model.bin"),
        ("nested bin", "pytorch_model.bin"),
    ],
)
def test_damaged_weights_are_named(how, said, tmp_path):
    make_source(tmp_path / "source")
    damage(tmp_path / "source", how)
    with pytest.raises((OSError, ValueError), match=said):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_shards_and_bad_indexes_are_named(tmp_path):
    make_source(tmp_path / "source")
    rewrite(tmp_path / "source", "sharded model.safetensors")
    index = tmp_path / "source" / "model.safetensors.index.json"
    (tmp_path / "source" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002"):
        convert(tmp_path / "source", tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map"):
        convert(tmp_path / "source", tmp_path / "out")
    index.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(tmp_path / "source", tmp_path / "out")


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(OSError, match="no directory"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="source"):
        convert(None, tmp_path / "out")
    with pytest.raises(ValueError, match="output_dir"):
        convert("x", "")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="SOURCE must be a directory"):
        convert(tmp_path / "file", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        convert(tmp_path / "empty", tmp_path / "out")


def hub_error(kind, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api"))
    return kind(f"{status} Client Error. (Request ID: 1)\n\nMake sure that ...", response=response)


@pytest.mark.parametrize(
    ("error", "offline", "said"),
    [
        (hub_error(RepositoryNotFoundError, 401), False, "the hub has no repository of this name"),
        (hub_error(GatedRepoError, 403), False, "is gated: accept its terms there and log in"),
        (
            LocalEntryNotFoundError("Got: ..."),
            False,
            "the hub could not be reached: check the name",
        ),
        (ConnectionError("Got: ..."), False, "the hub could not be reached: check the name"),
        (
            LocalEntryNotFoundError("Set ..."),
            True,
            "offline (HF_HUB_OFFLINE) and has no copy: unset",
        ),
        (hub_error(HfHubHTTPError, 429), False, "(HfHubHTTPError: 429 Client Error."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_source_that_cannot_be_fetched_is_one_sentence(
    error, offline, said, tmp_path, monkeypatch
):
    def snapshot_download(*args, **kwargs):
        raise error

    for module in (files, loading):
        monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: offline)
    name = "no-such-user/no-such-model"
    for call, start in (
        (lambda: convert(name, tmp_path / "out"), f"there is no directory {name}, and the "),
        (lambda: loading.read_config(name), f"{name} is neither a directory here nor a model"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(start)
        assert said in message and message.endswith(", or pass a directory.")
        assert "Got:" not in message and "Make sure" not in message, "these are the cause"
        assert caught.value.__cause__ is error


def test_an_empty_tokenizer_is_refused(tmp_path):
    make_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    (tmp_path / "source" / "vocab.txt").write_text("A\nB\n")  # RoBERTa reads another file
    with pytest.raises(OSError, match="tokenizer"):
        convert(tmp_path / "source", tmp_path / "out")
