"""Masks for masked language modelling that do not depend on what was drawn before.

Transformers' collator draws the masks of all batches from one generator, so a run that is resumed,
other workers or another batch size hide other tokens. Here the mask of an example follows from the
example, the seed and the epoch.
"""

import hashlib

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, TrainerCallback


class SeededMasking(DataCollatorForLanguageModeling):
    """`DataCollatorForLanguageModeling` whose masks follow from example, seed and epoch.

    Args:
        tokenizer: as in the base class, like all other arguments.
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
            # Padding depends on the neighbours in the batch, so the mask must not depend on it.
            ids = inputs[row : row + 1]  # [1, N]
            length = int((ids != self.tokenizer.pad_token_id).sum()) or ids.shape[1]
            content = b"".join(
                number.to_bytes(8, "little", signed=True)
                for number in (self.masking_seed, self.epoch, *ids[0, :length].tolist())
            )
            seed = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            self.generator = torch.Generator().manual_seed(seed % 2**63)
            special = None if special_tokens_mask is None else special_tokens_mask[row : row + 1]
            # Only the real tokens are passed: with the padding at the end of the row, the same
            # generator would draw another mask for them.
            hidden, label = super().torch_mask_tokens(
                ids[:, :length].clone(), None if special is None else special[:, :length]
            )
            padding = ids[:, length:]
            masked.append(torch.cat([hidden, padding], 1))
            labels.append(torch.cat([label, torch.full_like(padding, -100)], 1))
        return torch.cat(masked), torch.cat(labels)


class NewMasksEveryEpoch(TrainerCallback):
    """Tells a `SeededMasking` which epoch begins."""

    def __init__(self, masking: SeededMasking):
        self.masking = masking

    def on_epoch_begin(self, args, state, control, **kwargs):
        # state.epoch is a fraction after a resume, and sometimes not quite a whole number.
        self.masking.epoch = int(state.epoch + 1e-6)
