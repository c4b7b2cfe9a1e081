"""Masks of masked language modelling that do not depend on what was drawn before.

Transformers' collator draws from one generator after another batch. A run that is resumed, other
workers, or another batch size then hide other tokens. Here an example's mask follows from the
example, the seed and the epoch.
"""

import hashlib

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback


class SeededMasking(DataCollatorForLanguageModeling):
    """`DataCollatorForLanguageModeling` whose masks follow from example, seed and epoch.

    Args:
        tokenizer: as in the base class, and all other arguments.
        masking_seed: another seed gives other masks.
    """

    def __init__(self, tokenizer, *, masking_seed: int, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.masking_seed = masking_seed
        self.epoch = 0

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask: Tensor | None = None, offset_mapping=None
    ) -> tuple[Tensor, Tensor]:
        """Mask `inputs` `[B, N]` row by row; returns inputs and labels, both `[B, N]`."""
        masked, labels = [], []
        for row in range(len(inputs)):
            # Padding depends on the neighbours in the batch: it takes no part.
            held = inputs[row : row + 1]
            length = int((held != self.tokenizer.pad_token_id).sum()) or held.shape[1]
            content = b"".join(
                number.to_bytes(8, "little", signed=True)
                for number in (self.masking_seed, self.epoch, *held[0, :length].tolist())
            )
            seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            self.generator = torch.Generator().manual_seed(seed % 2**63)
            special = None if special_tokens_mask is None else special_tokens_mask[row : row + 1]
            # Rows come padded at the end: what is drawn for the real tokens comes first only if
            # they are masked alone.
            hidden, label = super().torch_mask_tokens(
                held[:, :length].clone(), None if special is None else special[:, :length]
            )
            masked.append(torch.cat([hidden, held[:, length:]], 1))
            rest = torch.full_like(held[:, length:], -100)
            labels.append(torch.cat([label, rest], 1))
        return torch.cat(masked), torch.cat(labels)


class NewMasksEveryEpoch(TrainerCallback):
    """Tells a `SeededMasking` which epoch of the training begins."""

    def __init__(self, masking: SeededMasking):
        self.masking = masking

    def on_epoch_begin(self, args, state, control, **kwargs):
        # state.epoch is a fraction after a resume, and a hair off a whole number at times.
        self.masking.epoch = int(state.epoch + 1e-6)
