"""Probe pseudo-labels: what a head on stored features learns, what it may see, and where it says it."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.alignment import Grid
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.probe import COLOR, Probe, ProbeInput, local_color, probe_share, train_probe
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import ProbeConfig
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

CLASSES, IGNORE = 3, 255
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("probe") / "data", tiles=18, tile_px=64, classes=CLASSES)


@pytest.fixture(scope="module")
def store(data: Path) -> FeatureStore:
    out = data.parent / "store"
    asked = {"data": data, "out": out, "teachers": ["mean"], "scales": [1.0], "orientations": 2, "threads": 1}
    build_store(BuildRequest.of(asked), load_teacher=load_mean_teacher)
    return FeatureStore.open(out)


def opened(data: Path, store: FeatureStore, seed: int = 0, distill: Any = None, **probe: Any) -> BatchLoader:
    asked = {"data": data, "crop_px": 32, "seed": seed, "distill": distill or {}, "probe": probe, "unlabeled": "rest"}
    return BatchLoader.open(open_source(data), Recipe.model_validate(asked), store)


def fitted(loader: BatchLoader) -> Probe:
    return train_probe(loader, loader.recipe, CLASSES, IGNORE, CPU)


def unlabelled(loader: BatchLoader, crops: int = 24) -> tuple[Targets, Tensor, Tensor]:
    """Decoded targets, images 0..1 and true labels of crops of tiles that no label was used of."""
    assert loader.unlabeled is not None
    draws = loader.unlabeled.draws(0, crops)
    samples = loader.dataset.samples(draws)
    images = torch.stack([torch.from_numpy(s.image.copy()) for s in samples]).permute(0, 3, 1, 2) / 255
    labels = torch.stack([torch.from_numpy(s.label.copy()) for s in samples])
    return loader.stack_targets(samples, loader.dataset.codes(draws)).decoded(CPU), images, labels


def accuracy(probe: Probe, loader: BatchLoader) -> float:
    targets, images, labels = unlabelled(loader)
    return float((probe(targets, images, (32, 32)).argmax(1) == labels).float().mean())


def same(a: Probe, b: Probe) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize(
    "probe", [{"inputs": "features"}, {"inputs": "color"}, {"inputs": "both", "hidden": 8}, {"inputs": "auto"}]
)
def test_what_labelled_tiles_teach_holds_for_the_others(data: Path, store: FeatureStore, probe: dict[str, Any]) -> None:
    loader = opened(data, store, **probe)
    found = fitted(loader)
    assert accuracy(found, loader) > 0.8
    keys = {i.key for i in found.inputs}
    assert probe.get("inputs") != "features" or keys == set(loader.targets.specs if loader.targets else ())
    assert probe.get("inputs") != "color" or keys == {COLOR}


def test_it_is_a_function_of_recipe_store_and_labels_alone(data: Path, store: FeatureStore, tmp_path: Path) -> None:
    first = fitted(opened(data, store, inputs="both"))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert same(first, fitted(opened(data, store, inputs="both")))
    assert torch.equal(before, torch.get_rng_state())
    assert not same(first, fitted(opened(data, store, seed=1, inputs="both")))
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    labelled = set(open_source(copy).split("5"))
    for path in (copy / "masks").iterdir():
        if path.stem not in labelled:
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    assert same(first, fitted(opened(copy, store, inputs="both")))
    for tile_id in labelled:
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(copy / "masks" / f"{tile_id}.png")
    assert not same(first, fitted(opened(copy, store, inputs="both")))


def test_auto_leaves_features_that_belong_to_other_tiles(data: Path, store: FeatureStore) -> None:
    probe = fitted(opened(data, store, distill={"control": "shuffled"}, inputs="auto"))
    assert {i.key for i in probe.inputs} == {COLOR}


def test_it_says_what_it_cannot_use(data: Path, store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"probe\.keys.*Did you mean 'mean/s64/mean8'"):
        fitted(opened(data, store, keys=["mean/s64/maen8"]))
    assert {i.key for i in fitted(opened(data, store, keys=["*8"], inputs="features")).inputs} == {"mean/s64/mean8"}
    probe = fitted(opened(data, store, inputs="features"))
    with pytest.raises(UsageError, match="mean/s64/mean16"):
        probe(Targets({}, {}), torch.zeros(1, 3, 32, 32), (32, 32))
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for tile_id in open_source(copy).split("5"):
        Image.fromarray(np.full((64, 64), IGNORE, np.uint8)).save(copy / "masks" / f"{tile_id}.png")
    with pytest.raises(DataError, match="no pixel"):
        fitted(opened(copy, store))


def test_probabilities_are_float32_and_whole_and_unknown_tokens_say_nothing(data: Path, store: FeatureStore) -> None:
    loader = opened(data, store, inputs="features")
    probe = fitted(loader)
    targets, images, _ = unlabelled(loader, 4)
    whole = probe(targets, images, (32, 32))
    assert whole.shape == (4, CLASSES, 32, 32) and whole.dtype == torch.float32 and not whole.requires_grad
    torch.testing.assert_close(whole.sum(1), torch.ones(4, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(probe(targets, images, (32, 32)), whole)
    weights = {k: w.clone() for k, w in targets.weights.items()}
    for weight in weights.values():
        weight[:, :, : weight.shape[2] // 2] = 0
    other = {k: torch.where(weights[k].unsqueeze(-1) == 0, torch.randn_like(x), x) for k, x in targets.features.items()}
    half = probe(Targets(targets.features, weights), images, (32, 32))
    assert torch.equal(half, probe(Targets(other, weights), images, (32, 32)))
    torch.testing.assert_close(half[..., 28:], whole[..., 28:])
    assert not torch.allclose(half[..., :4], whole[..., :4])
    nothing = {k: torch.zeros_like(w) for k, w in weights.items()}
    flat = probe(Targets(other, nothing), images, (32, 32))
    torch.testing.assert_close(flat, flat[:1, :, :1, :1].expand_as(flat))


@given(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]), st.sampled_from([64, 32]))
@settings(deadline=None, max_examples=12)
def test_maps_of_any_stride_speak_of_the_middles_of_their_cells(a: int, b: int, size: int) -> None:
    """Maps that hold their tokens' rows and columns give logits that are the rows and columns of the pixels."""
    probe = Probe([ProbeInput("rows", 1, a), ProbeInput("columns", 1, b)], 3)
    with torch.no_grad():
        probe.weights[0].copy_(torch.tensor([[0.0], [1.0], [0.0]]))
        probe.weights[1].copy_(torch.tensor([[0.0], [0.0], [1.0]]))
    row, column = (Grid(64 // s, s, s / 2).centres() / 64 for s in (a, b))
    rows = torch.from_numpy(row).float().view(1, -1, 1, 1).expand(1, 64 // a, 64 // a, 1)
    columns = torch.from_numpy(column).float().view(1, 1, -1, 1).expand(1, 64 // b, 64 // b, 1)
    features = {"rows": rows, "columns": columns}
    said = probe(Targets(features, {k: torch.ones(x.shape[:3]) for k, x in features.items()}),
                 torch.zeros(1, 3, 64, 64), (size, size)).log()  # fmt: skip
    place = ((torch.arange(size) + 0.5) / size).expand(size, size)
    edge = max(a, b) * size // 64
    inner = (slice(edge, size - edge),) * 2
    torch.testing.assert_close((said[0, 1] - said[0, 0])[inner], place.T[inner])
    torch.testing.assert_close((said[0, 2] - said[0, 0])[inner], place[inner])


def test_channels_that_do_not_vary_stay_small_and_maps_weigh_alike() -> None:
    torch.manual_seed(0)
    wide, narrow = 50 * torch.randn(4, 64, 8, 8) + 9, torch.randn(4, 2, 4, 4)
    wide[:, 0] = 3 + 1e-5 * torch.randn(4, 8, 8)
    probe = Probe([ProbeInput("wide", 64, 4), ProbeInput("narrow", 2, 8)], 2)
    weight = torch.ones(4, 1, 8, 8)
    weight[0], wide[0] = 0, 1e6  # tokens that do not count
    maps = [(wide, weight), (narrow, torch.ones(4, 1, 4, 4))]
    probe.measure(maps)
    (x, _), (y, _) = probe.standardize(maps)
    assert x[1:, 0].abs().max() < 1e-2
    power = [float(m[1:].square().sum(1).mean()) for m in (x, y)]
    assert power == pytest.approx([1, 1], rel=0.3)


def test_a_hidden_layer_tells_what_no_linear_map_can() -> None:
    probe = Probe([ProbeInput("a", 2, 8)], 2, hidden=16, seed=3)
    torch.manual_seed(0)
    x = torch.randn(64, 2, 4, 4)
    label = (x[:, 0] * x[:, 1] > 0).long()
    maps = [(x, torch.ones(64, 1, 4, 4))]
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(probe.logits(maps)[0], label)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    assert (probe.logits(maps)[0].argmax(1) == label).float().mean() > 0.9


def test_local_color_is_the_mean_and_deviation_around_a_cell() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = local_color(image)
    assert found.shape == (1, 24, 8, 8)
    around = image[0, :, 16:40, 24:48].flatten(1)  # the 24 px around cell (3, 4)
    torch.testing.assert_close(found[0, 6:9, 3, 4], around.mean(1))
    torch.testing.assert_close(found[0, 9:12, 3, 4], around.std(1, unbiased=False))
    corner = image[0, :, :16, :16].flatten(1)  # what is left of it at a corner
    torch.testing.assert_close(found[0, 6:9, 0, 0], corner.mean(1))


@given(st.floats(0, 1), st.floats(0.01, 1), st.integers(1, 300))
def test_the_share_falls_from_one_to_nothing(hold: float, until: float, steps: int) -> None:
    hold = min(hold, until)
    shares = [probe_share(ProbeConfig(hold=hold, until=until), step, steps) for step in range(steps)]
    assert all(0 <= b <= a <= 1 for a, b in pairwise(shares))
    for step, share in enumerate(shares):
        assert share == 1 or step > hold * steps * 0.999
        assert share == 0 or step < until * steps
