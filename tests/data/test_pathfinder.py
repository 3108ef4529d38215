"""Pathfinder against the published procedure, which is reimplemented below on whole images, and
images against the geometry that their generator reports."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage, stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.tasks import pathfinder
from spectral_pod.data.tasks.pathfinder import Pathfinder
from spectral_pod.errors import ConfigError

LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def examples():
    return list(Pathfinder(seed=1, num_workers=1).generate(700))


@pytest.fixture(scope="module")
def path_x():
    return list(Pathfinder(seed=1, size=128, num_workers=1).generate(8))


# --- the published procedure, with whole images, Pillow's lines and scipy's dilation


def step(place, angle, distance):
    moved = distance * np.array([math.sin(angle), math.cos(angle)])
    return np.ceil(np.round(np.array(place) + moved, 9)).astype(int)


def disc(radius):
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def shrink(image, size):
    return np.asarray(Image.fromarray((255 * image).astype(np.uint8)).resize(size, LANCZOS)) / 255


def draw_paddle(p, margin, angle):
    """Ink and mask of a paddle that starts at the centre of a patch."""
    reach = p.paddle_length + math.ceil(p.thickness) + margin
    canvas = Image.new("L", (4 * reach + 1, 4 * reach + 1))
    centre = (2 * reach, 2 * reach)
    end = step(centre, angle, 2 * p.paddle_length)
    ImageDraw.Draw(canvas).line(
        [centre, (int(end[1]), int(end[0]))], fill=1, width=round(2 * p.thickness)
    )
    line = np.asarray(canvas) > 0
    mask = ndimage.binary_dilation(line, disc(2 * margin))
    size = (2 * reach + 1, 2 * reach + 1)
    return shrink(line, size), shrink(mask, size)


def pasted(patch, place, size):
    reach = len(patch) // 2
    canvas = np.zeros((size + 4 * reach, size + 4 * reach))
    top, left = np.array(place) + reach
    canvas[top : top + len(patch), left : left + len(patch)] = patch
    return canvas[2 * reach : -2 * reach, 2 * reach : -2 * reach]


def room(p, margin, angle, mask):
    """The pixels with room for a paddle: no mask is under its solid part, moved by one pixel."""
    kernel = draw_paddle(p, margin, angle)[1] == 1
    blocked, seen = np.zeros_like(mask), np.zeros_like(mask)
    limit = p.paddle_length + margin
    for dy, dx in np.argwhere(kernel) - len(kernel) // 2:
        if dy < limit and dx < limit:
            moved = ndimage.shift(mask, (-dy - 1, -dx - 1), order=0)
            blocked = np.maximum(blocked, moved)
            seen = np.maximum(seen, ndimage.shift(np.ones_like(mask), (-dy - 1, -dx - 1), order=0))
    # OpenCV gives the lowest number to a pixel that sees none of the image, and the published
    # program takes a negative one for a mask without room.
    return np.argwhere(blocked <= 0.3) if seen.all() else np.zeros((0, 2), int)


class Stuck(Exception):
    pass


class Reference:
    """One image of the published generator; `targets` and `distractors` are lists of far ends."""

    def __init__(self, p, length, rng):
        self.p, self.rng, self.size = p, rng, p.size
        self.margin = int(rng.choice(p.margins))
        while True:
            self.mask = np.ones((p.size, p.size))
            self.mask[1:-1, 1:-1] = 0
            self.image = np.zeros_like(self.mask)
            try:
                self.targets = self.two_contours(length)
                break
            except Stuck:
                pass
        self.distractors = []
        for _ in range(p.distractor_paddles // (length // 3)):
            for _ in range(5):
                saved = self.mask, self.image
                try:
                    self.distractors.append(self.distractor(length // 3))
                    break
                except Stuck:
                    self.mask, self.image = saved
        self.label, start = rng.integers(2), rng.integers(2)
        self.markers = self.targets[start][0], self.targets[start ^ 1 ^ self.label][-1]
        for y, x in self.markers:
            row, column = np.ogrid[-2 * y : 2 * (p.size - y), -2 * x : 2 * (p.size - x)]
            circle = row**2 + column**2 <= (2 * p.marker_radius) ** 2
            self.image = np.maximum(self.image, shrink(circle, (p.size, p.size)))
        self.image = np.floor(255 * self.image / self.image.max() + 0.5)

    def first(self, contrast, angle, places):
        p = self.p
        place = places[self.rng.integers(len(places))]
        head = step(place, angle, p.paddle_length)
        pivot = step(head, angle + np.pi, p.paddle_length + self.margin)
        if not all(0 <= i < self.size for i in (*head, *pivot)):
            return None
        ink, mask = draw_paddle(p, self.margin, angle)
        self.image = np.maximum(self.image, contrast * pasted(ink, place, self.size))
        return [tuple(place)], pivot, angle, pasted(mask, place, self.size)

    def random_angle(self):
        return math.radians(self.rng.integers(-180, 180))

    def two_contours(self, length):
        p, far = self.p, 2 * self.p.seed_distance
        inner = np.ones_like(self.mask)
        inner[far:-far, far:-far] = 0
        for _ in range(3):
            angle = self.random_angle()
            places = room(p, self.margin, angle, inner)
            if not len(places):
                raise Stuck
            one = self.first(p.target_contrast, angle, places)
            if one:
                break
        else:
            raise Stuck
        for _ in range(3):
            away, tail = self.random_angle(), np.array(one[0][0])
            moved = tail + p.seed_distance * np.array([math.sin(away), math.cos(away)])
            place = np.rint(moved).astype(int)
            two = self.first(p.target_contrast, self.random_angle(), [place])
            if two:
                break
        else:
            raise Stuck
        for _ in range(length - 1):
            one = self.extended(one, p.target_contrast)
            two = self.extended(two, p.target_contrast)
        self.mask = np.maximum(self.mask, two[3])
        return one[0], two[0]

    def distractor(self, length):
        for _ in range(3):
            angle = self.random_angle()
            places = room(self.p, self.margin, angle, self.mask)
            if not len(places):
                raise Stuck
            contour = self.first(self.p.distractor_contrast, angle, places)
            if contour:
                break
        else:
            raise Stuck
        for _ in range(length - 1):
            contour = self.extended(contour, self.p.distractor_contrast)
        self.mask = np.maximum(self.mask, contour[3])
        return contour[0]

    def extended(self, contour, contrast):
        ends, pivot, angle, last_mask = contour
        p, m = self.p, self.margin
        pivot, radius = step(pivot, angle, p.paddle_length + 2 * m), p.paddle_length + m
        turns = np.arange(0, 2 * np.pi, 1 / radius)
        circle = np.floor(
            pivot + np.round(radius * np.stack([np.sin(turns), np.cos(turns)], 1), 9)
        ).astype(int)
        circle = np.unique(circle[((circle >= 0) & (circle < self.size)).all(1)], axis=0)
        if not len(circle):
            raise Stuck
        angles = np.arctan2(*(circle - pivot).T)
        bend = np.abs((angles - angle + np.pi) % (2 * np.pi) - np.pi)
        near = ndimage.grey_dilation(self.mask, footprint=disc(m), mode="constant")
        weights = np.cos(np.minimum(p.continuity * bend, np.pi / 2)) ** 2
        weights = weights * (1 - near[tuple(circle.T)])
        if weights.sum() < 1e-4:
            raise Stuck
        for _ in range(3):
            i = self.rng.choice(len(circle), p=weights / weights.sum())
            ink, mask = draw_paddle(p, m, angles[i] + np.pi)
            mask = pasted(mask, circle[i], self.size)
            if (self.mask + mask).max() < 1.8 - 1e-6:
                self.image = np.maximum(self.image, contrast * pasted(ink, circle[i], self.size))
                self.mask = np.maximum(self.mask, last_mask)
                return [*ends, tuple(circle[i])], pivot, angles[i], mask
        raise Stuck


# --- images


@pytest.mark.parametrize(("size", "margin"), [(32, 1), (128, 2), (128, 3)])
def test_paddles_are_those_of_pillow(size, margin):
    p, tables = pathfinder.PARAMETERS[size], pathfinder._tables(size, margin)
    radius = p.paddle_length + margin
    around = np.arange(0, 2 * np.pi, 1 / radius)
    circle = np.unique(np.floor(radius * np.stack([np.sin(around), np.cos(around)], 1)), axis=0)
    angles = [math.radians(degrees) for degrees in range(360)]
    angles += [math.atan2(*pixel) + math.pi for pixel in circle]
    assert len(angles) == len(tables.ink)
    for angle, ink in zip(angles, tables.ink, strict=True):
        expected, _ = draw_paddle(p, margin, angle)
        assert np.abs(ink - 255 * expected).max() <= 1


@pytest.mark.parametrize(("size", "margin"), [(32, 1), (128, 3)])
def test_room_for_a_first_paddle(size, margin):
    p, tables = pathfinder.PARAMETERS[size], pathfinder._tables(size, margin)
    rng = np.random.default_rng(0)
    has_room = [kernel is not None for kernel in tables.kernels]
    assert sum(has_room) == {32: 31, 128: 360}[size]
    tried = [*np.flatnonzero(has_room)[::4][:12], *np.flatnonzero(np.logical_not(has_room))[:3]]
    for degrees in tried:
        mask = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 16)
        taken = mask > np.median(mask)
        found = tables.room(np.pad(taken, tables.border).ravel(), degrees)
        expected = room(p, margin, math.radians(degrees), taken.astype(float))
        assert len(expected) > 10 or not has_room[degrees]
        np.testing.assert_array_equal(tables.pixels(found), expected)


def test_image_is_what_the_geometry_says(examples, path_x):
    for example in [*examples[:40], *path_x[:6]]:
        p = pathfinder.PARAMETERS[len(example.image)]
        pixels = np.stack(np.mgrid[: p.size, : p.size], -1).astype(float)
        distance = np.full((p.size, p.size), np.inf)  # to the nearest paddle or marker
        for near, far in np.concatenate([*example.targets, *example.distractors]):
            along = np.clip(((pixels - near) @ (far - near)) / ((far - near) ** 2).sum(), 0, 1)
            to_paddle = np.linalg.norm(pixels - near - along[..., None] * (far - near), axis=-1)
            distance = np.minimum(distance, to_paddle)
            row, column = np.rint((near + far) / 2).astype(int)
            beside = example.image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert beside.max() > 0.4 * 255
        for marker in example.markers:
            to_marker = np.linalg.norm(pixels - marker, axis=-1) - p.marker_radius
            distance = np.minimum(distance, to_marker)
        assert (example.image[distance > p.thickness / 2 + 2.3] < 0.1 * 255).all()
        assert example.image.max() == 255
        assert example.image.dtype == np.uint8


def found_markers(image):
    """Centres [n, 2] and ink [n] of the shapes that are thicker than paddles."""
    opened = ndimage.binary_opening(image > 140, disc(2))
    labels, n = ndimage.label(opened)
    centres = ndimage.center_of_mass(opened, labels, range(1, n + 1))
    return np.array(centres), ndimage.sum_labels(opened, labels, range(1, n + 1))


def test_markers_are_on_one_contour_where_the_label_says_so(path_x):
    """The markers are located in the pixels of Path-X."""
    for example in path_x:
        centres, areas = found_markers(example.image)
        assert len(centres) == 2
        np.testing.assert_allclose(areas, math.pi * 3**2, rtol=0.2)
        starts = np.array([target[0, 0] for target in example.targets])
        ends = np.array([target[-1, 1] for target in example.targets])
        # The index of the end of a target, of four, that is nearest to each marker.
        tips = np.concatenate([starts, ends])
        distances = np.linalg.norm(centres[:, None] - tips, axis=-1)
        assert (distances.min(1) < 1.5).all()
        first, second = sorted(distances.argmin(1))
        assert first < 2 <= second  # one at a start, one at an end
        assert (first == second - 2) == bool(example.label)
        assert np.abs(np.sort(centres, 0) - np.sort(example.markers, 0)).max() < 1.5


def test_contours_are_dashed_lines_that_bend_as_published(examples, path_x):
    for example in [*examples, *path_x]:
        p, gap = pathfinder.PARAMETERS[len(example.image)], 2 * example.margin
        for contour in [*example.targets, *example.distractors]:
            length = np.linalg.norm(contour[:, 1] - contour[:, 0], axis=-1)
            assert (np.abs(length - p.paddle_length) <= math.sqrt(2)).all()
            steps = np.linalg.norm(contour[1:, 0] - contour[:-1, 1], axis=-1)
            assert (np.abs(steps - gap) <= 0.3 * gap + 2).all()
        # Far ends are a paddle and two margins apart, so rounding to pixels hardly affects turns.
        if p.size == 128:
            for contour in example.targets:
                course = np.diff(contour[:, 1], axis=0)
                course = np.unwrap(np.arctan2(course[:, 0], course[:, 1]))
                assert (np.abs(np.diff(course)) < np.pi / 2 / p.continuity + 0.35).all()


def test_contours_do_not_cross(examples, path_x):
    """Except for the last paddle of the first target, the newest ones of both targets, and the
    first ones of distractors, whose place is searched for one pixel away."""

    def left_of(line, point):  # [..., 2, 2], [..., 2]
        (dy, dx), to = (
            np.moveaxis(line[..., 1, :] - line[..., 0, :], -1, 0),
            point - line[..., 0, :],
        )
        return np.sign(dy * to[..., 1] - dx * to[..., 0])

    def crossing(one, other):
        one, other = one[:, None], other[None]
        apart = left_of(one, other[..., 0, :]) * left_of(one, other[..., 1, :]) < 0
        return apart & (left_of(other, one[..., 0, :]) * left_of(other, one[..., 1, :]) < 0)

    for example in [*examples, *path_x]:
        first, second = example.targets
        old = np.abs(np.subtract.outer(np.arange(14), np.arange(14))) > 1
        assert not (crossing(first, second) & old).any()
        earlier = [first[:-1], second]
        for distractor in example.distractors:
            assert not crossing(np.concatenate(earlier), distractor[1:]).any()
            earlier.append(distractor)


def test_published_parameters(examples, path_x):
    for batch, per_image in ((examples, 5), (path_x, 8)):
        p = pathfinder.PARAMETERS[len(batch[0].image)]
        assert all([len(target) for target in e.targets] == [14, 14] for e in batch)
        assert all(len(d) == 14 // 3 for e in batch for d in e.distractors)
        count = [len(e.distractors) for e in batch]
        assert max(count) <= per_image == p.distractor_paddles // (14 // 3)
        # At 32 pixels most find no room; `test_statistics_...` says how many do.
        assert batch is examples or max(count) == per_image
        assert batch is examples or np.mean(count) > 0.9 * per_image
        assert {e.margin for e in batch} == set(p.margins)
        apart = [np.linalg.norm(e.targets[0][0, 0] - e.targets[1][0, 0]) for e in batch]
        assert np.abs(np.array(apart) - p.seed_distance).max() <= math.sqrt(0.5)
        balance = stats.binomtest(sum(e.label for e in batch), len(batch))
        assert balance.pvalue > 1e-3
    margins = stats.binomtest(sum(e.margin == 2 for e in path_x), len(path_x))
    assert margins.pvalue > 1e-3


def test_targets_have_the_published_contrast(examples, path_x):
    """Targets have 0.75 of the brightness of distractors in Pathfinder, and the same in Path-X."""

    def brightness(image, contours):
        places = np.concatenate(contours)[:, 0]
        row, column = places[(places < len(image)).all(1)].T
        return np.mean(image[row, column])

    for batch, contrast in ((examples, 0.75), (path_x, 1.0)):
        ratios = [
            brightness(e.image, [target[2:-2] for target in e.targets])
            / brightness(e.image, e.distractors)
            for e in batch
            if e.distractors
        ]
        assert abs(np.median(ratios) - contrast) < 0.1


@pytest.fixture(scope="module")
def same_from_reference():
    rng = np.random.default_rng(7)
    return [Reference(pathfinder.PARAMETERS[32], 6, rng) for _ in range(90)]


def test_distribution_is_that_of_the_published_procedure(same_from_reference):
    """Two-sample tests with short contours, which the slow procedure draws in reasonable time."""
    ours = list(Pathfinder(seed=3, contour_length=6, num_workers=1).generate(700))
    for name, measure in {
        "ink": lambda e: float(e.image.sum()),
        "brightest target": lambda e: float(np.median(e.image[e.image > 60])),
        "distractors": lambda e: len(e.distractors),
        "between markers": lambda e: math.dist(*np.array(e.markers, float)),
        "first row": lambda e: e.markers[0][0],
        "last column": lambda e: e.markers[1][1],
        "border": lambda e: float(e.image[:3].sum() + e.image[:, -3:].sum()),
    }.items():
        here, there = [measure(e) for e in ours], [measure(e) for e in same_from_reference]
        assert stats.ks_2samp(here, there).pvalue > 1e-3, name


def test_statistics_are_those_of_the_published_program(examples):
    """Measured on 206 images that it drew (docs/results.md says how)."""
    images = np.array([e.image for e in examples])
    for values, mean, spread in (
        (images.mean((1, 2)), 20.27, 2.17),
        ((images > 0).mean((1, 2)), 0.3424, 0.0391),
    ):
        error = spread * math.sqrt(1 / 206 + 1 / len(examples))
        assert values.mean() == pytest.approx(mean, abs=3.3 * error)
        assert values.std() == pytest.approx(spread, rel=0.2)
    count = np.bincount(np.minimum([len(e.distractors) for e in examples], 3), minlength=4)
    assert stats.chi2_contingency([count, [47, 89, 46, 24]]).pvalue > 1e-3


# --- the task


def test_neither_histogram_nor_ink_tells_the_class(examples):
    images = np.array([e.image.ravel() for e in examples])
    labels = np.array([e.label for e in examples])
    histogram = np.stack([np.histogram(image, 16, (0, 256))[0] for image in images])
    ink = images.sum(1, keepdims=True)
    chance = max(labels.mean(), 1 - labels.mean())
    for features in (histogram, ink):
        features = (features - features.mean(0)) / (features.std(0) + 1e-9)
        scores = cross_val_score(LogisticRegression(), features, labels, cv=5)
        assert scores.mean() < chance + 0.05


def test_workers_do_not_change_the_images(examples):
    again = Pathfinder(seed=1, num_workers=2).generate(25)
    for one, other in zip(examples, again):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.label == other.label
    (other,) = Pathfinder(seed=2, num_workers=1).generate(1)
    assert (other.image != examples[0].image).any()


def test_images_are_distinct(examples, monkeypatch):
    assert len({e.image.tobytes() for e in examples}) == len(examples)
    chunk = pathfinder._chunk(32, 14, 1, 0)
    # A generator that draws every chunk twice.
    monkeypatch.setattr(pathfinder, "_chunk", lambda size, length, seed, i: chunk[i // 2 :][:1])
    drawn = list(Pathfinder(num_workers=1).generate(5))
    assert [e.image.tobytes() for e in drawn] == [e.image.tobytes() for e in chunk[:5]]


@pytest.mark.parametrize("size", [32, 128])
def test_build(tmp_path, size):
    path = str(tmp_path / "store")
    options = {"seed": 3, "size": size, "contour_length": 3}
    task = Pathfinder(**options, train=6, validation=2, test=4, num_workers=1)
    task.build(path)
    store = ByteStore(path)
    assert store.classes == ["separate", "connected"]
    assert task.num_classes == 2
    drawn = Pathfinder(**options, num_workers=1).generate(12)
    for name, n in (("test", 4), ("validation", 2), ("train", 6)):
        split, expected = store.split(name), list(itertools.islice(drawn, n))
        for record, example in zip(split.read(range(n)), expected, strict=True):
            np.testing.assert_array_equal(record.reshape(size, size), example.image)
        np.testing.assert_array_equal(split.labels, [e.label for e in expected])
    generator = store.manifest["provenance"]["generator"]
    assert generator["contour_length"] == 3
    assert generator["size"] == size


@pytest.mark.parametrize("option", [{"size": 64}, {"contour_length": 7}, {"validation": 0}])
def test_impossible_requests_name_the_field(option):
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=f"config.data.options.{name} is {value}"):
        Pathfinder(**option)
