"""What the guide says of torch's other packages, beside ONNX."""

import shutil

import pytest
import torch

import mra_hf
from mra_hf.deployment.graphs import Graph
from tiny_models import mra_config


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
