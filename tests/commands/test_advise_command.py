"""`mra-hf advise` on checkpoints of every kind."""

import json

import pytest
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
)

from mra_hf import MraForMaskedLM
from mra_hf.commands import main
from tiny_models import SIZES, mra_config, roberta_config, word_tokenizer

TEXT = " ".join(f"w{10 + (7 * i) % 80}" for i in range(700))
MODELS = {
    "ours": lambda: MraForMaskedLM(mra_config(block_per_row=2)),
    "roberta": lambda: RobertaForMaskedLM(roberta_config()),
    "classifier": lambda: RobertaForSequenceClassification(roberta_config()),
    "t5": lambda: T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_ff=64, num_layers=1)),
    "stock": lambda: ElectraForMaskedLM(
        ElectraConfig(**(SIZES | {"embedding_size": 32, "max_position_embeddings": 256}))
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def save(kind):
    MODELS[kind]().save_pretrained(kind)
    word_tokenizer().save_pretrained(kind)


@pytest.mark.parametrize("kind", ["ours", "roberta", "classifier", "stock"])
def test_a_table_a_recommendation_and_files(kind, folder, capsys):
    save(kind)
    arguments = ["advise", kind, "--text", "text.txt", "--lengths", "128", "256"]
    assert main([*arguments, "--block-per-row", "3", "--max-tokens", "500"]) == 0
    printed = capsys.readouterr()
    assert "s/document" in printed.out and "At 256 tokens take" in printed.out
    assert "4 of 4: 256 tokens, block_per_row=3" in printed.err
    numbers = json.loads((folder / "advice" / "advice.json").read_text())
    assert [(row["length"], row["block_per_row"]) for row in numbers["rows"]] == [
        *[(128, None), (128, 3), (256, None), (256, 3)]
    ]
    has_loss = kind != "classifier"
    assert all((row["loss"] is not None) == has_loss for row in numbers["rows"])
    assert numbers["recommendation"] in " ".join(printed.out.split())
    assert ("mra-hf convert" in printed.out) == (kind in ("roberta", "classifier"))
    assert (folder / "advice" / "advice.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["ours", "roberta"])
def test_a_tokenizer_may_lie_elsewhere(kind, folder):
    MODELS[kind]().save_pretrained(kind)
    word_tokenizer().save_pretrained("words")
    arguments = f"advise {kind} --tokenizer words --text text.txt --lengths 256 --max-tokens 300"
    assert main(arguments.split()) == 0


def test_json_is_all_of_the_output(capsys):
    save("ours")
    arguments = "advise ours --text text.txt --lengths 256 --max-tokens 300 --json --out x"
    assert main(arguments.split()) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["threads"] >= 1 and numbers["n_tokens"] == 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nowhere --text text.txt", "nowhere is neither a directory here nor a model"),
        ("ours --text none.txt", "no text files in ['none.txt']"),
        ("ours --text text.txt --lengths 999", "lengths must be at most 256"),
        ("ours --text text.txt --device cuda:77", "--device cuda:77 is not available here"),
        ("ours --text text.txt --device meta", "--device must be cpu, cuda or cuda:N"),
        ("ours --text text.txt --lengths 256 --block-per-row 0", "block_per_row must be"),
        ("ours --text text.txt --lengths 256 --max-tokens 9", "max_tokens must be at least 254"),
        ("ours --text text.txt --lengths 1 256", "--lengths must be"),
        ("ours --text text.txt --out text.txt", "--out text.txt is a file; name a folder"),
        ("t5 --text text.txt", "adds relative position biases"),
        ("stock --text text.txt --lengths 300", "lengths must be at most 256"),
    ],
)
def test_mistakes_are_answered_and_leave_nothing(arguments, said, refused, folder):
    save("ours")
    if arguments.startswith(("t5", "stock")):
        save(arguments.split()[0])
    assert said in refused("advise", *arguments.split())
    assert not (folder / "advice").exists()


def test_an_earlier_advice_is_replaced_by_force_only(folder, refused):
    save("ours")
    arguments = ["advise", "ours", "--text", "text.txt", "--lengths", "256", "--max-tokens", "300"]
    assert main(arguments) == 0
    before = (folder / "advice" / "advice.json").read_text()
    assert "advice.json is there already; name another --out, or pass --force" in refused(
        *arguments
    )
    assert (folder / "advice" / "advice.json").read_text() == before
    assert main([*arguments, "--force"]) == 0
    assert (folder / "advice" / "advice.json").read_text() != before  # other times
