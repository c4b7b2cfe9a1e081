"""The measured numbers of the README's first screen, found again in the committed rows."""

import csv
import json
import re
from pathlib import Path

import pytest

from benchmarks import overview

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FIRST_SCREEN = README[: README.index("## Start")]


def loss(model: str, blocks: str, length: str = "4096") -> str:
    with (ROOT / "docs/experiments/english/scores.csv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["model"], row["block_per_row"], row["length"]) == (model, blocks, length)
        ]
    assert len(rows) == 1
    assert rows[0]["masked_tokens"] == "25427"
    return f"{float(rows[0]['nll']):.3f}"


def advice(name: str, blocks: int) -> dict:
    content = json.loads((ROOT / "docs/experiments/advice" / name / "advice.json").read_text())
    (row,) = (
        row for row in content["rows"] if (row["length"], row["block_per_row"]) == (4096, blocks)
    )
    return row


def ratio(curve: str, length: int, digits: int) -> str:
    return f"{overview.speeds(curve)[length]:.{digits}f}x"


def over_dense(blocks: int) -> str:
    return f"{advice('english-4096', blocks)['over_dense'][0]:+.3f}"


def cosine(blocks: int) -> str:
    return f"{advice('minilm', blocks)['cosine']:.3f}"


def draft_ratios() -> tuple[str, ...]:
    rows = {
        (row["provider"], row["pass"]): float(row["ms_median"])
        for row in overview.read_rows(overview.RESULTS / "cpu_draft_sapphire_rapids.csv")
        if (row["dtype"], row["length"]) == ("fp32", "4096")
    }
    passes = ("fwd", "fwd+bwd")
    return tuple(
        f"{rows['sdpa', name] / rows['draft_of_mra2_native', name]:.0f}x" for name in passes
    )


#: A sentence of the first screen, # for each number -> the numbers by the rows.
SENTENCES = {
    "**#** untrained with 16 blocks per row; the source in chunks of 512 has #": lambda: (
        loss("english-4096-untrained", "16"),
        loss("english", "", "512"),
    ),
    "**#** read with 16 blocks, # read with 8 (the source trained on the same text: #)": lambda: (
        loss("english-4096", "16"),
        loss("english-4096", "8"),
        loss("english-512-same-text", "", "512"),
    ),
    "attention **#** forward and **#** with backward": lambda: (
        ratio("attention, forward", 4096, 1),
        ratio("attention, with backward", 4096, 1),
    ),
    "a draft of these kernels gave the same attention **#** forward and **#**": draft_ratios,
    "RoBERTa-base **#** forward and **#** in a training step": lambda: (
        ratio("RoBERTa-base, forward", 4096, 1),
        ratio("RoBERTa-base, training step", 4096, 1),
    ),
    "gains # in a training step at 512 tokens and # at 1024": lambda: (
        ratio("RoBERTa-base, training step", 512, 2),
        ratio("RoBERTa-base, training step", 1024, 2),
    ),
    "**#** nats with 16 blocks per row, # with 8, # with 4": lambda: tuple(
        map(over_dense, (16, 8, 4))
    ),
    "cosine to dense: **#** with 16, # with 8 and # with 4": lambda: tuple(map(cosine, (16, 8, 4))),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_says_what_the_rows_say(sentence):
    pattern = re.escape(sentence).replace(r"\#", "#").replace("#", r"([+]?\d+(?:\.\d+)?x?)")
    found = re.search(pattern, FIRST_SCREEN.replace("\n", " "))
    assert found, sentence
    assert found.groups() == SENTENCES[sentence]()


def test_no_other_measured_number_stands_there():
    """Numbers with a point are measured; each belongs to a sentence above."""
    words = re.sub(r"\]\([^)]*\)", "]", FIRST_SCREEN)
    numbers = re.findall(r"(?<![\w.])[+]?\d+\.\d+x?", words)
    known = [number for sentence in SENTENCES.values() for number in sentence()]
    assert sorted(set(numbers) - set(known)) == ["0.1"]  # "about 0.1 nats": 3.511 - 3.403


def test_where_dense_attention_wins_is_what_the_rows_say():
    untrained = float(loss("english-4096-untrained", "8")) - float(loss("english", "", "512"))
    assert 0.05 < untrained < 0.15
    plain = {
        (row["length"], row["pass"], row["provider"]): float(row["ms_median"])
        for row in overview.read_rows(overview.RESULTS / "cpu_implementations.csv")
        if row["dtype"] == "fp32"
    }
    for length, name in (("512", "fwd"), ("512", "fwd+bwd"), ("1024", "fwd")):
        assert plain[length, name, "mra2_torch"] > plain[length, name, "sdpa"]
    assert plain["1024", "fwd+bwd", "mra2_torch"] < plain["1024", "fwd+bwd", "sdpa"]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130
