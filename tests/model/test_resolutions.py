"""The general scheme in models: `MraConfig.resolutions`, stock models, saving, training."""

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from mra_attention import multiresolution_attention
from mra_hf import MraConfig, MraForMaskedLM, MraModel, set_attention
from mra_hf.commands import main
from mra_hf.loading import override
from tiny_models import SIZES, word_tokenizer

SCALES = {"resolutions": [16, 4, 1], "block_budgets": [9, 40]}


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 70:] = 0
    return {"input_ids": torch.randint(5, 50, (2, 100)), "attention_mask": mask}


def test_a_model_attends_by_its_scales_and_comes_back_from_a_directory(inputs, tmp_path):
    model = MraModel(MraConfig(**SIZES, **SCALES)).eval()
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
        model.save_pretrained(tmp_path)
        again = MraModel.from_pretrained(tmp_path).eval()
        assert again.config.resolutions == SCALES["resolutions"]
        torch.testing.assert_close(again(**inputs).last_hidden_state, output.last_hidden_state)
        full = MraModel.from_pretrained(tmp_path, block_per_row=8).eval()
        assert full.config.resolutions is None and full.config.block_budgets is None
        assert not torch.allclose(full(**inputs).last_hidden_state, output.last_hidden_state)
        finer = MraModel.from_pretrained(tmp_path, resolutions=[8, 1], block_budgets=[30])
        assert finer.config.resolutions == [8, 1]
        assert finer.config.block_per_row is None and finer.config.block_size is None
        assert (full.config.block_per_row, full.config.block_size) == (8, 32)
    # A matrix per layer, whose rows are made of tiles: constant over the blocks that stay coarse.
    matrix = output.attentions[0]
    torch.testing.assert_close(
        matrix.sum(-1)[0], torch.ones_like(matrix.sum(-1)[0]), atol=1e-5, rtol=0
    )
    assert (matrix[1, :, :, 70:] == 0).all()


def test_a_stock_model_attends_by_scales(inputs):
    model = RobertaModel(RobertaConfig(**SIZES)).eval()
    set_attention(model, block_per_row=4)
    set_attention(model, **SCALES)
    assert model.config.mra["resolutions"] == SCALES["resolutions"]
    assert "block_per_row" not in model.config.mra
    seen = []
    layer = model.encoder.layer[0].attention.self
    layer.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    with torch.no_grad():
        model(**inputs)
        hidden = model.embeddings(inputs["input_ids"])
        heads = SIZES["num_attention_heads"]
        qkv = [
            part(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (layer.query, layer.key, layer.value)
        ]
        expected = multiresolution_attention(*qkv, inputs["attention_mask"], **SCALES)
    torch.testing.assert_close(seen[0], expected.transpose(1, 2).flatten(2))


def test_it_trains(inputs):
    model = MraForMaskedLM(MraConfig(**SIZES, **SCALES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SCALES | {"block_per_row": 4}, "resolutions and block_per_row describe the same thing"),
        (SCALES | {"block_per_row": 8}, "resolutions and block_per_row describe the same thing"),
        (SCALES | {"block_size": 32}, "resolutions and block_size describe the same thing"),
        (SCALES | {"block_budget": 9}, "resolutions and block_budget describe the same thing"),
        (SCALES | {"block_size": 16}, "resolutions and block_size describe the same thing"),
        ({"block_budgets": [4]}, "needs resolutions"),
        ({"resolutions": [16, 4, 1]}, "block_budgets must hold one number for every scale"),
        ({"resolutions": [16, 5], "block_budgets": [3]}, "each dividing the one before"),
        (SCALES | {"selection": "refined"}, "refined.* is for two scales that end in 1"),
    ],
)
def test_two_descriptions_and_impossible_ones_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MraConfig(**settings)
    with pytest.raises(ValueError, match=message):
        MraConfig.from_dict({"model_type": "mra_hf"}, **settings)
    if len(settings) > 1 or "block_budgets" not in settings:
        model = RobertaModel(RobertaConfig(**SIZES))
        with pytest.raises(ValueError, match=message):
            set_attention(model, **settings)


