"""Rebuild damaged records from what they were about: a store says most things twice.

Nothing is believed for being plausible. A rebuilt record counts when its bytes have the sha256 that the head lists, or
when the store it gives has the root of the head or of a recorded snapshot (a Merkle root proves every shard's sha256).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import (
    fsync_file,
    fsync_folder,
    make_folders,
    read_json,
    remove_file,
    rename_file,
    replace_json,
    sha256_file,
)
from rsmtdf_cache.head import Head, read_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.tiles import TileRecord, TileTable, read_segment, segment_bytes
from rsmtdf_cache.upkeep.survey import survey

__all__ = ["Repaired", "discard", "propose", "recover_manifest", "recover_tiles", "sound_head"]


@dataclass(frozen=True)
class Repaired:
    """One file (below the store) and what was done about it."""

    path: str
    action: str


def sound_head(paths: StorePaths) -> Head | None:
    """Return the head, None when it is missing or damaged."""
    try:
        return read_head(paths)
    except (FindingsError, FileNotFoundError):
        return None


def propose(paths: StorePaths, place: Path, value: Mapping[str, Any], head: Head | None, proven: bool = False) -> bool:
    """Put ``value`` at ``place`` if the head lists just these bytes, or it is ``proven``; return whether it was put."""
    draft = paths.tmp / f"{place.name}.{uuid.uuid4().hex}"
    make_folders(paths.tmp)
    replace_json(draft, value)
    return _settle(paths, place, draft, head, proven)


def _settle(paths: StorePaths, place: Path, draft: Path, head: Head | None, proven: bool) -> bool:
    listed = head.files.get(paths.relative(place)) if head is not None else None
    if not proven and (listed is None or listed[1] != sha256_file(draft)):
        remove_file(draft)
        return False
    make_folders(place.parent)
    rename_file(draft, place)
    fsync_folder(place.parent)
    return True


def discard(path: Path) -> None:
    """Remove a file for good."""
    remove_file(path)
    fsync_folder(path.parent)


def recover_manifest(paths: StorePaths) -> list[Repaired]:
    """Make ``manifest.json`` good again from the attributes of the zarr root, when it is damaged or missing.

    Raises ``FindingsError`` when that is damaged too, ``UsageError`` or ``MismatchError`` when there is no store.
    """
    try:
        load_manifest(paths)
        return []
    except FindingsError:
        pass
    except MismatchError:
        if paths.manifest.is_file() or not paths.ledger.is_dir():
            raise
    head = sound_head(paths)
    try:
        attributes = json.loads((paths.zarr / "zarr.json").read_bytes())["attributes"]
        manifest = Manifest.model_validate(attributes)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise FindingsError(f"{paths.manifest}: damaged, and so is zarr/zarr.json, which repeats it") from None
    if not propose(paths, paths.manifest, manifest.model_dump(mode="json"), head, proven=head is None):
        raise FindingsError(f"{paths.manifest}: damaged, and what zarr/zarr.json repeats is not what the head lists")
    return [Repaired("manifest.json", "rebuilt from the attributes of the zarr root")]


def recover_tiles(paths: StorePaths) -> list[Repaired]:
    """Make the tile table good again: each segment's Parquet file from the zarr mirror, its record from the file."""
    head, damaged = sound_head(paths), survey(paths).damaged
    names = {p.stem for p in (paths.ledger / "tiles").glob("[0-9]*.*")}
    names |= {Path(p).stem for p in (head.files if head is not None else {}) if p.startswith("ledger/tiles/")}
    done = []
    for first in sorted(int(n) for n in names if n.isdecimal()):
        record = paths.tile_segment(first)
        file = record.with_suffix(".parquet")
        lost = {p for p in (record, file) if paths.relative(p) in damaged or not p.is_file()}
        if not lost:
            continue
        mirrored = _mirrored(paths, first, min((n for n in map(int, names) if n > first), default=None))
        if _is_sound(paths, file, record, head):
            lost.discard(file)
        elif mirrored is not None and _rebuild_file(paths, file, record, mirrored, head):
            done.append(Repaired(paths.relative(file), "rebuilt from the zarr mirror of the tile table"))
        if record in lost and file.is_file() and _rebuild_record(paths, record, file, mirrored, head):
            done.append(Repaired(paths.relative(record), "rebuilt from its Parquet file"))
    return done


def _recorded(record: Path) -> dict[str, Any] | None:
    try:
        return read_json(record)
    except (FindingsError, FileNotFoundError):
        return None


def _is_sound(paths: StorePaths, file: Path, record: Path, head: Head | None) -> bool:
    if not file.is_file():
        return False
    body, listed = _recorded(record), head.files.get(paths.relative(file)) if head is not None else None
    return sha256_file(file) in (body and body.get("sha256"), listed and listed[1])


def _rebuild_file(paths: StorePaths, file: Path, record: Path, mirrored: list[TileRecord], head: Head | None) -> bool:
    draft, body = paths.tmp / f"{file.name}.{uuid.uuid4().hex}", _recorded(record)
    make_folders(paths.tmp)
    draft.write_bytes(segment_bytes(mirrored))
    with draft.open("rb+") as handle:
        fsync_file(handle, draft)
    return _settle(paths, file, draft, head, body is not None and body.get("sha256") == sha256_file(draft))


def _rebuild_record(
    paths: StorePaths, record: Path, file: Path, mirrored: list[TileRecord] | None, head: Head | None
) -> bool:
    try:
        tiles = read_segment(file)
        tiles.check()
        body = {
            "first_row": int(record.stem), "rows": len(tiles), "file": file.name, "sha256": sha256_file(file),
            "splits": TileTable([(0, tiles)]).splits,
        }  # fmt: skip
    except FindingsError:
        return False
    # Without a head that lists it, the mirror must say the same to the last byte.
    return propose(
        paths, record, body, head, proven=mirrored is not None and segment_bytes(mirrored) == file.read_bytes()
    )


def _mirrored(paths: StorePaths, first: int, following: int | None) -> list[TileRecord] | None:
    """Return the tiles from row ``first`` on as the zarr hierarchy has them, None when it cannot be read."""
    import zarr

    try:
        root: Any = zarr.open_group(paths.zarr, mode="r", use_consolidated=False)
        columns = {n: root[n][first:following] for n in ("tile", *(f"tiles/{c}" for c in _COLUMNS))}
    except Exception:  # a damaged hierarchy makes zarr raise errors of many kinds
        return None
    return list(_rows(columns))


_COLUMNS = ("content", "split", "source", "crs", "affine")


def _rows(columns: Mapping[str, Any]) -> Iterator[TileRecord]:
    for name, content, split, source, crs, affine in zip(
        columns["tile"], *(columns[f"tiles/{c}"] for c in _COLUMNS), strict=True
    ):
        if not name:
            return  # the hole before the next segment
        place = () if np.isnan(affine).all() else tuple(float(v) for v in affine)
        yield TileRecord(str(name), np.asarray(content, np.uint8).tobytes(), str(split), str(source), str(crs), place)
