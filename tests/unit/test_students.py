"""Students: statistics, weights, errors, and the published facts of the DPT head.

What every kind of student keeps is in ``tests/contract/test_students.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import MapSpec, build_student
from rsmtdf_train.students.dpt import DptDecoder, _FusionBlock, _ResidualUnit
from rsmtdf_train.students.timm_encoder import _SHORT, load_encoder, resolve_name
from tests.students import student_of

SMALL = StudentConfig(encoder="timm:mobilenetv3_small_050", channels=8)
VIT = "timm:vit_tiny_patch16_224"
DINOV3 = "vit_tiny_patch16_dinov3_qkvb"

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_short_names_are_timms() -> None:
    assert resolve_name("dinov2_vits14") == "vit_small_patch14_dinov2"
    assert resolve_name("dinov2_vitb14_reg") == "vit_base_patch14_reg4_dinov2"
    assert resolve_name("dinov3_vits16") == "vit_small_patch16_dinov3"
    assert all(timm.is_model(name) for name in _SHORT.values())


@pytest.mark.parametrize("side", [128, 256])
def test_maps_of_channels_last_encoders_are_turned_where_they_are_as_high_as_they_have_channels(side: int) -> None:
    # MambaOut gives channels last: at 256 px its map of stride 8 is 32 x 32 tokens of 32 channels
    student = build_student(StudentConfig(encoder="timm:test_mambaout", channels=8), 2).eval()
    image = torch.rand(1, 3, side, side)
    with torch.inference_mode():
        found = student.encode(image)
        net: Any = student.encoder.get_submodule("net")
        theirs = net((image - student.mean) / student.std)
    assert [tuple(m.shape[2:]) for m in found] == [(side // m.stride_px,) * 2 for m in student.maps]
    assert all(torch.equal(mine, other.permute(0, 3, 1, 2)) for mine, other in zip(found, theirs, strict=True))


def test_tokens_of_channels_last_encoders_lie_where_those_of_channels_first_do() -> None:
    # patches of 4 px, merged two by two: centres in the middle of the cells, whatever the order of the axes
    for encoder in ("timm:swin_tiny_patch4_window7_224", "timm:test_convnext"):
        with torch.device("meta"):
            maps = load_encoder(StudentConfig(encoder=encoder)).maps
        assert [(m.stride_px, m.offset_px) for m in maps] == [(4, 2), (8, 4), (16, 8), (32, 16)]


def test_an_encoder_of_one_size_says_so() -> None:
    student = build_student(StudentConfig(encoder="timm:test_vit_relpos", channels=8), 2).eval()
    net: Any = student.encoder.get_submodule("net")
    side: int = net.patch_embed.img_size[0]
    assert student(torch.rand(1, 3, side, side)).shape == (1, 2, side, side)
    with pytest.raises(UsageError, match=f"images of {side}x{side} px only, found 32x64; set crop_px"):
        student(torch.rand(1, 3, 32, 64))
    with pytest.raises(UsageError, match=r"images of one size .*; take one for all sizes"):
        build_student(StudentConfig(encoder="timm:test_maxvit"), 2)


@pytest.mark.parametrize("encoder", ["timm:test_convnext", "timm:test_vit"], ids=["stages", "tokens"])
def test_a_weights_file_fills_the_encoder(encoder: str, tmp_path: Path) -> None:
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


def shapes_of(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in timm.create_model(name, num_classes=0).state_dict().items()}


def write_random(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    tensors = {k: torch.randn(shape, generator=made) * 0.02 for k, shape in shapes.items()}
    torch.save(tensors, path)
    return tensors


def test_a_released_dinov2_file_fills_the_encoder(tmp_path: Path) -> None:
    # names and shapes of the published dinov2_vits14_pretrain.pth: timm's, and a mask token
    shapes = shapes_of("vit_small_patch14_dinov2")
    assert shapes["pos_embed"] == (1, 37 * 37 + 1, 384) and "blocks.0.mlp.fc1.weight" in shapes
    file = write_random(tmp_path / "w.pth", {"mask_token": torch.Size([1, 384]), **shapes})
    config = StudentConfig(encoder="dinov2_vits14", decoder="dpt", channels=8, weights=tmp_path / "w.pth")
    found = build_student(config, 2).encoder.get_submodule("net").state_dict()
    assert found.keys() == shapes.keys()
    assert all(torch.equal(found[k], file[k]) for k in found)


def test_a_released_dinov3_file_fills_the_encoder(tmp_path: Path) -> None:
    timms = shapes_of(DINOV3)
    names = {k: k.replace("gamma_", "ls").replace("reg_token", "storage_tokens") for k in timms if "_bias" not in k}
    names = {k: f"{v}.gamma" if v.endswith(("ls1", "ls2")) else v for k, v in names.items()}
    theirs = {names[k]: timms[k] for k in names}
    theirs |= {f"blocks.{i}.attn.qkv.bias": torch.Size([3 * 192]) for i in range(12)}
    theirs |= {f"blocks.{i}.attn.qkv.bias_mask": torch.Size([3 * 192]) for i in range(12)}
    theirs |= {"mask_token": torch.Size([1, 192]), "rope_embed.periods": torch.Size([16])}
    file = write_random(tmp_path / "w.pth", theirs)
    config = StudentConfig(encoder=f"timm:{DINOV3}", channels=8, weights=tmp_path / "w.pth")
    found = build_student(config, 2).encoder.get_submodule("net").state_dict()
    assert all(torch.equal(found[k], file[names[k]]) for k in names)
    bias = file["blocks.7.attn.qkv.bias"]
    assert torch.equal(found["blocks.7.attn.q_bias"], bias[:192])
    assert torch.equal(found["blocks.7.attn.v_bias"], bias[-192:])


def test_released_weights_of_another_size_are_refused_by_shape(tmp_path: Path) -> None:
    shapes = shapes_of("vit_tiny_patch16_224")
    write_random(
        tmp_path / "w.pth", shapes | {"pos_embed": torch.Size([1, 257, 192]), "mask_token": torch.Size([1, 192])}
    )
    expected = r"1 tensors differ: pos_embed: \(1, 257, 192\) \(file\) != \(1, 197, 192\) \(encoder\)"
    with pytest.raises(MismatchError, match=expected):
        build_student(StudentConfig(encoder=VIT, weights=tmp_path / "w.pth"), 2)


def test_biases_that_the_encoder_lacks_are_refused_unless_they_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    config = StudentConfig(encoder="timm:test_vit", channels=8, weights=path)
    tensors = write_random(path, shapes_of("test_vit"))
    torch.save(tensors | {"blocks.0.attn.q_bias": torch.zeros(64)}, path)
    build_student(config, 2)
    torch.save(tensors | {"blocks.0.attn.q_bias": torch.ones(64)}, path)
    with pytest.raises(MismatchError, match=r"q_bias: the encoder has none \(timm:test_vit_qkvb has\)"):
        build_student(config, 2)


def test_weights_out_of_reach_name_the_way_out() -> None:
    # timm publishes no weights of this variant, so no network is touched
    config = StudentConfig(encoder="timm:convnext_atto_rms", channels=8, pretrained=True)
    with pytest.raises(ResourceError, match=r"student\.weights=FILE"):
        build_student(config, 3)
    assert build_student(config, 3, load_weights=False).classes == 3


def test_tokens_of_a_rotary_vit_come_without_prefix_and_in_their_places() -> None:
    encoder = student_of("dinov3-dpt").eval().encoder
    net: Any = encoder.get_submodule("net")
    assert net.num_prefix_tokens == 5 and net.rope is not None
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        last = encoder(image)[-1]
        tokens = net.forward_features(image)[:, 5:]
    assert torch.allclose(last.flatten(2).transpose(1, 2), tokens, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit-dpt", "dinov3-dpt"])
def test_attention_is_torchs_fused_one(kind: str) -> None:
    class Seen(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is F.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    student = student_of(kind).eval()
    with torch.inference_mode(), Seen() as seen:
        student(torch.rand(1, 3, 32, 32))
    blocks: Any = student.encoder.get_submodule("net.blocks")
    assert seen.calls == len(blocks)


MAPS = [MapSpec(6, 14)] * 4


def test_dpt_takes_a_pyramid_as_it_is_and_gives_logits_at_half_of_its_first_stride() -> None:
    head = DptDecoder([MapSpec(2 + i, 4 << i) for i in range(4)], 2, features=4)
    seen: list[torch.Size] = []
    head.scratch.get_submodule("output_conv").register_forward_hook(lambda m, args, result: seen.append(result.shape))
    logits = head([torch.rand(1, 2 + i, 16 >> i, 24 >> i) for i in range(4)], (64, 96))
    assert seen == [torch.Size([1, 2, 32, 48])] and logits.shape == (1, 2, 64, 96)
    assert not any(k.startswith(("projects", "resize_layers")) for k in head.state_dict())


@pytest.mark.parametrize("strides", [(16, 16, 16), (4, 8, 16), (4, 8, 16, 16)], ids=str)
def test_dpt_refuses_maps_it_cannot_fuse(strides: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"found strides .*; set student\.decoder: fpn"):
        DptDecoder([MapSpec(4, s) for s in strides], 2)


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
