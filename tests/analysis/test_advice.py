"""`advise`: rows of lengths and budgets on one text, and what is recommended from them."""

import pytest
import torch

from mra_hf import MraForMaskedLM, MraModel
from mra_hf.analysis import measuring
from mra_hf.analysis.advice import Advice, AdviceRow, Difference, plot_advice, recommend
from mra_hf.analysis.measuring import advise, lengths_up_to
from mra_hf.evaluation import masked_token_losses
from tiny_models import mra_config, word_tokenizer

TEXT = " ".join(f"w{10 + (7 * i) % 80}" for i in range(700))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MraForMaskedLM(mra_config(block_per_row=2)).eval()


def test_lengths_double_up_to_the_models():
    assert lengths_up_to(4096) == [512, 1024, 2048, 4096]
    assert lengths_up_to(1500) == [512, 1024, 1500]
    assert lengths_up_to(16384) == [512, 1024, 2048, 4096]
    assert lengths_up_to(256) == [256]


def test_rows_are_what_the_measures_say(model):
    advice = advise(
        model, word_tokenizer(), TEXT, lengths=[256, 128], masked_lm=True, max_tokens=500
    )
    assert [(row.length, row.block_per_row) for row in advice.rows] == [
        *[(128, None), (128, 2)],  # 4 and more blocks hold all of 128 tokens
        *[(256, None), (256, 2), (256, 4)],
    ]
    assert advice.n_tokens == 500
    for row in advice.rows:
        if row.block_per_row is None:
            model.set_attn_implementation("sdpa")
        else:
            model.set_attn_implementation("mra2")
            model.config.block_per_row = row.block_per_row
        losses = masked_token_losses(
            model, word_tokenizer(), TEXT, length=row.length, max_tokens=500, batch_size=1
        )
        assert row.loss == pytest.approx(losses.scores().nll, abs=1e-6)
        assert row.accuracy == losses.scores().accuracy
        assert advice.n_masked == len(losses.nll)
        assert row.seconds > 0
        dense = next(x for x in advice.rows if (x.length, x.block_per_row) == (row.length, None))
        assert row.over_dense.mean == pytest.approx(row.loss - dense.loss, abs=1e-6)
        assert row.over_chunks.mean == pytest.approx(row.loss - advice.rows[0].loss, abs=1e-6)
        assert (row.over_dense.half > 0) == (row is not dense)


def test_hidden_states_are_compared_with_dense_attention():
    torch.manual_seed(0)
    model = MraModel(mra_config(block_per_row=8, initializer_range=0.5)).eval()
    advice = advise(
        model, word_tokenizer(), TEXT, lengths=[64, 256], masked_lm=False, block_per_row=[1]
    )
    dense, approximate = advice.rows[2:]
    assert dense.cosine == pytest.approx(1) and approximate.cosine < 1 - 1e-4
    assert advice.n_masked is None and approximate.loss is None


