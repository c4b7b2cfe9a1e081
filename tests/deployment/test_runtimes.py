"""What the guide says of other runtimes, beside ONNX Runtime."""

import io
import shutil

import pytest
import torch

import mra_hf
from mra_hf.deployment.graphs import Graph
from tiny_models import TOKENS, mra_config


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
def test_aot_inductor_compiles_the_graph_for_other_sizes(tmp_path):
    torch.manual_seed(0)
    model = mra_hf.MraModel(mra_config(block_per_row=2, num_hidden_layers=1), False)
    graph = Graph(model.eval()).eval()
    example, sizes = graph.example(2, 100), tuple(graph.dynamic_shapes().values())
    with torch.no_grad():
        program = torch.export.export(graph, tuple(example.values()), dynamic_shapes=sizes)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for batch, tokens in ((2, 64), (3, 250)):
        inputs = graph.example(batch, tokens, seed=tokens)
        real = inputs["attention_mask"].bool()
        expected = graph(*inputs.values())[0][real]
        output = run(*inputs.values())[0][real]
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("approx_mode", ["full", pytest.param("sparse", marks=pytest.mark.slow)])
def test_openvino_reads_the_onnx_graph(approx_mode):
    openvino = pytest.importorskip("openvino")
    onnx_ir = pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxscript")
    from mra_hf.deployment.onnx_graph import export_onnx

    torch.manual_seed(0)
    # The kind of attention of test_export.py, whose graph is then made once.
    settings = {"block_per_row": 2, "num_hidden_layers": 1, "distance_bias_window": 1}
    config = mra_config(**settings, approx_mode=approx_mode)
    model = mra_hf.MraModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():  # logits that differ enough for pairs to be chosen by
        parameter.data.mul_(3)
    graph = Graph(model, pooling="mean", normalize=True).eval()
    sizes = graph.dynamic_shapes()
    file = export_onnx(graph, graph.example(2, 100), sizes, graph.output_names)
    core = openvino.Core()
    program = core.read_model(io.BytesIO(onnx_ir.to_proto(file).SerializeToString()))
    # On some CPUs its default is bfloat16.
    run = core.compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, tokens in ((1, 3), (3, 65), (2, TOKENS)):
        inputs = graph.example(batch, tokens, seed=tokens)
        outputs = run({name: x.numpy() for name, x in inputs.items()})
        states, embedding = graph(*inputs.values())
        real = inputs["attention_mask"].bool()
        output = torch.from_numpy(outputs["last_hidden_state"])[real]
        torch.testing.assert_close(output, states[real], rtol=1e-4, atol=1e-4)
        output = torch.from_numpy(outputs["sentence_embedding"])
        torch.testing.assert_close(output, embedding, rtol=1e-4, atol=1e-4)
