"""Position embeddings: the two rules, where they differ, which networks have the choice, and what stays untouched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from rsmtdf_cache import teachers
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.positions import PositionRule, resample_positions, use_positions
from rsmtdf_cache.request import parse_teacher
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.teachers.clip import ClipTeacher
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import build_student

pytestmark = pytest.mark.usefixtures("one_thread")


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, as torch has it."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def by_hand(line: list[float], to: int) -> list[float]:
    """Resample one line by the released rule: sample ``i`` lies at ``(i + 0.5) * m / (n + 0.1) - 0.5``."""
    out = []
    for i in range(to):
        at = (i + 0.5) * len(line) / (to + 0.1) - 0.5
        near = math.floor(at)
        taps = range(near - 1, near + 3)
        out.append(sum(cubic(at - t) * line[min(max(t, 0), len(line) - 1)] for t in taps))
    return out


@pytest.mark.parametrize(("trained", "grid"), [(7, 3), (37, 16), (5, 9)])
def test_the_released_rule_is_the_bicubic_formula_with_a_tenth_of_a_token_added(trained: int, grid: int) -> None:
    line = torch.randn(trained, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([torch.tensor([99.0]), line.repeat_interleave(trained)])[:, None]  # varies along the rows only
    found = resample_positions(rows, (trained, trained), (grid, grid), "released")
    assert found.shape == (1 + grid * grid, 1) and found[0, 0] == 99
    expected = torch.tensor(by_hand(line.tolist(), grid))
    torch.testing.assert_close(found[1:, 0].view(grid, grid), expected[:, None].expand(grid, grid), rtol=0, atol=1e-5)
    other = resample_positions(rows, (trained, trained), (grid, grid), "antialiased")
    assert float((other - found).abs().max()) > 1e-2


def test_the_trained_grid_is_taken_as_it_is_and_gradients_reach_the_embedding() -> None:
    embedding = torch.randn(1 + 6, 4, requires_grad=True)
    rules: tuple[PositionRule, ...] = ("antialiased", "released")
    for rule in rules:
        assert resample_positions(embedding, (2, 3), (2, 3), rule) is embedding
        (gradient,) = torch.autograd.grad(resample_positions(embedding, (2, 3), (5, 4), rule).sum(), [embedding])
        assert bool((gradient != 0).all())


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_at_the_trained_grid_the_rule_changes_no_bit_and_elsewhere_only_the_positions(name: str) -> None:
    torch.manual_seed(0)
    own: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    ours: Any = copy.deepcopy(own)
    use_positions(ours, "released", "test")
    assert list(ours.state_dict()) == list(own.state_dict())
    patch, side = own.patch_embed.patch_size[0], own.patch_embed.grid_size[0]
    with torch.inference_mode():
        for tokens in (side, 3):
            x = own.patch_embed(torch.randn(2, 3, tokens * patch, tokens * patch))
            assert torch.equal(ours._pos_embed(x), own._pos_embed(x)) == (tokens == side)
            with_none = copy.deepcopy(ours), copy.deepcopy(own)
            for network in with_none:
                network.pos_embed.zero_()
            a, b = (network._pos_embed(x) for network in with_none)
            assert torch.equal(a, b)  # class and register tokens stand where timm puts them


def test_a_copy_of_a_network_resamples_its_own_embedding() -> None:
    network: Any = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    use_positions(network, "released", "test")
    twin = copy.deepcopy(network)
    x = torch.zeros(1, 4, 4, int(network.embed_dim))
    with torch.no_grad():
        before = network._pos_embed(x)
        twin.pos_embed.zero_()
        assert torch.equal(network._pos_embed(x), before)
        assert float(twin._pos_embed(x)[:, 1:].abs().max()) == 0


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_resnet",
        "timm:convnext_atto",
        "timm:swin_tiny_patch4_window7_224",
        "timm:vit_relpos_small_patch16_224",
    ],
)
def test_networks_without_such_an_embedding_refuse_the_option_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="positions=released needs a plain vision transformer"):
        teachers.load(TeacherRequest(name, "none", positions="released"))
    with pytest.raises(UsageError, match=r"student\.encoder .*positions=released needs"):
        build_student(StudentConfig(encoder=name, positions="released"), 3)


def tiles(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 64, 64, 3), generator=generator, dtype=torch.uint8)


def small_clip(request: TeacherRequest) -> Teacher:
    torch.manual_seed(0)
    tower = VisionTransformer(image_size=224, patch_size=32, width=64, layers=2, heads=2, mlp_ratio=2, output_dim=8)
    with torch.no_grad():
        tower.positional_embedding.normal_()
    return ClipTeacher(request, tower, "test", torch.device("cpu"))


@pytest.mark.parametrize(("name", "load"), [("timm:test_vit", teachers.load), ("clip_vitb32", small_clip)])
def test_the_option_of_a_teacher_is_in_its_spec_and_changes_what_it_says(
    name: str, load: Callable[[TeacherRequest], Teacher]
) -> None:
    assert parse_teacher(f"{name},positions=released").positions == "released"
    rules: tuple[PositionRule | None, ...] = (None, "antialiased", "released")
    default, same, other = (load(TeacherRequest(name, "none", positions=rule)) for rule in rules)
    assert [t.spec.positions for t in (default, same, other)] == ["antialiased", "antialiased", "released"]
    assert default.spec.weights == other.spec.weights
    layer = default.layer_names[-1]
    maps = [t.encode(tiles(1), 64, [layer])[layer] for t in (default, same, other)]
    assert torch.equal(maps[0], maps[1])
    assert float((maps[0] - maps[2]).abs().max()) > 1e-3
    assert other.layer_specs([layer], 64) == default.layer_specs([layer], 64)


def test_the_default_of_a_student_is_timms_own_rule() -> None:
    torch.manual_seed(0)
    made = build_student(StudentConfig(encoder="timm:vit_tiny_patch16_224", channels=8), 3).eval()
    net: Any = made.encoder.net
    fresh: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    fresh.load_state_dict(net.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = fresh.forward_intermediates((image - made.mean) / made.std, norm=True, intermediates_only=True)
        assert torch.equal(made.encode(image)[-1], expected[-1])
