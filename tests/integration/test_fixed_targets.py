"""Targets of fixed views from real stores: what the teacher said of the very crop that the student is shown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.fixed_views import FixedView, draw_fixed_view
from rsmtdf_cache.request import BuildRequest, parse_teacher
from rsmtdf_cache.share.catalogue import forget_store, register_store, registered_stores
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers import load
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.views import Box, render
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.find_store import find_store
from rsmtdf_train.geometry import FixedViewGeometry, Geometry
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Sample
from rsmtdf_train.sampler import UNLABELED, Draw, Stream
from rsmtdf_train.targets.base import TargetRequest, TargetSpec
from rsmtdf_train.targets.fixed import FixedViewTargets, fixed_view_geometry, fixed_view_specs
from rsmtdf_train.targets.modes import open_dataset
from rsmtdf_train.targets.stored import CachedTargets, derangement
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

TILE_PX, CROP_PX, VIEWS, SEED = 128, 96, 3, 7
BLOB_PX = 8.0


def build(data: Path, out: Path, **changes: object) -> FeatureStore:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 8, "threads": 1, "scales": [1.0], **changes}
    build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


def recipe(data: Path, **changes: object) -> Recipe:
    base: dict[str, object] = {"data": data, "crop_px": CROP_PX, "targets": "fixed-views", "steps": 4}
    return Recipe.model_validate(base | changes)


def opened(data: Path, store: FeatureStore | None, wanted: Recipe) -> TileDataset:
    return open_dataset(open_source(data), wanted, store)


def drawn(dataset: TileDataset, wanted: Recipe, count: int = 12) -> list[Draw]:
    stream = Stream(dataset.tile_ids, UNLABELED, wanted.seed, dataset.geometry, wanted.augment)
    return [stream.draw(i) for i in range(count)]


def decode(spec: TargetSpec, codes: Codes) -> NDArray[np.float32]:
    scale = None if codes.scale is None else torch.from_numpy(codes.scale)
    return np.asarray(spec.decoder(torch.from_numpy(codes.values), scale))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles with one soft bright blob each, labelled 1 where it is brightest."""
    root = write_dataset(tmp_path_factory.mktemp("fixed") / "data", tiles=9, tile_px=TILE_PX, classes=2)
    ys, xs = np.mgrid[0:TILE_PX, 0:TILE_PX] + 0.5
    for n in range(9):
        light = np.exp(-((ys - 52 - 4 * n) ** 2 + (xs - 80 + 3 * n) ** 2) / (2 * BLOB_PX**2))
        image = 40 + light[..., None] * np.array([150, 140, 130])
        Image.fromarray(image.round().astype(np.uint8)).save(root / "images" / f"t{n:03}.png")
        Image.fromarray((light > 0.5).astype(np.uint8)).save(root / "masks" / f"t{n:03}.png")
    return root


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(data, tmp_path_factory.mktemp("stores") / "s", fixed_views=VIEWS, view_seed=SEED)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(data, tmp_path_factory.mktemp("stores") / "whole")


