"""What the live teacher is asked, and what is read from the store to stand for its answer.

A *question* shows the teacher pixels: a whole tile in some orientation, a crop alone, two tiles pasted. A *reading* is
a way to get features for the same pixels without the teacher. Boxes are drawn with ``fixed_views.draw`` from the place
of a tile in the sample, so they are the same at every call.

=================== =================================================================================================
identity            the stored map, as it was encoded: codec and numerics
orientation-stored  as before, turned or mirrored tiles
orientation-turned  the map of the first stored orientation, turned: what storing that frame saves one from
scale               the map of another scale (``source``), resampled
crop-aligned        a crop of half the tile on the lattice: an exact copy, but the teacher saw its surroundings
crop-shifted        such a crop at any pixel: also resampled by a part of a token
crop-resized        a crop of 0.6 to 1 of the tile, which the teacher sees enlarged to its full side: also another scale
cutmix              two maps pasted like the pixels; tokens that the box's edge crosses count nothing (decision 11)
fixed-stored        fixed views as they were encoded
fixed-cut           the same crops and turns read from the map of the whole tile, as if nobody had stored them
codec-alone         what the codec makes of the live features: the part of the loss that is not the reading's
other-tile          control: the stored map of another tile, the level of chance
mean-vector         control: the mean of the store at every token
=================== =================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.crops import TokenGrid, read_crops
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fidelity.boxes import PastedBox, cutmix_box, cutmix_tokens, near_border, near_box
from rsmtdf_cache.fidelity.sample import Family, Sample, Target
from rsmtdf_cache.fixed_views import draw
from rsmtdf_cache.specs import CropSpec, FeatureKey, FeatureSpec, ViewSpec
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.views import CropBox, render
from rsmtdf_cache.windows import map_layers

__all__ = [
    "Asked",
    "CASES",
    "FIXED_VIEWS_MOST",
    "Question",
    "Read",
    "Reading",
    "Skipped",
    "ask",
    "batches",
    "live_specs",
]

#: Every kind of reading, in the order in which tables show them.
CASES = (
    "identity", "codec-alone", "orientation-stored", "orientation-turned", "scale", "crop-aligned", "crop-shifted",
    "crop-resized", "cutmix", "fixed-stored", "fixed-cut", "other-tile", "mean-vector",
)  # fmt: skip

#: Fixed views that are compared, of those stored, in the order of their names.
FIXED_VIEWS_MOST = 8

FloatMap = NDArray[np.float32]


@dataclass(frozen=True)
class Read:
    """What was read for one tile: ``values [h, w, D]``, which tokens count, and which lie near an edge ``[h, w]``.

    ``exact``: stored tokens, bit for bit.
    """

    values: NDArray[np.floating]
    counts: NDArray[np.bool_]
    exact: bool
    edge: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Asked:
    """One tile of a question: its place in the sample, what is shown of it, and what is pasted in from the next."""

    n: int
    view: ViewSpec
    pasted: PastedBox | None = None

    def image(self, sample: Sample) -> NDArray[np.uint8]:
        """Return the pixels that the teacher is shown."""
        image = render(sample.image(self.n), self.view)
        if self.pasted is not None:
            y0, y1, x0, x1 = self.pasted
            image = image.copy()
            image[y0:y1, x0:x1] = render(sample.image(sample.after(self.n)), self.view)[y0:y1, x0:x1]
        return image


@dataclass(frozen=True)
class Reading:
    """A way to get features of what a question shows. ``read`` returns None where a target has nothing to read.

    ``read(target, sample, asked, live spec, live features)``; only ``codec-alone`` looks at the last.
    """

    case: str
    read: Callable[[Target, Sample, Asked, FeatureSpec, FloatMap], Read | None]
    orientation: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Question:
    """Pixels for the live teacher, and all readings that answer for it."""

    asked: tuple[Asked, ...]
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Skipped:
    """A case that cannot be had, and why."""

    case: str
    reason: str


def ask(family: Family, teacher: Teacher, sample: Sample) -> tuple[list[Question], list[Skipped]]:
    """Return what ``teacher`` is asked for the arrays of ``family``, and the cases that cannot be had."""
    questions: list[Question] = []
    skipped: list[Skipped] = []
    if any(t.whole for t in family.targets):
        up = min(o for t in family.targets for o in t.whole)
        questions += [_whole(family, sample, o, up) for o in (up, *(o for o in range(8) if o != up))]
        makers = {"crop-aligned": _aligned, "crop-shifted": _shifted, "crop-resized": _resized, "cutmix": _mixed}
        for case, make in makers.items():
            try:
                questions.append(make(family, teacher, sample))
            except UsageError as error:
                skipped.append(Skipped(case, str(error)))
        if len(sample) < 2:
            skipped.append(Skipped("other-tile", "the sample has one tile"))
    fixed = _fixed(family, sample)
    return [*questions, *([fixed] if fixed is not None else [])], skipped


def live_specs(teacher: Teacher, family: Family, view: ViewSpec, tile_px: int) -> dict[str, FeatureSpec]:
    """Return where the tokens of the live maps lie, by layer: stride and offset as the teacher has them at this size.

    Raises ``UsageError`` when the teacher cannot be shown such a view.
    """
    encodings = {t.spec.layer.name: t.spec.encoding for t in family.targets}
    return {
        layer.name: FeatureSpec(teacher=teacher.spec, layer=layer, view=view, encoding=encodings[layer.name],
                                tile_px=tile_px, grid=grid)
        for layer, grid in map_layers(teacher, family.layers, view)
    }  # fmt: skip


def _read(
    target: Target, row: int, live: FeatureSpec, source: int | None = None, key: FeatureKey | None = None
) -> Read | None:
    """Read what ``live`` shows of a tile at its token centres; ``source``: by turning the map of that orientation."""
    stored = live.view.orientation if source is None else source
    if key is None and stored not in target.whole:
        return None
    box = CropBox(*live.origin_tile_px, live.shown_px, live.shown_px)
    grid = TokenGrid(*live.grid, live.stride_tile_px, live.offset_tile_px)
    found = read_crops(
        target.opened, key or target.key, [row], [box], grid, live.view.orientation, source is not None, source
    )
    edge = None
    if live.view.crop is not None and key is None:
        edge = near_border(live)
    return Read(found.values[0], found.valid[0], found.exact, edge)


def _plain(case: str, orientation: int | None = None) -> Reading:
    def read(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        return _read(target, sample.rows[target.store][asked.n], live)

    return Reading(case, read, orientation)


def _whole(family: Family, sample: Sample, orientation: int, up: int) -> Question:
    view = family.view.model_copy(update={"orientation": orientation})
    asked = tuple(Asked(n, view) for n in range(len(sample)))

    def turned(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        source = min(target.whole, default=orientation)
        return None if source == orientation else _read(target, sample.rows[target.store][asked.n], live, source)

    if orientation != up:
        stored = _plain("orientation-stored", orientation)
        return Question(asked, (stored, Reading("orientation-turned", turned, orientation)))

    def recoded(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, features: FloatMap) -> Read:
        codec = target.opened.codec(target.spec.key)
        return _everywhere(codec.decode(codec.encode(features)))

    def another(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        return _read(target, sample.rows[target.store][sample.after(asked.n)], live)

    def mean(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, features: FloatMap) -> Read:
        return _everywhere(np.broadcast_to(target.mean, features.shape))

    readings = [_plain("identity", up), Reading("codec-alone", recoded), Reading("mean-vector", mean)]
    if len(sample) > 1:
        readings.append(Reading("other-tile", another))
    scales = {t.spec.view.scale: t.spec.view.size_px for target in family.targets for t in target.scales}
    readings += [_from_scale(scale, up) for scale in sorted(scales, key=lambda s: (-scales[s], s))]
    return Question(asked, tuple(readings))


def _from_scale(scale: str, up: int) -> Reading:
    def read(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        other = next((t for t in target.scales if t.spec.view.scale == scale and up in t.whole), None)
        return None if other is None else _read(other, sample.rows[target.store][asked.n], live)

    return Reading("scale", read, None, scale)


def _aligned(family: Family, teacher: Teacher, sample: Sample) -> Question:
    unit, size = _crop_size(family, teacher)
    step = Fraction(unit * sample.tile_px, family.view.size_px)
    if step.denominator > 1 or teacher.spec.pixel.align_corners:
        raise UsageError(
            f"views of {family.view.size_px} px of {sample.tile_px}-px tiles have no lattice of whole tile pixels"
        )
    places = sample.tile_px // int(step) - size // unit + 1
    views = []
    for n in range(len(sample)):
        y, x = (int(step) * int(draw(0, n, f"fidelity aligned {axis}") * places) for axis in "yx")
        views.append(_crop_view(family, size, CropSpec(y=y, x=x, side_px=size // unit * int(step))))
    return _crops("crop-aligned", family, teacher, sample, views)


def _shifted(family: Family, teacher: Teacher, sample: Sample) -> Question:
    _, size = _crop_size(family, teacher)
    side = round(Fraction(size * sample.tile_px, family.view.size_px))
    views = []
    for n in range(len(sample)):
        y, x = (int(draw(0, n, f"fidelity shifted {axis}") * (sample.tile_px - side + 1)) for axis in "yx")
        views.append(_crop_view(family, size, CropSpec(y=y, x=x, side_px=side)))
    return _crops("crop-shifted", family, teacher, sample, views)


def _resized(family: Family, teacher: Teacher, sample: Sample) -> Question:
    views, tile_px = [], sample.tile_px
    least = math.ceil(0.6 * tile_px)
    for n in range(len(sample)):
        side = least + int(draw(0, n, "fidelity resized side") * (tile_px - least + 1))
        y, x = (int(draw(0, n, f"fidelity resized {axis}") * (tile_px - side + 1)) for axis in "yx")
        views.append(_crop_view(family, family.view.size_px, CropSpec(y=y, x=x, side_px=side)))
    return _crops("crop-resized", family, teacher, sample, views)


def _crop_size(family: Family, teacher: Teacher) -> tuple[int, int]:
    """Return the coarsest step of crops, and the side of a crop of half the tile, in pixels of the whole view.

    So the live teacher sees the crop at as many pixels per tile pixel as it saw the tile.
    """
    layers = [layer for layer, _ in map_layers(teacher, family.layers, family.view)]
    unit = math.lcm(teacher.spec.patch_px, *(layer.stride_px for layer in layers))
    count = family.view.size_px // unit
    if count < 2:
        raise UsageError(f"a view of {family.view.size_px} px has no smaller crop on a step of {unit} px")
    return unit, unit * (count // 2)


def _crop_view(family: Family, size_px: int, crop: CropSpec) -> ViewSpec:
    windows = family.view.windows
    fits = windows is not None and size_px > windows.side_px
    return ViewSpec(size_px=size_px, orientation=0, crop=crop, windows=windows if fits else None)


def _crops(case: str, family: Family, teacher: Teacher, sample: Sample, views: Sequence[ViewSpec]) -> Question:
    if not any(0 in t.whole for t in family.targets):
        raise UsageError("orientation 0 is not stored")
    live_specs(teacher, family, views[0], sample.tile_px)
    return Question(tuple(Asked(n, view) for n, view in enumerate(views)), (_plain(case),))


def _mixed(family: Family, teacher: Teacher, sample: Sample) -> Question:
    if len(sample) < 2:
        raise UsageError("the sample has one tile")
    if not any(0 in t.whole for t in family.targets):
        raise UsageError("orientation 0 is not stored")

    def read(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        rows = sample.rows[target.store]
        own = _read(target, rows[asked.n], live)
        other = _read(target, rows[sample.after(asked.n)], live)
        if own is None or other is None or asked.pasted is None:
            return None
        inside, outside = cutmix_tokens(live, asked.pasted)
        values = np.where(inside[..., None], other.values, own.values)
        counts = (inside & other.counts) | (outside & own.counts)
        return Read(values, counts, own.exact, near_box(live, asked.pasted))

    boxes = [cutmix_box(n, sample.tile_px) for n in range(len(sample))]
    asked = tuple(Asked(n, family.view, box) for n, box in enumerate(boxes))
    return Question(asked, (Reading("cutmix", read),))


def _fixed(family: Family, sample: Sample) -> Question | None:
    views = list(dict.fromkeys(s.view for t in family.targets for s in t.fixed))
    views = sorted(views, key=lambda v: v.name)[:FIXED_VIEWS_MOST]
    if not views:
        return None

    def stored(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        key = next((s.key for s in target.fixed if s.view == asked.view), None)
        return None if key is None else _read(target, sample.rows[target.store][asked.n], live, key=key)

    def cut(target: Target, sample: Sample, asked: Asked, live: FeatureSpec, _: FloatMap) -> Read | None:
        if asked.view not in [s.view for s in target.fixed] or not target.whole:
            return None
        source = None if asked.view.orientation in target.whole else min(target.whole)
        return _read(target, sample.rows[target.store][asked.n], live, source)

    asked = tuple(Asked(n, view) for view in views for n in range(len(sample)))
    return Question(asked, (Reading("fixed-stored", stored), Reading("fixed-cut", cut)))


def _everywhere(values: NDArray[np.floating]) -> Read:
    return Read(values, np.ones(values.shape[:2], np.bool_), False)


def batches(question: Question, sample: Sample, most: int) -> Iterator[list[tuple[Asked, NDArray[np.uint8]]]]:
    """Yield what is shown in runs of equal shape, at most ``most`` at once."""
    waiting: list[tuple[Asked, NDArray[np.uint8]]] = []
    for asked in question.asked:
        image = asked.image(sample)
        same = waiting and (waiting[0][1].shape, waiting[0][0].view.size_px) == (image.shape, asked.view.size_px)
        if waiting and (not same or len(waiting) == most):
            yield waiting
            waiting = []
        waiting.append((asked, image))
    if waiting:
        yield waiting
