"""Mistakes that a new user makes at the command line: each answer says what to do."""

import errno
import json

import pytest
import torch
from transformers import RobertaForMaskedLM

from mra_hf import MraForMaskedLM, loading
from mra_hf.commands import env, main
from tiny_models import mra_config, roberta_config, word_tokenizer

TRAIN = ["--do_train", "--output_dir", "run"]
#: Where a checkpoint is asked for: arguments, with CHECKPOINT in its place.
READERS = [
    ["score", "CHECKPOINT", "--text", "text.txt"],
    ["record", "CHECKPOINT", "text.txt", "heads.safetensors"],
    ["calibrate", "CHECKPOINT", "text.txt", "--target-error", "0.2"],
    ["figures", "--source", "CHECKPOINT", "--text", "text.txt"],
    ["run-mlm", "--model_name_or_path", "CHECKPOINT", "--train_file", "text.txt", *TRAIN],
    ["run-classification", "--model_name_or_path", "CHECKPOINT", "--train_file", "x.tsv", *TRAIN],
    ["run-wikihop", "--model_name_or_path", "CHECKPOINT", "--train_file", "x.json", *TRAIN],
]

WIKIHOP_QUESTION = {
    **{"id": "1", "query": "w5 w6", "answer": "w7", "candidates": ["w7", "w8"]},
    "supports": ["w5 w7", "w6 w8"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Here lie a tiny encoder with a masked-LM head, a text, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    RobertaForMaskedLM(roberta_config()).save_pretrained("model")
    word_tokenizer().save_pretrained("model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{10 + row % 80}" for row in range(2000)))
    (tmp_path / "x.tsv").write_text("text\tlabel\nw10\tyes\nw11\tno\n")
    (tmp_path / "x.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("nowhere", "nowhere is neither a directory here nor a model that could be fetched"),
        ("empty", "empty is no model directory: it has no config.json. Pass the folder"),
        ("model/config.json", "is a file; pass the directory"),
    ],
)
@pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: arguments[0])
def test_what_is_no_checkpoint_is_named(arguments, checkpoint, said, refused):
    if arguments[0] == "figures" and checkpoint.endswith(".json"):
        said = "drop it"  # --source may be a file: of recorded heads, with no --text
    message = refused(*(checkpoint if word == "CHECKPOINT" else word for word in arguments))
    assert said in message


@pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: arguments[0])
def test_damaged_weights_are_named(arguments, folder, refused):
    if arguments[0] == "run-wikihop":
        MraForMaskedLM(mra_config()).save_pretrained("model")
        (folder / "x.json").write_text(json.dumps([WIKIHOP_QUESTION]))
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refused(*("model" if word == "CHECKPOINT" else word for word in arguments))
    assert "the weights of model cannot be read, a file is truncated or corrupt" in message


