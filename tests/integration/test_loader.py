"""Batches from a real dataset and a real store whose pixels and features say where they come from.

Tile ``n`` is painted with ``(n, row, column)`` of each pixel, its label is a function of the place, and the features of
a token are ``(n, row, column of its centre in the unturned tile, orientation)``. Whatever the loader cuts and turns,
image, label and features must name the same place.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import DataError, MismatchError, RsmtdfError, TileError, UsageError
from rsmtdf_cache.events import Warned
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, LayerSpec, NumericsProfile, PixelSpec, TeacherSpec, ViewSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import TileRecord, pixel_digest
from rsmtdf_cache.views import Box, inverse_orientation, orient_point
from rsmtdf_cache.writer import UnitWriter
from rsmtdf_train.augment import cutmix, cutmix_targets
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.loop import train
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, LabeledBatch, UnlabeledBatch
from rsmtdf_train.targets.base import TargetRequest
from rsmtdf_train.targets.live import LiveTeachers
from rsmtdf_train.targets.online import MixedTargets
from rsmtdf_train.targets.stored import CachedTargets, store_geometry
from tests.datasets import write_dataset

TILE_PX, TILES, GROUP_ROWS = 64, 12, 5
TRAIN, LABELED = range(8), range(2)


def write_painted(root: Path) -> Path:
    write_dataset(root, tiles=TILES, tile_px=TILE_PX, classes=3)
    ys, xs = np.mgrid[0:TILE_PX, 0:TILE_PX].astype(np.uint8)
    for n in range(TILES):
        Image.fromarray(np.stack([np.full_like(ys, n), ys, xs], -1)).save(root / "images" / f"t{n:03}.png")
        Image.fromarray(label_at(n, ys, xs)).save(root / "masks" / f"t{n:03}.png")
    return root


def label_at(n: NDArray[np.uint8] | int, y: NDArray[np.uint8], x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    classes = (np.asarray(n, int) + 2 * (y.astype(int) // 3) + x.astype(int) // 5) % 3
    return np.asarray(classes, np.uint8)


def feature_spec(teacher: str, layer: str, stride: int, offset: float, orientation: int) -> FeatureSpec:
    pixel = PixelSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return FeatureSpec(
        teacher=TeacherSpec(
            name=teacher, family="timm", architecture="painter", weights="0" * 64, weights_origin="seed 3", patch_px=8,
            native_px=TILE_PX, prefix_tokens=0, norm=False, pixel=pixel,
        ),
        layer=LayerSpec(name=layer, channels=5, stride_px=stride, offset_px=offset),
        view=ViewSpec(size_px=TILE_PX, orientation=orientation),
        encoding=EncodingSpec(),
        tile_px=TILE_PX,
        grid=(TILE_PX // stride, TILE_PX // stride),
    )  # fmt: skip


def painted_features(spec: FeatureSpec, n: int) -> NDArray[np.float32]:
    values = np.zeros((*spec.grid, 5), np.float32)
    back = inverse_orientation(spec.view.orientation)
    for i, j in np.ndindex(spec.grid):
        y, x = (spec.offset_tile_px + k * spec.stride_tile_px for k in (i, j))
        values[i, j] = (n, *orient_point(y, x, TILE_PX, back), spec.view.orientation, 7)
    return values


def write_store(
    data: Path,
    out: Path,
    orientations: Sequence[int] = (0, 2, 4, 6),
    tiles: Sequence[int] = TRAIN,
    layers: Sequence[tuple[str, str, int, float]] = (("fine", "a", 8, 4.0), ("coarse", "b", 16, 15.5)),
    commit_groups: int = 99,
) -> Path:
    source = open_source(data)
    known = {t.id: t for t in source.tiles()}
    paths = StorePaths(out)
    create_manifest(paths, Manifest(tile_px=TILE_PX, group_rows=GROUP_ROWS, dataset="painted"))
    ledger = Ledger(paths)
    records = [
        TileRecord(t.id, pixel_digest(source.read_image(t)), t.split, str(t.image))
        for t in (known[f"t{n:03}"] for n in reversed(tiles))  # rows are not tile numbers
    ]
    ledger.add_tiles(0, records)
    profile = NumericsProfile(device="cpu", precision="float32", torch="test", threads=1, micro_batch=1)
    for teacher, layer, stride, offset in layers:
        for orientation in orientations:
            spec = feature_spec(teacher, layer, stride, offset, orientation)
            arrays = ArraySet((spec,))
            ledger.add_set(arrays, profile)
            for group in range(min(commit_groups, -(-len(records) // GROUP_ROWS))):
                rows = range(group * GROUP_ROWS, min((group + 1) * GROUP_ROWS, len(records)))
                with UnitWriter(ledger, arrays, group, GROUP_ROWS, profile) as unit:
                    for row in rows:
                        unit.add(row, records[row].id, {layer: painted_features(spec, int(records[row].id[1:]))})
                    unit.commit(rows.stop)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_painted(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(write_store(data, tmp_path_factory.mktemp("stores") / "store"))


def recipe(data: Path, **changes: object) -> Recipe:
    base: dict[str, object] = {"data": data, "crop_px": 32, "batch": {"labeled": 3, "unlabeled": 5}, "labeled": "5"}
    return Recipe.model_validate(base | changes)


def open_loader(data: Path, store: FeatureStore | None, threads: int = 1, **changes: object) -> BatchLoader:
    return BatchLoader.open(open_source(data), recipe(data, **changes), store, threads)


def lattice(loader: BatchLoader) -> Geometry:
    assert isinstance(loader.dataset.geometry, Geometry)
    return loader.dataset.geometry


def decoded(batch: Batch) -> Batch:
    """The batch with features for codes."""
    cpu = torch.device("cpu")
    unlabeled = batch.unlabeled
    return dataclasses.replace(
        batch,
        labeled=dataclasses.replace(batch.labeled, targets=batch.labeled.targets.decoded(cpu)),
        unlabeled=unlabeled and dataclasses.replace(unlabeled, targets=unlabeled.targets.decoded(cpu)),
    )


def rows_of(half: LabeledBatch | UnlabeledBatch, targets: bool = True) -> list[tuple[object, ...]]:
    """All that a batch says of each of its crops, as values."""
    tensors = [half.image, half.label, half.valid]
    photometry: list[tuple[object, ...]] = []
    if isinstance(half, UnlabeledBatch):
        tensors += [view.cutmix_boxes for view in half.views]
        photometry = [view.photometry.parameters for view in half.views]
    if targets:
        found = half.targets.decoded(torch.device("cpu"))
        tensors += [t[key] for t in (found.features, found.weights) for key in sorted(t)]
    return [(*(t[i].numpy().tobytes() for t in tensors), *(p[i] for p in photometry)) for i in range(len(half.image))]


def same(a: Batch, b: Batch, targets: bool = True) -> bool:
    halves = (a.labeled, a.unlabeled), (b.labeled, b.unlabeled)
    x, y = ([half and rows_of(half, targets) for half in pair] for pair in halves)
    return x == y


def test_image_label_and_features_of_a_sample_name_the_same_place(data: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store)
    assert loader.unlabeled is not None and loader.targets is not None
    assert list(loader.targets.specs) == ["coarse/s64/b", "fine/s64/a"]
    seen = set()
    for draw in loader.unlabeled.draws(0, 60):
        sample = loader.dataset.sample(draw)
        seen.add((sample.orientation, draw.box.y, draw.box.x))
        n, ys, xs = sample.image[..., 0], sample.image[..., 1], sample.image[..., 2]
        assert (n == int(sample.tile_id[1:])).all()
        np.testing.assert_array_equal(sample.label, label_at(n, ys, xs))
        assert store.tiles.ids[sample.row] == sample.tile_id
        for key, spec in loader.targets.specs.items():
            tokens = sample.features[key].values
            side = 32 // int(spec.stride_px)
            assert tokens.shape == (side, side, 5)
            for i, j in np.ndindex(side, side):
                # The centre is a corner of four pixels (or the middle of one): the mean of the pixels around it.
                y, x = (spec.offset_px + k * spec.stride_px for k in (i, j))
                around = np.ix_(*(sorted({int(np.ceil(v)) - 1, int(np.floor(v))}) for v in (y, x)))
                assert tokens[i, j, 0] == int(sample.tile_id[1:])
                assert tokens[i, j, 1] == ys[around].mean() + 0.5
                assert tokens[i, j, 2] == xs[around].mean() + 0.5
                assert tokens[i, j, 3] == sample.orientation
    assert {o for o, _, _ in seen} == {0, 2, 4, 6}
    assert {(y, x) for _, y, x in seen} == {(y, x) for y in (0, 16, 32) for x in (0, 16, 32)}


def test_batch_targets_are_the_samples_standardised_with_full_weight(data: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store)
    assert loader.unlabeled is not None and loader.targets is not None
    batch = decoded(loader.batch(4))
    assert batch.unlabeled is not None
    samples = loader.dataset.samples(loader.unlabeled.draws(4, 5))
    for key, spec in loader.targets.specs.items():
        features = batch.unlabeled.targets.features[key].numpy()
        assert features.dtype == np.float32
        raw = np.stack([s.features[key].values for s in samples]).astype(np.float32)
        np.testing.assert_allclose(features[..., :3] * spec.std[:3] + spec.mean[:3], raw[..., :3], atol=1e-3)
        assert (features[..., 4] == 0).all(), "a constant channel must become 0"
        assert (batch.unlabeled.targets.weights[key] == 1).all()
        for token in (features, batch.labeled.targets.features[key].numpy()):
            assert np.isfinite(token).all()
    everything = np.concatenate(
        [painted_features(feature_spec("fine", "a", 8, 4.0, 0), n)[..., :3].reshape(-1, 3) for n in TRAIN]
    )
    np.testing.assert_allclose(loader.targets.specs["fine/s64/a"].mean[:3], everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(loader.targets.specs["fine/s64/a"].std[:3], everything.std(0), rtol=1e-5)
    assert loader.offsets_px == {"coarse/s64/b": 15.5, "fine/s64/a": 4.0}


def test_batch_has_the_shapes_dtypes_and_ranges_of_the_contract(data: Path, store: FeatureStore) -> None:
    batch = decoded(open_loader(data, store).batch(0))
    u = batch.unlabeled
    assert u is not None
    assert batch.labeled.image.shape == (3, 3, 32, 32) and u.image.shape == (5, 3, 32, 32)
    assert batch.labeled.image.dtype == u.image.dtype == torch.uint8
    assert u.image.is_contiguous() and int(u.image[:, 1:].max()) == TILE_PX - 1  # pixels as they are in the files
    (view,) = u.views
    assert batch.labeled.label.dtype == u.label.dtype == torch.uint8 and view.cutmix_boxes.dtype == torch.int64
    for half in (batch.labeled, u):
        assert half.valid.dtype == torch.bool and half.valid.shape == half.label.shape and bool(half.valid.all())
    assert u.label.shape == (5, 32, 32) and view.cutmix_boxes.shape == (5, 4) and len(view.photometry) == 5
    weak = u.image.float() / 255
    assert not torch.equal(view.photometry.apply(weak), weak)


def numbers(images: torch.Tensor) -> set[int]:
    return set(images[:, 0].flatten().tolist())


def test_labelled_crops_come_from_the_subset_and_unlabelled_ones_from_all_of_train(
    data: Path, store: FeatureStore
) -> None:
    loader = open_loader(data, store)
    batches = [decoded(loader.batch(s)) for s in range(8)]
    labeled = {n for b in batches for n in numbers(b.labeled.image)}
    unlabeled = {n for b in batches if b.unlabeled for n in numbers(b.unlabeled.image)}
    assert labeled == set(LABELED)
    assert unlabeled == set(TRAIN)


def test_batches_do_not_depend_on_threads_or_on_where_a_run_resumes(data: Path, store: FeatureStore) -> None:
    one = [b for (b,) in open_loader(data, store).iterate(0, 7)]
    assert [b.step for b in one] == list(range(7))
    three = [b for (b,) in open_loader(data, FeatureStore.open(store.path), threads=3).iterate(0, 7)]
    resumed = [b for (b,) in open_loader(data, store, threads=2).iterate(4, 7)]
    assert all(same(a, b) for a, b in zip(one, three, strict=True))
    assert all(same(a, b) for a, b in zip(one[4:], resumed, strict=True))


def test_another_seed_gives_other_batches(data: Path, store: FeatureStore) -> None:
    assert not same(decoded(open_loader(data, store).batch(0)), decoded(open_loader(data, store, seed=1).batch(0)))


def test_the_baseline_on_the_same_store_sees_the_same_batches_without_targets(data: Path, store: FeatureStore) -> None:
    off: dict[str, Any] = {"distill": False, "fuse": False, "targets": "none"}
    with_targets, baseline = open_loader(data, store), open_loader(data, store, **off)
    some = open_loader(data, store, distill={"keys": ["fine/*"]})
    assert list(some.targets.specs if some.targets else ()) == ["fine/s64/a"]
    for step in range(3):
        a, b = decoded(with_targets.batch(step)), decoded(baseline.batch(step))
        assert same(a, b, targets=False) and same(a, decoded(some.batch(step)), targets=False)
        assert b.labeled.targets.features == {}
    supervised = decoded(open_loader(data, store, **off, method="supervised").batch(1))
    assert supervised.unlabeled is None
    assert torch.equal(supervised.labeled.image, decoded(baseline.batch(1)).labeled.image)


def test_a_token_that_is_not_valid_has_no_weight_and_no_value(data: Path, tmp_path: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store)
    assert loader.unlabeled is not None and loader.targets is not None
    draws = loader.unlabeled.draws(0, 2)
    first, second = loader.dataset.samples(draws)
    codes = loader.dataset.codes(draws)
    codes["fine/s64/a"].values[0, 1, 2, 0] = np.nan
    second.valid[31, 31] = False
    targets = loader.stack_targets([first, second], codes).decoded(torch.device("cpu"))
    for key, (expected_first, expected_second) in {
        "fine/s64/a": ((1, 2), (3, 3)),
        "coarse/s64/b": (None, (1, 1)),
    }.items():
        for n, expected in enumerate((expected_first, expected_second)):
            zeros = [tuple(place) for place in (targets.weights[key][n] == 0).nonzero().tolist()]
            assert zeros == ([] if expected is None else [expected])
        assert bool(targets.features[key].isfinite().all())
    partial = FeatureStore.open(write_store(data, tmp_path / "partial", commit_groups=1))
    cached = CachedTargets(partial, (), lattice(loader))
    there, missing = cached.read([TargetRequest(row, 2, Box(0, 16, 32, 32)) for row in (0, GROUP_ROWS)])[
        "fine/s64/a"
    ].valid
    assert there.all() and not missing.any()


def test_padded_tokens_count_where_the_recipe_says_so_but_not_those_without_features(
    data: Path, store: FeatureStore
) -> None:
    loader = open_loader(data, store, distill={"padding": True})
    assert loader.unlabeled is not None
    draws = loader.unlabeled.draws(0, 2)
    first, second = loader.dataset.samples(draws)
    codes = loader.dataset.codes(draws)
    codes["fine/s64/a"].values[0, 1, 2, 0] = np.nan
    second.valid[16:] = False
    weights = loader.stack_targets([first, second], codes).decoded(torch.device("cpu")).weights
    assert [tuple(place) for place in (weights["fine/s64/a"] == 0).nonzero().tolist()] == [(0, 1, 2)]
    assert bool((weights["coarse/s64/b"] == 1).all())


# --- parts, second views, the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_parts_of_a_batch_hold_its_crops_once_and_keep_partners_together(
    data: Path, store: FeatureStore, parts: int
) -> None:
    loader = open_loader(data, store, batch={"labeled": 6, "unlabeled": 12}, method="unimatch")
    whole, pieces = loader.batch(3), [loader.batch(3, part, parts) for part in range(parts)]
    assert whole.unlabeled is not None
    labeled, unlabeled = rows_of(whole.labeled), rows_of(whole.unlabeled)
    assert [row for piece in pieces for row in rows_of(piece.labeled)] == labeled
    partner = {row: unlabeled[-1 - i] for i, row in enumerate(unlabeled)}
    found = []
    for piece in pieces:
        assert piece.step == 3 and piece.unlabeled is not None
        rows = rows_of(piece.unlabeled)
        assert [partner[row] for row in rows] == rows[::-1]
        found += rows
    assert len(partner) == 12 and sorted(map(unlabeled.index, found)) == list(range(12))
    mixed = [cutmix(u.image, u.views[1].cutmix_boxes) for u in [whole.unlabeled, *(p.unlabeled for p in pieces)] if u]
    order = [unlabeled.index(row) for row in found]
    assert torch.equal(mixed[0][order], torch.cat(mixed[1:])), "CutMix of a part is not that of the whole batch"


def test_parts_of_a_step_come_together_and_in_order(data: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store, threads=3, batch={"labeled": 4, "unlabeled": 8})
    steps = list(loader.iterate(2, 5, parts=(2, 3), of=4))
    assert [[b.step for b in some] for some in steps] == [[2, 2], [3, 3], [4, 4]]
    for step, some in zip(range(2, 5), steps, strict=True):
        assert all(same(b, loader.batch(step, part, 4)) for part, b in zip((2, 3), some, strict=True))
    with pytest.raises(ValueError, match="part 4 of 4"):
        loader.batch(0, 4, 4)


@pytest.mark.parametrize(
    ("sizes", "of", "named"),
    [((1, 8), 2, r"batch.labeled 1 .* 2 .*to 2 or more"), ((4, 5), 4, r"batch.unlabeled 5 .* 4 .*to 7 or more")],
)
def test_a_batch_that_leaves_a_part_without_a_crop_is_refused_before_the_first_step(
    data: Path, store: FeatureStore, sizes: tuple[int, int], of: int, named: str
) -> None:
    loader = open_loader(data, store, batch=dict(zip(("labeled", "unlabeled"), sizes, strict=True)))
    with pytest.raises(UsageError, match=named):
        loader.iterate(0, 1, of=of)
    assert loader.batch(0).unlabeled is not None
    off: dict[str, Any] = {"distill": False, "method": "supervised"}
    assert open_loader(data, store, batch={"labeled": 4, "unlabeled": 3}, **off).batch(0, 1, 2).unlabeled is None


@pytest.mark.parametrize("method", ["unimatch-v1", "unimatch"])
def test_a_second_strong_view_leaves_the_first_as_fixmatch_has_it(data: Path, store: FeatureStore, method: str) -> None:
    twenty = {"labeled": 2, "unlabeled": 20}
    one = open_loader(data, store, batch=twenty).batch(1).unlabeled
    two = open_loader(data, store, batch=twenty, method=method).batch(1).unlabeled
    assert one is not None and two is not None and len(two.views) == 2
    first, second = two.views
    assert rows_of(dataclasses.replace(two, views=(first,))) == rows_of(one)
    assert all(a != b for a, b in zip(first.photometry.parameters, second.photometry.parameters, strict=True))
    assert not torch.equal(first.cutmix_boxes, second.cutmix_boxes)
    boxed = [{i for i, box in enumerate(view.cutmix_boxes.tolist()) if any(box)} for view in two.views]
    assert boxed[0] != boxed[1] and all(0 < len(some) < 20 for some in boxed)


def test_the_rest_leaves_the_labelled_tiles_out_of_the_unlabelled_stream(data: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store, unlabeled="rest")
    seen = {n for s in range(4) for b in [loader.batch(s).unlabeled] if b for n in numbers(b.image)}
    assert seen == set(TRAIN) - set(LABELED)
    assert loader.tiles_per_epoch == len(seen) and open_loader(data, store).tiles_per_epoch == len(TRAIN)
    assert open_loader(data, store, distill=False, method="supervised").tiles_per_epoch == len(LABELED)


def test_no_rest_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", tiles=6, tile_px=64, labeled={"all": [0, 1, 2, 3]})
    with pytest.raises(DataError, match=r"rest.*'all'.*all 4.*unlabeled: all"):
        open_loader(data, None, distill=False, labeled="all", unlabeled="rest")


def test_features_are_read_only_at_steps_that_use_them(data: Path, store: FeatureStore) -> None:
    cached = open_loader(data, store)
    dataset = cached.dataset
    assert isinstance(cached.targets, CachedTargets)
    mixed = MixedTargets(cached.targets, LiveTeachers((), {}), seed=0, share=0.5)
    both = TileDataset(dataset.source, mixed, dataset.geometry)
    online = {step for step in range(12) if mixed.is_online(step)}
    assert 0 < len(online) < 12
    plain, probed = (BatchLoader(both, recipe(data, targets="mixed(0.5)", probe=probe)) for probe in (False, True))
    for step in range(12):
        batch = plain.batch(step)
        assert same(batch, cached.batch(step), targets=step not in online)
        assert bool(batch.labeled.targets.codes) == (step not in online)
        assert same(probed.batch(step), cached.batch(step)), "a probe needs stored features at every step"


def test_without_a_store_crops_lie_on_the_default_lattice_in_all_orientations(data: Path) -> None:
    loader = open_loader(data, None, distill=False, fuse=False, targets="none")
    geometry = lattice(loader)
    assert (geometry.lattice_px, geometry.orientations) == (32, tuple(range(8)))
    assert decoded(loader.batch(0)).unlabeled is not None
    with pytest.raises(UsageError, match="--use-cache"):
        open_loader(data, None)


def test_a_crop_off_the_lattice_of_the_store_is_refused(data: Path, store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=r"16 px.*32 or 48"):
        open_loader(data, store, crop_px=40)


def test_a_pattern_that_matches_no_features_is_refused_with_what_there_is(data: Path, store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=r"finest/s64/\*.*Stored: coarse/s64/b, fine/s64/a"):
        open_loader(data, store, distill={"keys": ["finest/s64/*"]})


def test_missing_tiles_are_counted_named_and_the_build_command_is_given(data: Path, tmp_path: Path) -> None:
    partial = FeatureStore.open(write_store(data, tmp_path / "rows", tiles=range(5)))
    command = r"rsmtdf cache build .*fine,pretrained=none,seed=3,layers=a,scales=1,orientations=4"
    with pytest.raises(MismatchError, match=rf"(?s)8 train tiles.*lacks 3.*t005, t006, t007.*{command}"):
        open_loader(data, partial)
    uncommitted = FeatureStore.open(write_store(data, tmp_path / "commits", commit_groups=1))
    with pytest.raises(MismatchError, match="lacks 3"):
        open_loader(data, uncommitted)


def test_arrays_without_a_common_orientation_are_refused(data: Path, tmp_path: Path) -> None:
    path = write_store(data, tmp_path / "s", orientations=(0,), layers=[("fine", "a", 8, 4.0)])
    ledger = Ledger.load(StorePaths(path))
    profile = next(iter(ledger.sets.values())).profile
    ledger.add_set(ArraySet((feature_spec("coarse", "b", 16, 8.0, 4),)), profile)
    with pytest.raises(UsageError, match="orientation"):
        open_loader(data, FeatureStore.open(path))


def test_other_pixels_than_those_of_the_store_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    other = write_painted(tmp_path / "other")
    path = other / "images" / "t003.png"
    image = np.asarray(Image.open(path)).copy()
    image[5, 5, 0] ^= 1
    Image.fromarray(image).save(path)
    loader = open_loader(other, store)
    with pytest.raises(MismatchError, match="t003"):
        for _ in loader.iterate(0, 4):
            pass


def test_an_error_of_a_batch_reaches_the_caller_and_no_thread_is_left(data: Path, tmp_path: Path) -> None:
    broken = write_painted(tmp_path / "broken")
    file = broken / "images" / "t001.png"
    loader = open_loader(broken, None, threads=2, distill=False, fuse=False, targets="none")
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(RsmtdfError) as caught:
        for _ in loader.iterate(0, 10):
            pass
    assert isinstance(caught.value, TileError) and "t001" in str(caught.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("rsmtdf-loader")]


def test_leaving_the_iteration_early_ends_its_threads(data: Path, store: FeatureStore) -> None:
    batches = open_loader(data, store, threads=2).iterate(0, 1000)
    assert next(batches)[0].step == 0
    assert [t for t in threading.enumerate() if t.name.startswith("rsmtdf-loader")]
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("rsmtdf-loader")]


def test_a_labelled_subset_outside_train_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", tiles=6, tile_px=64, labeled={"5": [0, 5]})
    with pytest.raises(DataError, match="t005"):
        open_loader(data, None, distill=False, fuse=False, targets="none")


def test_a_decoded_tile_is_kept_up_to_the_bound(data: Path, store: FeatureStore) -> None:
    loader = open_loader(data, store)
    small = type(loader.dataset)(
        loader.dataset.source, loader.targets, loader.dataset.geometry, memory_bytes=TILE_PX * TILE_PX * 4 * 2
    )
    for step in range(3):
        bounded = decoded(BatchLoader(small, recipe(data)).batch(step))
        assert same(bounded, decoded(loader.batch(step)))
    assert small._decoded.nbytes == small._decoded.limit
    assert isinstance(loader.targets, CachedTargets)


# --- orientations that are not stored --------------------------------------------------------------------------------

APPROXIMATE: dict[str, Any] = {"augment": {"approximate_orientations": True}}


@pytest.fixture(scope="module")
def two_frames(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(write_store(data, tmp_path_factory.mktemp("stores") / "two", orientations=(0, 4)))


def test_orientations_that_are_not_stored_are_drawn_only_when_the_recipe_says_so(
    data: Path, two_frames: FeatureStore
) -> None:
    assert lattice(open_loader(data, two_frames)).orientations == (0, 4)
    loader = open_loader(data, two_frames, **APPROXIMATE)
    assert lattice(loader).orientations == tuple(range(8)) and loader.targets is not None
    assert loader.targets.approximated == dict.fromkeys(loader.targets.specs, (1, 2, 3, 5, 6, 7))
    refusing = CachedTargets(two_frames, (), store_geometry(two_frames, 32))
    with pytest.raises(UsageError, match="orientation 2 is not stored"):
        refusing.read([TargetRequest(0, 2, Box(0, 0, 32, 32))])
    with pytest.raises(UsageError, match=r"orientations \[1, 2, 3, 5, 6, 7\] are not stored"):
        CachedTargets(two_frames, (), lattice(loader))
    with pytest.raises(ValueError, match="orientations is false"):
        recipe(data, augment={"approximate_orientations": True, "orientations": False})


def test_approximated_features_name_the_place_of_the_image_in_all_eight_frames_and_through_cutmix(
    data: Path, two_frames: FeatureStore
) -> None:
    """The coarse layer's centres are off the middle of their cells: turned, they fall elsewhere and are resampled."""
    loader = open_loader(data, two_frames, **APPROXIMATE, batch={"labeled": 1, "unlabeled": 40})
    assert loader.unlabeled is not None
    draws, unlabeled = loader.unlabeled.draws(0, 40), decoded(loader.batch(0)).unlabeled
    assert unlabeled is not None and {d.orientation for d in draws} == set(range(8))
    boxes = unlabeled.views[0].cutmix_boxes
    pixels = cutmix(unlabeled.image, boxes).float().numpy()
    mixed = cutmix_targets(unlabeled.targets, boxes, 32, loader.offsets_px)
    for key, spec in (loader.targets.specs if loader.targets else {}).items():
        values = mixed.features[key].numpy()[..., :3] * spec.std[:3] + spec.mean[:3]
        weights = mixed.weights[key].numpy()
        side, compared = values.shape[1], 0
        for b, i, j in np.ndindex(40, side, side):
            y, x = (int(spec.offset_px + k * spec.stride_px) for k in (i, j))
            number, row, column = pixels[b, :, y, x]
            # A turn of the coarse map has no centres in the outermost 15 px: there the nearest token counts.
            if weights[b, i, j] > 0 and min(row, column) >= 16 and max(row, column) < 48:
                compared += 1
                assert abs(values[b, i, j, 0] - number) < 0.01
                assert abs(values[b, i, j, 1] - row) <= 1.1 and abs(values[b, i, j, 2] - column) <= 1.1
        assert compared > 20 and bool((weights == 0).any()) and bool((weights == 1).any())


