"""A benchmark as distributed to a folder dataset: each scene decoded once, all its tiles cut, on all cores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from rsmtdf_cache.cores import usable_cores
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import require_space
from rsmtdf_cache.memory import memory_nbytes
from rsmtdf_cache.prepare.benchmark import Scene
from rsmtdf_cache.prepare.cutting import cut_tile
from rsmtdf_cache.prepare.labels import IGNORE
from rsmtdf_cache.prepare.member import read_member
from rsmtdf_cache.prepare.pixels import read_rgb
from rsmtdf_cache.prepare.plan import Plan, Request, make_plan
from rsmtdf_cache.prepare.splitting import Cell
from rsmtdf_cache.prepare.workplace import SpoolFolder, is_made, publish, refuse_file, spool_only, workplace
from rsmtdf_cache.rasters.png import encode_png
from rsmtdf_cache.share.parallel import Counter, run_jobs
from rsmtdf_cache.sources.scenes import SceneCell, write_domains, write_scenes

__all__ = ["Prepared", "RECORD", "estimate", "prepare"]

RECORD = "prepare.json"
_BYTES_A_PIXEL = 14  # of a scene at work: file, image, labels as stored, codes of a band, class numbers


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did: ``written`` is False when the same preparation was there. ``unknown`` counts by scene."""

    plan: Plan
    written: bool
    nbytes: int = 0
    unknown: Mapping[str, int] | None = None


def prepare(request: Request, on_event: EventSink = ignore_events) -> Prepared:
    """Write the folder dataset of ``request`` to its ``out``, which appears complete or not at all.

    Besides what every folder dataset has: ``prepare.json`` (what was asked, counts), ``scenes.csv``, and
    ``domains.csv`` where there are domains. Raises ``DataError`` for input at fault, ``UsageError`` for what cannot be
    asked, ``MismatchError`` when ``out`` holds anything else, ``Interrupted``, ``ResourceError``.
    """
    out = request.out.resolve()
    refuse_file(out)
    with workplace(out) as partial:
        spool = SpoolFolder(partial / ".spool")
        plan = make_plan(request, spool)
        for text in plan.warnings:
            on_event(Warned(text))
        if is_made(out, RECORD, plan.record["asked"], "preparation"):
            return Prepared(plan, False)
        nbytes, scene = _scene_estimate(plan, request)
        advice = "choose another place, or fewer scenes"
        require_space(partial, nbytes, f"dataset (estimated from scene {scene})", advice)
        unknown, written = _write_tiles(partial, plan, request, on_event)
        _write_texts(partial, plan, unknown)
        if spool.folder.exists():
            shutil.rmtree(spool.folder)
        publish(partial, out)
    if unknown:
        on_event(Warned(_said(unknown)))
    return Prepared(plan, True, written, unknown)


def estimate(request: Request) -> tuple[Plan, int]:
    """Return the plan of ``request`` and about how many bytes it will write: one scene is cut and packed, none kept.

    Raises as ``prepare`` does.
    """
    out = request.out.resolve()
    refuse_file(out)
    with spool_only(out) as spool:
        plan = make_plan(request, spool)
        is_made(out, RECORD, plan.record["asked"], "preparation")
        return plan, _scene_estimate(plan, request)[0]


def _scene_estimate(plan: Plan, request: Request) -> tuple[int, str]:
    """Return the bytes of all tiles as told by one scene, and its id."""
    scene, cells = next(iter(_by_scene(plan).items()))
    nbytes = sum(len(data) for _, data in _tiles(scene, cells, plan, request, {}))
    return nbytes * len(plan.cells) // len(cells), scene.id


def _by_scene(plan: Plan) -> dict[Scene, list[Cell]]:
    found: dict[Scene, list[Cell]] = {}
    for cell in plan.cells:
        found.setdefault(cell.scene, []).append(cell)
    return found


