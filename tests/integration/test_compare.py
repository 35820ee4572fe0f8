"""Three arms on a tiny dataset in real processes: a table, resumption, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.events import Event, ProgressEnd, ProgressStart
from rsmtdf_cache.sources import open_source
from rsmtdf_train.experiment.compare import DEFAULT_ARMS, Comparison, compare_arms
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.showcase import choose_tiles, picture_arms
from tests.stores import write_mean_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mean_store(tmp_path_factory.mktemp("compare"), tiles=12)


def recipe(root: Path, steps: int = 3) -> Recipe:
    return Recipe.model_validate({
        "data": str(root / "data"), "steps": steps, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8}, "threshold": 0.3,
        "distill": {"hidden": 8},
    })  # fmt: skip


@pytest.fixture(scope="module")
def compared(root: Path) -> tuple[Comparison, list[Event]]:
    events: list[Event] = []
    result = compare_arms(
        recipe(root), root / "out", root / "store", jobs=2, without=["class2"], context={"machine": "test"},
        on_event=events.append,
    )  # fmt: skip
    return result, events


def test_every_arm_is_scored_and_the_table_is_written_with_its_context(
    root: Path, compared: tuple[Comparison, list[Event]]
) -> None:
    result, _ = compared
    assert [row.arm for row in result.rows] == list(DEFAULT_ARMS)
    for row in result.rows:
        metrics = json.loads((row.runs[0] / "metrics.json").read_text())
        ious = {c["name"]: c["iou"] for c in metrics["scores"]["ema"]["classes"]}
        assert row.mean == pytest.approx(metrics["scores"]["ema"]["miou"])
        assert row.mean_without == pytest.approx((ious["class0"] + ious["class1"]) / 2)
        assert metrics["store"], "every arm reads the geometry of one store"
    document = json.loads((root / "out" / "comparison.json").read_text())
    assert document["context"] == {"machine": "test"}
    assert [row["verdict"] for row in document["rows"]] == ["inconclusive", None, "inconclusive"]


def test_each_run_is_a_task_that_ends(compared: tuple[Comparison, list[Event]]) -> None:
    _, events = compared
    started = {e.task for e in events if isinstance(e, ProgressStart)}
    assert len(started) == 3
    assert {e.task for e in events if isinstance(e, ProgressEnd)} == started


def test_a_finished_comparison_starts_no_run_and_gives_the_same_table(
    root: Path, compared: tuple[Comparison, list[Event]]
) -> None:
    events: list[Event] = []
    again = compare_arms(recipe(root), root / "out", root / "store", without=["class2"], on_event=events.append)
    assert again == compared[0]
    assert events == []


def test_another_recipe_in_the_same_folder_is_refused(root: Path, compared: tuple[Comparison, list[Event]]) -> None:
    with pytest.raises(MismatchError, match="steps"):
        compare_arms(recipe(root, steps=4), root / "out", root / "store", arms=["fixmatch"])


def test_pictures_show_all_arms(root: Path, compared: tuple[Comparison, list[Event]]) -> None:
    source = open_source(root / "data")
    for path in picture_arms(compared[0], source, root / "pictures", tiles=2):
        with Image.open(path) as picture:
            assert picture.width > 300
    ids = [tile.id for tile in choose_tiles(source, "test", 2)]
    assert len(set(ids)) == 2 and set(ids) <= set(source.split("test"))
