"""A checkpoint becomes a directory with a graph that runs without this package.

`onnx`: `onnx/model.onnx`, for ONNX Runtime, OpenVINO and whatever else reads ONNX. `torch`:
`model.pt2`, for `torch.export.load` and AOTInductor. The graph takes every batch and every length
from 2 tokens to the longest of the model, and is compared with the model before it gets its name.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.torch_version import TorchVersion
from transformers import AutoTokenizer

from mra_attention.checks import check_choice, check_int
from mra_hf.configuration import MraConfig
from mra_hf.conversion.files import check_output, resolve_checkpoint, staged_directory
from mra_hf.conversion.sentence_encoders import read_modules, tokenizer_folder, write_modules
from mra_hf.conversion.tokenizers import save_tokenizer
from mra_hf.deployment.graphs import POOLING_MODES, Graph
from mra_hf.deployment.readme import write_readme
from mra_hf.deployment.report import ExportReport
from mra_hf.loading import naming_damaged_weights, read_config
from mra_hf.modeling import HEADS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from mra_hf.conversion.sentence_encoders import SentenceModules

FORMATS = ("onnx", "torch")
#: Of the graph. int8: the weights of linear layers, for ONNX.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}
FILES = {"onnx": Path("onnx", "model.onnx"), "torch": Path("model.pt2")}
OLDEST_OPSET = 18
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Largest mean difference from the model, as `_Difference` has it. No limit on the worst token:
#: where two pairs of blocks score nearly alike, rounding decides which one is exact, and the
#: tokens of those blocks move.
_TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05, "int8": 0.2}
#: Sizes of the example that is traced; torch would take a size of 1 for a constant.
_EXAMPLE = (2, 100)
#: Earlier ones derive false limits for the length while they trace.
_OLDEST_TORCH = "2.11"
#: Bytes of weights that go into the file of the graph itself, since protobuf ends at 2 GB.
_LARGEST_FILE = 1.8e9
#: Most tokens of the longest text that the graph is compared on.
_LONGEST_CHECK = 2000


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    format: str = "onnx",
    dtype: str = "float32",
    opset: int = OLDEST_OPSET,
    pooling: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write the graph, tokenizer, config and a README of a checkpoint of this family.

    Args:
        checkpoint: directory or hub id of a checkpoint of type `mra_hf`, with any head of the
            family, or of a sentence encoder that was converted.
        output_dir: the directory to write.
        format: "onnx" or "torch".
        dtype: a name in `DTYPES`: "float32", "float16", "bfloat16" (torch only), or "int8" (ONNX
            only): the weights of linear layers in 8 bits, their inputs rounded at run time.
        opset: version of ONNX's operators, at least 18.
        pooling: of a sentence encoder, put the pooling into the graph, too: a further output
            `sentence_embedding`.
        force: replace an `output_dir` that is not empty.
        progress: called with a line before each step.

    Raises:
        ValueError: an argument out of range, a model that cannot be exported, a missing package, or
            a graph that differs from the model.
        OSError: there is no such checkpoint, or it lacks a file.
    """
    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, tuple(DTYPES))
    check_int("opset", opset, OLDEST_OPSET)
    _check_request(format, dtype)
    location = resolve_checkpoint(checkpoint)
    output = Path(output_dir).expanduser().resolve()
    check_output(output, force=force, source=location.folder)
    progress(f"reading {location.label}")
    modules = read_modules(location.folder)
    folder = location.folder if modules is None else modules.encoder_folder
    model = _load(folder, location.label)
    model.to(DTYPES[dtype])  # type: ignore[arg-type]  # its decorator hides `self`
    graph = Graph(model, *_pooling_of(modules, location.label) if pooling else ()).eval()
    report = ExportReport(
        location.label,
        output,
        output / FILES[format],
        type(model).__name__,
        dtype,
        graph.input_names,
        graph.output_names,
    )
    with staged_directory(output, force=force) as staging:
        file = staging / FILES[format]
        file.parent.mkdir(exist_ok=True)
        if format == "onnx":
            _write_onnx(graph, file, dtype, opset, progress)
        else:
            _write_torch(graph, file, progress)
        report.megabytes = sum(path.stat().st_size for path in file.parent.glob("model*")) / 1e6
        report.rows = _compare(graph, _runner(file, format), dtype, progress)
        progress("writing tokenizer, config and README")
        model.config.save_pretrained(staging)
        tokens = tokenizer_folder(location.folder)
        save_tokenizer(AutoTokenizer.from_pretrained(tokens), staging)
        if modules is not None:
            write_modules(modules, staging, model.config.max_tokens)
        write_readme(staging / "README.md", report, FILES[format], modules is not None)
    return report


