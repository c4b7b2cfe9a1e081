"""The attentions that are timed: on ready query, key, value; as modules; in whole models.

They have the sizes of RoBERTa-base. Providers are named by (provider, block_per_row or None), as in
the rows of the CSV.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BigBirdConfig, LongformerConfig, RobertaConfig, RobertaForMaskedLM
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

import mra_hf
from mra_attention import mra2_attention
from mra_attention.implementations import BLOCK_SIZE, FAST
from mra_hf.encoders.methods import METHODS
from mra_hf.sparse_prediction import predict_labelled_positions

#: (provider, block_per_row or None) -> function of the inputs
Providers = dict[tuple[str, int | None], Callable[..., Tensor]]

HEADS, HEAD_DIM = 12, 64
#: Tokens that the mask of "mra2_padded" hides at the end: one and a half blocks.
PADDING = 48

_SHAPE = {
    "hidden_size": HEADS * HEAD_DIM,
    "num_attention_heads": HEADS,
    "attention_probs_dropout_prob": 0.0,
}
#: Longformer's `attention_window`, both sides together.
_WINDOWS = (64, 256)


def attention_providers(length: int, budgets: tuple[int, ...], device: str) -> Providers:
    """SDPA, MRA-2 with each budget, and MRA-2 with 8 blocks per row and padding at the end."""
    providers: Providers = {("sdpa", None): F.scaled_dot_product_attention}
    for block_per_row in budgets:
        providers["mra2", block_per_row] = partial(mra2_attention, block_per_row=block_per_row)
    if length > PADDING and 8 in budgets:
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
        mask[:, -PADDING:] = False
        providers["mra2_padded", 8] = partial(mra2_attention, attention_mask=mask, block_per_row=8)
    return providers


def self_attention_modules(
    length: int, dtype: torch.dtype, budgets: tuple[int, ...], device: str
) -> Providers:
    """Self-attention modules, projections included: functions of hidden states `[1, N, 768]`.

    BigBird needs more than 704 tokens for its sparse form; it is left out for shorter inputs.
    """

    def build(module: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return module.to(device, dtype).eval()

    def roberta(attention: str, **settings) -> Callable[[Tensor], Tensor]:
        config = RobertaConfig(**_SHAPE)
        config._attn_implementation = attention
        config.mra = settings
        module = build(RobertaSelfAttention(config))
        return lambda hidden: module(hidden)[0]

    modules: Providers = {("sdpa", None): roberta("sdpa")}
    for block_per_row in budgets:
        modules["mra2", block_per_row] = roberta("mra2", block_per_row=block_per_row)
    for window in _WINDOWS:
        if length % window == 0:
            modules[f"longformer_{window}", None] = _longformer(window, length, build, dtype)
    if length > 704 and length % 64 == 0:
        modules["bigbird", None] = _bigbird(length, build, dtype, device)
    return modules


def _longformer(window: int, length: int, build, dtype) -> Callable[[Tensor], Tensor]:
    config = LongformerConfig(**_SHAPE, attention_window=[window], num_hidden_layers=1)
    module = build(LongformerSelfAttention(config, 0))

    def run(hidden: Tensor) -> Tensor:
        no_token = torch.zeros(1, length, dtype=torch.bool, device=hidden.device)
        return module(
            hidden,
            attention_mask=torch.zeros(1, length, dtype=dtype, device=hidden.device),
            is_index_masked=no_token,
            is_index_global_attn=no_token,
            is_global_attn=False,
        )[0]

    return run


def _bigbird(length: int, build, dtype, device) -> Callable[[Tensor], Tensor]:
    config = BigBirdConfig(**_SHAPE, block_size=64, num_random_blocks=3)
    module = build(BigBirdBlockSparseAttention(config, seed=0))
    mask = torch.ones(1, length, dtype=dtype, device=device)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(mask, 64)

    def run(hidden: Tensor) -> Tensor:
        return module(
            hidden,
            band_mask=band,
            from_mask=rows,
            to_mask=columns,
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )[0]

    return run


def roberta_base(
    length: int, device: str, mra: dict | None, training: bool, **sizes: int
) -> RobertaForMaskedLM:
    """RoBERTa-base with a masked-LM head, untrained: dense, or MRA-2 with the settings `mra`;
    `sizes` replace entries of its configuration.
    """
    torch.manual_seed(0)
    shape = _SHAPE | {"vocab_size": 50265, "type_vocab_size": 1} | sizes
    config = RobertaConfig(max_position_embeddings=length + 2, **shape)
    with torch.device(device):
        model = RobertaForMaskedLM(config).train(training)
    if mra is None:
        model.set_attn_implementation("sdpa")
    else:
        mra_hf.set_attention(model, "mra2", **mra)
    return model


def labelled_tokens(
    batch: int, length: int, device: str, vocab_size: int = 50265
) -> tuple[Tensor, Tensor]:
    """Random token ids `[B, N]`, and the labels by which 15 % of them are predicted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (batch, length), generator=generator)
    labelled = torch.rand(batch, length, generator=generator) < 0.15
    return ids.to(device), torch.where(labelled, ids, -100).to(device)


