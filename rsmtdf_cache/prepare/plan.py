"""What a preparation will do, before the first pixel: scenes, tiles, splits, and how they compare to the published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import DataError, UsageError, did_you_mean
from rsmtdf_cache.prepare.archive import Spool, list_members
from rsmtdf_cache.prepare.benchmark import Benchmark, Found, Scene
from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.prepare.lists import Lists, read_lists
from rsmtdf_cache.prepare.member import Limits, Member, open_member
from rsmtdf_cache.prepare.pixels import image_side
from rsmtdf_cache.prepare.splitting import PROTOCOLS, Cell, deal, labeled_subsets, scenes_in_several
from rsmtdf_cache.specs import digest_of

__all__ = ["BENCHMARKS", "Plan", "Request", "get_benchmark", "make_plan"]

BENCHMARKS = ("deepglobe", "loveda", "potsdam")


@dataclass(frozen=True)
class Request:
    """What is asked for. With ``cut`` None the published cut is made, and sides and counts are held against it.

    ``lists``: files or folders of published split lists, instead of a protocol. ``unknown_labels``: ``error`` or
    ``ignore``. ``workers`` None: as many as cores and memory allow.
    """

    benchmark: str
    sources: tuple[Path, ...]
    out: Path
    protocol: str = "by-image"
    seed: int = 0
    percents: tuple[str, ...] = ("1", "5", "10")
    cut: Cut | None = None
    lists: tuple[Path, ...] = ()
    keep_clutter: bool = False
    unknown_labels: str = "error"
    strict: bool = False
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Plan:
    """Cells of every split, tile ids of the labelled subsets, sentences to be read, and the record of it all."""

    benchmark: Benchmark
    cut: Cut
    name: str
    splits: dict[str, list[Cell]]
    labeled: dict[str, list[str]]
    notes: list[str]
    warnings: list[str]
    record: dict[str, Any]

    @property
    def cells(self) -> list[Cell]:
        return [cell for cells in self.splits.values() for cell in cells]


def get_benchmark(name: str, keep_clutter: bool = False) -> Benchmark:
    """Return the benchmark called ``name``. Raises ``UsageError``."""
    from rsmtdf_cache.prepare.deepglobe import DEEPGLOBE
    from rsmtdf_cache.prepare.loveda import LOVEDA
    from rsmtdf_cache.prepare.potsdam import POTSDAM, with_clutter

    known = {b.name: b for b in (DEEPGLOBE, LOVEDA, POTSDAM)}
    if name not in known:
        raise UsageError(f"no benchmark {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}")
    if keep_clutter and name != "potsdam":
        raise UsageError(f"clutter is a class of Potsdam; {name} has none to keep")
    return with_clutter() if keep_clutter else known[name]


def make_plan(request: Request, spool: Spool) -> Plan:
    """Return the plan of ``request``. Nothing is decoded; packed inner archives are unpacked by way of ``spool``.

    Raises ``UsageError`` and ``DataError``; with ``strict`` also for counts that are not the published ones.
    """
    benchmark = get_benchmark(request.benchmark, request.keep_clutter)
    if request.protocol not in PROTOCOLS:
        raise UsageError(f"no protocol {request.protocol!r}; there are {' and '.join(PROTOCOLS)}")
    if request.unknown_labels not in ("error", "ignore"):
        raise UsageError(f"unknown labels can be an error or ignored, not {request.unknown_labels!r}")
    if request.strict and request.cut is not None:
        raise UsageError(
            "--strict holds counts against the published ones, which are those of 512-px tiles without overlap; leave "
            "out --tile and --overlap, or --strict"
        )
    members = list_members(request.sources, spool, request.limits, benchmark.skip)
    found = benchmark.find(members)
    cut = request.cut or Cut()
    places = cut.places(benchmark.side_px, benchmark.side_px) if request.cut is None else None
    cells = _cells(found, cut, places, request)
    lists = read_lists(request.lists, cells) if request.lists else None
    if lists is None:
        splits = deal(cells, request.protocol, request.seed, benchmark.name, benchmark.official_val)
        labeled = labeled_subsets(splits["train"], request.percents, request.seed, benchmark.name)
    else:
        splits, labeled = lists.splits, lists.labeled
    notes, warnings = list(found.notes), _differences(benchmark, found, splits, labeled, request, lists)
    if request.strict and warnings:
        raise DataError(f"{benchmark.name}: not as published: {'; '.join(warnings)}. Leave --strict out to go on")
    notes += _leakage(splits, cut)
    if lists is not None and (rest := len(cells) - sum(map(len, splits.values()))):
        notes.append(f"{rest} tiles are in no list and are left out")
    record = _record(request, benchmark, cut, found, members, splits, labeled, notes + warnings)
    return Plan(benchmark, cut, record["name"], splits, labeled, notes, warnings, record)


def _cells(found: Found, cut: Cut, places: list[tuple[int, int]] | None, request: Request) -> list[Cell]:
    cells = []
    for scene in found.scenes:
        here = places if places is not None else cut.places(*_side(scene, request.limits))
        cells += [Cell(scene, number, top, left) for number, (top, left) in enumerate(here, start=1)]
    return cells


def _side(scene: Scene, limits: Limits) -> tuple[int, int]:
    with open_member(scene.image, limits) as file:
        return image_side(file, scene.image.place)


def _differences(
    benchmark: Benchmark, found: Found, splits: dict[str, list[Cell]], labeled: dict[str, list[str]],
    request: Request, lists: Lists | None,
) -> list[str]:  # fmt: skip
    """Return where counts are not the published ones, each as a sentence."""
    if request.cut is not None:
        return []
    published, texts = benchmark.published, []
    scenes = Counter(scene.part for scene in found.scenes)
    for part, expected in published.scenes.items():
        if scenes[part] != expected:
            what = f"scenes in {part.title()}" if part else "labelled scenes"
            texts.append(f"{scenes[part]} {what}, published are {expected}")
    if not texts and (lists is not None or request.protocol == "by-tile"):
        for split, expected in published.tiles.items():
            if len(splits.get(split, ())) != expected:
                texts.append(f"{len(splits.get(split, ()))} {split} tiles, published are {expected}")
        for percent, expected in published.labeled.items():
            if percent in labeled and len(labeled[percent]) != expected:
                texts.append(f"{len(labeled[percent])} tiles labelled at {percent} %, published are {expected}")
    return texts


def _leakage(splits: dict[str, list[Cell]], cut: Cut) -> list[str]:
    shared = scenes_in_several(splits)
    if not shared:
        return []
    pixels = f", and neighbours share {cut.overlap_px} px of pixels" if cut.overlap_px else ""
    return [
        f"{shared} scenes have tiles in several splits{pixels}: scores compare with papers that split so, and are "
        "higher than on unseen scenes (by-image keeps scenes apart)"
    ]


def _record(
    request: Request, benchmark: Benchmark, cut: Cut, found: Found, members: Sequence[Member],
    splits: dict[str, list[Cell]], labeled: dict[str, list[str]], said: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return ``prepare.json``: no time, host or path in it, so that equal preparations are equal files."""
    used = {m.name: [m.nbytes, m.crc] for scene in found.scenes for m in (scene.image, scene.label)}
    asked: dict[str, Any] = {
        "benchmark": benchmark.name,
        "protocol": "lists" if request.lists else request.protocol,
        "seed": None if request.lists else request.seed,
        "tile_px": cut.tile_px,
        "overlap_px": cut.overlap_px,
        "keep_clutter": request.keep_clutter,
        "unknown_labels": request.unknown_labels,
        "splits": digest_of({s: [c.id for c in cells] for s, cells in splits.items()} | {"labeled": labeled}),
        "sources": digest_of(used),
    }
    published = None
    if request.cut is None:
        known = benchmark.published
        published = {
            "scenes": sum(known.scenes.values()),
            "tiles": dict(known.tiles),
            "labeled": dict(known.labeled),
        }
    words = [benchmark.name, asked["protocol"]]
    words += [] if request.lists else [f"seed{request.seed}"]
    words += [f"{cut.tile_px}px-overlap{cut.overlap_px}"] if request.cut is not None else []
    words += ["clutter"] if request.keep_clutter else []
    return {
        "name": "-".join(words),
        "asked": asked,
        "scenes": len(found.scenes),
        "tiles": {split: len(cells) for split, cells in splits.items()},
        "labeled": {percent: len(ids) for percent, ids in labeled.items()},
        "published": published,
        "notes": said,
    }
