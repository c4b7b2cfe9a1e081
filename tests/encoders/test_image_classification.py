"""The image classifier of the paper's Table 6."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from mra_attention.order import patch_order
from mra_hf import MraForImageClassification, MraImageConfig

SMALL = {"image_size": 16, "num_channels": 1, "stem_kernel_size": 1, "stem_stride": 1}
SMALL |= {"stem_padding": 0, "hidden_size": 32, "intermediate_size": 64, "num_labels": 3}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}


def test_the_defaults_are_the_model_of_the_paper():
    config = MraImageConfig(num_labels=1000)
    assert config.grid_side == 32 and config.block_size == 32 and config.attention == "mra2"
    with torch.device("meta"):
        model = MraForImageClassification(config)
    width, inner = 128, 512
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    stem = 3 * 14 * 14 * width + width + 1024 * width
    head = width * 512 + 512 + 512 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == 4 * layer + 2 * width + stem + head


def test_full_budgets_are_dense_attention_whatever_the_patches():
    dense = MraForImageClassification(MraImageConfig(**SMALL, attention="dense")).eval()
    images = torch.randn(2, 1, 16, 16)
    for patch_size in ([4, 8], [2, 16], [16, 2]):
        for attention in ("mra2", "mra2_s"):
            config = MraImageConfig(**SMALL, attention=attention, patch_size=patch_size)
            model = MraForImageClassification(config).eval()
            model.load_state_dict(dense.state_dict())
            torch.testing.assert_close(
                model(images).logits, dense(images).logits, rtol=1e-4, atol=1e-5
            )


def test_a_block_is_a_patch():
    """With the diagonal alone, a token of MRA-2-s sees the tokens of its own patch."""
    settings = {"attention": "mra2_s", "block_per_row": 1, "initial_prior_diagonal_n_blocks": 1}
    model = MraForImageClassification(
        MraImageConfig(**SMALL | {"num_hidden_layers": 1}, **settings)
    ).eval()
    images = torch.randn(1, 1, 16, 16, requires_grad=True)
    states = model(images, output_hidden_states=True).hidden_states[-1]
    place = int((patch_order(16, 16) == 5 * 16 + 11).nonzero())  # row 5, column 11
    states[0, place].sum().backward()
    rows, columns = images.grad[0, 0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 8, 15)


@pytest.mark.parametrize("attention", ["mra2", "mra2_s", "dense"])
def test_it_learns_and_comes_back(attention, tmp_path):
    model = MraForImageClassification(MraImageConfig(**SMALL, attention=attention, block_per_row=2))
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6) % 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(images, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MraImageConfig)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, MraForImageClassification)
    torch.testing.assert_close(again(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "30 x 30 tokens .* which patches of .4, 8. do not fill"),
        ({"patch_size": [4]}, "patch_size must be .height, width."),
        ({"attention": "adamra"}, "attention must be one of"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple"),
        ({"stem_kernel_size": 0}, "stem_kernel_size must be an integer of at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MraImageConfig(**SMALL | settings)


def test_other_images_are_refused():
    model = MraForImageClassification(MraImageConfig(**SMALL))
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 1, 16, 16\]"):
        model(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="matrices that this attention never has"):
        model(torch.zeros(2, 1, 16, 16), output_attentions=True)
