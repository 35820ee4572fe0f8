"""A flipped bit, a missing or an unlisted file is found and named, and never trains silently."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    data = write_dataset(folder / "data", tiles=9, tile_px=64)
    request = BuildRequest.of({"data": data, "out": folder / "s", "teachers": ["mean"], "group_rows": 3})
    build_store(request, load_teacher=load_mean_teacher)
    return folder / "s"


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def files(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_sound_store_has_no_findings(store: Path) -> None:
    assert verify_store(store) == [] and verify_store(store, deep=True) == []


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(store: Path) -> None:
    rng = random.Random(7)
    for path in files(store):
        data = bytearray(path.read_bytes())
        for _ in range(3):
            position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            data[position] ^= bit
            path.write_bytes(data)
            findings = verify_store(store, deep=True)
            name = path.relative_to(store).as_posix()
            assert findings, f"bit {bit} of byte {position} in {name}"
            assert any(path.name in f.path or path.name in f.fault or path.stem in f.path for f in findings), findings
            data[position] ^= bit
        path.write_bytes(data)
    assert verify_store(store, deep=True) == []


def test_a_missing_file_is_a_finding_whichever_it_is(store: Path) -> None:
    for path in files(store):
        data = path.read_bytes()
        path.unlink()
        if path.name == "manifest.json":
            with pytest.raises(MismatchError, match="not a feature store"):
                verify_store(store)
        else:
            assert verify_store(store), path
        path.write_bytes(data)


def test_an_unlisted_file_and_a_truncated_shard_are_findings(store: Path) -> None:
    (store / "zarr" / "mean" / "notes.txt").write_text("hello")
    assert [f.path for f in verify_store(store)] == ["zarr/mean/notes.txt"]
    (store / "zarr" / "mean" / "notes.txt").unlink()
    shard = next(iter(sorted(store.rglob("c/0/0/0/0"))))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [f.path for f in verify_store(store)] == [shard.relative_to(store).as_posix()]


@pytest.mark.parametrize("mode", ["first", "always"])
def test_a_read_refuses_a_shard_with_a_flipped_bit(store: Path, mode: str) -> None:
    key = FeatureStore.open(store).keys()[0]
    shard = store / "zarr" / str(key) / "features" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FindingsError, match="sha256 differs"):
        FeatureStore.open(store, verify_reads=mode).read(key, [0])  # type: ignore[arg-type]
    assert FeatureStore.open(store, verify_reads="never").read(key, [0]).valid.all()


def test_an_index_that_points_outside_the_file_is_refused_before_it_is_followed(store: Path) -> None:
    import google_crc32c

    key = FeatureStore.open(store).keys()[0]
    shard = store / "zarr" / str(key) / "features" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[-52:-44] = (2**62).to_bytes(8, "little")  # offset of the first of three entries, checksum made to fit
    data[-4:] = google_crc32c.value(bytes(data[-52:-4])).to_bytes(4, "little")
    shard.write_bytes(data)
    with pytest.raises(FindingsError, match="outside the file"):
        FeatureStore.open(store, verify_reads="never").read(key, [0])


def test_no_store_and_a_newer_format_are_told_apart(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        FeatureStore.open(tmp_path / "nowhere")
    from rsmtdf_cache.files import publish_json, read_json

    manifest = {**read_json(store / "manifest.json"), "version": 99}
    (store / "manifest.json").unlink()
    publish_json(store / "manifest.json", manifest, tmp_path / "tmp")
    with pytest.raises(MismatchError, match="format version 99"):
        FeatureStore.open(store)
