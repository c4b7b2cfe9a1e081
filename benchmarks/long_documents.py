"""Long documents with queries from anywhere in them, from the corpus of `mra-hf build-corpus`.

A query is a sentence that is taken out of its document: nothing in the document repeats it, and
what is left around it is about the same thing. Two sets without common text: "pages" are single
pages of SQLite's documentation and single chapters of novels; "sections" are put together from
unrelated passages, so that their end says nothing about their beginning.
"""

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SETS = ("pages", "sections")
#: Shortest and longest document, in tokens without the special tokens.
SHORTEST, LONGEST = 1000, 4000
#: A document gives one query out of each of so many equal parts of its length.
QUERIES = 4
#: Fewest words and most tokens of a query; shorter sentences could come from anywhere.
QUERY_WORDS, QUERY_TOKENS = 8, 64
#: Tokens of a passage of an assembled document, at least.
PASSAGE_TOKENS = (100, 300)
#: The novel that passages are taken from; chapters are those of the other novels.
NOVEL_OF_PASSAGES = "Persuasion"

_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)"
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[\"'(\[]*[A-Z])"
)
_WHOLE_SENTENCE = re.compile(r"[\"'(]*[A-Z].*[.!?][\"')]*")
_WORD = re.compile(r"[A-Za-z]{2,}")

#: Return the number of tokens of every text, without special tokens.
CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Query:
    """A sentence, and how many tokens of its document stand before the place it was taken from."""

    text: str
    offset: int


@dataclass(frozen=True)
class Document:
    """A document of `tokens` tokens, without its queries; `name` says where the text is from."""

    set: str
    name: str
    text: str
    tokens: int
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class _Sentence:
    text: str
    tokens: int
    ends_line: bool


def build_documents(
    corpus: Path,
    count_tokens: CountTokens,
    *,
    per_set: int = 100,
    seed: int = 0,
    belongs: Callable[[str, str], bool] | None = None,
) -> list[Document]:
    """Return `per_set` documents of each of `SETS`; the same ones for the same arguments.

    Args:
        corpus: the folder that `mra-hf build-corpus` wrote.
        count_tokens: of the tokenizer; tokens must not cross white space.
        per_set: how many documents.
        seed: of all choices: which texts, how long, which sentences.
        belongs: whether a text, by its package and title, is used; None: all are.

    Raises:
        OSError: there is no such corpus.
        ValueError: it does not hold so much text.
    """
    texts = read_corpus(corpus)
    if belongs is not None:
        texts = [text for text in texts if belongs(*text[:2])]
    lines = {line for _, _, text in texts for line in text.split("\n")}
    times = Counter(sentence for line in lines for sentence in split_sentences(line))
    generator = random.Random(seed)
    sources = {"pages": _pages, "sections": _assembled}
    documents = []
    for name in SETS:
        made = sources[name](texts, count_tokens, generator)
        finished = (_take_queries(name, *one, times, generator) for one in made)
        kept = [document for document in finished if document is not None]
        generator.shuffle(kept)
        if name == "pages":
            kept = _as_many_of_each(kept, per_set)
        if len(kept) < per_set:
            raise ValueError(
                f"{corpus} holds {len(kept)} documents of the set {name!r}, {per_set} are wanted; "
                "ask for fewer (--documents)."
            )
        documents += kept[:per_set]
    return documents


def read_corpus(corpus: Path, files: str = "*/*.jsonl") -> list[tuple[str, str, str]]:
    """Return package, title and text of every text of the corpus, in the order of the `files`."""
    found = sorted(corpus.glob(files))
    if not found:
        raise OSError(f"{corpus} holds no corpus; write one with mra-hf build-corpus {corpus}.")
    return [
        (file.stem, row["title"], row["text"])
        for file in found
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())
    ]


def split_sentences(line: str) -> list[str]:
    """Return the sentences of a line; joined by a space they are the line."""
    return [sentence for sentence in _SENTENCE_END.split(line.strip()) if sentence]


def can_be_query(sentence: str, tokens: int) -> bool:
    """Whether it is a whole sentence of enough words that is not too long."""
    return (
        tokens <= QUERY_TOKENS
        and _WHOLE_SENTENCE.fullmatch(sentence) is not None
        and len(_WORD.findall(sentence)) >= QUERY_WORDS
    )


def _lines(text: str, count_tokens: CountTokens) -> Iterator[list[_Sentence]]:
    """The lines of a text, each as its sentences."""
    by_line = [sentences for line in text.split("\n") if (sentences := split_sentences(line))]
    counts = iter(count_tokens([sentence for sentences in by_line for sentence in sentences]))
    for sentences in by_line:
        last = len(sentences) - 1
        yield [_Sentence(s, next(counts), i == last) for i, s in enumerate(sentences)]


