"""Longer conversions start with a distance bias: short texts keep the source's outputs."""

from __future__ import annotations

import pytest
import torch
from conversion_cases import (
    SIZES,
    SOURCES,
    assert_report_is_complete,
    make_source,
    open_result,
)
from safetensors.torch import load_file, save_file

from mra_hf.conversion import convert_checkpoint
from mra_hf.distance_bias import BIAS_PER_WEIGHT

NAME = "roberta.encoder.layer.0.attention.self.distance_bias.weight"
SPAN = 300  # tokens of the results


def convert(source, output, **arguments):
    return convert_checkpoint(source, output, **({"max_length": SPAN} | arguments))


def biases(folder):
    """The bias by distance of the first layer, `[heads, distances]`."""
    module = open_result(folder).roberta.encoder.layer[0].attention.self.distance_bias
    return module(torch.zeros(1)).detach()


@pytest.mark.parametrize("length", [144, 512])
@pytest.mark.parametrize("source_type", ["roberta", "xlm-roberta", "bert"])
def test_texts_that_fit_the_source_keep_its_outputs(source_type, length, tmp_path):
    rows = length if source_type == "bert" else length + 2
    source = make_source(tmp_path / "source", source_type, max_position_embeddings=rows)
    convert(tmp_path / "source", tmp_path / "out", max_length=4 * length, block_per_row=64)
    result = open_result(tmp_path / "out")
    assert result.config.distance_bias_window == (14 if length == 512 else 3)
    ids = torch.randint(5, SIZES["vocab_size"], (2, length - 32))
    mask = torch.ones_like(ids)
    mask[1, -20:] = 0
    ids = ids.masked_fill(mask == 0, SOURCES[source_type].pad)
    with torch.no_grad():
        expected = source(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        output = result(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_it_starts_closed_beyond_the_window(tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    report = convert(tmp_path / "source", tmp_path / "out", max_length=600)
    bias = biases(tmp_path / "out")
    assert bias.shape == (2, 19) and (bias[:, :4] == 0).all()
    torch.testing.assert_close(bias[:, 4:], torch.full((2, 15), -8.0))
    assert_report_is_complete(report, load_file(tmp_path / "source/model.safetensors"),
                              tmp_path / "out")  # fmt: skip
    assert report.counts()["new"] == SIZES["num_hidden_layers"]
    assert (report.distance_bias_window, report.distance_bias_far) == (3, -8.0)
    for text in (report.summary(), report.model_card()):
        assert "3 blocks" in text and "-8 beyond" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "share a row of the position table" in card


def test_other_starts_can_be_asked_for(tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "out", far_bias=-3)
    torch.testing.assert_close(biases(tmp_path / "out")[:, 4:], torch.full((2, 6), -3.0))
    report = convert(tmp_path / "source", tmp_path / "plain", distance_bias=False)
    assert NAME not in open_result(tmp_path / "plain").state_dict()
    assert report.distance_bias_window is None and "bias" not in report.summary()


def test_a_table_that_is_not_longer_has_none_unless_asked(tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    for length in (144, 100):
        convert(tmp_path / "source", tmp_path / "out", max_length=length, force=True)
        assert open_result(tmp_path / "out").config.distance_bias_window is None
    convert(tmp_path / "source", tmp_path / "asked", max_length=144, distance_bias=True)
    assert open_result(tmp_path / "asked").config.distance_bias_window == 3


def test_a_trained_bias_is_kept_and_grows_with_the_table(tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME] = torch.randn_like(tensors[NAME]) / BIAS_PER_WEIGHT
    save_file(tensors, file, {"format": "pt"})
    convert(tmp_path / "first", tmp_path / "same")
    assert torch.equal(biases(tmp_path / "same"), biases(tmp_path / "first"))
    report = convert(tmp_path / "first", tmp_path / "longer", max_length=2000)
    before, after = biases(tmp_path / "first"), biases(tmp_path / "longer")
    assert torch.equal(after[:, :10], before)
    assert torch.equal(after[:, 10:], before[:, -1:].expand(-1, after.shape[1] - 10))
    [record] = [record for record in report.tensors if record.name == NAME]
    assert record.action == "tiled" and "as the last one" in record.note
    convert(tmp_path / "first", tmp_path / "shorter", max_length=100)
    assert torch.equal(biases(tmp_path / "shorter"), before[:, :4])
    report = convert(tmp_path / "first", tmp_path / "without", distance_bias=False)
    assert report.counts()["dropped"] == SIZES["num_hidden_layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance_bias": False, "far_bias": -4.0}, "far_bias=-4.0 is for a distance bias"),
        ({"far_bias": float("nan")}, "far_bias must lie between"),
        ({"far_bias": -1e9}, "far_bias must lie between -10000 and 10000"),
        ({"far_bias": "low"}, "far_bias must be a number"),
        ({"distance_bias": 2}, "distance_bias must be True, False or None"),
        ({"distance_bias": 1}, "distance_bias must be True, False or None"),
        ({"far_bias": -4.0, "max_length": 40}, "no position is repeated"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(arguments, message, tmp_path):
    make_source(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_new_start_for_an_old_bias_is_refused(tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "first")
    with pytest.raises(ValueError, match="SOURCE has a distance bias already"):
        convert(tmp_path / "first", tmp_path / "out", far_bias=-4.0)


def learned_rows(folder):
    return open_result(folder).roberta.embeddings.position_embeddings.weight[2:].detach()


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_longer_table_is_converted_again_as_if_at_once(is_trained, tmp_path):
    """300 is no multiple of 144: row 300 must follow row 299, not be the first one again."""
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "at_once", max_length=700)
    convert(tmp_path / "source", tmp_path / "first")
    if is_trained:  # every row goes its own way, but not far
        model = open_result(tmp_path / "first")
        with torch.no_grad():
            table = model.roberta.embeddings.position_embeddings.weight
            steps = (table[3:] - table[2:-1]).abs().mean()
            table[2:] += 0.1 * steps * torch.randn_like(table[2:])
        model.save_pretrained(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "again", max_length=700)
    rows, expected = learned_rows(tmp_path / "again"), learned_rows(tmp_path / "at_once")
    if is_trained:
        assert torch.equal(rows[:SPAN], learned_rows(tmp_path / "first"))
        assert torch.equal(rows[SPAN:], rows[SPAN - 144 : -144])
    else:
        assert torch.equal(rows, expected)
    assert torch.equal(biases(tmp_path / "again"), biases(tmp_path / "at_once"))


def test_the_window_is_that_of_the_positions_not_of_the_table(tmp_path):
    """A conversion without a bias gets one that fits what its table repeats."""
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "plain", distance_bias=False)
    convert(tmp_path / "plain", tmp_path / "longer", max_length=700)
    convert(tmp_path / "plain", tmp_path / "same", distance_bias=True)
    for name in ("longer", "same"):
        assert open_result(tmp_path / name).config.distance_bias_window == 3
    convert(tmp_path / "plain", tmp_path / "kept")
    assert open_result(tmp_path / "kept").config.distance_bias_window is None


@pytest.mark.parametrize(("row", "size"), [(0, 3.0), (40, 3.0)])
def test_a_row_that_training_moved_far_hides_no_period(row, size, tmp_path):
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "plain", distance_bias=False)
    model = open_result(tmp_path / "plain")
    with torch.no_grad():
        table = model.roberta.embeddings.position_embeddings.weight[2:]
        table[row] += size * (table[1:] - table[:-1]).norm(dim=-1).mean() / table.shape[1] ** 0.5
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "longer", max_length=700)
    assert open_result(tmp_path / "longer").config.distance_bias_window == 3


def test_a_last_row_like_the_first_is_no_period(tmp_path):
    source = make_source(tmp_path / "source", max_position_embeddings=146)
    with torch.no_grad():
        table = source.roberta.embeddings.position_embeddings.weight[2:]
        table[-1] = table[0] + 1e-4
        table[100:-1] = 0
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert torch.equal(learned_rows(tmp_path / "out")[144:], learned_rows(tmp_path / "out")[:156])


def test_the_first_block_opens_with_a_bias_that_comes_later(tmp_path):
    """Converted at its own length first, say to be fine-tuned, and then lengthened."""
    make_source(tmp_path / "source", "roberta", "Model", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "same", max_length=144)
    assert open_result(tmp_path / "same").config.initial_prior_first_n_blocks == 0
    convert(tmp_path / "same", tmp_path / "longer")
    assert open_result(tmp_path / "longer").config.initial_prior_first_n_blocks == 1
    convert(tmp_path / "longer", tmp_path / "again", max_length=700)
    assert open_result(tmp_path / "again").config.initial_prior_first_n_blocks == 1


def test_equal_rows_are_no_period(tmp_path):
    source = make_source(tmp_path / "source", max_position_embeddings=146)
    with torch.no_grad():
        source.roberta.embeddings.position_embeddings.weight[2:] = 0.5
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert open_result(tmp_path / "out").config.distance_bias_window == 3


def test_a_window_that_the_positions_cannot_serve_is_refused(tmp_path):
    """A shortened conversion lost the rows that its window needs."""
    make_source(tmp_path / "source", max_position_embeddings=146)
    convert(tmp_path / "source", tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "short", max_length=100)
    with pytest.raises(ValueError, match="window of 3 blocks, but as its positions repeat after 1"):
        convert(tmp_path / "short", tmp_path / "longer", max_length=700)
    assert not (tmp_path / "longer").exists()
    convert(tmp_path / "short", tmp_path / "without", max_length=700, distance_bias=False)


def test_a_source_in_half_precision_stays_so(tmp_path):
    source = make_source(tmp_path / "source", max_position_embeddings=146)
    source.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("head", "first"),
    [
        *(("Model", 1), ("ForSequenceClassification", 1), ("ForMultipleChoice", 1)),
        *(("ForMaskedLM", 0), ("ForTokenClassification", 0), ("ForQuestionAnswering", 0)),
    ],
)
def test_the_first_block_is_global_for_heads_that_read_it(head, first, tmp_path):
    make_source(tmp_path / "source", "roberta", head, max_position_embeddings=146)

    def blocks(name, **arguments):
        report = convert(tmp_path / "source", tmp_path / name, **arguments)
        said = [note for note in report.notes if "The first block is" in note]
        assert len(said) == (name in ("default", "two") and first)
        return open_result(tmp_path / name).config.initial_prior_first_n_blocks

    assert blocks("default") == first
    assert blocks("two", block_per_row=2) == 0  # no room for it, which is said
    assert blocks("asked", initial_prior_first_n_blocks=0) == 0
    assert blocks("plain", distance_bias=False) == 0
