"""Whole models on a GPU: RoBERTa-base with a masked-LM head, dense and MRA-2, untrained.

Passes of the rows (op "model"): "fwd" is the encoder in bf16; "step" a training step with AdamW,
15 % of the tokens predicted, float32 weights under bf16 autocast; " compiled" with the encoder
under `torch.compile`. Tokens per second are `1000 * batch * length / ms_median`.
"""

from functools import partial

import torch

from benchmarks.cuda.driver import Session, Skipped, Step
from benchmarks.cuda.measure import Shape, add_timing, peak_megabytes, time_calls
from benchmarks.providers import labelled_tokens, roberta_base, training_step
from benchmarks.records import Records

#: Tokens in a batch.
_TOKENS = 16384
_SMALL = {
    **{"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 2},
    **{"num_hidden_layers": 1, "intermediate_size": 32},
}


def steps(session: Session, records: Records) -> list[Step]:
    """A step per length, provider, pass and whether it is compiled."""
    lengths = (64,) if session.dry_run else (4096, 512, 16384, 8192, 2048, 1024)
    runs = [(length, "") for length in lengths] + [(n, " compiled") for n in lengths[:3]]
    return [
        Step(
            f"model: {length} {provider} {kind}{compiled}",
            partial(_model, session, records, length, provider, kind + compiled),
        )
        for length, compiled in runs
        for provider in ("mra2", "sdpa")
        for kind in ("fwd", "step")
    ]


def _model(session: Session, records: Records, length: int, provider: str, name: str):
    training, compiled = name.startswith("step"), name.endswith("compiled")
    if session.dry_run and compiled:
        raise Skipped("dry run")
    batch, budget = (1, 1) if session.dry_run else (max(1, _TOKENS // length), 8)
    mra = {"impl": "triton", "block_per_row": budget} if provider == "mra2" else None
    sizes = _SMALL if session.dry_run else {}
    model = roberta_base(length, session.device, mra, training, **sizes)
    if compiled:
        torch._dynamo.reset()
        model.base_model.compile()
    ids, labels = labelled_tokens(batch, length, session.device, model.config.vocab_size)
    if training:
        run = partial(training_step(model, labels, autocast=True), ids)
    else:
        model.bfloat16()
        run = torch.no_grad()(partial(model.base_model, ids))

    def measure() -> dict:
        if not session.dry_run:
            run()  # compiles, and makes the state of the optimizer
        peak = peak_megabytes(session, run)
        return time_calls(session, run, seconds=1.0) | {"peak_mb": peak}

    heads = model.config.num_attention_heads
    shape = Shape(length, batch, heads, model.config.hidden_size // heads)
    about = {"block_per_row": budget, "mode": "full"} if mra else {"mode": ""}
    row = shape.row(op="model", provider=provider, **about) | {"pass": name}
    return add_timing(session, records, row, measure)
