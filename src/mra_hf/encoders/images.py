"""The image classifier of the MRA paper's Table 6: convolution, four pre-norm layers, mean pooling.

Its 32 x 32 tokens are arranged in patches of 4 x 8, each of them one block of MRA-2.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from mra_attention.checks import check_choice, check_int
from mra_attention.order import patch_order
from mra_hf.encoders.configuration import SmallEncoderConfig
from mra_hf.encoders.methods import METHODS
from mra_hf.encoders.prenorm import (
    Classifier,
    PreNormEncoder,
    PreNormPreTrainedModel,
    check_classes,
    refuse_matrices,
)

ATTENTIONS = ("mra2", "mra2_s", "dense")


class MraImageConfig(SmallEncoderConfig):
    """Configuration of `MraForImageClassification`, `model_type` "mra_image_hf".

    The defaults are the paper's model for images of 224 x 224 pixels.

    Args:
        image_size: height and width in pixels.
        num_channels: 3 for colour, 1 for grey.
        stem_kernel_size, stem_stride, stem_padding: of the convolution that produces the tokens;
            1, 1 and 0 make every pixel of a small image a token.
        patch_size: height and width, in tokens, of the patches that become blocks of
            `patch_size[0] * patch_size[1]` tokens; they must tile the grid of tokens.
        attention: "mra2", "mra2_s" or "dense".
        block_per_row, initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, selection: see
            `MraConfig`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the layers.
        hidden_dropout_prob, layer_norm_eps, initializer_range: as in RoBERTa.
        attention_probs_dropout_prob: dropout on the weights of dense attention (only).
        classifier_hidden_size: width of the classifier's hidden layer.

    Raises:
        ValueError: a field of the wrong type or out of range.
    """

    model_type = "mra_image_hf"

    image_size: int = 224
    num_channels: int = 3
    stem_kernel_size: int = 14
    stem_stride: int = 7
    stem_padding: int = 5
    patch_size: list[int] | tuple[int, int] = (4, 8)
    attention: str = "mra2"
    block_per_row: int = 8
    initial_prior_first_n_blocks: int = 0
    initial_prior_diagonal_n_blocks: int = 0
    selection: str = "row_normalized"
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    intermediate_size: int = 512
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    classifier_hidden_size: int = 512

    def check(self) -> None:
        super().check()
        self.check_ints("image_size", "num_channels", "stem_kernel_size", "stem_stride")
        self.check_ints("stem_padding", least=0)
        check_choice("attention", self.attention, ATTENTIONS)
        self.check_mra()
        if not isinstance(self.patch_size, (list, tuple)) or len(self.patch_size) != 2:
            raise ValueError(f"patch_size must be [height, width], got {self.patch_size!r}.")
        for index, patch_side in enumerate(self.patch_size):
            check_int(f"patch_size[{index}]", patch_side, 1)
        side = self.grid_side
        if side < 1 or any(side % patch_side for patch_side in self.patch_size):
            raise ValueError(
                f"the stem makes {side} x {side} tokens of {self.image_size} x {self.image_size} "
                f"pixels, which patches of {list(self.patch_size)} do not fill; "
                "change image_size, the stem or patch_size."
            )

    @property
    def grid_side(self) -> int:
        """Height and width of the grid, in tokens."""
        return (
            self.image_size + 2 * self.stem_padding - self.stem_kernel_size
        ) // self.stem_stride + 1

    @property
    def block_size(self) -> int:
        """Tokens per patch, and so per block."""
        return math.prod(self.patch_size)


class MraForImageClassification(PreNormPreTrainedModel):
    """Convolution, learned positions, pre-norm layers, mean pooling, classifier."""

    config_class = MraImageConfig
    base_model_prefix = "mra_image"
    main_input_name = "pixel_values"

    def __init__(self, config: MraImageConfig):
        super().__init__(config)
        check_classes(config)
        kernel = (config.stem_kernel_size, config.stem_stride, config.stem_padding)
        self.stem: nn.Module = nn.Conv2d(config.num_channels, config.hidden_size, *kernel)
        self.positions = nn.Embedding(config.grid_side**2, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        attention_layer = METHODS[config.attention].layer
        assert attention_layer is not None  # `ATTENTIONS`
        layers = range(config.num_hidden_layers)
        self.encoder = PreNormEncoder(config, [attention_layer(config, layer) for layer in layers])
        self.classifier = Classifier(
            config.hidden_size, config.classifier_hidden_size, config.num_labels
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stem = value

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classify.

        Args:
            pixel_values: `[B, channels, image_size, image_size]`.
            labels: `[B]` int64, for a loss.
            output_hidden_states: return the states of all layers, tokens patch by patch.
            output_attentions: must be off: there are no matrices.
            return_dict: False for a tuple.

        Raises:
            ValueError: images of another shape, or matrices requested.
        """
        refuse_matrices(output_attentions)
        side = self.config.image_size
        expected = (self.config.num_channels, side, side)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must be [batch, {', '.join(map(str, expected))}], got "
                f"{tuple(pixel_values.shape)}; resize the images."
            )
        tokens = self.stem(pixel_values).flatten(2).transpose(1, 2)
        states = self.dropout(tokens + self.positions.weight)
        grid = (self.config.grid_side, self.config.grid_side)
        order = patch_order(*grid, tuple(self.config.patch_size), device=states.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoded = self.encoder(states[:, order], None, output_hidden_states=output_hidden_states)
        # The mean does not depend on the order, so the original one is not restored.
        logits = self.classifier(encoded.last_hidden_state.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )
        return output if return_dict is not False else output.to_tuple()
