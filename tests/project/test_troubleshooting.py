"""The messages on the page for trouble are those that are printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

import mra_hf
from mra_attention import mra2_attention
from mra_hf.commands import main
from mra_hf.deployment import export as export_module
from mra_hf.deployment import export_checkpoint
from mra_hf.english import english_checkpoint
from mra_hf.loading import load_masked_lm
from tiny_models import mra_config, roberta_config, word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
#: Heading -> the messages below it; "[...]" stands for anything.
SECTIONS = {
    section.partition("\n")[0]: [
        " ".join(x.split()) for x in re.findall(r"```text\n(.*?)```", section, re.S)
    ]
    for section in re.split(r"^### ", PAGE, flags=re.M)[1:]
}
CASES = {}


def case(heading: str):
    """Register a function that runs into the messages below `heading`."""

    def register(function):
        CASES[heading] = function
        return function

    return register


def message_of(call, *arguments, **keywords) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def tokens(count: int) -> torch.Tensor:
    return torch.full((1, count), 5)


@case("Transformers asks for `trust_remote_code`")
def _(folder, capsys, caplog):
    checkpoint = repr(str(english_checkpoint(4096)))
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({checkpoint})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="")
    assert done.returncode != 0
    return done.stderr


@case("A BERT configuration is refused")
def _(folder, capsys, caplog):
    BertModel(BertConfig(**small())).save_pretrained(folder)
    return message_of(mra_hf.MraConfig.from_pretrained, folder)


@case("A head is missing")
def _(folder, capsys, caplog):
    RobertaModel(roberta_config()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return said(capsys, "score", str(folder), "--text", str(write(folder, "a b")))


@case("Settings of multi-resolution attention are ignored")
def _(folder, capsys, caplog):
    model = mra_hf.set_attention(RobertaForMaskedLM(roberta_config()), "mra2", block_per_row=4)
    model.save_pretrained(folder)
    load_masked_lm(folder)
    return caplog.text


@case("The text is longer than the model")
def _(folder, capsys, caplog):
    model = mra_hf.MraModel(mra_config(max_position_embeddings=4098))
    return message_of(model, tokens(5000))


@case("Token types out of range")
def _(folder, capsys, caplog):
    model = mra_hf.MraModel(mra_config())
    return message_of(model, tokens(9), token_type_ids=torch.ones(1, 9, dtype=torch.long))


@case("An expanded or additive mask")
def _(folder, capsys, caplog):
    model = mra_hf.MraModel(mra_config(distance_bias_window=2))
    return message_of(model, tokens(64), attention_mask=torch.ones(1, 1, 64, 64))


@case("Longformer's `global_attention_mask`")
def _(folder, capsys, caplog):
    model = mra_hf.MraModel(mra_config())
    return message_of(model, tokens(64), global_attention_mask=torch.ones(1, 64))


@case("Dropout on attention weights")
def _(folder, capsys, caplog):
    model = RobertaModel(roberta_config(attn_implementation="mra2")).train()
    return message_of(model, tokens(64))


@case("`set_attention` refuses the model")
def _(folder, capsys, caplog):
    return message_of(mra_hf.set_attention, DebertaV2Model(DebertaV2Config(**small())))


@case("The budget leaves nothing for the data")
def _(folder, capsys, caplog):
    return message_of(mra_config, block_per_row=4, initial_prior_first_n_blocks=2)


@case("An implementation that cannot take the call")
def _(folder, capsys, caplog):
    parts = (torch.zeros(1, 1, 64, 64) for _ in range(3))
    return message_of(mra2_attention, *parts, impl="triton")


@case("Attention matrices")
def _(folder, capsys, caplog):
    model = mra_hf.MraModel(mra_config(max_position_embeddings=4098)).eval()
    long = message_of(model, tokens(3000), output_attentions=True)
    model.config.output_attentions = True
    return [long, message_of(model, tokens(64))]


@case("The type of the source")
def _(folder, capsys, caplog):
    DistilBertConfig().save_pretrained(folder)
    return said(capsys, "convert", str(folder), str(folder / "../out"))


@case("The output is there already")
def _(folder, capsys, caplog):
    return said(capsys, "convert", str(english_checkpoint()), str(write(folder, "x").parent))


@case("Packages for ONNX are missing")
def _(folder, capsys, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
        return message_of(export_checkpoint, english_checkpoint(4096), folder)


@case("Exporting needs a newer torch")
def _(folder, capsys, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.10.0")
        return message_of(export_checkpoint, english_checkpoint(4096), folder)


@case("The text is too short to train on")
def _(folder, capsys, caplog):
    text, model = write(folder, "a few words"), str(english_checkpoint(4096))
    arguments = ("--model_name_or_path", model, "--max_seq_length", "4096", "--do_train", "true")
    output = ("--train_file", str(text), "--output_dir", str(folder / "run"), "--use_cpu", "true")
    return said(capsys, "run-mlm", *arguments, *output)


def small() -> dict:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(roberta_config(), name) for name in (*names, "intermediate_size")}


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


def said(capsys, *arguments: str) -> str:
    assert main(list(arguments)) != 0
    return capsys.readouterr().err


def normalised(message: str) -> str:
    return " ".join(message.split())


@pytest.mark.parametrize(
    "heading",
    [
        pytest.param(heading, marks=[pytest.mark.slow] if "trust_remote_code" in heading else [])
        for heading in CASES
    ],
)
def test_the_message_is_the_one_that_is_printed(heading, tmp_path, capsys, caplog):
    said = CASES[heading](tmp_path / "folder", capsys, caplog)
    said = said if isinstance(said, list) else [said]
    assert len(said) == len(SECTIONS[heading])
    for message, shown in zip(said, SECTIONS[heading], strict=True):
        assert re.search(re.escape(shown).replace(re.escape("[...]"), ".*"), normalised(message))


def test_every_message_of_the_page_has_its_case():
    assert {heading for heading, shown in SECTIONS.items() if shown} == set(CASES)
    assert len(CASES) >= 10
