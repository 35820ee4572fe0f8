"""A flipped bit, a missing or an unlisted file is found and named, and never trains silently."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.files import build_lock, read_json, replace_json
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.segment import read_segment_commits, write_segment
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.pins import list_pins, pin_snapshot
from rsmtdf_cache.verify import verify_store
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    data = write_dataset(folder / "data", tiles=9, tile_px=64)
    request = BuildRequest.of({"data": data, "out": folder / "s", "teachers": ["mean"], "group_rows": 3})
    build_store(request, load_teacher=load_mean_teacher)
    return folder / "s"


@pytest.fixture(scope="module")
def everything(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of file: a segment and records, several snapshots, pins, a dropped array, quarantine."""
    store = Path(shutil.copytree(sound, tmp_path_factory.mktemp("everything") / "s"))
    paths = StorePaths(store)
    ledger = Ledger.load(paths)
    ledger.compact(tail_max=0)
    pin_snapshot(store, owner="é, a run", expires="2999-12-31")
    replace_json(paths.quarantine, {"tiles": {"t100": "no image"}})
    write_head(paths, load_manifest(paths), ledger)
    data = sound.parent / "data"
    request = BuildRequest.of({"data": data, "out": store, "teachers": ["mean"], "splits": ["train", "val"]})
    build_store(request, load_teacher=load_mean_teacher)
    replace_json(paths.quarantine, {"tiles": {"t100": "no image"}})
    ledger = Ledger.load(paths)
    ledger.drop([(ledger.set_of(key), key.layer) for key in ledger.specs() if key.layer == "mean16"])
    write_head(paths, load_manifest(paths), ledger)
    kinds = {p.relative_to(store).parts[1] for p in files(store) if p.relative_to(store).parts[0] == "ledger"}
    assert kinds == {
        "tiles",
        "sets",
        "commits",
        "segments",
        "snapshots",
        "head.json",
        "dropped.json",
        "quarantine.json",
    }
    assert verify_store(store, deep=True) == []
    return store


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_flipped_bit_at_any_position_is_found_and_the_file_named(everything: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = rng.choice(files(everything))
    data = path.read_bytes()
    position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
    try:
        findings = verify_store(everything, deep=True)
    finally:
        path.write_bytes(data)
    name = path.relative_to(everything).as_posix()
    assert any(name == f.path for f in findings), f"bit {bit} of byte {position} in {name}: {findings}"


def test_a_missing_file_is_a_finding_whichever_it_is(store: Path) -> None:
    for path in files(store):
        data = path.read_bytes()
        path.unlink()
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


def test_links_are_findings_and_not_followed(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    (store / "zarr" / "folder").symlink_to(outside)
    shard = next(iter(sorted(store.rglob("mean8/features/c/0/0/0/0"))))
    shutil.move(shard, outside / "shard")
    shard.symlink_to(outside / "shard")
    faults = {f.path: f.fault for f in verify_store(store, deep=True)}
    assert set(faults) == {"zarr/folder", shard.relative_to(store).as_posix()}
    assert faults["zarr/folder"] == "a link, which a store never holds"


def test_shards_that_no_record_names_are_findings_unless_a_builder_is_at_work(store: Path) -> None:
    stray = store / "zarr/mean/s64o0/mean8/features/c/7/0/0/0"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    foreign = store / "zarr/mean/s64o0/other/features/c/7/0/0/0"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"half")
    with build_lock(StorePaths(store).lock):
        assert [f.path for f in verify_store(store)] == [foreign.relative_to(store).as_posix()]
    faults = {f.path: f.fault for f in verify_store(store)}
    assert faults[stray.relative_to(store).as_posix()].startswith(
        "left by an interrupted build; the same `cache build`"
    )
    assert len(faults) == 2


def test_shards_of_a_dropped_array_may_be_gone_but_not_damaged(everything: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(everything, tmp_path / "s"))
    shard = store / "zarr/mean/s64o0/mean16/features/c/0/0/0/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [f.path for f in verify_store(store)] == [shard.relative_to(store).as_posix()]
    shard.unlink()
    assert verify_store(store, deep=True) == []


def test_a_missing_segment_is_a_finding_unless_its_records_are_in_another(everything: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(everything, tmp_path / "s"))
    paths = StorePaths(store)
    (segment,) = paths.segments.glob("*.parquet")
    data = segment.read_bytes()
    segment.unlink()
    assert paths.relative(segment) in {f.path for f in verify_store(store)}
    segment.write_bytes(data)
    Ledger.load(paths).compact(tail_max=0)  # as in a build that is killed before it writes the head: the tail is gone
    assert len(list(paths.segments.glob("*.parquet"))) == 2 and verify_store(store, deep=True) == []
    commits = [c for path in paths.segments.glob("*.parquet") for c in read_segment_commits(path)]
    whole = Ledger.load(paths)
    one = write_segment(paths.segments, [whole.complete(c) for c in commits])
    for path in paths.segments.glob("*.parquet"):
        if path != one:
            path.unlink()  # and all segments were folded into one
    assert verify_store(store, deep=True) == []


def test_a_pinned_snapshot_that_cannot_be_read_any_more_is_a_finding(everything: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(everything, tmp_path / "s"))
    (pin,) = list_pins(store)
    (store / "ledger" / "snapshots" / f"{pin.snapshot}.json").unlink()
    assert [f.path for f in verify_store(store)] == [f"ledger/snapshots/{pin.snapshot}.json"]


def test_a_record_with_rows_of_another_group_is_a_finding(store: Path) -> None:
    paths = StorePaths(store)
    ledger = Ledger.load(paths)
    name = next(iter(ledger.sets))
    place = paths.commit(name, 0)
    body = read_json(place)
    for change in ({"start": 1}, {"stop": 4}, {"stop": 0}):
        replace_json(place, {**body, **change})
        write_head(paths, load_manifest(paths), Ledger.load(paths))
        faults = [f for f in verify_store(store) if f.path == paths.relative(place)]
        assert len(faults) == 1 and "row group 0" in faults[0].fault


def test_a_head_of_another_snapshot_is_a_finding(store: Path) -> None:
    paths = StorePaths(store)
    replace_json(paths.head, {**read_json(paths.head), "snapshot": "0" * 64})
    assert [(f.path, f.fault[:35]) for f in verify_store(store)] == [
        ("ledger/head.json", f"its snapshot is {'0' * 19}")
    ]


def test_commits_made_after_the_head_are_no_findings(store: Path) -> None:
    paths = StorePaths(store)
    name, head = next(iter(Ledger.load(paths).sets)), read_json(paths.head)
    del head["files"][paths.relative(paths.commit(name, 1))]
    replace_json(paths.head, {**head, "snapshot": "0" * 64})  # as it was before the last commits of a killed build
    assert verify_store(store, deep=True) == []


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["cache", "verify", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_ends_with_7_names_the_file_and_says_so_in_json(store: Path, sound: Path) -> None:
    data = sound.parent / "data"
    assert run(store)[0] == 0 and "no findings" in run(store, "--deep")[1]
    assert "nothing to repair" in run(store, "--repair")[1]
    shard = store / "zarr/mean/s64o0/mean8/features/c/0/0/0/0"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:5] + bytes([raw[5] ^ 1]) + raw[6:])
    name = shard.relative_to(store).as_posix()
    code, out, err = run(store, "--deep", "--json")
    assert code == 7 and name in err
    assert [f["path"] for f in json.loads(out)["findings"]] == [name]
    code, _, err = run(store, "--repair")
    assert code == 2 and name in err and "--data" in err
    code, _, err = run(store, "--repair", "--data", data)  # "mean" is no teacher that the command knows
    assert code == 2 and "unknown teacher 'mean'" in err
    for bad in (["--recompute", 3], ["--data", data], ["--teacher", "x"], ["--recompute", 0, "--data", data],
                ["--repair", "--teacher", "mean,colour=red"]):  # fmt: skip
        assert run(store, *bad)[0] == 2, bad


