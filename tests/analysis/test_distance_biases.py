"""Biases of a model as numbers and as a picture."""

import pytest
import torch

from mra_hf import MraForMaskedLM
from mra_hf.analysis.distance_biases import distance_biases, plot_distance_biases
from tiny_models import mra_config


def test_biases_and_their_picture(tmp_path):
    model = MraForMaskedLM(mra_config(distance_bias_window=2, distance_bias_far=-4))
    biases = distance_biases(model)
    assert biases.shape == (2, 2, 8)
    assert torch.equal(biases[..., :3], torch.zeros(2, 2, 3))
    torch.testing.assert_close(biases[..., 3:], torch.full((2, 2, 5), -4.0))
    plot_distance_biases(model, tmp_path / "biases.png")
    assert (tmp_path / "biases.png").stat().st_size > 5000


def test_a_model_without_bias_is_refused(tmp_path):
    model = MraForMaskedLM(mra_config())
    with pytest.raises(ValueError, match="no distance bias"):
        plot_distance_biases(model, tmp_path / "biases.png")
    assert not (tmp_path / "biases.png").exists()
