"""Whole models in the runtimes that people serve them with: time, peak memory, file size, loss.

RoBERTa-base with random weights, batch 1: MRA-2 (8 blocks per row) and dense attention, each in
ONNX Runtime (fp32, int8 linear layers) and in torch (fp32, bf16, int8 linear layers by torchao,
which has to be installed; MRA-2 by the compiled kernels).
Every row is a process of its own, so that peaks do not mix: peak_mb is what the first call adds to
the loaded model. Then accuracy and loss on held-out text of the embedded English checkpoint for
4096 tokens, in every runtime and dtype. Graphs are kept in --work; a run that is interrupted goes
on where it stopped.

example:
  python benchmarks/deployment.py --work /tmp/deployment --lengths 512 1024 2048 4096
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # the folder of this file would shadow NVIDIA's package named `cuda`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import ROOT
from benchmarks.records import Records, conditions, timing_columns

OUT = ROOT / "benchmarks" / "results" / "deployment.csv"
COLUMNS = (
    *("date", "commit", "device", "torch", "transformers", "onnxruntime", "load"),
    *("model", "runtime", "attention", "dtype", "batch", "length", "threads"),
    *("ms_median", "ms_p20", "ms_p80", "peak_mb", "file_mb", "accuracy", "nll"),
)
KEYS = COLUMNS[COLUMNS.index("model") : COLUMNS.index("ms_median")]
#: (runtime, attention, dtype) of what is timed.
VARIANTS = (
    ("onnxruntime", "mra2", "float32"),
    ("onnxruntime", "dense", "float32"),
    ("onnxruntime", "mra2", "int8"),
    ("onnxruntime", "dense", "int8"),
    ("torch", "mra2", "float32"),
    ("torch", "dense", "float32"),
    ("torch", "mra2", "bfloat16"),
    ("torch", "dense", "bfloat16"),
    ("torch", "mra2", "int8"),
    ("torch", "dense", "int8"),
)
LENGTHS = (512, 1024, 2048, 4096)
#: Sizes of the model; `--smoke` takes a small one.
BASE = {"max_position_embeddings": 4098}
SMALL = {
    **BASE,
    **{"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "intermediate_size": 128},
}
#: Calls that are timed: so many and for so long at least, fewer where one takes long.
_ROUNDS, _SECONDS = 5, 10.0
_LONG_ROUNDS, _LONG_SECONDS = 2, 60.0


def main(argv=None) -> int:
    """Export, time and score what the CSV lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the graphs")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="variants that contain this, such as onnxruntime-mra2")
    parser.add_argument("--no-accuracy", action="store_true", help="times only")
    parser.add_argument("--smoke", action="store_true", help="a small model, two short lengths")
    args = parser.parse_args(argv)
    sizes, lengths = (SMALL, (64, 512)) if args.smoke else (BASE, args.lengths)
    records = Records(args.out, COLUMNS, KEYS)
    name = "small, random weights" if args.smoke else "RoBERTa-base, random weights"
    variants = [v for v in VARIANTS if not args.only or args.only in "-".join(v)]
    for variant in variants:
        for length in lengths:
            row = dict(zip(("runtime", "attention", "dtype"), variant, strict=True))
            row |= {"model": name, "batch": 1, "length": length, "threads": args.threads}
            if records.has(row):
                continue
            file = None
            if row["runtime"] == "onnxruntime":
                file = _graph(args.work, variant, sizes)
                row["file_mb"] = round(file.stat().st_size / 1e6, 1)
            print(f"{'-'.join(variant)} at {length} tokens ...", flush=True)
            measured = _in_process(_measure, file, variant, sizes, length, args.threads)
            _add(records, row | measured)
    if not args.no_accuracy and not args.only:
        _add_accuracies(records, args)
    return 0


def _add(records: Records, row: dict) -> None:
    import importlib.metadata
    import os

    row |= conditions("cpu", row["threads"])
    row["onnxruntime"] = importlib.metadata.version("onnxruntime")
    row["load"] = round(os.getloadavg()[0], 1)
    records.add(row)
    shown = ("ms_median", "peak_mb", "file_mb", "accuracy", "nll", "load")
    print("   ", {key: row[key] for key in shown if row.get(key) is not None}, flush=True)


