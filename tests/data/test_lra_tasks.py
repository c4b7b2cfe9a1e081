"""The tasks of the Long Range Arena: the rules of those that are made, the files of the others."""

import gzip
import json
import lzma
import struct

import numpy as np
import pytest

from mra_hf.data.lra import TASKS
from mra_hf.data.lra import pathfinder as drawing
from mra_hf.data.lra.images import image
from mra_hf.data.lra.listops import OPERATORS, SYMBOLS, listops, root_operators
from mra_hf.data.lra.pathfinder import SIDE, draw_image, pathfinder
from mra_hf.data.lra.retrieval import retrieval
from mra_hf.data.lra.texts import text
from mra_hf.training.lra import load_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What is generated goes to a cache of this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


SMALL_TREES = {"min_length": 20, "max_length": 120, "train": 400, "dev": 60, "test": 60}


def value_of(ids):
    """An evaluator of its own: a stack of open operators."""
    stack = [[]]
    for symbol in (SYMBOLS[i - 1] for i in ids):
        if symbol == "]":
            name, *values = stack.pop()
            values.sort()
            middle = len(values) // 2
            even = len(values) % 2 == 0
            result = {
                "MIN": values[0],
                "MAX": values[-1],
                "MED": (values[middle - even] + values[middle]) // 2,
                "SM": sum(values) % 10,
            }[name]
            stack[-1].append(result)
        elif symbol.startswith("["):
            stack.append([symbol[1:]])
        else:
            stack[-1].append(int(symbol))
    ((result,),) = stack
    return result


def depth_and_arguments(ids):
    depth, deepest, counts, open_counts = 1, 1, [], [0]
    for symbol in (SYMBOLS[i - 1] for i in ids):
        if symbol == "]":
            counts.append(open_counts.pop())
            depth -= 1
            continue
        open_counts[-1] += 1
        deepest = max(deepest, depth)
        if symbol.startswith("["):
            open_counts.append(0)
            depth += 1
    return deepest, counts


def test_trees_have_the_value_and_the_form_that_the_rules_say():
    data = listops(**SMALL_TREES, max_depth=5, max_arguments=6)
    for part in (data.train, data.dev, data.test):
        for row in part:
            ids = row["input_ids"]
            assert row["label"] == value_of(ids)
            assert 20 < len(ids) < 120 and min(ids) >= 1 and max(ids) <= 15
            deepest, counts = depth_and_arguments(ids)
            assert deepest <= 5 and min(counts) >= 2 and max(counts) <= 6
    assert (len(data.train), len(data.dev), len(data.test)) == (400, 60, 60)
    everything = [
        tuple(row) for part in (data.train, data.dev, data.test) for row in part["input_ids"]
    ]
    assert len(set(everything)) == 520
    roots = root_operators(data.train)
    assert set(roots) == {11, 12, 13, 14}


def test_trees_of_full_size_are_those_of_the_arena():
    data = listops(train=700, dev=50, test=50)
    lengths = np.array([len(ids) for ids in data.train["input_ids"]])
    assert lengths.min() > 500 and lengths.max() < 2000
    assert 1000 < lengths.mean() < 1130  # measured on 96,000: 1064
    labels = np.bincount(data.train["label"], minlength=10) / 700
    assert labels[[0, 9]].sum() > 0.25, "minima and maxima are the commonest"


@pytest.mark.slow
def test_trees_follow_from_the_seed_alone(tmp_path, monkeypatch):
    one = listops(**SMALL_TREES)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another cache")
    two = listops(**SMALL_TREES, num_proc=2)
    other = listops(**SMALL_TREES, seed=1)
    assert one.train["input_ids"] == two.train["input_ids"]
    assert one.test["label"] == two.test["label"]
    assert one.train["input_ids"] != other.train["input_ids"]


def test_operators():
    values = [3, 9, 4, 8]
    assert [OPERATORS[name](values) for name in ("MIN", "MAX", "MED", "SM")] == [3, 9, 6, 4]
    assert OPERATORS["MED"]([1, 2]) == 1, "truncated"


def components(lit):
    """Connected parts of a set of pixels that touch by side or corner."""
    left, found = set(zip(*np.nonzero(lit), strict=True)), []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            around = {(row + r, column + c) for r in (-1, 0, 1) for c in (-1, 0, 1)} & left
            left -= around
            edge += around
        found.append(part)
    return found


