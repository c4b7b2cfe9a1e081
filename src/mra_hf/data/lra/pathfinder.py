"""Pathfinder: are the two discs ends of one dashed contour? Drawn here, 32 x 32 grey pixels.

The rules are those of the Long Range Arena's images (Linsley et al. 2018): two dashed contours grow
from starts 7 pixels apart, paddle by paddle; five short contours distract; a disc lies on the start
of one contour, and another on its end or on the end of the other contour. Thin lines are drawn at
twice the size and reduced with Lanczos's filter. Two things differ: points are not rounded to whole
pixels, and a paddle also keeps clear of the last paddle of the other contour, so that contours do
not cross there. About 70 % of the pixels are black; in the published images it is 66 %.

Coordinates are (row, column); the direction of an angle t is (sin t, cos t).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mra_attention.checks import check_int
from mra_hf.data.lra.parts import LraData, generated
from mra_hf.data.samples import check_amounts, split_rows

SIDE = 32
LABELS = ("apart", "connected")

_LENGTH = 2.0  # of a paddle; all lengths are in pixels
_THICKNESS = 0.5
_GAP = 1.0
_BORDER = 1
_START_DISTANCE = 7
_RADIUS = 1.5
_CONTINUITY = 1.0
_TRIES = 3  # to place a paddle
_DISTRACTORS = 5
_DISTRACTOR_TRIES = 5
_LEAST_FREE = 0.01
_OVERLAP = 1.8  # of two soft masks
_CONTOUR_INTENSITY = 1.5  # a thin line covers half a pixel
_DISTRACTOR_INTENSITY = 2.0
#: Half the window of pixels that a paddle may cover.
_WINDOW = 5
#: Points per pixel, in each direction, at which coverage is sampled.
_POINTS = 4
_LANCZOS = 3
#: Fainter values become 0, as in a drawing of 8 bits.
_FAINTEST = 0.01
#: Images that one generator draws; each shard is seeded by itself.
_SHARD = 250
#: Raise it when the same seed gives other images: the cache then forgets the old ones.
_VERSION = 2

_OFFSETS = (np.arange(_POINTS) + 0.5) / _POINTS - 0.5


def _square(low: int, high: int) -> np.ndarray:
    """Offsets (row, column) from `low` to `high`, `[n, 2]`."""
    return np.stack(np.meshgrid(*[np.arange(low, high + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)


_NEIGHBOURS = _square(-1, 1)
_AROUND_CIRCLE = _square(-math.ceil(_LENGTH + _GAP), math.ceil(_LENGTH + _GAP) + 1)


def pathfinder(
    *,
    seed: int = 0,
    count: int = 200_000,
    paddles: int = 14,
    mask_zero_pixels: bool = True,
    num_proc: int | None = None,
) -> LraData:
    """Draw the task; later calls read it from the cache of datasets.

    Args:
        seed: of all draws; the images do not depend on `num_proc`.
        count: images; 80 % are train, 10 % dev, 10 % test, at random.
        paddles: of a contour: 14 is the hard set of the papers, 9 the intermediate, 6 the easy set.
        mask_zero_pixels: as published, value v is id v, so black pixels, most of an image, are
            taken for padding and never attended. False: value v is id v + 1, and all pixels are
            attended.
        num_proc: processes that draw.

    Raises:
        ValueError: a number out of range.
    """
    check_amounts(seed=seed, num_proc=num_proc)
    check_int("count", count, 10)
    check_int("paddles", paddles, 3, 16)
    shards = -(-count // _SHARD)
    offset = 0 if mask_zero_pixels else 1
    drawing = {"seed": seed, "paddles": paddles, "offset": offset, "version": _VERSION}
    images = generated(_shards, shards, num_proc, **drawing)
    parts = {
        name: images.select(rows) for name, rows in split_rows(count, (0.1, 0.1), seed).items()
    }
    return LraData(
        **parts,
        vocab_size=256 + offset,
        max_length=SIDE**2,
        labels=LABELS,
        split=f"drawn here by seed {seed}: {count} images of contours of {paddles} paddles, "
        "80, 10 and 10 %",
        masks_zero=mask_zero_pixels,
        grid=(SIDE, SIDE),
    )


def _shards(
    shards: list[int], seed: int, paddles: int, offset: int, version: int
) -> Iterator[dict]:
    """Rows of some shards; the cache reads `version`."""
    for shard in shards:
        draw = np.random.default_rng((seed, shard))
        for _ in range(_SHARD):
            image, label = draw_image(draw, paddles)
            yield {"input_ids": image.astype(np.int16).ravel() + offset, "label": label}


def draw_image(draw: np.random.Generator, paddles: int = 14) -> tuple[np.ndarray, int]:
    """One image, `[32, 32]` uint8, and its label: 1 if the discs are ends of one contour."""
    pair = None
    while pair is None:  # until no contour ends in a dead end
        pair = _two_contours(draw, paddles)
    canvas, contours = pair
    for _ in range(_DISTRACTORS):
        _add_distractor(canvas, draw, paddles // 3)
    label = int(draw.integers(2))
    first = int(draw.integers(2))
    second = first if label else 1 - first
    image = canvas.image
    for tip in (contours[first].start, contours[second].end):
        np.maximum(image, _disc(tip), out=image)
    low, high = image.min(), image.max()
    return np.round(255 * (image - low) / (high - low)).astype(np.uint8), label


_Window = tuple[slice, slice]


class _Mask(NamedTuple):
    """A soft mask: its values in a window of the image, 0 elsewhere."""

    window: _Window
    values: np.ndarray


@dataclass
class _Canvas:
    """The image, and where nothing more may be drawn; both keep the larger of two values."""

    image: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE)))
    occupied: np.ndarray = field(default_factory=lambda: _frame())

    def add(self, window: _Window, paddle: np.ndarray, intensity: float) -> None:
        region = self.image[window]
        np.maximum(region, intensity * paddle, out=region)

    def occupy(self, mask: _Mask) -> None:
        region = self.occupied[mask.window]
        np.maximum(region, mask.values, out=region)


@dataclass
class _Contour:
    """A contour that grows.

    Attributes:
        pivot: the point before the last paddle, around which it was turned.
        angle: direction of the last paddle.
        start, end: the tips.
        pending: mask of the last paddle, which the next paddle may touch.
    """

    pivot: np.ndarray
    angle: float
    start: np.ndarray
    end: np.ndarray
    pending: _Mask


def _frame() -> np.ndarray:
    frame = np.ones((SIDE, SIDE))
    frame[_BORDER:-_BORDER, _BORDER:-_BORDER] = 0
    return frame


def _two_contours(
    draw: np.random.Generator, paddles: int
) -> tuple[_Canvas, tuple[_Contour, _Contour]] | None:
    """Both contours on an empty canvas; None at a dead end."""
    canvas = _Canvas()
    low, high = 2 * _START_DISTANCE, SIDE - 2 * _START_DISTANCE
    first = _begin(canvas, draw, draw.integers(low, high, 2), _CONTOUR_INTENSITY)
    if first is None:
        return None
    away = _START_DISTANCE * _direction(2 * math.pi * draw.random())
    second = _begin(canvas, draw, np.round(first.start + away), _CONTOUR_INTENSITY, first.pending)
    if second is None:
        return None
    contours = (first, second)
    for _ in range(paddles - 1):
        for growing, other in (contours, contours[::-1]):
            if not _grow(canvas, growing, draw, _CONTOUR_INTENSITY, other.pending):
                return None
    for contour in contours:
        canvas.occupy(contour.pending)
    return canvas, contours


def _add_distractor(canvas: _Canvas, draw: np.random.Generator, paddles: int) -> None:
    """Add another contour, or nothing after some attempts."""
    for _ in range(_DISTRACTOR_TRIES):
        free = np.argwhere(canvas.occupied < 0.1)
        if len(free) < _LEAST_FREE * SIDE**2:
            return
        attempt = _Canvas(canvas.image.copy(), canvas.occupied.copy())
        start = free[draw.integers(len(free))]
        contour = _begin(attempt, draw, start, _DISTRACTOR_INTENSITY)
        if contour is None:
            continue
        if all(_grow(attempt, contour, draw, _DISTRACTOR_INTENSITY) for _ in range(paddles - 1)):
            attempt.occupy(contour.pending)
            canvas.image, canvas.occupied = attempt.image, attempt.occupied
            return


def _begin(
    canvas: _Canvas, draw, tail: np.ndarray, intensity: float, near: _Mask | None = None
) -> _Contour | None:
    """Draw the first paddle from `tail`, in any direction; None where it does not fit."""
    angle = math.radians(int(draw.integers(360)))
    direction = _direction(angle)
    head = tail + _LENGTH * direction
    pivot = head - (_LENGTH + _GAP) * direction
    if not all(_inside(point) for point in (tail, head, pivot)):
        return None
    paddle, mask = _paddle(head, direction)
    if _overlaps(canvas.occupied, mask, near):
        return None
    canvas.add(mask.window, paddle, intensity)
    return _Contour(pivot, angle, np.asarray(tail, float), head, mask)


def _grow(
    canvas: _Canvas, contour: _Contour, draw, intensity: float, near: _Mask | None = None
) -> bool:
    """Draw one more paddle; False at a dead end."""
    pivot = contour.pivot + (_LENGTH + 2 * _GAP) * _direction(contour.angle)
    ends, angles = _circle(pivot)
    if not len(ends):
        return False
    around = ends[:, None] + _NEIGHBOURS
    blocked = canvas.occupied[around[..., 0], around[..., 1]].max(-1)
    turns = np.abs((angles - contour.angle + math.pi) % (2 * math.pi) - math.pi)
    smooth = np.cos(np.minimum(_CONTINUITY * turns, math.pi / 2)) ** 2
    weights = np.clip(1 - blocked, 0, 1) * smooth
    total = weights.sum()
    if total < 1e-6:
        return False
    for _ in range(_TRIES):
        drawn = int(np.searchsorted(weights.cumsum(), total * draw.random(), side="right"))
        drawn = min(drawn, len(ends) - 1)
        end, angle = ends[drawn], angles[drawn]
        paddle, mask = _paddle(end, _direction(angle))
        if not _overlaps(canvas.occupied, mask, near):
            canvas.add(mask.window, paddle, intensity)
            canvas.occupy(contour.pending)
            contour.pivot, contour.angle = pivot, float(angle)
            contour.end, contour.pending = end.astype(float), mask
            return True
    return False


def _circle(pivot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels on the circle around `pivot` where a paddle may end, and their directions from it."""
    radius = _LENGTH + _GAP
    grid = np.floor(pivot).astype(int) + _AROUND_CIRCLE
    away = grid - pivot
    on = np.abs(np.hypot(away[:, 0], away[:, 1]) - radius) <= 0.5
    on &= ((grid >= _BORDER) & (grid < SIDE - _BORDER)).all(1)
    return grid[on], np.arctan2(away[on, 0], away[on, 1])


