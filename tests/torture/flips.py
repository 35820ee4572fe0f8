"""One flipped bit in one file: ``verify --deep`` finds and names it, and a reader gets an error or the right bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import RsmtdfError
from rsmtdf_cache.files import build_lock
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.upkeep.pins import pin_snapshot
from rsmtdf_cache.verify import verify_store
from tests.teachers import load_mean_teacher
from tests.torture.processes import ChildFailed, in_child
from tests.torture.scene import Scene, read_everything

__all__ = ["make_rich_store", "torture_flips"]


def torture_flips(
    scene: Scene, folder: Path, count: int, rng: random.Random, tell: Callable[[], None]
) -> dict[str, Any]:
    """Flip ``count`` bits, one at a time, and return what was seen. The kinds of files take turns."""
    store = folder / "flips"
    in_child(lambda: make_rich_store(scene, store))
    sound: str = in_child(lambda: read_everything(store))
    if faults := in_child(lambda: [f"{f.path}: {f.fault}" for f in verify_store(store, deep=True)]):
        raise ChildFailed(f"the store has findings before any flip: {faults}")
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.stat().st_size):
        kinds[_kind(path.relative_to(store))].append(path)
    reads: Counter[str] = Counter()
    seen: dict[str, Any] = {"flips": 0, "by_kind": Counter(), "losses": [], "silent": [], "errors": []}
    for number in range(count):
        kind = sorted(kinds)[number % len(kinds)]
        path = rng.choice(kinds[kind])
        data, times = path.read_bytes(), path.stat()
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        where = f"bit {bit} of byte {position} of {path.relative_to(store)}"
        _overwrite(path, _flipped(data, position, bit), times)
        try:
            found = in_child(lambda: _look(store, sound))
        except ChildFailed as error:
            seen["errors"].append(f"{where}: {error}")
            continue
        finally:
            _overwrite(path, data, times)
        seen["flips"] += 1
        seen["by_kind"][kind] += 1
        name = path.relative_to(store).as_posix()
        if not any(name in fault or path.name in fault for fault in found["findings"]):
            seen["losses"].append(f"{where}: verify --deep does not name the file, it said {found['findings'][:2]}")
        if found["read"] == "different":
            seen["silent"].append(f"{where}: a reader got other bytes and no error")
        reads[found["read"]] += 1
        tell()
    seen["reads"] = dict(reads)
    seen["by_kind"] = dict(seen["by_kind"])
    shutil.rmtree(store)
    return seen


def make_rich_store(scene: Scene, out: Path) -> None:
    """Build a store that has a file of every kind: segments, a tail, a dropped array, a quarantine, a pin."""
    data = out.with_name(f"{out.name}-data")
    shutil.copytree(scene.data, data)
    (data / "images" / "t001.png").write_bytes(b"no picture")
    values = {
        "data": data, "out": out, "teachers": ["mean"], "scales": [1.0, 0.5], "group_rows": 2, "threads": 1,
        "micro_batch": 2, "device": "cpu",
    }  # fmt: skip
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    paths = StorePaths(out)
    with build_lock(paths.lock):
        ledger = Ledger.load(paths)
        ledger.compact(tail_max=0)
        set_id = min(ledger.sets)
        ledger.drop([(set_id, ledger.sets[set_id].arrays.specs[0].layer.name)])
        write_head(paths, load_manifest(paths), ledger)
    # An append after the compaction: a second tile segment, commit records beside the segment, two snapshots.
    more = {"splits": ["train", "val", "test"], "teachers": ["mean,scales=1"]}
    build_store(BuildRequest.of(values | more), load_teacher=load_mean_teacher)
    pin_snapshot(out, owner="torture")


def _kind(path: Path) -> str:
    parts = path.parts
    if parts[0] == "zarr":
        return "shards" if "features" in parts and "c" in parts[parts.index("features") :] else "zarr metadata"
    if parts[0] == "ledger" and len(parts) > 2:
        return f"ledger/{parts[1]}{path.suffix if parts[1] == 'tiles' else ''}"
    return path.as_posix() if len(parts) < 3 and parts[0] != "pins" else parts[0]


def _flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def _overwrite(path: Path, data: bytes, times: os.stat_result) -> None:
    """Change the bytes in place and put the times back: a disk that flips a bit tells nobody."""
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _look(store: Path, sound: str) -> dict[str, Any]:
    try:
        findings = [f"{f.path}: {f.fault}" for f in verify_store(store, deep=True)]
    except RsmtdfError as error:
        findings = [str(error)]
    try:
        read = "right" if read_everything(store) == sound else "different"
    except RsmtdfError:
        read = "refused"
    return {"findings": findings, "read": read}