def test_images_have_two_discs_and_dashes():
    draw = np.random.default_rng(0)
    images, labels = zip(*(draw_image(draw, paddles=6) for _ in range(60)), strict=True)
    assert 15 < sum(labels) < 45
    for image_ in images:
        assert image_.shape == (SIDE, SIDE) and image_.dtype == np.uint8
        assert image_.min() == 0 and image_.max() == 255
        assert 0.6 < (image_ == 0).mean() < 0.95
        # A disc is the only place where 3 x 3 pixels are lit and bright.
        bright = image_.astype(float)
        full = sum(np.roll(bright, (r, c), (0, 1)) for r, c in ((0, 1), (0, -1), (1, 0), (-1, 0)))
        assert (full + bright > 0.8 * 5 * 170).sum() >= 1
        assert len(components(image_ > 0)) > 3


def test_discs_lie_on_the_ends_that_the_label_says(monkeypatch):
    seen, discs = [], []
    original, disc = drawing._two_contours, drawing._disc
    monkeypatch.setattr(
        drawing, "_two_contours", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    monkeypatch.setattr(drawing, "_disc", lambda tip: discs.append(tip) or disc(tip))
    draw = np.random.default_rng(1)
    for _ in range(20):
        discs.clear()
        _, label = draw_image(draw, paddles=6)
        contours = seen[-1][1]
        start = next(n for n, c in enumerate(contours) if c.start is discs[0])
        end = next(n for n, c in enumerate(contours) if c.end is discs[1])
        assert label == (start == end)
        assert np.hypot(*(contours[0].start - contours[1].start)) == pytest.approx(7, abs=1)


@pytest.fixture
def counted(monkeypatch):
    """What is drawn: (intensity, where, pixels) of each paddle, in the order of drawing."""
    drawn = []
    add, two_contours = drawing._Canvas.add, drawing._two_contours

    def record(self, place, paddle, intensity):
        drawn.append((intensity, place, paddle.copy()))
        return add(self, place, paddle, intensity)

    def fresh(*args):
        drawn.clear()  # forget what a dead end drew
        return two_contours(*args)

    monkeypatch.setattr(drawing._Canvas, "add", record)
    monkeypatch.setattr(drawing, "_two_contours", fresh)
    return drawn


@pytest.mark.parametrize("paddles", [6, 9, 14])
def test_contours_have_their_paddles_and_distractors_theirs(counted, paddles):
    draw = np.random.default_rng(3)
    distractors = []
    for _ in range(8):
        draw_image(draw, paddles=paddles)
        contours = [entry for entry in counted if entry[0] == 1.5]
        assert len(contours) == 2 * paddles
        distractors.append(len(counted) - len(contours))
        # Two paddles that are not neighbours on one contour do not lie on one another.
        canvases = []
        for _, place, paddle in contours:
            canvas = np.zeros((SIDE, SIDE))
            canvas[place] = paddle
            canvases.append(canvas > 0.3)
        for one in range(len(canvases)):
            for other in range(one + 3, len(canvases)):
                assert not (canvases[one] & canvases[other]).any()
    assert max(distractors) >= 5 * (paddles // 3), "five that all find a place, and attempts"


def test_pathfinder_is_the_same_from_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("mra_hf.data.lra.pathfinder._SHARD", 8)
    one = pathfinder(count=20, paddles=6)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another cache")
    two = pathfinder(count=20, paddles=6, num_proc=2)
    assert one.train["input_ids"] == two.train["input_ids"]


@pytest.mark.slow
def test_pathfinder_follows_from_the_seed_alone():
    one = pathfinder(count=20, paddles=6)
    again = pathfinder(count=20, paddles=6, mask_zero_pixels=False)
    assert (len(one.train), len(one.dev), len(one.test)) == (16, 2, 2)
    clean = (np.array(again.train["input_ids"]) - 1).tolist()
    assert one.train["input_ids"] == clean and one.train["label"] == again.train["label"]
    assert one.masks_zero and not again.masks_zero and one.grid == (32, 32)


def write_idx(path, values):
    values = np.asarray(values, np.uint8)
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 10)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def test_fashion_mnist_is_padded_to_32(fashion):
    data = image(str(fashion))
    assert (len(data.train), len(data.dev), len(data.test)) == (36, 4, 10)
    first = np.array(data.train[0]["input_ids"]).reshape(32, 32)
    assert (first[:2] == 0).all() and (first[:, -2:] == 0).all() and first[2:30, 2:30].any()
    assert data.train["label"][:3] == [0, 1, 2] and data.labels[9] == "ankle boot"
    clean = image(str(fashion), mask_zero_pixels=False)
    assert clean.train[0]["input_ids"] == (first.ravel() + 1).tolist()
    assert clean.vocab_size == 257 and not clean.masks_zero
    small = image(str(fashion), side=16, max_train=7, max_eval=3)
    assert (len(small.train), len(small.dev), small.grid) == (7, 3, (16, 16))
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.arange(10) + 3)
    with pytest.raises(ValueError, match=r"\(test\) has labels from 3 to 12, and there are 10"):
        image(str(fashion))
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.arange(10))
    write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((40, 27, 27)))
    with pytest.raises(ValueError, match="must hold images of 28 x 28"):
        image(str(fashion))
    write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((40, 28, 28)))
    cut = (fashion / "t10k-images-idx3-ubyte.gz").read_bytes()[:-200]
    (fashion / "t10k-images-idx3-ubyte.gz").write_bytes(cut)
    with pytest.raises(ValueError, match=r"t10k-images.* is no whole idx file"):
        image(str(fashion))


