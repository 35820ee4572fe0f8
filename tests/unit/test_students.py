"""Students of both families: shapes, statistics, weights, errors, and the published facts of the DPT head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import MapSpec, build_student
from rsmtdf_train.students.dpt import DptDecoder, _FusionBlock, _ResidualUnit
from rsmtdf_train.students.timm_encoder import resolve_name

SMALL = StudentConfig(encoder="timm:mobilenetv3_small_050", channels=8)
VIT = "timm:vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("config", "strides"),
    [
        (SMALL, [4, 8, 16, 32]),
        (StudentConfig(encoder="convnext_atto", channels=8), [4, 8, 16, 32]),
        (StudentConfig(encoder=VIT, channels=8), [16, 16, 16, 16]),
        (StudentConfig(encoder=VIT, decoder="dpt", channels=8), [16, 16, 16, 16]),
    ],
    ids=["cnn-fpn", "convnext-fpn", "vit-fpn", "vit-dpt"],
)
def test_maps_are_as_announced_and_logits_have_the_input_size(config: StudentConfig, strides: list[int]) -> None:
    student = build_student(config, classes=5).eval()
    assert [m.stride_px for m in student.maps] == strides
    image = torch.rand(2, 3, 64, 96)
    maps = student.encode(image)
    for found, expected in zip(maps, student.maps, strict=True):
        assert found.shape == (2, expected.channels, 64 // expected.stride_px, 96 // expected.stride_px)
    assert student(image).shape == (2, 5, 64, 96)


def test_every_parameter_of_an_fpn_student_gets_a_gradient() -> None:
    student = build_student(SMALL, classes=3)
    student(torch.rand(2, 3, 64, 64)).square().mean().backward()
    last_stage = {n for n, p in student.named_parameters() if p.grad is None}
    assert not last_stage


def test_the_student_normalises_pixels_itself() -> None:
    student = build_student(SMALL, classes=3).eval()
    seen: list[torch.Tensor] = []
    student.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(torch.full((1, 3, 32, 32), 0.5))
    expected = (0.5 - torch.tensor(student.encoder.mean)) / torch.tensor(student.encoder.std)
    assert torch.allclose(seen[0].mean((0, 2, 3)), expected)
    assert "mean" in student.state_dict()


def test_a_side_off_the_stride_is_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 32 px, found 48x64"):
        build_student(SMALL, 3).encode(torch.rand(1, 3, 48, 64))


def test_an_unknown_encoder_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'mobilenetv3_small_050'"):
        build_student(StudentConfig(encoder="timm:mobilenetv3_smal_050"), 3)
    with pytest.raises(UsageError, match="Did you mean 'dinov2_vits14'"):
        build_student(StudentConfig(encoder="dinov2_vitx14"), 3)


def test_short_names_of_dinov2_are_timms() -> None:
    assert resolve_name("dinov2_vits14") == "vit_small_patch14_dinov2"
    assert resolve_name("dinov2_vitb14_reg") == "vit_base_patch14_reg4_dinov2"


def test_dpt_on_stages_of_a_cnn_is_refused() -> None:
    with pytest.raises(UsageError, match=r"student\.decoder: fpn"):
        build_student(SMALL.model_copy(update={"decoder": "dpt"}), 3)


@pytest.mark.parametrize("encoder", ["timm:convnext_atto", VIT], ids=["stages", "tokens"])
def test_a_weights_file_fills_the_encoder(encoder: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(7)
    whole = timm.create_model(encoder.removeprefix("timm:"), num_classes=4)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    config = StudentConfig(encoder=encoder, channels=8, weights=tmp_path / "w.pt")
    torch.manual_seed(1)
    loaded = build_student(config, 3)
    torch.manual_seed(1)
    skipped = build_student(config, 3, load_weights=False)
    theirs = {float(v.double().abs().sum()) for v in whole.state_dict().values() if v.ndim == 4}
    kernels = [v for v in loaded.encoder.state_dict().values() if v.ndim == 4]
    assert kernels and all(float(v.double().abs().sum()) in theirs for v in kernels)
    others = [v for v in skipped.encoder.state_dict().values() if v.ndim == 4 and v.std() > 0]
    assert others and not any(float(v.double().abs().sum()) in theirs for v in others)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(MismatchError, match=r"tensors differ: .*missing"):
        build_student(SMALL.model_copy(update={"weights": path}), 3)


def test_a_file_that_is_no_weights_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"x": Path("object")}, path)  # a pickle with a class in it
    with pytest.raises(ResourceError, match="cannot be read as weights"):
        build_student(SMALL.model_copy(update={"weights": path}), 3)
    with pytest.raises(ResourceError, match="cannot be read as weights"):
        build_student(SMALL.model_copy(update={"weights": tmp_path / "absent.safetensors"}), 3)


def test_weights_out_of_reach_name_the_way_out() -> None:
    # timm publishes no weights of this variant, so no network is touched
    config = StudentConfig(encoder="timm:convnext_atto_rms", channels=8, pretrained=True)
    with pytest.raises(ResourceError, match=r"student\.weights=FILE"):
        build_student(config, 3)
    assert build_student(config, 3, load_weights=False).classes == 3


MAPS = [MapSpec(6, 14)] * 4


def test_dpt_head_has_the_published_layers_and_no_norm() -> None:
    head = DptDecoder([MapSpec(384, 14)] * 4, 7)
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert [shapes[f"projects.{i}.weight"][:2] for i in range(4)] == [(48, 384), (96, 384), (192, 384), (384, 384)]
    assert shapes["resize_layers.0.weight"] == (48, 48, 4, 4)
    assert shapes["resize_layers.3.weight"] == (384, 384, 3, 3)
    assert shapes["scratch.layer4_rn.weight"] == (64, 384, 3, 3) and "scratch.layer4_rn.bias" not in shapes
    assert shapes["scratch.refinenet4.resConfUnit1.conv1.bias"] == (64,)
    assert shapes["scratch.output_conv.2.weight"] == (7, 64, 1, 1)
    assert not any("Norm" in type(m).__name__ for m in head.modules())


def test_dpt_gives_logits_at_eight_times_the_token_grid_before_the_last_resize() -> None:
    head = DptDecoder(MAPS, 2, features=4, out_channels=(2, 3, 4, 5))
    seen: list[torch.Size] = []
    output = head.scratch.get_submodule("output_conv")
    output.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    logits = head([torch.rand(1, 6, 5, 5)] * 4, (70, 70))
    assert seen == [torch.Size([1, 2, 40, 40])] and logits.shape == (1, 2, 70, 70)


def test_only_the_first_unit_of_the_deepest_block_is_without_a_gradient() -> None:
    head = DptDecoder(MAPS, 2, features=4, out_channels=(2, 3, 4, 5))
    head([torch.rand(1, 6, 5, 5)] * 4, (70, 70)).square().mean().backward()
    dead = {n.rpartition(".conv")[0] for n, p in head.named_parameters() if p.grad is None}
    assert dead == {"scratch.refinenet4.resConfUnit1"}


def test_residual_unit_and_fusion_block_compute_the_published_formulas() -> None:
    torch.manual_seed(0)
    x, skip = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    block = _FusionBlock(4)

    def unit(u: _ResidualUnit, t: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(t.relu(), u.conv1.weight, u.conv1.bias, padding=1)
        return t + F.conv2d(y.relu(), u.conv2.weight, u.conv2.bias, padding=1)

    inner = unit(block.resConfUnit2, x + unit(block.resConfUnit1, skip))
    up = F.interpolate(inner, size=(6, 6), mode="bilinear", align_corners=True)
    expected = F.conv2d(up, block.out_conv.weight, block.out_conv.bias)
    assert torch.allclose(block(x, skip, None), expected, atol=1e-6)
