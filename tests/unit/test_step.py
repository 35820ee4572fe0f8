"""One step: what is labelled, mixed and distilled, when, and what it may touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.losses import SupervisedLoss
from rsmtdf_train.objective import term_weights
from rsmtdf_train.prepare import Labeled, Part, Prepared, StepTools, Strong, Unlabeled, prepare
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.state import TrainState, build_state, set_learning_rates, update_ema
from rsmtdf_train.step import _unlabeled_term, channel_dropout, complementary_masks, train_step

KEY, CLASSES, IGNORE = "t/s64/x", 3, 255
SHAPE = TargetShape(KEY, 5, 8.0)


def recipe(distill: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    return Recipe.model_validate({
        "data": "nowhere", "steps": 10, "crop_px": 64, "threshold": 0.0, "batch": {"labeled": 2, "unlabeled": 4},
        "student": {"encoder": "timm:test_resnet", "channels": 8}, "distill": {"hidden": 8, **(distill or {})},
        "optim": {"schedule": "constant"}, **changes,
    })  # fmt: skip


def targets(count: int, generator: torch.Generator) -> Targets:
    return Targets({KEY: torch.randn(count, 8, 8, 5, generator=generator)}, {KEY: torch.ones(count, 8, 8)})


def part(step: int = 0, views: int = 1, seed: int = 0) -> Part:
    """Two labelled crops and four unlabelled ones, two of them mixed."""
    draw = torch.Generator().manual_seed(100 * seed + step)
    labels = torch.randint(0, CLASSES, (6, 64, 64), generator=draw)
    images = torch.rand(2 + 4 * (1 + views), 3, 64, 64, generator=draw)
    boxes = torch.tensor([[0, 0, 32, 32], [8, 8, 40, 64], [0, 0, 0, 0], [0, 0, 0, 0]])
    strong = tuple(Strong(images[6 + 4 * v : 10 + 4 * v], boxes.roll(v, 0)) for v in range(views))
    labeled = Labeled(images[:2], labels[:2], torch.ones(2, 64, 64, dtype=torch.bool), targets(2, draw))
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    return Part(step, labeled, Unlabeled(images[2:6], strong, valid, labels[2:], targets(4, draw)))


def unlabeled(of: Part) -> Unlabeled:
    assert of.unlabeled is not None
    return of.unlabeled


def altered(of: Part, **changes: Any) -> Part:
    return dataclasses.replace(of, unlabeled=dataclasses.replace(unlabeled(of), **changes))


def state(of: Recipe) -> TrainState:
    return build_state(of, CLASSES, [SHAPE], torch.device("cpu"))


def tools(of: Recipe) -> StepTools:
    return StepTools(SupervisedLoss(of.supervised, None, IGNORE), IGNORE)


def step_of(s: TrainState, of: Recipe, *parts: Part) -> dict[str, float]:
    return {k: float(v) for k, v in train_step(s, parts, of, tools(of)).items()}


def prepared_of(s: TrainState, of: Recipe, one: Part) -> Prepared:
    return prepare(s, one, of, term_weights(of, s.step), tools(of))


def weights(of: TrainState, prefix: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in of.student.named_parameters() if k.startswith(prefix)}


def gradients(of: TrainState) -> dict[str, Tensor]:
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in of.student.named_parameters()}


def norm(of: dict[str, Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in of.values()]).sum().sqrt())


def test_before_segmentation_only_encoder_and_translators_learn() -> None:
    here = recipe({"only_steps": 1})
    s = state(here)
    before = {p: weights(s, p) for p in ("student.decoder", "student.encoder", "fusion.translators")}
    logs = step_of(s, here, part())
    assert all(torch.equal(v, weights(s, "student.decoder")[k]) for k, v in before["student.decoder"].items())
    for name in ("student.encoder", "fusion.translators"):
        assert any(not torch.equal(v, weights(s, name)[k]) for k, v in before[name].items())
    assert logs["loss_labeled"] == 0 and logs["loss_distill"] > 0 and "mask_ratio" not in logs
    step_of(s, here, part(1))
    assert any(not torch.equal(v, weights(s, "student.decoder")[k]) for k, v in before["student.decoder"].items())


def test_distillation_alone_without_a_weight_is_no_empty_step() -> None:
    for distill in ({"weight": 0, "only_steps": 5}, {"decay_to": 0, "only_steps": 10}):
        here = recipe(distill, steps=2)
        s = state(here)
        s.step = 1
        logs = step_of(s, here, part(1))
        assert logs["loss"] == pytest.approx(logs["loss_labeled"] + logs["loss_unlabeled"]) and logs["loss"] > 0


@pytest.mark.parametrize("only_steps", [0, 1])
@pytest.mark.parametrize(("view", "depends_on"), [("weak", "weak"), ("strong", "strong")])
def test_the_distilled_view_is_the_one_the_recipe_names(view: str, depends_on: str, only_steps: int) -> None:
    here = recipe({"view": view, "only_steps": only_steps})
    base = part()
    fresh = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    strong = dataclasses.replace(unlabeled(base).views[0], image=fresh)
    given = {"none": base, "weak": altered(base, weak=fresh), "strong": altered(base, views=(strong,))}
    losses = {}
    for name, one in given.items():
        s = state(here)
        s.student.eval()  # batch norm would let one half of the batch see the other
        losses[name] = step_of(s, here, one)["loss_distill"]
    other = "weak" if depends_on == "strong" else "strong"
    assert losses[depends_on] != losses["none"]
    assert losses[other] == pytest.approx(losses["none"], rel=1e-6)


def test_the_ema_is_the_student_after_the_first_step_and_lags_behind_later() -> None:
    here = recipe()
    s = state(here)
    step_of(s, here, part())
    assert all(torch.equal(a, b) for a, b in zip(s.ema.parameters(), s.student.parameters(), strict=True))
    step_of(s, here, part(1))
    assert any(not torch.equal(a, b) for a, b in zip(s.ema.parameters(), s.student.parameters(), strict=True))


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (1, 0.5), (9, 0.1), (249, 0.004), (250, 0.004), (10**6, 0.004)])
def test_the_ema_moves_by_a_share_that_falls_to_the_cap(step: int, share: float) -> None:
    ema, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        for value, module in ((1.0, ema), (3.0, student)):
            for tensor in (module.weight, module.running_mean):
                assert isinstance(tensor, Tensor)
                tensor.fill_(value)
    assert student.num_batches_tracked is not None and ema.num_batches_tracked is not None
    student.num_batches_tracked.fill_(7)
    update_ema(ema, student, step, 0.996)
    assert ema.weight.tolist() == pytest.approx([1 + 2 * share] * 2)
    assert ema.running_mean is not None and ema.running_mean.tolist() == pytest.approx([1 + 2 * share] * 2)
    assert int(ema.num_batches_tracked) == 7, "a counter has no mean"


@pytest.mark.parametrize(("lag", "behind"), [(0, (0, 1, 2, 3)), (1, (0, 0, 1, 2))])
def test_rates_decay_from_the_first_step_or_one_step_later(lag: int, behind: tuple[int, ...]) -> None:
    here = recipe(optim={"lr": 0.2, "encoder_lr": 0.05, "schedule_lag": lag})
    s = state(here)
    for step, progress in enumerate(behind):
        shown = set_learning_rates(s.optimizer, here.optim, step, here.total_steps)
        factor = (1 - progress / 10) ** 0.9
        assert shown == pytest.approx(0.2 * factor)
        assert [group["lr"] for group in s.optimizer.param_groups] == pytest.approx([0.05 * factor, 0.2 * factor])
    assert step_of(s, here, part())["lr"] == pytest.approx(0.2), "a step sets its own rates"


def test_a_batch_of_another_step_is_refused() -> None:
    here = recipe()
    with pytest.raises(ValueError, match="batch of step 3 at step 0"):
        step_of(state(here), here, part(3))


def test_cutmix_takes_all_that_belongs_to_a_pixel_from_the_crop_opposite_in_the_batch() -> None:
    """With four crops the batch reversed is not the batch rolled; each crop has an ignore mask of its own."""
    here = recipe()
    s = state(here)
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    for i in range(4):
        valid[i, :, 16 * i : 16 * i + 16] = False
    one = altered(part(), valid=valid)
    weak, view = unlabeled(one).weak, unlabeled(one).views[0]
    confidence, pseudo = s.ema(weak).softmax(1).max(1)
    got = prepared_of(s, here, one)
    [mixed] = got.mixed
    for i, (y0, x0, y1, x1) in enumerate(view.boxes.tolist()):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        for found, source in (
            (mixed.image, view.image), (mixed.pseudo, pseudo), (mixed.confidence, confidence), (mixed.valid, valid)
        ):  # fmt: skip
            assert torch.equal(found[i], torch.where(inside, source[3 - i], source[i]))
    assert int(got.counts["unlabeled0"]) == int(mixed.valid.sum()) != int(valid.sum())
    used, there = got.sums["mask_ratio"]
    assert int(there) == int(used) == int(valid.sum()), "what the log shows is counted before mixing"


def test_ignored_and_unsure_pixels_have_no_part_in_the_pseudo_labels_loss() -> None:
    here = recipe({"weight": 0})
    valid = torch.zeros(4, 64, 64, dtype=torch.bool)
    assert step_of(state(here), here, altered(part(), valid=valid))["loss_unlabeled"] == 0
    sure = recipe({"weight": 0}, threshold=1.0)
    logs = step_of(state(sure), sure, part())
    assert logs["loss_unlabeled"] == 0 == logs["mask_ratio"] and logs["pseudo_accuracy"] != logs["pseudo_accuracy"]


def test_privileged_labels_follow_the_stored_features_and_plain_ones_do_not() -> None:
    other = targets(4, torch.Generator().manual_seed(5))
    changed = {}
    for privileged in (True, False):
        here = recipe(privileged=privileged, fuse={"share": 0.9})
        s = state(here)
        a, b = (prepared_of(s, here, one).mixed[0].confidence for one in (part(), altered(part(), targets=other)))
        changed[privileged] = not torch.equal(a, b)
    assert changed == {True: True, False: False}


def test_the_loss_on_true_features_trains_decoder_and_projections_and_no_translator_that_it_bypasses() -> None:
    def difference(weight: float) -> dict[str, Tensor]:
        """Gradients with the term minus those without it."""
        found = []
        for aux_weight in (0.0, 1.0):
            here = recipe(privileged={"aux_weight": aux_weight})
            s = state(here)
            one = part()
            one.labeled.targets.weights[KEY].fill_(weight)
            logs = step_of(s, here, one)
            assert ("loss_privileged" in logs) == (aux_weight > 0)
            found.append(gradients(s))
        return {k: (found[1][k] - v).abs().max() for k, v in found[0].items()}

    moved = difference(1.0)
    assert all(moved[k] > 1e-6 for k in moved if k.startswith(("student.decoder", "fusion.projections")))
    assert all(moved[k] < 1e-6 for k in moved if k.startswith("fusion.translators"))
    unknown = difference(0.0)
    assert any(unknown[k] > 1e-6 for k in unknown if k.startswith("fusion.translators")), "nothing true to put there"


def test_complementary_masks_keep_in_one_view_what_the_other_drops() -> None:
    torch.manual_seed(3)
    fine, coarse = complementary_masks([200, 7], 6, torch.device("cpu"))
    assert fine.shape == (12, 200, 1, 1) and coarse.shape == (12, 7, 1, 1)
    for masks in (fine, coarse):
        first, second = masks.chunk(2)
        assert (first + second == 2).all(), "their mean is 1 in every channel, so the features' mean stays"
        whole = (first == 1).flatten(1).all(1)
        assert whole.sum() == 3 and not (first[~whole] == 1).any(), "half of the crops keep all"
    kept = (fine[:6] == 2).float().mean((1, 2, 3))
    assert ((kept == 0) | ((kept > 0.3) & (kept < 0.7))).all()
    assert torch.equal((fine[:6] == 1).flatten(1).all(1), (coarse[:6] == 1).flatten(1).all(1)), "the same crops"


def test_unimatch_learns_from_both_strong_views_and_distils_the_first() -> None:
    here = recipe(method="unimatch")
    base = part(views=2)
    first, second = unlabeled(base).views
    fresh = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))

    def losses(one: Part) -> tuple[float, float]:
        s = state(here)
        s.student.eval()
        logs = step_of(s, here, one)
        return logs["loss_unlabeled"], logs["loss_distill"]

    plain = losses(base)
    for views, distils in (
        ((dataclasses.replace(first, image=fresh), second), True),
        ((first, dataclasses.replace(second, image=fresh)), False),
        ((first, dataclasses.replace(second, boxes=first.boxes)), False),
    ):
        found = losses(altered(base, views=views))
        assert found[0] != plain[0]
        assert (found[1] == pytest.approx(plain[1], rel=1e-6)) is not distils


def test_unimatch_v1_adds_the_weak_view_with_dropped_channels_as_half_of_the_term() -> None:
    v1, v2 = recipe(method="unimatch-v1"), recipe(method="unimatch")
    base = part(views=2)
    s = state(v1)
    prepared = prepared_of(s, v1, base)
    assert prepared.perturbed is not None and list(prepared.views) == ["unlabeled0", "unlabeled1", "perturbed"]
    assert torch.equal(prepared.perturbed.image, unlabeled(base).weak), "the weak view as it is, not mixed"
    assert prepared_of(state(v2), v2, base).perturbed is None

    def loss(one: Part, **changes: Any) -> float:
        here = recipe(method="unimatch-v1", **changes)
        s = state(here)
        s.student.eval()
        return step_of(s, here, one)["loss_unlabeled"]

    # With nothing to learn on the strong views, what is left is half of the perturbed view's loss, and it is no 0.
    s.student.eval()
    encoded = s.student.encode(prepared.perturbed.image)
    plain = s.student.decode(encoded, s.student.translate(encoded), (64, 64))
    whole = torch.nn.functional.cross_entropy(plain, prepared.perturbed.pseudo)
    silent = dataclasses.replace(prepared, mixed=tuple(
        dataclasses.replace(m, valid=torch.zeros_like(m.valid)) for m in prepared.mixed
    ))  # fmt: skip
    divisors = {name: view.valid.sum().float().clamp(min=1) for name, view in silent.views.items()}
    logits = torch.cat([plain] * 3)
    found = _unlabeled_term(logits, silent, 0.0, divisors)
    assert found.item() == pytest.approx(whole.item() / 2, rel=1e-5) and whole > 0.1
    assert loss(altered(base, weak=unlabeled(base).weak.flip(0))) != loss(base)


def test_dropped_channels_are_half_and_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    fine, coarse = channel_dropout([400, 10], 6, torch.device("cpu"))
    assert fine.shape == (6, 400, 1, 1) and coarse.shape == (6, 10, 1, 1)
    assert set(fine.flatten().tolist()) == {0.0, 2.0}
    assert ((fine.mean((1, 2, 3)) > 0.8) & (fine.mean((1, 2, 3)) < 1.2)).all()
    assert not torch.equal(fine[0], fine[1]), "each crop drops its own channels"


def test_the_student_meets_dropped_channels_on_the_perturbed_view_alone() -> None:
    here = recipe(method="unimatch-v1")
    s = state(here)
    seen: list[list[Tensor]] = []
    original = s.student.decode

    def decode(encoded: Any, translated: Any, size: Any, masks: Any = None) -> Tensor:
        seen.append(masks)
        return original(encoded, translated, size, masks)

    s.student.decode = decode  # type: ignore[method-assign]
    step_of(s, here, part(views=2))
    (masks,) = [m for m in seen if m is not None]
    for mask in masks:
        assert len(mask) == 2 + 4 * 3
        assert bool((mask[:10] == 1).all()) and set(mask[10:].flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_gives_nearly_the_losses_and_finite_gradients(precision: str) -> None:
    unclipped = {"clip_norm": 1e9}  # for the norm in the log
    full, low = recipe(optim=unclipped), recipe(optim=unclipped, precision=precision)
    s, t = state(full), state(low)
    expected, found = step_of(s, full, part()), step_of(t, low, part())
    for name in ("loss", "loss_labeled", "loss_unlabeled", "loss_distill"):
        assert found[name] == pytest.approx(expected[name], rel=0.05)
        assert found[name] != expected[name]
    assert t.scaler.is_enabled() == (precision == "float16")
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2), "unscaled before it is clipped"
    mine, theirs = gradients(t), gradients(s)
    assert norm({k: g - theirs[k] for k, g in mine.items()}) < 0.2 * norm(theirs)
    fresh = state(low).student.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(t.student.parameters(), fresh, strict=True))


def test_clipping_bounds_the_gradient_and_logs_its_norm_before() -> None:
    free, clipped = recipe(), recipe(optim={"clip_norm": 0.01})
    s, t = state(free), state(clipped)
    step_of(s, free, part())
    logs = step_of(t, clipped, part())
    assert logs["grad_norm"] == pytest.approx(norm(gradients(s)), rel=1e-4) and logs["grad_norm"] > 0.1
    assert norm(gradients(t)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "say", [lambda one: one.labeled.label.fill_(IGNORE), lambda one: one.labeled.targets.weights[KEY].zero_()]
)
def test_a_part_in_which_nothing_counts_is_a_loss_of_zero_and_not_nan(say: Callable[[Part], object]) -> None:
    here = recipe(method="supervised", batch={"labeled": 2})
    one = part()
    say(one)
    logs = step_of(s := state(here), here, one)
    assert 0 in (logs["loss_labeled"], logs["loss_distill"]) and logs["loss"] > 0
    assert all(g.isfinite().all() for g in gradients(s).values())
