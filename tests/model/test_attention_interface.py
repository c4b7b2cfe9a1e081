"""`attn_implementation="mra2"` on stock models: padding, refusals, settings, matrices, memory."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, RobertaForMaskedLM, RobertaModel

from mra_attention import torch_impl
from mra_hf import MraForMaskedLM, set_attention
from tensor_sizes import LargestTensor
from tiny_models import SIZES, mra_config, padded_batch, roberta_config

TEXT = {name: SIZES[name] for name in SIZES if name not in ("type_vocab_size", "layer_norm_eps")}
STOCK = {
    "roberta": lambda: roberta_config(),
    "bert": lambda: transformers.BertConfig(**TEXT),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**TEXT),
    "electra": lambda: transformers.ElectraConfig(**TEXT, embedding_size=32),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=258
    ),
}


def peaked(model):
    """Scale queries and keys of a random tiny model, so that its attention is far from even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("query", "key", "q_lin", "k_lin")):
                parameter.mul_(30)
    return model.eval()


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("side", ["right", "left"])
def test_stock_models_at_full_budget_equal_their_dense_selves(kind, side, tmp_path):
    dense = peaked(AutoModel.from_config(STOCK[kind](), attn_implementation="eager"))
    dense.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="mra2").eval()
    batch = padded_batch(length=200, side=side)
    real = batch["attention_mask"].bool()
    ours, expected = model(**batch)[0][real], dense(**batch)[0][real]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["mra2", "mra2_s"])
def test_padding_does_not_change_a_sample_on_a_stock_model(name):
    model = set_attention(peaked(RobertaModel(roberta_config())), name, block_per_row=2)
    batch = padded_batch(batch=3, length=200)
    alone = model(batch["input_ids"][2:, :140])[0]
    together = model(**batch)[0][2:, :140]
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_settings_reach_the_operator_and_are_saved(tmp_path):
    model = peaked(RobertaModel(roberta_config(), add_pooling_layer=False))
    ids = torch.randint(5, 99, (1, 256))
    outputs = {}
    for block_per_row in (1, 4, 8):
        set_attention(model, block_per_row=block_per_row)
        assert model.config.mra == {"block_per_row": block_per_row}
        outputs[block_per_row] = model(ids)[0]
    model.set_attn_implementation("sdpa")
    errors = [(outputs[n] - model(ids)[0]).norm() for n in (1, 4, 8)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    set_attention(model, "mra2", block_per_row=1)
    model.save_pretrained(tmp_path)
    loaded = RobertaModel.from_pretrained(
        tmp_path, attn_implementation="mra2", add_pooling_layer=False
    ).eval()
    assert torch.equal(loaded(ids)[0], outputs[1])
    assert "impl" not in str(loaded.config.to_dict())


def test_impl_is_a_choice_of_the_process(monkeypatch):
    model = set_attention(peaked(RobertaModel(roberta_config())), impl="reference", block_per_row=2)
    ids = torch.randint(5, 99, (1, 200))
    reference = model(ids)[0]
    monkeypatch.setattr(torch_impl, "forward", None)  # the reference must not need it
    assert torch.equal(model(ids)[0], reference)
    monkeypatch.undo()
    set_attention(model, impl="torch")
    torch.testing.assert_close(model(ids)[0], reference, atol=1e-5, rtol=0)


def test_mra2_s_is_the_sparse_mode():
    model = peaked(RobertaModel(roberta_config(), add_pooling_layer=False))
    ids = torch.randint(5, 99, (1, 256))
    by_name = set_attention(model, "mra2_s", block_per_row=1)(ids)[0]
    by_mode = set_attention(model, "mra2", approx_mode="sparse")(ids)[0]
    assert torch.equal(by_name, by_mode)
    assert not torch.equal(by_name, set_attention(model, "mra2", approx_mode="full")(ids)[0])


def test_mra2_s_of_our_family_is_kept_by_saving(tmp_path):
    model = peaked(MraForMaskedLM(mra_config(block_per_row=1)))
    ids = torch.randint(5, 99, (1, 256))
    expected = set_attention(model, "mra2_s")(ids).logits
    model.save_pretrained(tmp_path)
    loaded = MraForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.approx_mode == "sparse"
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-6, rtol=0)
    by_name = MraForMaskedLM(mra_config(block_per_row=1))
    by_name.set_attn_implementation("mra2_s")
    by_name.save_pretrained(tmp_path / "by-name")
    again = MraForMaskedLM.from_pretrained(tmp_path / "by-name")
    assert again.config.approx_mode == "sparse"


