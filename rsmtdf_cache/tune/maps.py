"""What teachers say of the sample, encoded once for each view, and what any codec leaves of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.calibrate import CALIBRATION_TILES, HELD_OUT_TILES
from rsmtdf_cache.codecs import Calibration, Moments, codec_class, load_codec, parse_codec
from rsmtdf_cache.encode import encode_batch
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart
from rsmtdf_cache.memory import require_memory
from rsmtdf_cache.plan import TeacherJob
from rsmtdf_cache.quality import Quality, token_cosines
from rsmtdf_cache.resampling import Grid, interpolation_weights
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile
from rsmtdf_cache.tune.probe import ProbeTask
from rsmtdf_cache.views import orient, orient_point

__all__ = ["ArrayMaps", "Decoded", "MapBank", "encode_maps", "grid_of", "recentred", "turned_cosines", "upright"]

_KEPT_NBYTES = 2 * 2**30


@dataclass
class ArrayMaps:
    """Maps ``[n, h, w, D]`` float32 of the training tiles and of the held-out ones, as the teacher gives them."""

    spec: FeatureSpec
    train: NDArray[np.float32]
    held: NDArray[np.float32]
    _moments: Moments | None = field(default=None, repr=False)

    def calibration(self, components: int) -> Calibration:
        """Return what a build would calibrate with as many of these tiles, for a codec with ``components``."""
        if self._moments is None:
            self._moments = Moments(self.spec.layer.channels)
            for values in self.train[:CALIBRATION_TILES]:
                self._moments.add(values)
        return Calibration.fit(self._moments, components, {})


@dataclass(frozen=True)
class Decoded:
    """What is left after a codec: points of the training tiles, maps of the held-out ones (float16), how alike."""

    points: Tensor
    held: NDArray[np.float16]
    quality: Quality

    @property
    def nbytes(self) -> int:
        return self.points.nbytes + self.held.nbytes


def grid_of(spec: FeatureSpec) -> Grid:
    """Return the token centres of the array along either axis, in tile pixels."""
    return Grid(spec.grid[0], spec.stride_tile_px, spec.offset_tile_px)


def upright(job: TeacherJob) -> list[FeatureSpec]:
    """Return the arrays that are probed: whole tiles as they are; other orientations and fixed views cost only."""
    return [s for s in job.specs if s.view.is_whole and s.view.orientation == 0]


def encode_maps(
    job: TeacherJob, images: Sequence[NDArray[np.uint8]], train: int, profile: NumericsProfile, on_event: EventSink
) -> list[ArrayMaps]:
    """Return the maps of ``images``, of which the first ``train`` are training tiles; a view is encoded once.

    Raises ``ResourceError`` when they do not fit into memory, ``DataError`` for values that are not finite.
    """
    specs = upright(job)
    need = 4 * len(images) * sum(s.grid[0] * s.grid[1] * s.layer.channels for s in specs)
    what = f"{job.teacher.spec.name}: features of {len(images)} tiles take"
    require_memory(need, what, "use fewer --tiles, layers or scales")
    found = []
    for view in dict.fromkeys(s.view for s in specs):
        here = [s for s in specs if s.view == view]
        layers = [s.layer.name for s in here]
        task = f"tune-{job.teacher.spec.name}-{view.name}"
        on_event(ProgressStart(task, f"encoding {job.teacher.spec.name}/{view.name}", len(images)))
        whole = {s.layer.name: np.empty((len(images), *s.grid, s.layer.channels), np.float32) for s in here}
        size = 1 if view.windows is not None else profile.micro_batch
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            for layer, values in encode_batch(job.teacher, view, layers, batch, profile).items():
                if not np.isfinite(values).all():
                    raise DataError(
                        f"{job.teacher.spec.name}/{view.name}/{layer}: values that are not finite; try --precision "
                        "float32, or check the weights"
                    )
                whole[layer][start : start + len(batch)] = values
            on_event(Progress(task, len(batch)))
        on_event(ProgressEnd(task))
        found += [ArrayMaps(s, whole[s.layer.name][:train], whole[s.layer.name][train:]) for s in here]
    return found


class MapBank:
    """Maps of all teachers, decoded on demand; the latest are kept. Keys: (teacher, scale name, layer)."""

    def __init__(self, task: ProbeTask) -> None:
        self.task = task
        self.arrays: dict[tuple[str, str, str], ArrayMaps] = {}
        self._kept: OrderedDict[tuple[tuple[str, str, str], str], Decoded] = OrderedDict()

    def add(self, arrays: Sequence[ArrayMaps], name: str | None = None) -> None:
        """Take ``arrays`` in, under another teacher's ``name`` if one is given."""
        for a in arrays:
            self.arrays[name or a.spec.teacher.name, a.spec.view.scale, a.spec.layer.name] = a

    def decoded(self, key: tuple[str, str, str], codec_text: str) -> Decoded:
        """Return the array ``key`` as it comes back from the codec."""
        place = (key, codec_text)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        array, encoding = self.arrays[key], parse_codec(codec_text)
        kind, channels = codec_class(encoding), array.spec.layer.channels
        components = kind.stored_channels(encoding, channels) if encoding.codec.startswith("pca") else 0
        codec = load_codec(encoding, channels, array.calibration(components) if kind.calibrated else None)
        held = codec.decode(codec.encode(array.held))
        train = np.empty(array.train.shape, np.float16)
        for n, values in enumerate(array.train):
            train[n] = codec.decode(codec.encode(values))
        if not np.isfinite(held).all() or not np.isfinite(train).all():
            raise DataError(f"{'/'.join(key)}: values do not fit {codec_text}; choose other layers or codecs")
        quality = Quality.of(array.held[:HELD_OUT_TILES], held[:HELD_OUT_TILES])
        made = Decoded(self.task.points(train, grid_of(array.spec)), held, quality)
        self._kept[place] = made
        while len(self._kept) > 1 and sum(d.nbytes for d in self._kept.values()) > _KEPT_NBYTES:
            self._kept.popitem(last=False)
        return made


