"""Pathfinder and Path-X of the Long Range Arena: do two markers lie on the same dashed contour?

Images are drawn as by the generator that the arena used, `snakes2.py` of
github.com/drewlinsley/pathfinder, with the parameters that `lra_benchmarks/data/pathfinder.py`
lists. Two target contours start `seed_distance` apart and grow by turns, paddle by paddle, until
both have all their paddles; an attempt that gets stuck is given up whole. Shorter distractor
contours follow where there is room. One target is marked at its start; the other marker is at the
end of the same target (`connected`) or of the other one (`separate`), each with probability 1/2.

A paddle is a short line. The next one starts two margins after its end: its far end is one of the
pixels on a circle around the pivot, a margin past the last paddle, with probability in proportion
to (1 - mask) max(0, cos(continuity * turn))^2. `mask` is 1 within a margin of what is drawn.

                                        Pathfinder              Path-X
    size, paddle_length                 32, 2                   128, 5
    thickness, marker_radius            0.5, 1.5                1.5, 3
    margin                              1                       2 or 3, for the whole image
    seed_distance, continuity           7, 1.0                  20, 1.8
    paddles of a target, a distractor   14, 14 // 3             14, 14 // 3
    distractors                         20 // 4                 35 // 4
    contrast of targets, distractors    2 * 0.75, 2             0.9, 0.9
    padding, antialias                  1, 2                    1, 2
    retries of a paddle, a distractor   2, 4                    2, 4

What follows from the code rather than from the list, and holds here too: (1) distractors are drawn
with the contrast of contours, targets with that times the contrast of paddles; the finished image
is scaled so that its brightest pixel is 255: at 32 pixels targets are dimmer than distractors.
(2) The kernel that looks for room for a first paddle is off by a pixel in both axes, and a
direction has no room at all if for some pixel of the image the whole kernel is outside: at 32
pixels first paddles point up and to the left, and most distractors find no room. (3) The last
paddle of the first target is not in the mask: distractors may cross it.
(4) A distractor without room after its retries is left out. (5) Divisions are Python 2's. (6) The
list doesn't say so, but there are no single paddles: the script that it completes turns them off.

Differences from it: images are distinct here. The arena's loaders cut 80, 10 and 10 % from the
200,000 images of its split `hard` (14 paddles); here the same sizes come from one stream. A
`contour_length` of 6 or 9 gives what it calls `easy` and `intermediate`, for which it lists no
number of distractors: it is taken as above, with their own length. 3 is ours, for quick runs: there
the distance between the markers alone tells the class of 80 % of the images; with 14 paddles, 51 %.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from spectral_pod.data import byte_store, generated
from spectral_pod.data.tasks.task import StoredTask, execution
from spectral_pod.fields import Positive

CLASSES = ("separate", "connected")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The published parameters of images of one size; lengths in pixels."""

    size: int
    paddle_length: int
    thickness: float
    margins: tuple[int, ...]  # one is drawn for an image
    marker_radius: float
    seed_distance: int
    continuity: float
    distractor_paddles: int  # of all distractors, at most
    target_contrast: float
    distractor_contrast: float


PARAMETERS = {
    32: Parameters(32, 2, 0.5, (1,), 1.5, 7, 1.0, 20, 1.5, 2.0),
    128: Parameters(128, 5, 1.5, (2, 3), 3, 20, 1.8, 35, 0.9, 0.9),
}
PADDING = 1  # pixels at the border that are taken from the start
ANTIALIAS = 2  # sub-pixels a pixel, each way
PADDLE_RETRIES = 2
DISTRACTOR_RETRIES = 4

_CHUNK = 10  # examples drawn from one random stream; part of what a seed means
_NUM_SEED_DIRECTIONS = 360  # a first paddle points at a whole number of degrees
_CROSSING = 459  # 1.8 in 1/255: two masks that add up to it cross
_TAKEN = 77  # above 0.3 in 1/255: no room for a first paddle

_Uniform = Callable[[], float]


class Example(NamedTuple):
    """One image, its class, and what it shows; places are (row, column)."""

    image: np.ndarray  # uint8 [size, size]
    label: int
    targets: tuple[np.ndarray, np.ndarray]  # int64 [paddles, 2, 2]: near and far end of each
    distractors: tuple[np.ndarray, ...]  # the same
    markers: np.ndarray  # int64 [2, 2]: at the start of a target, at the end of a target
    margin: int


def _ceil(x: np.ndarray | float) -> np.ndarray:
    return np.ceil(np.round(x, 9)).astype(int)  # whole numbers that rounding errors miss stay whole


