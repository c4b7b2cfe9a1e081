"""Whole models on a GPU: RoBERTa-base with a masked-LM head, dense and MRA-2, untrained.

Passes of the rows (op "model"): "fwd" is the encoder in bf16; "step" a training step with AdamW,
15 % of the tokens predicted, float32 weights under bf16 autocast; " compiled" with the encoder
under `torch.compile`. Tokens per second are `1000 * batch * length / ms_median`.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from transformers import RobertaConfig, RobertaForMaskedLM

import mra_hf
from benchmarks.cuda.driver import Outcome, Session, Skipped, Step
from benchmarks.cuda.measure import peak_megabytes, time_calls
from benchmarks.records import Records
from mra_hf.sparse_prediction import predict_labelled_positions

#: Tokens in a batch.
_TOKENS = 16384


def steps(session: Session, records: Records) -> list[Step]:
    """A step per length, provider, pass and whether it is compiled."""
    lengths = (64,) if session.dry_run else (4096, 512, 16384, 8192, 2048, 1024)
    budget = 1 if session.dry_run else 8
    providers = {"mra2": budget, "sdpa": None}
    eager = list(itertools.product(lengths, providers, ("fwd", "step")))
    compiled = itertools.product(lengths[:3], providers, ("fwd compiled", "step compiled"))

    def step(length: int, provider: str, name: str, seconds: float) -> Step:
        about = {"length": length, "provider": provider, "name": name}
        run = partial(_model, records=records, budget=providers[provider], **about)
        return Step(f"model: {length} {provider} {name}", run, seconds)

    return [step(*case, 8) for case in eager] + [step(*case, 45) for case in compiled]


def _model(
    session: Session, records: Records, length: int, provider: str, budget: int | None, name: str
) -> Outcome | None:
    if session.dry_run and name.endswith("compiled"):
        raise Skipped("dry run")
    config = _config(session, length)
    batch = 1 if session.dry_run else max(1, _TOKENS // length)
    row = session.where | {
        "op": "model",
        "provider": provider,
        "dtype": "bf16",
        "batch": batch,
        "heads": config.num_attention_heads,
        "length": length,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "block_per_row": budget,
        "mode": "full" if provider == "mra2" else "",
        "pass": name,
    }
    if records.has(row):
        return None
    training = name.startswith("step")
    model = _build(session, config, provider, budget, training, name.endswith("compiled"))
    run = _training_step(session, model, batch, length) if training else None
    if run is None:
        ids = _tokens(session, config, batch, length)

        def run() -> torch.Tensor:
            with torch.no_grad():
                return model.base_model(ids).last_hidden_state

    if not session.dry_run:
        run()  # compiles, and makes the state of the optimizer
    peak = peak_megabytes(session, run)
    timing = time_calls(session, run, seconds=1.0)
    records.add(row | timing.columns() | {"peak_mb": peak})
    return Outcome(detail=f"{1e3 * batch * length / timing.median:.0f} tokens/s")


def _config(session: Session, length: int) -> RobertaConfig:
    sizes = {"vocab_size": 50265}
    if session.dry_run:
        sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2}
        sizes |= {"num_hidden_layers": 1, "intermediate_size": 32}
    return RobertaConfig(
        max_position_embeddings=length + 2,
        type_vocab_size=1,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )


def _build(session, config, provider, budget, training, compiled) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    with torch.device(session.device):
        model = RobertaForMaskedLM(config).train(training)
    if provider == "sdpa":
        model.set_attn_implementation("sdpa")
    else:
        mra_hf.set_attention(model, "mra2", impl="triton", block_per_row=budget)
    if not training:
        model.bfloat16()
    if compiled:
        torch._dynamo.reset()
        model.base_model.compile()
    return model


def _tokens(session: Session, config: RobertaConfig, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    return ids.to(session.device)


def _training_step(session, model, batch, length) -> Callable[[], torch.Tensor]:
    ids = _tokens(session, model.config, batch, length)
    generator = torch.Generator().manual_seed(1)
    masked = torch.rand(batch, length, generator=generator) < 0.15
    labels = torch.where(masked.to(session.device), ids, -100)
    predict_labelled_positions(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not session.dry_run)

    def run() -> torch.Tensor:
        with torch.autocast(session.device.type, torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run