def _tiles(
    scene: Scene, cells: list[Cell], plan: Plan, request: Request, unknown: dict[str, int]
) -> Iterator[tuple[str, bytes]]:
    """Yield path within the dataset and PNG file of image and mask of every cell of ``scene``."""
    image = read_rgb(read_member(scene.image, request.limits), scene.image.place)
    labels = plan.benchmark.labels
    stored = labels.read(read_member(scene.label, request.limits), scene.label.place)
    if stored.shape[:2] != image.shape[:2]:
        raise DataError(
            f"{scene.label.place} is {stored.shape[1]} x {stored.shape[0]} px, its image {scene.image.place} "
            f"{image.shape[1]} x {image.shape[0]} px; they have to be the same"
        )
    side = plan.benchmark.side_px
    if request.cut is None and image.shape[:2] != (side, side):
        raise DataError(
            f"{scene.image.place} is {image.shape[1]} x {image.shape[0]} px, scenes of {plan.benchmark.name} are "
            f"{side} x {side}; give --tile to cut others"
        )
    mask, strangers = labels.convert(stored, scene.label.place, request.unknown_labels)
    del stored
    if strangers:
        unknown[scene.id] = strangers
    for cell in cells:
        pixels, classes = cut_tile(image, mask, (cell.top_px, cell.left_px), plan.cut.tile_px)
        yield f"images/{cell.id}.png", encode_png(pixels)
        yield f"masks/{cell.id}.png", encode_png(classes)


def _write_tiles(root: Path, plan: Plan, request: Request, on_event: EventSink) -> tuple[dict[str, int], int]:
    unknown: dict[str, int] = {}
    total = 0
    for folder in ("images", "masks"):
        (root / folder).mkdir()

    def job(scene: Scene, cells: list[Cell]) -> Callable[[Counter], None]:
        def run(count: Counter) -> None:
            for path, data in _tiles(scene, cells, plan, request, unknown):
                (root / path).write_bytes(data)
                count(len(data), int(path.startswith("masks/")))

        return run

    def told(nbytes: int, tiles: int) -> None:
        nonlocal total
        total += nbytes
        on_event(Progress("prepare", tiles, nbytes))

    scenes = _by_scene(plan)
    on_event(ProgressStart("prepare", f"cutting {plan.name}", len(plan.cells)))
    for _ in run_jobs(((s.id, job(s, cells)) for s, cells in scenes.items()), _workers(plan, request), told):
        pass
    on_event(ProgressEnd("prepare"))
    return dict(sorted(unknown.items())), total


def _workers(plan: Plan, request: Request) -> int:
    """Return how many scenes are worked on at once: one a core, as long as half of the memory holds them."""
    if request.workers is not None:
        return request.workers
    cores = usable_cores()
    memory = memory_nbytes()
    if not memory:
        return cores
    return max(1, min(cores, memory // 2 // (_BYTES_A_PIXEL * plan.benchmark.side_px**2)))


def _write_texts(root: Path, plan: Plan, unknown: Mapping[str, int]) -> None:
    cells = plan.cells
    header = {
        "name": plan.name,
        "tile_px": plan.cut.tile_px,
        "ignore_index": IGNORE,
        "masks": "complete",
        "attribution": plan.benchmark.attribution,
        "classes": [{"name": c.name, "color": list(c.color)} for c in plan.benchmark.classes],
    }
    _write(root / "dataset.yaml", yaml.safe_dump(header, sort_keys=False, allow_unicode=True))
    for split, members in plan.splits.items():
        _write(root / "splits" / f"{split}.txt", "".join(f"{cell.id}\n" for cell in members))
    for percent, ids in plan.labeled.items():
        _write(root / "splits" / "labeled" / f"{percent}.txt", "".join(f"{i}\n" for i in ids))
    write_scenes(root, {c.id: SceneCell(c.scene.id, c.top_px, c.left_px) for c in cells})
    if any(c.scene.domain for c in cells):
        write_domains(root, {c.id: c.scene.domain for c in cells})
    record = {**plan.record, "unknown_pixels": dict(unknown)}
    _write(root / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _said(unknown: Mapping[str, int]) -> str:
    scene, count = next(iter(unknown.items()))
    total = sum(unknown.values())
    return f"{total} pixels of {len(unknown)} scenes had no known label and are ignored (first {scene}: {count})"
