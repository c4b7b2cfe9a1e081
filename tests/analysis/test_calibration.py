"""What each head needs, and budgets for each layer, in configurations and models."""

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaModel

import mra_hf
from files import read_csv
from mra_attention import mra2_attention
from mra_hf.analysis.calibration import head_report, propose
from mra_hf.analysis.head_inputs import synthetic_heads
from mra_hf.analysis.recording import record_heads
from mra_hf.baselines.measures import attention_weights
from mra_hf.commands import main
from mra_hf.english import english_checkpoint
from mra_hf.loading import override
from tiny_models import SIZES, mra_config, padded_batch, roberta_config, word_tokenizer


def test_a_report_says_what_a_head_needs():
    heads = synthetic_heads(256, instances=1, head_dim=16)
    rows = head_report(heads)
    assert len(rows) == 12 and "error_8" in rows[0] and "error_16" not in rows[0]
    for row, number in zip(rows, range(12), strict=True):
        one = heads.head(0, number)
        weights = attention_weights(one.query, one.key, one.scale)[0, 0]
        exact = weights @ one.value[0, 0]
        output = mra2_attention(one.query, one.key, one.value, block_per_row=4, scale=one.scale)
        error = (output[0, 0] - exact).norm() / exact.norm()
        assert row["error_4"] == pytest.approx(float(error), rel=1e-3)
        mean = one.value[0, 0].mean(0)
        floor = (mean - exact).norm() / exact.norm()
        assert row["mean_value_error"] == pytest.approx(float(floor), rel=1e-4)
        entropy = -(weights * weights.log()).nan_to_num().sum(-1).mean()
        assert row["entropy"] == pytest.approx(float(entropy), rel=1e-3)
        assert 0 < row["mass_2"] <= row["mass_4"] <= row["mass_8"] <= 1.0001
    assert rows[0]["mass_8"] == pytest.approx(1), "all of 8 x 8 blocks"


def test_a_proposal_is_the_smallest_budget_below_the_target():
    model = RobertaModel(roberta_config(max_position_embeddings=260, num_hidden_layers=3))
    for layer, factor in zip(model.encoder.layer, (1, 6, 15), strict=True):
        layer.attention.self.query.weight.data *= factor
        layer.attention.self.key.weight.data *= factor
    heads = record_heads(model, [torch.randint(5, 90, (256,)) for _ in range(2)], "test")
    proposal = propose(heads, 0.1)
    for layer, blocks in enumerate(proposal.block_per_row):
        errors = [
            sum(row[f"error_{n}"] for row in rows) / len(rows)
            for n in (blocks, blocks - 1)
            if n > 0
            for rows in [
                [
                    row
                    for row in head_report(heads, (n,))
                    if row["instance"].endswith(f"layer {layer}")
                ]
            ]
        ]
        assert errors[0] < 0.1 and all(error >= 0.1 for error in errors[1:])
        assert proposal.errors[layer] == pytest.approx(errors[0], rel=1e-4, abs=1e-6)
    assert len(set(proposal.block_per_row)) > 1
    with pytest.raises(ValueError, match="target_error must be positive"):
        propose(heads, 0)
    with pytest.raises(ValueError, match="recorded from a model"):
        propose(synthetic_heads(64), 0.1)


