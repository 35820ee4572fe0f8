"""Losses and objective against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.sources import open_source
from rsmtdf_train.label_counts import count_labels
from rsmtdf_train.losses import (
    SupervisedLoss,
    balanced_weights,
    class_weights,
    distillation,
    pseudo_label_loss,
    supervised_loss,
)
from rsmtdf_train.objective import combine, distill_term, key_weight, term_weights
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import DistillConfig, SupervisedConfig
from tests.datasets import write_dataset

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
    total = combine(term_weights(recipe, 0), {"labeled": labeled, "distill": distill})
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 3 and labeled.grad is None and distill.grad == 2


CLASSES = 4


def labelled_batch(seed: int = 0, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[3, C, 6, 5]`` and labels with ignored pixels; the last class does not occur."""
    made = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes - 1, (3, 6, 5), generator=made)
    label[torch.rand(3, 6, 5, generator=made) < 0.3] = IGNORE
    return torch.randn(3, classes, 6, 5, generator=made) * 2, label


def supervised(weights: torch.Tensor | None = None, **options: object) -> SupervisedLoss:
    return SupervisedLoss(SupervisedConfig.model_validate(options), weights, IGNORE)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.002, 0.03, 0.0001, 0.01])], ids=["plain", "weighted"])
def test_cross_entropy_is_torchs_mean_with_its_default_reduction(weights: torch.Tensor | None) -> None:
    logits, label = labelled_batch()
    expected = F.cross_entropy(logits, label, weights, ignore_index=IGNORE)
    assert supervised(weights)(logits, label).item() == pytest.approx(expected.item(), rel=1e-6)
    assert supervised(weights).count(label).dtype == torch.float32


@pytest.mark.parametrize("weights", [None, torch.tensor([0.002, 0.03, 0.0001, 0.01])], ids=["plain", "weighted"])
def test_parts_with_the_batchs_denominator_add_up_to_the_batch(weights: torch.Tensor | None) -> None:
    logits, label = labelled_batch()
    loss = supervised(weights)
    total = loss.count(label[:1]) + loss.count(label[1:])
    assert total.item() == pytest.approx(loss.count(label).item(), rel=1e-6)
    parts = loss(logits[:1], label[:1], total) + loss(logits[1:], label[1:], total)
    assert parts.item() == pytest.approx(loss(logits, label).item(), rel=1e-6)


def dice_in_numpy(logits: torch.Tensor, label: torch.Tensor, weights: list[float]) -> float:
    x, y = logits.double().numpy(), label.numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    terms = []
    for c in range(x.shape[1]):
        mine, found = (y == c)[y != IGNORE], p[:, c][y != IGNORE]
        if mine.any():
            terms.append((weights[c], 1 - 2 * found[mine].sum() / (found.sum() + mine.sum())))
    return float(sum(w * d for w, d in terms) / sum(w for w, _ in terms))


def test_dice_is_the_formula_over_the_classes_that_occur() -> None:
    logits, label = labelled_batch()
    assert supervised(loss="dice")(logits, label).item() == pytest.approx(dice_in_numpy(logits, label, [1.0] * 4))
    weights = [0.5, 2.0, 1.0, 7.0]
    found = supervised(torch.tensor(weights), loss="dice")(logits, label)
    assert found.item() == pytest.approx(dice_in_numpy(logits, label, weights))
    right = F.one_hot(label.clamp(max=3), CLASSES).permute(0, 3, 1, 2) * 100.0
    assert supervised(loss="dice")(right, label).item() == pytest.approx(0, abs=1e-6)


def ohem_in_numpy(logits: torch.Tensor, label: torch.Tensor, threshold: float, least: float) -> float:
    x, y = logits.double().numpy(), label.numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    mine = sorted(p[b, y[b, i, j], i, j] for b, i, j in zip(*np.nonzero(y != IGNORE), strict=True))
    keep = max(math.ceil(least * len(mine)), sum(v < threshold for v in mine))
    return float(-np.log(mine[:keep]).mean())


@pytest.mark.parametrize(("threshold", "least"), [(0.7, 1 / 16), (0.01, 0.25), (0.01, 1.0), (1.0, 0.1)])
def test_ohem_keeps_the_unsure_pixels_and_at_least_a_share(threshold: float, least: float) -> None:
    logits, label = labelled_batch()
    found = supervised(loss="ohem", ohem_threshold=threshold, ohem_least=least)(logits, label)
    assert found.item() == pytest.approx(ohem_in_numpy(logits, label, threshold, least), rel=1e-5)


def test_ohem_weighs_the_kept_pixels() -> None:
    logits = logits_of((1.0, 1.0), (1.0, 3.0), (99.0, 1.0))
    label = torch.tensor([[[0, 0, 0]]])
    label[0, 0, 1] = 1  # probability 3/4: not kept
    label[0, 0, 2] = 1  # probability 1/100
    loss = supervised(torch.tensor([1.0, 3.0]), loss="ohem", ohem_threshold=0.7)
    assert loss(logits, label).item() == pytest.approx((math.log(2) + 3 * math.log(100)) / 4, rel=1e-5)


