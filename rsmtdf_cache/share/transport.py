"""Files of a store elsewhere: read in ranges, continued where they were cut, checked, put only where nothing is.

Every name is checked, every failure becomes an error of this project without a secret in it, and a lost connection is
tried again. What a remote sends is bounded by what the caller expects.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rsmtdf_cache.errors import FindingsError, ResourceError, RsmtdfError
from rsmtdf_cache.files import fsync_file, sha256_file
from rsmtdf_cache.share.address import Address, redact
from rsmtdf_cache.share.backends import BLOCK_NBYTES, Backend, Tagged, code_of, open_backend
from rsmtdf_cache.share.names import checked_name

__all__ = ["Transport", "connect"]

#: Tries in a row that bring nothing; the pause after the first, doubled each time.
TRIES, PAUSE_S = 5, 0.2

_T = TypeVar("_T")
_DENIED = {401, 403, 407}
_AGAIN = {408, 425, 429}
_FINAL_ERRNO = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_FINAL_NAMES = ("Credential", "TokenRetrieval", "ProfileNotFound", "InvalidURL", "InvalidUrl", "ParamValidation",
                "UnauthorizedSSO", "SSLCertVerification", "CertificateError", "NoRegion")  # fmt: skip


class _Lost(Exception):
    """The connection failed in a way that can pass; the text is free of secrets."""


def connect(address: Address) -> Transport:
    """Return the way to the files of ``address``; nothing is sent yet.

    Raises ``ResourceError`` when a package is missing.
    """
    return Transport(address, open_backend(address))


class Transport:
    """The files of one store. Safe among threads, can be pickled; after a fork it connects anew."""

    def __init__(self, address: Address, backend: Backend) -> None:
        self.address = address
        self.bucket_missing = False  # a server said so
        self._backend = backend
        for name in ("fsspec", "fsspec.http", "fsspec.asyn", "s3fs", "gcsfs"):
            logging.getLogger(name).addFilter(_redact_log)

    def get(self, name: str, max_nbytes: int) -> bytes | None:
        """Return the content of a small file, None when there is none.

        Raises ``FindingsError`` when it is larger than ``max_nbytes``, ``ResourceError`` when it is out of reach.
        """
        found = bytearray()
        try:
            for block in self._blocks(checked_name(name), 0, max_nbytes + 1):
                found += block
        except FileNotFoundError:
            return None
        if len(found) > max_nbytes:
            raise FindingsError(f"{self.address.shown}: {name} is larger than the {max_nbytes} bytes it may have")
        return bytes(found)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None when there is none."""
        return self._there(name, lambda: self._backend.size(name))

    def sizes(self, names: Sequence[str], folder: str) -> dict[str, int]:
        """Return the bytes of those files of ``names``, all below ``folder``, that are there.

        One listing where folders can be listed, else one request a file, several at once.
        """
        if not names:
            return {}
        found = self.listing(folder)
        if found is not None:
            return {name: found[name] for name in names if name in found}
        with ThreadPoolExecutor(8) as pool:
            asked = zip(names, pool.map(self.size, names), strict=True)
            return {name: size for name, size in asked if size is not None}

    def fetch(self, name: str, draft: Path, nbytes: int, sha256: str, on_bytes: Callable[[int], None]) -> None:
        """Bring a file of known size and hash to ``draft``, which is durable then; go on with what ``draft`` has.

        ``on_bytes`` is told how many bytes came. Raises ``FindingsError`` when the remote has other bytes, or none,
        and ``ResourceError`` when it stays out of reach; ``draft`` keeps what came.
        """
        checked_name(name)
        for _ in range(2):  # a draft that another process left may be at fault, so once more from the beginning
            self._fill(name, draft, nbytes, on_bytes)
            if sha256_file(draft) == sha256:
                return
            draft.unlink()
            on_bytes(-nbytes)
        raise FindingsError(
            f"{self.address.shown}: the bytes of {name} are not those of its record (sha256 differs); {self._remedy()}"
        )

    def sha256(self, name: str, nbytes: int) -> str | None:
        """Return the hash of a remote file as far as ``nbytes`` (+ 1), read in passing; None when there is none."""
        digest = hashlib.sha256()
        try:
            for block in self._blocks(checked_name(name), 0, nbytes + 1):
                digest.update(block)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    def put(self, name: str, source: bytes | Path, absent: bool = True) -> bool:
        """Write a file in one step and return whether this did it; ``absent``: only where there is none.

        After a lost answer the file can be there though False is returned: compare then.
        """
        checked_name(name)

        def write() -> bool:
            try:
                return self._call(name, lambda: self._backend.put(name, source, absent))
            except FileNotFoundError:
                raise ResourceError(
                    f"{self.address.shown}: cannot write {name}: the bucket or folder does not exist; make it first"
                ) from None

        return self._repeat(name, write)

    def top(self) -> list[str] | None:
        """Return the names of files and folders right below the store, None where they cannot be listed."""
        return self._repeat("", lambda: self._call("", self._backend.top))

    def listing(self, folder: str) -> dict[str, int] | None:
        """Return the bytes of every file below ``folder`` by name; None where nothing is, or cannot be listed."""
        return self._repeat(folder, lambda: self._call(folder, lambda: self._backend.listing(folder)))

    def stat(self, name: str) -> tuple[int, str] | None:
        """Return bytes and tag of a file, None when there is none."""
        return self._there(name, lambda: self._backend.stat(name))

    def tagged(self, name: str) -> Tagged | None:
        """Return a small file with its tag and age, None when there is none."""
        return self._there(name, lambda: self._backend.tagged(name))

    def replace(self, name: str, data: bytes, tag: str) -> bool:
        """Write over a file if it still has ``tag``; return whether this did it. As with ``put``, look again."""
        return bool(self._there(name, lambda: self._backend.replace(name, data, tag)))

    def remove(self, name: str, tag: str) -> bool:
        """Remove a file if it still has ``tag``; return whether this did it."""
        return bool(self._there(name, lambda: self._backend.remove(name, tag)))

    # -- how

    def _there(self, name: str, ask: Callable[[], _T]) -> _T | None:
        checked_name(name)

        def once() -> _T | None:
            try:
                return self._call(name, ask)
            except FileNotFoundError:
                return None

        return self._repeat(name, once)

    def _fill(self, name: str, draft: Path, nbytes: int, on_bytes: Callable[[int], None]) -> None:
        with draft.open("ab") as file:
            have = file.tell()
            if have > nbytes:
                file.truncate(0)
                have = 0
            try:
                for _ in range(3):  # an answer can also end early without an error
                    for block in self._blocks(name, have, nbytes):
                        file.write(block)
                        have += len(block)
                        on_bytes(len(block))
            except FileNotFoundError:
                raise FindingsError(
                    f"{self.address.shown}: {name} is named by a record and is not there; {self._remedy()}"
                ) from None
            finally:
                fsync_file(file, draft)
        if have != nbytes:
            raise FindingsError(
                f"{self.address.shown}: {name} has {have} bytes, its record says {nbytes}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        if self.address.is_local:
            return "the store is damaged: run `rsmtdf cache verify --deep --repair` on it"
        return (
            "the remote store is damaged, or changes right now: try again, and heal it with `rsmtdf cache push --deep` "
            "from where it was built"
        )

    def _blocks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``[start, stop)`` of a file as far as there are any, across lost connections."""
        tries = 0
        while start < stop:
            before = start
            # A line that is cut again and again still brings a smaller block.
            blocks = self._backend.read(name, start, stop, BLOCK_NBYTES >> 2 * tries)
            try:
                for block in self._guarded(name, blocks):
                    start += len(block)
                    yield block
                return
            except _Lost as error:
                tries = 1 if start > before else tries + 1
                if tries >= TRIES:
                    raise self._gone(name, error) from None
            time.sleep(PAUSE_S * 2 ** (tries - 1))

    def _repeat(self, name: str, action: Callable[[], _T]) -> _T:
        for number in range(TRIES):
            try:
                return action()
            except _Lost as error:
                if number == TRIES - 1:
                    raise self._gone(name, error) from None
            time.sleep(PAUSE_S * 2**number)
        raise AssertionError("the last try returns or raises")

    def _call(self, name: str, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except Exception as error:
            failure = self._translated(name, error)
        raise failure from None

    def _guarded(self, name: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            block = self._call(name, lambda: next(blocks, None))
            if block is None:
                return
            yield block

    def _gone(self, name: str, error: _Lost) -> ResourceError:
        return ResourceError(
            f"{self.address.shown}: the connection failed {TRIES} times in a row at {name} ({error}); "
            "run the same command again, it continues"
        )

    def _translated(self, name: str, error: Exception) -> Exception:
        """Return what to raise for ``error``. ``FileNotFoundError`` stays, without its text."""
        status = getattr(error, "status", None)
        if isinstance(error, RsmtdfError):
            return error
        if code_of(error) == "NoSuchUpload":
            return _Lost("an upload ended and its answer was lost")  # the next try finds the file, or puts it
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            if re.search(r"bucket\b.*\b(not exist|not found)", str(error), re.IGNORECASE):
                self.bucket_missing = True
            return FileNotFoundError(errno.ENOENT, "no such file", name)
        text = self.address.redact(f"{type(error).__name__}: {error}").replace("\n", " ")[:300]
        where = f"{self.address.shown}: {name}"
        if isinstance(error, PermissionError) or status in _DENIED or getattr(error, "errno", 0) == errno.EACCES:
            return ResourceError(f"{where}: access denied ({text}); check the credentials of this environment")
        if isinstance(status, int) and 400 <= status < 500 and status not in _AGAIN:
            return ResourceError(f"{where}: the server refused the request ({text})")
        if any(part in type(error).__name__ for part in _FINAL_NAMES):
            return ResourceError(f"{where}: {text}; check the address and the credentials of this environment")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"{where}: no space left ({text}); free some, the same command continues")
        if _passes(error):
            return _Lost(text)
        return ResourceError(f"{where}: {text}")


def _passes(error: Exception) -> bool:
    """Whether trying again can help."""
    if isinstance(error, (OSError, TimeoutError, EOFError)):
        return error.errno not in _FINAL_ERRNO if isinstance(error, OSError) else True
    library = type(error).__module__.partition(".")[0]
    return library in {"aiohttp", "botocore", "aiobotocore", "urllib3", "http", "requests", "gcsfs"}


class _RedactLog(logging.Filter):
    """Takes secrets out of what the libraries log (URLs, at level DEBUG)."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        record.exc_info = None
        return True


_redact_log = _RedactLog()
