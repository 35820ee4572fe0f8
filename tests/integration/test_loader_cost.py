"""What a batch costs, in operations and bytes, not in seconds: reads of a sample, copies of its codes, decodings."""

from __future__ import annotations

import mmap
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from rsmtdf_cache.codecs import Calibration, Codes
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest
from rsmtdf_cache.read_plan import Lattice
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, LayerSpec, NumericsProfile, PixelSpec, TeacherSpec, ViewSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import TileRecord, pixel_digest
from rsmtdf_cache.views import Box
from rsmtdf_cache.writer import UnitWriter
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe
from tests.datasets import write_dataset

STRIDE, CHANNELS, TILES, GROUP_ROWS = 4, 384, 10, 4


def codes_of(spec: FeatureSpec, row: int) -> Codes:
    rng = np.random.default_rng([row, spec.view.orientation])
    if spec.encoding.codec == "float16":
        return Codes(rng.standard_normal((*spec.grid, CHANNELS)).astype(np.float16))
    values = rng.integers(-127, 128, (*spec.grid, CHANNELS), np.int8)
    return Codes(values, rng.uniform(0.01, 0.02, spec.grid).astype(np.float16))


def write_store(data: Path, out: Path, tile_px: int, encoding: EncodingSpec, layers: int = 1) -> FeatureStore:
    source = open_source(data)
    paths = StorePaths(out)
    create_manifest(paths, Manifest(tile_px=tile_px, group_rows=GROUP_ROWS, dataset="random numbers"))
    ledger = Ledger(paths)
    tiles = source.tiles(["train"])
    records = [TileRecord(t.id, pixel_digest(source.read_image(t)), t.split, str(t.image)) for t in tiles]
    ledger.add_tiles(0, records)
    profile = NumericsProfile(device="cpu", precision="float32", torch="test", threads=1, micro_batch=1)
    neutral = Calibration(np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32))
    names = ["last", "middle", "first"][:layers]
    for orientation in (0, 4):
        specs = tuple(
            FeatureSpec(
                teacher=TeacherSpec(
                    name="random", family="timm", architecture="random", weights="0" * 64, weights_origin="random",
                    patch_px=STRIDE, native_px=tile_px, prefix_tokens=0, norm=False,
                    pixel=PixelSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
                ),
                layer=LayerSpec(name=name, channels=CHANNELS, stride_px=STRIDE, offset_px=STRIDE / 2),
                view=ViewSpec(size_px=tile_px, orientation=orientation),
                encoding=encoding, tile_px=tile_px, grid=(tile_px // STRIDE, tile_px // STRIDE),
            )
            for name in names
        )  # fmt: skip
        arrays = ArraySet(specs)
        given = {} if encoding.codec == "float16" else {name: ledger.add_calibration(neutral) for name in names}
        ledger.add_set(arrays, profile, given)
        for start in range(0, len(records), GROUP_ROWS):
            rows = range(start, min(start + GROUP_ROWS, len(records)))
            with UnitWriter(ledger, arrays, start // GROUP_ROWS, GROUP_ROWS, profile) as unit:
                for row in rows:
                    unit.add_stored(row, records[row].id, {s.layer.name: codes_of(s, row) for s in specs})
                unit.commit(rows.stop)
    return FeatureStore.open(out)


#: Side of the tiles in tokens and codec: one chunk a map; four of them; with a scale per token; packed.
FORMS = [(32, "float16", "none"), (40, "float16", "none"), (40, "int8", "none"), (40, "int8", "zstd:1")]


def open_loader(folder: Path, side: int, codec: str, compressor: str, layers: int = 1) -> BatchLoader:
    px = side * STRIDE
    data = write_dataset(
        folder / "data", tiles=TILES, tile_px=px, splits={"train": range(TILES)}, labeled={"all": range(4)}
    )
    store = write_store(data, folder / "store", px, EncodingSpec(codec=codec, compressor=compressor), layers)
    recipe = Recipe.model_validate({
        "data": data, "crop_px": px // 2, "batch": {"labeled": 4, "unlabeled": 6}, "labeled": "all",
    })  # fmt: skip
    return BatchLoader.open(open_source(data), recipe, store)


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(map(str, form)))
def loader(request: pytest.FixtureRequest, tmp_path: Path) -> BatchLoader:
    return open_loader(tmp_path, *request.param)


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]) -> None:
    real: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return real(*args, **options)

    monkeypatch.setattr(owner, name, call)


