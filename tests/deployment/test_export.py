"""`mra-hf export`: graphs of every head equal their models, at every batch and length."""

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

import mra_hf
from mra_hf.commands import main
from mra_hf.deployment import export as export_module
from mra_hf.deployment import export_checkpoint
from mra_hf.deployment.graphs import Graph
from mra_hf.deployment.onnx_graph import export_onnx
from mra_hf.modeling import HEADS
from tiny_models import TOKENS, mra_config, word_tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

#: One kind of attention in all of them, whose graph is then made once.
SETTINGS = {"block_per_row": 2, "num_hidden_layers": 1, "distance_bias_window": 1}


def save(model, folder):
    for parameter in model.parameters():  # logits that differ enough for pairs to be chosen by
        parameter.data.mul_(3)
    model.eval().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("masked-lm")
    return save(mra_hf.MraForMaskedLM(mra_config(**SETTINGS, type_vocab_size=2)), folder)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    lines = []
    report = export_checkpoint(checkpoint, out, progress=lines.append)
    return report, lines


def session_of(folder):
    file = folder / "onnx" / "model.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_an_exported_directory_runs_as_its_readme_says(exported, monkeypatch, capsys):
    report, lines = exported
    monkeypatch.chdir(report.output)
    readme = (report.output / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    assert scope["outputs"][0].shape[::2] == (2, 100)
    assert [tokens for tokens, _, _ in report.rows] == [31, TOKENS // 2 + 1, TOKENS]
    assert all(error < 1e-5 for _, error, _ in report.rows)
    assert "translating the attention (1 of 1)" in lines
    assert AutoConfig.from_pretrained(report.output).block_per_row == 2
    assert len(PreTrainedTokenizerFast.from_pretrained(report.output)) == 100


def test_a_graph_holds_standard_operators_and_named_sizes(exported):
    report, _ = exported
    model = onnx.load(report.file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {""} and not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert [x.name for x in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    sizes = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "tokens"]


def head_cases():
    """Every head; those that are exported as another one is are slow tests."""
    like_others = ("MraForTokenClassification", "MraForMultipleChoice")
    for head in HEADS:
        marks = [pytest.mark.slow] if head.class_name in like_others else []
        yield pytest.param(head, id=head.class_name, marks=marks)


@pytest.mark.parametrize("head", list(head_cases()))
def test_every_head_equals_its_model_at_other_sizes(head):
    torch.manual_seed(1)
    model = head.model_class(mra_config(**SETTINGS, num_labels=2)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    graph = Graph(model).eval()
    tensors = (graph.example(2, 100), graph.dynamic_shapes(), graph.output_names)
    file = export_onnx(graph, *tensors)
    session = onnxruntime.InferenceSession(onnx_bytes(file), providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 3), (3, 65), (2, TOKENS)):
        inputs = graph.example(batch, tokens, seed=tokens)
        outputs = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        for output, expected in zip(outputs, graph(*inputs.values()), strict=True):
            real = inputs["attention_mask"].bool()
            output = torch.from_numpy(output)
            if expected.shape[: real.dim()] == real.shape:
                output, expected = output[real], expected[real]
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def onnx_bytes(model):
    import onnx_ir

    return onnx_ir.to_proto(model).SerializeToString()


def test_int8_halves_the_file_and_stays_close(exported, checkpoint, tmp_path):
    small = export_checkpoint(checkpoint, tmp_path / "int8", dtype="int8")
    assert small.megabytes < exported[0].megabytes
    assert 1e-6 < max(error for _, error, _ in small.rows) < 0.5


@pytest.mark.slow
def test_weights_beyond_protobuf_lie_in_a_file_beside_the_graph(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 1000)
    for dtype, files in (("float32", ["model.onnx", "model.onnx_data"]), ("int8", ["model.onnx"])):
        report = export_checkpoint(checkpoint, tmp_path / dtype, dtype=dtype)
        assert sorted(path.name for path in (tmp_path / dtype / "onnx").iterdir()) == files
        assert session_of(tmp_path / dtype).get_outputs()[0].name == "logits"
        assert len(report.rows) == 3
        readme = (tmp_path / dtype / "README.md").read_text()
        assert ("Keep `onnx/model.onnx_data` beside it" in readme) == (len(files) == 2)


@pytest.mark.slow
def test_float16_runs_on_a_cpu_and_stays_close_to_float32(exported, checkpoint, tmp_path):
    half = export_checkpoint(checkpoint, tmp_path / "half", dtype="float16")
    assert half.megabytes < exported[0].megabytes
    texts = ["w10 w11 w12", " ".join(f"w{10 + i % 7}" for i in range(150))]
    inputs = word_tokenizer()(texts, padding=True, return_token_type_ids=True, return_tensors="np")
    names = {name: inputs[name] for name in exported[0].inputs}
    logits, expected = (
        torch.from_numpy(session_of(folder).run(["logits"], names)[0])[names["attention_mask"] == 1]
        for folder in (half.output, exported[0].output)
    )
    assert (logits.dtype, expected.dtype) == (torch.float16, torch.float32)
    assert 0 < (logits - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_graph_runs_without_the_package(checkpoint, tmp_path, dtype):
    report = export_checkpoint(checkpoint, tmp_path / "out", format="torch", dtype=dtype)
    program = torch.export.load(report.file)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("mra" in target for target in targets)
    assert (
        report.file.name == "model.pt2"
        and "torch.export.load" in (report.output / "README.md").read_text()
    )


def sentence_encoder(folder, mode):
    """The files of a sentence encoder around a tiny model."""
    save(mra_hf.MraModel(mra_config(**SETTINGS), add_pooling_layer=False), folder)
    library = "sentence_transformers.models"
    rows = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{library}.{kind}"}
        for i, (path, kind) in enumerate(rows)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def test_the_pooling_of_a_sentence_encoder_goes_into_the_graph(tmp_path):
    source = sentence_encoder(tmp_path / "source", "mean_tokens")
    report = export_checkpoint(source, tmp_path / "out", pooling=True)
    assert report.outputs == ("last_hidden_state", "sentence_embedding")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (report.output / name).is_file(), name
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    texts = ["w10 w11 w12", " ".join(f"w{10 + i % 7}" for i in range(150))]
    inputs = word_tokenizer()(texts, padding=True, return_tensors="np")
    names = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    embeddings = session_of(report.output).run(["sentence_embedding"], names)[0]
    torch.testing.assert_close(
        torch.from_numpy(embeddings), torch.from_numpy(encoder.encode(texts)), atol=1e-4, rtol=0
    )


# -- refusals


def test_a_graph_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    difference = export_module._Difference(largest=0.02, mean=0.01)
    monkeypatch.setattr(export_module, "_difference", lambda *_: difference)
    with pytest.raises(ValueError, match=r"logits .* differs from the model by 1\.0e-02"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "moved", "is_written"),
    [("float16", 1, True), ("float16", 31, False), ("float32", 1, False)],
)
def test_in_half_precision_a_token_may_move_but_not_all(dtype, moved, is_written):
    """Where two pairs of blocks score nearly alike, rounding decides which one is exact."""
    graph = Graph(mra_hf.MraForMaskedLM(mra_config(**SETTINGS)).eval()).eval()

    def run(inputs):
        logits = graph(*inputs.values())[0].detach()
        logits[0, :moved] += 0.3 * logits.abs().max()
        return [logits]

    def compare():
        return export_module._compare(graph, run, dtype, lambda line: None)

    if is_written:
        assert [round(error, 3) for _, error, _ in compare()] == [0.3] * 3
    else:
        with pytest.raises(ValueError, match=f"on average over 31 tokens.* allowed for {dtype}"):
            compare()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": "tflite"}, "format must be one of"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"opset": 17}, "opset must be an integer of at least 18"),
        ({"dtype": "bfloat16"}, "no bfloat16 on CPUs"),
        ({"dtype": "int8", "format": "torch"}, "torchao"),
        ({"pooling": True}, "no sentence encoder"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments, words, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_checkpoint(checkpoint, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_other_models_and_scales_are_refused(tmp_path):
    from transformers import RobertaModel

    from tiny_models import roberta_config

    stock, scales = tmp_path / "stock", tmp_path / "scales"
    save(RobertaModel(roberta_config(num_hidden_layers=1)), stock)
    with pytest.raises(ValueError, match=r"is of type roberta.*mra-hf convert"):
        export_checkpoint(stock, tmp_path / "out")
    config = mra_config(num_hidden_layers=1, resolutions=[32, 8, 1], block_budgets=[4, 8])
    save(mra_hf.MraModel(config), scales)
    with pytest.raises(ValueError, match="two scales that end in 1"):
        export_checkpoint(scales, tmp_path / "out")


def test_a_pooling_that_no_graph_has_is_refused(tmp_path):
    source = sentence_encoder(tmp_path / "source", "max_tokens")
    with pytest.raises(ValueError, match=r"Pooling \(max\).*Leave pooling out"):
        export_checkpoint(source, tmp_path / "out", pooling=True)


def test_a_missing_package_is_named(checkpoint, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    with pytest.raises(ValueError, match=r"onnxruntime, which is not installed: pip install"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_an_old_torch_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    with pytest.raises(ValueError, match=r"needs torch 2\.11 or newer, got 2\.10\.0\+cu128"):
        export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+5228986c39.nv26.01")
    with pytest.raises(ValueError, match='is for format="onnx"'):  # what is checked next
        export_checkpoint(checkpoint, tmp_path / "out", format="torch", dtype="int8")


def test_the_command_prints_a_table_and_asks_before_replacing(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(checkpoint), str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "difference from the model" in printed.out and "tracing the model ..." in printed.err
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err or "force" in printed.err
    shutil.rmtree(out)
