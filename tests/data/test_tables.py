"""Tables and labelled texts: what is read, and how a faulty row is named."""

import gzip
import json
import lzma

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from mra_hf.data import classification as data
from mra_hf.data.tables import read_table
from mra_hf.data.wikihop import read_wikihop

HEADER = "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
MNLI = HEADER + (
    '0\tHe said "no\tHe spoke.\tentailment\tentailment\n'
    "1\tA cat sleeps.\tA dog barks.\tneutral\tneutral\n"
    "2\tIt rains.\tIt is dry.\tneutral\tcontradiction\n"
    "3\tNobody agreed.\tAll did.\tneutral\t-\n"
)


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_rows_come_with_the_numbers_of_their_lines(tmp_path):
    tsv = list(read_table(write(tmp_path / "dev.tsv", MNLI)))
    assert [number for number, _ in tsv] == [2, 3, 4, 5]
    assert tsv[0][1]["sentence1"] == 'He said "no', "a quote means nothing in MNLI's files"
    rows = [{"text": "a b"}, {"text": "c"}]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    expected = [(1, rows[0]), (3, rows[1])]
    assert list(read_table(write(tmp_path / "a.jsonl", lines))) == expected
    packed = lzma.compress(lines.encode())
    assert list(read_table(write(tmp_path / "a.jsonl.xz", packed))) == expected
    packed = gzip.compress(lines.encode())
    assert list(read_table(write(tmp_path / "a.jsonl.gz", packed))) == expected
    quoted = 'text,label\n"one, two\nthree",1\nfour,0\n'
    rows = list(read_table(write(tmp_path / "a.csv", quoted)))
    assert rows == [
        (3, {"text": "one, two\nthree", "label": "1"}),
        (4, {"text": "four", "label": "0"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', r"a\.jsonl, line 2: not JSON.*cut off"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2: must be a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: not UTF-8"),
        ("a.tsv", HEADER + "0\tone\ttwo\n", r"a\.tsv, line 2: 3 columns where the header has 5"),
        ("a.csv", 'a,b\n1,"open\n', r"a\.csv, line 2"),
        ("a.tsv", HEADER, "holds no rows"),
        ("a.parquet", "", r"must end in \.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50)[:30], "damaged"),
    ],
)
def test_a_faulty_table_is_named_by_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_table(write(tmp_path / name, content)))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.tsv is no file"):
        list(read_table("nowhere.tsv"))


def test_mnli_is_read_as_it_comes(tmp_path):
    part = data.read_files([write(tmp_path / "dev.tsv", MNLI)], data.Columns())
    assert part.texts[1] == ("A cat sleeps.", "A dog barks.")
    assert part.labels == ["entailment", "neutral", "contradiction"], "gold_label, not label1"
    assert part.without_label == 1
    names = data.label_names([part])
    assert names == ("entailment", "neutral", "contradiction")
    rows = data.to_dataset(part, names, "dev")
    assert rows["label"] == [0, 1, 2] and rows["pair"][2] == "It is dry."


def test_labels_keep_the_order_of_their_task():
    def part(labels):
        return data.LabelledTexts([("a",)] * len(labels), labels, [("f", 1)] * len(labels))

    assert data.label_names([part(["NEUTRAL", "CONTRADICTION", "ENTAILMENT"])]) == (
        "ENTAILMENT",
        "NEUTRAL",
        "CONTRADICTION",
    )
    assert data.label_names([part(["Entailment", "entailment", "neutral", "CONTRADICTION"])]) == (
        "entailment",
        "neutral",
        "CONTRADICTION",
    ), "no fourth class for another spelling"
    assert data.label_names([part([10, 2, 1])]) == ("1", "2", "10")
    assert data.label_names([part(["b", "a"])]) == ("a", "b")


def test_an_unknown_label_is_named_by_file_and_line(tmp_path):
    slip = MNLI.replace("dry.\tneutral\tcontradiction", "dry.\tneutral\tcontradicton")
    rows = slip + "5\ta\tb\tneutral\tcontradiction\n"
    part = data.read_files([write(tmp_path / "train.tsv", rows)], data.Columns())
    with pytest.raises(ValueError, match=r"train\.tsv, line 4: label 'contradicton'.*--labels"):
        data.label_names([part])
    with pytest.raises(ValueError, match=r"train\.tsv, line 4: label 'contradicton' is none of"):
        data.to_dataset(part, ("entailment", "neutral", "contradiction"), "train")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": " ", "label": 1}, data.Columns(), r"line 2: column 'text' is empty"),
        ({"text": "b", "label": None}, data.Columns(), r"line 2: column 'label' is empty"),
        ({"text": 3, "label": 1}, data.Columns(), r"line 2: column 'text' is empty or no text"),
        ({"text": "b", "label": 0.5}, data.Columns(), r"line 2: column 'label' must be a class"),
        ({"text": "b", "label": ["a"]}, data.Columns(), r"line 2: column 'label' must be a class"),
        ({"text": "b", "label": 1}, data.Columns(("body",)), "no column for 'body'; it has"),
        ({"text": "b", "label": 1}, data.Columns((), "class"), "no column for 'class'"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path, row, columns, message):
    lines = "".join(json.dumps(some) + "\n" for some in ({"text": "a", "label": 0}, row))
    with pytest.raises(ValueError, match=message):
        data.read_files([write(tmp_path / "a.jsonl", lines)], columns)


def test_sets_are_called_after_their_files():
    assert data.set_name("multinli_1.0_dev_matched.jsonl") == "matched"
    assert data.set_name("mnli/validation_mismatched") == "mismatched"
    assert data.set_name("imdb-test.jsonl.xz") == "imdb_test"
    assert data.set_name("reviews.csv.gz") == "reviews" and data.set_name("test.txt") == "test"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "cut \ud83d", "label": 1}', "half of a surrogate pair"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", "line 2: .*digits"),
    ],
)
def test_what_json_can_spell_and_nothing_can_hold_is_named(tmp_path, line, message):
    file = write(tmp_path / "a.jsonl", '{"text": "a \\ud83d\\ude00", "label": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_table(file))
    question = {"id": "a", "query": "q", "answer": "x", "candidates": ["x"], "supports": ["s"]}
    whole = json.dumps([question, question | {"id": "b"}], indent=0)
    broken = whole.replace('"supports": [\n"s"', '"supports": [\n"\\ud83d"')
    write(tmp_path / "q.json", broken)
    with pytest.raises(ValueError, match=r"line 2: .*surrogate"):
        read_wikihop(tmp_path / "q.json")


def test_a_document_may_be_one_long_cell_and_minus_one_a_class(tmp_path):
    long = "word " * 50_000
    file = write(tmp_path / "long.tsv", f"text\tlabel\n{long}\t-1\nshort\t1\nnone\t-\n")
    part = data.read_files([file], data.Columns())
    assert part.texts[0] == (long,) and part.labels == ["-1", "1"] and part.without_label == 1


def test_damaged_packing_and_deep_nesting_are_named(tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "a", "label": 1}\n' * 500))
    packed[20:40] = bytes(20)
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    deep = write(tmp_path / "deep.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n")
    for file, message in ((tmp_path / "a.jsonl.gz", "is damaged"), (deep, "line 2: .*too deeply")):
        with pytest.raises(ValueError, match=message):
            list(read_table(file))


def test_labels_lose_blanks_and_headers_name_a_column_once(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\na, pos\nb,pos \nc,neg\n")
    assert data.read_files([file], data.Columns()).labels == ["pos", "pos", "neg"]
    file = write(tmp_path / "b.tsv", "text\ttext\tlabel\na\tb\tc\n")
    with pytest.raises(ValueError, match="line 1: two columns have one name"):
        list(read_table(file))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"premise,hypothesis,label\ra,b,entailment\rc,d,neutral\r"),
        ("a.tsv", b"text\tlabel\rone\tpos\rtwo\tneg"),
        ("a.jsonl", b'{"text": "a", "label": 1}\r{"text": "b", "label": 0}\r'),
        ("a.csv.gz", gzip.compress(b"text,label\rone,pos\rtwo,neg\r")),
    ],
)
def test_lines_that_end_in_cr_only_are_named_with_the_remedy(tmp_path, name, content):
    with pytest.raises(ValueError, match=r"lines end in CR only.*tr '\\r' '\\n'") as caught:
        list(read_table(write(tmp_path / name, content)))
    if name.endswith(".gz"):
        assert f"gzip -dc {name} | tr '\\r' '\\n' > NEW" in str(caught.value)
    else:
        assert f"`tr '\\r' '\\n' < {name} > NEW`" in str(caught.value)


