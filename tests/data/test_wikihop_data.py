"""WikiHop's schema and how a question becomes sequences; WordNet-Hop, built from small nouns."""

import json
from pathlib import Path

import pytest
import torch

from mra_hf.data import debian_text, wikihop, wordnet_hop
from tiny_models import word_tokenizer

QUESTION = {
    "id": "q1",
    "query": "hypernym w10",
    "answer": "w12",
    "candidates": ["w11 w13", "w12"],
    "supports": ["w20 w21 w22", "w30 w31", "w40 " * 30],
}
SHARED = Path(__file__).parents[3] / "shared" / "data" / "wikihop"


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer()
    assert wikihop.add_markers(tokenizer) == 4
    assert wikihop.add_markers(tokenizer) == 0, "they are added once"
    return tokenizer


def pieces_of(question, tokenizer, length):
    (parts,) = wikihop.tokenize_parts([question], tokenizer)
    return parts, wikihop.assemble(parts, tokenizer, length, question["id"])


def check_pieces(question, tokenizer, length):
    """What must hold of every assembly."""
    parts, pieces = pieces_of(question, tokenizer, length)
    opened, closed = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    seen = []
    for piece in pieces:
        assert len(piece.input_ids) <= length
        assert len(piece.candidate_spans) == len(question["candidates"])
        for (first, last), candidate in zip(piece.candidate_spans, parts.candidates, strict=True):
            assert piece.input_ids[first] == opened and piece.input_ids[last] == closed
            assert piece.input_ids[first + 1 : last] == candidate
        assert piece.input_ids.count(opened) == len(question["candidates"])
        body = piece.input_ids[piece.candidate_spans[-1][1] + 2 :]
        seen += [token for token in body if token != tokenizer.sep_token_id]
    assert seen == [token for support in parts.supports for token in support], "nothing dropped"
    return pieces


def test_a_question_that_fits_is_one_sequence(tokenizer):
    (piece,) = check_pieces(QUESTION, tokenizer, 256)
    text = tokenizer.decode(piece.input_ids)
    assert text.startswith("<s> <question>") and text.endswith("</s>")
    assert tokenizer.convert_ids_to_tokens(piece.input_ids).count("</s>") == 4


def test_a_longer_question_repeats_the_candidates(tokenizer):
    pieces = check_pieces(QUESTION, tokenizer, 34)
    assert len(pieces) > 1
    prefix = pieces[0].candidate_spans[-1][1] + 2
    assert all(piece.input_ids[:prefix] == pieces[0].input_ids[:prefix] for piece in pieces)


def test_no_supports_is_one_sequence(tokenizer):
    (piece,) = check_pieces(QUESTION | {"supports": []}, tokenizer, 256)
    assert piece.input_ids[-1] == tokenizer.sep_token_id


def test_candidates_that_leave_no_room_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"max_seq_length must leave room.*of q1 alone take 13 of"):
        pieces_of(QUESTION, tokenizer, 20)


def test_batches_are_padded_in_every_direction(tokenizer):
    questions = [QUESTION, QUESTION | {"candidates": ["w12"], "supports": ["w20"]}]
    features = []
    for question in questions:
        _, pieces = pieces_of(question, tokenizer, 34)
        features.append(
            {
                "input_ids": [piece.input_ids for piece in pieces],
                "candidate_spans": pieces[0].candidate_spans,
                "label": question["candidates"].index("w12"),
            }
        )
    batch = wikihop.CandidateCollator(tokenizer.pad_token_id)(features)
    n_pieces = len(features[0]["input_ids"])
    assert batch["input_ids"].shape[:2] == (2, n_pieces) and n_pieces > 1
    assert batch["candidate_spans"].shape == (2, n_pieces, 2, 2)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"][1, 1:].sum() == 0
    assert (batch["candidate_spans"][1, 1:] == -1).all()
    assert (batch["candidate_spans"][1, 0, 1] == -1).all()
    real = batch["attention_mask"].bool()
    assert torch.equal(real, batch["input_ids"] != tokenizer.pad_token_id)


