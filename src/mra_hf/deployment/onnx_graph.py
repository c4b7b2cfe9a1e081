"""A module becomes an ONNX model; the attention is translated once, not once a layer.

Torch needs seconds to reason about the sizes of one call of the attention. The model is therefore
exported with one node in the place of each call. The graph of the attention, a function of query,
key, value, mask and bias, is exported once for every kind of call, and inlined. What is written
holds standard operators only.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mra_attention import exported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import onnx
    import onnx_ir

#: Domain of the functions that stand for the attention until they are inlined.
_DOMAIN = "mra_hf.attention"
#: Sizes of the example from which the graph of the attention is traced.
_BATCH, _TOKENS = 2, 100


class _Kind(NamedTuple):
    """What graphs of the attention differ by.

    Attributes:
        settings: keyword arguments of `exported.attention`.
        heads, dim, dtype: of query, key and value.
        distances: columns of the distance bias, None without one.
        masked: whether there is a mask.
    """

    settings: tuple[tuple[str, Any], ...]
    heads: int
    dim: int
    dtype: torch.dtype
    distances: int | None
    masked: bool


class _Attention(nn.Module):
    """`exported.attention` of one kind, as a module to be exported."""

    def __init__(self, kind: _Kind):
        super().__init__()
        self.kind = kind

    def forward(self, query, key, value, *tensors):
        others = list(tensors)
        token_mask = others.pop(0) if self.kind.masked else None
        bias = None if self.kind.distances is None else others.pop(0)
        settings = dict(self.kind.settings)
        return exported.attention(query, key, value, token_mask, bias, **settings)


def export_onnx(
    module: nn.Module,
    inputs: dict[str, Tensor],
    dynamic_shapes: dict[str, dict[int, Any]],
    output_names: Sequence[str],
    *,
    opset: int = 18,
    progress: Callable[[str], None] = lambda line: None,
) -> onnx_ir.Model:
    """`module(*inputs.values())` as an ONNX model of standard operators.

    Args:
        module: in eval mode, on the CPU; returns a tensor or a tuple of tensors.
        inputs: an example.
        dynamic_shapes: of each input: dimension -> `torch.export.Dim`.
        output_names: one for each output.
        opset: version of ONNX's operators, at least 18.
        progress: called with a line before each step.
    """
    import onnx_ir
    from onnx_ir.passes.common import InlinePass

    kinds: dict[_Kind, str] = {}

    def node(query, key, value, token_mask, distance_bias=None, **settings):
        distances = None if distance_bias is None else distance_bias.shape[1]
        sizes = (query.shape[1], query.shape[3], query.dtype)
        kind = _Kind(tuple(sorted(settings.items())), *sizes, distances, token_mask is not None)
        name = kinds.setdefault(kind, f"Attention{len(kinds)}")
        tensors = [x for x in (query, key, value, token_mask, distance_bias) if x is not None]
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{name}", tensors, dtype=value.dtype, shape=value.shape, version=1
        )

    with _quiet(), torch.no_grad():
        progress("tracing the model")
        with exported.replaced_by(node):
            sizes = tuple(dynamic_shapes.values())
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=sizes)
        progress("translating the model")
        exported_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(output_names),
            verbose=False,
        )
        assert exported_program is not None
        model = exported_program.model
        for number, (kind, name) in enumerate(kinds.items(), 1):
            progress(f"translating the attention ({number} of {len(kinds)})")
            function = onnx_ir.from_proto(_function(kind, opset))
            assert isinstance(function, onnx_ir.Function)
            function.name = name
            model.functions[function.identifier()] = function
    InlinePass()(model)
    model.opset_imports.pop(_DOMAIN, None)
    _name_sizes(model, dynamic_shapes)
    return model


def _name_sizes(model: onnx_ir.Model, dynamic_shapes: dict[str, dict[int, Any]]) -> None:
    """Call sizes of inputs and outputs by the names of their `torch.export.Dim`."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, shape in zip(model.graph.inputs, dynamic_shapes.values(), strict=True):
        assert value.shape is not None
        names |= {str(value.shape[dim]): size.__name__ for dim, size in shape.items()}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        sizes = [names.get(str(size), str(size)) for size in value.shape]
        value.shape = onnx_ir.Shape(
            [int(size) if size.isdigit() else onnx_ir.SymbolicDim(size) for size in sizes]
        )


@cache
def _function(kind: _Kind, opset: int) -> onnx.FunctionProto:
    """The graph of the attention as a function of ONNX; kept, because it takes long."""
    import onnx_ir

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2)
    shape = (_BATCH, kind.heads, _TOKENS, kind.dim)
    inputs = [torch.randn(shape).to(kind.dtype) for _ in range(3)]
    shapes: list[dict | None] = [{0: batch, 2: tokens}] * 3
    if kind.masked:
        inputs.append(torch.ones(_BATCH, _TOKENS, dtype=torch.bool))
        shapes.append({0: batch, 1: tokens})
    if kind.distances is not None:
        inputs.append(torch.zeros(kind.heads, kind.distances))
        shapes.append(None)
    named = (*shapes[:3], tuple(shapes[3:]))
    program = torch.export.export(_Attention(kind), tuple(inputs), dynamic_shapes=named)
    translated = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert translated is not None
    graph = translated.model.graph
    for value in list(graph.initializers.values()):  # a function has none
        constant = onnx_ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()
    return onnx_ir.to_proto(onnx_ir.Function(_DOMAIN, "", "", graph=graph, attributes=[]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch's exporter and of ONNX Runtime's quantisation, which writes to
    the root logger; none of which a user can act on.
    """
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx._internal.exporter", None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quantize(file: Path) -> None:
    """Put the weights of the linear layers of an ONNX file into 8 bits, in place; their inputs are
    rounded to 8 bits at run time.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    small = file.with_suffix(".int8")
    with _quiet():
        # Only products with a constant: the attention multiplies what it computes.
        quantize_dynamic(
            file,
            small,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )
    small.replace(file)
    file.with_suffix(".onnx_data").unlink(missing_ok=True)
