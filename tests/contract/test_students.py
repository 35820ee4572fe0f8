"""What every kind of student keeps, whatever its encoder and decoder."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from tests.students import KINDS, build, student_of

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = pytest.mark.parametrize("kind", list(KINDS))


def image_for(kind: str, seed: int = 1) -> Tensor:
    """Two images of the least size with a side of its own for width; PAN needs eight tokens."""
    side = 128 if kind.endswith("pan") else 64
    made = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, side, side + 32, generator=made)


@cache
def logits_of(kind: str) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = student_of(kind).eval()(image_for(kind))
    return logits


@EACH
def test_maps_are_as_declared_and_logits_have_the_size_of_the_image(kind: str) -> None:
    student, image = student_of(kind).eval(), image_for(kind)
    assert tuple(m.stride_px for m in student.maps) == KINDS[kind][2]
    height, width = image.shape[-2:]
    with torch.inference_mode():
        maps = student.encode(image)
    for found, declared in zip(maps, student.maps, strict=True):
        grid = (height // declared.stride_px, width // declared.stride_px)
        assert found.shape == (2, declared.channels, *grid)
    assert logits_of(kind).shape == (2, 5, height, width)
    assert logits_of(kind).isfinite().all()
    assert student.multiple_px == max(KINDS[kind][2])
    with pytest.raises(UsageError, match=f"multiples of {student.multiple_px} px"):
        student.encode(image[..., :-4])


@EACH
def test_a_gradient_reaches_all_parameters_and_the_maps_that_the_decoder_reads(kind: str) -> None:
    student = deepcopy(student_of(kind)).train()
    image = image_for(kind)
    maps = student.encode(image)
    for single in maps:
        single.retain_grad()
    student.decode(maps, (image.shape[-2], image.shape[-1])).square().mean().backward()  # type: ignore[no-untyped-call]
    dead = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    # as published: the deepest fusion block of DPT has no skip (rsmtdf_train/students/dpt.py)
    assert dead == {n for n, _ in student.named_parameters() if ".refinenet4.resConfUnit1." in n}
    # a map may reach the loss through deeper ones too, in the encoder; the decoder alone tells
    cut = [single.detach().requires_grad_() for single in maps]
    student.decode(cut, (image.shape[-2], image.shape[-1])).square().mean().backward()  # type: ignore[no-untyped-call]
    assert student.decoder_reads == tuple(i for i, single in enumerate(cut) if single.grad is not None)


@EACH
def test_construction_is_a_function_of_the_seed(kind: str) -> None:
    first, again, other = student_of(kind).state_dict(), build(kind).state_dict(), build(kind, seed=1).state_dict()
    parameters = [n for n, p in student_of(kind).named_parameters() if p.ndim > 1]
    assert all(torch.equal(first[n], again[n]) for n in parameters)
    assert not any(torch.equal(first[n], other[n]) for n in parameters)


@EACH
def test_bfloat16_gives_about_the_same_logits(kind: str) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = student_of(kind).eval()(image_for(kind)).float()
    expected = logits_of(kind)
    assert not torch.equal(found, expected), "computed in float32"
    assert (found - expected).norm() < 0.1 * expected.norm()


@EACH
def test_channels_last_gives_the_same_logits(kind: str) -> None:
    student = deepcopy(student_of(kind)).eval().to(memory_format=torch.channels_last)
    image = image_for(kind).contiguous(memory_format=torch.channels_last)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in student.parameters())
    with torch.inference_mode():
        found = student(image)
    assert (found - logits_of(kind)).abs().max() < 1e-4 * max(1.0, float(logits_of(kind).abs().max()))
