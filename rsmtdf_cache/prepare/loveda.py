"""LoveDA: ``Train|Val/Rural|Urban/images_png|masks_png/ID.png``, 1024 px, masks of values (0 = no data).

Tiles are called ``train_rural_ID_K``: the official numbers alone need not differ between parts and domains. ``K`` is 1
upper left, 2 upper right, 3 lower left, 4 lower right; published lists call the tile ``ID_K``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.benchmark import Benchmark, Found, Published, Scene, pair, require_name
from rsmtdf_cache.prepare.labels import IGNORE, ValueLabels
from rsmtdf_cache.prepare.member import Member
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["LOVEDA"]

_PLACE = re.compile(
    r"(?:^|.*/)(train|val|test)/(rural|urban)/(images_png|masks_png)/([^/]+)\.png", re.IGNORECASE | re.ASCII
)
_CLASSES = (
    ClassInfo("background", (255, 255, 255)),
    ClassInfo("building", (255, 0, 0)),
    ClassInfo("road", (255, 255, 0)),
    ClassInfo("water", (0, 0, 255)),
    ClassInfo("barren", (159, 129, 183)),
    ClassInfo("forest", (0, 255, 0)),
    ClassInfo("agriculture", (255, 195, 128)),
)


def _find(members: Sequence[Member]) -> Found:
    images: dict[str, list[Member]] = {}
    labels: dict[str, list[Member]] = {}
    test = 0
    for member in members:
        match = _PLACE.fullmatch(member.name)
        if match is None:
            continue
        part, domain, folder, number = match[1].lower(), match[2].lower(), match[3].lower(), match[4]
        if part == "test":
            test += folder == "images_png"
            continue
        side = images if folder == "images_png" else labels
        side.setdefault(f"{part}_{domain}_{require_name(number, member)}", []).append(member)
    notes: list[str] = []
    pairs = pair("LoveDA", images, labels, notes)
    parts = Counter(key.partition("_")[0] for key in pairs)
    for part in ("train", "val"):
        if not parts[part]:
            raise DataError(
                f"LoveDA: no {part.title()} images; expected {part.title()}/Rural/images_png/ID.png and Urban in the "
                "folder, zip or tar files that are given (Train.zip and Val.zip, side by side or unpacked)"
            )
    if test:
        notes.append(f"Test is left out: {test} images without labels that can be had")
    scenes = []
    for key, (image, label) in pairs.items():
        part, domain, number = key.split("_", 2)
        scenes.append(Scene(key, image, label, (number,), part, domain))
    return Found(scenes, notes)


LOVEDA = Benchmark(
    name="loveda",
    side_px=1024,
    classes=_CLASSES,
    labels=ValueLabels({0: IGNORE, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6}),
    published=Published(
        scenes={"train": 2522, "val": 1669},
        tiles={"train": 10088, "val": 3338, "test": 3338},
        labeled={"1": 100, "5": 504, "10": 1008},
    ),
    attribution="LoveDA (Wang et al., 2021); its own terms of use hold",
    skip=lambda name: False,
    find=_find,
    official_val=True,
)