def test_settings_of_a_stock_directory_are_read_by_our_family(tmp_path):
    stock = set_attention(RobertaForMaskedLM(roberta_config()), block_per_row=2)
    stock.save_pretrained(tmp_path)
    model = MraForMaskedLM.from_pretrained(tmp_path)
    assert model.config.block_per_row == 2 and not hasattr(model.config, "mra")


def test_attention_modules_without_is_causal_lose_their_dropout_too():
    config = transformers.SplinterConfig(**TEXT)
    model = set_attention(transformers.SplinterModel(config)).train()
    model(**padded_batch())[0].sum().backward()


def test_our_family_takes_settings_in_its_fields():
    model = MraForMaskedLM(mra_config())
    set_attention(model, block_per_row=2, approx_mode="sparse")
    assert (model.config.block_per_row, model.config.approx_mode) == (2, "sparse")
    assert not hasattr(model.config, "mra")
    with pytest.raises(ValueError, match="block_per_row"):
        set_attention(model, block_per_row=0)
    assert model.config.block_per_row == 2


def test_attention_dropout_is_refused_by_the_call_and_removed_by_set_attention():
    model = RobertaForMaskedLM._from_config(roberta_config(), attn_implementation="mra2").train()
    batch = padded_batch()
    for refusing in (model, MraForMaskedLM(mra_config(attention_probs_dropout_prob=0.1)).train()):
        with pytest.raises(ValueError, match=r"attention_probs_dropout_prob.*set_attention"):
            refusing(**batch)
    set_attention(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize("kind", STOCK)
def test_set_attention_makes_every_stock_model_trainable(kind):
    model = set_attention(AutoModel.from_config(STOCK[kind]()), block_per_row=1).train()
    model(**padded_batch(length=200))[0].square().sum().backward()


def test_vision_models_run():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=4, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = peaked(AutoModel.from_config(config, attn_implementation="eager"))
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels)[0]
    set_attention(model, block_per_row=4)
    torch.testing.assert_close(model(pixels)[0], expected, atol=2e-5, rtol=0)


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PICTURE = SMALL | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 4}
REFUSED = {
    "DeBERTa-v2": lambda: transformers.DebertaV2Config(**TEXT),
    "MPNet": lambda: transformers.MPNetConfig(**TEXT),
    "sliding windows": lambda: transformers.ModernBertConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "causal": lambda: transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    ),
    "decoder": lambda: transformers.BertConfig(**TEXT, is_decoder=True),
    "no attention function": lambda: transformers.FNetConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, intermediate_size=64
    ),
    "relative bias": lambda: transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, use_relative_position_bias=True,
    ),
    "causal tower": lambda: transformers.CLIPTextConfig(**TEXT),
    "two towers": lambda: transformers.CLIPConfig(text_config=TEXT, vision_config=PICTURE),
    "expanded mask": lambda: transformers.LayoutLMConfig(**TEXT),
    "expanded mask of MarkupLM": lambda: transformers.MarkupLMConfig(**TEXT),
    "encoder-decoder": lambda: transformers.BartConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_would_ignore_or_misuse_it_are_refused(kind):
    model = AutoModel.from_config(REFUSED[kind]())
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="MPNetModel.*RoBERTa" if kind == "MPNet" else "mra2"):
        set_attention(model)
    assert model.config._attn_implementation == before


