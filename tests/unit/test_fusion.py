"""Translators and fusion: gradients, shares, grids, paired starts, what is deployed."""

from __future__ import annotations

import pytest
import torch

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.fused_student import FusedStudent, build_fused_student
from rsmtdf_train.fusion import Encoded, Source, TargetShape, TeacherFusion, nearest_map
from rsmtdf_train.losses import distillation
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import DistillConfig, FuseConfig
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
    assert model.fusion is not None and model.fusion.sources == (Source(1), Source(3))


def test_segmentation_loss_reaches_encoder_translators_projections_and_decoder() -> None:
    model = built(fuse={"share": 0.2})
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_distillation_loss_reaches_encoder_and_translators_alone() -> None:
    model = built(fuse={"share": 0.2})
    translated = model.align(model.translate(model.encode(torch.rand(2, 3, 64, 64))), 64)
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
    encoded = model.encode(torch.rand(1, 3, 64, 64))
    maps, translated = encoded.maps, model.translate(encoded)
    fused = fusion.fuse(maps, translated)
    first = torch.nn.functional.adaptive_avg_pool2d(fusion.projections[0](translated["a/s64/x"]), 2)
    second = fusion.projections[1](translated["b/s64/y.z"])
    assert torch.allclose(fused[-1], 0.8 * maps[-1] + 0.1 * first + 0.1 * second, atol=1e-6)
    assert all(a is b for a, b in zip(fused[:-1], maps[:-1], strict=True))


def test_the_training_pass_gives_the_deployed_logits() -> None:
    model = built(fuse={"share": 0.5}).eval()
    image = torch.rand(1, 3, 64, 64)
    encoded = model.encode(image)
    assert torch.equal(model.decode(encoded, model.hidden(encoded), (64, 64)), model(image))


