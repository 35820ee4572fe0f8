"""Windows of scenes cover every pixel, and their weights add up to one, for any size, window and overlap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.scenes.windows import BLOCK_PX, Grid, lay_windows

QUICK = settings(deadline=None, max_examples=50)
#: Size of the scene in pixels; stride; window and overlap in strides.
CUTS = st.tuples(st.integers(1, 400), st.sampled_from([1, 4, 14, 32]), st.integers(1, 9), st.integers(0, 8)).filter(
    lambda c: c[3] < c[2]
)


def cut(size: int, stride: int, window: int, overlap: int, *, square: bool = False) -> Grid:
    return lay_windows(size, size, stride, window * stride, overlap * stride, crop_px=1, square=square)


@QUICK
@given(CUTS, st.booleans())
def test_weights_add_up_to_one_at_every_pixel_and_windows_keep_to_the_stride(
    numbers: tuple[int, int, int, int], square: bool
) -> None:
    size, stride, _, overlap = numbers
    axis = cut(*numbers, square=square).rows
    assert all(start % stride == 0 for start in axis.starts) and axis.side % stride == 0
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.side >= size
    if not square:
        assert axis.starts[-1] + axis.side < size + stride
    assert all(0 < b - a <= axis.side - overlap * stride for a, b in itertools.pairwise(axis.starts))
    total = np.zeros(axis.starts[-1] + axis.side)
    for start, weights in zip(axis.starts, axis.weights, strict=True):
        assert (weights >= 0).all()
        total[start : start + axis.side] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@QUICK
@given(CUTS)
def test_a_window_says_nothing_about_the_outer_quarter_of_what_it_shares(numbers: tuple[int, int, int, int]) -> None:
    _, stride, _, overlap = numbers
    axis = cut(*numbers).rows
    edge = overlap * stride // 4
    assert (axis.weights[1:, :edge] == 0).all()
    assert (axis.weights[:-1, axis.side - edge :] == 0).all()


@QUICK
@given(st.integers(1, 4000), st.integers(1, 3000), st.integers(1, 3000))
def test_strips_hold_every_column_once_in_whole_blocks(width: int, nbytes: int, budget: int) -> None:
    grid = lay_windows(50, width, 32, 64, 32, crop_px=64, column_nbytes=nbytes, budget_nbytes=1000 * budget)
    strips = list(grid.strips())
    assert [s.x0 for s in strips] == [0, *(s.x1 for s in strips[:-1])] and strips[-1].x1 == width
    assert all(s.x0 % BLOCK_PX == 0 for s in strips)
    assert all(s.width <= max(BLOCK_PX, 1000 * budget // nbytes) for s in strips)
    for strip in strips:
        covered = np.zeros(width + 64, bool)
        for k in grid.columns.touching(strip.x0, strip.x1):
            covered[grid.columns.starts[k] : grid.columns.starts[k] + grid.columns.side] = True
        assert covered[strip.x0 : strip.x1].all()


def test_windows_are_as_large_as_training_crops_unless_told_otherwise() -> None:
    grid = lay_windows(500, 500, 32, None, None, crop_px=120)
    assert (grid.window_px, grid.overlap_px) == (128, 32)


@pytest.mark.parametrize(("window", "overlap", "text"), [
    (100, None, "--window 100: this student reads multiples of 32 px; give 96"), (0, None, "give 32"),
    (64, 16, "--overlap 16"), (64, 64, "from 0 to 32"), (64, -32, "--overlap -32"),
])  # fmt: skip
def test_sides_that_do_not_fit_the_student_are_refused(window: int, overlap: int | None, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        lay_windows(500, 500, 32, window, overlap, crop_px=64)