def _paddle(head: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, _Mask]:
    """The pixels of a paddle, and its mask, a pixel wider on all sides, in the same window."""
    middle = head - _LENGTH / 2 * direction
    low = np.maximum(np.round(middle).astype(int) - _WINDOW, 0)
    high = np.minimum(np.round(middle).astype(int) + _WINDOW + 1, SIDE)
    rows, columns = (
        (np.arange(a, b)[:, None] + _OFFSETS).ravel() - at
        for a, b, at in zip(low, high, middle, strict=True)
    )
    along = np.abs(rows[:, None] * direction[0] + columns * direction[1])
    across = np.abs(rows[:, None] * direction[1] - columns * direction[0])

    def covered(margin: float) -> np.ndarray:
        """The share of each half pixel that lies inside."""
        inside = (along <= _LENGTH / 2 + margin) & (across <= _THICKNESS / 2 + margin)
        halves = inside.reshape(2 * (high[0] - low[0]), 2, 2 * (high[1] - low[1]), 2)
        return halves.mean((1, 3))

    rows_of, columns_of = (_reduction(int(b - a)) for a, b in zip(low, high, strict=True))
    paddle = np.clip(rows_of @ covered(0) @ columns_of.T, 0, 1)
    paddle[paddle < _FAINTEST] = 0
    mask = covered(_GAP).reshape(high[0] - low[0], 2, high[1] - low[1], 2).mean((1, 3))
    return paddle, _Mask((slice(low[0], high[0]), slice(low[1], high[1])), mask)


