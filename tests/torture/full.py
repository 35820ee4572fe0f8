"""A disk fills up during a build: the build says so, what is committed reads right, with room again it finishes."""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import Event, Progress, ProgressStart
from rsmtdf_cli.console import guard
from tests.torture.processes import ChildFailed, in_child
from tests.torture.scene import Scene, audit, build, difference

__all__ = ["torture_full"]

_ROOMY = 256 * 2**20
_MAPS = 22  # tiles that the build of a scene encodes, in two views; the last ones have no successor to stop


def torture_full(
    scene: Scene, folder: Path, count: int, rng: random.Random, tell: Callable[[], None]
) -> dict[str, Any]:
    """Fill the disk at ``count`` points of a build and return what was seen.

    Most points lie after the build's own look at the free space: the disk shrinks under it. The first few are disks
    that were small from the beginning.
    """
    seen: dict[str, Any] = {
        "points": 0, "how": "", "units_kept": 0, "stopped_at_once": 0, "losses": [], "silent": [], "errors": [],
    }  # fmt: skip
    needed = sum(p.stat().st_size for p in scene.whole.rglob("*") if p.is_file())
    largest = max(p.stat().st_size for p in scene.whole.rglob("*") if p.is_file())
    for number in range(count):
        place = folder / f"full{number}"
        with _disk(place) as disk:
            seen["how"] = disk.how
            small = number < count // 5
            share = (
                (number + 1) / (count // 5 + 1)
                if small
                else (number - count // 5 + rng.random()) / (count - count // 5)
            )
            try:
                if disk.mounted or small:
                    _one(scene, disk, int(share * (needed if disk.mounted else largest)), 0, small, seen)
                else:  # a limit on a file's size cannot be used up: it comes later instead
                    _one(scene, disk, 64, int(share * _MAPS), small, seen)
            except ChildFailed as error:
                seen["errors"].append(f"point {number + 1}, {share:.2f} of the space: {error}")
        seen["points"] += 1
        tell()
    return seen


def _one(scene: Scene, disk: _Disk, room: int, tiles: int, small: bool, seen: dict[str, Any]) -> None:
    out = disk.place / "store"
    ended: dict[str, Any] = in_child(lambda: _build_on(disk, scene, out, room, tiles, small))
    where = f"{room} bytes of room{' from the beginning' if small else ''}"
    if ended["code"] != ResourceError.exit_code:
        seen["errors"].append(f"{where}: the build ended with {ended['code']}: {ended['said']}")
    disk.grow(_ROOMY)
    there = audit(out, scene)
    seen["units_kept"] += len(there.units)
    seen["stopped_at_once"] += not there.units
    seen["silent"] += [f"{where}: {fault}" for fault in there.faults]
    in_child(lambda: build(scene.data, out))
    after = audit(out, scene)
    seen["losses"] += [f"{where}: unit {unit} was committed and is gone" for unit in sorted(there.units - after.units)]
    if unequal := difference(out, scene):
        seen["silent"].append(f"{where}, finished: {unequal}")


def _build_on(disk: _Disk, scene: Scene, out: Path, room: int, tiles: int, small: bool) -> dict[str, Any]:
    """Build on a disk with ``room`` left and return the exit code of the command, and its message.

    The room is so small from the beginning, or after so many ``tiles`` of the teacher's task, which begins after the
    build has looked at the free space.
    """
    coming = tiles + 1

    def on_event(event: Event) -> None:
        nonlocal coming
        if isinstance(event, (ProgressStart, Progress)) and event.task == "mean" and not small:
            coming -= 1
            if coming == 0:
                disk.shrink_to(room)

    if small:
        disk.shrink_to(room)
    said = io.StringIO()
    try:
        with redirect_stderr(said), guard():
            build(scene.data, out, on_event)
    except SystemExit as end:
        return {"code": end.code, "said": said.getvalue()}
    return {"code": 0, "said": "nothing"}


class _Disk:
    """A folder with limited room: a small tmpfs, or, where mounting is not allowed, a limit on the size of a file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self.mounted = self._mount(f"size={_ROOMY}")
        self.how = (
            "tmpfs"
            if self.mounted
            else "RLIMIT_FSIZE (no right to mount): a file that grows too large, not a full disk"
        )

    def shrink_to(self, room: int) -> None:
        """Leave ``room`` bytes, from inside the building process. A limit on files holds for this process alone."""
        if self.mounted:
            found = os.statvfs(self.place)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            page = found.f_frsize
            self._mount(f"remount,size={max(page, (used + room) // page * page)}")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def grow(self, nbytes: int) -> None:
        if self.mounted:
            self._mount(f"remount,size={nbytes}")

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.place)], check=True)
        shutil.rmtree(self.place)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(self.place)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


@contextmanager
def _disk(place: Path) -> Iterator[_Disk]:
    disk = _Disk(place)
    try:
        yield disk
    finally:
        disk.remove()