@pytest.mark.parametrize("family", ["own", "stock"])
def test_every_layer_attends_with_its_own_budget(family, tmp_path):
    sizes = SIZES | {"num_hidden_layers": 2}
    inputs = padded_batch(2)
    if family == "own":
        model = mra_hf.MraModel(mra_hf.MraConfig(**sizes, block_per_row=[1, 2])).eval()
    else:
        model = RobertaModel(roberta_config(num_hidden_layers=2)).eval()
        mra_hf.set_attention(model, block_per_row=[1, 2])
    seen = []
    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(lambda m, i, o: seen.append((m, i, o[0])))
    with torch.no_grad():
        model(**inputs)
    for (attention, hidden_states, output), blocks in zip(seen, (1, 2), strict=True):
        heads = attention.num_attention_heads
        parts = (
            getattr(attention, name)(hidden_states[0]).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        expected = mra2_attention(*parts, inputs["attention_mask"], block_per_row=blocks)
        torch.testing.assert_close(output, expected.transpose(1, 2).flatten(2))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="mra2").eval()
    kept = loaded.config.block_per_row if family == "own" else loaded.config.mra["block_per_row"]
    assert kept == [1, 2]
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_per_row": [1]}, "one number for each of 2 layers, got 1"),
        ({"block_per_row": []}, "one number for each layer, got none"),
        ({"block_per_row": [1, 0]}, r"block_per_row\[1\] must be"),
        ({"block_per_row": [4, 8], "block_budget": 9}, "give one of them"),
        ({"block_per_row": [2, 8], "initial_prior_first_n_blocks": 1}, "must be at least 3"),
    ],
)
def test_lists_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mra_hf.MraConfig(**SIZES | {"num_hidden_layers": 2}, **settings)
    with pytest.raises(ValueError, match=message):
        mra_hf.set_attention(RobertaModel(roberta_config(num_hidden_layers=2)), **settings)


def test_layers_that_do_not_know_their_place_are_refused():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=99))
    for layer in model.encoder.layer:
        layer.attention.self.layer_idx = None
    with pytest.raises(ValueError, match="BertSelfAttention does not know its place"):
        mra_hf.set_attention(model, block_per_row=[1, 2])
    assert getattr(model.config, "mra", None) is None, "nothing is changed"


def test_budgets_that_were_set_one_by_one_are_checked_when_a_model_is_made(tmp_path):
    model = mra_hf.MraModel(mra_hf.MraConfig(**SIZES | {"num_hidden_layers": 2}))
    model.save_pretrained(tmp_path)
    for settings, message in (
        ({"block_per_row": [1, 2, 3]}, "one number for each of 2 layers"),
        ({"block_per_row": [1, 2], "block_budget": 5}, "give one of them"),
        (
            {"resolutions": [16, 4, 1], "block_budgets": [5, 5], "block_per_row": 4},
            "describe the same thing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mra_hf.MraModel.from_pretrained(tmp_path, **settings)


def test_density_and_overrides_know_lists():
    config = mra_hf.MraConfig(**SIZES | {"num_hidden_layers": 2}, block_per_row=[1, 3])
    assert config.density(320) == pytest.approx(0.2)
    override(config, "block_per_row=[2,4],hidden_dropout_prob=0.0")
    assert config.block_per_row == [2, 4] and config.density(320) == pytest.approx(0.3)


def test_conversion_keeps_a_list(tmp_path, capsys):
    config = mra_config(block_per_row=[1, 2], num_hidden_layers=2)
    mra_hf.MraForMaskedLM(config).save_pretrained(tmp_path / "lists")
    word_tokenizer().save_pretrained(tmp_path / "lists")
    assert main(["convert", str(tmp_path / "lists"), str(tmp_path / "kept")]) == 0
    assert "1, 2 exact blocks of 32 tokens per block row" in capsys.readouterr().out
    assert mra_hf.MraConfig.from_pretrained(tmp_path / "kept").block_per_row == [1, 2]


def test_the_calibrate_command(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 200)
    command = ["calibrate", str(english_checkpoint()), "text.txt", "--length", "256"]
    assert main([*command, "--target-error", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "entropy: mean over the heads, in nats" in printed
    assert max(map(len, printed.splitlines())) <= 100
    proposed = printed[printed.index("block_per_row=[") :].split("]")[0].split("[")[1]
    budgets = [int(number) for number in proposed.split(",")]
    assert len(budgets) == 4 and all(1 <= blocks <= 8 for blocks in budgets)
    rows = read_csv(tmp_path / "calibration.csv")
    assert len(rows) == 2 * 4 * 3 and float(rows[0]["error_8"]) < 1e-3
    model = mra_hf.MraForMaskedLM.from_pretrained(english_checkpoint())
    mra_hf.set_attention(model, block_per_row=budgets)
    assert "exists; name another file" in refused(*command, "--target-error", "0.2")
