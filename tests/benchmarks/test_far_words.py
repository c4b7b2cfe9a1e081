"""Words that can be looked up far away only."""

import torch

from benchmarks.far_words import groups_of
from mra_hf.evaluation import MaskedTokenLosses


class Words:
    """A tokenizer of whole words."""

    def convert_ids_to_tokens(self, ids):
        return ["\u0120" + "abcdefghij"[i] * 6 for i in ids]


def test_groups_hold_what_stands_near_or_far_in_the_same_example():
    stream = torch.zeros(3000, dtype=torch.long)
    for token, places in {1: (100, 400), 2: (500, 1200), 3: (900, 2500), 4: (1990, 2010)}.items():
        stream[list(places)] = token
    hidden = torch.tensor([100, 500, 900, 1990])
    nothing = torch.zeros(4)
    losses = MaskedTokenLosses(nothing, nothing.bool(), hidden, stream, 2, 2000, 3000)
    groups = groups_of(losses, Words(), 2000)
    assert groups["all"].tolist() == [True] * 4
    assert groups["near"].tolist() == [True, False, False, False]
    # 3 stands in the next example, and so does 4, however near.
    assert groups["far"].tolist() == [False, True, False, False]