def test_the_command_recomputes_and_repairs_with_the_recorded_seed(sound: Path, tmp_path: Path) -> None:
    data, out = sound.parent / "data", tmp_path / "t"
    values = {"data": data, "out": out, "teachers": ["timm:test_resnet,pretrained=none,seed=2"], "scales": [1.0],
              "threads": 1, "micro_batch": 4, "device": "cpu", "group_rows": 3}  # fmt: skip
    build_store(BuildRequest.of(values))
    code, text, _ = run(out, "--recompute", 3, "--data", data, "--device", "cpu", "--json")
    assert code == 0 and all(r["equal"] for r in json.loads(text)["recomputed"])
    shard = next(iter(sorted(out.rglob("features/c/1/0/0/0"))))
    shard.unlink()
    code, text, err = run(out, "--repair", "--data", data, "--device", "cpu", "--json")
    assert code == 0, err
    assert [r["action"][:10] for r in json.loads(text)["repaired"]] == ["reproduced"]
    assert verify_store(out, deep=True) == []


def test_no_store_and_a_newer_format_are_told_apart(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        FeatureStore.open(tmp_path / "nowhere")
    from rsmtdf_cache.files import publish_json, read_json

    manifest = {**read_json(store / "manifest.json"), "version": 99}
    (store / "manifest.json").unlink()
    publish_json(store / "manifest.json", manifest, tmp_path / "tmp")
    with pytest.raises(MismatchError, match="format version 99"):
        FeatureStore.open(store)