def test_targets_are_what_the_live_teacher_says_of_the_rendered_view(data: Path, tmp_path: Path) -> None:
    """Of networks with codes in float16, and in int8 with a calibration for each view."""
    layers = {"timm:test_vit": "block1", "timm:test_resnet": "stage2"}
    asked = [f"{name},pretrained=none,seed=2,layers={layer}" for name, layer in layers.items()]
    values = {"teachers": [asked[0], f"{asked[1]},codec=int8"], "scales": [1.0], "group_rows": 8, "threads": 1}
    build_store(BuildRequest.of({"data": data, "out": tmp_path / "s", "fixed_views": 2, **values}))
    store, wanted = FeatureStore.open(tmp_path / "s"), recipe(data)
    dataset = opened(data, store, wanted)
    assert isinstance(dataset.targets, FixedViewTargets) and isinstance(dataset.geometry, FixedViewGeometry)
    teachers = {f"timm-{n[5:]}": load(TeacherRequest(n, "none", 2, (layer,))) for n, layer in layers.items()}
    specs, draws = fixed_view_specs(store), drawn(dataset, wanted)
    assert {d.cut.view for d in draws} == {0, 1}
    assert set(dataset.targets.specs) == set(specs) and len(specs) == 2
    images = {t.id: dataset.source.read_image(t) for t in dataset.source.tiles(["train"])}
    for draw, sample in zip(draws, dataset.samples(draws), strict=True):
        assert sample.image.shape == (CROP_PX, CROP_PX, 3) and sample.valid.all() and draw.cut.view is not None
        for key, target in dataset.targets.specs.items():
            spec = specs[key][dataset.geometry.views[draw.cut.view]]
            shown = torch.from_numpy(render(images[draw.tile_id], spec.view))[None]
            name = spec.layer.name
            live = teachers[spec.teacher.name].encode(shown, spec.view.size_px, [name])[name][0].numpy()
            found, expected = decode(target, sample.features[key]), (live - target.mean) / target.std
            assert found.shape == expected.shape and target.stride_px * len(found) == pytest.approx(CROP_PX)
            if spec.encoding.codec == "float16":
                np.testing.assert_allclose(found, expected, atol=0.02)
            else:
                assert (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99


def test_a_mark_lies_at_one_place_of_image_label_and_tokens(data: Path, store: FeatureStore) -> None:
    wanted = recipe(data)
    dataset = opened(data, store, wanted)
    assert dataset.targets is not None
    seen = 0
    for sample in dataset.samples(drawn(dataset, wanted, 30)):
        mask = sample.label == 1
        ys, xs = np.nonzero(mask)
        if not mask.any() or min(ys.min(), xs.min()) < 12 or max(ys.max(), xs.max()) > CROP_PX - 13:
            continue  # the blob is cut
        seen += 1
        image = centroid(sample.image.sum(-1).astype(float), 1.0, 0.5)
        np.testing.assert_allclose(centroid(mask.astype(float), 1.0, 0.5), image, atol=0.5)
        for key, spec in dataset.targets.specs.items():
            light = (decode(spec, sample.features[key]) * spec.std + spec.mean).sum(-1).astype(float)
            np.testing.assert_allclose(centroid(light, spec.stride_px, spec.offset_px), image, atol=0.75)
    assert seen > 5


def centroid(light: NDArray[np.float64], stride_px: float, offset_px: float) -> tuple[float, float]:
    light = np.clip(light - np.median(light) - 0.1 * np.ptp(light), 0, None)
    centres = offset_px + stride_px * np.arange(len(light))
    return float(light.sum(1) @ centres / light.sum()), float(light.sum(0) @ centres / light.sum())


def test_the_paired_baseline_sees_the_same_crops(data: Path, store: FeatureStore) -> None:
    wanted = recipe(data)
    plain = wanted.without_distillation()
    assert plain.targets == "none"
    one, other = opened(data, store, wanted), opened(data, store, plain)
    assert other.targets is None and other.geometry == one.geometry and drawn(one, wanted) == drawn(other, plain)
    for a, b in zip(one.samples(drawn(one, wanted)), other.samples(drawn(other, plain)), strict=True):
        assert same_pixels(a, b) and a.features and not b.features
    saved = Recipe.model_validate({**wanted.model_dump(), "distill": False})
    assert (saved.targets, saved.augment.geometry) == ("none", "fixed-views")


def same_pixels(a: Sample, b: Sample) -> bool:
    return a.tile_id == b.tile_id and all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in ("image", "label", "valid")
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"augment": {"geometry": "lattice"}}, "does not go with"),
        ({"targets": "cached", "augment": {"geometry": "fixed-views"}}, "does not go with"),
        ({"targets": "online", "augment": {"geometry": "fixed-views"}}, "does not go with"),
        ({"augment": {"orientations": False}}, "orientations"),
        ({"augment": {"approximate_orientations": True}}, "approximate_orientations"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(data: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        recipe(data, **changes)


def test_only_views_that_all_teachers_share_are_drawn(data: Path, tmp_path: Path) -> None:
    one, other, third = (f"{name},layers=mean16,fixed_views" for name in ("mean", "other", "third"))
    store = build(data, tmp_path / "s", teachers=[f"{one}=2", f"{other}=1"], view_seed=1)
    geometry = fixed_view_geometry(store, CROP_PX)
    assert set(geometry.views) == {draw_fixed_view(1, 0, TILE_PX)}
    assert len(FixedViewTargets(store, ["mean/*"], geometry).arrays()) == 1
    wide = fixed_view_geometry(store, CROP_PX, ["mean/*"])
    assert set(wide.views) == {draw_fixed_view(1, k, TILE_PX) for k in range(2)}
    with pytest.raises(UsageError, match=r"other/s128/mean16: lacks fixed views.*--fixed-views"):
        FixedViewTargets(store, (), wide)
    build(data, tmp_path / "s", teachers=[f"{third}=1"], view_seed=2)
    with pytest.raises(UsageError, match="no fixed view is stored for all of"):
        fixed_view_geometry(FeatureStore.open(tmp_path / "s"), CROP_PX)


def test_one_mean_and_deviation_hold_for_all_views(store: FeatureStore) -> None:
    targets = FixedViewTargets(store, (), fixed_view_geometry(store, CROP_PX))
    for key, spec in targets.specs.items():
        views = fixed_view_specs(store)[key].values()
        values = np.concatenate([store.read(v.key, range(6)).values.reshape(-1, 3) for v in views]).astype(np.float64)
        np.testing.assert_allclose(spec.mean, values.mean(0), rtol=1e-4)
        np.testing.assert_allclose(spec.std, values.std(0), rtol=1e-3)
        raw = FixedViewTargets(store, (), targets.geometry, standardize=False).specs[key]
        codes = store.read_codes(next(iter(views)).key, [2])[0]
        np.testing.assert_allclose(decode(raw, codes), decode(spec, codes) * spec.std + spec.mean, rtol=1e-3)


def test_a_store_without_fixed_views_says_how_to_add_them(data: Path, whole: FeatureStore) -> None:
    with pytest.raises(UsageError, match="--fixed-views K --seed S"):
        opened(data, whole, recipe(data))
    with pytest.raises(UsageError, match="--use-cache"):
        opened(data, None, recipe(data))


def test_a_request_without_a_view_is_refused(store: FeatureStore) -> None:
    targets = FixedViewTargets(store, (), fixed_view_geometry(store, CROP_PX))
    for view in (None, VIEWS):
        with pytest.raises(UsageError, match="views"):
            targets.read([TargetRequest(0, 0, Box(0, 0, 64, 64), view)])


def test_a_teacher_whose_tokens_lie_elsewhere_in_each_view_is_refused(data: Path, tmp_path: Path) -> None:
    def load_aligned(request: TeacherRequest, device: str = "cpu") -> Teacher:
        teacher = MeanTeacher(request.name)
        pixel = teacher.spec.pixel.model_copy(update={"align_corners": True})
        teacher.spec = teacher.spec.model_copy(update={"pixel": pixel, "native_px": 64})
        return teacher

    values = {"data": data, "out": tmp_path / "s", "teachers": ["mean"], "scales": [1.0], "fixed_views": 2}
    build_store(BuildRequest.of(values), load_teacher=load_aligned)
    store = FeatureStore.open(tmp_path / "s")
    geometry = fixed_view_geometry(store, CROP_PX)
    assert len({view.crop.side_px for view in geometry.views}) > 1
    with pytest.raises(UsageError, match="aligns the corners"):
        FixedViewTargets(store, (), geometry)


def test_missing_tiles_are_named_with_a_command_that_adds_them(data: Path, tmp_path: Path) -> None:
    splits = {"train": range(3), "val": [3], "test": [4, 5]}
    small = write_dataset(tmp_path / "small", tiles=6, tile_px=TILE_PX, splits=splits)
    store = build(small, tmp_path / "s", fixed_views=VIEWS, view_seed=SEED)
    (small / "splits" / "train.txt").write_text("".join(f"t{n:03}\n" for n in (0, 1, 2, 5)))
    (small / "splits" / "test.txt").write_text("t004\n")
    with pytest.raises(MismatchError, match="lacks 1 of them") as refused:
        opened(small, store, recipe(small))
    command = str(refused.value).splitlines()[-1].split()
    teacher = parse_teacher(command[command.index("--teacher") + 1])
    assert (teacher.fixed_views, command[command.index("--seed") + 1]) == (VIEWS, str(SEED))
    request = BuildRequest(data=small, out=tmp_path / "s", teachers=(teacher,), view_seed=SEED)
    build_store(request, load_teacher=load_mean_teacher)
    after = FeatureStore.open(tmp_path / "s")
    assert {str(k) for k in after.keys()} == {str(k) for k in store.keys()}
    assert opened(small, after, recipe(small)).tile_ids == [f"t{n:03}" for n in (0, 1, 2, 5)]


def test_a_store_is_found_when_it_holds_fixed_views(data: Path, store: FeatureStore, whole: FeatureStore) -> None:
    wanted = recipe(data)
    for entry in registered_stores():  # builds register theirs
        forget_store(entry.path)
    register_store(whole.path, data=data)
    with pytest.raises(UsageError, match="holds no fixed views") as refused:
        find_store(wanted)
    assert re.search(r"rsmtdf cache build .* --fixed-views \d+", str(refused.value))
    register_store(store.path, data=data)
    assert find_store(wanted).path == str(store.path)
    for path in (whole.path, store.path):
        forget_store(path)


def test_the_control_gives_every_tile_the_features_of_another(data: Path, store: FeatureStore) -> None:
    wanted = recipe(data, seed=4)
    shuffled = recipe(data, seed=4, distill={"control": "shuffled"})
    one, other = (opened(data, store, r) for r in (wanted, shuffled))
    assert isinstance(one.targets, FixedViewTargets) and isinstance(other.targets, FixedViewTargets)
    partner = derangement(one.tile_ids, 4)
    for draw in drawn(one, wanted):
        a, b = one.sample(draw), other.sample(draw)
        assert same_pixels(a, b) and a.row == b.row
        row = one.targets.row_of(partner[draw.tile_id])
        theirs = one.targets.read([TargetRequest(row, 0, draw.box, draw.cut.view)])
        for key, codes in b.features.items():
            np.testing.assert_array_equal(codes.values, theirs[key].values[0])
            assert not np.array_equal(codes.values, a.features[key].values)


def test_the_control_holds_for_whole_tiles_too(data: Path, store: FeatureStore) -> None:
    shuffled = recipe(data, targets="cached", distill={"control": "shuffled"})
    dataset = opened(data, store, shuffled)
    assert isinstance(dataset.targets, CachedTargets) and isinstance(dataset.geometry, Geometry)
    plain = CachedTargets(store, (), dataset.geometry)
    partner = derangement(dataset.tile_ids, 0)
    draws = drawn(dataset, shuffled)
    rows = [plain.row_of(partner[d.tile_id]) for d in draws]
    expected = plain.read([TargetRequest(row, d.orientation, d.box) for row, d in zip(rows, draws, strict=True)])
    for n, sample in enumerate(dataset.samples(draws)):
        assert sample.row == plain.row_of(sample.tile_id) and set(sample.features) == set(expected)
        assert all(np.array_equal(sample.features[key].values, expected[key].values[n]) for key in expected)


def test_fixed_views_are_views_of_stored_specs(store: FeatureStore) -> None:
    for by_view in fixed_view_specs(store).values():
        assert list(by_view) == list(fixed_view_geometry(store, CROP_PX).views)
        assert all(FixedView.of(spec.view) == view for view, spec in by_view.items())