def _check_request(format: str, dtype: str) -> None:
    """Refuse what the runtime of a format cannot run, missing packages, and old ones."""
    # Vendors' builds of a release call themselves 2.11.0a0+..., which sorts before 2.11.
    if TorchVersion(torch.__version__.split("a0")[0]) < _OLDEST_TORCH:
        raise ValueError(
            f"exporting needs torch {_OLDEST_TORCH} or newer, got {torch.__version__}, whose "
            "graphs would only take texts of some lengths; update torch."
        )
    if format == "torch":
        if dtype == "int8":
            raise ValueError(
                'dtype="int8" is for format="onnx"; quantise a torch model with torchao before '
                "torch.export (docs/guide/deploying.md), or take bfloat16."
            )
        return
    if dtype == "bfloat16":
        raise ValueError(
            'dtype="bfloat16" is for format="torch": ONNX Runtime multiplies no bfloat16 on CPUs. '
            "Take float32, float16 or int8."
        )
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'format="onnx" needs {", ".join(missing)}, which is not installed: '
            'pip install "mra_hf[onnx]", or take format="torch".'
        )


def _load(folder: Path, label: str) -> PreTrainedModel:
    """The model of a checkpoint with its own head, in float32."""
    config = read_config(folder)
    if not isinstance(config, MraConfig):
        raise ValueError(
            f"{label} is of type {config.model_type}; checkpoints of type mra_hf are exported: "
            "convert it first (mra-hf convert SOURCE OUT)."
        )
    if config.resolutions is not None:
        raise ValueError(
            f"{label} has scales of {config.resolutions}, which ONNX has no graph for; "
            "two scales that end in 1 can be exported."
        )
    named = config.architectures or ["MraModel"]
    head = next((head for head in HEADS if head.class_name == named[0]), None)
    if head is None:
        listed = ", ".join(head.class_name for head in HEADS)
        raise ValueError(f"{label} has the head {named[0]}; exported are {listed}.")

    def load(**arguments):
        with naming_damaged_weights(label):
            return head.model_class.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **arguments
            )

    model, info = load()
    missing = info["missing_keys"]
    if missing and all("pooler." in key for key in missing):
        model, info = load(add_pooling_layer=False)
        missing = info["missing_keys"]
    if missing:
        raise ValueError(f"{label} lacks weights: {', '.join(sorted(missing)[:3])}, ...")
    return model.eval()


def _pooling_of(modules: SentenceModules | None, label: str) -> tuple[str, bool]:
    """The pooling of a sentence encoder and whether it normalizes, if a graph can hold them."""
    if modules is None:
        raise ValueError(
            f"{label} is no sentence encoder (it has no modules.json), so it has no pooling; "
            "leave pooling out."
        )
    kinds = [name.split(" ")[0] for name in modules.names[1:]]
    if kinds not in (["Pooling"], ["Pooling", "Normalize"]) or (
        len(modules.pooling) != 1 or modules.pooling[0] not in POOLING_MODES
    ):
        raise ValueError(
            f"{label} has the modules {', '.join(modules.names)}; in a graph there can be one "
            f"Pooling of {POOLING_MODES} and a Normalize. Leave pooling out and do it outside."
        )
    return modules.pooling[0], "Normalize" in kinds


