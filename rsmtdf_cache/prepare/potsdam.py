"""ISPRS Potsdam: ``2_Ortho_RGB/*_RGB.tif`` and ``5_Labels_all/*_label.tif``, 38 scenes of 6000 px, labels in colours.

Tiles are called ``top_potsdam_2_10_K``, ``K`` from 1 to 144 row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.benchmark import Benchmark, Found, Published, Scene, pair
from rsmtdf_cache.prepare.labels import IGNORE, ColorLabels
from rsmtdf_cache.prepare.member import Member
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["POTSDAM", "with_clutter"]

_FILE = re.compile(r"(?:^|.*/)(top_potsdam_\d+_\d+)_(rgb|label)\.tiff?", re.IGNORECASE | re.ASCII)
#: What looks like a scene by the end of its name.
_ALIKE = re.compile(r"_(rgb|label)\.tiff?$", re.IGNORECASE)
#: Other products in the same download: heights, infrared, labels with eroded borders or of the first 24 scenes.
_OTHER = re.compile(r"DSM|IRRG|RGBIR|noBoundary|participants|assess", re.IGNORECASE)
_CLUTTER = ClassInfo("clutter", (255, 0, 0))
_CLASSES = (
    ClassInfo("impervious", (255, 255, 255)),
    ClassInfo("building", (0, 0, 255)),
    ClassInfo("low_vegetation", (0, 255, 255)),
    ClassInfo("tree", (0, 255, 0)),
    ClassInfo("car", (255, 255, 0)),
)
_COLORS = {c.color: number for number, c in enumerate(_CLASSES)}


def _find(members: Sequence[Member]) -> Found:
    images: dict[str, list[Member]] = {}
    labels: dict[str, list[Member]] = {}
    strangers: list[Member] = []
    for member in members:
        if any(map(_OTHER.search, member.name.split("/")[:-1])):
            continue
        match = _FILE.fullmatch(member.name)
        if match is None:
            strangers += [member] if _ALIKE.search(member.name) else []
            continue
        side = images if match[2].lower() == "rgb" else labels
        side.setdefault(match[1].lower(), []).append(member)
    if not images and not labels:
        raise DataError(
            "Potsdam: no scenes; expected 2_Ortho_RGB/top_potsdam_2_10_RGB.tif and 5_Labels_all/"
            "top_potsdam_2_10_label.tif in the folder or archives that are given (Potsdam.zip as it is will do)"
        )
    notes: list[str] = []
    if strangers:
        notes.append(
            f"{len(strangers)} files are left out, for they are not called as in top_potsdam_2_10_RGB.tif "
            f"(first: {strangers[0].name})"
        )
    pairs = pair("Potsdam", images, labels, notes)
    scenes = [Scene(k, i, m, (k, f"{k}_RGB", f"{k}_label")) for k, (i, m) in pairs.items()]
    return Found(scenes, notes)


POTSDAM = Benchmark(
    name="potsdam",
    side_px=6000,
    classes=_CLASSES,
    labels=ColorLabels({**_COLORS, _CLUTTER.color: IGNORE}),
    published=Published(
        scenes={"": 38},
        tiles={"train": 3283, "val": 1094, "test": 1095},
        labeled={"1": 32, "5": 164, "10": 328},
    ),
    attribution="ISPRS 2D Semantic Labeling, Potsdam; its own terms of use hold",
    skip=lambda name: _OTHER.search(name) is not None,
    find=_find,
)


def with_clutter() -> Benchmark:
    """Return Potsdam with clutter as class 5 instead of ignored pixels."""
    return replace(POTSDAM, classes=(*_CLASSES, _CLUTTER), labels=ColorLabels({**_COLORS, _CLUTTER.color: 5}))
