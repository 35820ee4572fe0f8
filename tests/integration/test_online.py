"""Live teachers: what they say of whole tiles is what the store says, and they see what the student sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.events import Warned
from rsmtdf_cache.request import BuildRequest, parse_teacher
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers import load
from rsmtdf_cache.teachers.base import TeacherRequest
from rsmtdf_cache.views import orient
from rsmtdf_train.augment import batch_token_weights, cutmix, token_weights
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.losses import SupervisedLoss
from rsmtdf_train.objective import TermWeights
from rsmtdf_train.prepare import StepTools, part_to, prepare
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, LabeledBatch, Targets, UnlabeledBatch
from rsmtdf_train.sections import DistillConfig
from rsmtdf_train.state import build_state
from rsmtdf_train.targets.base import TargetMode
from rsmtdf_train.targets.drift import DRIFT_COSINE, Drift, drawn_tiles
from rsmtdf_train.targets.live import live_targets
from rsmtdf_train.targets.modes import open_dataset
from rsmtdf_train.targets.online import MixedTargets, OnlineTargets, estimate_statistics, open_online
from rsmtdf_train.targets.stored import CachedTargets, store_geometry
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

TILE_PX = 128
CPU = torch.device("cpu")
RESNET = "timm:test_resnet,pretrained=none,seed=3,layers=stage4+stage5"
VIT = "timm:test_vit,pretrained=none,seed=4"
KEYS = ["timm-test_resnet/s128/stage4", "timm-test_resnet/s128/stage5", "timm-test_vit/s128/block3",
        "timm-test_vit/s128/block5"]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TileSource:
    root = write_dataset(tmp_path_factory.mktemp("data"), tiles=6, tile_px=TILE_PX)
    return open_source(root)


@pytest.fixture(scope="module")
def store(source: TileSource, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("stores") / "store"
    asked = {"data": source.root, "out": out, "teachers": [RESNET, VIT], "scales": [1], "orientations": 2, "threads": 1}
    build_store(BuildRequest.of(asked))
    return FeatureStore.open(out)


def recipe(source: TileSource, **changes: object) -> Recipe:
    base: dict[str, object] = {
        "data": source.root, "crop_px": TILE_PX, "batch": {"labeled": 2, "unlabeled": 2}, "labeled": "5",
        "targets": "online", "teachers": [RESNET, VIT], "student": {"encoder": "timm:test_resnet", "channels": 8},
    }  # fmt: skip
    return Recipe.model_validate(base | changes)


def stored_targets(store: FeatureStore, config: Recipe) -> CachedTargets:
    assert config.distill is not None
    geometry = store_geometry(store, config.crop_px)
    return CachedTargets(store, config.distill.keys, geometry, standardize=config.distill.standardize)


def loader_of(source: TileSource, store: FeatureStore, config: Recipe, mode: TargetMode) -> BatchLoader:
    return BatchLoader(TileDataset(source, mode, store_geometry(store, config.crop_px)), config)


def images_of(batch: LabeledBatch | UnlabeledBatch) -> Tensor:
    return batch.image.float() / 255


def unlabeled(batch: Batch) -> UnlabeledBatch:
    assert batch.unlabeled is not None
    return batch.unlabeled


def noise(side: int, seed: int = 0) -> Tensor:
    return torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(seed))


# --- with a store --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [True, False])
def test_live_targets_of_whole_tiles_are_those_of_the_store(
    source: TileSource, store: FeatureStore, standardize: bool
) -> None:
    config = recipe(source, distill={"standardize": standardize})
    cached = stored_targets(store, config)
    mode = open_online(source, config, CPU, cached)
    assert isinstance(mode, OnlineTargets) and list(mode.specs) == KEYS == sorted(KEYS)
    spread = []
    for step in range(3):
        batch = unlabeled(loader_of(source, store, config, cached).batch(step))
        read, live = batch.targets.decoded(CPU), mode.live.targets(images_of(batch), batch.valid)
        assert list(live.features) == KEYS
        for key in KEYS:
            assert live.features[key].shape == read.features[key].shape
            cosine = F.cosine_similarity(live.features[key], read.features[key], dim=-1)
            assert float(cosine.min()) > 0.9999
            torch.testing.assert_close(live.features[key], read.features[key], rtol=5e-3, atol=5e-3)
            assert torch.equal(live.weights[key], read.weights[key])
        spread.append(float(live.features[KEYS[0]].std()))
    # Standardised over the tiles of the store: a deviation near 1, which the raw features have not.
    assert (abs(float(np.mean(spread)) - 1) < 0.2) == standardize


def test_tokens_of_a_part_of_a_tile_lie_where_the_stored_ones_lie(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, crop_px=64)
    cached = stored_targets(store, config)
    mode = open_online(source, config, CPU, cached)
    batch = unlabeled(loader_of(source, store, config, cached).batch(0))
    read, live = batch.targets.decoded(CPU), mode.live.targets(images_of(batch))
    assert {k: v.shape for k, v in live.features.items()} == {k: v.shape for k, v in read.features.items()}
    own = open_online(source, config, CPU)  # without the store
    for key in KEYS:
        a, b = own.specs[key], cached.specs[key]
        assert (a.stride_px, a.offset_px, a.channels) == (b.stride_px, b.offset_px, b.channels)
    # A crop's tokens see less than the tile's, but they are about the same places, not about shifted ones.
    mine, theirs = live.features[KEYS[0]], read.features[KEYS[0]]
    there = F.cosine_similarity(mine, theirs, dim=-1).mean()
    assert float(there) > float(F.cosine_similarity(mine.roll(1, 1), theirs, dim=-1).mean()) + 0.1


def test_other_weights_than_the_store_s_are_refused_with_both_digests(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, teachers=[RESNET.replace("seed=3", "seed=9"), VIT])
    found = load(TeacherRequest("timm:test_resnet", "none", 9)).spec.weights
    recorded = next(s["weights"] for s in store.describe()["teachers"] if "resnet" in s["name"])
    with pytest.raises(MismatchError) as caught:
        open_online(source, config, CPU, stored_targets(store, config))
    assert found in str(caught.value) and recorded in str(caught.value) and found != recorded


def test_a_store_s_teachers_need_not_be_named_in_the_recipe(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, teachers=[], distill={"keys": ["timm-test_vit/*"]})
    mode = open_online(source, config, CPU, stored_targets(store, config))
    assert list(mode.specs) == KEYS[2:] and set(mode.live.teachers) == {"timm-test_vit"}


# --- mixed ---------------------------------------------------------------------------------------------------------


def same_codes(a: Targets, b: Targets) -> bool:
    return a.codes.keys() == b.codes.keys() and all(torch.equal(a.codes[k].values, b.codes[k].values) for k in a.codes)


def test_mixed_reads_what_it_uses_and_nothing_else(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, targets="mixed(0.4)", teachers=[VIT], distill={"keys": ["timm-test_vit/*"]})
    cached = stored_targets(store, config)
    mode = open_online(source, config, CPU, cached)
    assert isinstance(mode, MixedTargets)
    mixed, plain = (loader_of(source, store, config, m) for m in (mode, cached))
    seen = set()
    for step in range(12):
        online = mode.is_online(step)
        seen.add(online)
        mine, theirs = mixed.batch(step), plain.batch(step)
        assert torch.equal(unlabeled(mine).image, unlabeled(theirs).image)
        for a, b in ((mine.labeled, theirs.labeled), (unlabeled(mine), unlabeled(theirs))):
            assert not a.targets.codes if online else same_codes(a.targets, b.targets)
    assert seen == {True, False}


def test_the_share_of_online_steps_is_the_one_asked_for(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, teachers=[VIT], distill={"keys": ["timm-test_vit/*"]})
    cached = stored_targets(store, config)
    live = open_online(source, config, CPU, cached).live
    steps = range(400)

    def online(share: float, seed: int = 0) -> list[bool]:
        return [MixedTargets(cached, live, seed, share).is_online(step) for step in steps]

    assert not any(online(0.0)) and all(online(1.0))
    assert sum(online(0.3)) == pytest.approx(120, abs=40)
    assert online(0.3) == online(0.3) != online(0.3, seed=1)
    assert all(more or not less for less, more in zip(online(0.3), online(0.6), strict=True))


# --- without a store -----------------------------------------------------------------------------------------------


def test_estimated_statistics_of_whole_tiles_are_those_of_a_store_of_them(
    source: TileSource, store: FeatureStore
) -> None:
    config = recipe(source)
    mode, cached = open_online(source, config, CPU), stored_targets(store, config)
    assert list(mode.specs) == list(cached.specs) == KEYS
    for key, spec in cached.specs.items():
        np.testing.assert_allclose(mode.specs[key].mean, spec.mean, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(mode.specs[key].std, spec.std, rtol=1e-2, atol=1e-3)
    again = open_online(source, config, CPU)
    assert all(np.array_equal(mode.specs[key].std, again.specs[key].std) for key in KEYS)


def test_native_crops_stand_for_tiles_of_their_own(source: TileSource) -> None:
    """RS-MTDF: 518-px crops of 512-px tiles; the teacher sees the side it was trained at."""
    asked = parse_teacher("dinov2_vits14_paper,pretrained=none,layers=block11")
    teacher = load(TeacherRequest(asked.name, "none", layers=asked.layers))
    (found,) = live_targets(teacher, asked, tile_px=512, crop_px=518, native=True)
    assert (found.key, found.spec.grid) == ("dinov2_vits14_paper/s518/block11", (37, 37))
    assert (found.spec.stride_tile_px, found.spec.offset_tile_px) == (14, 7)
    with pytest.raises(UsageError, match=r"choose crop_px 512$"):
        live_targets(teacher, asked, tile_px=512, crop_px=256, native=False)
    # More than the tile: what is padded counts neither for the statistics nor for the loss.
    config = recipe(
        source, crop_px=160, augment={"geometry": "native"}, teachers=[RESNET], distill={"keys": ["*/stage4"]}
    )
    mode = open_online(source, config, CPU)
    (key,) = mode.specs
    assert key == "timm-test_resnet/s160/stage4"
    wanted = live_targets(
        load(TeacherRequest("timm:test_resnet", "none", 3)), parse_teacher(RESNET), TILE_PX, 160, True
    )
    tiles = len(source.tiles(["train"]))
    counts = {k: v.count for k, v in estimate_statistics(wanted, source, 160).items()}
    assert counts == {key: tiles * 8 * 8, "timm-test_resnet/s160/stage5": tiles * 4 * 4}  # of 10 x 10 and 5 x 5
    valid = torch.ones(2, 160, 160, dtype=torch.bool)
    valid[1, TILE_PX:] = False
    weights = mode.live.targets(noise(160), valid).weights[key]
    assert float(weights[0].min()) == 1 and 0 < float(weights[1].sum()) < float(weights[0].sum())
    padded = config.model_copy(update={"distill": DistillConfig(padding=True, standardize=False)})
    assert float(open_online(source, padded, CPU).live.targets(noise(160), valid).weights[key].min()) == 1


@pytest.mark.parametrize("offset", [None, 1.5, 0.5, 15.5])
def test_weights_of_a_batch_are_those_of_its_crops(offset: float | None) -> None:
    px, tokens = 64, 4
    # One crop for each place of a single invalid pixel on the diagonal; one without any, one with nothing else.
    valid = np.ones((px + 2, px, px), np.bool_)
    valid[np.arange(px), np.arange(px), np.arange(px)] = False
    valid[px + 1] = False
    expected = np.stack([token_weights(crop, (tokens, tokens), offset) for crop in valid])
    found = batch_token_weights(torch.from_numpy(valid), (tokens, tokens), offset)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected)
    assert expected[px].all() and not expected[px + 1].any() and not expected[:px].all((1, 2)).all()


# --- in the step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["strong", "weak"])
def test_the_teachers_see_the_student_s_own_mixed_image(source: TileSource, store: FeatureStore, view: str) -> None:
    config = recipe(
        source, crop_px=64, targets="online", teachers=[VIT], augment={"cutmix_p": 1.0, "jitter_p": 1.0},
        distill={"view": view, "keys": ["timm-test_vit/*/block5"]},
    )  # fmt: skip
    mode = open_online(source, config, CPU, stored_targets(store, config))
    ((key, spec),) = mode.specs.items()
    shape = TargetShape(key, spec.channels, spec.stride_px, spec.offset_px)
    state = build_state(config, 3, [shape], CPU)
    own = {t.data_ptr() for teacher in mode.live.teachers.values() for t in network(teacher).state_dict().values()}
    kept = [*state.student.state_dict().values(), *state.ema.state_dict().values()]
    kept += [p for group in state.optimizer.param_groups for p in group["params"]]
    assert len(own) > 10 and not own & {tensor.data_ptr() for tensor in kept}

    part = part_to(loader_of(source, store, config, mode).batch(0), CPU)
    assert part.unlabeled is not None
    tools = StepTools(SupervisedLoss(config.supervised, None, 255), 255, live=mode.live)
    prepared = prepare(state, part, config, TermWeights(1.0, 1.0, 1.0), tools)
    assert prepared.targets is not None
    strong = part.unlabeled.views[0]
    mixed = cutmix(strong.image, strong.boxes)
    assert not torch.equal(mixed, strong.image) and not torch.equal(strong.image, part.unlabeled.weak)
    assert torch.equal(prepared.mixed[0].image, mixed)
    shown = mixed if view == "strong" else part.unlabeled.weak
    teacher = mode.live.teachers["timm-test_vit"]
    said = teacher.encode_images(torch.cat([part.labeled.image, shown]), 64, ["block5"])["block5"]
    expected = (said - torch.from_numpy(spec.mean)) / torch.from_numpy(spec.std)
    torch.testing.assert_close(prepared.targets.features[key], expected)


def network(teacher: Any) -> torch.nn.Module:
    found: torch.nn.Module = teacher.network
    return found


def test_a_step_s_autocast_is_not_the_teachers_and_a_loss_on_them_has_a_gradient(source: TileSource) -> None:
    mode = open_online(source, recipe(source, teachers=[VIT]), CPU)
    images = noise(TILE_PX).requires_grad_()
    alone = mode.live.targets(images)
    with torch.autocast("cpu", torch.bfloat16):
        targets = mode.live.targets(images)
    for key, features in targets.features.items():
        assert features.dtype == torch.float32 and not features.requires_grad
        assert torch.equal(features, alone.features[key])
        mine = torch.zeros_like(features, requires_grad=True)
        F.mse_loss(mine * features, features).backward()  # type: ignore[no-untyped-call]
        assert mine.grad is not None and float(mine.grad.abs().sum()) > 0


def test_live_targets_draw_no_random_numbers_and_take_no_other_crops(source: TileSource) -> None:
    mode = open_online(source, recipe(source, teachers=[VIT]), CPU)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (mode.live.targets(noise(TILE_PX)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first.features[k], second.features[k]) for k in first.features)
    with pytest.raises(ValueError, match="side of 128"):
        mode.live.targets(noise(64))


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_before_the_first_step(source: TileSource, store: FeatureStore) -> None:
    def refused(pattern: str, cached: CachedTargets | None = None, **changes: object) -> str:
        with pytest.raises(UsageError, match=pattern) as caught:
            open_online(source, recipe(source, **changes), CPU, cached)
        return str(caught.value)

    # One teacher, raw: what is asked here needs neither the other nor statistics.
    raw: dict[str, Any] = {"teachers": [RESNET], "distill": {"standardize": False}}
    refused("names none", teachers=[])
    refused("Did you mean 'timm-test_vit/s128/block5'", teachers=[VIT], distill={"keys": ["timm-test_vit/s128/block4"]})
    refused("reads stored features too", targets="mixed(0.5)")
    refused("shuffled", distill={"control": "shuffled"})
    refused("asked for twice", teachers=[VIT, VIT])
    with pytest.raises(UsageError, match="leave out --use-cache"):
        open_dataset(source, recipe(source, augment={"geometry": "native"}), store)
    message = refused("multiple of its 32-px patch", crop_px=72, **raw)
    better = [int(px) for px in re.findall(r"\d+", message.rpartition("choose crop_px")[2])]
    assert better == [64, 96]
    for px in better:
        config = recipe(source, crop_px=px, **raw)
        assert list(open_online(source, config, CPU).specs) == KEYS[:2]


# --- drift ---------------------------------------------------------------------------------------------------------


def test_no_drift_is_seen_where_there_is_none(source: TileSource, store: FeatureStore) -> None:
    config = recipe(source, targets="cached")
    cached = stored_targets(store, config)
    loader = loader_of(source, store, config, cached)
    events: list[Any] = []
    drift = Drift(cached, source, config.teachers)
    tiles = drawn_tiles(loader, 1)
    assert len(tiles) == 4 and {orientation for _, orientation in drawn_tiles(loader, 0) + tiles} == {0, 4}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = drift.measure(tiles, events.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(found) == KEYS and all(cosine > 0.9999 for cosine in found.values()) and not events


def test_another_network_under_the_name_is_seen_and_said_once(source: TileSource, store: FeatureStore) -> None:
    cached = stored_targets(store, recipe(source, distill={"keys": ["*/block5", "*/stage5"]}))
    other = load(TeacherRequest("timm:test_vit", "none", 77))
    events: list[Any] = []
    drift = Drift(cached, source, [RESNET], held={"timm-test_vit": other})
    for _ in range(2):
        found = drift.measure([("t000", 4), ("t001", 1)], events.append)
        assert found[KEYS[3]] < DRIFT_COSINE < found[KEYS[1]]
    (warned,) = events
    assert isinstance(warned, Warned) and KEYS[3] in warned.text and "verify" in warned.text


def test_a_teacher_that_cannot_be_had_is_named_once_and_passed_over(
    source: TileSource, store: FeatureStore, tmp_path: Path
) -> None:
    cached = stored_targets(store, recipe(source))
    events: list[Any] = []
    drift = Drift(cached, source, [RESNET, f"timm:test_vit,weights={tmp_path / 'gone.safetensors'}"])
    for _ in range(2):
        assert list(drift.measure([("t000", 0)], events.append)) == KEYS[:2]
    (warned,) = events
    assert isinstance(warned, Warned) and "timm-test_vit" in warned.text and "gone.safetensors" in warned.text


class Watching(MeanTeacher):
    """Keeps what it was shown."""

    def encode(self, tiles_BHW3: Tensor, *rest: Any) -> dict[str, Tensor]:
        self.seen = tiles_BHW3
        return super().encode(tiles_BHW3, *rest)


def test_what_a_codec_loses_is_not_taken_for_drift(source: TileSource, tmp_path: Path) -> None:
    asked = {"data": source.root, "out": tmp_path / "s", "teachers": ["mean"], "codec": "pca1-int8", "threads": 1}
    build_store(BuildRequest.of({**asked, "scales": [1], "orientations": 2}), load_teacher=load_mean_teacher)
    store = FeatureStore.open(tmp_path / "s")
    cached = CachedTargets(store, (), store_geometry(store, TILE_PX))
    (key, *_) = cached.specs
    row = store.tiles.row_of("t000")
    plain = load_mean_teacher(TeacherRequest("mean"))
    spec = next(s for s in cached.arrays() if key.endswith(s.layer.name))
    image = source.read_image(next(t for t in source.tiles() if t.id == "t000"))
    said = plain.encode(torch.from_numpy(image)[None], spec.view.size_px, [spec.layer.name])[spec.layer.name][0]
    kept = torch.from_numpy(store.read(spec.key, [row]).values[0]).float()
    assert float(F.cosine_similarity(said, kept, dim=-1).mean()) < DRIFT_COSINE  # one component of three
    events: list[Any] = []
    watching = Watching()
    for orientation in (0, 4):
        drift = Drift(cached, source, held={"mean": watching})
        found = drift.measure([("t000", orientation)], events.append)
        assert found[key] > 0.9999 and not events
        assert np.array_equal(watching.seen[0].numpy(), orient(image, orientation))  # as it was drawn
