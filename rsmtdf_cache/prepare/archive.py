"""Files of a benchmark wherever they lie: in a folder, a zip, a tar, a zip within a zip. Only listed and read.

An archive that lies unpacked within another is read where it lies; a packed one, and a packed tar,
is first copied to a temporary folder, for neither can be entered in the middle.

What an archive says of itself is not believed: names that lead out of it, links and devices are refused, and whatever
is unpacked is bounded by ``Limits`` while it is unpacked.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.member import AGAIN, BLOCK, Limits, Member, data_offset, stored_bytes

__all__ = ["Spool", "list_members"]

_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_SUFFIXES = (".zip", ".tar", *_PACKED_TARS)


class Spool(Protocol):
    """Gives a new path in a temporary folder of the caller's, who removes it."""

    def __call__(self) -> Path: ...


def list_members(
    sources: Sequence[Path], spool: Spool, limits: Limits, skip: Callable[[str], bool] = lambda name: False
) -> list[Member]:
    """Return all files of ``sources`` (folders and archives), archives within them opened, sorted by name.

    ``skip`` tells by its name which inner archive is not opened (it does not appear at all). Hidden files and
    ``__MACOSX`` are left out; links in folders are followed. Raises ``DataError`` naming the archive and member.
    """
    found: list[Member] = []
    for source in sources:
        for member in _top(source):
            for inner in _opened(member, spool, limits, skip):
                found.append(inner)
                if len(found) > limits.members:
                    raise DataError(f"{source}: more than {limits.members} files; give the benchmark's folder alone")
    return sorted(found, key=lambda m: (m.name, m.place))


def _top(source: Path) -> Iterator[Member]:
    """Yield the files of a folder, or the archive ``source`` itself."""
    if source.is_dir():
        yield from _walk(source)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder; give the folder or the archives of the benchmark")
    elif not source.name.lower().endswith(_SUFFIXES):
        raise DataError(f"{source}: not an archive that can be read; give a folder, .zip, .tar, .tar.gz, .bz2 or .xz")
    else:
        yield _plain(source, source.name)


def _walk(root: Path) -> Iterator[Member]:
    seen: set[str] = set()
    top = root.resolve().name
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(files):
            path = Path(folder, name)
            if not _hidden(name) and path.is_file():
                yield _plain(path, (Path(top) / path.relative_to(root)).as_posix())


def _plain(path: Path, name: str) -> Member:
    nbytes = path.stat().st_size
    return Member(name, str(path), path, 0, nbytes, nbytes)


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _opened(member: Member, spool: Spool, limits: Limits, skip: Callable[[str], bool]) -> Iterator[Member]:
    """Yield ``member``, or what is in it when it is an archive."""
    suffix = next((s for s in reversed(_SUFFIXES) if member.name.lower().endswith(s)), None)
    if suffix is None:
        yield member
        return
    name = member.name[: -len(suffix)]
    if skip(name.rpartition("/")[2]):
        return
    if member.depth >= limits.depth:
        raise DataError(f"{member.place}: an archive within {member.depth} archives; {limits.depth} is the most")
    if member.packed:
        member = _unpacked(member, spool(), limits, None)
    if suffix in _PACKED_TARS:
        member = _unpacked(member, spool(), limits, suffix)
    listing = _zip_members if suffix == ".zip" else _tar_members
    for inner in listing(replace(member, name=name), limits):
        yield from _opened(inner, spool, limits, skip)


def _unpacked(member: Member, out: Path, limits: Limits, suffix: str | None) -> Member:
    """Copy an archive that is packed, as a member (no ``suffix``) or in itself, to ``out``; return it as it lies there.

    Bounded by ``limits.archive_nbytes``.
    """
    total = 0
    with out.open("xb") as copy:
        try:
            for block in _blocks(member, suffix):
                total += len(block)
                if total > limits.archive_nbytes:
                    raise DataError(f"{member.place}: unpacks to more than {limits.archive_nbytes} bytes; stopped")
                copy.write(block)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{member.place}: truncated or damaged, cannot be unpacked ({error}); {AGAIN}") from None
        except OSError as error:
            if error.errno is None:  # what bz2 raises for damaged data
                raise DataError(f"{member.place}: damaged, cannot be unpacked ({error}); {AGAIN}") from None
            raise
    return replace(member, file=out, offset=0, stored_nbytes=total, nbytes=total, zipped=False, packed=False)