def test_shares_scale_what_cannot_be_counted_beforehand_and_nothing_else() -> None:
    logits, label = labelled_batch()
    for kind in ("ohem", "dice"):
        whole = supervised(loss=kind)(logits, label)
        assert supervised(loss=kind)(logits, label, torch.tensor(1e9), share=0.25).item() == pytest.approx(whole / 4)
    entropy, dice = supervised()(logits, label), supervised(loss="dice")(logits, label)
    assert supervised()(logits, label, share=0.25).item() == entropy.item()
    both = supervised(loss="ce+dice")(logits, label, supervised().count(label) * 2, share=0.25)
    assert both.item() == pytest.approx(entropy.item() / 2 + dice.item() / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["ce", "ohem", "dice", "ce+dice"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_pixels_have_no_gradient_and_nothing_labelled_is_zero(kind: str, weighted: bool) -> None:
    loss = supervised(torch.ones(CLASSES) if weighted else None, loss=kind)
    logits, label = labelled_batch()
    logits.requires_grad_()
    loss(logits, label).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    touched = logits.grad.abs().sum(1) > 0
    assert touched.any() and not touched[label == IGNORE].any()
    logits.grad = None
    nothing = loss(logits, torch.full_like(label, IGNORE))
    nothing.backward()  # type: ignore[no-untyped-call]
    assert nothing.item() == 0 and not logits.grad.any()  # type: ignore[attr-defined]


def test_balanced_weights_go_with_the_inverse_root_of_the_share() -> None:
    weights = balanced_weights(torch.tensor([100, 400, 0, 25]))
    assert weights.dtype == torch.float32 and weights[2] == 1
    assert (weights[0] / weights[1]).item() == pytest.approx(2)
    assert (weights[3] / weights[0]).item() == pytest.approx(2)
    assert weights[[0, 1, 3]].mean().item() == pytest.approx(1)
    assert balanced_weights(torch.zeros(3, dtype=torch.int64)).tolist() == [1, 1, 1]


def test_class_weights_follow_the_recipe_or_are_refused() -> None:
    counts = torch.tensor([1, 4])

    def chosen(value: object) -> torch.Tensor | None:
        return class_weights(SupervisedConfig.model_validate({"class_weights": value}), counts)

    assert chosen("none") is None
    balanced = chosen("balanced")
    assert balanced is not None and torch.equal(balanced, balanced_weights(counts))
    given = chosen([0.5, 2.0])
    assert given is not None and given.tolist() == [0.5, 2.0]
    with pytest.raises(UsageError, match="3 numbers, and the dataset has 2 classes"):
        chosen([1.0, 1.0, 1.0])
    for wrong in ([-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(UsageError, match="numbers of 0 or more"):
            chosen(wrong)
    with pytest.raises(ValidationError, match="finite number"):
        chosen([math.nan, 1.0])


def test_labels_are_counted_over_the_named_tiles(tmp_path: Path) -> None:
    source = open_source(write_dataset(tmp_path / "d", tiles=6, tile_px=16, classes=3))
    path = tmp_path / "d" / "masks" / "t001.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[:4] = IGNORE
    mask[mask == 2] = 0
    Image.fromarray(mask).save(path)
    one, both = count_labels(source, ["t001"]), count_labels(source, ["t001", "t002"])
    assert one.dtype == torch.int64
    assert one.tolist() == [int((mask == c).sum()) for c in range(3)] and one[2] == 0
    other = np.asarray(Image.open(tmp_path / "d" / "masks" / "t002.png"))
    assert (both - one).tolist() == [int((other == c).sum()) for c in range(3)]
    with pytest.raises(DataError, match="'t005' is no tile of the train split"):
        count_labels(source, ["t005"])


def test_a_given_denominator_lets_parts_of_pseudo_labels_and_distillation_add_up() -> None:
    made = torch.Generator().manual_seed(3)
    logits, pseudo = torch.randn(4, 3, 5, 5, generator=made), torch.randint(0, 3, (4, 5, 5), generator=made)
    confidence, valid = torch.rand(4, 5, 5, generator=made), torch.rand(4, 5, 5, generator=made) < 0.8

    def part(rows: slice, denominator: torch.Tensor | None) -> torch.Tensor:
        return pseudo_label_loss(logits[rows], pseudo[rows], confidence[rows], valid[rows], 0.5, denominator)

    parts = part(slice(1), valid.sum()) + part(slice(1, 4), valid.sum())
    assert parts.item() == pytest.approx(part(slice(4), None).item(), rel=1e-6)
    mine, target = torch.randn(4, 6, 3, 3, generator=made), torch.randn(4, 3, 3, 6, generator=made)
    weight = (torch.rand(4, 3, 3, generator=made) < 0.6).float()
    whole = distillation(mine, target, weight)
    first = distillation(mine[:1], target[:1], weight[:1], denominator=weight.sum())
    rest = distillation(mine[1:], target[1:], weight[1:], denominator=weight.sum())
    for a, b, c in zip(first, rest, whole, strict=True):
        assert (a + b).item() == pytest.approx(c.item(), rel=1e-5)
