"""The hidden folder beside the target in which a dataset is made, so that the target is whole or not there at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import Interrupted, MismatchError
from rsmtdf_cache.files import build_lock, disk_errors, fsync_folder, make_folders, remove_file

__all__ = ["SpoolFolder", "is_made", "publish", "refuse_file", "spool_only", "workplace"]


class SpoolFolder:
    """Gives paths in the temporary folder ``folder``, which is made at the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def __call__(self) -> Path:
        """Return a path that was not given before."""
        self.folder.mkdir(exist_ok=True)
        self._count += 1
        return self.folder / str(self._count)


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``. It is gone afterwards, unless ``publish`` gave it its name.

    A second process with the same ``out`` waits. What a killed one left is removed. Ctrl-C becomes ``Interrupted``,
    a disk that is full or refuses ``ResourceError``.
    """
    with disk_errors(out.parent):
        make_folders(out.parent)
        lock = out.parent / f".{out.name}.prepare.lock"
        with build_lock(lock):
            try:
                for left in out.parent.glob(f".{_literal(out.name)}.*.partial"):
                    shutil.rmtree(left, ignore_errors=True)
                partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
                partial.mkdir()
                try:
                    yield partial
                except KeyboardInterrupt:
                    raise Interrupted(f"stopped; nothing is kept of {out}, the same command begins again") from None
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                remove_file(lock)


@contextmanager
def spool_only(out: Path) -> Iterator[SpoolFolder]:
    """Yield a spool for a look that writes nothing: beside ``out`` as far as there are folders, removed afterwards."""
    here = out.parent
    while not here.is_dir():
        here = here.parent
    with disk_errors(here), tempfile.TemporaryDirectory(prefix=".rsmtdf-", dir=here) as folder:
        yield SpoolFolder(Path(folder) / "spool")


def publish(partial: Path, out: Path) -> None:
    """Give ``partial`` the name ``out``, which is free or an empty folder, once all its bytes are on the disk."""
    os.sync()  # tens of thousands of files: once for all is quicker than one by one
    os.rename(partial, out)
    fsync_folder(out.parent)


def refuse_file(out: Path) -> None:
    """Raise ``MismatchError`` when ``out`` is a file."""
    if out.exists() and not out.is_dir():
        raise MismatchError(f"{out} is a file; give a new or an empty folder")


def is_made(out: Path, record: str, asked: Mapping[str, Any], what: str) -> bool:
    """Whether ``out`` was made of what is ``asked``, as its file ``record`` says; False when it is free.

    Raises ``MismatchError`` when anything else is there; ``what`` names it.
    """
    if not out.exists() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / record).read_text(encoding="utf-8"))["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        raise MismatchError(f"{out} is not empty and holds something else; give a new or an empty folder") from None
    if found != asked:
        other = sorted(k for k in asked if not isinstance(found, dict) or found.get(k) != asked[k])
        raise MismatchError(
            f"{out} holds another {what} (differs in {', '.join(other)}); give another folder, or remove it"
        )
    return True


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
