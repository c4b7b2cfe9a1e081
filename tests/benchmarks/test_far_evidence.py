"""The documents of the benchmark of far evidence: their sentence, its place, their class."""

from __future__ import annotations

from transformers import AutoTokenizer

from benchmarks.far_evidence import BEGINNINGS, CLASSES, LONG, SHORT, build_documents
from mra_hf.english import english_checkpoint, english_passage


def test_the_class_stands_in_one_sentence_beyond_the_beginning():
    tokenizer = AutoTokenizer.from_pretrained(english_checkpoint())
    texts = [english_passage()]
    for kind in (SHORT, LONG):
        documents = build_documents(texts, tokenizer, kind, 12, seed=0)
        assert documents == build_documents(texts, tokenizer, kind, 12, seed=0)
        for document in documents:
            ids = document["input_ids"]
            assert kind.shortest <= len(ids) <= kind.longest + 2
            text = tokenizer.decode(ids)
            [place] = [text.find(words) for words in BEGINNINGS if words in text]
            answer = text[place:].split(".")[0].split()[-1]
            assert answer == CLASSES[document["labels"]]
            before = tokenizer(text[:place], add_special_tokens=False).input_ids
            assert len(before) >= kind.before