def test_a_cr_inside_a_row_is_named_or_read(tmp_path):
    quoted = write(tmp_path / "a.csv", b'a,b\r\n"one\rtwo",2\r\n')
    assert [row["b"] for _, row in read_table(quoted)] == ["2"]
    with pytest.raises(ValueError, match=r"line 2: a carriage return \(CR\) stands inside"):
        list(read_table(write(tmp_path / "b.csv", b"a,b\none\rtwo,2\n")))


FAULTY = (
    {"text": "a", "label": 0},
    {"text": " ", "label": 1},
    {"text": "b", "label": None},
    {"text": "c", "label": 0.5},
    [1],
    {"text": "d", "label": 1},
)


def test_faulty_rows_are_left_out_and_counted_on_request(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in FAULTY) + "{cut off\n"
    file = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError, match="line 2: column 'text' is empty"):
        data.read_files([file], data.Columns())
    part = data.read_files([file], data.Columns(), skip_faulty=True)
    assert part.labels == [0, 1] and [number for _, number in part.origins] == [1, 6]
    assert (part.without_text, part.without_label, part.faulty) == (1, 1, 3)
    line = (
        "Left out: 1 rows with an empty text, 1 rows without a label, 3 rows that cannot be read."
    )
    assert data.left_out({"train": part}) == line
    short = write(tmp_path / "a.tsv", "text\tlabel\na\t0\nb\nc\t1\n")
    part = data.read_files([short], data.Columns(), skip_faulty=True)
    assert part.labels == ["0", "1"] and part.faulty == 1


