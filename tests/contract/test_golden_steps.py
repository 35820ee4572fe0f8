"""The preset ``paper`` computes the released RS-MTDF: its fused forward pass and two steps of its training loop.

``tests/golden/forward_seed7.json`` and ``two_steps_seed40.json`` were recorded with the released implementation in
float32. Both are met through what users run: the preset's recipe, live teachers and ``train_step``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rsmtdf_cache.codecs import load_codec
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.specs import EncodingSpec
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.losses import SupervisedLoss
from rsmtdf_train.objective import distill_term
from rsmtdf_train.prepare import Labeled, Part, StepTools, Strong, Unlabeled
from rsmtdf_train.recipe import Recipe, load_recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import train_step
from rsmtdf_train.targets.base import TargetSpec
from rsmtdf_train.targets.live import LiveTeachers, live_target
from tests.formula import SIDE, clip_teacher, dinov2_teacher, formula_images, formula_weight

GOLDEN = Path(__file__).parents[1] / "golden"
DINO, CLIP = "dinov2_vitb14_paper/s518/block11", "clip_vitl14_paper/s224/block23"
CLASSES, IGNORE = 7, 255


@cache
def paper() -> Recipe:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text("{preset: paper, data: nowhere, threshold: 0.5, batch: {labeled: 2, unlabeled: 2}}")
        return load_recipe(path, ["epochs=null", "steps=10", "student.pretrained=false"])


@cache
def live() -> LiveTeachers:
    shared = (SIDE, SIDE, SIDE)
    targets = [
        live_target(dinov2_teacher(), DINO, "block11", *shared),
        live_target(clip_teacher(), CLIP, "block23", 224, SIDE, SIDE),
    ]
    distill = paper().distill
    assert distill is not None and not distill.standardize
    plain = {}
    for t in shapes():
        zeros, ones = np.zeros(t.channels, np.float32), np.ones(t.channels, np.float32)
        decoder = DeviceDecoder(load_codec(EncodingSpec(), t.channels))
        plain[t.key] = TargetSpec(t.key, t.channels, t.stride_px, t.offset_px or 0, zeros, ones, decoder)
    return LiveTeachers(targets, plain, "float32", distill.padding)


@pytest.fixture(scope="module", autouse=True)
def teachers_go_with_the_module() -> Iterator[None]:
    yield
    live.cache_clear()  # 390 M parameters


def shapes() -> list[TargetShape]:
    return [TargetShape(DINO, 768, 14.0, 7.0), TargetShape(CLIP, 1024, 14 * SIDE / 224, 7 * SIDE / 224)]


def original_name(name: str) -> str:
    """Return the name of our parameter in the released checkpoints' layout."""
    for ours, theirs in (("student.encoder.net.", "student."), ("student.decoder.", "head.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    _, kind, index, *rest = name.split(".")
    teacher = ("dino", "clip")[int(index)]
    if kind == "projections":
        return f"project_{teacher}.{rest[0]}"
    return f"translator_{teacher}.layer.{ {'first': 0, 'second': 2}[rest[0]] }.{rest[1]}"


def paper_state() -> TrainState:
    state = build_state(paper(), CLASSES, shapes(), torch.device("cpu"))
    with torch.no_grad():
        for model in (state.student, state.ema):
            for name, parameter in model.named_parameters():
                parameter.copy_(formula_weight(original_name(name), tuple(parameter.shape)))
    return state


def images(seed: int, batch: int) -> Tensor:
    return formula_images(seed, batch).float() / 255


def furthest(found: Tensor, samples: dict[str, float]) -> float:
    flat = found.detach().flatten()
    return max(abs(float(flat[int(i)]) - value) for i, value in samples.items())


@pytest.mark.timeout(1200)
def test_the_fused_forward_pass_and_its_distillation_loss_are_reproduced() -> None:
    recorded = json.loads((GOLDEN / "forward_seed7.json").read_text())["values"]
    student = paper_state().student.eval()
    image = images(7, 1)
    with torch.inference_mode():
        encoded = student.encode(image)
        hidden = student.hidden(encoded)
        translated, logits = student.translations(hidden), student.decode(encoded, hidden, (SIDE, SIDE))
        distill = paper().distill
        assert distill is not None
        loss, _ = distill_term(distill, student.align(translated, SIDE), live().targets(image))
        assert torch.equal(student(image), logits), "what is deployed is what is trained"
    assert list(logits.shape) == recorded["logits"]["shape"]
    assert furthest(logits, recorded["logits"]["samples"]) < 1e-4
    assert float(loss) == pytest.approx(recorded["distill_loss"], rel=1e-4)


class _Remembering(LiveTeachers):
    """The same teachers, asked once: both steps of the reference have the same batch."""

    def __init__(self, inner: LiveTeachers) -> None:
        self.inner = inner
        self.known: list[tuple[Tensor, Targets]] = []

    def targets(self, images_B3HW: Tensor, valid_BHW: Tensor | None = None) -> Targets:
        for seen, answer in self.known:
            if torch.equal(seen, images_B3HW):
                return answer
        answer = self.inner.targets(images_B3HW, valid_BHW)
        self.known.append((images_B3HW.clone(), answer))
        return answer


def batch(step: int) -> Part:
    labels = np.random.RandomState(44).randint(0, CLASSES, (2, 37, 37)).repeat(14, 1).repeat(14, 2)
    labels[:, :20] = IGNORE
    valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    valid[:, :, 500:] = False
    boxes = torch.tensor([[100, 50, 300, 400], [200, 10, 260, 500]])
    nothing = Targets({}, {})
    label = torch.from_numpy(labels)
    labeled = Labeled(images(41, 2), label, torch.ones_like(valid), nothing)
    unlabeled = Unlabeled(
        images(42, 2), (Strong(images(43, 2), boxes),), valid, torch.full_like(label, IGNORE), nothing
    )
    return Part(step, labeled, unlabeled)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 40 s on an idle core
def test_two_steps_of_the_released_training_loop_are_reproduced() -> None:
    recorded: list[dict[str, Any]] = json.loads((GOLDEN / "two_steps_seed40.json").read_text())["steps"]
    recipe, state = paper(), paper_state()
    teachers = _Remembering(live())
    tools = StepTools(SupervisedLoss(recipe.supervised, None, IGNORE), IGNORE, live=teachers)
    for expected in recorded:
        logs = train_step(state, [batch(state.step)], recipe, tools)
        for name in ("loss", "loss_labeled", "loss_unlabeled", "loss_distill"):
            assert float(logs[name]) == pytest.approx(expected[name], rel=1e-3), (expected["step"], name)
        assert float(logs["mask_ratio"]) == pytest.approx(expected["mask_ratio"], abs=1e-4)
        student = state.student
        head = student.student.decoder.get_submodule("scratch.output_conv.2").get_parameter("weight")
        norm = student.student.encoder.get_submodule("net.norm").get_parameter("weight")
        assert state.ema.fusion is not None
        project = state.ema.fusion.projections[1].get_parameter("weight")
        assert furthest(head, expected["head_out_weight"]["samples"]) < 5e-6
        assert furthest(norm, expected["backbone_norm_weight"]["samples"]) < 2e-7
        assert furthest(project, expected["ema_project_clip"]["samples"]) < 5e-6
    assert len(teachers.known) == 1, "one mixed batch, seen by the teachers as the student sees it"
