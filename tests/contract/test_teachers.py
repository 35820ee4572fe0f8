"""Every teacher keeps the contract of ``teachers/base.py``, and its tokens lie where its spec says."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmtdf_cache import teachers
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.receptive import map_geometry, meta_copy
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import EncodingSpec, FeatureKey, FeatureSpec, LayerSpec, PixelSpec, TeacherSpec, ViewSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers._dense import PAPER_PIXELS, DenseTeacher
from rsmtdf_cache.teachers.base import TeacherRequest
from rsmtdf_cache.views import base_size_px, lattice_px
from tests.datasets import make_tile, write_dataset
from tests.teachers import MeanTeacher

#: Request, two view sizes for tiles of 64 px (one resizes, CLIP's and the transformer's native grids are left too).
SUITE = {
    "efficientnet_lite0": (TeacherRequest("efficientnet_lite0"), (64, 128)),
    "efficientnet_lite2": (TeacherRequest("efficientnet_lite2"), (64, 32)),
    "resnet18": (TeacherRequest("timm:resnet18", "none"), (64, 96)),
    "vit_tiny": (TeacherRequest("timm:vit_tiny_patch16_224", "none"), (64, 128)),
    "dinov2_vits14": (TeacherRequest("dinov2_vits14", "none"), (56, 112)),
    "dinov2_vits14_reg": (TeacherRequest("dinov2_vits14_reg", "none"), (56, 84)),
    "clip_vitb32": (TeacherRequest("clip_vitb32", "none"), (64, 128)),
}
OTHERS = {
    "dinov2_vits14_paper": TeacherRequest("dinov2_vits14_paper", "none"),
    "resnetblur18": TeacherRequest("timm:resnetblur18", "none"),
    "convnext": TeacherRequest("timm:convnext_atto", "none"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def built(name: str) -> DenseTeacher:
    teacher = teachers.load(SUITE[name][0] if name in SUITE else OTHERS[name])
    assert isinstance(teacher, DenseTeacher)
    return teacher


def tiles(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """Smooth random tiles: coarse noise enlarged, as real pictures have neighbours alike."""
    noise = np.random.default_rng(seed).uniform(0, 255, (count, 3, side // 8, side // 8)).astype(np.float32)
    big = F.interpolate(torch.from_numpy(noise), size=(side, side), mode="bilinear")
    return big.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("name", SUITE)
def test_shapes_and_dtype_are_what_the_spec_says_at_two_sizes(name: str) -> None:
    teacher = built(name)
    for size in SUITE[name][1]:
        specs = teacher.layer_specs(teacher.layer_names, size)
        maps = teacher.encode(tiles(2), size, teacher.layer_names)
        assert list(maps) == list(teacher.layer_names) == [spec.name for spec in specs]
        for spec in specs:
            tokens = maps[spec.name]
            assert tuple(tokens.shape) == (2, *teacher.grid(spec.name, size), spec.channels)
            assert teacher.grid(spec.name, size) == (size // spec.stride_px, size // spec.stride_px)
            assert tokens.dtype == torch.float32 and tokens.is_contiguous() and bool(tokens.isfinite().all())
            assert float(tokens.std()) > 0
    assert set(teacher.default_layers) <= set(teacher.layer_names) and len(teacher.default_layers) >= 2
    assert FeatureKey.parse(f"{teacher.spec.name}/s64o0/{teacher.layer_names[0]}").teacher == teacher.spec.name


@pytest.mark.parametrize("name", SUITE)
def test_a_teacher_is_frozen_in_eval_mode_and_gives_no_gradient(name: str) -> None:
    teacher = built(name)
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    maps = teacher.encode(tiles(2), SUITE[name][1][0], teacher.default_layers)
    assert not any(m.requires_grad for m in maps.values())
    assert all(torch.equal(before[k], v) for k, v in teacher.network.state_dict().items())


@pytest.mark.parametrize("name", SUITE)
def test_encoding_is_deterministic_and_leaves_the_random_state_alone(name: str) -> None:
    teacher, size = built(name), SUITE[name][1][0]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = teacher.encode(tiles(3), size, teacher.default_layers)
    second = teacher.encode(tiles(3), size, teacher.default_layers)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[layer], second[layer]) for layer in first)


@pytest.mark.parametrize("name", SUITE)
def test_the_place_in_the_batch_and_the_layers_asked_beside_do_not_change_a_tile(name: str) -> None:
    teacher, size = built(name), SUITE[name][1][0]
    batch, alone = tiles(3), tiles(3)[2:]
    together = teacher.encode(batch, size, teacher.layer_names)
    moved = teacher.encode(batch.flip(0), size, teacher.layer_names)
    for layer in (teacher.layer_names[0], teacher.layer_names[-1]):
        single = teacher.encode(alone, size, [layer])[layer]
        scale = float(single.abs().max())
        assert float((together[layer][2:] - single).abs().max()) <= 1e-4 * scale
        assert float((moved[layer][:1] - single).abs().max()) <= 1e-4 * scale
        # The other tiles differ, so that the comparison above could fail.
        assert float((together[layer][:1] - single).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("name", ["efficientnet_lite0", "vit_tiny"])
def test_bfloat16_autocast_stays_close_and_returns_float32(name: str) -> None:
    teacher, size = built(name), 64
    layer = teacher.default_layers[0]
    exact = teacher.encode(tiles(2), size, [layer])[layer]
    coarse = teacher.encode(tiles(2), size, [layer], "bfloat16")[layer]
    assert coarse.dtype == torch.float32 and not torch.equal(exact, coarse)
    assert float(F.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0)) > 0.99


@pytest.mark.parametrize("name", SUITE)
def test_only_square_uint8_rgb_tiles_are_taken(name: str) -> None:
    teacher, size = built(name), SUITE[name][1][0]
    for wrong in (tiles(1).float(), tiles(1).permute(0, 3, 1, 2), tiles(1)[0], tiles(1)[:, :32]):
        with pytest.raises(TypeError, match="uint8"):
            teacher.encode(wrong, size, teacher.default_layers)


@pytest.mark.parametrize("name", SUITE)
def test_sizes_off_the_patch_grid_and_unknown_layers_are_usage_errors(name: str) -> None:
    teacher = built(name)
    patch = teacher.spec.patch_px
    for size in (patch + 1, 0, patch // 2):
        with pytest.raises(UsageError, match="multiple of its"):
            teacher.layer_specs(teacher.default_layers, size)
        with pytest.raises(UsageError, match="multiple of its"):
            teacher.encode(tiles(1), size, teacher.default_layers)
    wrong = teacher.layer_names[0].replace("0", "O").replace("1", "l")
    with pytest.raises(UsageError, match="Did you mean") as caught:
        teacher.encode(tiles(1), patch, [wrong])
    assert all(layer in str(caught.value) for layer in teacher.layer_names)


def test_bicubic_overshoot_is_clamped_to_the_range_of_a_pixel() -> None:
    teacher = built("efficientnet_lite0")
    edge = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    edge[:, :, 32:] = 255
    images = teacher.normalised(edge, 128)
    assert float(images.min()) == -1.0 and float(images.max()) == 1.0  # mean and std are 0.5
    free = F.interpolate(edge.permute(0, 3, 1, 2).float(), size=128, mode="bicubic", antialias=True)
    assert float(free.max()) > 255 and float(free.min()) < 0


# --- where the tokens lie ------------------------------------------------------------------------------------------


def averaging(network: nn.Module) -> nn.Module:
    """Make ``network`` linear with positive, uniform kernels: a token then is a mean around its centre."""
    for parent in list(network.modules()):
        for key, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d):
                with torch.no_grad():
                    module.weight.fill_(1.0 / module.weight[0].numel())
                    if module.bias is not None:
                        module.bias.zero_()
            elif isinstance(module, nn.MaxPool2d):
                pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
                setattr(parent, key, pool)
            elif isinstance(module, (nn.ReLU, nn.ReLU6, nn.BatchNorm2d)):
                setattr(parent, key, nn.Identity())
    return network.double()


@pytest.mark.parametrize("width", [1280, 1312])
@pytest.mark.parametrize("name", ["resnet18", "resnetblur18", "efficientnet_lite0"])
def test_token_centres_measured_with_an_averaging_network_are_those_of_the_spec(name: str, width: int) -> None:
    teacher = built(name)
    network: Any = averaging(copy.deepcopy(teacher.network))
    # A strip, wide enough for tokens whose whole field lies in the image; rows do not matter to the place of a column.
    columns = (torch.arange(width, dtype=torch.float64) + 0.5).expand(1, 3, 32, width)
    with torch.inference_mode():
        weighted = network.forward_intermediates(columns, output_fmt="NCHW", intermediates_only=True)
        ones = network.forward_intermediates(torch.ones_like(columns), output_fmt="NCHW", intermediates_only=True)
    for i, spec in enumerate(teacher.layer_specs(teacher.layer_names, width)):
        total = ones[i][0, 0, 0]
        inside = total > total.max() * (1 - 1e-10)  # padding took nothing from these means
        assert int(inside.sum()) >= 2
        measured = (weighted[i][0, 0, 0] / total)[inside]
        expected = (spec.offset_px + spec.stride_px * torch.arange(len(total), dtype=torch.float64))[inside]
        torch.testing.assert_close(measured, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "offset"), [("efficientnet_lite0", 31.5), ("resnet18", 0.5), ("convnext", 16.0)])
def test_the_offset_at_stride_32_follows_the_padding_rule_of_the_network(name: str, offset: float) -> None:
    teacher = built(name)
    assert teacher.layer_specs([teacher.layer_names[-1]], 256)[0].offset_px == offset


def test_offsets_of_same_padding_depend_on_the_parity_of_the_side() -> None:
    network: Any = meta_copy(built("efficientnet_lite0").network)

    def run(image: Tensor) -> list[Tensor]:
        return list(network.forward_intermediates(image, output_fmt="NCHW", intermediates_only=True))

    centres = {side: map_geometry(run, side)[1][0].centre + 0.5 for side in (64, 65)}
    assert centres == {64: 1.5, 65: 0.5}  # stride 2, kernel 3: one padded column, on the right or on both sides


def without_blocks(teacher: DenseTeacher) -> DenseTeacher:
    """Silence attention and MLP: what is left of a transformer is its patch embedding."""
    with torch.no_grad():
        for name, parameter in teacher.network.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight", "attn.out_proj.weight", "mlp.c_proj.weight")):
                parameter.zero_()
    return teacher


@pytest.mark.parametrize("name", ["vit_tiny", "dinov2_vits14", "dinov2_vits14_reg", "clip_vitb32"])
def test_a_token_of_a_transformer_depends_on_exactly_the_cell_around_its_recorded_centre(name: str) -> None:
    teacher = without_blocks(copy.deepcopy(built(name)))
    size = teacher.spec.patch_px * 4
    layer = teacher.layer_names[-1]
    (spec,) = teacher.layer_specs([layer], size)
    base = tiles(1, size // 8 * 8)[:, :size, :size]
    before = teacher.encode(base, size, [layer])[layer][0]
    for row, column in ((0, 0), (1, 2), (3, 1)):
        y, x = (int(spec.offset_px + i * spec.stride_px - spec.stride_px / 2) for i in (row, column))
        cell = torch.zeros(size, size, dtype=torch.bool)
        cell[y : y + spec.stride_px, x : x + spec.stride_px] = True
        inside, outside = base.clone(), base.clone()
        inside[0, cell] = 255 - inside[0, cell]
        outside[0, ~cell] = 255 - outside[0, ~cell]
        changed = (teacher.encode(inside, size, [layer])[layer][0] - before).abs().amax(-1) > 1e-4
        kept = (teacher.encode(outside, size, [layer])[layer][0] - before).abs().amax(-1) <= 1e-4
        only = torch.zeros_like(changed)
        only[row, column] = True
        assert torch.equal(changed, only) and torch.equal(kept, only)


def test_default_views_of_the_families_share_the_lattice_of_a_tile() -> None:
    assert base_size_px(built("dinov2_vits14").spec, 512) == 448
    assert base_size_px(built("efficientnet_lite0").spec, 256) == 256
    assert base_size_px(built("resnet18").spec, 512) == 512


# --- views as the released RS-MTDF makes them ------------------------------------------------------------------------


class Cells(DenseTeacher):
    """Mean RGB (0..255) of cells of 14 view pixels: pixels go in as every network's do."""

    def __init__(self, pixel: PixelSpec) -> None:
        spec = TeacherSpec(
            name="cells", family="timm", architecture="mean", weights="0" * 64, weights_origin="no weights",
            patch_px=14, native_px=112, prefix_tokens=0, norm=False,
            pixel=pixel.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}),
        )  # fmt: skip
        super().__init__(spec, nn.AvgPool2d(14), ["cells"], ["cells"], torch.device("cpu"))

    def forward_normalised(self, images_B3SS: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        return {"cells": self.network(images_B3SS).permute(0, 2, 3, 1)}

    def _specs_at(self, size_px: int) -> dict[str, LayerSpec]:
        return {"cells": LayerSpec(name="cells", channels=3, stride_px=14, offset_px=7)}


OWN_PIXELS = PixelSpec(mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize("size", [56, 112, 224])
@pytest.mark.parametrize("pixel", [PAPER_PIXELS, OWN_PIXELS], ids=["paper", "own"])
def test_a_network_that_tells_pixel_positions_has_its_tokens_where_the_spec_says(pixel: PixelSpec, size: int) -> None:
    teacher, side = Cells(pixel), 64
    places = (torch.arange(side) * 4).to(torch.uint8)
    tile = torch.stack([places.expand(side, side), places[:, None].expand(side, side), torch.zeros(side, side)], -1)
    found = teacher.encode(tile[None].to(torch.uint8), size, ["cells"])["cells"][0] / 4 + 0.5  # tile pixels
    (layer,) = teacher.layer_specs(["cells"], size)
    spec = FeatureSpec(
        teacher=teacher.spec, layer=layer, view=ViewSpec(size_px=size, orientation=0), encoding=EncodingSpec(),
        tile_px=side, grid=teacher.grid("cells", size),
    )  # fmt: skip
    inner = slice(0, None) if pixel.align_corners else slice(1, -1)  # half-pixel centres end before the border does
    expected = (spec.offset_tile_px + spec.stride_tile_px * torch.arange(size // 14))[inner]
    torch.testing.assert_close(found[inner, inner, 0], expected.expand(len(expected), -1), rtol=0, atol=2e-3)
    torch.testing.assert_close(found[inner, inner, 1], expected[:, None].expand(-1, len(expected)), rtol=0, atol=2e-3)
    other = spec.model_copy(update={"teacher": Cells(OWN_PIXELS if pixel is PAPER_PIXELS else PAPER_PIXELS).spec})
    assert abs(other.offset_tile_px - spec.offset_tile_px) > 0.01  # the other rule would have been noticed


def test_aligned_corners_keep_the_corner_pixels() -> None:
    tile = tiles(1, 64)
    view = Cells(PAPER_PIXELS).normalised(tile, 112)[0]  # mean 0, std 1 / 255: raw pixel values
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(view[:, y, x], tile[0, y, x].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tile_px", [256, 500, 512, 1024])
def test_paper_teachers_see_the_side_of_the_paper_whatever_the_tile_and_are_on_no_lattice(tile_px: int) -> None:
    assert {"dinov2_vitb14_paper", "clip_vitl14_paper"} <= set(teachers.names())
    spec = built("dinov2_vits14_paper").spec
    assert (spec.pixel, spec.positions, spec.native_px) == (PAPER_PIXELS, "released", 518)
    sides = [base_size_px(spec.model_copy(update={"native_px": side}), tile_px) for side in (518, 224)]
    assert sides == [518, 224]
    (layer,) = built("dinov2_vits14_paper").layer_specs(["block11"], 518)
    feature = FeatureSpec(
        teacher=spec, layer=layer, view=ViewSpec(size_px=518, orientation=0), encoding=EncodingSpec(),
        tile_px=tile_px, grid=(37, 37),
    )  # fmt: skip
    with pytest.raises(UsageError, match="is on no pixel lattice"):
        lattice_px([feature])


def test_the_names_of_the_paper_differ_from_the_plain_ones_in_pixels_and_positions_alone() -> None:
    plain, paper = (built(name).spec.to_json() for name in ("dinov2_vits14", "dinov2_vits14_paper"))
    assert {k for k in plain | paper if plain.get(k) != paper.get(k)} == {"name", "positions", "pixel"}
    tile, layer = tiles(1, 56), ["block11"]
    one, other = (built(name).encode(tile, 112, layer)["block11"] for name in ("dinov2_vits14", "dinov2_vits14_paper"))
    assert float((one - other).abs().max()) > 1e-2


# --- what is not a number --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_no_number_is_counted_and_refused_and_nothing_of_its_shard_stays(
    value: float, tmp_path: Path
) -> None:
    broken = True

    class Faulty(MeanTeacher):
        def encode(
            self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
        ) -> dict[str, Tensor]:
            maps = super().encode(tiles_BHW3, size_px, layers, precision)
            for i, tile in enumerate(tiles_BHW3):
                if broken and torch.equal(tile, bad):
                    maps["mean8"][i, 3, 2, 1] = value
            return maps

    def load(request: TeacherRequest, device: str = "cpu") -> MeanTeacher:
        return Faulty(request.name, "0" * 64)

    data = write_dataset(tmp_path / "data", tiles=6, splits={"train": range(6)})
    bad = torch.from_numpy(make_tile(4)[0])
    values = {"data": data, "teachers": ["mean"], "group_rows": 2, "threads": 1, "scales": (1.0,), "micro_batch": 2}
    request, whole = (BuildRequest.of({**values, "out": tmp_path / name}) for name in ("s", "whole"))
    with pytest.raises(DataError, match=r"mean8, tile 't004': 1 of 192 values are not finite") as caught:
        build_store(request, load_teacher=load)
    assert caught.value.exit_code == 3
    # Groups 0 and 1 were committed; of group 2 neither the faulty array nor its sound neighbour is there.
    assert {p.parents[2].name for p in (tmp_path / "s").rglob("c/*/0/0/0")} == {"0", "1"}
    assert not (tmp_path / "s" / "tmp").exists()
    assert (
        FeatureStore.open(tmp_path / "s").committed(FeatureKey.parse("mean/s64o0/mean16")).tolist()
        == [True] * 4 + [False] * 2
    )
    broken = False
    mended = build_store(request, load_teacher=load)
    assert mended.units == 1 and mended.snapshot == build_store(whole, load_teacher=load).snapshot


# --- names and imports ---------------------------------------------------------------------------------------------


def test_an_unknown_teacher_is_a_usage_error_with_a_guess_and_the_list() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'dinov2_vits14'\?") as caught:
        teachers.load(TeacherRequest("dinov2_vit14"))
    assert all(name in str(caught.value) for name in (*teachers.names(), "timm:NAME"))
    with pytest.raises(UsageError, match=r"Did you mean 'resnet18'\?"):
        teachers.load(TeacherRequest("timm:resnet81", "none"))
    with pytest.raises(UsageError, match="has no layer 'block99'"):
        teachers.load(TeacherRequest("clip_vitb32", "none", layers=("block99",)))
    with pytest.raises(UsageError, match="a1_in1k"):
        teachers.load(TeacherRequest("timm:resnet18.nothing", "none"))


def test_layers_of_the_request_become_the_default_layers() -> None:
    teacher = teachers.load(TeacherRequest("timm:resnet18.a1_in1k", "none", layers=("stage2",)))
    assert teacher.default_layers == ("stage2",)
    assert teacher.spec.name == "timm-resnet18.a1_in1k"


def test_a_network_of_one_size_refuses_other_sizes_and_says_which_it_takes() -> None:
    teacher = teachers.load(TeacherRequest("timm:levit_128s", "none"))
    assert [spec.stride_px for spec in teacher.layer_specs(teacher.layer_names, 224)] == [16, 32, 64]
    with pytest.raises(UsageError, match="224 px only"):
        teacher.layer_specs(teacher.layer_names, 256)


def test_listing_teachers_imports_no_network_and_loading_a_cnn_imports_no_open_clip() -> None:
    code = (
        "import sys, rsmtdf_cache.teachers as t; t.names();"
        "assert not {'torch', 'timm', 'open_clip'} & set(sys.modules), sorted(sys.modules);"
        "from rsmtdf_cache.teachers.base import TeacherRequest;"
        "t.load(TeacherRequest('timm:resnet18', 'none'));"
        "assert 'timm' in sys.modules and 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
