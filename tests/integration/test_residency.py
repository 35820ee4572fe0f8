"""A run in memory, or with its features on the device, is the run that reads mapped files, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsmtdf_cache import memory
from rsmtdf_cache.errors import FindingsError, ResourceError, UsageError
from rsmtdf_cache.events import Event, Progress
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.loop import train
from rsmtdf_train.residency import hold_run, residency_of
from tests.datasets import write_dataset
from tests.pixel_runs import CPU, batches, build, recipe, require_same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("training") / "data", tiles=12, tile_px=64)


@pytest.fixture(scope="module")
def store(data: Path) -> Path:
    return build(data, data.parent / "store")


def test_a_run_in_memory_reads_no_file_and_the_same_batches(data: Path, tmp_path: Path) -> None:
    """The files are damaged after they were copied: what is read then did not come from them."""
    for name, codec in (("float16", "float16"), ("int8", "int8")):
        out = build(data, tmp_path / name, codec=codec, group_rows=3)
        wanted = list(batches(open_source(data), out, "store"))
        opened = FeatureStore.open(out)
        loader = BatchLoader.open(open_source(data), recipe(data), opened, pixels="store")
        events: list[Event] = []
        held = hold_run(loader.dataset, "ram", events.append)
        assert held == opened.describe()["nbytes"] == sum(e.nbytes for e in events if isinstance(e, Progress))
        for shard in (p for p in out.glob("zarr/*/*/*/*/c/**/*") if p.is_file()):
            shard.write_bytes(bytes(shard.stat().st_size))
        for step, batch in enumerate(wanted):
            require_same(loader.batch(step), batch)
        with pytest.raises(FindingsError):
            list(batches(open_source(data), out, "store"))


def test_only_what_a_run_reads_is_copied(data: Path, store: Path, tmp_path: Path) -> None:
    out = build(data, tmp_path / "store", splits=("train", "val", "test"), group_rows=2)
    opened = FeatureStore.open(out)
    one = recipe(data, distill={"hidden": 8, "keys": ["mean/*/mean16"]})
    loader = BatchLoader.open(open_source(data), one, opened, pixels="source")
    held = hold_run(loader.dataset, "ram")
    arrays = [a for a in opened.describe()["arrays"] if a["key"].endswith("mean16")]
    train, tiles = len(open_source(data).split("train")), len(opened.tiles)
    assert len(arrays) == 8 and held == sum(a["nbytes"] for a in arrays) * train // tiles
    with pytest.raises(UsageError, match="reads nothing from a store"):
        hold_run(BatchLoader.open(open_source(data), recipe(data).without_distillation()).dataset, "ram")


def test_memory_that_is_too_small_is_told_before_anything_is_copied(
    data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group of the process has little memory left, whatever the machine has: files as Linux writes them."""
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("7999900000\n")
    (tmp_path / "memory.stat").write_text("anon 7999890000\nactive_file 4000\ninactive_file 6000\n")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.available_nbytes() == 110_000
    with pytest.raises(ResourceError, match=r"take .* of memory, 110 kB are available; .*residency stream"):
        train(recipe(data), tmp_path / "run", store, device="cpu", residency="ram", tensorboard=False)
    assert not (tmp_path / "run").exists()
    needed = FeatureStore.open(store).describe()["nbytes"]
    (tmp_path / "memory.current").write_text(f"{8_000_000_000 - needed}\n")
    loader = BatchLoader.open(open_source(data), recipe(data), FeatureStore.open(store))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="in 2 processes"):
        hold_run(loader.dataset, "ram")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert hold_run(loader.dataset, "ram") == needed
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_nbytes() is None
    result = train(recipe(data), tmp_path / "run", store, device="cpu", residency="ram", tensorboard=False)
    assert result.steps == 4


@pytest.mark.parametrize("codec", ["float16", "int8", "pca2-int8"])
def test_features_on_the_device_are_gathered_to_the_same_batches(data: Path, tmp_path: Path, codec: str) -> None:
    """The CPU is a device: token numbers travel, and what is decoded of them is what was decoded of codes."""
    out = build(data, tmp_path / "store", codec=codec, group_rows=3)
    for changes in ({}, {"distill": {"hidden": 8, "control": "shuffled"}}, {"crop_px": 64}):
        asked = recipe(data, **changes)
        plain, held = (BatchLoader.open(open_source(data), asked, FeatureStore.open(out)) for _ in range(2))
        assert hold_run(held.dataset, "device", device=CPU) == 0
        for step in range(5):
            one, other = plain.batch(step), held.batch(step)
            assert one.unlabeled is not None and other.unlabeled is not None
            for a, b in ((one.labeled, other.labeled), (one.unlabeled, other.unlabeled)):
                assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
                features, gathered = a.targets.decoded(CPU), b.targets.decoded(CPU)
                assert features.features.keys() == gathered.features.keys() != set()
                for key in features.features:
                    assert torch.equal(features.features[key], gathered.features[key])
                    assert torch.equal(features.weights[key], gathered.weights[key])
                    sent = b.targets.codes[key].values
                    assert sent.dtype == torch.int64 and sent.shape[-1] == 1 and b.targets.codes[key].scale is None


def test_a_run_with_features_on_the_device_is_the_same_run(data: Path, store: Path, tmp_path: Path) -> None:
    asked = recipe(data, drift_every=0, privileged=True, probe={"hold": 0.2, "until": 0.6, "steps": 5})
    for residency in ("stream", "device", "ram"):
        train(asked, tmp_path / residency, store, device="cpu", residency=residency, tensorboard=False)
    runs = [load_deployed(RunFolder(tmp_path / n), "ema", CPU)[0].state_dict() for n in ("stream", "device", "ram")]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]) and torch.equal(value, runs[2][name])


def test_what_cannot_lie_on_the_device_is_refused(
    data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = BatchLoader.open(open_source(data), recipe(data).without_distillation(), FeatureStore.open(store))
    with pytest.raises(UsageError, match="goes with targets cached"):
        hold_run(bare.dataset, "device", device=CPU)
    few = build(data, tmp_path / "few", orientations=2, pixels=False)
    asked = recipe(data, augment={"approximate_orientations": True})
    loader = BatchLoader.open(open_source(data), asked, FeatureStore.open(few))
    with pytest.raises(UsageError, match=r"without augment\.approximate_orientations"):
        hold_run(loader.dataset, "device", device=CPU)
    loader = BatchLoader.open(open_source(data), recipe(data), FeatureStore.open(store))
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    with pytest.raises(ResourceError, match=r"of memory on cpu, 4\.9 kB are available"):
        hold_run(loader.dataset, "device", device=CPU)
    with pytest.raises(UsageError, match="--residency disk: choose stream, ram, device"):
        residency_of("disk")
