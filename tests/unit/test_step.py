"""One step: what is distilled, when, and what it may touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, LabeledBatch, Targets, UnlabeledBatch
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import train_step

KEY = "t/s64/x"
SHAPE = TargetShape(KEY, 5, 8.0)


def recipe(**distill: Any) -> Recipe:
    return Recipe.model_validate({
        "data": "nowhere", "steps": 10, "crop_px": 64, "threshold": 0.0, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:test_resnet", "channels": 8}, "distill": {"hidden": 8, **distill},
        "optim": {"schedule": "constant"},
    })  # fmt: skip


def targets(weight: float = 1.0) -> Targets:
    return Targets({KEY: torch.randn(2, 8, 8, 5)}, {KEY: torch.full((2, 8, 8), weight)})


def batch(step: int = 0, strong: torch.Tensor | None = None, weak: torch.Tensor | None = None) -> Batch:
    torch.manual_seed(step)
    labeled = LabeledBatch(torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)), targets())
    boxes = torch.tensor([[0, 0, 32, 32], [8, 8, 40, 64]])
    images = torch.rand(2, 2, 3, 64, 64)
    unlabeled = UnlabeledBatch(
        weak=images[0] if weak is None else weak,
        strong=images[1] if strong is None else strong,
        valid=torch.ones(2, 64, 64, dtype=torch.bool),
        label=torch.zeros(2, 64, 64, dtype=torch.int64),
        cutmix_boxes=boxes,
        targets=targets(),
    )
    return Batch(step, labeled, unlabeled)


def state(of: Recipe) -> TrainState:
    return build_state(of, 3, [SHAPE], torch.device("cpu"))


def weights(of: TrainState, prefix: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in of.student.named_parameters() if k.startswith(prefix)}


def test_before_segmentation_only_encoder_and_translators_learn() -> None:
    here = recipe(only_steps=1)
    s = state(here)
    before = {p: weights(s, p) for p in ("student.decoder", "student.encoder", "fusion.translators")}
    logs = train_step(s, batch(), here, 255)
    assert all(torch.equal(v, weights(s, "student.decoder")[k]) for k, v in before["student.decoder"].items())
    for part in ("student.encoder", "fusion.translators"):
        assert any(not torch.equal(v, weights(s, part)[k]) for k, v in before[part].items())
    assert float(logs["loss_labeled"]) == 0 and float(logs["loss_distill"]) > 0 and "mask_ratio" not in logs
    train_step(s, batch(1), here, 255)
    assert any(not torch.equal(v, weights(s, "student.decoder")[k]) for k, v in before["student.decoder"].items())


@pytest.mark.parametrize("only_steps", [0, 1])
@pytest.mark.parametrize(("view", "depends_on"), [("weak", "weak"), ("strong", "strong")])
def test_the_distilled_view_is_the_one_the_recipe_names(view: str, depends_on: str, only_steps: int) -> None:
    here = recipe(view=view, only_steps=only_steps)
    base = batch()
    assert base.unlabeled is not None
    losses = {}
    for name in ("none", "weak", "strong"):
        fresh = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
        changed = batch(**({} if name == "none" else {name: fresh}))  # type: ignore[arg-type]
        s = state(here)
        s.student.eval()  # batch norm would let one half of the batch see the other
        losses[name] = float(train_step(s, changed, here, 255)["loss_distill"])
    other = "weak" if depends_on == "strong" else "strong"
    assert losses[depends_on] != losses["none"]
    assert losses[other] == pytest.approx(losses["none"], rel=1e-6)


def test_the_ema_is_the_student_after_the_first_step_and_lags_behind_later() -> None:
    here = recipe()
    s = state(here)
    train_step(s, batch(), here, 255)
    assert all(torch.equal(a, b) for a, b in zip(s.ema.parameters(), s.student.parameters(), strict=True))
    train_step(s, batch(1), here, 255)
    assert any(not torch.equal(a, b) for a, b in zip(s.ema.parameters(), s.student.parameters(), strict=True))


def test_a_batch_of_another_step_is_refused() -> None:
    here = recipe()
    with pytest.raises(ValueError, match="batch of step 3 at step 0"):
        train_step(state(here), batch(3), here, 255)
