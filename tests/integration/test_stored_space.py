"""``distill.space: stored``: steps that no teacher's width makes dearer, runs from end to end, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.store import FeatureStore
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.prepare import part_to
from rsmtdf_train.processes import Processes
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.run import Run, open_run
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import train_step
from tests.command_line import call, call_json
from tests.datasets import write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

#: Both have tokens of 16 px; the first has 64 channels, the second 96.
NARROW, WIDE = (f"timm:{name},pretrained=none,seed=1,layers=block1" for name in ("test_vit", "test_vit3"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(data: Path, out: Path, teacher: str, codec: str, **more: object) -> Path:
    values = {"data": data, "out": out, "teachers": [teacher], "threads": 1, "scales": [1.0], "codec": codec}
    build_store(BuildRequest.of({**values, **more}))
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored_space")
    data = write_dataset(root / "data", tiles=9, tile_px=64)
    build(data, root / "narrow", NARROW, "pca8-int8")
    build(data, root / "wide", WIDE, "pca8-int8")
    build(data, root / "channels", NARROW, "int8")
    return root


def recipe(root: Path, space: str = "stored", **changes: object) -> Recipe:
    distill = {"space": space, "hidden": 32}
    values = {
        "data": root / "data", "labeled": "10", "steps": 6, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:test_resnet", "channels": 16}, "distill": distill,
    }  # fmt: skip
    return Recipe.model_validate({**values, **changes})


def opened(root: Path, out: Path, store: str, space: str) -> tuple[Run, TrainState]:
    run = open_run(recipe(root, space), out, root / store, "cpu", 1, Processes(), lambda event: None)
    state = build_state(run.recipe, len(run.identity.classes), run.identity.targets, run.device)
    state.student.train()
    return run, state


def flops(root: Path, out: Path, store: str, space: str) -> int:
    """Return what one step computes in matrix products and convolutions, forward and backward."""
    run, state = opened(root, out, store, space)
    with FlopCounterMode(display=False) as counter:
        train_step(state, [part_to(run.loader.batch(0), run.device)], run.recipe, run.tools)
    return int(counter.get_total_flops())


def test_a_step_costs_the_same_for_a_teacher_of_any_width(root: Path, tmp_path: Path) -> None:
    cost = {
        (store, space): flops(root, tmp_path / f"{store}-{space}", store, space)
        for store in ("narrow", "wide")
        for space in ("stored", "channels")
    }
    assert cost["narrow", "stored"] == cost["wide", "stored"]
    assert cost["narrow", "stored"] < cost["narrow", "channels"] < cost["wide", "channels"]


def test_translators_have_the_stored_channels_and_targets_are_the_components(root: Path, tmp_path: Path) -> None:
    run, state = opened(root, tmp_path / "run", "wide", "stored")
    assert [t.channels for t in run.identity.targets] == [8]
    (target,) = run.loader.batch(0).labeled.targets.decoded(torch.device("cpu")).features.values()
    assert target.shape == (2, 4, 4, 8) and bool(target.isfinite().all())
    assert {p.shape[0] for n, p in state.student.named_parameters() if "translators.0.second" in n} == {8}


def test_a_run_is_trained_scored_and_mapped_from_components(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(root).to_yaml())
    run = tmp_path / "run"
    result = call_json("train", path, "--out", run, "--use-cache", root / "wide")
    scores = call_json("eval", run)["scores"]
    assert 0 <= scores["ema"]["miou"] <= 1 and scores["ema"]["miou"] == result["scores"]["ema"]["miou"]
    code, _, err = call("predict", run, root / "data" / "images" / "t000.png", "--out", tmp_path / "maps", "-q")
    assert code == 0 and (tmp_path / "maps" / "t000_mask.png").is_file(), err


def test_components_are_refused_where_there_are_none(root: Path, tmp_path: Path) -> None:
    source = open_source(root / "data")
    with pytest.raises(UsageError, match="--codec pcaK-int8"):
        BatchLoader.open(source, recipe(root), FeatureStore.open(root / "channels"), 1)
    turned = recipe(root, augment={"approximate_orientations": True})
    with pytest.raises(UsageError, match=r"orientations \[1, .*approximated"):
        BatchLoader.open(source, turned, FeatureStore.open(root / "wide"), 1)
    views = build(root / "data", tmp_path / "views", NARROW, "pca8-int8", fixed_views=2, view_seed=1)
    fixed = recipe(root, targets="fixed-views", augment={"geometry": "fixed-views"})
    with pytest.raises(UsageError, match="components of its own"):
        BatchLoader.open(source, fixed, FeatureStore.open(views), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"space": "stored", "standardize": False}}, "standardised channels"),
        ({"targets": "online", "teachers": [NARROW]}, "speak in channels"),
        ({"targets": "mixed(0.5)", "teachers": [NARROW]}, "speak in channels"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(root: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(root, "stored", **changes)


def test_without_distillation_the_space_of_targets_matters_to_nobody(root: Path) -> None:
    baseline = recipe(root).without_distillation()
    assert (
        BatchLoader.open(open_source(root / "data"), baseline, FeatureStore.open(root / "channels"), 1).targets is None
    )
