"""Wrong calls: each raises an error of the promised kind that names the argument and the remedy."""

import json
import shutil
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mra_attention
import mra_hf
from mra_attention import BlockSelection, mra2_attention, mra2_attention_matrix, select_blocks
from mra_hf import MraConfig, MraForMaskedLM, set_attention
from tiny_models import TOKENS, mra_config, roberta_config, word_tokenizer


class Wrong(NamedTuple):
    """A call and what its message must contain, case-sensitive."""

    call: object
    words: tuple[str, ...]
    error: type[Exception] = ValueError


def qkv(**changes):
    """Arguments of a good call, `[2, 2, 40, 8]`, with some replaced."""
    good = {name: torch.zeros(2, 2, 40, 8) for name in ("query", "key", "value")}
    return good | changes


def attend(**changes):
    return lambda _: mra2_attention(**qkv(**changes))


def mask(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


CHOSEN = BlockSelection(torch.ones(2, 2, 2, 2, dtype=torch.bool), 32)

OPERATOR = {
    "query is a list": Wrong(attend(query=[[1.0]]), ("query", "torch.Tensor", "list")),
    "query has 3 dimensions": Wrong(
        attend(query=zeros(2, 40, 16)), ("query", "[batch, heads, tokens, head_dim]", "split")
    ),
    "key is longer": Wrong(attend(key=zeros(2, 2, 41, 8)), ("key", "self-attention")),
    "value has fewer heads": Wrong(
        attend(value=zeros(2, 1, 40, 8)), ("value", "grouped key heads")
    ),
    "value has another head size": Wrong(
        attend(value=zeros(2, 2, 40, 4)), ("value", "(2, 2, 40, 8)")
    ),
    "key on another device": Wrong(
        attend(key=zeros(2, 2, 40, 8, device="meta")), ("key", "meta", "move")
    ),
    "no tokens": Wrong(
        lambda _: mra2_attention(*[zeros(2, 2, 0, 8)] * 3), ("query", "at least one token")
    ),
    "integer tensors": Wrong(
        lambda _: mra2_attention(*[zeros(2, 2, 40, 8, dtype=torch.long)] * 3),
        ("query", "float32", "cast"),
    ),
    "mixed dtypes": Wrong(
        attend(value=zeros(2, 2, 40, 8, dtype=torch.bfloat16)), ("value", "bfloat16", "one dtype")
    ),
    "mask is a list": Wrong(attend(attention_mask=[[1] * 40] * 2), ("attention_mask", "list")),
    "float mask": Wrong(
        attend(attention_mask=mask(2, 40, dtype=torch.float32)), ("attention_mask", "mask.bool()")
    ),
    "4-D mask": Wrong(attend(attention_mask=mask(2, 1, 40, 40)), ("attention_mask", "2-D")),
    "mask of another length": Wrong(
        attend(attention_mask=mask(2, 41)), ("attention_mask", "(2, 40)")
    ),
    "mask of another batch": Wrong(
        attend(attention_mask=mask(1, 40)), ("attention_mask", "(2, 40)")
    ),
    "mask on another device": Wrong(
        attend(attention_mask=mask(2, 40, device="meta")), ("attention_mask", "move")
    ),
    "block_per_row 0": Wrong(attend(block_per_row=0), ("block_per_row", "at least 1", "0")),
    "block_per_row 2.0": Wrong(attend(block_per_row=2.0), ("block_per_row", "integer", "2.0")),
    "block_per_row True": Wrong(attend(block_per_row=True), ("block_per_row", "integer", "True")),
    "block_budget 0": Wrong(attend(block_budget=0), ("block_budget", "at least 1")),
    "block_budget 'all'": Wrong(attend(block_budget="all"), ("block_budget", "'all'")),
    "block_size 0": Wrong(attend(block_size=0), ("block_size", "at least 1")),
    "approx_mode 'both'": Wrong(attend(approx_mode="both"), ("approx_mode", '"full"', '"sparse"')),
    "impl 'cuda'": Wrong(attend(impl="cuda"), ("impl", '"reference"', '"torch"')),
    "negative prior": Wrong(
        attend(initial_prior_first_n_blocks=-1), ("initial_prior_first_n_blocks", "at least 0")
    ),
    "diagonal prior 1.5": Wrong(
        attend(initial_prior_diagonal_n_blocks=1.5), ("initial_prior_diagonal_n_blocks", "integer")
    ),
    "unknown rule": Wrong(attend(selection="best"), ("selection", '"global"', "select_blocks")),
    "selection of another length": Wrong(
        attend(selection=BlockSelection(mask(2, 2, 3, 3), 32)), ("selection", "select_blocks")
    ),
    "selection of integers": Wrong(
        attend(selection=BlockSelection(mask(2, 2, 2, 2, dtype=torch.long), 32)),
        ("selection", "bool"),
    ),
    "selection of another block size": Wrong(
        attend(selection=CHOSEN, block_size=20), ("block_size=32",)
    ),
    "selection of a list": Wrong(
        attend(selection=BlockSelection([[1]], 32)), ("selection.blocks", "select_blocks")
    ),
    "sparse layout": Wrong(attend(query=zeros(2, 2, 40, 8).to_sparse()), ("query", "to_dense()")),
    "block_size 10000": Wrong(attend(block_size=10000), ("block_size", "at most")),
    "infinite scale": Wrong(attend(scale=float("inf")), ("scale", "finite")),
    "scale is a tensor": Wrong(attend(scale=torch.tensor(1.0)), ("scale", "Python number")),
    "select_blocks with a selection": Wrong(
        lambda _: select_blocks(zeros(2, 2, 40, 8), zeros(2, 2, 40, 8), selection=CHOSEN),
        ("selection", "mra2_attention"),
    ),
    "matrix of an unknown mode": Wrong(
        lambda _: mra2_attention_matrix(
            zeros(1, 1, 40, 8), zeros(1, 1, 40, 8), approx_mode="dense"
        ),
        ("approx_mode", '"full"'),
    ),
    "too many block rows": Wrong(
        lambda _: select_blocks(zeros(1, 1, 23171, 1), zeros(1, 1, 23171, 1), block_size=1),
        ("block rows", "raise block_size"),
    ),
}

FAMILY = {
    "priors larger than the budget": Wrong(
        lambda _: MraConfig(block_per_row=4, initial_prior_first_n_blocks=2),
        ("block_per_row", "Raise block_per_row"),
    ),
    "table rows for no token": Wrong(
        lambda _: MraConfig(max_position_embeddings=2), ("max_position_embeddings", "tokens +")
    ),
    "decoder": Wrong(lambda _: MraConfig(is_decoder=True), ("is_decoder", "False")),
    "input beyond the table": Wrong(
        lambda _: MraForMaskedLM(mra_config())(torch.full((1, TOKENS + 1), 7)),
        ("input_ids", "truncation=True", "mra-hf convert"),
    ),
    "dropout on attention weights": Wrong(
        lambda _: MraForMaskedLM(mra_config(attention_probs_dropout_prob=0.1)).train()(
            torch.full((1, 40), 7)
        ),
        ("attention_probs_dropout_prob", "set_attention"),
    ),
    "not a Transformers model": Wrong(
        lambda _: set_attention(torch.nn.Linear(2, 2)), ("model", "PreTrainedModel")
    ),
    "attention name": Wrong(
        lambda _: set_attention(transformers.RobertaModel(roberta_config()), "mra"),
        ("name", "mra2_s", "sdpa"),
    ),
    "unknown setting": Wrong(
        lambda _: set_attention(transformers.RobertaModel(roberta_config()), blocks=3),
        ("blocks", "block_per_row"),
    ),
    "model without the attention interface": Wrong(
        lambda _: set_attention(
            transformers.MPNetModel(
                transformers.MPNetConfig(
                    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
                )
            )
        ),
        ("MPNetModel", "RoBERTa"),
    ),
    "matrices of a long input": Wrong(
        lambda _: MraForMaskedLM(mra_config(max_position_embeddings=2102)).eval()(
            torch.full((1, 2100), 7), output_attentions=True
        ),
        ("output_attentions", "2048", "select_blocks"),
    ),
    "directory of another type": Wrong(
        lambda path: bert_directory(path) and MraForMaskedLM.from_pretrained(path),
        ("bert", "mra-hf convert"),
    ),
    "missing directory": Wrong(
        lambda path: MraForMaskedLM.from_pretrained(path / "nowhere"), ("nowhere",), Exception
    ),
}


def bert_directory(path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


def source_directory(path, **changes):
    """A good source for `convert_checkpoint`."""
    transformers.RobertaForMaskedLM(roberta_config(**changes)).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def converts(**arguments):
    """Convert a good source with one argument replaced."""

    def call(path):
        source_directory(path / "source")
        return mra_hf.convert_checkpoint(
            path / "source", path / "out", **({"max_length": 512} | arguments)
        )

    return call


def converts_broken(spoil):
    """Convert a source that `spoil(folder)` has damaged."""

    def call(path):
        folder = source_directory(path / "source")
        spoil(folder)
        return mra_hf.convert_checkpoint(folder, path / "out", max_length=512)

    return call


def edit_config(**changes):
    def spoil(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def truncate(name):
    def spoil(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return spoil


def as_pickle(content):
    def spoil(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return spoil


def poison(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def below_a_file(path):
    source_directory(path / "source")
    (path / "file").write_text("precious")
    return mra_hf.convert_checkpoint(path / "source", path / "file" / "out", max_length=512)


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def occupied(path):
    source_directory(path / "source")
    (path / "out").mkdir()
    (path / "out" / "thesis.tex").write_text("precious")
    return mra_hf.convert_checkpoint(path / "source", path / "out", max_length=512)


def onto_a_file(path):
    source_directory(path / "source")
    (path / "out").write_text("precious")
    return mra_hf.convert_checkpoint(path / "source", path / "out", max_length=512, force=True)


def onto_itself(path):
    source_directory(path / "source")
    return mra_hf.convert_checkpoint(path / "source", path / "source", force=True)


BAD_FILE = (ValueError, OSError)
CONVERSION = {
    "max_length 0": Wrong(converts(max_length=0), ("max_length", "at least 1")),
    "max_length 10**14": Wrong(converts(max_length=10**14), ("max_length", "at most")),
    "no source": Wrong(lambda path: mra_hf.convert_checkpoint(None, path), ("source",)),
    "empty output": Wrong(lambda path: mra_hf.convert_checkpoint("x", ""), ("output_dir",)),
    "text is a number": Wrong(converts(text=3), ("text", "file or a list")),
    "architectures of numbers": Wrong(
        converts_broken(edit_config(architectures=[3])), ("architectures", "list")
    ),
    "model_type is a list": Wrong(
        converts_broken(edit_config(model_type=["roberta"])), ("model_type", "allowed")
    ),
    "more layers in the file than in the config": Wrong(
        converts_broken(edit_config(num_hidden_layers=1)), ("num_hidden_layers", "raise that")
    ),
    "NaN in the weights": Wrong(converts_broken(poison), ("holds NaN",)),
    "output below a file": Wrong(below_a_file, ("OUT", "a file")),
    "max_length '4k'": Wrong(converts(max_length="4k"), ("max_length", "4k")),
    "block_per_row 0": Wrong(converts(block_per_row=0), ("block_per_row",)),
    "approx_mode": Wrong(converts(approx_mode="exact"), ("approx_mode", "sparse")),
    "prior without budget": Wrong(
        converts(initial_prior_first_n_blocks=9), ("block_per_row", "Raise")
    ),
    "dtype": Wrong(converts(dtype="int8"), ("dtype", "float32")),
    "text that is not there": Wrong(
        converts(text="no-such-file.txt"), ("text", "no-such"), BAD_FILE
    ),
    "source that is not there": Wrong(
        lambda path: mra_hf.convert_checkpoint(path / "none", path / "out"), ("none",), BAD_FILE
    ),
    "source without config": Wrong(
        converts_broken(lambda folder: (folder / "config.json").unlink()),
        ("config.json",),
        BAD_FILE,
    ),
    "source with a broken config": Wrong(
        converts_broken(truncate("config.json")), ("config.json",), BAD_FILE
    ),
    "source of a foreign type": Wrong(
        converts_broken(edit_config(model_type="gpt2")), ("gpt2", "roberta")
    ),
    "decoder source": Wrong(converts_broken(edit_config(is_decoder=True)), ("is_decoder",)),
    "source without weights": Wrong(
        converts_broken(lambda folder: (folder / "model.safetensors").unlink()),
        ("model.safetensors",),
        BAD_FILE,
    ),
    "truncated safetensors": Wrong(
        converts_broken(truncate("model.safetensors")), ("model.safetensors",), BAD_FILE
    ),
    "pickle of nonsense": Wrong(
        converts_broken(as_pickle(b"not a pickle at all")), ("pytorch_model.bin",), BAD_FILE
    ),
    "source without tokenizer": Wrong(converts_broken(remove_tokenizer), ("tokenizer",), BAD_FILE),
    "sizes that disagree with the weights": Wrong(
        converts_broken(edit_config(intermediate_size=48)), ("intermediate",), BAD_FILE
    ),
    "occupied output": Wrong(occupied, ("out", "force"), BAD_FILE),
    "output that is a file": Wrong(onto_a_file, ("out",), BAD_FILE),
    "output on the source": Wrong(onto_itself, ("source",), BAD_FILE),
}


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(wrong, id=f"{part}: {name}")
        for part, table in (("operator", OPERATOR), ("family", FAMILY), ("conversion", CONVERSION))
        for name, wrong in table.items()
    ],
)
def test_a_wrong_call_is_refused_in_words(wrong, tmp_path):
    with pytest.raises(wrong.error) as raised:
        wrong.call(tmp_path)
    assert isinstance(raised.value, (ValueError, OSError))
    message = str(raised.value)
    for word in wrong.words:
        assert word in message, f"{word!r} is missing in: {message}"
    assert not list(tmp_path.glob(".*"))  # nothing half-written
    assert not (tmp_path / "out" / "config.json").exists()
    precious = [tmp_path / "out", tmp_path / "out" / "thesis.tex"]
    assert all(file.read_text() == "precious" for file in precious if file.is_file())


def test_the_good_calls_behind_the_table_pass(tmp_path):
    mra2_attention(**qkv(), selection=CHOSEN)
    converts()(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "out")
    assert mra_attention.__all__ and len(OPERATOR) + len(FAMILY) + len(CONVERSION) >= 60
