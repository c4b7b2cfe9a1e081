"""Tiny random models and directories for the tests."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from mra_hf import MraConfig

VOCABULARY = 100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 258,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
TOKENS = SIZES["max_position_embeddings"] - 2


def roberta_config(**changes) -> RobertaConfig:
    return RobertaConfig(**(SIZES | changes))


def mra_config(**changes) -> MraConfig:
    return MraConfig(**(SIZES | changes))


def enter_copy(template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill `folder` with what a fixture of larger scope has made, and go there."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


def padded_batch(batch=3, length=100, side="right") -> dict[str, torch.Tensor]:
    """Token ids with sample i shortened by 30 * i tokens of padding."""
    input_ids = torch.randint(5, VOCABULARY, (batch, length))
    mask = torch.ones_like(input_ids)
    for i in range(1, batch):
        padding = slice(length - 30 * i, None) if side == "right" else slice(0, 30 * i)
        mask[i, padding] = 0
    return {"input_ids": input_ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w5 .. w98, with RoBERTa's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [f"w{i}" for i in range(4, VOCABULARY - 1)]
    vocabulary = {word: i for i, word in enumerate([*specials, *words, "<mask>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=TOKENS,
    )


def write_sentence_encoder(folder):
    """Write a tiny random encoder of sentence-transformers, mean pooling, 512 positions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    encoder = folder.parent / f"{folder.name}-encoder"
    RobertaModel(roberta_config(max_position_embeddings=514)).save_pretrained(encoder)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(encoder)
    parts = [modules.Transformer(str(encoder)), modules.Pooling(32)]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder))
