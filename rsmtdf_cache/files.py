"""The few file-system operations that durability rests on, numbered in ``FORMAT.md``.

Everything in a store is made, linked, replaced and removed through this module, and each operation is told to
``observe``: tests record them, and rebuild what a loss of power after any of them would leave.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rsmtdf_cache.errors import FindingsError, ResourceError
from rsmtdf_cache.specs import digest_of

__all__ = [
    "build_lock",
    "disk_errors",
    "fsync_file",
    "fsync_folder",
    "is_locked",
    "link_file",
    "make_folders",
    "no_step",
    "observe",
    "publish_json",
    "read_json",
    "record_bytes",
    "remove_file",
    "rename_file",
    "replace_file",
    "replace_json",
    "require_space",
    "sha256_file",
]

#: Records are small; a larger one is hostile or damaged.
RECORD_NBYTES_MAX = 256 * 2**20


def _nobody(operation: str, *paths: Path) -> None:
    pass


#: Called after each operation with its name (mkdir, fsync, fsync_folder, link, rename, unlink) and paths.
observe: Callable[..., None] = _nobody


def fsync_file(file: IO[bytes], path: Path) -> None:
    """Make the content of the open ``file`` durable."""
    file.flush()
    os.fsync(file.fileno())
    observe("fsync", path)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    observe("fsync_folder", folder)


def make_folders(folder: Path) -> None:
    """Make ``folder`` and what is missing above it; every new name is durable."""
    missing = []
    here = folder
    while not here.is_dir():
        missing.append(here)
        here = here.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        observe("mkdir", new)
        fsync_folder(new.parent)


def link_file(draft: Path, place: Path) -> bool:
    """Give ``draft`` the second name ``place`` unless something has it; return whether this did it."""
    try:
        os.link(draft, place)
    except FileExistsError:
        return False
    observe("link", draft, place)
    return True


def rename_file(draft: Path, place: Path) -> None:
    """Rename ``draft`` to ``place``, replacing what is there in one step."""
    draft.replace(place)
    observe("rename", draft, place)


def remove_file(path: Path) -> None:
    """Remove ``path`` if it is there. Make it durable with ``fsync_folder`` where the order matters."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    observe("unlink", path)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        fsync_file(file, path)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old or the new content and nothing between."""
    make_folders(path.parent)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_durably(draft, data)
        rename_file(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def no_step(step: int) -> None:
    """Do nothing after a step of a commit: what tests replace."""


def publish_json(
    path: Path, value: Mapping[str, Any], tmp: Path, after_step: Callable[[int], None] = no_step, licence: bool = False
) -> bool:
    """Publish ``value`` with its own checksum at ``path`` unless something is there; return whether this did it.

    ``after_step`` is called with 5 (draft durable), 6 (linked) and 7 (name durable), the steps of a commit.
    ``licence``: the folder ``tmp`` permits this and is not made here; raises ``FileNotFoundError`` when it is gone.
    """
    make_folders(path.parent)
    if not licence:
        make_folders(tmp)
    draft = tmp / f"{path.name}.{uuid.uuid4().hex}"
    _write_durably(draft, record_bytes(value))
    try:
        after_step(5)
        if not link_file(draft, path):
            return False
        after_step(6)
    finally:
        remove_file(draft)
    fsync_folder(path.parent)
    after_step(7)
    return True


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` with its own checksum to ``path`` by atomic replace: for what is derived and may change."""
    replace_file(path, record_bytes(value))


def record_bytes(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of the record ``value``, with its own checksum."""
    body = {**value, "checksum": digest_of(value)}
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return what was written with a checksum, without the checksum.

    Raises ``FindingsError`` when it is damaged or not of a record's size, ``FileNotFoundError`` when it is not there.
    """
    hint = "run `rsmtdf cache verify` on the store"
    if path.stat().st_size > RECORD_NBYTES_MAX:
        raise FindingsError(f"{path}: {path.stat().st_size} bytes, a record has at most {RECORD_NBYTES_MAX}; {hint}")
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict):
            raise TypeError("not an object")
        checksum = body.pop("checksum")
        intact = digest_of(body) == checksum
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FindingsError(f"{path}: not a readable record ({type(error).__name__}: {error}); {hint}") from None
    if not intact:
        raise FindingsError(f"{path}: its checksum does not fit its content; {hint}")
    return dict(body)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, nbytes: int, what: str, advice: str) -> None:
    """Raise ``ResourceError`` when the disk of ``folder`` has less room than ``what`` needs."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ResourceError(
            f"{folder}: the {what} needs {nbytes / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free; {advice}"
        )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or failing disk into one clear ``ResourceError`` about ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"disk full while writing to {folder}: free some space and run the same command again; "
                "what is committed stays, the rest continues"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
            raise ResourceError(
                f"cannot write to {folder}: {error.strerror}; choose a place that can be written to"
            ) from error
        raise


@contextlib.contextmanager
def build_lock(path: Path, on_wait: Any = None) -> Iterator[None]:
    """Hold the store's build lock. It belongs to the process: the system drops it when the process dies.

    A second builder waits; ``on_wait()`` is called once before it does, and may raise instead.
    """
    waited = False
    while True:
        make_folders(path.parent)
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None and not waited:
                    on_wait()
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(file, path):
                continue  # its last holder made nothing and removed the folder: this lock guards a file nobody finds
            yield
            return


def _is_still(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a builder holds the lock now."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