def test_a_model_with_a_causal_tower_names_the_tower_that_can_be_switched():
    model = AutoModel.from_config(REFUSED["two towers"]()).eval()
    towers = model.text_model, model.vision_model
    before = [tower.config.to_dict() for tower in towers]
    with pytest.raises(
        ValueError, match=r"text_model.*causally.*set_attention\(model\.vision_model"
    ):
        set_attention(model, block_per_row=2)
    assert [tower.config.to_dict() for tower in towers] == before
    set_attention(model.vision_model, block_per_row=2)
    inputs = {"input_ids": torch.randint(5, 99, (1, 20)), "pixel_values": torch.rand(1, 3, 32, 32)}
    model(**inputs)
    names = [tower.config._attn_implementation for tower in towers]
    assert names == ["sdpa", "mra2"]
    text = {name: TEXT[name] for name in TEXT if name != "type_vocab_size"}
    both = transformers.SiglipConfig(text_config=text, vision_config=PICTURE)
    set_attention(AutoModel.from_config(both).eval())(**inputs)


def test_a_head_on_an_encoder_that_expands_its_mask_is_refused_by_the_part():
    model = transformers.LayoutLMForMaskedLM(REFUSED["expanded mask"]())
    with pytest.raises(ValueError, match=r"in its layoutlm, expands its padding mask.*sdpa"):
        set_attention(model)