def _blocks(member: Member, suffix: str | None) -> Iterator[bytes]:
    with stored_bytes(member) as file:
        if suffix is None:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            while not unpacker.eof:
                data = unpacker.unconsumed_tail or file.read(BLOCK)
                if not data:
                    raise EOFError("it ends too early")
                yield unpacker.decompress(data, BLOCK)
            return
        opener = gzip.open if suffix.endswith("gz") else bz2.open if suffix.endswith("bz2") else lzma.open
        with opener(file, "rb") as stream:
            while block := stream.read(BLOCK):
                yield bytes(block)


def _zip_members(archive: Member, limits: Limits) -> Iterator[Member]:
    start = 0
    with stored_bytes(archive) as file:
        with archive.file.open("rb") as raw:
            start = data_offset(raw, archive)
        try:
            with zipfile.ZipFile(file) as opened:
                entries = opened.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, OSError, NotImplementedError) as error:
            raise DataError(f"{archive.place}: truncated or no zip file ({error}); {AGAIN}") from None
    for entry in entries[: limits.members + 1]:
        name = _safe(entry.orig_filename, archive)
        place = f"{archive.place}: {name}"
        mode = entry.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{place}: a link or device in an archive; it is refused, nothing was unpacked")
        if entry.is_dir() or any(map(_hidden, name.split("/"))):
            continue
        if entry.flag_bits & 1:
            raise DataError(f"{place}: encrypted; unpack the archive yourself and give the folder")
        if entry.compress_type not in (_STORED, _DEFLATED):
            kind = zipfile.compressor_names.get(entry.compress_type, entry.compress_type)  # type: ignore[attr-defined]
            raise DataError(f"{place}: packed with {kind}; unpack the archive yourself and give the folder")
        end = entry.header_offset + entry.compress_size
        if entry.header_offset < 0 or end > archive.stored_nbytes:
            raise DataError(f"{place}: truncated, it should end at byte {end} of {archive.stored_nbytes}; {AGAIN}")
        packed = entry.compress_type == _DEFLATED
        if not packed and entry.file_size != entry.compress_size:
            raise DataError(f"{place}: damaged, its two sizes differ; {AGAIN}")
        yield Member(
            f"{archive.name}/{name}", place, archive.file, start + entry.header_offset, entry.compress_size,
            entry.file_size, archive.depth + 1, zipped=True, packed=packed, crc=entry.CRC,
        )  # fmt: skip


def _tar_members(archive: Member, limits: Limits) -> Iterator[Member]:
    with archive.file.open("rb") as raw:
        start = data_offset(raw, archive)
    with stored_bytes(archive) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for count, entry in enumerate(opened):
                    if count > limits.members:
                        return
                    name = _safe(entry.name, archive)
                    place = f"{archive.place}: {name}"
                    if not (entry.isfile() or entry.isdir()) or entry.issparse():
                        raise DataError(f"{place}: a link or device in an archive; it is refused, nothing was unpacked")
                    if entry.isdir() or any(map(_hidden, name.split("/"))):
                        continue
                    end = entry.offset_data + entry.size
                    if entry.size < 0 or end > archive.stored_nbytes:
                        raise DataError(
                            f"{place}: truncated, it should end at byte {end} of {archive.stored_nbytes}; {AGAIN}"
                        )
                    yield Member(
                        f"{archive.name}/{name}", place, archive.file, start + entry.offset_data, entry.size,
                        entry.size, archive.depth + 1,
                    )  # fmt: skip
                file.seek(opened.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a missing end for an end
                    raise EOFError("it has no end mark")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(f"{archive.place}: truncated or no tar file ({error}); {AGAIN}") from None


def _safe(name: str, archive: Member) -> str:
    """Return ``name`` with ``/`` between its parts. Raises ``DataError`` when it leads out of the archive."""
    parts = name.replace("\\", "/").split("/")
    if "" in parts[:1] or ".." in parts or ":" in parts[0] or any(ord(c) < 32 for c in name):
        raise DataError(
            f"{archive.place}: holds a file named {name[:80]!r}, which leads out of the archive; it is refused, "
            "nothing was unpacked"
        )
    return "/".join(part for part in parts if part not in ("", "."))