def test_budgets_that_the_priors_fill_are_left_out(model):
    model.config.initial_prior_diagonal_n_blocks = 3
    model.config.block_per_row = [4, 6]
    advice = advise(
        model,
        word_tokenizer(),
        TEXT,
        lengths=[256],
        masked_lm=True,
        block_per_row=None,
        max_tokens=500,
    )
    assert [row.block_per_row for row in advice.rows] == [None, 4, [4, 6]]
    with pytest.raises(ValueError, match="block_per_row must be at least 4"):
        advise(model, word_tokenizer(), TEXT, lengths=[256], masked_lm=True, block_per_row=[2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": [999]}, "lengths must be at most 256"),
        ({"lengths": [256], "texts": "w10 w11"}, "text must hold at least 256 tokens"),
        ({"lengths": [256], "block_per_row": [0]}, "block_per_row must be"),
        ({"lengths": [256], "max_tokens": 10}, "max_tokens must be"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, changes, said):
    arguments = {"texts": TEXT, "masked_lm": True} | changes
    with pytest.raises(ValueError, match=said):
        advise(model, word_tokenizer(), **arguments)


def rows(losses: dict, seconds: dict, half: float = 0.01) -> list[AdviceRow]:
    return [
        AdviceRow(
            length,
            blocks,
            seconds[length, blocks],
            100.0,
            accuracy=0.3,
            loss=loss,
            over_dense=Difference(loss - losses[length, None], half),
            over_chunks=Difference(loss - losses[512, None], half),
        )
        for (length, blocks), loss in losses.items()
    ]


SECONDS = {(512, None): 1.0, (4096, None): 4.0, (4096, 4): 1.0, (4096, 8): 1.5, (4096, 16): 2.0}


def test_the_fastest_budget_within_the_tolerance_is_taken():
    losses = {(512, None): 3.4, (4096, None): 3.3, (4096, 4): 3.6, (4096, 8): 3.34, (4096, 16): 3.3}
    text = recommend(rows(losses, SECONDS))
    assert "take block_per_row=8: loss 3.340, +0.040 +- 0.010 beside dense attention" in text
    assert "2.7 times as fast as dense attention" in text
    assert "4 blocks are faster, but with loss 3.600" in text
    assert "reading the document whole lowers the loss by 0.060 nats" in text


def test_a_text_too_short_to_tell_budgets_apart_is_named_and_changes_no_choice():
    losses = {(512, None): 3.4, (4096, None): 3.3, (4096, 4): 3.6, (4096, 8): 3.38, (4096, 16): 3.3}
    assert "too short" not in recommend(rows(losses, SECONDS))
    text = recommend(rows(losses, SECONDS, half=0.04))
    assert "block_per_row=16" in text
    assert "too short to tell whether 8 blocks stay within 0.05 nats" in text
    text = recommend(rows(losses, SECONDS, half=0.06))
    assert "whether 8 blocks and 16 blocks stay" in text


def test_of_equal_times_the_better_quality_is_taken_and_faster_rows_are_the_best_of_them():
    losses = {(512, None): 3.4, (4096, None): 3.3, (4096, 4): 3.6, (4096, 8): 3.34, (4096, 16): 3.3}
    assert "block_per_row=16" in recommend(rows(losses, SECONDS | {(4096, 16): 1.55}))
    losses |= {(4096, 8): 3.4}
    text = recommend(rows(losses, SECONDS | {(4096, 8): 0.9}))
    assert "8 blocks are faster, but with loss 3.400" in text  # 4 are slower and worse


def test_only_passes_over_whole_chunks_count(model):
    class Clock(measuring._Watch):
        """A pass takes a second, whatever its length."""

        def _end(self, encoder, inputs, output):
            super()._end(encoder, inputs, output)
            self.seconds[-1] = 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_Watch", Clock)
        for tokens in (254, 260, 508, 515):  # one or two chunks, and a rest of some tokens
            advice = advise(
                *(model, word_tokenizer(), TEXT),
                **{"lengths": [256], "masked_lm": True, "max_tokens": tokens},
            )
            assert [row.seconds for row in advice.rows] == [1.0] * len(advice.rows)


def test_chunks_are_recommended_where_they_read_better():
    losses = {(512, None): 3.2, (4096, None): 3.3, (4096, 4): 3.31, (4096, 8): 3.3, (4096, 16): 3.3}
    text = recommend(rows(losses, SECONDS))
    assert "take block_per_row=4" in text
    assert "a loss 0.110 nats lower" in text and "keep chunks" in text


def test_dense_attention_is_recommended_where_no_budget_is_good_or_fast():
    poor = {(512, None): 3.2, (4096, None): 3.3, (4096, 4): 3.9, (4096, 8): 3.8, (4096, 16): 3.4}
    assert "even 16 blocks per row have loss 3.400" in recommend(rows(poor, SECONDS))
    slow = {key: 9.0 if key[1] else 4.0 for key in SECONDS}
    good = dict.fromkeys(SECONDS, 3.3)
    assert "take dense attention" in recommend(rows(good, slow))


def test_the_picture_is_written(tmp_path):
    losses = {(512, None): 3.4, (4096, None): 3.3, (4096, 4): 3.6, (4096, 8): 3.34, (4096, 16): 3.3}
    measured = rows(losses, SECONDS)
    plot_advice(Advice(tuple(measured), 4096, 8000, 1200, 1.0, ""), tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 10_000