class Adapted(torch.nn.Module):
    """What PEFT puts around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self):
        return self.inner


def test_a_wrapper_is_refused_with_the_call_to_make():
    model = RobertaModel(roberta_config())
    wrappers = {
        r"set_attention\(model\.get_base_model\(\), ": Adapted(model),
        r"set_attention\(model\.module, ": torch.nn.DataParallel(model),
        r"set_attention\(model\._orig_mod, ": torch.compile(model),
        r'set_attention\(model\.get_submodule\("0"\), ': torch.nn.Sequential(model),
    }
    for message, wrapper in wrappers.items():
        with pytest.raises(ValueError, match=message):
            set_attention(wrapper)
    assert model.config._attn_implementation == "sdpa"
    set_attention(Adapted(model).get_base_model())


def test_arguments_of_longformer_are_refused():
    ids = torch.randint(5, 99, (1, 40))
    globally = torch.zeros_like(ids)
    for model in (MraForMaskedLM(mra_config()), set_attention(RobertaModel(roberta_config()))):
        with pytest.raises(
            ValueError, match=r"global_attention_mask.*initial_prior_first_n_blocks"
        ):
            model.eval()(ids, global_attention_mask=globally)


LOAD_AND_RUN = """
import sys, torch
model, ids, expected = torch.load(sys.argv[1], weights_only=False)
assert "mra_hf" in sys.modules
torch.testing.assert_close(model(ids)[0], expected)
"""


def test_a_stock_model_runs_in_a_process_that_unpickles_it(tmp_path):
    """What spawned workers and `torch.load` do, without `import mra_hf`; a part, too."""
    model = set_attention(peaked(RobertaModel(roberta_config())), impl="torch", block_per_row=1)
    ids = torch.randint(5, 99, (1, 200))
    kept = copy.deepcopy(model)
    assert kept.encoder.layer[0].attention.self.mra_impl.value == "torch"
    with torch.no_grad():
        assert torch.equal(kept(ids)[0], model(ids)[0])
        torch.save((model, ids, model(ids)[0]), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, str(tmp_path / "model.pt")], check=True)


def test_a_causal_model_is_refused_at_its_first_forward():
    config = REFUSED["causal"]()
    model = AutoModel.from_config(config, attn_implementation="mra2")
    with pytest.raises(ValueError, match="bidirectional"):
        model(torch.randint(5, 99, (1, 40)))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"name": "flash"}, "name.*mra2_s.*sdpa"),
        ({"impl": "fast"}, "impl"),
        ({"block_per_rows": 4}, r"block_per_rows.*block_per_row\b"),
        ({"block_per_row": 0}, "block_per_row"),
        ({"name": "mra2_s", "approx_mode": "full"}, "approx_mode"),
        ({"initial_prior_first_n_blocks": 4}, "block_per_row"),
    ],
)
def test_set_attention_refuses_wrong_settings_and_changes_nothing(arguments, word):
    model = RobertaModel(roberta_config())
    with pytest.raises(ValueError, match=word):
        set_attention(model, **arguments)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "mra")
    assert model.config.attention_probs_dropout_prob == 0.1


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match=r"model.*PreTrainedModel"):
        set_attention(torch.nn.Linear(2, 2))


def test_an_explicit_disagreement_in_the_config_is_refused():
    config = roberta_config(mra={"approx_mode": "full"})
    model = RobertaModel._from_config(config, attn_implementation="mra2_s").eval()
    with pytest.raises(ValueError, match="approx_mode"):
        model(torch.randint(5, 99, (1, 40)))


def test_expanded_and_float_masks_are_refused():
    model = RobertaModel._from_config(roberta_config(), attn_implementation="mra2").eval()
    ids = torch.randint(5, 99, (2, 40))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 40, 40))


def test_output_attentions_returns_the_rows_of_a_hat():
    model = peaked(RobertaModel(roberta_config()))
    batch = padded_batch(length=200)
    model.set_attn_implementation("eager")
    dense = model(**batch, output_attentions=True).attentions
    set_attention(model, block_per_row=8)
    full = model(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    assert len(full.attentions) == 2
    for ours, expected in zip(full.attentions, dense, strict=True):
        rows = real[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[rows], expected[rows], atol=2e-5, rtol=0)
    set_attention(model, block_per_row=1)
    approximate = model(**batch, output_attentions=True)
    sums = approximate.attentions[0].sum(-1)
    torch.testing.assert_close(sums, real[:, None].expand_as(sums).float())
    assert torch.equal(approximate[0], model(**batch)[0])


def test_output_attentions_is_refused_above_2048_tokens_and_in_the_config():
    model = MraForMaskedLM(mra_config(max_position_embeddings=2052)).eval()
    with pytest.raises(ValueError, match=r"output_attentions.*2048.*select_blocks"):
        model(torch.randint(5, 99, (1, 2050)), output_attentions=True)
    ids = torch.randint(5, 99, (1, 40))
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)
    with pytest.raises(ValueError, match="output_attentions"):
        MraForMaskedLM(mra_config(output_attentions=True))(ids)


def test_no_mask_of_n_by_n_is_built():
    length = 4096
    model = RobertaModel(roberta_config(max_position_embeddings=length + 2, num_hidden_layers=1))
    set_attention(model.eval())
    batch = padded_batch(batch=2, length=length)
    with torch.no_grad(), LargestTensor() as ours:
        model(**batch)
    assert ours.elements < length * length / 4
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), LargestTensor() as dense:
        model(**batch)
    assert dense.elements >= length * length  # the measure does see such a mask


@pytest.mark.parametrize("biased", [False, True])
def test_the_fast_path_holds_no_n_by_n_buffer(biased):
    length = 4096
    q, k, v, grad = (torch.randn(1, 1, length, 16) for _ in range(4))
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[:, -100:] = False
    blocks = torch.rand(1, 1, 128, 128) < 8 / 128
    settings = {"scale": 0.25, "sparse": False, "block_size": 32, "key_block_size": 32}
    settings |= {"summaries": None, "largest_budget": None, "initial_prior_first_n_blocks": 0}
    settings["distance_bias"] = torch.zeros(1, 128) if biased else None
    with LargestTensor() as largest:
        output, lse = torch_impl.forward(q, k, v, mask, blocks, **settings)
        torch_impl.backward(grad, q, k, v, output, lse, mask, blocks, **settings)
    assert largest.elements < length * length / 8


def test_a_stock_model_keeps_its_settings_through_auto_classes(tmp_path):
    model = set_attention(AutoModelForMaskedLM.from_config(roberta_config()), block_per_row=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="mra2").eval()
    assert loaded.config.mra == {"block_per_row": 2}
    batch = padded_batch(length=200)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