def _write_onnx(
    graph: Graph, file: Path, dtype: str, opset: int, progress: Callable[[str], None]
) -> None:
    import onnx_ir

    from mra_hf.deployment.onnx_graph import export_onnx, quantize

    model = export_onnx(
        graph,
        graph.example(*_EXAMPLE),
        graph.dynamic_shapes(),
        graph.output_names,
        opset=opset,
        progress=progress,
    )
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    external = "model.onnx_data" if weights > _LARGEST_FILE else None  # optimum knows this name
    onnx_ir.save(model, file, external_data=external)
    if dtype == "int8":
        progress("quantising the linear layers")
        quantize(file)


def _write_torch(graph: Graph, file: Path, progress: Callable[[str], None]) -> None:
    progress("tracing the model")
    example = tuple(graph.example(*_EXAMPLE).values())
    shapes = tuple(graph.dynamic_shapes().values())
    with torch.no_grad():
        program = torch.export.export(graph, example, dynamic_shapes=shapes)
    torch.export.save(program, file)


def _runner(file: Path, format: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """The graph in a file as a function of inputs by name."""
    if format == "torch":
        program = torch.export.load(file).module()

        def run_torch(inputs):
            with torch.no_grad():
                return list(program(*inputs.values()))

        return run_torch
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of its errors are not public
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {error} Take "
            "dtype float32 and opset 18, or another version of onnxruntime."
        ) from error

    def run_onnx(inputs):
        outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x) for x in outputs]

    return run_onnx


def _compare(
    graph: Graph,
    run: Callable[[dict[str, Tensor]], list[Tensor]],
    dtype: str,
    progress: Callable[[str], None],
) -> list[tuple[int, float, float]]:
    """Compare a graph with its model at three lengths; rows as in `ExportReport`."""
    longest = min(graph.model.config.max_tokens, _LONGEST_CHECK)
    rows = []
    for tokens in sorted({min(31, longest), longest // 2 + 1, longest}):
        progress(f"comparing at {tokens} tokens")
        inputs = graph.example(2, tokens, seed=tokens)
        with torch.no_grad():
            expected = graph(*inputs.values())
        start = time.perf_counter()
        outputs = run(inputs)
        milliseconds = 1e3 * (time.perf_counter() - start)
        real = inputs["attention_mask"].bool()
        errors = list(map(_difference, outputs, expected, [real] * len(outputs)))
        rows.append((tokens, max(error.largest for error in errors), milliseconds))
        for name, error in zip(graph.output_names, errors, strict=True):
            if not error.mean <= _TOLERANCES[dtype]:
                raise ValueError(
                    f"{name} of the graph differs from the model by {error.mean:.1e} of its "
                    f"largest value, on average over {tokens} tokens; {_TOLERANCES[dtype]} is "
                    f"allowed for {dtype}. Take float32, or another version of onnxruntime or "
                    "torch."
                )
    return rows


class _Difference(NamedTuple):
    """How far an output is from the model's, as shares of the largest value of the model.

    Attributes:
        largest: of all values at real tokens.
        mean: over real tokens (samples, where there is one vector per sample), of the largest
            difference of each.
    """

    largest: float
    mean: float


def _difference(output: Tensor, expected: Tensor, real: Tensor) -> _Difference:
    """The difference at real tokens."""
    output, expected = output.float(), expected.float()
    if expected.shape[: real.dim()] == real.shape:  # one value or vector per token
        output, expected = output[real], expected[real]
    scale = expected.abs().max().clamp_min(1e-6)
    worst = (output - expected).abs().reshape(len(expected), -1).amax(1)  # of a token or sample
    shares = worst / scale
    return _Difference(float(shares.max()), float(shares.mean()))
