"""One file of a benchmark, wherever it lies: a place in a file of the disk (offset, length, method).

So any thread can read it without the archive being opened again.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import IO

from rsmtdf_cache.errors import DataError

__all__ = ["AGAIN", "BLOCK", "Limits", "Member", "data_offset", "open_member", "read_member", "stored_bytes"]

BLOCK = 2**20
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Limits:
    """Bounds on what is unpacked: bytes of one file and of one inner archive, files, depth of archives."""

    member_nbytes: int = 2 * 2**30
    archive_nbytes: int = 200 * 2**30
    members: int = 1_000_000
    depth: int = 3


@dataclass(frozen=True)
class Member:
    """One file. ``name`` is its path with ``/``, archives counting as folders (``Potsdam/2_Ortho_RGB/…/x.tif``).

    Its bytes begin at ``offset`` of ``file``: ``stored_nbytes`` of them become ``nbytes``. With ``zipped`` a local zip
    header stands there first. ``place`` is what messages call it; ``depth`` the number of archives it lies in.
    """

    name: str
    place: str
    file: Path
    offset: int
    stored_nbytes: int
    nbytes: int
    depth: int = 0
    zipped: bool = False
    packed: bool = False
    crc: int | None = None


def read_member(member: Member, limits: Limits) -> bytes:
    """Return the bytes of ``member``, at most ``limits.member_nbytes``.

    Raises ``DataError`` when it is larger, truncated, unpacks to another size than it declares or fails its checksum.
    """
    if member.nbytes > limits.member_nbytes:
        raise DataError(
            f"{member.place}: declares {member.nbytes} bytes, a file has at most {limits.member_nbytes}; nothing of it "
            "was unpacked"
        )
    try:
        with member.file.open("rb") as file:
            file.seek(data_offset(file, member))
            data = file.read(member.stored_nbytes)
    except OSError as error:
        raise DataError(f"{member.place}: cannot be read ({error.strerror})") from None
    if len(data) != member.stored_nbytes:
        raise DataError(f"{member.place}: truncated, {len(data)} of {member.stored_nbytes} bytes are there; {AGAIN}")
    if member.packed:
        data = _inflated(data, member)
    if member.crc is not None and zlib.crc32(data) != member.crc:
        raise DataError(f"{member.place}: damaged, its checksum is wrong; {AGAIN}")
    return data


def open_member(member: Member, limits: Limits) -> IO[bytes]:
    """Return ``member`` as a file to read from; what is not packed is read only where it is asked. Raises as above."""
    return BytesIO(read_member(member, limits)) if member.packed else stored_bytes(member)


def _inflated(data: bytes, member: Member) -> bytes:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        whole = unpacker.decompress(data, member.nbytes + 1)  # one more than declared: a liar is caught, not served
    except zlib.error as error:
        raise DataError(f"{member.place}: damaged, cannot be unpacked ({error}); {AGAIN}") from None
    if len(whole) > member.nbytes:
        raise DataError(f"{member.place}: unpacks to more than the {member.nbytes} bytes it declares; nothing was kept")
    if len(whole) < member.nbytes or not unpacker.eof:
        raise DataError(f"{member.place}: truncated, unpacks to {len(whole)} of {member.nbytes} bytes; {AGAIN}")
    return whole


def data_offset(file: IO[bytes], member: Member) -> int:
    """Return where the bytes of ``member`` begin in the open ``file`` it lies in. Raises ``DataError``."""
    if not member.zipped:
        return member.offset
    file.seek(member.offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise DataError(f"{member.place}: damaged, the archive has no such file where it says; {AGAIN}")
    name_nbytes, extra_nbytes = struct.unpack_from("<HH", header, 26)
    return int(member.offset + 30 + name_nbytes + extra_nbytes)


class _Slice(RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, nbytes: int) -> None:
        self._file = path.open("rb")
        self._offset, self._nbytes, self._position = offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # what BufferedReader passes
        count = max(0, min(len(view), self._nbytes - self._position))
        self._file.seek(self._offset + self._position)
        read = self._file.readinto(view[:count])
        self._position += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def stored_bytes(member: Member) -> BufferedReader:
    """Return the bytes of ``member`` as they lie on the disk, packed or not, as a file to read and seek in."""
    with member.file.open("rb") as file:
        offset = data_offset(file, member)
    return BufferedReader(_Slice(member.file, offset, member.stored_nbytes), BLOCK)