@functools.cache
def _reduction(size: int) -> np.ndarray:
    """Lanczos's weights that halve the number of values, `[size, 2 * size]`."""
    apart = np.arange(size)[:, None] + 0.5 - (np.arange(2 * size) + 0.5) / 2
    weights = np.sinc(apart) * np.sinc(apart / _LANCZOS) * (np.abs(apart) < _LANCZOS)
    return weights / weights.sum(1, keepdims=True)


def _overlaps(occupied: np.ndarray, mask: _Mask, near: _Mask | None) -> bool:
    """Whether `mask` covers what is occupied, or `near`."""
    if (occupied[mask.window] + mask.values).max() >= _OVERLAP:
        return True
    if near is None:
        return False
    other = np.zeros((SIDE, SIDE))
    other[near.window] = near.values
    return bool((other[mask.window] + mask.values).max() >= _OVERLAP)


def _disc(centre: np.ndarray) -> np.ndarray:
    rows, columns = ((np.arange(SIDE)[:, None] + _OFFSETS).ravel() - at for at in centre)
    inside = np.hypot(rows[:, None], columns) <= _RADIUS
    return inside.reshape(SIDE, _POINTS, SIDE, _POINTS).mean((1, 3))


def _direction(angle: float) -> np.ndarray:
    return np.array([math.sin(angle), math.cos(angle)])


def _inside(point: np.ndarray) -> bool:
    return bool((point >= _BORDER).all() and (point <= SIDE - 1 - _BORDER).all())
