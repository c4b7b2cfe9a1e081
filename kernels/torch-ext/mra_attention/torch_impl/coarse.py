"""The coarse part of MRA-2: see the formulas of the package."""

import torch
from torch import Tensor

from ..blocks import block_sums


class CoarsePart:
    """Attention to what is not selected, in low resolution: operands have R rows instead of N."""

    def __init__(self, chunk, real: Tensor, real_keys: Tensor, live_pairs: Tensor):
        batch, heads, _, dim = chunk.shape
        self.n_blocks, self.scale = chunk.n_blocks, chunk.scale

        def sums(blocks: Tensor, real: Tensor) -> Tensor:  # [G * R, M, D] -> [B, H, R, D]
            masked_real = None if chunk.token_mask is None else real
            blocks = blocks.view(batch, heads, real.shape[1], -1, dim)
            return block_sums(blocks, masked_real, chunk.dtype)

        def by_head(real: Tensor) -> Tensor:  # [B, R, M] -> [G, R, 1]
            counts = real.sum(-1)[:, None].expand(-1, heads, -1)
            return counts.reshape(batch * heads, -1, 1).to(chunk.dtype)

        self.query_counts, counts = by_head(real), by_head(real_keys)
        self.counts = counts.mT  # of keys, [G, 1, C]
        query_sums = sums(chunk.queries, real).flatten(0, 1)
        self.query_means = query_sums / self.query_counts.clamp_min(1)  # [G, R, D]
        key_sums = sums(chunk.keys, real_keys).flatten(0, 1)
        self.key_means = key_sums / counts.clamp_min(1)  # [G, C, D]
        self.value_sums = sums(chunk.values, real_keys).flatten(0, 1)
        coarse = live_pairs.reshape(chunk.selected.shape) & ~chunk.selected
        logits = self.scale * torch.bmm(self.query_means, self.key_means.mT)
        if chunk.biases is not None:
            logits += chunk.biases.view(logits.shape)
        logits = logits.masked_fill_(~coarse, -torch.inf)
        row_max = logits.amax(-1)  # [G, R], -inf where everything is selected
        self.row_max = row_max.view(-1, 1)
        finite_max = row_max.masked_fill(row_max == -torch.inf, 0)
        self.weights = logits.sub_(finite_max[..., None]).exp_()  # E

    def merge_(self, output: Tensor, exact_lse: Tensor) -> Tensor:
        """Merge into the output of the exact part, `[G * R, M, D]`; return the merged log-sum-exp
        `[G * R, M]`.
        """
        numerator = torch.bmm(self.weights, self.value_sums)  # [G, R, D]
        denominator = (self.weights * self.counts).sum(-1).view(-1, 1)
        lse = torch.logaddexp(exact_lse, self.row_max + denominator.log())  # [G * R, M]
        finite_lse = lse.masked_fill(lse == -torch.inf, 0)
        output.mul_((exact_lse - finite_lse).exp_()[..., None])
        coarse_weight = (self.row_max - finite_lse).exp_()[..., None]
        output.addcmul_(coarse_weight, numerator.view(-1, 1, output.shape[-1]))
        return lse

    def backward(
        self, grad: Tensor, delta: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, the same for every token of a block (the
        mean spreads them evenly): `[G * R, 1, D]`, of keys `[G * C, 1, D]`; and the gradients of
        the logits, summed over the tokens of a pair: `[G, R, C]`.
        """
        dim = grad.shape[-1]
        weight = (self.row_max - lse).exp_()  # w: [G * R, M], 0 at padding and without coarse part
        grad_sum = torch.bmm(weight[:, None], grad).view(-1, self.n_blocks, dim)  # G: [G, R, D]
        delta_sum = (weight * delta).sum(-1).view(-1, self.n_blocks, 1)  # g: [G, R, 1]
        grad_values = torch.bmm(self.weights.mT, grad_sum)
        grad_logits = torch.bmm(grad_sum, self.value_sums.mT).addcmul_(
            delta_sum, self.counts, value=-1
        )
        grad_logits.mul_(self.weights)
        per_query = self.scale / self.query_counts.clamp_min(1)  # [G, R, 1]
        grad_query = torch.bmm(grad_logits, self.key_means).mul_(per_query)
        per_key = self.scale / self.counts.mT.clamp_min(1)  # [G, C, 1]
        grad_keys = torch.bmm(grad_logits.mT, self.query_means).mul_(per_key)
        d_query, d_keys, d_values = (
            x.view(-1, 1, dim) for x in (grad_query, grad_keys, grad_values)
        )
        return d_query, d_keys, d_values, grad_logits
