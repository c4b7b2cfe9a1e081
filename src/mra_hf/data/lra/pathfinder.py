"""Pathfinder: are the two discs ends of one dashed contour? Drawn here, 32 x 32 grey pixels.

The rules follow those of the Long Range Arena's images (Linsley et al. 2018): two dashed contours
grow from starts 7 pixels apart, paddle by paddle; five short ones distract; a disc lies on the
start of one contour and another on its end, or on the end of the other contour. Thin lines are
drawn at twice the size and reduced after Lanczos. What differs: points are not rounded to whole
pixels, and a paddle keeps clear of the last one of the other contour too, so that contours do not
cross there. About 70 % of the pixels are black, in the published images 66 %. Coordinates are (row,
column); a direction t is (sin t, cos t).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from mra_attention.checks import check_int
from mra_hf.data.lra.parts import LraData, check_amounts, divided, features

SIDE = 32
LABELS = ("apart", "connected")

_LENGTH = 2.0  # of a paddle, in pixels, as everything here
_THICKNESS = 0.5
_GAP = 1.0
_BORDER = 1
_START_DISTANCE = 7
_RADIUS = 1.5
_CONTINUITY = 1.0
_TRIES = 3  # for a paddle
_DISTRACTORS = 5
_DISTRACTOR_TRIES = 5
_LEAST_FREE = 0.01
_OVERLAP = 1.8  # of two soft masks
_CONTOUR_INTENSITY = 1.5  # a thin line covers half a pixel
_DISTRACTOR_INTENSITY = 2.0
#: Pixels around a paddle that it may cover, and points within a pixel that are looked at.
_WINDOW = 5
_POINTS = 4
_LANCZOS = 3
#: Rounded off, as in a drawing of 8 bits.
_FAINTEST = 0.01
#: Images that are drawn from one seed of their own.
_SHARD = 250
#: Counts up when the same seed gives other images.
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
    """Draw the task; drawn once, it is read from the cache of datasets.

    Args:
        seed: of everything; the same images for any `num_proc`.
        count: images; 80 % are train, 10 % dev, 10 % test, at random.
        paddles: of a contour: 14 is the hard set of the papers, 9 the intermediate, 6 the easy one.
        mask_zero_pixels: as published, value v is id v: black pixels, most of an image, are taken
            for padding and never attended. False: id v + 1, and all pixels are.
        num_proc: processes that draw.

    Raises:
        ValueError: a number out of range.
    """
    check_amounts(seed=seed, num_proc=num_proc)
    check_int("count", count, 10)
    check_int("paddles", paddles, 3, 16)
    shards = -(-count // _SHARD)
    offset = 0 if mask_zero_pixels else 1
    images = Dataset.from_generator(
        _shards,
        features=features("input_ids"),
        gen_kwargs={
            "shards": list(range(shards)),
            "seed": seed,
            "paddles": paddles,
            "offset": offset,
            "version": _VERSION,
        },
        num_proc=min(num_proc, shards) if num_proc and num_proc > 1 else None,
    )
    parts = {
        name: images.select(places) for name, places in divided(count, (0.1, 0.1), seed).items()
    }
    return LraData(
        **parts,
        vocab_size=256 + offset,
        max_length=SIDE**2,
        labels=LABELS,
        split=f"drawn here by seed {seed}: {count} images of contours of {paddles} paddles, 80, 10 "
        "and 10 %",
        masks_zero=mask_zero_pixels,
        grid=(SIDE, SIDE),
    )


def _shards(
    shards: list[int], seed: int, paddles: int, offset: int, version: int
) -> Iterator[dict]:
    """Rows of some shards; `version` is there for the cache."""
    for shard in shards:
        draw = np.random.default_rng((seed, shard))
        for _ in range(_SHARD):
            image, label = draw_image(draw, paddles)
            yield {"input_ids": image.astype(np.int16).ravel() + offset, "label": label}


def draw_image(draw: np.random.Generator, paddles: int = 14) -> tuple[np.ndarray, int]:
    """One image, `[32, 32]` uint8, and its label: 1 if the discs are ends of one contour."""
    while True:
        drawn = _two_contours(draw, paddles)
        if drawn is not None:
            break
    canvas, contours = drawn
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


@dataclass
class _Canvas:
    """What is drawn, and where nothing more may be: soft masks, composed by the larger."""

    image: np.ndarray = field(default_factory=lambda: np.zeros((SIDE, SIDE)))
    occupied: np.ndarray = field(default_factory=lambda: _frame())

    def add(self, place: tuple, paddle: np.ndarray, intensity: float) -> None:
        part = self.image[place]
        np.maximum(part, intensity * paddle, out=part)

    def occupy(self, mask: tuple[tuple, np.ndarray]) -> None:
        part = self.occupied[mask[0]]
        np.maximum(part, mask[1], out=part)


@dataclass
class _Contour:
    """A contour that grows.

    Attributes:
        pivot: the point before the last paddle around which it was turned.
        angle: direction of the last paddle.
        start, end: tips.
        pending: mask of the last paddle, which the next one may touch.
    """

    pivot: np.ndarray
    angle: float
    start: np.ndarray
    end: np.ndarray
    pending: tuple[tuple, np.ndarray]


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
        for own, other in (contours, contours[::-1]):
            if not _grow(canvas, own, draw, _CONTOUR_INTENSITY, other.pending):
                return None
    for contour in contours:
        canvas.occupy(contour.pending)
    return canvas, contours


def _add_distractor(canvas: _Canvas, draw: np.random.Generator, paddles: int) -> None:
    """A contour of its own, or nothing after some attempts."""
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
    canvas: _Canvas,
    draw: np.random.Generator,
    tail: np.ndarray,
    intensity: float,
    near: tuple[tuple, np.ndarray] | None = None,
) -> _Contour | None:
    """The first paddle from `tail`, in any direction; None where it does not fit."""
    angle = math.radians(int(draw.integers(360)))
    direction = _direction(angle)
    head = tail + _LENGTH * direction
    pivot = head - (_LENGTH + _GAP) * direction
    if not all(_inside(point) for point in (tail, head, pivot)):
        return None
    place, paddle, mask = _paddle(head, direction)
    if _overlaps(canvas.occupied, place, mask, near):
        return None
    canvas.add(place, paddle, intensity)
    return _Contour(pivot, angle, np.asarray(tail, float), head, (place, mask))


def _grow(
    canvas: _Canvas,
    contour: _Contour,
    draw: np.random.Generator,
    intensity: float,
    near: tuple[tuple, np.ndarray] | None = None,
) -> bool:
    """One more paddle; False at a dead end."""
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
        chosen = int(np.searchsorted(weights.cumsum(), total * draw.random(), side="right"))
        chosen = min(chosen, len(ends) - 1)
        direction = _direction(angles[chosen])
        place, paddle, mask = _paddle(ends[chosen], direction)
        if not _overlaps(canvas.occupied, place, mask, near):
            canvas.add(place, paddle, intensity)
            canvas.occupy(contour.pending)
            contour.pivot, contour.angle = pivot, float(angles[chosen])
            contour.end, contour.pending = ends[chosen].astype(float), (place, mask)
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


def _paddle(head: np.ndarray, direction: np.ndarray) -> tuple[tuple, np.ndarray, np.ndarray]:
    """The window that it lies in, its pixels there, and its mask, a pixel wider on all sides."""
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
    place = (slice(low[0], high[0]), slice(low[1], high[1]))
    return place, paddle, mask


@functools.cache
def _reduction(size: int) -> np.ndarray:
    """Lanczos's weights that reduce 2 * `size` values to half, `[size, 2 * size]`."""
    apart = np.arange(size)[:, None] + 0.5 - (np.arange(2 * size) + 0.5) / 2
    weights = np.sinc(apart) * np.sinc(apart / _LANCZOS) * (np.abs(apart) < _LANCZOS)
    return weights / weights.sum(1, keepdims=True)


def _overlaps(
    occupied: np.ndarray, place: tuple, mask: np.ndarray, near: tuple[tuple, np.ndarray] | None
) -> bool:
    if (occupied[place] + mask).max() >= _OVERLAP:
        return True
    if near is None:
        return False
    other = np.zeros((SIDE, SIDE))
    other[near[0]] = near[1]
    return bool((other[place] + mask).max() >= _OVERLAP)


def _disc(centre: np.ndarray) -> np.ndarray:
    rows, columns = ((np.arange(SIDE)[:, None] + _OFFSETS).ravel() - at for at in centre)
    inside = np.hypot(rows[:, None], columns) <= _RADIUS
    return inside.reshape(SIDE, _POINTS, SIDE, _POINTS).mean((1, 3))


def _direction(angle: float) -> np.ndarray:
    return np.array([math.sin(angle), math.cos(angle)])


def _inside(point: np.ndarray) -> bool:
    return bool((point >= _BORDER).all() and (point <= SIDE - 1 - _BORDER).all())
