"""Stores with pixels and the batches of runs that read them, for tests that compare where a run reads from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rsmtdf_cache.build import build_store
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import TileSource
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.pixel_source import PixelSource
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, LabeledBatch, UnlabeledBatch
from tests.teachers import load_mean_teacher

__all__ = ["CPU", "batches", "build", "recipe", "require_same"]

CPU = torch.device("cpu")


def build(data: Path, out: Path, **values: object) -> Path:
    """Build the features of the mean teacher in eight orientations, and pixels."""
    asked = {"data": data, "out": out, "teachers": ["mean"], "scales": [1.0], "orientations": 8, "pixels": True}
    build_store(BuildRequest.of({**asked, **values}), load_teacher=load_mean_teacher)
    return out


def recipe(data: Path, **changes: object) -> Recipe:
    """Return a recipe of four small steps on ``data``."""
    base: dict[str, object] = {
        "data": data, "crop_px": 32, "batch": {"labeled": 3, "unlabeled": 4}, "labeled": "10", "steps": 4,
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8, "pretrained": False},
        "distill": {"hidden": 8}, "eval_split": "val",
    }  # fmt: skip
    return Recipe.model_validate(base | changes)


def batches(
    source: TileSource, store: Path, pixels: PixelSource, steps: int = 6, threads: int = 2, **changes: object
) -> Iterator[Batch]:
    """Yield the batches of a run that reads pixels as asked."""
    loader = BatchLoader.open(
        source, recipe(source.root, **changes), FeatureStore.open(store), threads=threads, pixels=pixels
    )  # fmt: skip
    assert (loader.dataset.pixels is None) == (pixels == "source")
    for (batch,) in loader.iterate(0, steps):
        yield batch


def require_same(a: Batch, b: Batch) -> None:
    """Assert that two batches are the same in every bit."""
    assert a.unlabeled is not None and b.unlabeled is not None
    pairs: list[tuple[LabeledBatch | UnlabeledBatch, LabeledBatch | UnlabeledBatch]] = [
        (a.labeled, b.labeled), (a.unlabeled, b.unlabeled)
    ]  # fmt: skip
    for one, other in pairs:
        for name in ("image", "label", "valid"):
            x, y = getattr(one, name), getattr(other, name)
            assert x.dtype == y.dtype and torch.equal(x, y), name
        assert one.targets.codes.keys() == other.targets.codes.keys() != set()
        for key, coded in one.targets.codes.items():
            assert torch.equal(coded.values, other.targets.codes[key].values)
            assert torch.equal(one.targets.weights[key], other.targets.weights[key])
