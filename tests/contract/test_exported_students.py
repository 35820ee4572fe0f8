"""Every kind of student, with and without fusion, as an ONNX file: what it says at sizes the exporter did not see."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_train.export.agreement import compare, sizes_to_compare
from rsmtdf_train.export.conversion import OPSETS, convert, described
from rsmtdf_train.export.portable import example_px, least_px
from rsmtdf_train.fused_student import FusedStudent
from rsmtdf_train.fusion import TargetShape, TeacherFusion
from rsmtdf_train.sections import DistillConfig, FuseConfig, StudentConfig
from rsmtdf_train.students.base import Decoder, Student, build_student
from tests.students import KINDS, build, student_of

pytestmark = pytest.mark.usefixtures("one_thread")

#: Batch, height, width: even and odd grids of either side at strides 16 and 32, whole and cut tokens.
SIZES = [(1, 128, 128), (3, 130, 161), (1, 193, 113)]


def scaled(student: Student, side: int = 160) -> Student:
    """Return a copy whose logits have a deviation of 3: networks as they are born say a class at 100 %, or nothing."""
    made = deepcopy(student).eval().requires_grad_(False)
    head = [m for m in made.decoder.modules() if isinstance(m, nn.Conv2d) and m.out_channels == made.classes][-1]
    with torch.no_grad():
        logits = made(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(4)))
        head.weight *= 3 / logits.std()
        if head.bias is not None:
            head.bias *= 3 / logits.std()
    return made


def differences(model: FusedStudent, sizes: list[tuple[int, int, int]] = SIZES, opset: int = OPSETS[0]) -> list[float]:
    content = described(convert(model, opset), 5, {})
    return [c.difference for c in compare(content, model, sizes, False)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_file_gives_what_the_student_gives_at_other_sizes(kind: str) -> None:
    model = FusedStudent(scaled(student_of(kind)), None)
    assert not {example_px(model), tuple(reversed(example_px(model)))} & {s[1:] for s in SIZES}
    assert max(differences(model)) <= 1e-4  # compare refuses more; here the claim itself


@pytest.mark.parametrize("kind", ["cnn-fpn", "vit-dpt", "vit-smp:unet"])
def test_images_that_are_resized_to_the_stride_are_resized_in_the_file(kind: str) -> None:
    assert max(differences(FusedStudent(scaled(student_of(kind)), None, "resize"))) <= 1e-4


FUSED: dict[str, tuple[list[tuple[Any, ...]], dict[str, Any], dict[str, Any]]] = {
    "pooled into a coarser map": ([("a/s/x", 24, 8.0), ("b/s/y", 40, 32.0)], {}, {"share": 0.2}),
    "several maps, learned gates": (
        [("a/s/x", 24, 8.0), ("b/s/y", 40, 16.0)],
        {"translator": "conv"},
        {"share": 0.3, "gate": "learned", "at": [0, 2, -1], "drop": 0.5},
    ),
    "a second pass": ([("a/s/x", 24, 14.0), ("b/s/y", 40, 32.0)], {"passes": {"b/*": 64}}, {"share": 0.2}),
}


@pytest.mark.parametrize("case", list(FUSED))
@pytest.mark.parametrize(("encoder", "decoder"), [("timm:lcnet_050", "fpn"), ("timm:test_vit", "dpt")])
def test_translators_and_fusion_are_folded_in(encoder: str, decoder: str, case: str) -> None:
    targets, distill, fuse = FUSED[case]
    torch.manual_seed(0)
    student = scaled(build_student(StudentConfig(encoder=encoder, decoder=decoder, channels=16), 5))
    shapes = [TargetShape(*target) for target in targets]
    fusion = TeacherFusion(
        student.maps,
        shapes,
        DistillConfig.model_validate({"hidden": 16, **distill}),
        FuseConfig.model_validate(fuse),
        0,
    )
    model = FusedStudent(student, fusion).eval().requires_grad_(False)
    assert max(differences(model)) <= 1e-4
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert (model(image) - FusedStudent(student, None)(image)).abs().max() > 1e-2, "fusion has no effect here"


@pytest.mark.parametrize("encoder", ["timm:test_mambaout", "timm:test_resnet"])
def test_other_encoders(encoder: str) -> None:
    torch.manual_seed(0)
    model = FusedStudent(scaled(build_student(StudentConfig(encoder=encoder, decoder="fpn", channels=16), 5)), None)
    assert max(differences(model, [(1, 256, 160), (2, 131, 192)])) <= 1e-4


@pytest.mark.parametrize("opset", OPSETS[1:])
def test_other_opsets(opset: int) -> None:
    assert max(differences(FusedStudent(scaled(student_of("vit-fpn")), None), SIZES[1:], opset)) <= 1e-4


def test_an_encoder_of_one_size_is_refused_and_exported_for_that_size() -> None:
    torch.manual_seed(0)
    student = build_student(StudentConfig(encoder="timm:test_vit_relpos", channels=8), 2).eval().requires_grad_(False)
    model = FusedStudent(scaled(student), None)
    with pytest.raises(UsageError, match=r"any size: .* reads images of 160x160 px only, found 80x112; --fixed PX"):
        convert(model, OPSETS[0])
    with pytest.raises(UsageError, match=r"--fixed 128: .* reads images of 160x160 px only"):
        convert(model, OPSETS[0], 128)
    found = compare(convert(model, OPSETS[0], 160), model, sizes_to_compare(160, 16, 1, 160), True)
    assert [c.batch for c in found] == [1, 3] and max(c.difference for c in found) <= 1e-4


class _Branches(Decoder):
    """Doubles the logits of large images: an ``if`` that an exporter decides once and for all."""

    def __init__(self, inner: Decoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        logits: Tensor = self.inner(maps_BDhw, size)
        return 2 * logits if size[1] > 200 else logits


class _Exotic(_Branches):
    """Uses an operator that ONNX has not."""

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        logits: Tensor = torch.special.i0(super().forward(maps_BDhw, size))
        return logits


def test_a_student_whose_graph_keeps_the_size_it_saw_is_found_out() -> None:
    student = scaled(student_of("cnn-fpn"))
    student.decoder = _Branches(student.decoder)
    model = FusedStudent(student, None)
    content = convert(model, OPSETS[0])
    assert example_px(model)[1] > 200
    assert compare(content, model, [(1, 64, 256)], False)[0].difference <= 1e-4
    with pytest.raises(MismatchError, match=r"at 1 x 64 x 128 px: by .*--fixed PX writes"):
        compare(content, model, [(1, 64, 256), (1, 64, 128)], False)


def test_an_operator_that_onnx_lacks_is_one_clear_error_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    student = scaled(student_of("cnn-fpn"))
    student.decoder = _Exotic(student.decoder)
    with pytest.raises(UsageError, match=r"cannot be written as ONNX .*aten::i0") as caught:
        convert(FusedStudent(student, None), OPSETS[0])
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_a_file_of_other_weights_and_a_file_that_kept_its_size_are_found_out() -> None:
    model, other = (FusedStudent(build("cnn-fpn", seed).eval().requires_grad_(False), None) for seed in (0, 1))
    with pytest.raises(MismatchError, match=r"differs from the student at 1 x 128 x 128 px: by .*nothing was written"):
        compare(convert(other, OPSETS[0]), model, SIZES, False)
    with pytest.raises(UsageError, match="cannot run this student at 3 x 130 x 161 px"):
        compare(convert(model, OPSETS[0], 128), model, SIZES, False)
    with pytest.raises(UsageError, match="cannot load this student"):
        compare(b"no graph", model, SIZES, False)


@pytest.mark.parametrize(
    ("crop", "multiple", "least"), [(128, 32, 1), (160, 32, 1), (518, 14, 1), (128, 16, 113), (32, 32, 1), (64, 1, 1)]
)
def test_the_sizes_that_are_compared_are_of_all_kinds(crop: int, multiple: int, least: int) -> None:
    sizes = sizes_to_compare(crop, multiple, least, None)
    grids = [(-(-h // multiple), -(-w // multiple)) for _, h, w in sizes]
    assert sizes[0] == (1, crop, crop) and len(set(sizes)) == len(sizes) and max(s[0] for s in sizes) > 1
    assert {g[0] % 2 for g in grids} == {g[1] % 2 for g in grids} == {0, 1}
    assert any(h > w for h, w in grids) and any(w > h for h, w in grids)
    assert multiple == 1 or any(h % multiple and w % multiple for _, h, w in sizes)
    assert min(min(h, w) for _, h, w in sizes) >= least


def test_the_least_side_of_a_decoder_that_needs_tokens_is_exact_in_the_file_too() -> None:
    model = FusedStudent(scaled(student_of("cnn-smp:pan")), None)
    least = least_px(model)
    assert max(differences(model, [(1, least, least), (2, least + 1, 150)])) <= 1e-4