def test_parts_are_shuffled_by_seed():
    first = wikihop.shuffled(QUESTION, 0)
    assert first == wikihop.shuffled(QUESTION, 0)
    assert sorted(first["supports"]) == sorted(QUESTION["supports"])
    assert len({tuple(wikihop.shuffled(QUESTION, seed)["supports"]) for seed in range(20)}) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "w99"}, r"line 9: question 'q2': the answer 'w99' is not among the candidates"),
        ({"candidates": ["w12", "w12"]}, "line 9: .* a candidate occurs twice"),
        ({"supports": ["a", ""]}, "line 9: .* supports must be texts that are not empty"),
        ({"query": " "}, "line 9: .* query is empty"),
        ({"supports": None}, "line 9: field 'supports' of a question must be a list, got None"),
        ({"id": "q1"}, "line 9: the id 'q1' occurs twice"),
    ],
)
def test_a_faulty_question_is_named_by_file_and_line(tmp_path, change, message):
    file = tmp_path / "train.json"
    one = QUESTION | {"supports": ["w1"], "candidates": ["w12"]}
    lines = [json.dumps(value) for value in one.values()]
    body = ",\n".join(f'"{key}": {value}' for key, value in zip(one, lines, strict=True))
    second = json.dumps(one | {"id": "q2"} | change)
    file.write_text("[\n{\n" + body + "\n},\n" + second + "\n]\n")
    with pytest.raises(ValueError, match=r"train\.json, " + message):
        wikihop.read_wikihop(file)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    whole = json.dumps([QUESTION, QUESTION | {"id": "q2"}], indent=1)
    file = tmp_path / "train.json"
    file.write_text(whole)
    assert len(wikihop.read_wikihop(file)) == 2
    for length in (len(whole) - 1, len(whole) - 40, 5, 0):
        file.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"train\.json, line \d+"):
            wikihop.read_wikihop(file)
    file.write_bytes(b"\xef\xbb\xbf" + whole.encode() + b"\n \n")
    assert len(wikihop.read_wikihop(file)) == 2, "a byte order mark and blank lines mean nothing"
    file.write_text(f"{whole}\n{whole}")
    line = whole.count("\n") + 2
    with pytest.raises(ValueError, match=rf"train\.json, line {line}: text after the list"):
        wikihop.read_wikihop(file)
    file.write_bytes(whole.encode().replace(b"w20", b"\xff20"))
    with pytest.raises(ValueError, match=r"train\.json, line \d+: not UTF-8"):
        wikihop.read_wikihop(file)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no true WikiHop instances on this machine")
@pytest.mark.parametrize("length", [256, 512, 4096])
def test_true_questions_are_assembled_whole(length):
    from transformers import AutoTokenizer

    from mra_hf.english import english_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(english_checkpoint())
    wikihop.add_markers(tokenizer)
    questions = [
        question
        for name in ("train", "dev")
        for question in wikihop.read_wikihop(SHARED / f"{name}.json")
    ]
    assert len(questions) == 50
    several = 0
    for question in questions:
        try:
            pieces = check_pieces(question, tokenizer, length)
        except ValueError as error:  # dozens of candidates alone fill a short sequence
            assert length < 4096 and "leave room" in str(error)
            continue
        several += len(pieces) > 1
        assert question["answer"] in question["candidates"], "the answer can be chosen"
    assert several > 20 if length == 512 else several > 0


