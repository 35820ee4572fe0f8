"""The store that is tortured: a tiny dataset, the build that makes it, and what an undisturbed build gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsmtdf_cache import writer
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.files import sha256_file
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher
from tests.torture.processes import in_child

__all__ = ["Audit", "Scene", "audit", "build", "difference", "difference_here", "make_scene", "read_everything"]


@dataclass(frozen=True)
class Scene:
    """``whole`` is the store of an undisturbed build of ``data``; ``seconds`` is how long it took."""

    data: Path
    whole: Path
    seconds: float

    def reference(self) -> dict[str, Any]:
        """Return what ``describe`` of the whole store gives; opens nothing in this process."""
        found: dict[str, Any] = in_child(lambda: FeatureStore.open(self.whole).describe())
        return found


@dataclass(frozen=True)
class Audit:
    """``units``: the committed units, ``set/group``. ``faults``: committed bytes that are not the whole store's."""

    units: frozenset[str]
    faults: tuple[str, ...]


def make_scene(folder: Path, tiles: int = 12) -> Scene:
    """Write the dataset below ``folder``, build the whole store, and return both."""
    data = write_dataset(folder / "data", tiles=tiles, tile_px=64)
    in_child(lambda: build(data, folder / "warm-up"))
    seconds: float = in_child(lambda: build(data, folder / "whole"))
    return Scene(data, folder / "whole", seconds)


def build(data: Path, out: Path, on_event: EventSink = ignore_events, pause: float = 0.0) -> float:
    """Build all tiles in two scales: 24 units of one tile and two layers for 12 tiles; return the seconds.

    ``pause``: seconds of rest after each numbered step of a commit, so that a kill meets each of them.
    """
    import time

    def rest(step: int) -> None:
        time.sleep(pause)

    started = time.perf_counter()
    torch.set_num_threads(1)
    if pause:
        writer.after_step = rest
    request = BuildRequest.of({
        "data": data, "out": out, "teachers": ["mean"], "splits": ["train", "val", "test"], "scales": [1.0, 0.5],
        "group_rows": 1, "threads": 1, "micro_batch": 2, "device": "cpu",
    })  # fmt: skip
    build_store(request, on_event, load_teacher=load_mean_teacher)
    return time.perf_counter() - started


def audit(out: Path, scene: Scene) -> Audit:
    """Return what is committed at ``out`` and where it differs from the whole store. In a child of this process."""
    found: dict[str, list[str]] = in_child(lambda: _audit(out, scene.whole))
    return Audit(frozenset(found["units"]), tuple(found["faults"]))


def difference(out: Path, scene: Scene) -> str:
    """Return how a finished store differs from the whole one, empty when in nothing. In a child of this process."""
    found: str = in_child(lambda: difference_here(out, scene.whole))
    return found


def read_everything(root: Path) -> str:
    """Return a digest of all that training reads from a store: tile ids and contents, features, statistics."""
    store = FeatureStore.open(root)
    digest = hashlib.sha256(repr((store.tile_px, store.tiles.ids)).encode() + store.tiles.digests.tobytes())
    keys = store.keys()
    for key in keys:
        mean, std = store.stats(key)
        digest.update(str(key).encode() + mean.tobytes() + std.tobytes() + store.committed(key).tobytes())
        found = store.read(key, [row for row, there in enumerate(store.committed(key)) if there])
        digest.update(found.values.tobytes() + found.valid.tobytes())
    return digest.hexdigest()


def _audit(out: Path, whole: Path) -> dict[str, list[str]]:
    """Compare every committed unit, its bytes and what a reader gets, with the whole store."""
    if not StorePaths(out).manifest.is_file():
        return {"units": [], "faults": []}
    mine, theirs = Ledger.load(StorePaths(out)), Ledger.load(StorePaths(whole))
    units, faults = [], []
    for name, groups in mine.commits.items():
        for group, commit in groups.items():
            units.append(f"{name}/{group}")
            wanted = {s.path: s.sha256 for s in theirs.commits[name][group].shards}
            for shard in commit.shards:
                place = out / shard.path
                if not place.is_file():
                    faults.append(f"{shard.path}: committed, and not there")
                elif not sha256_file(place) == shard.sha256 == wanted.get(shard.path):
                    faults.append(f"{shard.path}: other bytes than an undisturbed build's")
    try:
        faults += _reading_faults(out, whole)
    except FindingsError as error:
        faults.append(f"a reader is refused: {error}")
    return {"units": units, "faults": faults}


def _reading_faults(out: Path, whole: Path) -> list[str]:
    faults = []
    store, reference = FeatureStore.open(out, verify_reads="always"), FeatureStore.open(whole)
    if store.tiles.ids and store.tiles.digest() != reference.tiles.digest():
        faults.append("the tile table is another")
    keys = store.keys()
    for key in keys:
        rows = [row for row, there in enumerate(store.committed(key)) if there]
        a, b = store.read(key, rows), reference.read(key, rows)
        if a.values.tobytes() != b.values.tobytes() or not a.valid.all():
            faults.append(f"{key}: a reader gets other values")
    return faults


def difference_here(out: Path, whole: Path) -> str:
    mine, theirs = (_contents(root) for root in (out, whole))
    if mine != theirs:
        names = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
        return f"{len(names)} files differ, first {names[0]}"
    if FeatureStore.open(out).snapshot != FeatureStore.open(whole).snapshot:
        return "the snapshots differ"
    findings = verify_store(out, deep=True)
    return f"verify: {findings[0].path}: {findings[0].fault}" if findings else ""


def _contents(root: Path) -> dict[str, bytes]:
    files = [p for p in sorted((root / "zarr").rglob("*")) if p.is_file()]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
