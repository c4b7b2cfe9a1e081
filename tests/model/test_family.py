"""The model family: configuration, Auto classes, saving, equality with RoBERTa at full budget."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

import mra_hf
from mra_hf import MraConfig, modeling
from tiny_models import SIZES, TOKENS, mra_config, padded_batch, roberta_config

TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
#: Auto class -> our class and RoBERTa's.
HEADS = {
    "AutoModel": ("MraModel", "RobertaModel"),
    "AutoModelForPreTraining": ("MraForMaskedLM", "RobertaForMaskedLM"),
} | {f"AutoModelFor{task}": (f"MraFor{task}", f"RobertaFor{task}") for task in ("MaskedLM", *TASKS)}

FIRST_TOKEN_HEADS = ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")


def first_output(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def inputs_for(auto_class, **options):
    batch = padded_batch(**options)
    if auto_class == "AutoModelForMultipleChoice":
        batch = {name: x[:, None].repeat(1, 2, 1) for name, x in batch.items()}
    return batch


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_gives_our_class_and_reloads_the_same_numbers(auto_class, tmp_path):
    ours, _ = HEADS[auto_class]
    model = getattr(transformers, auto_class).from_config(mra_config(block_per_row=2)).eval()
    assert type(model) is getattr(mra_hf, ours)
    assert model.config._attn_implementation == "mra2"
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, auto_class).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(loaded) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs_for(auto_class)
    torch.testing.assert_close(
        first_output(loaded.eval(), batch), first_output(model, batch), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("auto_class", "padding"),
    [
        (auto_class, padding)
        for auto_class in HEADS
        for padding in ("none", "right", "left")
        # The first token of a left-padded row is padding, which has no output to classify.
        if padding != "left" or auto_class not in FIRST_TOKEN_HEADS
    ],
)
def test_full_budget_equals_roberta(auto_class, padding, tmp_path):
    _, theirs = HEADS[auto_class]
    roberta = getattr(transformers, theirs)(roberta_config()).eval()
    roberta.save_pretrained(tmp_path)
    model, info = getattr(transformers, auto_class).from_pretrained(
        tmp_path, config=mra_config(block_per_row=8), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs_for(auto_class, length=200, batch=1 if padding == "none" else 3, side=padding)
    ours, expected = first_output(model.eval(), batch), first_output(roberta, batch)
    if auto_class not in FIRST_TOKEN_HEADS:
        real = batch["attention_mask"].bool()
        ours, expected = ours[real], expected[real]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_the_pooler_equals_robertas_with_right_padding(tmp_path):
    roberta = transformers.RobertaModel(roberta_config()).eval()
    roberta.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, config=mra_config(block_per_row=8)).eval()
    batch = padded_batch()
    torch.testing.assert_close(
        model(**batch).pooler_output, roberta(**batch).pooler_output, atol=1e-5, rtol=0
    )


def test_a_small_budget_differs_from_dense_and_dense_is_still_to_be_had():
    model = AutoModelForMaskedLM.from_config(mra_config(block_per_row=1)).eval()
    with torch.no_grad():  # random tiny weights attend almost evenly; make the rows peaked
        for layer in model.roberta.encoder.layer:
            layer.attention.self.query.weight.mul_(40)
            layer.attention.self.key.weight.mul_(40)
    batch = padded_batch(length=256)
    real = batch["attention_mask"].bool()
    sparse = first_output(model, batch)[real]
    model.set_attn_implementation("sdpa")
    dense = first_output(model, batch)[real]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(first_output(model, batch)[real], dense, atol=1e-5, rtol=0)
    model.set_attn_implementation("mra2")
    assert torch.equal(first_output(model, batch)[real], sparse)
    assert (sparse - dense).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert"])
def test_roberta_directories_open_directly_with_our_classes(model_type, tmp_path):
    config = AutoConfig.for_model(model_type, **SIZES)
    source = AutoModelForMaskedLM.from_config(config).eval()
    source.save_pretrained(tmp_path)
    model, info = mra_hf.MraForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == "mra_hf"
    assert model.config.attention_probs_dropout_prob == 0
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        first_output(model.eval(), batch)[real],
        first_output(source, batch)[real],
        atol=1e-5,
        rtol=0,
    )


def test_fields_that_a_roberta_file_leaves_out_take_robertas_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "vocab_size": 100}')
    config = MraConfig.from_pretrained(tmp_path)
    expected = transformers.RobertaConfig()
    assert config.layer_norm_eps == expected.layer_norm_eps
    assert config.type_vocab_size == expected.type_vocab_size
    assert config.max_position_embeddings == expected.max_position_embeddings


def test_a_bert_directory_is_refused_with_the_remedy(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    for our_class in (MraConfig, mra_hf.MraForMaskedLM):
        with pytest.raises(ValueError, match=r"bert.*mra-hf convert"):
            our_class.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        mra_hf.MraForMaskedLM.from_pretrained(tmp_path / "nowhere")


def test_the_config_survives_json_and_counts_tokens(tmp_path):
    choice = {"block_per_row": 4, "initial_prior_diagonal_n_blocks": 3, "selection": "global"}
    config = MraConfig(**choice, approx_mode="sparse", max_position_embeddings=4098)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MraConfig
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
    assert loaded.max_tokens == 4096
    assert loaded.density() == 4 / 128
    assert loaded.density(64) == 1.0
    assert MraConfig(block_budget=64).density(512) == 64 / 256


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"block_per_row": 0}, "block_per_row"),
        ({"block_per_row": 2.5}, "block_per_row"),
        ({"block_per_row": True}, "block_per_row"),
        ({"block_budget": 0}, "block_budget"),
        ({"block_size": -1}, "block_size"),
        ({"approx_mode": "dense"}, "approx_mode"),
        ({"selection": "best"}, "selection"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks"),
        ({"initial_prior_first_n_blocks": 4}, "Raise block_per_row"),
        ({"initial_prior_diagonal_n_blocks": 8}, "block_per_row"),
        ({"max_position_embeddings": 2}, r"max_position_embeddings.*tokens \+"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"is_decoder": True}, "is_decoder.*False"),
        ({"pad_token_id": None}, "pad_token_id"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, word):
    with pytest.raises(ValueError, match=word):
        MraConfig(**fields)


def test_priors_of_the_released_settings_are_accepted():
    MraConfig(block_per_row=8, initial_prior_first_n_blocks=3, initial_prior_diagonal_n_blocks=1)
    MraConfig(block_per_row=16, initial_prior_first_n_blocks=5, initial_prior_diagonal_n_blocks=3)


def test_a_field_changed_to_nonsense_is_refused_on_saving(tmp_path):
    config = MraConfig()
    config.block_per_row = 0
    with pytest.raises(ValueError, match="block_per_row"):
        config.save_pretrained(tmp_path)


def test_the_longest_sequence_runs_and_one_more_token_is_a_clear_error():
    model = mra_hf.MraModel(mra_config(block_per_row=2)).eval()
    model(torch.randint(5, 99, (1, TOKENS)))
    with pytest.raises(ValueError, match=f"{TOKENS + 1} tokens.*{TOKENS}") as error:
        model(torch.randint(5, 99, (1, TOKENS + 1)))
    assert all(f in str(error.value) for f in ("input_ids", "truncation=True", "mra-hf convert"))


@pytest.mark.parametrize(
    ("name", "ids", "words"),
    [
        (
            "token_type_ids",
            torch.tensor([[0, 1, 0]]),
            "between 0 and 0.*got 1; leave token_type_ids",
        ),
        ("token_type_ids", torch.tensor([[-1, 0, 0]]), "between 0 and 0.*got -1"),
        ("position_ids", torch.tensor([[2, 3, 258]]), "between 0 and 257.*got 258.*mra-hf convert"),
    ],
)
def test_ids_beyond_a_table_are_named(name, ids, words):
    model = mra_hf.MraModel(mra_config()).eval()
    with pytest.raises(ValueError, match=f"{name} must lie {words}"):
        model(torch.tensor([[5, 6, 7]]), **{name: ids})


@pytest.mark.parametrize("token", [-1, 100])
def test_ids_of_another_tokenizer_are_named(token):
    model = mra_hf.MraModel(mra_config()).eval()
    with pytest.raises(ValueError, match=f"input_ids must lie between 0 and 99.*got {token}; pass"):
        model(torch.tensor([[5, 6, token]]))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            {"input_ids": torch.tensor([5, 6])},
            r"input_ids must be a tensor \[batch, tokens\].*\[2\]",
        ),
        ({"input_ids": [[5, 6]]}, "input_ids must be a tensor .*got <class 'list'>"),
        ({"input_ids": "a text"}, "got <class 'str'>; tokenize with return_tensors"),
        ({"inputs_embeds": torch.zeros(2, 3)}, r"inputs_embeds must be a tensor .*tokens, width\]"),
    ],
)
def test_inputs_that_are_no_batch_are_named(inputs, said):
    with pytest.raises(ValueError, match=said):
        mra_hf.MraModel(mra_config()).eval()(**inputs)


def test_an_adapter_around_the_embeddings_is_left_to_check_its_ids():
    class Adapter(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, ids):
            return self.table(ids)

    model = mra_hf.MraModel(mra_config()).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids)[0]
    model.embeddings.word_embeddings = Adapter(model.embeddings.word_embeddings)
    torch.testing.assert_close(model(ids)[0], expected)


def test_a_wrong_name_of_an_attention_is_answered_with_ours():
    with pytest.raises(ValueError, match='Of mra_hf: "mra2", "mra2_s"'):
        mra_hf.MraModel._from_config(mra_config(), attn_implementation="mra")


def test_ids_are_not_read_where_a_graph_is_made():
    """Reading a value would break the graph, and on a GPU wait for the device."""
    model = mra_hf.MraModel(mra_config(block_per_row=1), add_pooling_layer=False).eval()
    ids = torch.randint(5, 99, (2, 40))
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    inputs["position_ids"] = torch.arange(2, 42).expand(2, -1).clone()
    expected = model(**inputs)[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs)[0], expected)
    program = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(program(**inputs)[0], expected, atol=1e-5, rtol=0)


def test_an_empty_sequence_is_a_clear_error():
    with pytest.raises(ValueError, match="at least one token"):
        mra_hf.MraModel(mra_config())(torch.zeros(1, 0, dtype=torch.long))


def test_embedding_size_projects_the_embeddings_and_ties_the_decoder(tmp_path):
    model = mra_hf.MraForMaskedLM(mra_config(embedding_size=16, block_per_row=1))
    assert model.get_input_embeddings().weight.shape == (100, 16)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    batch = padded_batch(length=256)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(first_output(again, batch), first_output(model.eval(), batch))


def test_every_parameter_of_every_head_gets_a_gradient_but_an_unused_pooler():
    for auto_class, (ours, _) in HEADS.items():
        model = getattr(mra_hf, ours)(mra_config(block_per_row=1))
        model(**inputs_for(auto_class, length=256))[0].square().sum().backward()
        unused = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is None and "pooler" not in name and "lm_head.bias" not in name
        ]
        assert unused == [], ours


def test_saved_directories_open_through_trust_remote_code(tmp_path):
    mra_hf.MraForMaskedLM(mra_config()).save_pretrained(tmp_path)
    for auto_class, (ours, _) in HEADS.items():
        loaded = getattr(transformers, auto_class).from_pretrained(tmp_path, trust_remote_code=True)
        assert type(loaded) is getattr(mra_hf, ours)
    loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "modeling.py").exists()
    assert (tmp_path / "again" / "modeling_mra_hf.py").read_text().startswith("from mra_hf import")


def test_saved_directories_name_every_head(tmp_path):
    mra_hf.MraForMaskedLM(mra_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    stub = (tmp_path / "modeling_mra_hf.py").read_text()
    names = sorted(["MraConfig", *(head.class_name for head in modeling.HEADS)])
    assert stub == f"from mra_hf import {', '.join(names)}\n"
    for head in modeling.HEADS:
        assert getattr(mra_hf, head.class_name) is head.model_class
        for auto_class in head.auto_classes:
            assert auto_map.pop(auto_class.__name__) == f"modeling_mra_hf.{head.class_name}"
    assert auto_map == {"AutoConfig": "modeling_mra_hf.MraConfig"}


def test_the_tokenizer_is_registered_for_our_config():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    assert MraConfig in TOKENIZER_MAPPING
    assert AutoTokenizer is not None


def test_registration_can_be_repeated():
    mra_hf.register()
    mra_hf.register()
    assert type(AutoConfig.for_model("mra_hf")) is MraConfig
