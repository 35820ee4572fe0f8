"""DeepGlobe land cover: ``ID_sat.jpg`` and ``ID_mask.png``, 803 labelled scenes of 2448 px, labels in colours.

Tiles are called ``ID_K``, ``K`` from 1 to 25 row by row. A colour channel counts as 255 from 128 on and as 0 below, as
the data's own description asks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.benchmark import Benchmark, Found, Published, Scene, pair, require_name
from rsmtdf_cache.prepare.labels import IGNORE, ColorLabels
from rsmtdf_cache.prepare.member import Member
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["DEEPGLOBE"]

_FILE = re.compile(r"(?:(.*)/)?([^/]+)_(sat\.jpe?g|mask\.png)", re.IGNORECASE | re.ASCII)
_CLASSES = (
    ClassInfo("urban", (0, 255, 255)),
    ClassInfo("agriculture", (255, 255, 0)),
    ClassInfo("rangeland", (255, 0, 255)),
    ClassInfo("forest", (0, 255, 0)),
    ClassInfo("water", (0, 0, 255)),
    ClassInfo("barren", (255, 255, 255)),
)
_UNKNOWN = (0, 0, 0)


def _find(members: Sequence[Member]) -> Found:
    found = [(member, match) for member in members if (match := _FILE.fullmatch(member.name))]
    labelled = {match[1] for _, match in found if match[3].lower() == "mask.png"}
    images: dict[str, list[Member]] = {}
    labels: dict[str, list[Member]] = {}
    bare = 0
    for member, match in found:
        if match[1] not in labelled:  # the folders valid and test come without masks
            bare += 1
            continue
        side = labels if match[3].lower() == "mask.png" else images
        side.setdefault(require_name(match[2], member), []).append(member)
    if not labels:
        raise DataError(
            f"DeepGlobe: no labelled scenes ({bare} images without masks); expected ID_sat.jpg and ID_mask.png side by "
            "side in the folder or archives that are given"
        )
    notes = [f"{bare} images in folders without masks are left out"] if bare else []
    pairs = pair("DeepGlobe", images, labels, notes)
    scenes = [Scene(k, i, m, (k, f"{k}_sat", f"{k}_mask")) for k, (i, m) in pairs.items()]
    return Found(scenes, notes)


DEEPGLOBE = Benchmark(
    name="deepglobe",
    side_px=2448,
    classes=_CLASSES,
    labels=ColorLabels({**{c.color: n for n, c in enumerate(_CLASSES)}, _UNKNOWN: IGNORE}, threshold=128),
    published=Published(
        scenes={"": 803},
        tiles={"train": 12045, "val": 4015, "test": 4015},
        labeled={"1": 120, "5": 602, "10": 1204},
    ),
    attribution="DeepGlobe 2018 Land Cover Classification (Demir et al., 2018); its own terms of use hold",
    skip=lambda name: False,
    find=_find,
)