def test_codes_of_a_batch_are_those_of_the_store_at_the_places_of_its_crops(loader: BatchLoader) -> None:
    """So that the counts below are those of a loader that is right."""
    assert loader.unlabeled is not None and loader.targets is not None
    batch, size = loader.batch(3).unlabeled, loader.dataset.geometry.crop_px // STRIDE
    assert batch is not None
    (coded,) = batch.targets.codes.values()
    store: FeatureStore = loader.targets.store  # type: ignore[attr-defined]
    by_turn = {key: store.spec(key) for key in store.keys()}
    for n, draw in enumerate(loader.unlabeled.draws(3, 6)):
        spec = next(s for s in by_turn.values() if s.view.orientation == draw.orientation)
        whole = codes_of(spec, store.tiles.row_of(draw.tile_id))
        y, x = draw.box.y // STRIDE, draw.box.x // STRIDE
        np.testing.assert_array_equal(coded.values[n].numpy(), whole.values[y : y + size, x : x + size])
        if whole.scale is not None:
            assert coded.scale is not None
            np.testing.assert_array_equal(coded.scale[n].numpy(), whole.scale[y : y + size, x : x + size])


def test_two_epochs_map_each_shard_once_decode_each_tile_once_and_read_once_per_sample_and_part(
    loader: BatchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    counted(monkeypatch, loader.dataset.source, "read_valid", calls)
    crops: list[int] = []
    read_rows = ShardReader.read_rows

    def reading(shard: ShardReader, reads: Sequence[Any], out: NDArray[Any]) -> None:
        crops.append(len(reads))
        read_rows(shard, reads, out)

    monkeypatch.setattr(ShardReader, "read_rows", reading)
    mapped: list[int] = []
    real = mmap.mmap

    def mapping(*args: Any, **options: Any) -> mmap.mmap:
        mapped.append(1)
        return real(*args, **options)

    monkeypatch.setattr(mmap, "mmap", mapping)
    steps = 40  # of 10 crops: every tile in both orientations, many times
    parts = 1
    for step in range(steps):
        batch = loader.batch(step)
        (coded,) = batch.labeled.targets.codes.values()
        parts = 1 if coded.scale is None else 2
    assert sum(crops) == steps * 10 * parts
    shards = 2 * -(-TILES // GROUP_ROWS)  # orientations, row groups
    assert len(crops) <= steps * 2 * shards * parts, "a shard is asked more than once for half a batch"
    assert calls["read_valid"] == TILES
    assert len(mapped) == shards * parts


def test_where_crops_lie_is_worked_out_once_for_all_layers_of_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers: as many plans as for one, and as few looks at boxes."""
    counts = []
    for layers in (1, 3):
        made: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            counted(patch, Lattice, "plan", made)
            counted(patch, Lattice, "_corner", made)
            loader = open_loader(tmp_path / str(layers), 40, "int8", "none", layers)
            for step in range(5):
                batch = loader.batch(step)
        assert len(batch.labeled.targets.codes) == layers
        counts.append(dict(made))
    assert counts[0] == counts[1]
    assert 0 < counts[0]["plan"] <= 5 * 2 * 2  # steps, halves of a batch, orientations


class Advised(mmap.mmap):
    """A mapping that notes what the system is told of it."""

    advice: ClassVar[list[tuple[int, int, int]]] = []

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        assert option == mmap.MADV_WILLNEED
        assert length is not None and start % mmap.PAGESIZE == 0
        Advised.advice.append((id(self), start, length))
        super().madvise(option, start, length)


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="no advice on this system")
def test_the_system_is_told_of_every_row_before_it_is_read_and_once(
    loader: BatchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", Advised)
    monkeypatch.setattr(Advised, "advice", [])
    store: FeatureStore = loader.targets.store  # type: ignore[union-attr]
    first = {key: store.stored(key, 0) for key in store.keys()}
    assert all(first.values())
    told_early: list[int] = []
    for batches in loader.iterate(0, 30):
        told_early.append(len(Advised.advice))
        assert len(batches) == 1
    pages: Counter[tuple[int, int]] = Counter()
    rows: Counter[int] = Counter()
    for mapping, start, length in Advised.advice:
        pages.update((mapping, page) for page in range(start, start + length, mmap.PAGESIZE))
        rows[mapping] += length
    assert max(pages.values()) <= 2, "neighbours share a page, otherwise each is asked for once"
    keys = store.keys()
    raw = {key: store.ledger.all_shards(key) for key in keys}
    features = sum(s.nbytes for key in keys for s in raw[key] if s.part == "features")
    slack = 2 * mmap.PAGESIZE * TILES * len(keys)
    assert features - 10_000 * len(keys) <= sum(rows.values()) <= features + slack, "every row was asked for"
    assert told_early[-1] == told_early[-15], "later epochs lie in memory, and cost no call"
    told = len(Advised.advice)
    assert loader.targets is not None
    loader.targets.left_memory()
    for _ in loader.iterate(30, 60):
        pass
    assert len(Advised.advice) == 2 * told, "what left memory is asked for again, once"


def test_a_batch_lies_in_the_memory_of_an_earlier_one_and_nothing_as_large_is_made_beside_it(
    loader: BatchLoader,
) -> None:
    """New memory would be traced (numpy's) or profiled (torch's), and a second copy would need some."""
    for step in range(20):  # until tiles are decoded and shards mapped
        loader.batch(step)
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            batch = loader.batch(20)
            peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert batch.unlabeled is not None
    delivered, weights = 0, 0
    for half in (batch.labeled, batch.unlabeled):
        (coded,) = half.targets.codes.values()
        (weight,) = half.targets.weights.values()
        delivered += coded.values.nbytes
        weights += weight.nbytes
    # Crops of pixels before they are put into the batch, what is smaller than a block, and what is being unfolded.
    pixels = 4 * loader.dataset.geometry.crop_px**2 * 10
    assert peak <= 2 * pixels + 300_000 + (400_000 if is_packed(loader) else 0) < delivered
    torch_bytes = sum(max(0, event.self_cpu_memory_usage) for event in profiled.key_averages())
    assert torch_bytes <= weights + 10_000, "torch copied what numpy had read"


def is_packed(loader: BatchLoader) -> bool:
    store: FeatureStore = loader.targets.store  # type: ignore[union-attr]
    return store.spec(store.keys()[0]).encoding.compressor != "none"


def test_a_crop_goes_from_the_mapping_to_its_place_without_a_stop(loader: BatchLoader) -> None:
    store: FeatureStore = loader.targets.store  # type: ignore[union-attr]
    key, px = store.keys()[0], loader.dataset.geometry.crop_px
    boxes = [Box(STRIDE * n, 2 * STRIDE * n, px, px) for n in range(5)]
    out = store.empty_codes(key, 8, (px // STRIDE, px // STRIDE))
    store.read_codes(key, range(5), boxes, out, [7, 1, 0, 2, 6])
    tracemalloc.start()
    try:
        store.read_codes(key, range(5), boxes, out, [7, 1, 0, 2, 6])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert is_packed(loader) or peak < out.values[0].nbytes // 4, f"{peak} bytes for crops of {out.values[0].nbytes}"
    for box, row, place in zip(boxes, range(5), (7, 1, 0, 2, 6), strict=True):
        whole = codes_of(store.spec(key), row).values
        cut = whole[box.y // STRIDE :, box.x // STRIDE :][: px // STRIDE, : px // STRIDE]
        np.testing.assert_array_equal(out.values[place], cut)


def test_what_a_tensor_lends_comes_back_as_that_tensor() -> None:
    """Pinned memory is a tensor's: only as that tensor torch waits for copies from it that are under way."""
    from rsmtdf_train.loader import _tensor

    owner = torch.zeros(4, 3, dtype=torch.int8)
    assert _tensor(owner.numpy()).untyped_storage()._cdata == owner.untyped_storage()._cdata
    assert torch.from_numpy(owner.numpy()).untyped_storage()._cdata != owner.untyped_storage()._cdata
    plain = np.ones((2, 2), np.float16)
    shared = _tensor(plain)
    plain[0, 0] = 5
    assert shared[0, 0] == 5
