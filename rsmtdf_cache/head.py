"""The head: one list of every file of a store that is no shard, with its sha256, and the snapshot they amount to.

Readers of a local store trust the records themselves. Readers of a remote store, which often cannot list folders, and
``verify`` start here. The head is written at the end of everything that changes a store, after all that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import publish_json, read_json, replace_json, sha256_file
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.records import read_snapshot
from rsmtdf_cache.zarr_metadata import write_metadata

__all__ = [
    "Head",
    "content_lost",
    "find_snapshot",
    "load_whole",
    "lost_records",
    "parse_head",
    "read_head",
    "record_files",
    "record_snapshot",
    "recorded_snapshot",
    "write_head",
]

_HEX64 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Head:
    """``ledger/head.json``: the snapshot root, what it holds, and ``{path: (bytes, sha256)}`` of what stands for it."""

    snapshot: str
    files: Mapping[str, tuple[int, str]]
    content: Content

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        files = {name: {"nbytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        return {"snapshot": self.snapshot, "content": self.content.to_json(), "files": files}


def write_head(paths: StorePaths, manifest: Manifest, ledger: Ledger, final: bool = True) -> Head:
    """Bring zarr metadata, snapshot record and head up to date, in this order. The caller holds the build lock.

    ``final``: the operation is over, so what the store holds now gets a snapshot record that ``STORE@SNAPSHOT`` finds.
    """
    derived = write_metadata(paths, manifest, ledger)
    root = record_snapshot(paths, ledger) if final else ledger.snapshot()
    files = {}
    for path in [*(paths.zarr / name for name in derived), *record_files(paths)]:
        files[paths.relative(path)] = (path.stat().st_size, sha256_file(path))
    head = Head(root, files, ledger.content())
    replace_json(paths.head, head.to_json())
    return head


def read_head(paths: StorePaths) -> Head:
    """Return the head on disk. Raises ``FindingsError`` when it is damaged, ``FileNotFoundError`` when absent."""
    return parse_head(read_json(paths.head), str(paths.head))


def recorded_snapshot(paths: StorePaths, ledger: Ledger) -> str:
    """Return the snapshot of ``ledger``: as the head says where it is of the same content, else computed.

    For people who ask what is there: the tile table is not read for it. A run or a snapshot's reader computes it.
    """
    try:
        head = read_head(paths)
    except FileNotFoundError:
        return ledger.snapshot()
    same = head.content.to_json() == ledger.content().to_json()  # which puts layers in one order
    return head.snapshot if same else ledger.snapshot()


def load_whole(paths: StorePaths) -> Ledger:
    """Return the ledger on disk when it has every record that the head's snapshot is made of.

    A record that was lost (a copy that left files out, a hand that deleted) is no smaller store: tiles would get rows
    that others have, and shards without a name would pass for rubbish. Raises ``FindingsError`` then, and when a record
    is damaged.
    """
    for _ in range(20):
        head = paths.head.read_bytes() if paths.head.is_file() else b""
        ledger = Ledger.load(paths)  # after the head, so it can only have more
        lost = lost_records(paths, ledger) if head else []
        if not lost:
            return ledger
        if paths.head.is_file() and paths.head.read_bytes() == head:
            shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise FindingsError(
                f"{paths.root}: the ledger has lost {shown}; nothing was changed. Bring the files back, or run "
                f"`rsmtdf cache verify {paths.root} --repair`"
            )
    return Ledger.load(paths)


def lost_records(paths: StorePaths, ledger: Ledger) -> list[str]:
    """Return what the head's snapshot is made of and ``ledger`` does not have, for people; see ``load_whole``.

    Commits may have been folded into segments since; what was dropped since is not lost.
    """
    try:
        return content_lost(read_head(paths).content, ledger)
    except FileNotFoundError:
        return []  # nothing was finished yet


def content_lost(content: Content, ledger: Ledger) -> list[str]:
    """Return which records of ``content`` the ledger does not have, for people."""
    lost = [f"the tile segment of row {first}" for first in content.tiles if first not in ledger.segments]
    for name, units in content.units.items():
        if name not in ledger.sets:
            lost.append(f"the array set {name}")
        else:
            lost += [
                f"the calibration {d[:12]}" for d in ledger.sets[name].calibrations.values() if not _sound(ledger, d)
            ]
        lost += [
            f"the commit of row group {group} of {name}"
            for group, generation in units.items()
            if generation not in ledger.generations.get((name, group), {})
        ]
    return lost


def _sound(ledger: Ledger, digest: str) -> bool:
    try:
        ledger.calibration(digest)
    except FindingsError:
        return False
    return True


def parse_head(body: Mapping[str, Any], where: str) -> Head:
    """Return the head of plain JSON data. Raises ``FindingsError``."""
    try:
        files = {str(name): (int(f["nbytes"]), str(f["sha256"])) for name, f in body["files"].items()}
        head = Head(str(body["snapshot"]), files, Content.from_json(body["content"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FindingsError(f"{where}: not the head of a store ({type(error).__name__}: {error})") from None
    sound = all(nbytes >= 0 and _HEX64.fullmatch(digest) for nbytes, digest in head.files.values())
    if not sound or not _HEX64.fullmatch(head.snapshot):
        raise FindingsError(f"{where}: not the head of a store (a size or a digest is none)")
    return head


def record_snapshot(paths: StorePaths, ledger: Ledger) -> str:
    """Write down what the present snapshot holds, so that it can be read and pinned later; return its root."""
    root = ledger.snapshot()
    path = paths.snapshot(root)
    if not path.is_file():
        publish_json(path, {"snapshot": root, **ledger.content().to_json()}, paths.tmp)
    return root


def find_snapshot(paths: StorePaths, ledger: Ledger, name: str) -> Ledger:
    """Return the ledger as of the snapshot whose root is, or begins with, ``name`` (at least 8 hex digits).

    Raises ``MismatchError`` when there is none, or several, or its records are gone.
    """
    if not re.fullmatch("[0-9a-f]{8,64}", name):
        raise MismatchError(f"{paths.root}@{name}: a snapshot is 8 to 64 hex digits, see `rsmtdf cache info`")
    if ledger.snapshot().startswith(name):
        return ledger
    found = sorted(p.stem for p in paths.snapshots.glob(f"{name}*.json"))
    if len(found) != 1:
        known = ", ".join(sorted(p.stem[:12] for p in paths.snapshots.glob("*.json"))[:5]) or "none"
        what = "no such snapshot is recorded" if not found else f"{len(found)} snapshots begin so"
        raise MismatchError(f"{paths.root}@{name}: {what}; recorded: {known}; now it holds {ledger.snapshot()[:12]}")
    then = ledger.at(read_snapshot(paths.snapshot(found[0])))
    if then.snapshot() != found[0]:
        raise MismatchError(
            f"{paths.root}@{name}: the store no longer holds that content; shards were repaired to other bytes, or "
            "arrays were built anew"
        )
    return then


def record_files(paths: StorePaths) -> Iterator[Path]:
    """Yield every file that states a fact: manifest, records, segments, snapshots; not pins, lock or the head."""
    for path in (paths.manifest, paths.quarantine, paths.dropped):
        if path.is_file():
            yield path
    for pattern in (
        "tiles/*.json", "tiles/*.parquet", "sets/*.json", "commits/*/*.json", "segments/*.parquet", "snapshots/*.json",
        "calibrations/*.safetensors",
    ):  # fmt: skip
        yield from sorted(p for p in paths.ledger.glob(pattern) if not p.name.startswith("."))
