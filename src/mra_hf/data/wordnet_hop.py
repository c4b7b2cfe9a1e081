"""WordNet-Hop: questions over several documents in WikiHop's schema, built from WordNet's nouns.

WikiHop (Welbl et al. 2018) joins facts that stand in different articles. Here the articles are
glosses. A chain A -> B -> C goes up WordNet's hypernyms, and each gloss names the next link:
"pepin: king of the Franks ..." -> "king: a male sovereign ..." -> "sovereign". The question is
`hypernym2 pepin`, the answer `sovereign`, and the other candidates are the ends of other chains
whose glosses lie among the supports too, so that the presence of a word does not give the answer
away. Those chains begin in the same file of WordNet (persons, artifacts, acts, ...) as the
question, so that the words alone help a guess less.
"""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mra_attention.checks import check_int
from mra_hf.data import debian_text

if TYPE_CHECKING:
    import os

PACKAGE = "wordnet-base"
MANIFEST_NAME = "manifest.json"

#: Split -> share of the roots (answers) that belong to it.
_SHARES = {"train": 0.75, "dev": 0.05, "test": 0.2}

#: Draws for the candidates of one question before it is left out.
_DRAWS = 2000


@dataclass(frozen=True)
class Synset:
    """A noun of WordNet: its file (the number of its subject), its words, the offsets of its
    hypernyms, and its gloss.
    """

    file: int
    words: tuple[str, ...]
    hypernyms: tuple[int, ...]
    gloss: str


@dataclass(frozen=True)
class Chain:
    """A question: the synsets whose glosses lead from the first title to the answer.

    Args:
        titles: the word asked about, and for two hops the word its gloss names.
        synsets: the offsets of their glosses, one per title.
        answer: the word that the last gloss names.
    """

    titles: tuple[str, ...]
    synsets: tuple[int, ...]
    answer: str


def read_nouns(file: "str | os.PathLike[str]") -> dict[int, Synset]:
    """The nouns of WordNet's `data.noun`, by offset (format: its manual page wndb(5))."""
    nouns = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence at the beginning of the file
        fields, _, gloss = line.partition("|")
        parts = fields.split()
        n_words = int(parts[3], 16)
        words = tuple(word.replace("_", " ").lower() for word in parts[4 : 4 + 2 * n_words : 2])
        pointers = parts[5 + 2 * n_words :]
        hypernyms = tuple(
            int(pointers[i + 1]) for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")
        )
        definition = gloss.split('; "')[0].strip()  # without the examples of use
        nouns[int(parts[0])] = Synset(int(parts[1]), words, hypernyms, definition)
    return nouns


def _named(words: tuple[str, ...], gloss: str) -> str | None:
    """The first of `words` that stands in `gloss` as a whole word, else None."""
    text = gloss.lower()
    for word in words:
        if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            return word
    return None


def _hinted(answer: str, text: str) -> bool:
    """Whether a word of `text` begins like `answer`: "campaigning" gives "campaign" away."""
    return re.search(rf"(?<!\w){re.escape(answer[:5])}", text.lower()) is not None


def find_chains(nouns: dict[int, Synset], hops: int = 2) -> list[Chain]:
    """All chains of that many hops in which every gloss names the next link.

    The answer, in whatever form, stands in no title and in no gloss but the last.
    """
    links = defaultdict(list)  # offset -> (hypernym, the word its gloss uses for it)
    for offset, noun in nouns.items():
        for hypernym in noun.hypernyms:
            word = _named(nouns[hypernym].words, noun.gloss)
            if word is not None and not set(noun.words) & {word}:
                links[offset].append((hypernym, word))
    chains = []
    for first, steps in links.items():
        title = nouns[first].words[0]
        for second, word in steps:
            if hops == 1:
                if not _hinted(word, title):
                    chains.append(Chain((title,), (first,), word))
                continue
            for _, answer in links.get(second, ()):
                if not _hinted(answer, f"{title} {word} {nouns[first].gloss}"):
                    chains.append(Chain((title, word), (first, second), answer))
    return chains