def noun(offset, words, hypernym, gloss, file) -> str:
    listed = " ".join(f"{word} 0" for word in words)
    pointer = f"001 @ {hypernym:08d} n 0000" if hypernym else "000"
    return f"{offset:08d} {file:02d} n {len(words):02x} {listed} {pointer} | {gloss}  \n"


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A WordNet of 60 three-link chains that all match, in place of the package."""
    lines = ["  1 a licence\n"]
    for number in range(1, 61):
        # Letters, so that no word begins like another.
        tag = "".join(chr(97 + (number * step) % 26) for step in (1, 3, 7, 11)) + chr(
            97 + number % 13
        )
        base = number * 10
        top, mid, low = (f"q{tag}top", f"r{tag}mid", f"s{tag}low")
        file = 5 if number <= 12 else 4
        lines.append(noun(base, [top], 0, "a thing of its own", file))
        lines.append(noun(base + 1, [mid], base, f'a {top} of some kind; "the {top} fell"', file))
        lines.append(noun(base + 2, [low, "other_word"], base + 1, f"one {mid} among many", file))
    folder = tmp_path / "wordnet-base" / "usr/share/wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text("".join(lines))
    monkeypatch.setattr(debian_text, "fetch_package", lambda name, where: (tmp_path / name, "1.0"))
    return folder / "data.noun"


def test_nouns_and_chains_are_found(wordnet):
    nouns = wordnet_hop.read_nouns(wordnet)
    assert len(nouns) == 180
    first = nouns[12]
    assert first.words[1] == "other word" and first.hypernyms == (11,) and first.file == 5
    assert nouns[11].gloss.endswith("of some kind"), "without the example of use"
    chains = wordnet_hop.find_chains(nouns, hops=2)
    assert len(chains) == 60
    for chain in chains:
        low, mid = (nouns[offset] for offset in chain.synsets)
        assert chain.titles[0] == low.words[0] and chain.titles[1] in low.gloss
        assert chain.answer in mid.gloss and chain.answer not in low.gloss


def test_the_answer_is_hinted_at_nowhere_else():
    nouns = {
        1: wordnet_hop.Synset(4, ("campaign",), (), "a series of actions"),
        2: wordnet_hop.Synset(4, ("tour",), (1,), "a campaign on the road"),
        3: wordnet_hop.Synset(4, ("stumping",), (2,), "campaigning on a tour"),
    }
    assert wordnet_hop.find_chains(nouns) == []
    nouns[3] = wordnet_hop.Synset(4, ("stumping",), (2,), "talking on a tour")
    assert len(wordnet_hop.find_chains(nouns)) == 1


@pytest.mark.parametrize("hops", [1, 2])
def test_questions_have_two_hops_and_answers_stay_in_their_split(wordnet, tmp_path, hops):
    sizes = {"n_train": 20, "n_dev": 1, "n_test": 5}
    settings = sizes | {"hops": hops, "n_candidates": 3, "words": (60, 80), "seed": 4}
    manifest = wordnet_hop.build_wordnet_hop(tmp_path / "a", **settings)
    answers = {}
    nouns = wordnet_hop.read_nouns(wordnet)
    file_of = {word: noun.file for noun in nouns.values() for word in noun.words}
    for split in ("train", "dev", "test"):
        questions = wikihop.read_wikihop(tmp_path / "a" / f"{split}.json")
        assert len(questions) == sizes[f"n_{split}"] == manifest["splits"][split]["instances"]
        answers[split] = {name for question in questions for name in question["candidates"]}
        for question in questions:
            supports = dict(text.split(": ", 1) for text in question["supports"])
            assert len(supports) == len(question["supports"]), "no title twice"
            assert 60 <= sum(len(text.split()) for text in question["supports"]) < 100
            kind, about = question["query"].split(" ", 1)
            assert kind == ("hypernym2" if hops == 2 else "hypernym")
            gloss = supports[about]
            assert {file_of[name] for name in question["candidates"]} == {file_of[about]}
            if hops == 2:
                assert not any(name in gloss for name in question["candidates"])
                (middle,) = (title for title in supports if title in gloss)
                gloss = supports[middle]
            assert [name for name in question["candidates"] if name in gloss] == [
                question["answer"]
            ]
    if hops == 2:  # candidates of a split are ends of its own chains
        assert not answers["train"] & answers["test"]
    wordnet_hop.build_wordnet_hop(tmp_path / "b", **settings)
    for name in ("train.json", "test.json", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_test": 1000}, "n_test must be at most"),
        ({"hops": 3}, "hops must be 1 or 2"),
        ({"words": (90, 10)}, "words must be"),
        ({"n_candidates": 1}, "n_candidates"),
        ({"n_candidates": 100}, "no more questions have n_candidates=100"),
        ({"max_per_answer": 0}, "max_per_answer"),
        ({"words": (9000, 9000)}, "words must be smaller"),
    ],
)
def test_settings_that_cannot_be_are_refused(wordnet, tmp_path, settings, message):
    chosen = {"n_train": 5, "n_dev": 1, "n_test": 1, "n_candidates": 2, "words": (20, 30)}
    chosen["seed"] = 3
    with pytest.raises(ValueError, match=message):
        wordnet_hop.build_wordnet_hop(tmp_path / "out", **(chosen | settings))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "nothing is left behind"
