"""What a map is asked to be, and what it will take: windows, strips, memory, files. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.rasters.gdal import GDAL_CACHE_MB
from rsmtdf_cache.rasters.scaling import Scale, scale_text
from rsmtdf_cache.rasters.scene import Scene
from rsmtdf_cache.specs import digest_of
from rsmtdf_train.scenes.geotiff import NODATA, REQUEST_TAG, Layer
from rsmtdf_train.scenes.segmenter import Segmenter, WindowSegmenter
from rsmtdf_train.scenes.windows import BLOCK_PX, Grid, lay_windows

__all__ = ["BUFFER_NBYTES", "MapPlan", "MapRequest", "Segmenter", "map_state", "map_tags", "plan_map", "scene_grid"]

#: What the buffers of a strip may take; a wide scene with many classes is done in several strips.
BUFFER_NBYTES = 512 * 2**20


@dataclass(frozen=True)
class MapRequest:
    """One scene, and the map that is to be made of it. None: the default that ``plan_map`` finds.

    ``bands``: three numbers from 1. ``scale``: values that are black and white, by band. ``window_px``, ``overlap_px``:
    multiples of the student's stride. ``probabilities``, ``confidence``: further files. ``tta``: mean over eight turns.
    """

    scene: Path
    out: Path
    bands: tuple[int, ...] | None = None
    scale: Scale | None = None
    window_px: int | None = None
    overlap_px: int | None = None
    probabilities: Path | None = None
    confidence: Path | None = None
    tta: bool = False
    cog: bool = False

    def layers(self, classes: int) -> tuple[Layer, ...]:
        """Return the files of the map. Raises ``UsageError`` for two of one name and for the scene itself."""
        found = [Layer("classes", self.out, 0, 1)]
        if self.confidence is not None:
            found.append(Layer("confidence", self.confidence, 1, 1))
        if self.probabilities is not None:
            found.append(Layer("probabilities", self.probabilities, sum(y.count for y in found), classes))
        taken = {self.scene.resolve(): "the scene"}
        for layer in found:
            place = layer.out.resolve()
            if place in taken:
                raise UsageError(f"{layer.kind} cannot go to {layer.out}: that is {taken[place]}; give another name")
            if layer.out.suffix.lower() not in (".tif", ".tiff"):
                raise UsageError(f"{layer.kind} cannot go to {layer.out}: maps are GeoTIFF; end the name in .tif")
            if layer.out.is_dir():
                raise UsageError(f"{layer.kind} cannot go to {layer.out}: that is a folder; give the name of a file")
            taken[place] = f"the place of {layer.kind}"
        return tuple(found)


@dataclass(frozen=True)
class MapPlan:
    """What a map takes. ``windows``: forward passes of one window each when no pixel is without data.

    ``memory_nbytes``: buffers, beside the student, one forward pass and the libraries. ``output_nbytes``: of each file
    before compression.
    """

    width: int
    height: int
    grid: Grid
    layers: tuple[Layer, ...]
    windows: int
    strips: int
    memory_nbytes: int
    output_nbytes: dict[str, int]

    @property
    def planes(self) -> int:
        """Bytes a pixel that are kept of the map."""
        return sum(layer.count for layer in self.layers)


def plan_map(
    segmenter: WindowSegmenter, request: MapRequest, scene: Scene, budget_nbytes: int = BUFFER_NBYTES
) -> MapPlan:
    """Return how ``scene`` is cut and what that takes. Raises ``UsageError`` for a request that cannot be met."""
    classes = len(segmenter.classes)
    if classes > NODATA:
        raise UsageError(f"a map has at most {NODATA} classes, this student has {classes}")
    layers = request.layers(classes)
    fixed = segmenter.fixed_px
    if fixed is not None and request.window_px not in (None, fixed):
        raise UsageError(f"--window {request.window_px}: this file was exported for {fixed} px alone; leave it out")
    planes = sum(layer.count for layer in layers)
    side = request.window_px or segmenter.crop_px + segmenter.multiple_px
    column = side * (4 * classes + 8 + 20) + 2 * BLOCK_PX * planes  # sums; two bands of pixels; one as read; pieces
    grid = scene_grid(segmenter, scene, request.window_px, request.overlap_px, column, budget_nbytes)
    return MapPlan(
        width=scene.width,
        height=scene.height,
        grid=grid,
        layers=layers,
        windows=grid.forward_count * (8 if request.tta else 1),
        strips=len(list(grid.strips())),
        memory_nbytes=column * min(grid.strip_px, scene.width) + GDAL_CACHE_MB * 2**20,
        output_nbytes={layer.kind: layer.count * scene.width * scene.height for layer in layers},
    )


def scene_grid(
    segmenter: WindowSegmenter,
    scene: Scene,
    window_px: int | None,
    overlap_px: int | None,
    column_nbytes: int = 0,
    budget_nbytes: int = 0,
) -> Grid:
    """Return the windows of ``scene`` for this student: ``lay_windows`` with what the student asks of them."""
    return lay_windows(
        scene.height, scene.width, segmenter.multiple_px, window_px, overlap_px,
        crop_px=segmenter.crop_px, square=segmenter.square,
        column_nbytes=column_nbytes, budget_nbytes=budget_nbytes,
    )  # fmt: skip


def map_state(segmenter: WindowSegmenter, request: MapRequest, scene: Scene, plan: MapPlan) -> dict[str, Any]:
    """Return all that decides the bytes of a map, as JSON: what a stopped run has to agree with."""
    return {
        "format": 2,
        "student": segmenter.digest,
        "scene": {
            "name": scene.path.name, "nbytes": scene.nbytes, "mtime_ns": scene.mtime_ns,
            "width": scene.width, "height": scene.height, **scene.facts(),
        },
        "bands": list(scene.bands),
        "scale": [list(pair) for pair in scene.scale],
        "window_px": plan.grid.window_px,
        "overlap_px": plan.grid.overlap_px,
        "tta": request.tta,
        "layers": [layer.kind for layer in plan.layers],
        "cog": request.cog,
    }  # fmt: skip


def map_tags(segmenter: WindowSegmenter, request: MapRequest, scene: Scene, plan: MapPlan) -> dict[str, str]:
    """Return what the map says of how it was made: the metadata of its files."""
    return dict(_tags(segmenter, request, scene, plan))


def _tags(segmenter: WindowSegmenter, request: MapRequest, scene: Scene, plan: MapPlan) -> Iterator[tuple[str, str]]:
    yield "RSMTDF_RUN", segmenter.name
    yield "RSMTDF_STUDENT", segmenter.digest
    yield "RSMTDF_SCENE", scene.path.name
    yield "RSMTDF_BANDS", ",".join(map(str, scene.bands))
    yield "RSMTDF_SCALE", scale_text(scene.scale)
    yield "RSMTDF_WINDOW", str(plan.grid.window_px)
    yield "RSMTDF_OVERLAP", str(plan.grid.overlap_px)
    yield "RSMTDF_TTA", "yes" if request.tta else "no"
    yield REQUEST_TAG, digest_of(map_state(segmenter, request, scene, plan))
