"""What stands for operators that exporters lack gives what those give; the graph's sides are the student's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.export.portable import (
    DeployedStudent,
    PortableOperators,
    adaptive_average,
    antialiased_bicubic,
    example_px,
    least_px,
)
from rsmtdf_train.fused_student import FusedStudent
from tests.students import student_of

pytestmark = pytest.mark.usefixtures("one_thread")

#: Input and output grids: the same, larger, smaller, a divisor, none, to one.
GRIDS = [((7, 9), (7, 9)), ((7, 9), (14, 10)), ((37, 37), (16, 23)), ((12, 18), (6, 6)), ((5, 11), (3, 2)),
         ((5, 8), (1, 1)), ((3, 4), (6, 6)), ((1, 1), (4, 5))]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), GRIDS)
def test_adaptive_averages_are_those_of_torch(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *given, generator=torch.Generator().manual_seed(1))
    expected = F.adaptive_avg_pool2d(x, wanted)
    torch.testing.assert_close(adaptive_average(x, wanted), expected, rtol=0, atol=1e-6)
    with PortableOperators():
        torch.testing.assert_close(F.interpolate(x, size=wanted, mode="area"), expected, rtol=0, atol=1e-6)
        pooled = torch.nn.AdaptiveAvgPool2d((wanted[0], None))(x)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(x, (wanted[0], given[1])), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("given", "wanted"), GRIDS)
def test_antialiased_bicubic_resizing_is_that_of_torch(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *given, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(x, size=wanted, mode="bicubic", antialias=True)
    torch.testing.assert_close(antialiased_bicubic(x, wanted), expected, rtol=0, atol=2e-6)
    with PortableOperators():
        found = F.interpolate(x, wanted, mode="bicubic", antialias=True)
        plain = F.interpolate(x, wanted, mode="bicubic")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert torch.equal(plain, F.interpolate(x, wanted, mode="bicubic")), "other modes are left alone"


@pytest.mark.parametrize("odd_sizes", ["pad", "resize"])
@pytest.mark.parametrize("size", [(64, 96), (63, 97), (1, 40), (15, 16), (47, 48), (80, 79), (33, 112)])
def test_the_graph_computes_what_the_student_predicts_for_any_side(odd_sizes: str, size: tuple[int, int]) -> None:
    model = FusedStudent(student_of("cnn-fpn").eval(), None, odd_sizes)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = DeployedStudent(model)(image), model.predict(image).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("odd_sizes", ["pad", "resize"])
def test_the_least_side_is_read_and_one_less_is_refused(odd_sizes: str) -> None:
    model = FusedStudent(student_of("cnn-smp:pan").eval(), None, odd_sizes)
    least = least_px(model)
    assert least == {"pad": 113, "resize": 120}[odd_sizes]  # 8 tokens of 16 px
    with torch.inference_mode():
        assert model.predict(torch.rand(1, 3, least, 160)).shape[-2:] == (least, 160)
        with pytest.raises(UsageError, match="needs 8 tokens on a side"):
            model.predict(torch.rand(1, 3, least - 1, 160))


def test_the_example_leaves_nothing_out() -> None:
    for kind in ("cnn-fpn", "vit-fpn", "cnn-smp:pan"):
        model = FusedStudent(student_of(kind), None)
        multiple = model.student.multiple_px
        for side in example_px(model):
            assert side % multiple and -(-side // multiple) % 2 and side >= least_px(model)
