"""The ways to reach a store: a folder, a web server (read only); ``objects.py`` has all other file systems of fsspec.

A backend raises whatever its library raises; ``transport.py`` alone turns that into this project's errors.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.share.address import Address

__all__ = ["BLOCK_NBYTES", "Backend", "FsspecBackend", "STREAM_NBYTES", "Tagged", "code_of", "open_backend"]

#: One ranged request of an object store asks for that much.
BLOCK_NBYTES = 8 * 2**20
#: One read of a stream.
STREAM_NBYTES = 2**20
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}


@dataclass(frozen=True)
class Tagged:
    """An object as one answer had it. ``tag``: another one when it is replaced; ``age_s``: since it was written, by the
    server's own clock where it tells its time.
    """

    data: bytes
    tag: str
    age_s: float


def code_of(error: Exception) -> str:
    """Return the code that an S3 server gave with ``error``, empty for none."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


class Backend(ABC):
    """Files of one store by their names (already checked)."""

    def __init__(self, address: Address) -> None:
        self._address = address

    @abstractmethod
    def read(self, name: str, start: int, stop: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[bytes]:
        """Yield the bytes ``[start, stop)`` of a file, fewer when it ends before. Never yields more.

        ``block_nbytes``: how much one request asks for where a request brings all or nothing.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises ``FileNotFoundError``."""

    def listing(self, folder: str) -> dict[str, int] | None:
        """Return the bytes of every file below ``folder`` by name, None where folders cannot be listed."""
        return None

    def put(self, name: str, source: bytes | Path, absent: bool) -> bool:
        """Write a file in one step; ``absent``: only when there is none. Return whether it was written."""
        raise NotImplementedError

    def top(self) -> list[str] | None:
        """Return the names of files and folders right below the store, None where they cannot be listed."""
        return None

    def stat(self, name: str) -> tuple[int, str]:
        """Return bytes and tag of a file (``Tagged.tag``). Raises ``FileNotFoundError``."""
        raise NotImplementedError

    def tagged(self, name: str) -> Tagged:
        """Return a small file. Raises ``FileNotFoundError``."""
        raise NotImplementedError

    def replace(self, name: str, data: bytes, tag: str) -> bool:
        """Write over a file if it still has ``tag``; return whether this did it."""
        raise NotImplementedError

    def remove(self, name: str, tag: str) -> bool:
        """Remove a file if it still has ``tag``; return whether this did it."""
        raise NotImplementedError


def open_backend(address: Address) -> Backend:
    """Return the backend of ``address``. Raises ``ResourceError`` when the package for its protocol is missing."""
    if address.is_local:
        return _Folder(address)
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(address.scheme)
    except ImportError as error:
        extra = _EXTRAS.get(address.scheme)
        install = f"pip install 'rsmtdf[{extra}]' (in a clone: pip install -e '.[{extra}]')"
        hint = install if extra else address.redact(str(error))
        raise ResourceError(f"{address.shown}: a package for {address.scheme}:// is missing: {hint}") from None
    if address.is_http:
        return _Web(address)
    from rsmtdf_cache.share.objects import ObjectBackend

    return ObjectBackend(address)


class _Folder(Backend):
    def read(self, name: str, start: int, stop: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[bytes]:
        # Not blocking: a pipe in a hostile folder must not hang us before the next line refuses it.
        handle = os.open(self._address.path / name, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileNotFoundError(name)
            file.seek(start)
            while start < stop and (block := file.read(min(STREAM_NBYTES, stop - start))):
                start += len(block)
                yield block

    def size(self, name: str) -> int:
        return (self._address.path / name).stat().st_size


class FsspecBackend(Backend):
    """A file system of fsspec, made anew in every process: its event loop does not survive a fork."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._made: tuple[int, Any] = (0, None)

    def _options(self) -> dict[str, Any]:
        return {}

    @property
    def _fs(self) -> Any:
        import fsspec

        if self._made[0] != os.getpid():
            fs = fsspec.filesystem(self._address.scheme, skip_instance_cache=True, **self._options())
            self._made = (os.getpid(), fs)
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_address": self._address, "_made": (0, None)}


class _Web(FsspecBackend):
    """A web server through fsspec's session. Responses are streamed, so that a server that ignores ``Range``, or sends
    without end, costs no memory.
    """

    def _options(self) -> dict[str, Any]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        # trust_env: proxies; no decompression: a few bytes must not unfold into many.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False}}

    def read(self, name: str, start: int, stop: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[bytes]:
        from fsspec.asyn import sync

        fs = self._fs
        response = sync(fs.loop, self._request, "GET", name, {"Range": f"bytes={start}-{stop - 1}"})
        try:
            if response.status == 416:  # the file ends before start
                return
            response.raise_for_status()
            skip, left = _ignored(response, start), stop - start
            while left > 0:
                block: bytes = sync(fs.loop, response.content.read, STREAM_NBYTES)
                if not block:
                    return
                part = block[skip:]
                skip = max(0, skip - len(block))
                part = part[:left]
                left -= len(part)
                if part:
                    yield part
        finally:
            fs.loop.call_soon_threadsafe(response.close)

    def size(self, name: str) -> int:
        from fsspec.asyn import sync

        response = sync(self._fs.loop, self._request, "HEAD", name, {})
        self._fs.loop.call_soon_threadsafe(response.close)
        response.raise_for_status()
        return int(response.headers["Content-Length"])

    async def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        session = await self._fs.set_session()
        url = self._fs.encode_url(self._address.url(name))
        own = {**self._fs.kwargs, "headers": {**self._fs.kwargs.get("headers", {}), **headers}}
        own["headers"]["Accept-Encoding"] = "identity"
        response = await session.request(method, url, allow_redirects=True, **own)
        if response.status == 404:
            response.close()
            raise FileNotFoundError(name)
        return response


def _ignored(response: Any, start: int) -> int:
    """Return how many bytes to skip: the server may ignore the range and send the file from its beginning."""
    if response.status != 206:
        return start
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise ConnectionError("the server answered with another part of the file than was asked for")
    return 0
