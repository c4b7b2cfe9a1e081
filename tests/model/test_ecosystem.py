"""What users put around the models: pipelines, Trainer, half precision, checkpointing, compile."""

import shutil

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    RobertaModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mra_hf import (
    AdaMraConfig,
    AdaMraModel,
    LraConfig,
    LraForSequenceClassification,
    LraModel,
    MraForCandidateChoice,
    MraForMaskedLM,
    MraForSequenceClassification,
    MraForTokenClassification,
    MraModel,
    set_attention,
)
from tiny_models import mra_config, padded_batch, roberta_config, word_tokenizer

needs_a_compiler = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")),
        reason="inductor needs a C++ compiler",
    ),
]


def directory(path, model):
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("fill-mask", MraForMaskedLM),
        ("text-classification", MraForSequenceClassification),
        ("token-classification", MraForTokenClassification),
        ("feature-extraction", MraModel),
    ],
)
def test_pipelines_open_a_saved_directory(task, model_class, tmp_path):
    path = directory(tmp_path, model_class(mra_config(block_per_row=1)))
    pipe = pipeline(task, model=str(path))
    assert type(pipe.model) is model_class
    short = "w10 <mask> w12" if task == "fill-mask" else "w10 w11 w12"
    assert pipe(short)
    assert pipe([short, " ".join([short] * 60)])  # longer than one block, of another length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_run_and_stay_close(dtype):
    model = MraForMaskedLM(mra_config(block_per_row=1)).eval()
    batch = padded_batch(length=200)
    real = batch["attention_mask"].bool()
    expected = model(**batch).logits[real]
    half = model.to(dtype)
    output = half(**batch, labels=batch["input_ids"])
    assert output.logits.dtype == dtype
    torch.testing.assert_close(output.logits[real].float(), expected, atol=0.05, rtol=0.05)
    output.loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = MraForMaskedLM(mra_config(block_per_row=1, hidden_dropout_prob=0.0)).train()
    batch = padded_batch(length=200)

    def gradients():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_a_compiler)])
def test_the_whole_model_compiles_without_a_graph_break_and_trains(backend):
    model = MraForMaskedLM(mra_config(block_per_row=1, hidden_dropout_prob=0.0)).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batch = padded_batch(length=200)
    expected = model(**batch, labels=batch["input_ids"])
    result = compiled(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(result.loss, expected.loss)
    result.loss.backward()
    gradient = model.roberta.encoder.layer[0].attention.self.query.weight.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    again = model.roberta.encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(gradient, again, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_trainer_trains_saves_and_resumes(options, tmp_path):
    tokenizer = word_tokenizer()
    texts = [" ".join(f"w{10 + (i * j) % 7}" for j in range(60 + 10 * (i % 4))) for i in range(32)]
    rows = [tokenizer(text, truncation=True) for text in texts]

    def trainer(model, steps):
        settings = {"save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
        settings |= {"logging_steps": 1, "seed": 1, "max_steps": steps} | options
        aside = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(tmp_path / "run", **settings, **aside)
        collator = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=32)
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            processing_class=tokenizer,
        )

    run = trainer(MraForMaskedLM(mra_config(block_per_row=2)), 8)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-8")
    assert type(loaded) is MraForMaskedLM
    resumed = trainer(MraForMaskedLM(mra_config(block_per_row=2)), 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 8


@pytest.mark.slow
def test_sentence_transformers_wraps_a_saved_directory(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    path = directory(tmp_path, MraModel(mra_config(block_per_row=1)))
    word_model = models.Transformer(str(path))
    pooling = models.Pooling(32)
    encoder = sentence_transformers.SentenceTransformer(modules=[word_model, pooling], device="cpu")
    sentences = ["w10 w11", " ".join(["w12"] * 100)]
    together = encoder.encode(sentences)
    alone = encoder.encode(sentences[:1])
    assert together.shape == (2, 32)
    torch.testing.assert_close(torch.tensor(together[:1]), torch.tensor(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_stock", [False, True], ids=["ours", "stock"])
def test_exporting_a_model_keeps_batch_and_length_dynamic(is_stock):
    """With named sizes, torch refuses a graph that would not take every one in their range."""
    dims = torch.export.Dim("batch", max=64), torch.export.Dim("seq", max=256)
    small = {"num_hidden_layers": 1}
    model = MraModel(mra_config(block_per_row=1, **small), add_pooling_layer=False)
    if is_stock:
        model = RobertaModel(roberta_config(**small), add_pooling_layer=False)
        set_attention(model, "mra2", block_per_row=1)
    model.eval()
    batch = padded_batch(batch=2, length=100)
    dynamic = {name: dict(enumerate(dims)) for name in batch}
    program = torch.export.export(model, (), batch, dynamic_shapes=dynamic).module()
    for length in (31, 64, 130, 256):
        other = padded_batch(batch=3, length=length) if length > 90 else padded_batch(1, length)
        if length <= 90:
            other = {name: x.repeat(3, 1) for name, x in other.items()}
        expected = model(**other)[0]
        torch.testing.assert_close(program(**other)[0], expected, atol=1e-5, rtol=0)


class FirstOutput(torch.nn.Module):
    """A model as `torch.jit.trace` takes it: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**inputs, return_dict=False)[0]


def traceable_models():
    stock = RobertaModel(roberta_config(), add_pooling_layer=False)
    sizes = {"vocab_size": 100, "max_position_embeddings": 256}
    return {
        "mra_hf": MraModel(mra_config(block_per_row=1), add_pooling_layer=False),
        "biased": MraForSequenceClassification(mra_config(block_per_row=1, distance_bias_window=1)),
        "stock": set_attention(stock, block_per_row=1),
        "adamra": AdaMraModel(AdaMraConfig(**sizes)),
        "lra": LraForSequenceClassification(LraConfig(**sizes, block_per_row=1)),
    }


@pytest.mark.parametrize("name", traceable_models())
@pytest.mark.parametrize("example", [20, 250])
def test_a_model_traced_at_one_length_is_right_at_others(name, example):
    net = FirstOutput(traceable_models()[name]).eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "query" in key or "key" in key:
                parameter.mul_(30)
        batch = padded_batch(batch=1, length=example)
        traced = torch.jit.trace(net, tuple(batch.values()), check_trace=False)
        for length in (33, 100, 256):
            other = padded_batch(length=length, batch=2).values()
            torch.testing.assert_close(traced(*other), net(*other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["nystromformer", "longformer"])
def test_layers_that_pad_to_their_own_lengths_refuse_tracing(attention):
    config = LraConfig(vocab_size=100, max_position_embeddings=256, attention=attention)
    net = FirstOutput(LraModel(config)).eval()
    with pytest.raises(ValueError, match=r"torch\.jit\.trace would fix this attention"):
        torch.jit.trace(net, tuple(padded_batch(batch=1).values()), check_trace=False)


def test_candidates_in_chunks_are_read_by_a_graph_traced_on_one_chunk():
    model = MraForCandidateChoice(mra_config()).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, spans, mask):
            return self.model(input_ids, spans, mask, return_dict=False)[0]

    def inputs(chunks):
        ids = torch.randint(5, 99, (2, chunks, 64))
        spans = torch.tensor([[3, 9], [10, 20]]).expand(2, chunks, 2, 2).clone()
        return ids, spans, torch.ones_like(ids)

    net = Logits().eval()
    traced = torch.jit.trace(net, inputs(1), check_trace=False)
    for chunks in (1, 3):
        given = inputs(chunks)
        torch.testing.assert_close(traced(*given), net(*given), atol=1e-5, rtol=1e-5)
