"""Pairs of long texts: citations among papers (AAN), or passages of one work as a stand-in."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mra_hf.data.lra.parts import PARTS, LraData, rows
from mra_hf.data.lra.texts import to_ids
from mra_hf.data.samples import check_amounts, sample_rows, split_rows

#: The files of the published set, by part.
_AAN = {
    part: f"new_aan_pairs.{name}.tsv"
    for part, name in zip(PARTS, ("train", "eval", "test"), strict=True)
}
#: Bytes of a paper that are read, as published, before it is cut to max_bytes.
_PAPER_BYTES = 10_000
#: The fewest works in a part of the stand-in.
_FEWEST_WORKS = 2


def retrieval(
    source: str,
    *,
    seed: int = 0,
    max_bytes: int = 4000,
    train: int = 20_000,
    dev: int = 2000,
    test: int = 2000,
    max_train: int | None = None,
    max_eval: int | None = None,
) -> LraData:
    """Read pairs of texts; byte b is id b + 1.

    Args:
        source: a folder with the published new_aan_pairs.train.tsv, .eval.tsv and .test.tsv
            (label, two ids, two texts); or, for the stand-in, with .jsonl files of works {"text"}
            as `mra-hf build-corpus` writes them: a pair is two passages that do not overlap, of one
            work (label 1) or of two works (0), and no work is in two parts.
        seed: of all draws.
        max_bytes: of a text.
        train, dev, test: pairs of the stand-in.
        max_train, max_eval: draw so many rows of the published set; None: all.

    Raises:
        ValueError: no such files, damaged ones (with the line), or works that are too short.
    """
    check_amounts(seed=seed, max_bytes=max_bytes, train=train, dev=dev, test=test)
    check_amounts(max_train=max_train, max_eval=max_eval)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"source must be a folder, and {source} is none.")
    if (folder / _AAN["train"]).is_file():
        limits = {"train": max_train, "dev": max_eval, "test": max_eval}
        made = {
            part: _pairs(
                list(_aan(folder / _AAN[part])), max_bytes, limits[part], seed, folder / _AAN[part]
            )
            for part in PARTS
        }
        labels, split = ("no citation", "citation"), "AAN as published"
    else:
        works = [work for path in sorted(folder.glob("*.jsonl")) for work in _works(path)]
        works = [work for work in works if len(work) >= 2 * max_bytes]
        if len(works) < 10 * _FEWEST_WORKS:
            raise ValueError(
                f"{source} must hold {_AAN['train']}, or .jsonl files with "
                f"{10 * _FEWEST_WORKS} texts or more of {2 * max_bytes} bytes, got {len(works)}; "
                "lower max_bytes?"
            )
        split_of_works = split_rows(len(works), (0.1, 0.1), seed)
        made = {}
        for number, (part, count) in enumerate(zip(PARTS, (train, dev, test), strict=True)):
            works_of_part = [works[row] for row in split_of_works[part]]
            draw = np.random.default_rng((seed, number))
            pairs = list(_passages(works_of_part, count, max_bytes, draw))
            made[part] = _pairs(pairs, max_bytes, None, seed, folder)
        labels = ("two works", "one work")
        split = f"passages of {len(works)} works, a stand-in; works held out, seed {seed}"
    return LraData(
        **made, vocab_size=257, max_length=max_bytes, labels=labels, split=split, two_tower=True
    )


def _pairs(
    triples: list[tuple[bytes, bytes, int]], max_bytes: int, limit: int | None, seed: int, where
):
    triples = [triples[row] for row in sample_rows(len(triples), limit, seed)]
    first = [to_ids(one, max_bytes) for one, _, _ in triples]
    second = [to_ids(other, max_bytes) for _, other, _ in triples]
    labels = [label for *_, label in triples]
    return rows(first, labels, 2, str(where), input_ids_2=second)


def _aan(path: Path) -> Iterator[tuple[bytes, bytes, int]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if len(row) != 5 or row[0] not in ("0.0", "1.0", "0", "1"):
                raise ValueError(
                    f"{path}, line {number}: must be label, id, id, text, text "
                    f"with tabs between, got {len(row)} columns."
                )
            first, second = (side.encode()[:_PAPER_BYTES] for side in row[3:])
            yield first, second, int(float(row[0]))


def _works(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{path}, line {number}: no {{"text": ...}} ({error}).') from error


def _passages(
    works: list[bytes], count: int, size: int, draw: np.random.Generator
) -> Iterator[tuple[bytes, bytes, int]]:
    for number in range(count):
        label = number % 2
        if label:
            work = works[draw.integers(len(works))]
            gap = draw.integers(len(work) - 2 * size + 1)
            first = draw.integers(len(work) - 2 * size - gap + 1)
            second = first + size + gap
            sides = [work[first : first + size], work[second : second + size]]
            if draw.random() < 0.5:
                sides.reverse()
        else:
            sides = []
            for row in draw.choice(len(works), 2, replace=False):
                start = draw.integers(len(works[row]) - size + 1)
                sides.append(works[row][start : start + size])
        yield sides[0], sides[1], label