def test_cifar_is_read_in_grey(tmp_path):
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        rows = draw.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(4)
        (tmp_path / name).write_bytes(rows.tobytes())
    data = image(str(tmp_path))
    assert (len(data.train), len(data.dev), len(data.test)) == (18, 2, 4)
    raw = np.frombuffer((tmp_path / "data_batch_1.bin").read_bytes(), np.uint8)[1:3073]
    red, green, blue = raw.reshape(3, 1024).astype(float)
    grey = np.floor(0.2989 * red + 0.5870 * green + 0.1140 * blue)
    assert np.abs(np.array(data.train[0]["input_ids"]) - grey).max() <= 1
    for content in (b"12345", b""):
        (tmp_path / "data_batch_3.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"data_batch_3\.bin is missing or cut off"):
            image(str(tmp_path))
    (tmp_path / "data_batch_1.bin").rename(tmp_path / "data_batch_1")
    with pytest.raises(ValueError, match="pickles, which may run code"):
        image(str(tmp_path))


def test_folders_of_pictures(tmp_path):
    picture = pytest.importorskip("PIL.Image")
    for part, count in (("train", 10), ("test", 2)):
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / part / label).mkdir(parents=True)
            for place in range(count):
                colour = (100 * number, 10, place)
                picture.new("RGB", (32, 32), colour).save(tmp_path / part / label / f"{place}.png")
    data = image(str(tmp_path))
    assert data.labels == ("cat", "dog") and (len(data.train), len(data.test)) == (18, 4)
    for row in data.train:
        assert (row["input_ids"][0] > 20) == row["label"]
    picture.new("RGB", (30, 32)).save(tmp_path / "test" / "dog" / "9.png")
    with pytest.raises(ValueError, match=r"9\.png must be of 32 x 32 pixels"):
        image(str(tmp_path))