def test_two_scales_by_refined_mass_return_their_matrices(inputs):
    config = MraConfig(**SIZES, resolutions=[32, 1], block_budgets=[4], selection="refined")
    model = MraModel(config).eval()
    with torch.no_grad():
        matrices = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(matrices[0].sum(-1)[:, 0][real], torch.ones(int(real.sum())))


def test_lists_can_be_given_on_the_command_line():
    config = MraConfig(**SIZES)
    override(config, "resolutions=[16, 4,1],block_budgets=[9,40],hidden_dropout_prob=0.2")
    assert config.resolutions == [16, 4, 1] and config.block_budgets == [9, 40]
    assert config.hidden_dropout_prob == 0.2
    for unknown in ("no_such=[1]", "no_such=1", "resolutions=[16"):
        with pytest.raises(ValueError, match=r"config_overrides.*(no 'no_such'|cannot be applied)"):
            override(MraConfig(**SIZES), unknown)


def test_density_is_the_share_of_the_finest_scale():
    config = MraConfig(**SIZES, **SCALES)
    # 40 blocks of side 4 of a matrix of 112 tokens.
    assert config.density(100) == pytest.approx(40 * 16 / 112**2)
    same = MraConfig(resolutions=[32, 1], block_budgets=[20])
    assert same.density(320) == MraConfig(block_budget=20).density(320)


def test_conversion_keeps_scales_or_replaces_them_by_what_is_asked(tmp_path, capsys):
    MraForMaskedLM(MraConfig(**SIZES, **SCALES)).save_pretrained(tmp_path / "scales")
    word_tokenizer().save_pretrained(tmp_path / "scales")
    convert = ["convert", str(tmp_path / "scales"), str(tmp_path / "kept"), "--max-length", "300"]
    assert main(convert) == 0
    printed = capsys.readouterr().out
    assert "blocks of 16, 4, 1 tokens (full), of which 9, 40 per head are cut" in printed
    assert "dense up to 16 tokens" in printed  # 3 x 3 blocks of 16, but 6 x 6 of 4 in whole blocks
    assert MraConfig.from_pretrained(tmp_path / "kept").resolutions == SCALES["resolutions"]
    convert[2] = str(tmp_path / "replaced")
    assert main([*convert, "--block-per-row", "4"]) == 0
    replaced = MraConfig.from_pretrained(tmp_path / "replaced")
    assert replaced.resolutions is None and replaced.block_per_row == 4


def test_switching_our_own_family_between_the_descriptions(inputs):
    model = MraModel(MraConfig(**SIZES)).eval()
    assert (model.config.block_per_row, model.config.block_size) == (8, 32)
    set_attention(model, **SCALES)
    assert model.config.block_per_row is None
    set_attention(model, block_per_row=2)
    assert model.config.resolutions is None
    assert (model.config.block_per_row, model.config.block_size) == (2, 32)
    model(**inputs)


def test_a_list_of_another_length_than_the_layers_does_not_run(inputs):
    model = RobertaModel(RobertaConfig(**SIZES))
    set_attention(model)
    model.config.mra = {"block_per_row": [2] * (SIZES["num_hidden_layers"] + 1)}
    with pytest.raises(ValueError, match="is layer 0 of"):
        model(**inputs)


def test_priors_that_take_the_whole_budget_are_refused():
    for settings in ({"initial_prior_first_n_blocks": 1}, {"initial_prior_diagonal_n_blocks": 3}):
        with pytest.raises(ValueError, match=r"block_budgets\[0\] must be at least"):
            MraConfig(resolutions=[16, 4, 1], block_budgets=[50, 9], **settings)
        MraConfig(resolutions=[16, 4, 1], block_budgets=[200, 9], **settings)


def test_a_field_that_is_set_against_the_scales_does_not_run(inputs):
    model = MraModel(MraConfig(**SIZES, **SCALES))
    model.config.block_per_row = 4
    with pytest.raises(ValueError, match="resolutions and block_per_row describe the same thing"):
        model(**inputs)
