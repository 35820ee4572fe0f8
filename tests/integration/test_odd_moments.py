"""Orders of events that nobody thought of at first; each was found by somebody who tried to break a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, Interrupted, MismatchError, UsageError
from rsmtdf_cache.estimate import Probe, plan_build
from rsmtdf_cache.events import Progress
from rsmtdf_cache.head import read_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.gc import collect, drop_arrays
from rsmtdf_cache.upkeep.pins import list_pins, pin_snapshot, unpin
from rsmtdf_cache.upkeep.repair import repair_store
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

QUICK = Probe(seconds=0, disk_nbytes=2**22)


def request(data: Path, out: Path, **more: object) -> BuildRequest:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "threads": 1, "scales": [1.0], **more}
    return BuildRequest.of(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("odd") / "data", tiles=9, tile_px=32)


@pytest.fixture(scope="module")
def sound(data: Path) -> Path:
    build_store(request(data, data.parent / "s"), load_teacher=load_mean_teacher)
    return data.parent / "s"


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def test_a_damaged_set_record_is_mended_also_when_one_of_its_arrays_was_dropped(store: Path, data: Path) -> None:
    drop_arrays(store, ["mean/*/mean16"])
    before = FeatureStore.open(store).snapshot
    record = next((store / "ledger" / "sets").glob("*.json"))
    sound = record.read_bytes()
    record.write_bytes(sound.replace(b"bilinear", b"bilineas", 1))
    with pytest.raises(FindingsError):
        FeatureStore.open(store)
    repair_store(store, data, load_teacher=load_mean_teacher)
    assert record.read_bytes() == sound
    assert FeatureStore.open(store).snapshot == before and verify_store(store, deep=True) == []


def test_a_damaged_pin_stops_a_drop_before_it_changes_anything_and_can_be_given_up_by_name(store: Path) -> None:
    pin = pin_snapshot(store, owner="me")
    path = StorePaths(store).pin(pin.name)
    path.write_bytes(path.read_bytes() + b"x")
    before = FeatureStore.open(store).snapshot
    with pytest.raises(FindingsError, match=f"unpin {store} {pin.name}"):
        drop_arrays(store, ["mean/*/mean16"])
    assert FeatureStore.open(store).snapshot == before
    assert [p.name for p in unpin(store, pin.name)] == [pin.name]
    assert list_pins(store) == [] and not path.exists()
    drop_arrays(store, ["mean/*/mean16"])


def test_a_store_of_which_everything_was_dropped_is_empty_and_sound(store: Path, data: Path) -> None:
    drop_arrays(store, ["*/*/*"])
    collect(store)
    assert verify_store(store, deep=True) == [] and FeatureStore.open(store).keys() == []
    build_store(request(data, store), load_teacher=load_mean_teacher)
    assert len(FeatureStore.open(store).keys()) == 2 and verify_store(store, deep=True) == []


def test_repair_leaves_a_folder_that_is_no_store_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(MismatchError, match="not a feature store"):
        repair_store(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_plan_refuses_what_the_build_would_and_counts_only_what_is_new(
    data: Path, store: Path, tmp_path: Path
) -> None:
    nothing = plan_build(request(data, store), load_teacher=load_mean_teacher, probe=QUICK)
    assert [a["nbytes"] for a in nothing.arrays] == [0, 0]
    more = plan_build(request(data, store, splits=["train", "val"]), load_teacher=load_mean_teacher, probe=QUICK)
    real = build_store(request(data, store, splits=["train", "val"]), load_teacher=load_mean_teacher)
    files = sum(p.stat().st_size for p in store.rglob("c/*/0/0/0") if p.parts[-4] == "2")
    assert sum(a["nbytes"] for a in more.arrays) == files > real.nbytes_written > 0
    other = write_dataset(tmp_path / "other", tiles=9, tile_px=32, seed=5)
    with pytest.raises(MismatchError, match="other pixels"):
        plan_build(request(other, store), load_teacher=load_mean_teacher, probe=QUICK)


def test_an_interrupted_build_lists_what_it_committed_for_those_who_pull(data: Path, tmp_path: Path) -> None:
    seen = 0

    def stop(event: object) -> None:
        nonlocal seen
        seen += isinstance(event, Progress) and event.task == "mean"
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        build_store(request(data, tmp_path / "s"), on_event=stop, load_teacher=load_mean_teacher)
    head = read_head(StorePaths(tmp_path / "s"))
    assert head.snapshot == FeatureStore.open(tmp_path / "s").snapshot
    assert sum(name.startswith("ledger/commits/") for name in head.files) == 1


def test_the_python_interface_refuses_what_it_cannot_mean(store: Path) -> None:
    opened = FeatureStore.open(store)
    key = opened.keys()[0]
    with pytest.raises(UsageError, match=r"FeatureKey\.parse"):
        opened.read(str(key), [0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no array"):
        opened.read(FeatureKey.parse("mean/s32o0/nothing"), [0])
    for row in (99, -1, 1.0, "t000"):
        with pytest.raises(UsageError, match="row"):
            opened.read(key, [row])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="row"):
            opened.stored(key, row)  # type: ignore[arg-type]
    shape = opened.read(key, [0]).values.shape
    for out in (np.zeros((3, *shape[1:]), np.float16), np.zeros(shape, np.int16), np.zeros(shape[1:], np.float16)):
        with pytest.raises(UsageError, match="out is"):
            opened.read(key, [0], out=out)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="first, always or never"):
        FeatureStore.open(store, verify_reads="Always")  # type: ignore[arg-type]
