"""Paired arms: what differs between them, and the interval of a paired difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.experiment.arms import ARMS, arm_recipe
from rsmtdf_train.experiment.compare import paired_difference
from rsmtdf_train.experiment.jobs import TrainingJob, run_jobs
from rsmtdf_train.recipe import Recipe

RECIPE = Recipe(data=Path("data"))


#: What each arm changes in the recipe ``PRESET``, and nothing else.
CHANGES = {
    "supervised": {"method", "targets", "distill", "fuse", "probe"},
    "fixmatch": {"targets", "distill", "fuse", "probe"},
    "unimatch": {"method", "targets", "distill", "fuse", "probe"},
    "online": {"targets", "fuse", "probe"},
    "distilled": {"fuse", "probe"},
    "cached": {"probe"},
    "privileged": {"probe", "privileged"},
    "preset": set(),
    "random": set(),  # another store
    "shuffled": {"distill"},
}
PRESET = Recipe.model_validate({"data": "data", "probe": {"hold": 0.5}, "distill": {"hidden": 8}})


def test_arms_change_what_they_are_named_for_and_nothing_else() -> None:
    whole = PRESET.model_dump()
    found = {}
    for arm in ARMS:
        changed = arm_recipe(PRESET, arm).model_dump()
        found[arm] = {key for key in whole if changed[key] != whole[key]}
    assert found == CHANGES
    shuffled, distill = arm_recipe(PRESET, "shuffled").distill, PRESET.distill
    assert shuffled is not None and distill is not None
    assert shuffled == distill.model_copy(update={"control": "shuffled"})
    assert {arm for arm, entry in ARMS.items() if entry.random_teachers} == {"random"}


def test_an_unknown_arm_and_a_cached_arm_without_distillation_are_refused() -> None:
    with pytest.raises(UsageError, match="supervised, fixmatch, "):
        arm_recipe(RECIPE, "both")
    with pytest.raises(UsageError, match="distill: false"):
        arm_recipe(RECIPE.without_distillation(), "cached")


def test_the_interval_of_five_pairs_is_the_t_interval() -> None:
    """By hand: differences 1..5, mean 3, sd sqrt(2.5), t(0.975, 4) = 2.776: 3 ± 2.776 * sqrt(2.5 / 5)."""
    found = paired_difference([2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
    assert found.pairs == 5
    assert found.mean == pytest.approx(3)
    assert found.low == pytest.approx(3 - 2.776 * 0.5**0.5)
    assert found.high == pytest.approx(3 + 2.776 * 0.5**0.5)
    assert found.verdict == "better"


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    pairs = random.normal(size=(2000, 2, 6)) + random.normal(size=(2000, 1, 6)) * 10  # a large part shared by the pair
    inside = 0
    for values, base in pairs:
        found = paired_difference(values.tolist(), base.tolist())
        assert found.low is not None and found.high is not None
        inside += found.low <= 0 <= found.high
    assert 0.93 < inside / len(pairs) < 0.97


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.3], "inconclusive"), ([0.3, 0.3, 0.31], "better"), ([0.1, 0.1, 0.11], "worse"), ([0.1, 0.3], "inconclusive")],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(values: list[float], verdict: str) -> None:
    assert paired_difference(values, [0.2] * len(values)).verdict == verdict


def test_the_interval_of_many_pairs_is_no_narrower_than_the_exact_one() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=200)
    found = paired_difference(values.tolist(), [0.0] * 200)
    assert found.low is not None
    exact = 1.972 * values.std(ddof=1) / 200**0.5  # t(0.975, 199)
    assert exact <= found.mean - found.low <= 1.05 * exact


def test_runs_that_share_a_folder_are_refused_before_any_starts(tmp_path: Path) -> None:
    job = TrainingJob("a", RECIPE, tmp_path / "run")
    with pytest.raises(UsageError, match="share a folder"):
        run_jobs([job, job])
    assert not list(tmp_path.iterdir())