def test_arms_of_an_approximating_recipe_see_the_same_crops(data: Path, two_frames: FeatureStore) -> None:
    off: dict[str, Any] = {"distill": False, "fuse": False, "targets": "none"}
    a = decoded(open_loader(data, two_frames, **APPROXIMATE).batch(1))
    assert same(a, decoded(open_loader(data, two_frames, **APPROXIMATE, **off).batch(1)), targets=False)
    assert not same(a, decoded(open_loader(data, two_frames).batch(1)), targets=False)


def test_what_is_turned_must_be_committed_for_all_tiles(data: Path, tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(data, tmp_path / "s", orientations=(0, 4), commit_groups=1))
    with pytest.raises(MismatchError, match="lacks 3"):
        open_loader(data, store, **APPROXIMATE)


def test_a_run_says_and_records_that_it_approximated(data: Path, two_frames: FeatureStore, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "steps": 1, "crop_px": 64, "batch": {"labeled": 1, "unlabeled": 1}, "distill": {"hidden": 4},
        "student": {"channels": 4},
    }  # fmt: skip
    told: list[object] = []
    train(recipe(data, **small, **APPROXIMATE), tmp_path / "run", two_frames.path, device="cpu", tensorboard=False,
          on_event=told.append)  # fmt: skip
    (warned,) = [e.text for e in told if isinstance(e, Warned)]
    assert "coarse/s64/b in orientations 1, 2, 3, 5, 6, 7" in warned
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["targets"]["approximate_orientations"] is True
