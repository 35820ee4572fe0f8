"""Decoders of segmentation_models_pytorch: the same numbers as in its own models, clear words where they do not fit.

What they keep as parts of a student is in ``tests/contract/test_students.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rsmtdf_cache.errors import ResourceError, UsageError
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import MapSpec, build_student
from rsmtdf_train.students.smp import SmpDecoder

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (smp.Unet, {}),
    "unetplusplus": (smp.UnetPlusPlus, {}),
    "linknet": (smp.Linknet, {}),
    "manet": (smp.MAnet, {}),
    "fpn": (smp.FPN, {}),
    "pan": (smp.PAN, {}),
    "deeplabv3": (smp.DeepLabV3, {}),
    "deeplabv3plus": (smp.DeepLabV3Plus, {}),
    "pspnet": (smp.PSPNet, {"encoder_depth": 5, "output_stride": 8}),
    "upernet": (smp.UPerNet, {}),
    "segformer": (smp.Segformer, {"encoder_name": "tu-test_convnext"}),  # without stride 2, like the paper's encoder
    # narrower than its default, which is large
    "dpt": (smp.DPT, {"encoder_name": "tu-test_vit", "decoder_readout": "ignore", "dynamic_img_size": True,
                      "decoder_fusion_channels": 32, "decoder_intermediate_channels": (32, 64, 128, 128)}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_a_decoder_of_default_width_computes_what_smps_model_computes(name: str) -> None:
    make, options = MODELS[name]
    torch.manual_seed(0)
    model: Any = make(
        **{"encoder_name": "tu-test_efficientnet", "encoder_weights": None, "classes": 3} | options
    ).eval()
    side = 128 if name == "pan" else 64
    image = torch.rand(1, 3, side, side)
    with torch.inference_mode():
        expected = model(image)
        features = model.encoder(image)
        maps: list[Tensor] = features[0] if name == "dpt" else features[1:]
        if name not in ("unet", "unetplusplus", "linknet", "manet", "dpt"):
            maps = maps[1:]  # not made for stride 2
        width = 8 if name == "dpt" else 64
        decoder = SmpDecoder(name, [MapSpec(m.shape[1], side // m.shape[-1]) for m in maps], 3, width).eval()
        decoder.net.load_state_dict(model.decoder.state_dict())
        head = model.segmentation_head.head if name == "dpt" else model.segmentation_head
        decoder.head.load_state_dict(head.state_dict())
        found = decoder(maps, (side, side))
    assert found.std() > 0
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_vits_odd_grid_is_taken(name: str) -> None:
    decoder = SmpDecoder(name, [MapSpec(8, 14)] * 4, 2, width=16).eval()
    with torch.inference_mode():
        assert decoder([torch.rand(1, 8, 9, 11) for _ in range(4)], (126, 154)).shape == (1, 2, 126, 154)


def test_a_vits_levels_lie_over_each_other() -> None:
    # a bright token in one corner must brighten that corner of every level, and no other
    decoder = SmpDecoder("fpn", [MapSpec(8, 16)] * 4, 2, width=16)
    single = torch.zeros(1, 8, 6, 6)
    single[..., 0, 5] = 1
    torch.nn.init.zeros_(decoder.laterals[0].bias)  # type: ignore[arg-type]
    for level, factor in zip(decoder._pyramid([single] * 4), (4, 2, 1, 0.5), strict=True):
        assert level.shape[-1] == 6 * factor
        bright = (level - level[..., -1:, :1]).abs().sum(1)[0]
        assert bright[0, -1] == bright.max() > 0 and bright[0, 0] == bright[-1, -1] == 0


def test_other_names_of_a_decoder_and_unknown_ones() -> None:
    assert SmpDecoder("unet++", [MapSpec(4, 16)] * 4, 2).name == "unetplusplus"
    assert SmpDecoder("deeplabv3+", [MapSpec(4, 16)] * 4, 2).name == "deeplabv3plus"
    config = StudentConfig(encoder="timm:test_resnet", decoder="smp:unett")
    with pytest.raises(
        UsageError, match=r"smp:unett: no decoder of this name. Did you mean 'unet'\?.* Known: smp:deep"
    ):
        build_student(config, 2)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)  # what import finds when it is not there
    with pytest.raises(ResourceError, match=r"pip install 'rsmtdf\[smp\]'"):
        SmpDecoder("unet", [MapSpec(4, 16)] * 4, 2)


def test_an_encoder_that_cannot_end_where_the_decoder_needs_it_is_refused() -> None:
    with pytest.raises(UsageError, match="reads a map of stride 8, and timm cannot end this encoder there"):
        build_student(StudentConfig(encoder="timm:test_maxvit", decoder="smp:deeplabv3"), 2)


def test_maps_of_other_strides_are_refused() -> None:
    maps = [MapSpec(4, 4), MapSpec(4, 8), MapSpec(4, 16)]
    with pytest.raises(UsageError, match=r"needs maps of strides 4, 8, 16, 32 \(or a ViT's four\), found 4, 8, 16"):
        SmpDecoder("unet", maps, 2)


def test_sizes_that_a_decoder_cannot_take_are_refused_in_words() -> None:
    vit = [MapSpec(8, 16)] * 4
    with pytest.raises(UsageError, match="must be a multiple of 16, found 24"):
        SmpDecoder("fpn", vit, 2, width=24)
    small = [torch.rand(1, 8, 7, 7)] * 4
    with pytest.raises(UsageError, match=r"needs 8 tokens on a side, found 7x7 for an image of 112x112 px"):
        SmpDecoder("pan", vit, 2).eval()(small, (112, 112))
    decoder = SmpDecoder("upernet", vit, 2, width=4)
    with pytest.raises(UsageError, match=r"cannot train on one crop; set batch\.labeled"):
        decoder.train()(small, (112, 112))
    assert decoder.eval()(small, (112, 112)).shape == (1, 2, 112, 112)
