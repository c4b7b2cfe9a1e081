"""A made-up corpus as `mra-hf build-corpus` writes it, and a tiny BERT that knows its words."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [first + second + "n" for first in "bdfglmrst" for second in ("a", "e", "i", "o", "u")]
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_corpus(folder: Path, sentences: int = 500) -> Path:
    """Write texts of so many sentences of ten words: pages, a novel of two chapters, and others."""
    generator = random.Random(0)

    def text(lines: int) -> str:
        one = [" ".join(generator.choices(WORDS, k=10)).capitalize() + "." for _ in range(lines)]
        return "\n".join(" ".join(one[i : i + 5]) for i in range(0, lines, 5))

    def write(file: str, texts: dict[str, str]) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"title": title, "text": one}) for title, one in texts.items()]
        path.write_text("\n".join(rows) + "\n")

    write("train/sqlite3-doc.jsonl", {f"page {i}": text(sentences) for i in range(2)})
    novel = f"EMMA\nCHAPTER I\n{text(sentences)}\nCHAPTER II\n{text(sentences)}"
    write("train/r-cran-janeaustenr.jsonl", {"Emma": novel})
    write("train/dict-jargon.jsonl", {"jargon": text(2 * sentences)})
    write("heldout/r-cran-janeaustenr.jsonl", {"Persuasion": text(2 * sentences)})
    return folder


def write_tiny_bert(folder: Path) -> Path:
    """Write a random BERT of 512 positions whose tokens are the words of the corpus."""
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    kinds = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in kinds}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), intermediate_size=64, **sizes)
    BertModel(config, add_pooling_layer=True).save_pretrained(folder)
    return folder