def turned_cosines(
    job: TeacherJob, arrays: Sequence[ArrayMaps], images: Sequence[NDArray[np.uint8]], orientation: int,
    profile: NumericsProfile,
) -> float:  # fmt: skip
    """Return the mean cosine between features of turned ``images`` and the turned features of these images.

    It is what training sees when it approximates an orientation that is not stored. ``arrays``: the upright maps of the
    same ``images``, the first of ``held``. Token centres are brought together (bilinear) where padding is asymmetric.
    """
    cosines = []
    for view in dict.fromkeys(a.spec.view for a in arrays):
        here = [a for a in arrays if a.spec.view == view]
        turned_view = view.model_copy(update={"orientation": orientation})
        size = 1 if view.windows is not None else profile.micro_batch
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            true = encode_batch(job.teacher, turned_view, [a.spec.layer.name for a in here], batch, profile)
            for a in here:
                maps = orient(a.held[start : start + len(batch)], orientation, axes=(1, 2))
                cosines.append(token_cosines(recentred(maps, a.spec, orientation), true[a.spec.layer.name]).ravel())
    return float(np.concatenate(cosines).mean())


def recentred(turned: NDArray[np.float32], spec: FeatureSpec, orientation: int) -> NDArray[np.float32]:
    """Return turned maps ``[n, h, w, D]`` read at the token centres that the teacher has in every frame."""
    grid, side = grid_of(spec), float(spec.tile_px)
    first, last = grid.offset_px, grid.last_px
    corners = [orient_point(y, x, side, orientation) for y, x in ((first, first), (last, last))]
    weights = [
        interpolation_weights(Grid(grid.tokens, grid.stride_px, min(c[axis] for c in corners)), grid.centres(), 0.0)
        for axis in (0, 1)
    ]
    mixed = np.einsum("yh,nhwd->nywd", weights[0], turned, optimize=True)
    read: NDArray[np.float32] = np.einsum("xw,nywd->nyxd", weights[1], mixed, optimize=True).astype(np.float32)
    return read
