"""`AttentionSettings`: what a change takes along, layers, what each operator is given."""

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from mra_hf import MraConfig, MraForMaskedLM, set_attention
from mra_hf.configuration import AttentionSettings

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 258,
    "type_vocab_size": 1, "layer_norm_eps": 1e-5, "initializer_range": 0.5,
}  # fmt: skip
NARROW = {"block_per_row": 1, "key_block_size": 8, "selection": "mass"}
SCALES = AttentionSettings(resolutions=[16, 4, 1], block_budgets=[9, 40])


def test_settings_come_from_the_fields_or_from_config_mra():
    assert AttentionSettings.of(RobertaConfig()) == AttentionSettings.of(MraConfig())
    stock = RobertaConfig(mra={"block_per_row": 2})
    assert AttentionSettings.of(stock) == AttentionSettings.of(MraConfig(block_per_row=2))
    with pytest.raises(ValueError, match="unknown MRA settings"):
        AttentionSettings.of(RobertaConfig(mra={"block_per_rows": 2}))


def test_a_change_clears_what_it_replaces():
    fixed = AttentionSettings(block_budget=20)
    assert fixed.replace(block_size=16).block_budget == 20
    assert fixed.replace(block_per_row=4) == AttentionSettings(block_per_row=4)
    assert fixed.replace(block_per_row=4, block_budget=9).block_budget == 9
    assert fixed.replace(resolutions=[16, 4, 1], block_budgets=[9, 40]) == SCALES
    assert SCALES.replace(block_budget=20) == fixed
    assert SCALES.replace(approx_mode="sparse").resolutions == [16, 4, 1]
    with pytest.raises(ValueError, match="resolutions and block_size describe the same thing"):
        fixed.replace(resolutions=[16, 1], block_size=16)


def test_key_blocks_are_squares_unless_said():
    assert AttentionSettings.of(MraConfig()).key_block_size == 32
    config = MraConfig()
    config.block_size = 64  # as does a dict of the config with another size
    assert AttentionSettings.of(MraConfig(**config.to_dict())).key_block_size == 64
    narrow = AttentionSettings(key_block_size=8)
    assert narrow.replace(block_per_row=4).key_block_size == 8
    assert narrow.replace(block_size=16).key_block_size == 16
    assert narrow.replace(resolutions=[16, 1], block_budgets=[9]).key_block_size is None
    with pytest.raises(ValueError, match="key_block_size must divide block_size=32"):
        AttentionSettings(key_block_size=12).check()


def test_narrow_key_blocks_are_saved_and_used(tmp_path):
    model = MraForMaskedLM(MraConfig(**SMALL, **NARROW)).eval()
    model.save_pretrained(tmp_path)
    again = MraForMaskedLM.from_pretrained(tmp_path).eval()
    assert (again.config.key_block_size, again.config.selection) == (8, "mass")
    ids = torch.randint(5, 50, (1, 200))
    narrow, loaded = (x(ids).logits for x in (model, again))
    assert torch.equal(narrow, loaded)
    squares = MraForMaskedLM.from_pretrained(tmp_path, key_block_size=32).eval()
    assert not torch.allclose(squares(ids).logits, narrow, atol=1e-4)
    stock = RobertaForMaskedLM(RobertaConfig(**SMALL)).eval()
    stock.load_state_dict(model.state_dict())
    set_attention(stock, "mra2", **NARROW)
    assert stock.config.mra["key_block_size"] == 8
    torch.testing.assert_close(stock(ids).logits, narrow)


def test_every_layer_has_its_own_budget():
    layers = AttentionSettings(block_per_row=[1, 3])
    assert layers.for_layer(1, 2) == AttentionSettings(block_per_row=3)
    assert SCALES.for_layer(7, 2) is SCALES
    for layer_idx, num_layers in ((2, None), (0, 3), (None, 2)):
        with pytest.raises(ValueError, match="give one number for all layers"):
            layers.for_layer(layer_idx, num_layers)


def test_operators_are_given_their_arguments_only():
    assert "resolutions" not in AttentionSettings().for_operator()
    assert "approx_mode" not in AttentionSettings().for_selection()
    assert "block_per_row" not in SCALES.for_operator()
    assert AttentionSettings(resolutions=[32]).for_operator()["block_budgets"] == ()