def _split_of(answer: str, seed: int) -> str:
    """The split that all chains to `answer` belong to."""
    digest = hashlib.sha256(f"{seed} {answer}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in _SHARES.items():
        if fraction < share:
            return split
        fraction -= share
    return split


def build_wordnet_hop(
    output: "str | os.PathLike[str]",
    *,
    n_train: int = 2400,
    n_dev: int = 100,
    n_test: int = 600,
    hops: int = 2,
    n_candidates: int = 8,
    words: tuple[int, int] = (800, 1100),
    max_per_answer: int = 12,
    seed: int = 0,
    packages: "str | os.PathLike[str] | None" = None,
) -> dict:
    """Write the splits of WordNet-Hop as JSON in WikiHop's schema.

    The splits share no answer: a chain belongs to the split of its root, which is its answer. The
    candidates of an instance are ends of chains of its split, and of its file of WordNet.

    Args:
        output: folder to write: `train.json`, `dev.json`, `test.json`, each a list of
            `{"id", "query", "answer", "candidates", "supports"}`, and `manifest.json`. It must not
            exist, and appears when everything is done.
        n_train: instances of the training split; likewise `n_dev` and `n_test`.
        hops: 2, or 1 for the control whose answer stands in the gloss of the word asked about.
        n_candidates: candidates of an instance, the answer included.
        words: shortest and longest length of the supports, in words.
        max_per_answer: questions of a split that may have the same answer, so that common ones
            ("person") do not fill it.
        seed: of the split and of every choice; the same seed gives the same files.
        packages: folder to download the package to; a package already there is used (default
            None: a temporary folder).

    Returns:
        The manifest: the package, its version and licence, the settings, and per split the number
        of instances, answers and chains, and the SHA-256 of the file.

    Raises:
        ValueError: `output` exists, a setting out of range, or more instances than there are.
        OSError: the package could not be downloaded or read; see `debian_text.fetch_package`.
    """
    sizes = {"train": n_train, "dev": n_dev, "test": n_test}
    for split, size in sizes.items():
        check_int(f"n_{split}", size, 1)
    check_int("n_candidates", n_candidates, 2)
    check_int("max_per_answer", max_per_answer, 1)
    if hops not in (1, 2):
        raise ValueError(f"hops must be 1 or 2, got {hops!r}.")
    if not 0 < words[0] <= words[1]:
        raise ValueError(f"words must be the shortest and the longest length, got {words}.")
    with debian_text.built_folder(output, packages) as (folder, downloads):
        unpacked, version = debian_text.fetch_package(PACKAGE, downloads)
        nouns = read_nouns(unpacked / "usr/share/wordnet/data.noun")
        chains = defaultdict(list)
        for chain in find_chains(nouns, hops):
            chains[_split_of(chain.answer, seed)].append(chain)
        manifest: dict[str, Any] = {
            "package": PACKAGE,
            "version": version,
            "licence": "WordNet 3.0",
            "hops": hops,
            "n_candidates": n_candidates,
            "words": list(words),
            "max_per_answer": max_per_answer,
            "seed": seed,
            "splits": {},
        }
        for split, size in sizes.items():
            drawer = _Drawer(
                nouns, chains[split], n_candidates, words, max_per_answer, f"{seed} {split}"
            )
            instances = list(drawer.instances(split, size))
            written = (json.dumps(instances, indent=1, ensure_ascii=False) + "\n").encode()
            (folder / f"{split}.json").write_bytes(written)
            manifest["splits"][split] = {
                "instances": len(instances),
                "answers": len({instance["answer"] for instance in instances}),
                "chains": len(chains[split]),
                "sha256": hashlib.sha256(written).hexdigest(),
            }
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


class _Drawer:
    """Draws the instances of one split."""

    def __init__(self, nouns, chains, n_candidates, words, max_per_answer, seed):
        self.nouns = nouns
        self.chains = chains
        self.n_candidates = n_candidates
        self.words = words
        self.max_per_answer = max_per_answer
        self.random = random.Random(seed)
        self.all_offsets = sorted(nouns)
        self.chains_of = defaultdict(list)  # file of WordNet -> the chains that begin in it
        for chain in chains:
            self.chains_of[self._file(chain)].append(chain)

    def _file(self, chain: Chain) -> int:
        return self.nouns[chain.synsets[0]].file

    def instances(self, split: str, size: int) -> Iterator[dict]:
        answers_of = {
            file: len({chain.answer for chain in chains}) for file, chains in self.chains_of.items()
        }
        times_used: dict[str, int] = defaultdict(int)
        number = 0
        for chain in self.random.sample(self.chains, len(self.chains)):
            if number == size:
                return
            if answers_of[self._file(chain)] < self.n_candidates:
                continue
            if times_used[chain.answer] == self.max_per_answer:
                continue
            candidates = self._candidates(chain)
            if candidates is None:
                continue
            times_used[chain.answer] += 1
            yield self._instance(chain, *candidates, f"{split}_{number}")
            number += 1
        if number < size:
            raise ValueError(
                f"n_{split} must be at most {number}, got {size}: "
                f"no more questions have n_candidates={self.n_candidates} that fit together "
                "(fewer candidates, or a larger max_per_answer, give more)."
            )

    def _candidates(self, chain: Chain) -> tuple[list[str], dict[str, int]] | None:
        """Candidates and the supports (title -> offset) that lead to them, or None."""
        about = f"{chain.titles[0]} : {self.nouns[chain.synsets[0]].gloss}"
        candidates = [chain.answer]
        supports = dict(zip(chain.titles, chain.synsets, strict=True))
        for _ in range(_DRAWS):
            if len(candidates) == self.n_candidates:
                return candidates, supports
            other = self.random.choice(self.chains_of[self._file(chain)])
            if other.answer in candidates or set(other.titles) & set(supports):
                continue
            if len(chain.titles) == 2 and _hinted(other.answer, about):
                continue  # the first gloss would point to a wrong candidate
            candidates.append(other.answer)
            supports |= dict(zip(other.titles, other.synsets, strict=True))
        return None

    def _instance(self, chain, candidates, supports, name: str) -> dict:
        texts = [self._support(title, offset) for title, offset in supports.items()]
        length = sum(len(text.split()) for text in texts)
        target = self.random.randint(*self.words)
        if target > length and len(supports) + target > len(self.all_offsets):
            raise ValueError(f"words must be smaller, got {self.words}: there are too few glosses.")
        while length < target:
            offset = self.random.choice(self.all_offsets)
            title = self.nouns[offset].words[0]
            if title not in supports:
                supports[title] = offset
                texts.append(self._support(title, offset))
                length += len(texts[-1].split())
        self.random.shuffle(candidates)
        self.random.shuffle(texts)
        hops = len(chain.titles) if len(chain.titles) > 1 else ""
        question = {"id": name, "query": f"hypernym{hops} {chain.titles[0]}"}
        answers = {"answer": chain.answer, "candidates": candidates}
        return question | answers | {"supports": texts}

    def _support(self, title: str, offset: int) -> str:
        return f"{title}: {self.nouns[offset].gloss}"
