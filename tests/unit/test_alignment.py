"""Student maps are read at the places of the teachers' tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_train.alignment import Grid, resample, resample_matrix
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import build_student

strides = st.sampled_from([4.0, 8.0, 16.0, 32.0])


@given(strides, strides, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_map_of_its_own_coordinates_reads_as_the_targets_coordinates(a: float, b: float, p: float, q: float) -> None:
    source, target = Grid(int(128 / a), a, p * a), Grid(int(128 / b), b, q * b)
    centres = source.offset_px + source.stride_px * torch.arange(source.tokens, dtype=torch.float64)
    wanted = target.offset_px + target.stride_px * torch.arange(target.tokens, dtype=torch.float64)
    got = resample_matrix(source, target).double() @ centres
    width = max(a, b)
    inside = (wanted - width >= centres[0]) & (wanted + width <= centres[-1])
    if a >= b:  # interpolation is exact wherever there are two neighbours
        inside = (wanted >= centres[0]) & (wanted <= centres[-1])
    tolerance = 1e-3 if a >= b else a / 2  # a triangle over discrete tokens is off by less than half of one
    assert ((got - wanted).abs()[inside] <= tolerance).all()


@given(strides, strides, st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_rows_are_weights_and_no_source_token_inside_is_skipped(a: float, b: float, p: float, q: float) -> None:
    source, target = Grid(int(128 / a), a, p * a), Grid(int(128 / b), b, q * b)
    matrix = resample_matrix(source, target)
    assert matrix.shape == (target.tokens, source.tokens) and (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(target.tokens))
    if b > a:
        used = matrix.sum(0) > 0
        first, last = used.nonzero()[0], used.nonzero()[-1]
        assert used[first : last + 1].all()


def test_equal_grids_are_left_alone_and_rows_are_not_columns() -> None:
    grid = Grid(4, 8.0, 4.0)
    x = torch.randn(1, 2, 4, 4)
    assert resample(x, grid, grid) is x
    rows = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    got = resample(rows, grid, Grid(2, 16.0, 8.0))
    assert (got[0, 0, 0] < got[0, 0, 1]).all() and torch.equal(got[0, 0, :, 0], got[0, 0, :, 1])


@pytest.mark.parametrize(("encoder", "offset"), [("tf_efficientnet_lite0", 31.5), ("resnet18", 0.5)])
def test_a_students_maps_know_where_their_tokens_lie(encoder: str, offset: float) -> None:
    student = build_student(StudentConfig(encoder=encoder, channels=8), 2)
    assert student.maps[-1].stride_px == 32 and student.maps[-1].offset_px == offset
