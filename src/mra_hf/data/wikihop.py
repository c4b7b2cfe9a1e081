"""WikiHop (Welbl et al. 2018): its schema, checked, and how a question becomes sequences.

Questions are assembled as Longformer does it (Beltagy et al. 2020, appendix D): question,
candidates, then as many supports as fit. The other supports go into further sequences that repeat
question and candidates. Nothing is dropped.

    <s> <question> q </question> <answer> c1 </answer> ... </s> support 1 </s> support 2 </s>
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mra_attention.checks import check_int
from mra_hf.data.mlm import boundary_tokens
from mra_hf.data.tables import check_characters

if TYPE_CHECKING:
    import os

#: Tokens that mark the parts of the prefix, in the order in which they join the vocabulary.
MARKERS = ("<question>", "</question>", "<answer>", "</answer>")

#: A sequence must leave this much room for supports, in tokens.
_LEAST_ROOM = 16

_FIELDS = {"id": str, "query": str, "answer": str, "candidates": list, "supports": list}


@dataclass(frozen=True)
class Piece:
    """One sequence of a question.

    Args:
        input_ids: its tokens.
        candidate_spans: positions of the markers that open and close each candidate.
    """

    input_ids: list[int]
    candidate_spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Parts:
    """The parts of a question as token ids, without special tokens."""

    question: list[int]
    candidates: list[list[int]]
    supports: list[list[int]]


def read_wikihop(path: "str | os.PathLike[str]") -> list[dict[str, Any]]:
    """Read questions in WikiHop's schema: a JSON list of objects.

    Each has `id`, `query`, `answer`, `candidates` and `supports`; the answer is one of the
    candidates.

    Raises:
        ValueError: the file holds anything else; the message gives file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is no file; pass a JSON file in WikiHop's schema.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}).") from error
    instances, seen = [], set()
    for start, instance in _elements(text, path):
        fault = _fault(instance)
        if fault is None and instance["id"] in seen:
            fault = f"the id {instance['id']!r} occurs twice"
        if fault is not None:
            raise ValueError(f"{path}, line {_line(text, start)}: {fault}.")
        seen.add(instance["id"])
        instances.append(instance)
    if not instances:
        raise ValueError(f"{path} holds no question.")
    return instances


