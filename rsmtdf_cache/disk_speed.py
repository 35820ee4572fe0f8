"""How fast a disk takes and gives bytes, past the page cache: a bounded file without a name, written, synced, read.

A build writes shards and syncs each of them (FORMAT.md, section 4), so this writes pieces and syncs each of them. What
was synced is dropped from the page cache before it is read. A cache inside the disk or below a virtual machine cannot
be seen from here; one larger than ``nbytes_max`` makes the rates better than what a long build meets.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events

__all__ = ["DiskSpeed", "file_system_of", "free_nbytes", "measure_disk", "nearest_folder", "scratch_folder"]

_PIECE_NBYTES = 32 * 2**20
_BLOCK_NBYTES = 4 * 2**20
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True)
class DiskSpeed:
    """What a disk did: ``probed_nbytes`` written and synced, and what of it was read again; rates in bytes/s."""

    folder: Path
    file_system: str
    write_nbytes_per_s: float
    read_nbytes_per_s: float
    probed_nbytes: int

    @property
    def in_memory(self) -> bool:
        """Whether it is no disk at all: nothing is durable there, and the rates are those of memory."""
        return self.file_system in _IN_MEMORY

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "file_system": self.file_system, "in_memory": self.in_memory,
            "write_nbytes_per_s": round(self.write_nbytes_per_s), "read_nbytes_per_s": round(self.read_nbytes_per_s),
            "probed_nbytes": self.probed_nbytes,
        }  # fmt: skip


def nearest_folder(path: Path) -> Path:
    """Return ``path`` when it is a folder, else the nearest folder above it."""
    here = path.absolute()
    while not here.is_dir():
        here = here.parent
    return here


def scratch_folder(out: Path) -> Path:
    """Return a folder on the file system of ``out`` for files that are removed again: beside ``out`` where it can be.

    ``out`` itself only when the folder above lies on another file system or cannot be written to.
    """
    if not out.is_dir():
        return nearest_folder(out)
    here, above = out.absolute(), out.absolute().parent
    same = here.stat().st_dev == above.stat().st_dev
    return above if same and os.access(above, os.W_OK | os.X_OK) else here


def free_nbytes(out: Path) -> int:
    """Return the bytes that this user can still write to the file system of ``out``."""
    return shutil.disk_usage(nearest_folder(out)).free


def file_system_of(path: Path) -> str:
    """Return the type of the file system of ``path`` (``ext4``, ``nfs4``, ``tmpfs``), ``"unknown"`` off Linux."""
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return kind
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two at one place the later one covers the other
            best, kind = point, after.split(" ")[0]
    return kind


def measure_disk(
    folder: Path, seconds: float = 3.0, nbytes_max: int = 2**30, on_event: EventSink = ignore_events
) -> DiskSpeed | None:
    """Return the rates of the file system of ``folder``; None when there is too little room to tell.

    Writes until ``seconds`` are over or ``nbytes_max`` are written, at most a quarter of what is free. The file has no
    name while it is written, so that nothing is left however this process ends. Raises ``OSError``.
    """
    nbytes_max = min(nbytes_max, free_nbytes(folder) // 4) // _BLOCK_NBYTES * _BLOCK_NBYTES
    if nbytes_max <= 0:
        return None
    # Random bytes: file systems that compress would take zeros at no cost.
    block = np.random.default_rng(0).integers(0, 256, _BLOCK_NBYTES, np.uint8).tobytes()
    file = _open_nameless(folder)
    try:
        on_event(ProgressStart("disk", "measuring the disk", nbytes_max, unit="bytes"))
        written, begun = 0, time.perf_counter()
        while written < nbytes_max and (not written or time.perf_counter() - begun < seconds):
            piece = min(_PIECE_NBYTES, nbytes_max - written)
            for _ in range(piece // _BLOCK_NBYTES):
                _write_all(file, block)
            os.fsync(file)
            written += piece
            on_event(Progress("disk", piece, piece))
        write_rate = written / (time.perf_counter() - begun)
        _forget_pages(file)
        read_rate = _read_rate(file, written, seconds / 3)
        on_event(ProgressEnd("disk"))
    finally:
        os.close(file)
    return DiskSpeed(folder, file_system_of(folder), write_rate, read_rate, written)


def _open_nameless(folder: Path) -> int:
    """Return a handle of a new file below ``folder`` that has no name: it goes when the handle is closed."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # not every file system can (NFS); a missing or read-only folder fails again below
            pass
    file, name = tempfile.mkstemp(prefix=".rsmtdf-disk-", dir=folder)
    try:
        os.unlink(name)
    except BaseException:
        os.close(file)
        raise
    return file


def _write_all(file: int, block: bytes) -> None:
    left = memoryview(block)
    while left:
        left = left[os.write(file, left) :]


def _forget_pages(file: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_rate(file: int, nbytes: int, seconds: float) -> float:
    done, begun = 0, time.perf_counter()
    while done < nbytes and (not done or time.perf_counter() - begun < seconds):
        done += len(os.pread(file, _BLOCK_NBYTES, done))
    return done / (time.perf_counter() - begun)
