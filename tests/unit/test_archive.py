"""Files in folders and archives: the same bytes wherever they lie; nothing hostile or damaged passes."""

from __future__ import annotations

import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.prepare.archive import list_members
from rsmtdf_cache.prepare.member import Limits, Member, open_member, read_member
from rsmtdf_cache.prepare.workplace import SpoolFolder
from tests.benchmarks import as_tar, as_zip

FILES = {"a/one.txt": b"one " * 5000, "a/b/two.bin": bytes(range(256)) * 9, "three": b"", "a/__MACOSX/x": b"no"}
SEEN = {name: data for name, data in FILES.items() if "__MACOSX" not in name}
LIMITS = Limits()


def listed(path: Path, limits: Limits = LIMITS, skip: Callable[[str], bool] = lambda n: False) -> list[Member]:
    spool = path.parent / ".spool"
    spool.mkdir(exist_ok=True)
    return list_members([path], SpoolFolder(Path(tempfile.mkdtemp(dir=spool))), limits, skip)


def content(path: Path) -> dict[str, bytes]:
    return {m.name.partition("/")[2]: read_member(m, LIMITS) for m in listed(path)}


def folder(root: Path) -> Path:
    for name, data in {**FILES, ".hidden": b"x", ".git/config": b"x"}.items():
        path = root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "data"