def _elements(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, each with the index in `text` at which it begins."""
    decoder, start = json.JSONDecoder(), _skip_space(text, 0)
    if text[start : start + 1] != "[":
        raise ValueError(f"{path}, line 1: must be a JSON list of questions.")
    start = _skip_space(text, start + 1)
    while text[start : start + 1] != "]":
        try:
            element, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            cut = " (the file is cut off)" if error.pos >= len(text.rstrip()) - 1 else ""
            raise ValueError(
                f"{path}, line {error.lineno}: not JSON: {error.msg}{cut}; "
                f"the question begins in line {_line(text, start)}."
            ) from error
        except (RecursionError, ValueError) as error:
            where = f"{path}, line {_line(text, start)}"
            raise ValueError(f"{where}: the question cannot be read: {error}.") from error
        if "\\u" in text[start:end]:
            check_characters(element, f"{path}, line {_line(text, start)}")
        yield start, element
        start = _skip_space(text, end)
        if text[start : start + 1] == ",":
            start = _skip_space(text, start + 1)
        elif text[start : start + 1] != "]":
            raise ValueError(
                f"{path}, line {_line(text, start)}: the list is not closed (cut off?)."
            )
    rest = _skip_space(text, start + 1)
    if rest < len(text):
        raise ValueError(
            f"{path}, line {_line(text, rest)}: text after the list of questions; "
            "put all questions into one list."
        )


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _fault(instance: Any) -> str | None:
    """What is wrong with a question, or None."""
    if not isinstance(instance, dict):
        return f"a question must be an object, got {type(instance).__name__}"
    for field, kind in _FIELDS.items():
        if not isinstance(instance.get(field), kind):
            return f"field {field!r} of a question must be a {kind.__name__}, got " + (
                f"{instance[field]!r}" if field in instance else "none"
            )
    name = f"question {instance['id']!r}"
    for field in ("candidates", "supports"):
        for text in instance[field]:
            if not isinstance(text, str) or not text.strip():
                return f"{name}: {field} must be texts that are not empty, got {text!r}"
    if not instance["query"].strip():
        return f"{name}: query is empty"
    if len({text.strip() for text in instance["candidates"]}) != len(instance["candidates"]):
        return f"{name}: a candidate occurs twice"
    if instance["answer"] not in instance["candidates"]:
        return f"{name}: the answer {instance['answer']!r} is not among the candidates"
    return None


def add_markers(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the markers to `tokenizer` where they are missing; return how many were added."""
    return tokenizer.add_tokens(
        [AddedToken(marker, special=True, normalized=False) for marker in MARKERS],
        special_tokens=True,
    )


def tokenize_parts(
    instances: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[Parts]:
    """Tokenise the parts of questions, each text with a space in front."""
    texts = [
        f" {text.strip()}"
        for instance in instances
        for text in (instance["query"], *instance["candidates"], *instance["supports"])
    ]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    return [
        Parts(
            next(ids),
            [next(ids) for _ in instance["candidates"]],
            [next(ids) for _ in instance["supports"]],
        )
        for instance in instances
    ]


def assemble(
    parts: Parts, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str = "question"
) -> list[Piece]:
    """Put a question into as many sequences of at most `max_length` tokens as it needs.

    A support goes into the current sequence if it fits there, else it opens the next one; a support
    longer than a whole sequence is cut, and no part of it is dropped.

    Args:
        parts: of the question.
        tokenizer: with the markers, see `add_markers`.
        max_length: tokens of a sequence, special tokens included.
        name: of the question, for the error message.

    Raises:
        ValueError: question and candidates leave no room for supports.
    """
    check_int("max_length", max_length, 1)
    first, last = boundary_tokens(tokenizer)
    markers = tokenizer.convert_tokens_to_ids(list(MARKERS))
    assert isinstance(markers, list)
    question, end_question, answer, end_answer = markers
    prefix: list[int] = [first, question, *parts.question, end_question]
    spans = []
    for candidate in parts.candidates:
        spans.append((len(prefix), len(prefix) + len(candidate) + 1))
        prefix += [answer, *candidate, end_answer]
    prefix.append(last)
    room = max_length - len(prefix)
    if room < (_LEAST_ROOM if parts.supports else 0):
        raise ValueError(
            "max_seq_length must leave room for the supports, and question and candidates "
            f"of {name} alone take {len(prefix)} of {max_length} tokens; raise it."
        )
    bodies: list[list[int]] = [[]]
    for support in parts.supports:
        for start in range(0, len(support), room - 1):
            chunk = [*support[start : start + room - 1], last]
            if len(bodies[-1]) + len(chunk) > room:
                bodies.append([])
            bodies[-1] += chunk
    return [Piece([*prefix, *body], spans) for body in bodies]


@dataclass
class CandidateCollator:
    """Batches of assembled questions for `MraForCandidateChoice`.

    Features hold `input_ids` (a list of pieces), `candidate_spans` (the same in every piece) and
    `label`. A batch has `input_ids` and `attention_mask` `[B, pieces, N]`, `candidate_spans`
    `[B, pieces, candidates, 2]`, -1 where there is none, and `labels` `[B]`.

    Args:
        pad_token_id: fills up pieces.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pieces = max(len(feature["input_ids"]) for feature in features)
        length = max(len(ids) for feature in features for ids in feature["input_ids"])
        candidates = max(len(feature["candidate_spans"]) for feature in features)
        input_ids = torch.full((len(features), pieces, length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        spans = torch.full((len(features), pieces, candidates, 2), -1)
        for row, feature in enumerate(features):
            for number, ids in enumerate(feature["input_ids"]):
                input_ids[row, number, : len(ids)] = torch.tensor(ids)
                attention_mask[row, number, : len(ids)] = 1
                candidate_spans = torch.tensor(feature["candidate_spans"])
                spans[row, number, : len(candidate_spans)] = candidate_spans
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "candidate_spans": spans,
            "labels": torch.tensor([feature["label"] for feature in features]),
        }


def shuffled(instance: dict[str, Any], seed: int) -> dict[str, Any]:
    """The question with candidates and supports in another order, the same for the same seed."""
    generator = random.Random(f"{seed} {instance['id']}")
    return instance | {
        field: generator.sample(instance[field], len(instance[field]))
        for field in ("candidates", "supports")
    }
