"""The hidden folder beside the target in which a dataset is made, so that the target is whole or not there at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsmtdf_cache.errors import Interrupted
from rsmtdf_cache.files import build_lock, disk_errors, fsync_folder, make_folders, remove_file

__all__ = ["SpoolFolder", "publish", "spool_only", "workplace"]


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


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
