"""Images as sequences of grey pixels: CIFAR-10, or Fashion-MNIST as a stand-in."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from mra_hf.data.lra.parts import LraData, rows
from mra_hf.data.samples import check_amounts, sample_rows

SIDE = 32
_FASHION_SIDE = 28
_FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_FASHION_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_NAMES = "batches.meta.txt"
#: Weights of red, green and blue in a grey value (ITU-R 601).
_GREY = np.array([0.2989, 0.5870, 0.1140])


def image(
    source: str,
    *,
    seed: int = 0,
    side: int = SIDE,
    mask_zero_pixels: bool = True,
    max_train: int | None = None,
    max_eval: int | None = None,
) -> LraData:
    """Read images of 32 x 32 as rows of 1024 grey values.

    Args:
        source: a folder with CIFAR-10's binary files (data_batch_1.bin ...), with folders
            train/CLASS/*.png and test/CLASS/*.png (or .jpg; needs Pillow), or with Fashion-MNIST's
            idx files (also .gz), which are padded from 28 to 32.
        seed: of the rows that `max_train` and `max_eval` draw.
        side: 32, or 16 for means over 2 x 2 pixels: 256 tokens, where time is short.
        mask_zero_pixels: as published, value v is id v, so black pixels are taken for padding and
            never attended. False: value v is id v + 1, and all pixels are attended.
        max_train, max_eval: draw so many rows; None: all.

    Raises:
        ValueError: no such files, or damaged ones.
    """
    check_amounts(seed=seed, max_train=max_train, max_eval=max_eval)
    if side not in (SIDE // 2, SIDE):
        raise ValueError(f"side must be {SIDE} or {SIDE // 2}, got {side!r}.")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"source must be a folder of images, and {source} is none.")
    if _find(folder, _FASHION[0]) is not None:
        read, labels, name = _fashion_mnist(folder), _CLOTHES, "Fashion-MNIST, a stand-in"
    elif (folder / _CIFAR_TRAIN[0]).is_file():
        (read, labels), name = _cifar_binary(folder), "CIFAR-10"
    elif (folder / "train").is_dir() and (folder / "test").is_dir():
        (read, labels), name = _class_folders(folder), folder.name
    elif (folder / "data_batch_1").is_file():
        raise ValueError(
            f"{source} holds CIFAR-10 as Python pickles, which may run code and are not read; "
            "take its binary version (cifar-10-binary.tar.gz)."
        )
    else:
        raise ValueError(
            f"{source} holds none of CIFAR-10's data_batch_1.bin, "
            f"train/ and test/ with folders of images, and Fashion-MNIST's {_FASHION[0]}."
        )
    (pixels, classes), (test_pixels, test_classes) = (
        (_of_side(images, side), labels) for images, labels in read
    )
    first_dev = round(0.9 * len(pixels))  # as published: the first 90 % are train
    parts = {
        "train": (pixels[:first_dev], classes[:first_dev], max_train),
        "dev": (pixels[first_dev:], classes[first_dev:], max_eval),
        "test": (test_pixels, test_classes, max_eval),
    }
    offset = 0 if mask_zero_pixels else 1
    made = {}
    for part, (x, y, limit) in parts.items():
        sample = sample_rows(len(x), limit, seed)
        ids = x[sample].reshape(len(sample), side**2).astype(np.int16) + offset
        made[part] = rows(list(ids), y[sample].tolist(), len(labels), f"{source} ({part})")
    return LraData(
        **made,
        vocab_size=256 + offset,
        max_length=side**2,
        labels=tuple(labels),
        split=f"{name}; train: the first 90 % of the training files, dev: the rest, "
        "test: the test files",
        masks_zero=mask_zero_pixels,
        grid=(side, side),
    )


def _of_side(pixels: np.ndarray, side: int) -> np.ndarray:
    """`[n, 32, 32]` -> `[n, side, side]`, means over squares."""
    if side == SIDE:
        return pixels
    squares = pixels.reshape(len(pixels), side, SIDE // side, side, SIDE // side)
    return squares.mean((2, 4)).round().astype(np.uint8)


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _fashion_mnist(folder: Path):
    parts = []
    edge = (SIDE - _FASHION_SIDE) // 2
    for images, labels in (_FASHION, _FASHION_TEST):
        x, y = (_read_idx(folder, name) for name in (images, labels))
        if x.shape[1:] != (_FASHION_SIDE, _FASHION_SIDE) or y.shape != x.shape[:1]:
            raise ValueError(
                f"{folder}: {images} must hold images of {_FASHION_SIDE} x {_FASHION_SIDE} "
                f"and {labels} a label for each, got shapes {x.shape} and {y.shape}."
            )
        parts.append((np.pad(x, ((0, 0), (edge, edge), (edge, edge))), y))
    return parts


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of bytes in the format of MNIST: a magic number, the sizes, the values."""
    path = _find(folder, name)
    if path is None:
        raise ValueError(f"{folder} lacks {name} (or {name}.gz).")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if zeros or kind != 8:
            raise ValueError("not an array of bytes")
        return values.reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise ValueError(f"{path} is no whole idx file ({error}); fetch it again.") from error


def _cifar_binary(folder: Path):
    def read(names: tuple[str, ...]):
        batches = []
        for name in names:
            path = folder / name
            if not path.is_file() or not path.stat().st_size or path.stat().st_size % 3073:
                raise ValueError(f"{path} is missing or cut off; fetch CIFAR-10 again.")
            batches.append(np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073))
        all_rows = np.concatenate(batches)
        colours = all_rows[:, 1:].reshape(-1, 3, SIDE, SIDE)
        return np.einsum("bchw,c->bhw", colours, _GREY).astype(np.uint8), all_rows[:, 0]

    names = folder / _CIFAR_NAMES
    labels = names.read_text().split() if names.is_file() else list(map(str, range(10)))
    return (read(_CIFAR_TRAIN), read(("test_batch.bin",))), labels


def _class_folders(folder: Path):
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("folders of pictures are read by Pillow: pip install pillow.") from error
    labels = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if sorted(path.name for path in (folder / "test").iterdir() if path.is_dir()) != labels:
        raise ValueError(f"{folder}/train and {folder}/test must have the same folders of classes.")
    if len(labels) < 2:
        raise ValueError(f"{folder}/train must have a folder for each class, got {labels}.")

    def read(part: str):
        files = [
            (path, number)
            for number, label in enumerate(labels)
            for path in sorted((folder / part / label).iterdir())
            if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        ]
        empty = set(range(len(labels))) - {number for _, number in files}
        if empty:
            names = [labels[number] for number in sorted(empty)]
            raise ValueError(f"{folder / part} has no .png or .jpg files in {names}.")
        # The files come class by class; train and dev both need all of them.
        files = [files[at] for at in np.random.default_rng(0).permutation(len(files))]
        pixels = np.empty((len(files), SIDE, SIDE), np.uint8)
        for row, (path, _) in enumerate(files):
            try:
                with Image.open(path) as picture:
                    colours = np.asarray(picture.convert("RGB"))
            except OSError as error:
                raise ValueError(f"{path} is no picture: {error}.") from error
            if colours.shape != (SIDE, SIDE, 3):
                raise ValueError(f"{path} must be of 32 x 32 pixels, got {colours.shape[:2]}.")
            pixels[row] = colours @ _GREY
        return pixels, np.array([number for _, number in files])

    return (read("train"), read("test")), labels