def _ahead(angle: float, distance: float) -> np.ndarray:
    """int64 [2]: the pixel at that distance, as (rows, columns) from here."""
    return _ceil(distance * np.array([math.sin(angle), math.cos(angle)]))


def _disc(radius: int) -> np.ndarray:
    """int64 [n, 2]: places within that distance of the origin."""
    places = np.argwhere(np.ones((2 * radius + 1, 2 * radius + 1))) - radius
    return places[(places**2).sum(1) <= radius**2]


def _line(end: np.ndarray, width: int) -> np.ndarray:
    """int64 [n, 2]: pixels of a line from the origin, 1 or 3 wide, as Pillow's `line` draws it."""
    if width == 1:
        steps = np.abs(end).max()
        along = np.arange(steps + 1)[:, None] * end / steps
        return (np.sign(along) * np.floor(np.abs(along) + 0.5)).astype(int)
    # A parallelogram, `side` to the left and to the right, filled row by row.
    side = np.rint(np.array([end[1], -end[0]]) / np.hypot(*end)).astype(int)
    corners = [side, end + side, end - side, -side]
    pixels: list[tuple[int, int]] = []
    for y in range(int(min(c[0] for c in corners)), int(max(c[0] for c in corners)) + 1):
        crossed = []
        for (y0, x0), (y1, x1) in zip(corners, corners[1:] + corners[:1]):
            if y0 == y1 == y:
                crossed += [x0, x1]
            elif y0 != y1 and min(y0, y1) <= y <= max(y0, y1):
                crossed.append(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        # Centres that are less than half a pixel outside.
        first, last = math.floor(min(crossed) - 0.5) + 1, math.ceil(max(crossed) + 0.5) - 1
        pixels += [(y, x) for x in range(first, last + 1)]
    return np.array(pixels)


@functools.cache
def _lanczos(old: int, new: int) -> np.ndarray:
    """float64 [new, old]: resamples a line of pixels, wider than before, by Lanczos-3."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    x = (np.arange(old) + 0.5 - centres) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return weights / weights.sum(1, keepdims=True)


def _shrink(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """uint8 [h, w]: an image of 0 and 1 resampled, with 8 bits kept after each axis, as Pillow."""
    wide = np.clip(np.floor(255 * image @ columns.T + 0.5), 0, 255)
    return np.clip(np.floor(rows @ wide + 0.5), 0, 255).astype(np.uint8)


class _Tables:
    """All that follows from the direction of a paddle, for one margin.

    The mask is one row after another on a canvas with a border, so that a place is one number and
    a patch a list of distances. Direction i is i degrees clockwise from rightwards for a first
    paddle; the others are those from a pivot to a pixel of the circle around it.
    """

    def __init__(self, p: Parameters, margin: int):
        length = p.paddle_length
        self.p, self.margin = p, margin
        self.reach = length + math.ceil(p.thickness) + margin  # of a patch around its origin
        self.border = p.seed_distance + self.reach  # no place that is tried is beyond it
        self.side = p.size + 2 * self.border
        self.inside = np.pad(np.ones((p.size, p.size), bool), self.border).ravel()

        radius = length + margin
        turns = 2 * np.pi * np.arange(0, 1, 1 / (2 * np.pi * radius))
        circle = radius * np.stack([np.sin(turns), np.cos(turns)], 1)
        circle = np.unique(np.floor(np.round(circle, 9)).astype(int), axis=0)
        angles = np.radians(np.arange(_NUM_SEED_DIRECTIONS))
        angles = np.concatenate([angles, np.arctan2(circle[:, 0], circle[:, 1])])
        turn = angles[_NUM_SEED_DIRECTIONS:] - angles[:, None]
        turn = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
        bend = np.minimum(turn * p.continuity, np.pi / 2)
        self.circle = self.steps(circle)
        self.likelihood = list(np.cos(bend) ** 2)  # [direction, pixel of the circle]

        # A first paddle is drawn onwards from its near end, another one backwards from its far end.
        first = np.arange(len(angles)) < _NUM_SEED_DIRECTIONS
        drawn = np.where(first, angles, angles + np.pi)
        self.other_end = np.array([_ahead(angle, length) for angle in drawn])
        back = np.array([_ahead(angle + np.pi, length + margin) for angle in angles])
        self.first_head = self.steps(self.other_end)
        self.first_pivot = self.steps(self.other_end + back)  # seen from the near end
        onwards = np.array([_ahead(angle, length + 2 * margin) for angle in angles])
        self.next_pivot = self.steps(onwards)  # seen from the last one
        patches = [self._patch(tuple(_ahead(angle, length * ANTIALIAS))) for angle in drawn]
        self.ink = [ink for ink, _ in patches]
        self.masks = [self._both_masks(mask) for _, mask in patches]
        self.cores = [self._core(mask) for _, mask in patches]
        self.kernels = [self._kernel(mask) for _, mask in patches[:_NUM_SEED_DIRECTIONS]]

        mask = self._edge(PADDING)
        wide_mask = self._dilate(mask)[margin:-margin, margin:-margin]
        wide_mask = np.where(self.inside, wide_mask.ravel(), 255)  # no contour leaves the image
        self.empty_masks = np.concatenate([mask.ravel(), wide_mask]).astype(np.uint8)
        taken = self._edge(2 * p.seed_distance).ravel() > 0
        self.first_room = [self.room(taken, d) for d in range(_NUM_SEED_DIRECTIONS)]

    def _edge(self, width: int) -> np.ndarray:
        """uint8 [side, side]: 255 in the outermost pixels of the image."""
        size = self.p.size - 2 * width
        edge = np.pad(np.zeros((size, size), np.uint8), width, constant_values=255)
        return np.pad(edge, self.border)

    def steps(self, pixels: np.ndarray) -> np.ndarray:
        """int64 [...]: how far apart places are that are (rows, columns) [..., 2] apart."""
        return pixels[..., 0] * self.side + pixels[..., 1]

    def pixels(self, places: np.ndarray) -> np.ndarray:
        """int64 [..., 2]: (row, column) in the image."""
        return np.stack(np.divmod(places, self.side), -1) - self.border

    def _patch(self, end: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Ink and mask, uint8 [2 reach + 1] * 2, of the line from the centre to that sub-pixel."""
        centre = self.reach * ANTIALIAS
        line = np.zeros((2 * centre + 1, 2 * centre + 1))
        mask = np.zeros_like(line)
        pixels = centre + _line(np.array(end), round(self.p.thickness * ANTIALIAS))
        line[tuple(pixels.T)] = 1
        for offset in _disc(self.margin * ANTIALIAS):
            mask[tuple((pixels + offset).T)] = 1
        weights = _lanczos(len(line), 2 * self.reach + 1)
        return _shrink(line, weights, weights), _shrink(mask, weights, weights)

    def _dilate(self, image: np.ndarray) -> np.ndarray:
        """The greatest value within the margin; larger than the image by the margin all around."""
        margin, (height, width) = self.margin, image.shape
        wide = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
        for row, column in margin + _disc(margin):
            window = wide[row : row + height, column : column + width]
            np.maximum(window, image, out=window)
        return wide

    def _sparse(self, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.argwhere(patch)
        return self.steps(pixels - len(patch) // 2), patch[tuple(pixels.T)]

    def _both_masks(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A patch for the masks, which are behind one another in memory: plain, then dilated."""
        places, values = self._sparse(mask)
        wide_places, wide_values = self._sparse(self._dilate(mask))
        places = np.concatenate([places, wide_places + self.side**2])
        return places, np.concatenate([values, wide_values])

    def _core(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where a mask can cross another one, and from what value of the other one it does."""
        places, values = self._sparse(mask)
        strong = values >= _CROSSING - 255
        return places[strong], _CROSSING - values[strong].astype(int)

    def _kernel(self, mask: np.ndarray) -> np.ndarray | None:
        """The places, from one below and to the right of a first paddle's start, to be free.

        None if a pixel of the image has all of them outside: see (2) above.
        """
        pixels = np.argwhere(mask == 255) - self.reach
        limit = self.p.paddle_length + self.margin
        pixels = pixels[(pixels < limit).all(1)] + 1
        seen = np.argwhere(np.ones((self.p.size, self.p.size)))[:, None] + pixels
        in_image = np.all((seen >= 0) & (seen < self.p.size), axis=-1)
        return self.steps(pixels) if np.all(np.any(in_image, axis=1)) else None

    def room(self, taken: np.ndarray, direction: int) -> np.ndarray:
        """Places where a first paddle in that direction has room; `taken` is bool, as the mask."""
        start, stop = self.border * self.side, (self.side - self.border) * self.side
        kernel, blocked = self.kernels[direction], ~self.inside[start:stop]
        if kernel is None:
            return np.zeros(0, int)
        for offset in kernel:
            blocked |= taken[start + offset : stop + offset]
        return start + np.flatnonzero(~blocked)


@functools.cache
def _tables(size: int, margin: int) -> _Tables:
    return _Tables(PARAMETERS[size], margin)


class _Contour:
    """Paddles as (place, direction); a margin before the last one is the pivot it turned on."""

    def __init__(self, place: int, direction: int, pivot: int):
        self.paddles = [(place, direction)]
        self.pivot = pivot


class _Drawing:
    """An attempt at the contours of one image, and what they leave free."""

    def __init__(self, tables: _Tables, uniform: _Uniform):
        self._t, self._uniform = tables, uniform
        self._masks = tables.empty_masks.copy()
        half = len(self._masks) // 2
        self._mask, self._wide_mask = self._masks[:half], self._masks[half:]  # views; see _Tables

    def targets(self, num_paddles: int) -> list[_Contour] | None:
        """Both targets, or None where one of them gets stuck."""
        first = self._start(self._t.first_room.__getitem__)
        second = first and self._start(lambda _: self._away_from(first))
        if not (first and second):
            return None
        for _ in range(num_paddles - 1):
            if not (self._extend(first) and self._extend(second)):
                return None
        self._occupy(second.paddles[-1])  # and not that of `first`: see (3) above
        return [first, second]

    def distractor(self, num_paddles: int) -> _Contour | None:
        """One more contour, or None where several attempts find no room."""
        for _ in range(1 + DISTRACTOR_RETRIES):
            before = self._masks.copy()
            contour = self._start(self._room)
            if contour and all(self._extend(contour) for _ in range(num_paddles - 1)):
                self._occupy(contour.paddles[-1])
                return contour
            self._masks[:] = before
        return None

    def _room(self, direction: int) -> np.ndarray:
        return self._t.room(self._mask >= _TAKEN, direction)

    def _pick(self, n: int) -> int:
        return int(self._uniform() * n)

    def _away_from(self, contour: _Contour) -> np.ndarray:
        t, angle = self._t, math.radians(self._pick(360))
        row, column = divmod(contour.paddles[0][0], t.side)
        row = t.border + round(row - t.border + t.p.seed_distance * math.sin(angle))
        column = t.border + round(column - t.border + t.p.seed_distance * math.cos(angle))
        return np.array([row * t.side + column])

    def _start(self, room: Callable[[int], np.ndarray]) -> _Contour | None:
        """A first paddle at one of the places that `room` finds for a direction."""
        t = self._t
        for _ in range(1 + PADDLE_RETRIES):
            direction = self._pick(_NUM_SEED_DIRECTIONS)
            places = room(direction)
            if not len(places):
                return None
            place = int(places[self._pick(len(places))])
            head, pivot = place + t.first_head[direction], place + t.first_pivot[direction]
            if t.inside[head] and t.inside[pivot]:
                return _Contour(place, direction, pivot)
        return None

    def _extend(self, contour: _Contour) -> bool:
        t, last = self._t, contour.paddles[-1]
        pivot = contour.pivot + t.next_pivot[last[1]]
        circle = pivot + t.circle
        weights = ((255 - self._wide_mask.take(circle)) * t.likelihood[last[1]]).cumsum()
        total = float(weights[-1])
        if total < 255e-4:
            return False
        for _ in range(1 + PADDLE_RETRIES):
            i = int(weights.searchsorted(self._uniform() * total, side="right"))
            place, direction = int(circle[i]), _NUM_SEED_DIRECTIONS + i
            offsets, limits = t.cores[direction]
            if not np.count_nonzero(self._mask.take(place + offsets) >= limits):
                self._occupy(last)
                contour.paddles.append((place, direction))
                contour.pivot = pivot
                return True
        return False

    def _occupy(self, paddle: tuple[int, int]) -> None:
        offsets, values = self._t.masks[paddle[1]]
        places = paddle[0] + offsets
        self._masks[places] = np.maximum(self._masks.take(places), values)


def _draw(size: int, num_paddles: int, uniform: _Uniform) -> Example:
    p = PARAMETERS[size]
    t = _tables(size, p.margins[int(uniform() * len(p.margins))])
    targets = None
    while targets is None:
        drawing = _Drawing(t, uniform)
        targets = drawing.targets(num_paddles)
    length = num_paddles // 3
    tries = [drawing.distractor(length) for _ in range(p.distractor_paddles // length)]
    distractors = [contour for contour in tries if contour]

    canvas = np.zeros((t.side, t.side))
    _ink(canvas, t, targets, p.target_contrast)
    _ink(canvas, t, distractors, p.distractor_contrast)
    image = canvas[t.border : -t.border, t.border : -t.border]
    label, start = int(uniform() * 2), int(uniform() * 2)
    end = start if label else 1 - start
    markers = t.pixels(np.array([targets[start].paddles[0][0], targets[end].paddles[-1][0]]))
    for marker in markers:
        _mark(image, marker, p.marker_radius)
    return Example(
        image=np.floor(255 / image.max() * image + 0.5).astype(np.uint8),
        label=label,
        targets=(_ends(t, targets[0]), _ends(t, targets[1])),
        distractors=tuple(_ends(t, contour) for contour in distractors),
        markers=markers,
        margin=t.margin,
    )


def _ink(canvas: np.ndarray, t: _Tables, contours: list[_Contour], contrast: float) -> None:
    """Draws contours on a canvas [side, side], in place."""
    for place, direction in itertools.chain.from_iterable(c.paddles for c in contours):
        rows, columns = (slice(i - t.reach, i + t.reach + 1) for i in divmod(place, t.side))
        window = canvas[rows, columns]
        np.maximum(window, contrast / 255 * t.ink[direction], out=window)


def _ends(t: _Tables, contour: _Contour) -> np.ndarray:
    """int64 [paddles, 2, 2]: (row, column) of the near and the far end of each paddle."""
    places, directions = np.array(contour.paddles).T
    drawn_from = t.pixels(places)
    ends = np.stack([drawn_from + t.other_end[directions], drawn_from], 1)
    ends[0] = ends[0, ::-1]  # the first is drawn from its near end
    return ends


def _mark(image: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """Draws a disc on an image, in place."""
    reach, size = math.ceil(radius) + 3, len(image)  # Lanczos sees 3 pixels
    weights = _lanczos(ANTIALIAS * size, size)
    rows, columns = (slice(max(c - reach, 0), c + reach + 1) for c in centre)
    y, x = (np.arange(ANTIALIAS * size) - ANTIALIAS * c for c in centre)
    disc = y[:, None] ** 2 + x**2 <= (ANTIALIAS * radius) ** 2
    window = image[rows, columns]
    np.maximum(window, _shrink(disc, weights[rows], weights[columns]) / 255, out=window)


def _chunk(size: int, contour_length: int, seed: int, index: int) -> list[Example]:
    # Python promises that random() keeps its stream for a seed in every version.
    uniform = random.Random(f"Pathfinder {size} {contour_length} {seed} {index}").random
    return [_draw(size, contour_length, uniform) for _ in range(_CHUNK)]


@dataclasses.dataclass(frozen=True)
class Pathfinder(StoredTask):
    """Images, row after row, a byte a pixel; the class says whether the markers are connected.

    A record has 1,024 bytes, or 16,384 with `size` 128, which is Path-X.
    """

    name = "pathfinder"
    version = 2
    num_classes = len(CLASSES)

    seed: int = 0  # draws the examples
    size: Literal[32, 128] = 32  # of an image, in pixels: a key of PARAMETERS
    # Paddles of a target; a distractor has a third of them.
    contour_length: Literal[3, 6, 9, 14] = 14
    train: Positive = 160_000  # distinct images; likewise validation and test
    validation: Positive = 20_000
    test: Positive = 20_000
    num_workers: int | None = execution(None)  # processes that draw; None is one per core

    def generate(self, num_examples: int) -> Iterator[Example]:
        """Distinct images, drawn by workers; a core draws 300 a second of 32 pixels, 15 of 128."""
        return generated.distinct(
            functools.partial(_chunk, self.size, self.contour_length, self.seed),
            lambda example: example.image.tobytes(),
            num_examples,
            chunk=_CHUNK,
            what="Pathfinder",
            num_workers=self.num_workers,
        )

    def picture(self, record: np.ndarray) -> np.ndarray | None:
        """See `Task.picture`; of a record that `data.truncate` cut there is none."""
        return record.reshape(-1, self.size) if len(record) == self.size**2 else None

    def build(self, path: str) -> None:
        """Writes the images as a byte store, with the parameters of the generator."""
        examples = generated.splits(
            self.generate, train=self.train, validation=self.validation, test=self.test
        )
        byte_store.write(
            path,
            {split: map(_record, drawn) for split, drawn in examples.items()},
            classes=CLASSES,
            provenance={
                "task": "pathfinder",
                "generator": {
                    "seed": self.seed,
                    "contour_length": self.contour_length,
                    **dataclasses.asdict(PARAMETERS[self.size]),
                },
            },
        )


def _record(example: Example) -> byte_store.Record:
    return byte_store.Record(example.image.tobytes(), example.label)
