"""Random sources of every type and head, their conversion, and comparisons with the result."""

import itertools
import json
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.mra import configuration_mra, modeling_mra

import mra_hf
from mra_hf.conversion import convert_checkpoint
from sapiens import SPECIALS, letter_tokenizer

LENGTH = 40  # learned positions of every source
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
ROBERTA_VOCABULARY = ("<s>", "<pad>", "</s>", "<unk>", *LETTERS, "<mask>")
BERT_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS)
BERT_SPECIALS = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
SIZES = {
    "vocab_size": len(ROBERTA_VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_labels": 3,
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


class Source(NamedTuple):
    """How a random checkpoint of one type is made, and which inputs it takes."""

    config_class: type
    class_prefix: str
    settings: dict
    models: ModuleType = transformers
    vocabulary: tuple[str, ...] = ROBERTA_VOCABULARY
    specials: dict = SPECIALS
    pad: int = 1
    has_token_types: bool = False


ROBERTA_ROWS = {"max_position_embeddings": LENGTH + 2, "pad_token_id": 1}
SOURCES = {
    "roberta": Source(transformers.RobertaConfig, "Roberta", ROBERTA_ROWS),
    "xlm-roberta": Source(transformers.XLMRobertaConfig, "XLMRoberta", ROBERTA_ROWS),
    "camembert": Source(transformers.CamembertConfig, "Camembert", ROBERTA_ROWS),
    "bert": Source(
        transformers.BertConfig,
        "Bert",
        {"max_position_embeddings": LENGTH},
        vocabulary=BERT_VOCABULARY,
        specials=BERT_SPECIALS,
        pad=0,
        has_token_types=True,
    ),
    "mra": Source(
        configuration_mra.MraConfig,
        "Mra",
        {"max_position_embeddings": LENGTH, "block_per_row": 4},
        models=modeling_mra,
    ),
}


def make_source(folder, source_type="roberta", head="ForMaskedLM", save=None, **changes):
    """Write a random source with tokenizer to `folder` and return its model in evaluation mode."""
    if head == "ForQuestionAnswering":
        changes = {"num_labels": 2} | changes
    source = SOURCES[source_type]
    config = source.config_class(**(SIZES | source.settings | changes))
    model = getattr(source.models, f"{source.class_prefix}{head}")(config)
    with torch.no_grad():  # biases and LayerNorms too, so that a swapped name shows
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, **(save or {}))
    letter_tokenizer(source.vocabulary, source.specials, LENGTH).save_pretrained(folder)
    return model.eval()


def random_inputs(source_type, head, side="right"):
    """Two sequences of 40 and 33 tokens; for multiple choice, one sample of two choices."""
    source = SOURCES[source_type]
    input_ids = torch.randint(5, SIZES["vocab_size"], (2, LENGTH))
    mask = torch.ones_like(input_ids)
    mask[1, 33:] = 0
    if side == "left":
        mask = mask.flip(-1)
    inputs = {"input_ids": input_ids.masked_fill(mask == 0, source.pad), "attention_mask": mask}
    if source.has_token_types:
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape)
    if head == "ForMultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    return inputs


@torch.no_grad()
def outputs_of(model, inputs):
    """All float outputs, with the positions of padding zeroed."""
    mask = inputs["attention_mask"]
    outputs = []
    for tensor in model(**inputs).to_tuple():
        if tensor.shape[: mask.ndim] == mask.shape and mask.shape[-1] == LENGTH:
            tensor = tensor * mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim))
        outputs.append(tensor)
    return outputs


def assert_same_outputs(source, result, inputs, n_outputs=None):
    """All outputs agree, or the first few."""
    pairs = zip(outputs_of(source, inputs), outputs_of(result, inputs), strict=n_outputs is None)
    for expected, output in itertools.islice(pairs, n_outputs):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def convert(source, output, **arguments):
    """Convert to 300 tokens without a distance bias, which would hide tokens of short sources."""
    defaults = {"max_length": 300, "distance_bias": False}
    return convert_checkpoint(source, output, **(defaults | arguments))


def open_result(folder):
    config = json.loads((folder / "config.json").read_text())
    return getattr(mra_hf, config["architectures"][0]).from_pretrained(folder).eval()


def state_names(folder):
    return set(open_result(folder).state_dict())


def assert_report_is_complete(report, source_names, output):
    """Every source tensor is named, and every tensor of the result exactly once."""
    results = [record.name for record in report.tensors if record.action != "dropped"]
    assert sorted(results) == sorted(state_names(output))
    assert set(source_names) == {record.source for record in report.tensors} - {None}
    assert sum(report.counts().values()) == len(report.tensors)
    assert all((record.source is None) == (record.action == "new") for record in report.tensors)


def rewrite(folder, kind):
    """Store the weights of `folder` again as `kind`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    if kind == "safetensors":
        save_file(tensors, file)
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "old bin":
        options = {"_use_new_zipfile_serialization": False}
        torch.save(tensors, folder / "pytorch_model.bin", **options)
    else:
        stem, ending = kind.split(" ")[1].split(".")
        index = {}
        for i, half in enumerate(halves):
            name = f"{stem}-{i + 1:05d}-of-00002.{ending}"
            part = {key: tensors[key] for key in half}
            (save_file if ending == "safetensors" else torch.save)(part, folder / name)
            index |= dict.fromkeys(half, name)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.{ending}.index.json").write_text(text)


def change_config(folder, **changes):
    """Set fields of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    config = {name: field for name, field in config.items() if field is not None}
    file.write_text(json.dumps(config))