def training_step(
    model: RobertaForMaskedLM, labels: Tensor, *, autocast: bool = False
) -> Callable[[Tensor], Tensor]:
    """A function of token ids that takes a step of AdamW, maybe under bf16 autocast."""
    predict_labelled_positions(model)
    device = labels.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def step(ids: Tensor) -> Tensor:
        with torch.enable_grad():
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def whole_models(
    length: int, budgets: tuple[int, ...], device: str, training: bool, dtype: torch.dtype
) -> tuple[Providers, tuple[Tensor]]:
    """RoBERTa-base with a masked-LM head, dense and MRA-2, and its input.

    Returns:
        Functions of the token ids `[1, N]`: a forward pass to the hidden states in `dtype`, or a
        training step (15 % of the tokens predicted, AdamW; in bfloat16 by autocast, as `Trainer`
        has it with `bf16`); and the ids.
    """
    ids, labels = labelled_tokens(1, length, device)

    def build(mra: dict | None) -> Callable[[Tensor], Tensor]:
        model = roberta_base(length, device, mra, training)
        if training:
            return training_step(model, labels, autocast=dtype == torch.bfloat16)
        model.to(dtype)
        return lambda ids: model.roberta(ids).last_hidden_state

    providers: Providers = {("sdpa", None): build(None)}
    for block_per_row in budgets:
        providers["mra2", block_per_row] = build({"block_per_row": block_per_row})
    return providers, (ids,)


def candidate_choice_steps(
    length: int, budgets: tuple[int, ...], device: str
) -> tuple[Providers, tuple[Tensor]]:
    """Training steps of WikiHop's kind: MiniLM's sizes (6 layers, width 384), one question with ten
    candidates at its beginning, AdamW; dense, and MRA-2 by each implementation that runs here.

    Returns:
        Functions of the token ids `[1, N]`, and the ids.
    """
    ids, _ = labelled_tokens(1, length, device, vocab_size=30522)
    starts = 2 * torch.arange(10, device=device)
    spans, label = torch.stack([starts, starts + 1], -1)[None], torch.zeros(1, device=device).long()
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

    def build(impl: str | None, block_per_row: int = 8) -> Callable[[Tensor], Tensor]:
        torch.manual_seed(0)
        config = mra_hf.MraConfig(vocab_size=30522, max_position_embeddings=length + 2, **sizes)
        model = mra_hf.MraForCandidateChoice(config).to(device).train()
        if impl is None:
            model.set_attn_implementation("sdpa")
        else:
            mra_hf.set_attention(model, "mra2", impl=impl, block_per_row=block_per_row)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step(ids: Tensor) -> Tensor:
            with torch.enable_grad():
                loss = model(ids, candidate_spans=spans, labels=label).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    providers: Providers = {("sdpa", None): build(None)}
    query = torch.zeros(1, 1, 1, 32, device=device)
    for name, implementation in FAST.items():
        if implementation.refusal(query, BLOCK_SIZE, BLOCK_SIZE) is None:
            for block_per_row in budgets:
                providers[f"mra2_{name}", block_per_row] = build(name, block_per_row)
    return providers, (ids,)


#: Methods whose arena layers are timed beside dense attention and MRA-2.
ARENA_METHODS = ("adamra", "linear")


def arena_layers(budgets: tuple[int, ...], device: str) -> Providers:
    """Attention layers of the Long Range Arena encoder in evaluation, projections included:
    functions of hidden states `[1, N, 64]`.
    """

    def build(attention: str, **settings) -> Callable[[Tensor], Tensor]:
        torch.manual_seed(0)
        config = mra_hf.LraConfig(attention=attention, **settings)
        layer = METHODS[attention].layer(config, 0).to(device).eval()
        return lambda hidden: layer(hidden, None)[0]

    layers: Providers = {("sdpa", None): build("dense")}
    layers |= {(name, None): build(name) for name in ARENA_METHODS}
    return layers | {("mra2", n): build("mra2", block_per_row=n) for n in budgets}
