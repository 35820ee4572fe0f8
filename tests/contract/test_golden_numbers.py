"""The numbers of the released RS-MTDF come out of teachers and student as users build them: uint8 pixels in, maps out.

``tests/golden/forward_seed7.json`` was recorded with the released implementation in float32, on weights and an image
that are formulas. Features are accepted within 1e-4.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsmtdf_cache.views import view_specs
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import Student, build_student
from tests.formula import SIDE, clip_teacher, dinov2_teacher, fill, formula_images

GOLDEN = Path(__file__).parents[1] / "golden" / "forward_seed7.json"
SEED = 7
BLOCKS = (2, 5, 8, 11)

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded(key: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(GOLDEN.read_text())["values"][key]
    return values


def furthest(found: Tensor, key: str) -> float:
    """Return the largest difference from the recorded samples of ``key``."""
    facts, flat = recorded(key), found.flatten()
    assert list(found.shape) == facts["shape"] and len(facts["samples"]) >= 64
    samples: dict[str, float] = facts["samples"]
    return max(abs(float(flat[int(index)]) - value) for index, value in samples.items())


def assert_recorded(found: Tensor, key: str) -> None:
    assert furthest(found, key) < 1e-4, key
    assert float(found.mean()) == pytest.approx(recorded(key)["mean"], abs=1e-5)
    assert float(found.std()) == pytest.approx(recorded(key)["std"], abs=1e-5)


def test_the_dinov2_target_of_the_released_method_is_reproduced_from_pixels() -> None:
    teacher = dinov2_teacher()
    (view,) = view_specs(teacher.spec, SIDE, (1.0,), 1)
    assert_recorded(teacher.normalised(formula_images(SEED, 1).permute(0, 2, 3, 1), view.size_px), "input")
    tokens = teacher.encode(formula_images(SEED, 1).permute(0, 2, 3, 1), view.size_px, ["block11"])["block11"]
    assert_recorded(tokens.flatten(1, 2), "dinov2_vitb14.layer11")


def test_the_clip_target_of_the_released_method_is_reproduced_from_pixels() -> None:
    teacher = clip_teacher()
    (view,) = view_specs(teacher.spec, SIDE, (1.0,), 1)
    assert view.size_px == 224  # the student's second input: aligned corners, ImageNet statistics and all
    tokens = teacher.encode(formula_images(SEED, 1).permute(0, 2, 3, 1), view.size_px, ["block23"])["block23"]
    assert_recorded(tokens.flatten(1, 2), "clip_vitl14.tokens")


@cache
def student(positions: str) -> Student:
    config = {"encoder": "dinov2_vits14", "decoder": "dpt", "positions": positions}
    made = build_student(StudentConfig.model_validate(config), 7).eval()
    if positions == "released":
        fill(made.encoder.get_submodule("net"), "student.")
    else:
        made.encoder.load_state_dict(student("released").encoder.state_dict())
    return made


def student_tokens(positions: str, side: int) -> list[Tensor]:
    image = formula_images(SEED, 1).float() / 255
    if side != SIDE:
        image = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=True)
    with torch.inference_mode():
        return [m.flatten(2).transpose(1, 2) for m in student(positions).encode(image)]


@pytest.mark.parametrize(("side", "part"), [(518, "student"), (224, "student224")])
def test_the_students_tokens_of_the_released_method_are_reproduced(side: int, part: str) -> None:
    for block, tokens in zip(BLOCKS, student_tokens("released", side), strict=True):
        assert_recorded(tokens, f"{part}.layer{block}")


def test_the_default_positions_are_another_function_at_224_and_the_same_at_the_trained_side() -> None:
    for block, tokens in zip(BLOCKS, student_tokens("antialiased", 224), strict=True):
        assert furthest(tokens, f"student224.layer{block}") > 0.5
    assert_recorded(student_tokens("antialiased", 518)[0], "student.layer2")
