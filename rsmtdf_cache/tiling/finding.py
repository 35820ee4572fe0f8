"""Which scenes there are, what they are called, and which labels belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import DataError, did_you_mean
from rsmtdf_cache.rasters.polygons import is_vector_file
from rsmtdf_cache.tiling.request import TileRequest

__all__ = ["FoundScene", "find_scenes"]

_SUFFIXES = {
    ".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ntf", ".ecw", ".sid", ".nc",
}  # fmt: skip
_NAME_MAX = 150


@dataclass(frozen=True)
class FoundScene:
    """One scene by its name, and the file of its labels, a raster or polygons, if any."""

    name: str
    image: Path
    labels: Path | None


def find_scenes(request: TileRequest) -> tuple[list[FoundScene], list[Path]]:
    """Return the scenes of ``request`` by name, and labels of no scene. A folder gives its rasters, no folders in it.

    Raises ``DataError`` for a missing file, a folder without rasters, two scenes of one name, labels of none of them.
    """
    images = sorted({path.absolute(): None for path in _files(request.scenes)})
    named: dict[str, Path] = {}
    for path in images:
        name = _name(path)
        if name in named:
            raise DataError(f"{named[name]} and {path} would both be scene {name!r}; give the files other names")
        named[name] = path
    labels, strays = _labels(request, named)
    return [FoundScene(name, named[name], labels.get(name)) for name in sorted(named)], strays


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")]
            if not inside:
                raise DataError(f"{path}: no rasters in it ({', '.join(sorted(_SUFFIXES)[:4])}, …); give their folder")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise DataError(f"scene {path}: no such file or folder")


def _name(path: Path) -> str:
    """Return what a scene is called: the stem of its file, with ``-`` for what a tile id cannot have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).lstrip(".")[:_NAME_MAX] or "scene"


def _labels(request: TileRequest, named: dict[str, Path]) -> tuple[dict[str, Path], list[Path]]:
    asked = request.labels
    if asked is None:
        return {}, []
    if asked.is_file():
        if len(named) > 1 and not is_vector_file(asked):
            raise DataError(
                f"labels {asked}: one raster for {len(named)} scenes; give a folder with one for each (polygons may be "
                "one file)"
            )
        return dict.fromkeys(named, asked.absolute()), []
    if not asked.is_dir():
        raise DataError(f"labels {asked}: no such file or folder")
    there: dict[str, Path] = {}
    for path in sorted(asked.iterdir()):
        known = path.suffix.lower() in _SUFFIXES or is_vector_file(path)
        if path.name.startswith(".") or not known:
            continue
        if path.stem in there:
            raise DataError(f"labels {there[path.stem]} and {path} are of one scene; keep one of them")
        there[path.stem] = path.absolute()
    found = {}
    for name, image in named.items():
        stem = request.label_name.replace("{scene}", image.stem)
        if stem in there:
            found[name] = there[stem]
    if not found:
        first = next(iter(named.values()))
        stem = request.label_name.replace("{scene}", first.stem)
        raise DataError(
            f"labels {asked}: none of {len(named)} scenes has labels there; looked for {stem}.* and the like, found "
            f"{', '.join(p.name for p in list(there.values())[:3]) or 'no raster and no polygons'}."
            f"{did_you_mean(stem, there)} Name the pattern with --label-name, such as '{{scene}}_label'"
        )
    return found, sorted(set(there.values()) - set(found.values()))
