"""CutMix moves what it says it moves: pixels and tokens are painted with who they are and where they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsmtdf_train.augment import NO_CUTMIX, cutmix, cutmix_targets, draw_cutmix_box, token_cells, token_weights
from rsmtdf_train.sample import Targets

CROP_PX = 64
EDGE = st.integers(0, CROP_PX)


@st.composite
def boxes_of_batch(draw: st.DrawFn) -> Tensor:
    batch = draw(st.integers(1, 5))
    rows = []
    for _ in range(batch):
        (y0, y1), (x0, x1) = sorted((draw(EDGE), draw(EDGE))), sorted((draw(EDGE), draw(EDGE)))
        rows.append((y0, x0, y1, x1) if y0 < y1 and x0 < x1 else NO_CUTMIX)
    return torch.tensor(rows)


def painted(batch: int, height: int, width: int) -> Tensor:
    """``[B, h, w, 3]``: batch index, row, column of each cell."""
    axes = torch.arange(batch), torch.arange(height), torch.arange(width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float()


@given(boxes_of_batch())
@settings(max_examples=60, deadline=None)
def test_a_pixel_comes_from_the_partner_exactly_inside_the_box_and_never_moves(boxes: Tensor) -> None:
    batch = len(boxes)
    source = painted(batch, CROP_PX, CROP_PX)
    mixed = cutmix(source.permute(0, 3, 1, 2), boxes).permute(0, 2, 3, 1)
    assert torch.equal(mixed[..., 1:], source[..., 1:])
    for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
        expected = torch.full((CROP_PX, CROP_PX), float(i))
        expected[y0:y1, x0:x1] = batch - 1 - i
        assert torch.equal(mixed[i, ..., 0], expected)


@given(boxes_of_batch(), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([None, 0.0, 0.25, 0.5, 0.97]))
@settings(max_examples=120, deadline=None)
def test_a_token_is_the_partners_inside_its_own_outside_and_weightless_on_the_edge(
    boxes: Tensor, tokens: int, offset_strides: float | None
) -> None:
    batch, stride = len(boxes), CROP_PX / tokens
    own_weights = torch.linspace(0.25, 1, batch)[:, None, None].expand(batch, tokens, tokens).contiguous()
    targets = Targets({"k": painted(batch, tokens, tokens)}, {"k": own_weights})
    offsets = None if offset_strides is None else {"k": offset_strides * stride}
    mixed = cutmix_targets(targets, boxes, CROP_PX, offsets)
    features, weights = mixed.features["k"], mixed.weights["k"]
    assert torch.equal(features[..., 1:], targets.features["k"][..., 1:])
    shift = 0.0 if offset_strides is None else (offset_strides - 0.5) * stride
    for i, box in enumerate(boxes.tolist()):
        mask = np.zeros(
            (CROP_PX * 4, CROP_PX * 4), bool
        )  # quarter pixels: cells shifted by fractions stay exact enough
        mask[box[0] * 4 : box[2] * 4, box[1] * 4 : box[3] * 4] = True
        for r in range(tokens):
            for c in range(tokens):
                y0, x0 = (min(max(k * stride + shift, 0), CROP_PX) for k in (r, c))
                y1, x1 = (min(max((k + 1) * stride + shift, 0), CROP_PX) for k in (r, c))
                cell = mask[math.floor(y0 * 4) : math.ceil(y1 * 4), math.floor(x0 * 4) : math.ceil(x1 * 4)]
                if cell.all():
                    assert features[i, r, c, 0] == batch - 1 - i
                    assert weights[i, r, c] == own_weights[batch - 1 - i, r, c]
                elif not cell.any():
                    assert features[i, r, c, 0] == i
                    assert weights[i, r, c] == own_weights[i, r, c]
                else:
                    assert weights[i, r, c] == 0


@given(boxes_of_batch(), st.sampled_from([2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_validity_of_mixed_pixels_and_mixed_token_weights_agree(boxes: Tensor, tokens: int) -> None:
    rng = np.random.default_rng(int(boxes.sum()))
    valid = rng.random((len(boxes), CROP_PX, CROP_PX)) > 0.002
    weights = torch.from_numpy(np.stack([token_weights(v, (tokens, tokens)) for v in valid]))
    mixed = cutmix_targets(Targets({"k": torch.zeros(*weights.shape, 1)}, {"k": weights}), boxes, CROP_PX)
    pixels = cutmix(torch.from_numpy(valid), boxes).numpy()
    after = np.stack([token_weights(v, (tokens, tokens)) for v in pixels])
    counted = mixed.weights["k"].numpy()
    assert (counted <= after).all(), "a token counts though a pixel of it is invalid after mixing"


def test_cutmix_leaves_a_batch_without_boxes_as_it_is() -> None:
    source, boxes = torch.rand(3, 2, 8, 8), torch.zeros(3, 4, dtype=torch.int64)
    assert torch.equal(cutmix(source, boxes), source)
    targets = Targets({"k": torch.rand(3, 4, 4, 2)}, {"k": torch.rand(3, 4, 4)})
    mixed = cutmix_targets(targets, boxes, 8, {"k": 0.1})
    assert torch.equal(mixed.features["k"], targets.features["k"])
    assert torch.equal(mixed.weights["k"], targets.weights["k"])


@given(st.integers(0, 2**32), st.sampled_from([32, 64, 129, 256]))
@settings(max_examples=100, deadline=None)
def test_a_drawn_box_lies_in_the_crop_with_the_area_and_aspect_of_the_paper(seed: int, crop_px: int) -> None:
    y0, x0, y1, x1 = draw_cutmix_box(np.random.default_rng(seed), 1.0, crop_px)
    height, width = y1 - y0, x1 - x0
    assert 0 <= y0 < y1 <= crop_px and 0 <= x0 < x1 <= crop_px
    # Sides are rounded down to whole pixels, so each bound has one pixel of slack per side.
    assert height * width <= 0.4 * crop_px**2
    assert (height + 1) * (width + 1) >= 0.02 * crop_px**2
    assert (height + 1) / width >= 0.3 and height / (width + 1) <= 1 / 0.3


def test_the_probability_of_a_box_is_p() -> None:
    drawn = [draw_cutmix_box(np.random.default_rng(i), 0.3, 64) != NO_CUTMIX for i in range(2000)]
    assert 0.25 < np.mean(drawn) < 0.35
    assert draw_cutmix_box(np.random.default_rng(0), 0.0, 64) == NO_CUTMIX


@pytest.mark.parametrize("offset_px", [None, 8.0, 15.5])
def test_one_invalid_pixel_takes_the_weight_of_exactly_the_tokens_whose_cell_holds_it(offset_px: float | None) -> None:
    start, end = (v.numpy() for v in token_cells(4, 64, offset_px))
    for y, x in ((0, 0), (15, 16), (23, 63), (63, 40)):
        valid = np.ones((64, 64), bool)
        valid[y, x] = False
        rows, columns = ((start < p + 1) & (end > p) for p in (y, x))
        np.testing.assert_array_equal(token_weights(valid, (4, 4), offset_px) == 0, np.outer(rows, columns))