@pytest.mark.parametrize("translator", ["linear", "mlp", "conv"])
@pytest.mark.parametrize(
    "fuse", [{"share": 0.5}, {"share": 0.3, "gate": "learned", "at": [0, -1]}, {"share": 1.0, "at": [1]}]
)
def test_fusion_without_translations_is_fusion_of_translations(translator: str, fuse: dict[str, object]) -> None:
    changes = {"distill": {"hidden": 6, "translator": translator, "passes": {"b/*/*": 32}}, "fuse": fuse}
    model = built(**changes)
    image = torch.rand(2, 3, 64, 64)
    encoded = model.encode(image)
    direct = model.decode(encoded, model.hidden(encoded), (64, 64))
    by_way_of_channels = model.decode(encoded, model.translate(encoded), (64, 64))
    torch.testing.assert_close(direct, by_way_of_channels, rtol=1e-4, atol=1e-5)
    weights = [p for n, p in model.named_parameters() if n.startswith("fusion.")]
    first, second = (
        torch.autograd.grad(x.square().mean(), weights, retain_graph=True) for x in (direct, by_way_of_channels)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.abs().max() > 0


@pytest.mark.parametrize("translator", ["linear", "mlp", "conv"])
def test_folding_for_good_changes_no_logit_and_leaves_no_channel_of_a_teacher(translator: str) -> None:
    model = built(distill={"hidden": 6, "translator": translator}, fuse={"share": 0.5, "at": [0, -1]}).eval()
    image = torch.rand(1, 3, 64, 64)
    before = model(image)
    assert model.fusion is not None
    model.fusion.fold()
    torch.testing.assert_close(model(image), before, rtol=1e-5, atol=1e-6)
    sides = {side for n, p in model.named_parameters() if n.startswith("fusion.") for side in p.shape[:2]}
    assert not sides & {t.channels for t in TARGETS}


def test_folded_weights_are_not_made_in_half_precision() -> None:
    model = built(fuse={"share": 1.0}).eval()
    fusion = model.fusion
    assert fusion is not None
    with torch.no_grad():  # differences of weights that bfloat16 rounds to the same number
        for name, weight in fusion.named_parameters():
            if name.endswith("second.weight"):
                weight.copy_(1 + torch.rand_like(weight) / 500)
            elif name.startswith("projections") and weight.ndim == 4:
                weight.zero_()
                weight[:, 0], weight[:, 1] = 1, -1
    encoded = model.encode(torch.rand(1, 3, 64, 64))
    hidden = model.hidden(encoded)
    exact = fusion.fuse_directly(encoded.maps, hidden)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        low = fusion.fuse_directly(encoded.maps, hidden)[-1].float()
    assert torch.nn.functional.cosine_similarity(low.flatten(), exact.flatten(), 0) > 0.999
    assert exact.abs().max() > 0


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


def test_predict_resizes_to_the_nearest_multiples_and_back_where_the_recipe_says_so() -> None:
    student = {"encoder": "timm:test_vit", "channels": 8, "odd_sizes": "resize"}
    model = built(student=student).eval()
    image = torch.rand(1, 3, 40, 70)  # 16 goes 2.5 and 4.375 times
    resize = torch.nn.functional.interpolate
    near = resize(image, (48, 64), mode="bilinear", align_corners=True)
    expected = resize(model(near), (40, 70), mode="bilinear", align_corners=True)
    assert torch.equal(model.predict(image), expected)
    padded = built(student=student | {"odd_sizes": "pad"}).eval()
    assert not torch.allclose(padded.predict(image), expected)
    even = torch.rand(1, 3, 32, 64)
    assert torch.equal(model.predict(even), model(even))


def encoded_of(*maps: torch.Tensor, side_px: int) -> Encoded:
    return Encoded(side_px, list(maps), {})


def fusion_of(
    maps: list[MapSpec], targets: tuple[TargetShape, ...], fuse: FuseConfig | None = None, **distill: object
) -> TeacherFusion:
    config = DistillConfig.model_validate({"hidden": 4, **distill})
    return TeacherFusion(maps, targets, config, fuse or FuseConfig(), seed=0)


def test_learned_gates_begin_as_the_fixed_share_and_are_trained() -> None:
    fixed, learned = built(fuse={"share": 0.3}).eval(), built(fuse={"share": 0.3, "gate": "learned"}).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.allclose(learned(image), fixed(image), atol=1e-5)
    assert fixed.fusion is not None and learned.fusion is not None and fixed.fusion.gates() == {}
    assert [float(g) for g in learned.fusion.gates().values()] == pytest.approx([0.15, 0.15])
    learned(image).square().mean().backward()
    assert learned.fusion.gate_logits is not None and learned.fusion.gate_logits.grad is not None
    assert learned.fusion.gate_logits.grad.all()


def test_translations_join_every_decoder_input_that_the_recipe_names() -> None:
    model = built(fuse={"share": 0.2, "at": [0, -2]}).eval()
    encoded = model.encode(torch.rand(1, 3, 64, 64))
    assert model.fusion is not None and model.fusion.at == (0, 2)
    fused = model.fusion.fuse(encoded.maps, model.translate(encoded))
    assert [torch.equal(a, b) for a, b in zip(fused, encoded.maps, strict=True)] == [False, True, False, True]
    with pytest.raises(UsageError, match=r"fuse\.at 4.*0 to 3"):
        built(fuse={"at": 4})


def test_nothing_is_fused_where_the_decoder_does_not_look() -> None:
    student = {"encoder": "timm:test_efficientnet", "decoder": "smp:pspnet", "channels": 8}
    assert built(student=student).fusion is not None
    with pytest.raises(UsageError, match=r"smp:pspnet does not read map 0.*it reads 3"):
        built(student=student, fuse={"at": [0, -1]})


def test_a_dropped_teacher_leaves_its_part_to_the_student_crop_by_crop_and_in_training_only() -> None:
    targets = (TargetShape("a/s32/x", 3, 8.0), TargetShape("b/s32/y", 2, 8.0))
    fusion = fusion_of([MapSpec(4, 8)], targets, FuseConfig(share=0.4, drop=0.5))
    own = torch.randn(64, 4, 4, 4)
    translated = {"a/s32/x": torch.randn(64, 3, 4, 4), "b/s32/y": torch.randn(64, 2, 4, 4)}
    a, b = (p(v) for p, v in zip(fusion.projections, translated.values(), strict=True))
    choices = torch.stack([own, 0.8 * own + 0.2 * a, 0.8 * own + 0.2 * b, 0.6 * own + 0.2 * (a + b)])
    torch.manual_seed(0)
    [fused] = fusion.train().fuse([own], translated)
    distance = (choices - fused).abs().amax((2, 3, 4))
    assert distance.min(0).values.max() < 1e-5
    counts = torch.bincount(distance.argmin(0), minlength=4)
    assert (counts > 4).all(), "each of the four has a chance of a quarter"
    [calm] = fusion.eval().fuse([own], translated)
    assert torch.allclose(calm, choices[3], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_features_replace_translations_exactly_where_all_tokens_that_are_read_count(dtype: torch.dtype) -> None:
    """Student tokens 16 px apart, a teacher's 12: no student token is read from a single one of the teacher's."""
    target = TargetShape("a/s96/x", 3, 12.0)
    fusion = fusion_of([MapSpec(4, 16)], (target,))
    mine = torch.zeros(1, 3, 6, 6, dtype=dtype)
    features, weights = torch.ones(1, 8, 8, 3), torch.ones(1, 8, 8)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        known = fusion.true_translations(Targets({target.key: features}, {target.key: weights}), {target.key: mine}, 96)
        weights[0, 0, 0] = 0
        features[0, 0, 0] = 1e4
        holed = fusion.true_translations(Targets({target.key: features}, {target.key: weights}), {target.key: mine}, 96)
    assert known[target.key].dtype == dtype and (known[target.key] == 1).all()
    expected = torch.ones(6, 6)
    expected[0, 0] = 0  # the only one near the teacher's first token
    assert torch.equal(holed[target.key][0, 0].float(), expected)


def test_a_second_pass_feeds_the_targets_that_name_it_and_lies_over_the_whole_crop() -> None:
    model = built(distill={"hidden": 6, "passes": {"b/*": 32}}).eval()
    image = torch.rand(2, 3, 64, 64)
    assert model.fusion is not None and model.fusion.sources == (Source(1), Source(3, 32))
    small = torch.nn.functional.interpolate(image, (32, 32), mode="bilinear", align_corners=True)
    encoded = model.encode(image)
    translated = model.translate(encoded)
    assert torch.equal(translated["b/s64/y.z"], model.fusion.translators[1](model.student.encode(small)[-1]))
    assert encoded.first(1).passes[32][0].shape[0] == 1
    assert model.align(translated, 64)["b/s64/y.z"].shape == (2, 7, 2, 2), "one token of the pass, two of the teacher"
    assert model.encode(image, passes=False).passes == {}
