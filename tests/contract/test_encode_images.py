"""A teacher says the same of float images as of the bytes they stand for, and rounds nothing in between."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rsmtdf_cache import teachers
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.teachers._dense import DenseTeacher
from rsmtdf_cache.teachers.base import TeacherRequest
from tests.teachers import MeanTeacher

pytestmark = pytest.mark.usefixtures("one_thread")

#: Teacher, side of the images, side of the view.
SMALL = [("timm:test_resnet", 64, 64), ("timm:test_resnet", 64, 96), ("timm:test_vit", 64, 48)]
PAPER = ("dinov2_vits14_paper", 70, 56)


@cache
def built(name: str) -> DenseTeacher:
    teacher = teachers.load(TeacherRequest(name, "none"))
    assert isinstance(teacher, DenseTeacher)
    return teacher


def noise(side: int, count: int = 2) -> Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(side))


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("name", "side", "size"), [*SMALL, PAPER])
def test_bytes_and_the_floats_they_stand_for_give_the_same_features(name: str, side: int, size: int) -> None:
    teacher, stored = built(name), as_bytes(noise(side))
    layers = teacher.layer_names[-2:]
    of_bytes = teacher.encode(stored.permute(0, 2, 3, 1).contiguous(), size, layers)
    of_floats = teacher.encode_images(stored.float() / 255, size, layers)
    for layer in layers:
        scale = float(of_bytes[layer].abs().max())
        assert of_floats[layer].dtype == torch.float32
        assert float((of_floats[layer] - of_bytes[layer]).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize(("name", "side", "size"), SMALL)
def test_images_are_not_rounded_to_bytes(name: str, side: int, size: int) -> None:
    teacher, images = built(name), noise(side)
    layer = teacher.layer_names[0]
    exact = teacher.encode_images(images, size, [layer])[layer]
    rounded = teacher.encode_images(as_bytes(images).float() / 255, size, [layer])[layer]
    assert float((exact - rounded).abs().max()) > 1e-3 * float(exact.abs().max())


def test_the_paper_s_teachers_see_what_its_released_code_shows_them() -> None:
    """The released code normalises first, then resizes bilinearly with aligned corners and without antialias."""
    name, side, size = PAPER
    teacher, images = built(name), noise(side)
    layer = teacher.layer_names[-1]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shown = F.interpolate((images - mean) / std, size=(size, size), mode="bilinear", align_corners=True)
    with torch.inference_mode():
        expected = teacher.forward_normalised(shown, [layer])[layer]
    torch.testing.assert_close(teacher.encode_images(images, size, [layer])[layer], expected, rtol=1e-3, atol=1e-4)


def test_what_a_bicubic_resize_adds_beyond_black_and_white_is_cut_off() -> None:
    teacher = built("timm:test_resnet")
    layer = teacher.layer_names[0]
    edge = torch.zeros(1, 3, 64, 64)
    edge[:, :, :, 32:] = 1
    resized = F.interpolate(edge, size=96, mode="bicubic", antialias=True)
    assert float(resized.max()) > 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.spec.pixel.mean, teacher.spec.pixel.std))
    with torch.inference_mode():
        expected = teacher.forward_normalised((resized.clamp(0, 1) - mean) / std, [layer])[layer]
    torch.testing.assert_close(teacher.encode_images(edge, 96, [layer])[layer], expected)


def test_only_square_float_rgb_images_of_a_fitting_size_are_taken() -> None:
    teacher, images = built("timm:test_vit"), noise(64)
    layers = teacher.layer_names[-1:]
    for wrong in (as_bytes(images), images.permute(0, 2, 3, 1), images[0], images[:, :, :32]):
        with pytest.raises(TypeError, match="floating point"):
            teacher.encode_images(wrong, 64, layers)
    with pytest.raises(UsageError, match="multiple of its"):
        teacher.encode_images(images, 60, layers)
    with pytest.raises(UsageError, match="choose float32"):
        teacher.encode_images(images, 64, layers, "int8")


def test_a_teacher_of_stored_bytes_only_says_so() -> None:
    with pytest.raises(UsageError, match="online targets"):
        MeanTeacher().encode_images(noise(64), 64, ["mean8"])


class Calls(TorchFunctionMode):
    """Counts the torch functions that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["timm:test_vit", "dinov2_vits14_paper"])
def test_attention_is_fused(name: str, precision: str) -> None:
    """An online baseline must not be slow for want of it: every block calls it, none makes a softmax of its own."""
    teacher = built(name)
    side = 4 * teacher.spec.patch_px
    with Calls() as calls:
        teacher.encode_images(noise(side), side, teacher.layer_names[-1:], precision)
    assert calls.names.count("scaled_dot_product_attention") == len(teacher.layer_names)
    assert "softmax" not in calls.names
