"""Translators and fusion: gradients, shares, grids, paired starts, what is deployed."""

from __future__ import annotations

import pytest
import torch

from rsmtdf_train.fusion import FusedStudent, TargetShape, build_fused_student, nearest_map
from rsmtdf_train.losses import distillation
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.students.base import MapSpec

TARGETS = (TargetShape("a/s64/x", 5, 8.0), TargetShape("b/s64/y.z", 7, 32.0))


def recipe(**changes: object) -> Recipe:
    data = {"data": "d", "crop_px": 64, "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8}}
    return Recipe.model_validate(data | {"distill": {"hidden": 6}} | changes)


def built(**changes: object) -> FusedStudent:
    chosen = recipe(**changes)
    return build_fused_student(chosen, 3, TARGETS if chosen.distill is not None else ())


def test_each_target_is_fed_by_the_map_of_the_nearest_stride() -> None:
    maps = [MapSpec(1, 4), MapSpec(1, 8), MapSpec(1, 16), MapSpec(1, 32)]
    assert [nearest_map(maps, s) for s in (2, 8, 13.84, 16, 32.4, 64)] == [0, 1, 2, 2, 3, 3]
    assert nearest_map([MapSpec(1, 14)] * 4, 8) == 3, "of equal strides the deepest"
    model = built()
    assert model.fusion is not None and model.fusion.sources == (1, 3)


def test_segmentation_loss_reaches_encoder_translators_projections_and_decoder() -> None:
    model = built(fuse={"share": 0.2})
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_distillation_loss_reaches_encoder_and_translators_alone() -> None:
    model = built(fuse={"share": 0.2})
    _, translated = model.forward_train(torch.rand(2, 3, 64, 64))
    total = torch.zeros(())
    for target in TARGETS:
        grid = (2, round(64 / target.stride_px), round(64 / target.stride_px))
        total = total + distillation(translated[target.key], torch.randn(*grid, target.channels), torch.ones(grid))[0]
    total.backward()  # type: ignore[no-untyped-call]
    reached = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "translators"}


def test_fusion_computes_the_papers_formula_on_the_last_map_only() -> None:
    model = built(fuse={"share": 0.2}).eval()
    fusion = model.fusion
    assert fusion is not None
    maps = model.student.encode(torch.rand(1, 3, 64, 64))
    translated = fusion.translate(maps)
    fused = fusion.fuse(maps, translated)
    first = torch.nn.functional.adaptive_avg_pool2d(fusion.projections[0](translated["a/s64/x"]), 2)
    second = fusion.projections[1](translated["b/s64/y.z"])
    assert torch.allclose(fused[-1], 0.8 * maps[-1] + 0.1 * first + 0.1 * second, atol=1e-6)
    assert all(a is b for a, b in zip(fused[:-1], maps[:-1], strict=True))


def test_the_training_pass_gives_the_deployed_logits() -> None:
    model = built(fuse={"share": 0.5}).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.forward_train(image)[0], model(image))


def test_without_fusion_translators_change_no_logit_and_are_not_deployed() -> None:
    distilled, plain = built(fuse=False).eval(), built(fuse=False, distill=False, targets="none").eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(distilled(image), plain(image))
    assert distilled.deployed_targets == ()
    assert distilled.deployed_state().keys() == plain.state_dict().keys()
    fused = built(fuse=True)
    assert fused.deployed_targets == TARGETS and fused.deployed_state().keys() == fused.state_dict().keys()


def test_paired_arms_start_from_the_same_student_and_seeds_from_different_ones() -> None:
    arms = [built(), built(distill=False, fuse=False, targets="none"), built(seed=1)]
    states = [arm.student.state_dict() for arm in arms]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    built()
    assert torch.equal(torch.rand(1), expected)


def test_adding_a_teacher_leaves_the_other_translators_start_as_it_was() -> None:
    one = build_fused_student(recipe(), 3, TARGETS[1:])
    two = build_fused_student(recipe(), 3, TARGETS)
    assert one.fusion is not None and two.fusion is not None
    a, b = one.fusion.translators[0].state_dict(), two.fusion.translators[1].state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (64, 64), (70, 31)])
def test_predict_takes_any_size(size: tuple[int, int]) -> None:
    model = built().eval()
    assert model.predict(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_predict_equals_a_plain_pass_where_nothing_is_padded() -> None:
    model = built().eval()
    image = torch.rand(1, 3, 64, 32)
    assert torch.equal(model.predict(image), model(image))