def _take_lines(lines: Iterable[list[_Sentence]], limit: int) -> list[_Sentence]:
    """Sentences of the first lines of up to `limit` tokens."""
    taken: list[_Sentence] = []
    total = 0
    for line in lines:
        total += sum(sentence.tokens for sentence in line)
        if total > limit:
            break
        taken += line
    return taken


def _draw_length(generator: random.Random) -> int:
    """Tokens of a document, queries included, uniform on a logarithmic scale."""
    low = SHORTEST + QUERIES * QUERY_TOKENS
    return round(math.exp(generator.uniform(math.log(low), math.log(LONGEST))))


def _pages(texts, count_tokens, generator) -> Iterator[tuple[str, list[_Sentence]]]:
    """Long pages of SQLite's documentation, and chapters, cut where a drawn length ends."""
    for package, title, text in texts:
        if package == "sqlite3-doc":
            parts = [text]
        elif package == "r-cran-janeaustenr" and title != NOVEL_OF_PASSAGES:
            parts = re.split(r"^chapter\b.*$", text, flags=re.IGNORECASE | re.MULTILINE)[1:]
        else:
            continue
        for number, part in enumerate(parts):
            limit = _draw_length(generator)
            name = f"{package}: {title}" + f", chapter {number + 1}" * (len(parts) > 1)
            yield name, _take_lines(_lines(part, count_tokens), limit)


def _assembled(texts, count_tokens, generator) -> Iterator[tuple[str, list[_Sentence]]]:
    """Documents of passages, one package after the other, of other texts than those of `_pages`."""
    passages: dict[str, list[list[_Sentence]]] = {}
    for package, title, text in texts:
        is_novel = package == "r-cran-janeaustenr"
        if package != "sqlite3-doc" and (not is_novel or title == NOVEL_OF_PASSAGES):
            cut = _passages(_lines(text, count_tokens), generator)
            passages.setdefault(package, []).extend(cut)
    for several in passages.values():
        generator.shuffle(several)
    for number in itertools.count(1):
        limit, parts, total = _draw_length(generator), [], 0
        names: list[str] = []
        while total <= limit:
            names = names or generator.sample(list(passages), len(passages))
            several = passages[names.pop()]
            if not several:
                return
            total += sum(sentence.tokens for sentence in several[-1])
            if total <= limit:
                parts += several.pop()
        yield f"assembled {number}", parts


def _passages(lines, generator) -> Iterator[list[_Sentence]]:
    """Cut lines into passages of at least a drawn number of tokens, and not much more."""
    passage, total, wanted = [], 0, generator.randint(*PASSAGE_TOKENS)
    for line in lines:
        passage += line
        total += sum(sentence.tokens for sentence in line)
        if total >= wanted:
            if total < 2 * PASSAGE_TOKENS[1]:
                yield passage
            passage, total, wanted = [], 0, generator.randint(*PASSAGE_TOKENS)


def _take_queries(set_name, name, sentences, times, generator) -> Document | None:
    """Take one sentence out of each part of the document; None where a part has none."""
    whole = sum(sentence.tokens for sentence in sentences)
    if whole < SHORTEST + QUERIES * QUERY_TOKENS:
        return None
    parts: list[list[int]] = [[] for _ in range(QUERIES)]
    before = 0
    for place, sentence in enumerate(sentences):
        if times[sentence.text] == 1 and can_be_query(sentence.text, sentence.tokens):
            parts[QUERIES * before // whole].append(place)
        before += sentence.tokens
    if not all(parts):
        return None
    taken = {generator.choice(part) for part in parts}
    queries, left, before = [], [], 0
    for place, sentence in enumerate(sentences):
        if place in taken:
            queries.append(Query(sentence.text, before))
        else:
            left.append(sentence.text + ("\n" if sentence.ends_line else " "))
            before += sentence.tokens
    return Document(set_name, name, "".join(left).strip(), before, tuple(queries))


def _as_many_of_each(documents: list[Document], wanted: int) -> list[Document]:
    """The first documents of each package in turn."""
    kinds: dict[str, list[Document]] = {}
    for document in documents:
        kinds.setdefault(document.name.split(":")[0], []).append(document)
    columns = list(kinds.values())
    rounds = ([d[i] for d in columns if i < len(d)] for i in range(wanted))
    return [document for documents_of in rounds for document in documents_of][:wanted]