def test_the_hub_is_asked_once_for_what_is_not_here(monkeypatch, refused):
    asked = []

    def fetch(name, **settings):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", None)
    message = refused("score", "nowhere", "--text", "text.txt")
    assert "check the name and the connection" in message and asked == ["nowhere"]
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "--per_device_train_batch_size",
        ),
        (MemoryError(), "out of memory (on the CPU); take shorter texts"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: permission denied;"),
        (OSError(errno.ENOSPC, "No space", "/a/b"), "/a/b: the disk is full; free some space"),
        (OSError("the hub\nsays no"), "the hub says no"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error, said, monkeypatch, refused):
    def fail(args):
        raise error

    monkeypatch.setattr(env, "run", fail)
    message = refused("env")
    assert said in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("score model --text text.txt --attention flash", "take one of mra2, mra2_s, sdpa, eager"),
        ("score model --text text.txt --out empty", "--out must be a file, and empty is a folder"),
        ("score model --text text.txt --out text.txt/a.csv", "text.txt: is a file, and a folder"),
        ("score gpt --text text.txt", "gpt is of model_type 'gpt2', for which Transformers has no"),
        ("calibrate gone text.txt --target-error 0", "target_error must be positive and below 1"),
        ("calibrate gone text.txt --target-error 20", "got 20; 0.2 is 20 %"),
        ("calibrate gone none.txt --target-error 0.2 --out text.txt", "or remove it first"),
        ("figures --text text.txt", "name a checkpoint with --source, or drop it"),
        ("run-mlm model.yaml --per_device_train_batch_size 0", "per_device_train_batch_size must"),
        ("run-mlm model.yaml --gradient_accumulation_steps 0", "gradient_accumulation_steps must"),
        ("run-mlm model.yaml --num_train_epochs 0", "num_train_epochs must be positive"),
        ("run-mlm model.yaml --preprocessing_num_workers -1", "preprocessing_num_workers must be"),
        ("run-mlm model.yaml --tokenizer_name larger", "leave tokenizer_name out"),
        ("run-mlm model.yaml --config_overrides block_per_row=4", "convert the checkpoint first"),
        ("run-mlm model.yaml --config_overrides hidden_sizes=4", "did you mean hidden_size?"),
        ("run-lra --do_train --max_steps 2", "max_steps must be at least 3 for the one-cycle"),
        ("score model --text none.txt", "no text files in ['none.txt']; pass .txt or .jsonl files"),
        ("score model --text text.txt --length 999", "--length must be at most 256"),
        ("compare nowhere empty", "nowhere is not a folder; name the output_dir of two runs"),
        ("compare empty empty", "both must be runs with do_eval on the same data"),
        ("results empty", "no run found in empty; name the output_dir of runs"),
        ("convert model empty/../model", "OUT must lie outside SOURCE"),
        ("run-mlm none.yaml", "config must be a YAML file, and none.yaml is no file"),
        (
            "run-classification --model_name_or_path model --do_train --train_file none.tsv",
            "none.tsv is no file; pass one that ends in .jsonl",
        ),
        (
            "run-classification --model_name_or_path model --do_train --train_file empty.tsv",
            "empty.tsv holds no rows: a header, then a row a line",
        ),
        (
            "run-classification --model_name_or_path model --do_eval --validation_file x.tsv",
            "pass a checkpoint that was trained with a sequence classifier",
        ),
        (
            "run-classification --model_name_or_path model --do_train --dataset_name some/rows",
            "check the name and the connection, or pass files",
        ),
        (
            "run-mlm --model_name_or_path model --do_train --dataset_name a/b --max_seq_length 9",
            "check the name and the connection, or pass files",
        ),
        (
            "run-mlm --model_name_or_path model --do_train --train_file text.txt --bf16",
            "use_cpu",
        ),
    ],
)
def test_the_answer_says_what_to_do(arguments, said, folder, refused):
    (folder / "empty.tsv").write_text("text\tlabel\n")
    (folder / "gpt").mkdir()
    (folder / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.yaml").write_text(
        "model_name_or_path: model\ntrain_file: text.txt\ndo_train: true\nmax_seq_length: 64\n"
    )
    tokenizer = word_tokenizer()
    tokenizer.add_tokens("beyond")
    tokenizer.save_pretrained("larger")
    assert said in refused(*arguments.split())


def test_a_folder_that_holds_something_is_not_written_to(folder, refused):
    (folder / "empty" / "kept").write_text("")
    assert "choose another directory" in refused("convert", "model", "empty")
    arguments = ["run-mlm", "--model_name_or_path", "model", "--train_file", "text.txt"]
    message = refused(*arguments, "--do_train", "--output_dir", "empty")
    assert "is not empty" in message and "name another folder" in message
    assert [path.name for path in (folder / "empty").iterdir()] == ["kept"]


def test_an_impossible_value_of_an_option_is_answered_in_two_lines(capsys):
    for written in (["--max_seq_length", "long"], ["--learning_rate"], ["--do_train", "perhaps"]):
        with pytest.raises(SystemExit) as stopped:
            main(["run-mlm", *written])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and written[0] in lines[1]
