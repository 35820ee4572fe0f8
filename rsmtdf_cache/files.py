"""The few file-system operations that durability rests on. See ``docs/decisions/0002-commit.md``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError, ResourceError
from rsmtdf_cache.specs import digest_of

__all__ = [
    "build_lock",
    "disk_errors",
    "fsync_folder",
    "publish_json",
    "read_json",
    "replace_file",
    "replace_json",
    "sha256_file",
]


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old or the new content and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_durably(draft, data)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def publish_json(path: Path, value: Mapping[str, Any], tmp: Path) -> bool:
    """Publish ``value`` with its own checksum at ``path`` unless something is there; return whether this did it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp.mkdir(parents=True, exist_ok=True)
    draft = tmp / f"{path.name}.{uuid.uuid4().hex}"
    _write_durably(draft, _with_checksum(value))
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` with its own checksum to ``path`` by atomic replace: for what is derived and may change."""
    replace_file(path, _with_checksum(value))


def _with_checksum(value: Mapping[str, Any]) -> bytes:
    body = {**value, "checksum": digest_of(value)}
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Return what was written with a checksum, without the checksum. Raises ``FindingsError`` when it is damaged."""
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("checksum")
        intact = digest_of(body) == checksum
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise FindingsError(
            f"{path}: not a readable record ({error}); run `rsmtdf cache verify` on the store"
        ) from None
    if not intact:
        raise FindingsError(f"{path}: its checksum does not fit its content; run `rsmtdf cache verify` on the store")
    return dict(body)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            raise ResourceError(f"cannot write to {folder}: {error.strerror}; choose a writable --out") from error
        raise


@contextlib.contextmanager
def build_lock(path: Path, on_wait: Any = None) -> Iterator[None]:
    """Hold the store's build lock. It belongs to the process: the system drops it when the process dies.

    A second builder waits; ``on_wait()`` is called once before it does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