def nested(root: Path, packed: bool) -> Path:
    inner = as_zip(FILES.items(), root / "inner.zip").read_bytes()
    return as_zip([("data.zip", inner)], root / "outer.zip", packed)


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": folder,
    "zip": lambda r: as_zip(FILES.items(), r / "data.zip"),
    "zip, not packed": lambda r: as_zip(FILES.items(), r / "data.zip", packed=False),
    "tar": lambda r: as_tar(FILES.items(), r / "data.tar"),
    "tar.gz": lambda r: as_tar(FILES.items(), r / "data.tar.gz"),
    "tgz": lambda r: as_tar(FILES.items(), r / "data.tgz"),
    "tar.bz2": lambda r: as_tar(FILES.items(), r / "data.tar.bz2"),
    "tar.xz": lambda r: as_tar(FILES.items(), r / "data.tar.xz"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_the_same_in_a_folder_and_in_every_archive(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path)
    assert content(path) == SEEN
    for member in listed(path):
        with open_member(member, LIMITS) as file:
            assert file.read() == SEEN[member.name.partition("/")[2]]


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_within_an_archive_is_a_folder(tmp_path: Path, packed: bool) -> None:
    found = listed(nested(tmp_path, packed))
    assert {m.name: read_member(m, LIMITS) for m in found} == {f"outer/data/{n}": d for n, d in SEEN.items()}
    assert {m.depth for m in found} == {2}
    assert bool(list((tmp_path / ".spool").glob("*/*"))) == packed  # what is not packed is read where it lies


def test_archives_are_opened_within_folders_and_tars_within_zips(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    tar = as_tar(FILES.items(), tmp_path / "data.tar.gz").read_bytes()
    as_zip([("deep/data.tar.gz", tar)], tmp_path / "src" / "x.zip")
    assert {m.name for m in listed(tmp_path / "src")} == {f"src/x/deep/data/{n}" for n in SEEN}


def test_an_archive_with_bytes_before_it_is_read(tmp_path: Path) -> None:
    path = as_zip(FILES.items(), tmp_path / "data.zip")
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert content(path) == SEEN


def test_what_is_skipped_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "dsm.zip").write_bytes(b"no zip at all")
    as_zip([("x", b"1")], tmp_path / "src" / "rgb.zip")
    assert [m.name for m in listed(tmp_path / "src", skip=lambda n: n == "dsm")] == ["src/rgb/x"]


def test_a_link_that_leads_back_up_is_walked_once(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "a" / "loop").symlink_to(root)
    assert content(root) == SEEN


@pytest.mark.parametrize("name", ["../x.png", "a/../../x", "/var/x", "..\\x", "C:\\x", "a\nb", "a/.."])
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_a_name_that_leads_out_of_an_archive_is_refused(tmp_path: Path, name: str, form: str) -> None:
    write = as_zip if form == "zip" else as_tar
    path = write([("good", b"1"), (name, b"2")], tmp_path / f"data.{form}")
    with pytest.raises(DataError, match="leads out of the archive") as caught:
        listed(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        entry = tarfile.TarInfo("a/link")
        entry.type, entry.linkname = kind, "../../secret"
        archive.addfile(entry)
    with pytest.raises(DataError, match=r"x\.tar: a/link: a link or device"):
        listed(tmp_path / "x.tar")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("a/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(entry, "../../secret")
    with pytest.raises(DataError, match=r"x\.zip: a/link: a link or device"):
        listed(tmp_path / "x.zip")


def test_encrypted_and_otherwise_packed_members_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"1" * 999)
    with pytest.raises(DataError, match="packed with lzma; unpack"):
        listed(tmp_path / "x.zip")
    path = as_zip([("a", b"1")], tmp_path / "y.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="encrypted"):
        listed(path)


@pytest.mark.parametrize("form", ["zip", "zip, not packed", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_every_cut_of_an_archive_is_an_error(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path)
    whole = path.read_bytes()
    last = max(m.offset + m.stored_nbytes for m in listed(path)) if form == "tar" else len(whole)
    for end in range(0, last, max(1, last // 40)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"truncated|damaged") as caught:
            content(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
def test_every_flipped_byte_of_a_member_is_an_error(tmp_path: Path, packed: bool) -> None:
    data = bytes(range(256)) * 4
    path = as_zip([("a", data)], tmp_path / "x.zip", packed)
    whole = path.read_bytes()
    (member,) = listed(path)
    for position in range(31, 31 + member.stored_nbytes, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"x\.zip: a: (damaged|truncated|unpacks to more)"):
            read_member(member, LIMITS)


def test_a_file_that_declares_too_much_is_not_unpacked(tmp_path: Path) -> None:
    (member,) = listed(as_zip([("a", bytes(10_000_000))], tmp_path / "bomb.zip"))
    assert member.stored_nbytes < 20_000
    with pytest.raises(DataError, match=r"declares 10000000 bytes, a file has at most 1000000"):
        read_member(member, Limits(member_nbytes=1_000_000))


def test_a_file_that_declares_less_than_it_unpacks_to_is_stopped(tmp_path: Path) -> None:
    path = as_zip([("a", bytes(10_000_000))], tmp_path / "bomb.zip")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 1000)
    path.write_bytes(data)
    (member,) = listed(path)
    assert member.nbytes == 1000
    with pytest.raises(DataError, match="unpacks to more than the 1000 bytes it declares"):
        read_member(member, LIMITS)


@pytest.mark.parametrize("form", ["zip", "tar.gz", "tar.bz2"])
def test_an_inner_archive_is_unpacked_up_to_a_limit(tmp_path: Path, form: str) -> None:
    bulk = [("a", bytes(20_000_000))]
    if form == "zip":
        path = as_zip([("in.zip", as_zip(bulk, tmp_path / "in.zip", packed=False))], tmp_path / "out.zip")
    else:
        path = as_tar(bulk, tmp_path / f"out.{form}")
    with pytest.raises(DataError, match="unpacks to more than 3000000 bytes; stopped"):
        listed(path, Limits(archive_nbytes=3_000_000))
    assert sum(p.stat().st_size for p in (tmp_path / ".spool").glob("*/*")) <= 3_000_000


def test_archives_are_not_entered_endlessly(tmp_path: Path) -> None:
    data = as_zip([("x", b"1")], tmp_path / "x.zip").read_bytes()
    for number in range(4):
        data = as_zip([(f"x{number}.zip", data)], tmp_path / f"y{number}.zip").read_bytes()
    with pytest.raises(DataError, match="an archive within 3 archives"):
        listed(tmp_path / "y3.zip")


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    path = as_zip([(f"{i}", b"") for i in range(9)], tmp_path / "x.zip")
    with pytest.raises(DataError, match="more than 5 files"):
        listed(path, Limits(members=5))


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no such file"), ("x.rar", "not an archive that can be read")])
def test_what_is_no_source_is_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.rar").touch()
    with pytest.raises(DataError, match=said):
        listed(tmp_path / name)