def labelled(path, labels):
    return write(path, "".join(json.dumps({"text": "a", "label": x}) + "\n" for x in labels))


def test_minus_one_beside_zero_to_n_is_said_and_left_out_on_request(tmp_path):
    for kind in (int, str):
        file = labelled(tmp_path / "snli.jsonl", [kind(x) for x in (0, 1, 2, -1, 0, -1)])
        part = data.read_files([file], data.Columns())
        assert data.label_names([part]) == ("-1", "0", "1", "2")
        note = data.note_minus_one([part], ())
        assert note.startswith("2 rows have the label -1 beside 0 to 2")
        assert "--skip_faulty_rows true" in note
        assert data.note_minus_one([part], ("-1", "0", "1", "2")) is None
        part = data.read_files([file], data.Columns(), skip_faulty=True)
        assert data.label_names([part]) == ("0", "1", "2") and part.without_label == 2
        declared = {"skip_faulty": True, "declared": ("-1", "0", "1", "2")}
        assert len(data.read_files([file], data.Columns(), **declared).labels) == 6


@pytest.mark.parametrize("labels", [(-1, 1), (-1, 0), (0, 1), ("a", "-1"), (-1, 0, 2)])
def test_minus_one_beside_other_labels_is_a_class(labels, tmp_path):
    file = labelled(tmp_path / "a.jsonl", labels)
    part = data.read_files([file], data.Columns(), skip_faulty=True)
    assert part.labels == list(labels) and data.note_minus_one([part], ()) is None


@pytest.mark.parametrize("declares", [False, True])
def test_rows_of_a_named_data_set_without_text_or_label_are_left_out(declares, tmp_path):
    rows = [{"question1": "a", "question2": "b", "label": row % 2} for row in range(6)]
    rows[1]["question2"], rows[2]["question1"], rows[3]["label"] = "", None, -1
    features = None
    if declares:
        features = Features(
            {"question1": Value("string"), "question2": Value("string")}
            | {"label": ClassLabel(names=["no", "yes"])}
        )
    (tmp_path / "qqp").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "qqp" / "train.parquet")
    part = data.read_split(str(tmp_path / "qqp"), None, "train", data.Columns())
    assert part.labels == (["no", "no", "yes"] if declares else [0, 0, 1])
    assert (part.without_text, part.without_label, part.faulty) == (2, 1, 0)
    given = data.read_split(str(tmp_path / "qqp"), None, "train", data.Columns(), ("-1", "0", "1"))
    assert (given.without_label == 0) is not declares, "-1 is a class where --labels says so"


def named(folder, labels):
    """A data set by name whose rows have these labels."""
    folder.mkdir()
    Dataset.from_list([{"text": "a", "label": x} for x in labels]).to_parquet(
        folder / "train.parquet"
    )
    return data.read_split(str(folder), None, "train", data.Columns())


@pytest.mark.parametrize("label", [0.5, 1.0, [1]], ids=repr)
def test_a_label_of_a_named_data_set_that_is_no_class_is_refused(label, tmp_path):
    with pytest.raises(ValueError, match=r"row 0: column 'label' must be a class.*got"):
        named(tmp_path / "scores", [label, label])


def test_labels_of_a_named_data_set_are_read_as_those_of_files(tmp_path):
    part = named(tmp_path / "texts", ["no", " no ", "yes", "", " "])
    assert part.labels == ["no", "no", "yes"] and part.without_label == 2
    part = named(tmp_path / "numbers", ["0", "1", "-1", "1"])
    assert part.labels == ["0", "1", "1"] and part.without_label == 1
    part = named(tmp_path / "signs", ["-1", "1"])
    assert part.labels == ["-1", "1"], "-1 is a class where the others are not 0 to n"
