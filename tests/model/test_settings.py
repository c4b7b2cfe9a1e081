"""`AttentionSettings`: what a change takes along, layers, what each operator is given."""

import pytest
from transformers import RobertaConfig

from mra_hf import MraConfig
from mra_hf.configuration import AttentionSettings

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