def _in_process(function, *arguments):
    """Call a function in a fresh process, so that no memory is there to be used again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _model(attention: str, sizes: dict, dtype: str = "float32"):
    """The encoder, the same weights for both kinds of attention."""
    import torch

    from mra_hf import MraConfig, MraModel

    torch.manual_seed(0)
    model = MraModel(MraConfig(block_per_row=8, **sizes), add_pooling_layer=False).eval()
    if attention == "dense":
        model.set_attn_implementation("sdpa")
    return _in_dtype(model, dtype)


def _in_dtype(model, dtype: str):
    """The model in a dtype of torch, or with linear layers in int8."""
    import torch

    if dtype != "int8":
        return model.to(getattr(torch, dtype))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _graph(work: Path, variant: tuple[str, str, str], sizes: dict) -> Path:
    """The ONNX file of a variant, exported where it is missing."""
    _, attention, dtype = variant
    size = "small" if sizes is SMALL else "base"
    file = work / f"{size}-{attention}-{dtype}.onnx"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        _in_process(_write_graph, file, attention, sizes, dtype)
    return file


def _write_graph(file: Path, attention: str, sizes: dict, dtype: str) -> None:
    import onnx_ir

    from mra_hf.deployment.graphs import Graph
    from mra_hf.deployment.onnx_graph import export_onnx, quantize

    start = time.perf_counter()

    def progress(line: str) -> None:
        print(f"  {time.perf_counter() - start:6.0f} s  {attention}: {line}", flush=True)

    graph = Graph(_model(attention, sizes)).eval()
    tensors = (graph.example(2, 100), graph.dynamic_shapes(), graph.output_names)
    model = export_onnx(graph, *tensors, progress=progress)
    partial = file.with_suffix(".partial")
    onnx_ir.save(model, partial)
    if dtype == "int8":
        progress("quantising")
        quantize(partial)
    partial.rename(file)


def _measure(file, variant, sizes, length, threads) -> dict:
    """Peak memory of the first call and milliseconds of the others."""
    import numpy as np

    runtime, attention, dtype = variant
    ids = np.random.default_rng(0).integers(5, sizes.get("vocab_size", 50265), (1, length))
    mask = np.ones_like(ids)
    if runtime == "onnxruntime":
        session = _session(file, threads)
        inputs = {"input_ids": ids, "attention_mask": mask}

        def call():
            session.run(None, inputs)
    else:
        import torch

        torch.set_num_threads(threads)
        model = _model(attention, sizes, dtype)
        tensors = (torch.from_numpy(ids), torch.from_numpy(mask))

        def call():
            with torch.no_grad():
                model(*tensors)

    from mra_attention.benchmarking import added_peak_bytes

    peak = added_peak_bytes(call)
    call()
    times, start = [], time.perf_counter()
    while not _is_enough(len(times), time.perf_counter() - start):
        before = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - before))
    return timing_columns(times) | {"peak_mb": None if peak is None else round(peak / 1e6, 1)}


def _is_enough(rounds: int, seconds: float) -> bool:
    if rounds >= _LONG_ROUNDS and seconds >= _LONG_SECONDS:
        return True
    return rounds >= _ROUNDS and seconds >= _SECONDS


def _session(file: Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _add_accuracies(records: Records, args: argparse.Namespace) -> None:
    """Masked-token accuracy and loss of the English checkpoint in every runtime and dtype."""
    from mra_hf.deployment import export_checkpoint
    from mra_hf.english import english_checkpoint

    length = 512 if args.smoke else 4096
    for runtime, attention, dtype in VARIANTS:
        if attention != "mra2":
            continue
        row = {"runtime": runtime, "attention": attention, "dtype": dtype, "length": length}
        row |= {"model": "english-4096", "batch": 1, "threads": args.threads}
        if records.has(row):
            continue
        file = None
        if runtime == "onnxruntime":
            folder = args.work / f"english-{dtype}"
            file = folder / "onnx" / "model.onnx"
            if not file.exists():
                export_checkpoint(english_checkpoint(4096), folder, dtype=dtype, progress=print)
            row["file_mb"] = round(file.stat().st_size / 1e6, 1)
        print(f"loss of english-4096: {runtime}, {dtype} ...", flush=True)
        _add(records, row | _in_process(_score, file, dtype, length, args.threads, args.smoke))


def _score(file: Path | None, dtype: str, length: int, threads: int, smoke: bool) -> dict:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import mra_hf  # noqa: F401 - registers the model type
    from mra_hf.english import english_checkpoint, english_passage, english_sample
    from mra_hf.evaluation import masked_token_scores

    torch.set_num_threads(threads)
    checkpoint = english_checkpoint(4096)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForMaskedLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if file is None:
        model = _in_dtype(model, dtype)
    else:
        session = _session(file, threads)

        def forward(input_ids, attention_mask=None, **others):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            inputs = {"input_ids": input_ids.numpy(), "attention_mask": mask.long().numpy()}
            logits = torch.from_numpy(session.run(["logits"], inputs)[0])
            return SimpleNamespace(logits=logits)

        model.forward = forward
        model.lm_head = None  # scored by the logits of the graph, not by a head on states
    text = english_sample() if smoke else english_passage()
    scores = masked_token_scores(model, tokenizer, text, length=length, batch_size=1)
    return {"accuracy": round(scores.accuracy, 4), "nll": round(scores.nll, 4)}


if __name__ == "__main__":
    sys.exit(main())
