"""Training on texts of very different lengths: the cost of padding, and what sorting saves."""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.providers import Providers
from mra_hf import MraForMaskedLM, set_attention
from mra_hf.english import english_checkpoint

BATCH, TEXTS, SHORTEST = 4, 48, 50

_SEED = 0


def text_lengths(longest: int) -> list[int]:
    """Lengths of the texts in tokens, from `SHORTEST` to `longest`, uniform on a logarithmic scale:
    about as many texts of 50 to 100 tokens as of 2048 to 4096.
    """
    generator = random.Random(_SEED)
    low, high = math.log(min(SHORTEST, longest)), math.log(longest)
    drawn = [round(math.exp(generator.uniform(low, high))) for _ in range(TEXTS - 1)]
    return [*drawn, longest]


def batches(lengths: list[int], bucketed: bool) -> list[list[int]]:
    """Return the texts of each batch: in order, or grouped like Trainer's group_by_length."""
    order = list(range(len(lengths)))
    if bucketed:
        generator = torch.Generator().manual_seed(_SEED)
        order = list(LengthGroupedSampler(BATCH, lengths=lengths, generator=generator))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def training_passes(longest: int, budgets: tuple[int, ...], device: str) -> tuple[Providers, int]:
    """Forward and backward over all texts for each provider, and the tokens of one such pass.

    "mra2" and "sdpa" sort by length and pad to the longest text of a batch; "mra2_unsorted" pads in
    the same way without sorting; "mra2_longest" pads everything to `longest`. The model is the
    embedded English model with 4096 positions.
    """
    lengths = text_lengths(longest)
    generator = torch.Generator().manual_seed(_SEED)
    texts = [torch.randint(5, 6000, (length,), generator=generator) for length in lengths]

    def run(model, bucketed: bool, whole: bool) -> Callable[[Tensor], Tensor]:
        prepared = []
        for rows in batches(lengths, bucketed):
            width = longest if whole else max(lengths[row] for row in rows)
            ids = torch.full((len(rows), width), model.config.pad_token_id)
            for position, row in enumerate(rows):
                ids[position, : lengths[row]] = texts[row]
            prepared.append((ids.to(device), (ids != model.config.pad_token_id).long().to(device)))

        @torch.enable_grad()
        def pass_over_all(unused: Tensor) -> Tensor:
            for ids, mask in prepared:
                states = model.base_model(ids, attention_mask=mask).last_hidden_state
                states.square().mean().backward()
            model.zero_grad()
            return unused

        return pass_over_all

    checkpoint = english_checkpoint(4096)
    dense = MraForMaskedLM.from_pretrained(checkpoint, attn_implementation="sdpa").to(device)
    passes: Providers = {("sdpa", None): run(dense.train(), bucketed=True, whole=False)}
    for block_per_row in budgets:
        model = MraForMaskedLM.from_pretrained(checkpoint).to(device).train()
        settings = {"approx_mode": "full", "initial_prior_diagonal_n_blocks": 0}
        set_attention(model, "mra2", block_per_row=block_per_row, **settings)
        for name, bucketed, whole in (
            ("mra2", True, False),
            ("mra2_unsorted", False, False),
            ("mra2_longest", False, True),
        ):
            passes[name, block_per_row] = run(model, bucketed, whole)
    return passes, sum(lengths)
