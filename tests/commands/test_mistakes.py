"""Mistakes that a new user makes at the command line: each answer says what to do."""

import pytest
from transformers import RobertaForMaskedLM

from mra_hf.commands import main
from tiny_models import roberta_config, word_tokenizer

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("score model --text text.txt --attention flash", "take one of mra2, mra2_s, sdpa, eager"),
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
