"""The dataset folder of scenes: tables, lists and what it was made of. Not one pixel is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.prepare.workplace import is_made, publish, refuse_file, workplace
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.label_raster import open_labels
from rsmtdf_cache.rasters.polygons import is_vector_file
from rsmtdf_cache.rasters.scaling import EIGHT_BIT, PixelRule
from rsmtdf_cache.sources.header import DatasetHeader, parse_header
from rsmtdf_cache.sources.rasters import write_rasters
from rsmtdf_cache.sources.scenes import SceneCell, write_scenes
from rsmtdf_cache.tiling.dealing import Dealt, deal_windows, labeled_lists
from rsmtdf_cache.tiling.finding import FoundScene, find_scenes
from rsmtdf_cache.tiling.layout import Layout, common_pixels, lay_out
from rsmtdf_cache.tiling.measuring import measure_scale
from rsmtdf_cache.tiling.request import TileRequest
from rsmtdf_cache.yaml_file import read_yaml

__all__ = ["RECORD", "TilePlan", "plan_tiles", "tile"]

RECORD = "tile.json"
#: Windows that are looked at for values, and how many values are named.
_LOOK_PX, _LISTED = 512, 40


@dataclass(frozen=True)
class TilePlan:
    """All that the folder will say. ``record``: what was asked, as JSON; another one is another dataset."""

    header: DatasetHeader
    layout: Layout
    dealt: Dealt
    labeled: dict[str, list[str]]
    record: dict[str, Any]


def tile(request: TileRequest, on_event: EventSink = ignore_events) -> tuple[TilePlan, bool]:
    """Write the dataset folder of ``request``, complete or not at all; return it, and False when it was there.

    Raises ``DataError`` for scenes and labels at fault, ``UsageError`` for what cannot be asked, ``MismatchError`` when
    ``out`` holds anything else, ``Interrupted``, ``ResourceError``.
    """
    out = request.out.resolve()
    refuse_file(out)
    with workplace(out) as partial:
        plan = plan_tiles(request, on_event)
        if is_made(out, RECORD, plan.record["asked"], "dataset"):
            return plan, False
        _write(partial, out, plan)
        publish(partial, out)
    return plan, True


def plan_tiles(request: TileRequest, on_event: EventSink = ignore_events) -> TilePlan:
    """Return the dataset of ``request``; labels are read, nothing is written. Raises as ``tile`` does."""
    scenes, strays = find_scenes(request)
    for text in _unmatched(scenes, strays, request):
        on_event(Warned(text))
    scale = request.scale
    if scale is not None and len(scale) == 2:
        low, high = scale
        assert isinstance(low, float) and isinstance(high, float)
        scale = measure_scale(scenes, request.bands, (low, high), request.seed)
    asked = _asked_header(request, scenes)
    if asked.pixels is not None:
        bands, scale = request.bands or asked.pixels.bands, scale or asked.pixels.scale
    else:
        bands = request.bands
    rule, faults = common_pixels(scenes, bands, scale)
    if faults and request.strict:
        raise DataError(faults[0][1])
    for name, reason in faults:
        on_event(Warned(f"scene {name!r} is left out: {reason}"))
    usable = [scene for scene in scenes if scene.name not in dict(faults)]
    pixels = rule.to_json() | ({"scale": None} if rule == PixelRule(rule.bands, EIGHT_BIT, "uint8") else {})
    header = parse_header(_plain(asked) | {"pixels": {k: v for k, v in pixels.items() if v is not None}}, request.out)
    layout = replace(lay_out(usable, request, header, on_event), left_out=tuple(faults))
    if not layout.windows:
        raise DataError(f"{len(usable)} scenes have no tile with data; look at their no-data values and masks")
    overlap = request.cut.overlap_px > 0
    dealt = deal_windows(
        layout.windows, request.val, request.test, request.split_by, request.block, request.seed, overlap
    )
    labeled = labeled_lists(dealt.splits["train"], request.percents, request.seed)
    for text in _warnings(layout, request, labeled):
        on_event(Warned(text))
    return TilePlan(header, layout, dealt, labeled, _record(request, header, scenes, layout, dealt))


def _asked_header(request: TileRequest, scenes: list[FoundScene]) -> DatasetHeader:
    """Return what the classes file and the request say; its ``pixels`` are what they may become."""
    if request.classes is None:
        raise UsageError(
            "--classes: name a YAML file with the classes; their order is their number, values say what stands in the "
            "labels:\n  classes:\n    - {name: water, color: [38, 102, 178], values: [1]}\n    - {name: forest, "
            f"color: [34, 110, 60], values: [2, 3]}}{_found_values(scenes)}"
        )
    data = read_yaml(request.classes, "classes")
    data |= {"kind": "scenes", "masks": "partial", "tile_px": request.cut.tile_px}
    data.setdefault("name", request.name or request.out.name)
    if request.name is not None:
        data["name"] = request.name
    vectors = {is_vector_file(scene.labels) for scene in scenes if scene.labels is not None}
    if len(vectors) > 1:
        raise DataError(f"labels {request.labels}: some are rasters, some polygons; give one kind")
    if vectors == {True}:
        labels = data.get("labels") or {}
        if isinstance(labels, dict):
            data["labels"] = {"kind": "polygons"} | labels
    header = parse_header(data, request.classes)
    kind = header.labels.kind if header.labels is not None else "values"
    if vectors and (vectors == {True}) != (kind == "polygons"):
        raise DataError(f"{request.classes}: labels.kind is {kind}, and {request.labels} holds something else")
    return header


def _found_values(scenes: list[FoundScene]) -> str:
    """Return what the first labels hold, seen in a few windows: what a classes file has to name."""
    labels = next((s.labels for s in scenes if s.labels is not None and not is_vector_file(s.labels)), None)
    if labels is None:
        return ""
    try:
        with gdal_settings(), open_labels(labels, "values") as raster:
            height, width = min(_LOOK_PX, raster.height), min(_LOOK_PX, raster.width)
            tops, lefts = (range(0, side, max(side // 4, 1)) for side in (raster.height, raster.width))
            seen: set[int] = set()
            for y, x in ((y, x) for y in tops for x in lefts):
                values, known = raster.read(y, x, min(height, raster.height - y), min(width, raster.width - x))
                seen.update(int(v) for v in np.unique(values[known]))
    except DataError:
        return ""
    listed = ", ".join(map(str, sorted(seen)[:_LISTED])) + (" …" if len(seen) > _LISTED else "")
    return f"\nSeen in {labels.name}: {listed}"


def _plain(header: DatasetHeader) -> dict[str, Any]:
    return header.model_dump(mode="json", exclude_none=True)


def _unmatched(scenes: list[FoundScene], strays: list[Path], request: TileRequest) -> list[str]:
    """Return one sentence on labels of no scene, one on scenes without labels."""
    texts = []
    if strays:
        texts.append(f"{len(strays)} files of labels belong to no scene (first {strays[0].name})")
    bare = [scene.name for scene in scenes if scene.labels is None]
    if request.labels is not None and bare:
        texts.append(f"{len(bare)} of {len(scenes)} scenes have no labels (first {bare[0]!r}): their tiles have none")
    return texts


def _warnings(layout: Layout, request: TileRequest, labeled: dict[str, list[str]]) -> list[str]:
    texts = []
    if layout.slow:
        texts.append(
            f"{len(layout.slow)} scenes are stored in long strips or large blocks (first {layout.slow[0]!r}): to read "
            f"a tile of {request.cut.tile_px} px decodes many times as much. Rewrite them once: gdal_translate -of COG"
        )
    if request.labels is not None and not labeled:
        texts.append("no tile of train has a label")
    unplaced = [r.scene for r in layout.rasters if r.crs is None]
    if unplaced:
        texts.append(f"{len(unplaced)} scenes have no CRS (first {unplaced[0]!r}): their tiles will have no place")
    return texts


def _record(
    request: TileRequest, header: DatasetHeader, scenes: list[FoundScene], layout: Layout, dealt: Dealt
) -> dict[str, Any]:
    def seen(path: Path) -> list[Any]:
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns]

    return {
        "asked": {
            "header": _plain(header),
            "scenes": [[s.name, *seen(s.image), *(seen(s.labels) if s.labels is not None else [])] for s in scenes],
            "tile_px": request.cut.tile_px,
            "overlap_px": request.cut.overlap_px,
            "val": [str(request.val.share), *request.val.patterns],
            "test": [str(request.test.share), *request.test.patterns],
            "split_by": dealt.by,
            "block": dealt.block,
            "seed": request.seed,
            "labeled": list(request.percents),
        },
        "empty": layout.empty,
        "left_out": [{"scene": name, "reason": reason} for name, reason in layout.left_out],
    }


def _write(folder: Path, root: Path, plan: TilePlan) -> None:
    header = yaml.safe_dump(_plain(plan.header), sort_keys=False, allow_unicode=True, default_flow_style=None)
    (folder / "dataset.yaml").write_text(header, encoding="utf-8")
    write_rasters(folder, root, plan.layout.rasters)
    cells = {w.id: SceneCell(w.scene, w.row_px, w.column_px, w.labeled) for w in plan.layout.windows}
    write_scenes(folder, cells)
    (folder / "splits" / "labeled").mkdir(parents=True)
    for split, windows in plan.dealt.splits.items():
        _write_list(folder / "splits" / f"{split}.txt", [w.id for w in windows])
    for percent, ids in plan.labeled.items():
        _write_list(folder / "splits" / "labeled" / f"{percent}.txt", ids)
    (folder / RECORD).write_text(json.dumps(plan.record, indent=1) + "\n", encoding="utf-8")


def _write_list(path: Path, ids: list[str]) -> None:
    path.write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
