"""Which shards and tables were compared with their sha256 on this node since it started: one looks, the others trust.

A mark is an empty file named after what identifies the bytes on the disk: path, inode, size, times and the recorded
sha256. It lies in a folder of this user that the system empties, and holds for this boot only: a later flip of a bit
shows at the next boot at the latest, and ``verify_reads="always"`` or ``rsmtdf cache verify --deep`` show it at once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from rsmtdf_cache.files import sha256_file

__all__ = ["has_sha256", "is_checked", "mark_checked"]


def is_checked(path: Path, sha256: str) -> bool:
    """Whether a process of this user has compared the file at ``path``, as it is now, with ``sha256``.

    A file that is not there, such as a shard that another process pushed out of a cache just now, is not compared.
    """
    folder = _folder()
    try:
        return folder is not None and (folder / _name(path, sha256)).is_file()
    except FileNotFoundError:
        return False


def mark_checked(path: Path, sha256: str) -> None:
    """Note that the file at ``path`` has this ``sha256``. A node without a usable folder checks again instead."""
    folder = _folder()
    if folder is not None:
        try:
            (folder / _name(path, sha256)).touch(mode=0o600)
        except OSError:
            return


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether the file at ``path`` has this ``sha256``; its bytes are read for that once on this node.

    Raises ``FileNotFoundError``.
    """
    if is_checked(path, sha256):
        return True
    same = sha256_file(path) == sha256
    if same:
        mark_checked(path, sha256)
    return same


def _name(path: Path, sha256: str) -> str:
    found = path.stat()
    facts = (os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.sha256(repr((facts, sha256)).encode()).hexdigest()


def _folder() -> Path | None:
    """Return the folder of marks of this boot, None when there is none that only this user can write to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        folder = Path(tempfile.gettempdir()) / f"rsmtdf-{os.getuid()}" / f"checked-{boot}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (folder.parent, folder):
            found = place.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                return None
            if found.st_mode & 0o022:
                place.chmod(0o700)
    except OSError:
        return None
    return folder
