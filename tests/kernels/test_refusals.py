"""Wrong calls of the operator and the models: the error names the argument and the remedy.

What `convert_checkpoint` refuses is in `conversion/test_bad_sources.py`.
"""

import pytest
import torch
import transformers

from mra_attention import BlockSelection, mra2_attention, mra2_attention_matrix, select_blocks
from mra_hf import MraConfig, MraForMaskedLM, set_attention
from tiny_models import TOKENS, mra_config, roberta_config


def qkv(**changes):
    """Arguments of a good call, `[2, 2, 40, 8]`, with some replaced."""
    good = {name: torch.zeros(2, 2, 40, 8) for name in ("query", "key", "value")}
    return good | changes


def mask(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


CHOSEN = BlockSelection(mask(2, 2, 2, 2), 32)
NUMBERS = BlockSelection(mask(2, 2, 2, 2, dtype=torch.long), 32)

#: An argument of the operator, its wrong value, and what the message contains besides its name.
ARGUMENTS = [
    ("query", [[1.0]], "torch.Tensor", "list"),
    ("query", zeros(2, 40, 16), "[batch, heads, tokens, head_dim]", "split"),
    ("query", zeros(2, 2, 40, 8).to_sparse(), "to_dense()"),
    ("key", zeros(2, 2, 41, 8), "self-attention"),
    ("key", zeros(2, 2, 40, 8, device="meta"), "meta", "move"),
    ("value", zeros(2, 1, 40, 8), "grouped key heads"),
    ("value", zeros(2, 2, 40, 4), "(2, 2, 40, 8)"),
    ("value", zeros(2, 2, 40, 8, dtype=torch.bfloat16), "bfloat16", "one dtype"),
    ("attention_mask", [[1] * 40] * 2, "list"),
    ("attention_mask", mask(2, 40, dtype=torch.float32), "mask.bool()"),
    ("attention_mask", mask(2, 1, 40, 40), "2-D"),
    ("attention_mask", mask(2, 41), "(2, 40)"),
    ("attention_mask", mask(1, 40), "(2, 40)"),
    ("attention_mask", mask(2, 40, device="meta"), "move"),
    ("block_per_row", 0, "at least 1", "0"),
    ("block_per_row", 2.0, "integer", "2.0"),
    ("block_per_row", True, "integer", "True"),
    ("block_budget", 0, "at least 1"),
    ("block_budget", "all", "'all'"),
    ("block_size", 0, "at least 1"),
    ("block_size", 10000, "at most"),
    ("approx_mode", "both", '"full"', '"sparse"'),
    ("impl", "cuda", '"reference"', '"torch"'),
    ("initial_prior_first_n_blocks", -1, "at least 0"),
    ("initial_prior_diagonal_n_blocks", 1.5, "integer"),
    ("selection", "best", '"global"', "select_blocks"),
    ("selection", BlockSelection(mask(2, 2, 3, 3), 32), "select_blocks"),
    ("selection", NUMBERS, "bool"),
    ("selection", BlockSelection([[1]], 32), "selection.blocks", "select_blocks"),
    ("scale", float("inf"), "finite"),
    ("scale", torch.tensor(1.0), "Python number"),
]

#: name -> a call, and what its message contains, case-sensitive
CALLS = {
    "no tokens": (
        lambda _: mra2_attention(*[zeros(2, 2, 0, 8)] * 3),
        ("query", "at least one token"),
    ),
    "integer tensors": (
        lambda _: mra2_attention(*[zeros(2, 2, 40, 8, dtype=torch.long)] * 3),
        ("query", "float32", "cast"),
    ),
    "selection of another block size": (
        lambda _: mra2_attention(**qkv(), selection=CHOSEN, block_size=20),
        ("block_size=32",),
    ),
    "select_blocks with a selection": (
        lambda _: select_blocks(*[zeros(2, 2, 40, 8)] * 2, selection=CHOSEN),
        ("selection", "mra2_attention"),
    ),
    "matrix of an unknown mode": (
        lambda _: mra2_attention_matrix(*[zeros(1, 1, 40, 8)] * 2, approx_mode="dense"),
        ("approx_mode", '"full"'),
    ),
    "too many block rows": (
        lambda _: select_blocks(*[zeros(1, 1, 23171, 1)] * 2, block_size=1),
        ("block rows", "raise block_size"),
    ),
    "priors larger than the budget": (
        lambda _: MraConfig(block_per_row=4, initial_prior_first_n_blocks=2),
        ("block_per_row", "Raise block_per_row"),
    ),
    "table rows for no token": (
        lambda _: MraConfig(max_position_embeddings=2),
        ("max_position_embeddings", "tokens +"),
    ),
    "decoder": (lambda _: MraConfig(is_decoder=True), ("is_decoder", "False")),
    "input beyond the table": (
        lambda _: MraForMaskedLM(mra_config())(torch.full((1, TOKENS + 1), 7)),
        ("input_ids", "truncation=True", "mra-hf convert"),
    ),
    "dropout on attention weights": (
        lambda _: MraForMaskedLM(mra_config(attention_probs_dropout_prob=0.1)).train()(
            torch.full((1, 40), 7)
        ),
        ("attention_probs_dropout_prob", "set_attention"),
    ),
    "not a Transformers model": (
        lambda _: set_attention(torch.nn.Linear(2, 2)),
        ("model", "PreTrainedModel"),
    ),
    "attention name": (
        lambda _: set_attention(transformers.RobertaModel(roberta_config()), "mra"),
        ("name", "mra2_s", "sdpa"),
    ),
    "unknown setting": (
        lambda _: set_attention(transformers.RobertaModel(roberta_config()), blocks=3),
        ("blocks", "block_per_row"),
    ),
    "model without the attention interface": (
        lambda _: set_attention(
            transformers.MPNetModel(
                transformers.MPNetConfig(
                    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
                )
            )
        ),
        ("MPNetModel", "RoBERTa"),
    ),
    "matrices of a long input": (
        lambda _: MraForMaskedLM(mra_config(max_position_embeddings=2102)).eval()(
            torch.full((1, 2100), 7), output_attentions=True
        ),
        ("output_attentions", "2048", "select_blocks"),
    ),
    "directory of another type": (
        lambda path: bert_directory(path) and MraForMaskedLM.from_pretrained(path),
        ("bert", "mra-hf convert"),
    ),
    "missing directory": (
        lambda path: MraForMaskedLM.from_pretrained(path / "nowhere"),
        ("nowhere",),
    ),
}


BERT = transformers.BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
)


def bert_directory(path):
    transformers.BertModel(BERT).save_pretrained(path)
    return path


def assert_refused(call, *words, error=ValueError):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"


@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: f"{row[0]}: {row[-1]}")
def test_a_wrong_argument_of_the_operator_is_refused_in_words(row):
    name, value, *words = row
    assert_refused(lambda: mra2_attention(**qkv(**{name: value})), name, *words)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_refused_in_words(name, tmp_path):
    call, words = CALLS[name]
    error = OSError if name == "missing directory" else ValueError
    assert_refused(lambda: call(tmp_path), *words, error=error)


def test_the_good_call_behind_the_table_passes():
    mra2_attention(**qkv(), selection=CHOSEN)