@pytest.fixture
def reviews(tmp_path):
    folder = tmp_path / "reviews"
    for part, count in (("train", 30), ("test", 8)):
        for label in ("pos", "neg"):
            (folder / part / label).mkdir(parents=True)
            for place in range(count // 2):
                words = f"{label} film {place} \u00e9".encode()
                (folder / part / label / f"{place}.txt").write_bytes(words)
    return folder


def test_reviews_are_bytes(reviews):
    data = text(str(reviews), max_bytes=12)
    assert (len(data.train), len(data.dev), len(data.test)) == (30, 8, 8)
    assert data.dev["input_ids"] == data.test["input_ids"] and "dev IS the test set" in data.split
    row = data.train[0]
    assert bytes(i - 1 for i in row["input_ids"]) == b"neg film 0 \xc3" and row["label"] == 0
    clean = text(str(reviews), test_as_dev=False)
    assert (len(clean.train), len(clean.dev), len(clean.test)) == (26, 4, 8)
    for path in (reviews / "train" / "pos").iterdir():
        path.rename(path.with_suffix(".bak"))
    with pytest.raises(ValueError, match=r"train must hold texts of both classes, got 15 of one"):
        text(str(reviews))
    seen = {tuple(row) for row in clean.train["input_ids"]}
    assert not seen & {tuple(row) for row in clean.dev["input_ids"]}


def test_reviews_in_lines(tmp_path):
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(20)]
    for part in ("train", "test"):
        with lzma.open(tmp_path / f"imdb-{part}.jsonl.xz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)))
    assert len(text(str(tmp_path)).train) == 20
    rows[3]["label"] = 2
    with lzma.open(tmp_path / "imdb-train.jsonl.xz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"imdb-train\.jsonl\.xz, line 4"):
        text(str(tmp_path))
    (tmp_path / "imdb-train.jsonl.xz").unlink()
    with pytest.raises(ValueError, match="must hold train/pos and train/neg, or one file"):
        text(str(tmp_path))


def test_mails_lose_their_headers_and_their_copies(tmp_path):
    for name in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for place in range(6):
            mail = f"From: {name}@example.org\nSubject: x\n\nbody {place} of {name[:4]}\n"
            (tmp_path / "data" / name / f"{place}.txt").write_text(mail)
    data = text(str(tmp_path))
    rows = [row for part in (data.train, data.dev, data.test) for row in part]
    bodies = [bytes(i - 1 for i in row["input_ids"]) for row in rows]
    assert len(bodies) == len(set(bodies)) == 18
    assert all(body.startswith(b"body") for body in bodies)
    assert {row["label"] for row in rows} == {0, 1}


def test_passages_of_works(tmp_path):
    with (tmp_path / "books.jsonl").open("w") as file:
        for work in range(30):
            words = "".join(f"{work:02d}-{place:03d} " for place in range(60))
            file.write(json.dumps({"text": words}) + "\n")
    data = retrieval(str(tmp_path), max_bytes=70, train=60, dev=10, test=10)
    works = {}
    for part in ("train", "dev", "test"):
        for row in getattr(data, part):
            sides = [
                bytes(i - 1 for i in row[name]).decode() for name in ("input_ids", "input_ids_2")
            ]
            numbers = [{w.split("-")[0][-2:] for w in side.split()[1:-1]} for side in sides]
            assert all(len(found) == 1 for found in numbers)
            assert (numbers[0] == numbers[1]) == row["label"]
            assert sides[0] != sides[1]
            works.setdefault(part, set()).update(*numbers)
    assert not works["train"] & works["test"] and not works["train"] & works["dev"]
    assert data.two_tower
    with pytest.raises(ValueError, match="20 texts or more of 8000 bytes, got 0"):
        retrieval(str(tmp_path))


def test_citations(tmp_path):
    for name, count in (("train", 6), ("eval", 2), ("test", 2)):
        lines = [f'{n % 2}.0\tid{n}\tid{n + 1}\tfirst "{n}\tsecond {n}\n' for n in range(count)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    data = retrieval(str(tmp_path))
    assert (len(data.train), len(data.dev), len(data.test)) == (6, 2, 2)
    row = data.train[1]
    assert bytes(i - 1 for i in row["input_ids"]) == b'first "1' and row["label"] == 1
    (tmp_path / "new_aan_pairs.eval.tsv").write_text("1.0\tonly\tthree\n")
    with pytest.raises(ValueError, match=r"new_aan_pairs\.eval\.tsv, line 1: must be label"):
        retrieval(str(tmp_path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_task("text", None, None), "task text needs a folder of its data"),
        (lambda: load_task("listops", "x", None), "task listops needs no source"),
        (lambda: load_task("listops", None, "trees=3"), "task listops has no 'trees'"),
        (lambda: load_task("listops", None, "train=many"), "train must be of type int"),
        (lambda: load_task("listops", None, "train"), "task_settings must be name=value"),
        (lambda: load_task("image", "/no/such", None), "source must be a folder of images"),
        (lambda: listops(train=0), "train must be an integer of at least 1"),
        (lambda: listops(max_length=3, min_length=2), "max_length must be"),
        (
            lambda: listops(train=2000, min_length=1, max_length=5, max_arguments=2, max_depth=2),
            "that were drawn only .* differ",
        ),
        (lambda: listops(seed=-1), "seed must be an integer of at least 0"),
        (lambda: pathfinder(num_proc=0), "num_proc must be an integer of at least 1"),
        (lambda: TASKS["image"]("/", max_train=-5), "max_train must be an integer of at least 1"),
        (lambda: TASKS["text"]("/", max_bytes=0), "max_bytes must be an integer of at least 1"),
        (lambda: TASKS["retrieval"]("/", dev=0), "dev must be an integer of at least 1"),
        (lambda: load_task("text", "/", "max_train=1.5"), "max_train must be of type int"),
        (lambda: load_task("image", "/", "max_eval=true"), "max_eval must be of type int"),
        (lambda: pathfinder(count=3), "count must be an integer of at least 10"),
        (lambda: pathfinder(paddles=40), "paddles must be at most 16"),
        (lambda: TASKS["image"]("/", side=8), "side must be 32 or 16"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
