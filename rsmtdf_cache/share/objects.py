"""Objects behind URLs that can be written to: S3, and through fsspec whatever else there is."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from rsmtdf_cache.share.backends import BLOCK_NBYTES, FsspecBackend, Tagged, code_of

__all__ = ["ObjectBackend"]


class ObjectBackend(FsspecBackend):
    """Objects of a bucket, or files of whatever else fsspec writes to. S3 alone has conditional puts and deletes."""

    def _options(self) -> dict[str, Any]:
        if self._address.scheme not in ("s3", "s3a"):
            return {}
        # transport.py tries again itself, and several files travel at once: fewer tries and parts in flight here.
        config = {"retries": {"mode": "standard", "max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
        return {"config_kwargs": config, "max_concurrency": 2, "use_listings_cache": False}

    @property
    def _fs(self) -> Any:
        fs = super()._fs
        if self._is_s3:
            fs.retries = 1
        return fs

    def read(self, name: str, start: int, stop: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[bytes]:
        url = self._address.url(name)
        while start < stop:
            asked = min(block_nbytes, stop - start)
            try:
                block: bytes = self._fs.cat_file(url, start=start, end=start + asked)
            except OSError as error:
                if error.errno == errno.EINVAL and not isinstance(error, FileNotFoundError):
                    return  # S3's answer to a range that begins after the end
                raise
            if len(block) > asked:  # the server ignored the range
                block = block[start : start + asked]
            if block:
                yield block
            start += len(block)
            if len(block) < asked:
                return

    def size(self, name: str) -> int:
        return int(self._fs.info(self._address.url(name))["size"])

    def listing(self, folder: str) -> dict[str, int] | None:
        fs, root = self._fs, self._address.location.rstrip("/")
        below = fs._strip_protocol(root).strip("/") + "/"
        fs.invalidate_cache()
        try:
            found = fs.find(f"{root}/{folder}", detail=True)
        except (FileNotFoundError, PermissionError, NotImplementedError):
            return None  # nothing there, or a key that may read and not list: sizes are asked one by one
        sizes = {n.lstrip("/"): int(f["size"]) for n, f in found.items() if f["type"] == "file"}
        if not all(name.startswith(below) for name in sizes):
            return None
        return {name.removeprefix(below): size for name, size in sizes.items()}

    def put(self, name: str, source: bytes | Path, absent: bool) -> bool:
        try:
            self._put(name, source, "create" if absent else "overwrite")
        except FileExistsError:
            return False
        except OSError as error:
            if absent and _is_precondition(error):
                return False  # a server that does not say which condition failed
            if not absent or error.errno != errno.ENOSYS:
                raise
            return self._put_unguarded(name, source)  # a server without conditional puts
        except NotImplementedError:
            if not absent:
                raise
            return self._put_unguarded(name, source)
        return True

    def _put(self, name: str, source: bytes | Path, mode: str) -> None:
        url, fs = self._address.url(name), self._fs
        try:
            self._send(fs, url, source, mode)
        except FileNotFoundError:
            if self._address.scheme in ("s3", "s3a", "gs", "gcs"):
                raise  # no such bucket; making one is not ours
            fs.makedirs(url.rpartition("/")[0], exist_ok=True)
            self._send(fs, url, source, mode)

    # -- only if it is still the one that was seen

    def top(self) -> list[str] | None:
        fs = self._fs
        fs.invalidate_cache()
        try:
            found = fs.ls(self._address.location, detail=False)
        except FileNotFoundError:
            return []
        except (PermissionError, NotImplementedError):
            return None
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def stat(self, name: str) -> tuple[int, str]:
        fs = self._fs
        fs.invalidate_cache()
        found = fs.info(self._address.url(name))
        return int(found["size"]), str(found["ETag"]) if self._is_s3 else _tag(found)

    def tagged(self, name: str) -> Tagged:
        if self._is_s3:
            from fsspec.asyn import sync

            found: Tagged = sync(self._fs.loop, self._tagged_s3, name)
            return found
        data, url = self._fs.cat_file(self._address.url(name)), self._address.url(name)
        return Tagged(data, self.stat(name)[1], _age_s(self._fs.info(url)))

    async def _tagged_s3(self, name: str) -> Tagged:
        answer = await self._fs._call_s3("get_object", **self._key(name))
        data = await answer["Body"].read()
        said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(said) if said else datetime.now(UTC)
        return Tagged(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def replace(self, name: str, data: bytes, tag: str) -> bool:
        return self._if_match("put_object", name, tag, lambda: self._put(name, data, "overwrite"), Body=data)

    def remove(self, name: str, tag: str) -> bool:
        return self._if_match("delete_object", name, tag, lambda: self._fs.rm_file(self._address.url(name)))

    @property
    def _is_s3(self) -> bool:
        return self._address.scheme in ("s3", "s3a")

    def _key(self, name: str) -> dict[str, str]:
        bucket, key, _ = self._fs.split_path(self._address.url(name))
        return {"Bucket": bucket, "Key": key}

    def _if_match(self, method: str, name: str, tag: str, instead: Callable[[], object], **more: Any) -> bool:
        """Call an S3 method if the object still has ``tag``; return whether it had.

        Where nobody can be asked to look and write at once, ``instead`` follows a look: a window of one request.
        """
        if not self._is_s3:
            return self._looked(name, tag, instead)
        try:
            self._fs.call_s3(method, **self._key(name), IfMatch=tag, **more)
        except FileNotFoundError:
            return False
        except OSError as error:
            if _is_precondition(error):
                return False
            if error.errno == errno.ENOSYS:
                return self._looked(name, tag, instead)
            raise
        return True

    def _looked(self, name: str, tag: str, act: Callable[[], object]) -> bool:
        if self.stat(name)[1] != tag:
            return False
        act()
        return True

    def _put_unguarded(self, name: str, source: bytes | Path) -> bool:
        if self._fs.exists(self._address.url(name)):
            return False
        self._put(name, source, "overwrite")
        return True

    def _send(self, fs: Any, url: str, source: bytes | Path, mode: str) -> None:
        if isinstance(source, bytes):
            fs.pipe_file(url, source, mode=mode)
        elif self._address.scheme in ("s3", "s3a"):
            fs.put_file(str(source), url, mode=mode, chunksize=16 * 2**20)
        else:
            fs.put_file(str(source), url, mode=mode)


def _is_precondition(error: OSError) -> bool:
    """Whether an S3 server says that what was to be there, or not to be there, is otherwise."""
    return code_of(error) in ("PreconditionFailed", "412")


def _tag(info: Mapping[str, Any]) -> str:
    """Return what tells one content of a file from the next, as far as its file system says so."""
    names = ("ETag", "etag", "generation", "md5Hash", "updated", "LastModified", "last_modified", "mtime", "created")
    return "/".join(f"{info[name]}" for name in names if info.get(name) is not None) or str(info["size"])


def _age_s(info: Mapping[str, Any]) -> float:
    """Return the seconds since a file was written by this machine's clock, 0 where its file system does not say."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        when = info.get(name)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        if isinstance(when, (int, float)):
            when = datetime.fromtimestamp(when, UTC)
        if isinstance(when, datetime):
            return (datetime.now(UTC) - (when if when.tzinfo else when.replace(tzinfo=UTC))).total_seconds()
    return 0.0
