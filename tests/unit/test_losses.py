"""Losses and objective against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rsmtdf_train.losses import distillation, pseudo_label_loss, supervised_loss
from rsmtdf_train.objective import combine, distill_term, key_weight, term_weights
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import DistillConfig

IGNORE = 255


def logits_of(*odds: tuple[float, float]) -> torch.Tensor:
    """Two-class logits ``[1, 2, 1, n]`` whose softmax at pixel i is odds[i] normalised."""
    return torch.tensor(odds).log().T[None, :, None, :]


def test_supervised_loss_is_the_mean_over_labelled_pixels() -> None:
    logits = logits_of((1.0, 1.0), (3.0, 1.0), (1.0, 9.0))
    label = torch.tensor([[[0, 0, IGNORE]]])
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert supervised_loss(logits, label, IGNORE).item() == pytest.approx(expected, rel=1e-6)


def test_supervised_loss_of_nothing_is_zero_with_a_finite_gradient() -> None:
    logits = logits_of((1.0, 1.0)).requires_grad_()
    loss = supervised_loss(logits, torch.tensor([[[IGNORE]]]), IGNORE)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_pseudo_label_loss_divides_by_valid_pixels_not_by_confident_ones() -> None:
    logits = logits_of((1.0, 1.0), (3.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    pseudo = torch.tensor([[[0, 1, 0, 0]]])
    confidence = torch.tensor([[[0.95, 0.99, 0.949, 0.99]]])
    valid = torch.tensor([[[True, True, True, False]]])
    expected = (math.log(2) + math.log(4)) / 3  # third: not confident; fourth: not valid
    assert pseudo_label_loss(logits, pseudo, confidence, valid, 0.95).item() == pytest.approx(expected, rel=1e-6)


def test_pseudo_label_loss_without_valid_pixels_is_zero() -> None:
    no = torch.zeros(1, 1, 1, dtype=torch.bool)
    assert pseudo_label_loss(logits_of((1.0, 1.0)), no.long(), no.float(), no, 0.0).item() == 0


def test_distillation_mse_is_the_mean_over_channels_and_counting_tokens() -> None:
    mine = torch.tensor([[1.0, 5.0], [2.0, 7.0]]).reshape(1, 2, 1, 2)  # tokens (1, 2) and (5, 7)
    target = torch.tensor([[[[0.0, 0.0], [100.0, 100.0]]]])
    loss, _ = distillation(mine, target, torch.tensor([[[1.0, 0.0]]]), "mse")
    assert loss.item() == pytest.approx((1 + 4) / 2)


def test_distillation_cosine_smooth_l1_by_hand() -> None:
    mine = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    target = torch.tensor([4.0, 3.5]).reshape(1, 1, 1, 2)
    cosine = (12 + 14) / (5 * math.hypot(4, 3.5))
    smooth = ((1 - 0.5) + 0.5 * 0.5**2) / 2
    loss, shown = distillation(mine, target, torch.ones(1, 1, 1), "cosine_smooth_l1")
    assert shown.item() == pytest.approx(cosine, rel=1e-6)
    assert loss.item() == pytest.approx(0.9 * (1 - cosine) + 0.1 * smooth, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine_smooth_l1"])
def test_a_token_of_weight_zero_has_no_loss_and_no_gradient_even_when_its_target_is_nan(kind: str) -> None:
    torch.manual_seed(0)
    mine = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.randn(1, 2, 2, 3)
    target[0, 0, 1] = math.nan
    weight = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    loss, cosine = distillation(mine, target, weight, kind)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and cosine.isfinite() and mine.grad is not None
    assert mine.grad.isfinite().all()
    assert not mine.grad[0, :, 0, 1].any()
    assert mine.grad[0, :, 1, 1].any()


def test_distillation_refuses_features_of_another_grid() -> None:
    with pytest.raises(ValueError, match="grid"):
        distillation(torch.zeros(1, 1, 2, 2), torch.zeros(1, 4, 4, 1), torch.ones(1, 4, 4), "mse")


def test_no_counting_token_gives_zero_and_not_nan() -> None:
    loss, cosine = distillation(torch.randn(1, 2, 1, 1), torch.randn(1, 1, 1, 2), torch.zeros(1, 1, 1))
    assert loss.item() == 0 and cosine.item() == 0


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown distillation loss 'l7'"):
        distillation(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1), "l7")


def test_distill_term_is_the_weighted_mean_over_targets() -> None:
    config = DistillConfig(loss="mse", weights={"clip*": 3.0})
    translated = {"dino/s64/a": torch.full((1, 1, 1, 1), 2.0), "clip/s64/b": torch.full((1, 1, 1, 1), 1.0)}
    targets = Targets({k: torch.zeros(1, 1, 1, 1) for k in translated}, {k: torch.ones(1, 1, 1) for k in translated})
    loss, cosines = distill_term(config, translated, targets)
    assert loss.item() == pytest.approx((1 * 4 + 3 * 1) / 4)
    assert set(cosines) == {"cosine/dino/s64/a", "cosine/clip/s64/b"}
    assert key_weight(config, "clip/s64/b") == 3 and key_weight(config, "dino/s64/a") == 1


def test_weights_of_the_terms_follow_the_recipe() -> None:
    recipe = Recipe.model_validate(
        {"data": "d", "steps": 11, "unlabeled_weight": 0.5,
         "distill": {"weight": 2.0, "decay_to": 0.5, "only_steps": 2}}
    )  # fmt: skip
    first, second, last = (term_weights(recipe, s) for s in (0, 2, 10))
    assert (first.labeled, first.unlabeled, first.distill) == (0, 0, 2)
    assert (second.labeled, second.unlabeled) == (1, 0.5)
    assert last.distill == pytest.approx(1.0)
    supervised = term_weights(recipe.without_distillation().model_copy(update={"method": "supervised"}), 0)
    assert (supervised.labeled, supervised.unlabeled, supervised.distill) == (1, 0, 0)


def test_combine_adds_weighted_terms_and_keeps_a_zero_weight_out_of_the_gradient() -> None:
    recipe = Recipe.model_validate({"data": "d", "distill": {"only_steps": 1, "weight": 2.0}})
    labeled = torch.tensor(math.nan, requires_grad=True)
    distill = torch.tensor(1.5, requires_grad=True)
    total = combine(term_weights(recipe, 0), labeled, None, distill)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 3 and labeled.grad is None and distill.grad == 2
