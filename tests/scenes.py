"""Scenes as GeoTIFF files, and students of a known receptive field, for the tests of maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import yaml
from numpy.typing import NDArray
from rasterio.transform import Affine
from torch import Tensor, nn

from rsmtdf_cache.sources.base import ClassInfo
from rsmtdf_train.checkpoint import RunFolder, RunIdentity, save_deployed
from rsmtdf_train.fused_student import FusedStudent, build_fused_student
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.scenes.request import Segmenter
from rsmtdf_train.students.base import Decoder, Encoder, MapSpec, Student

__all__ = ["CLASSES", "PLACE", "blobs", "local_segmenter", "save_run", "write_scene"]

CLASSES = (
    ClassInfo("water", (10, 20, 200)),
    ClassInfo("tree & shrub", (0, 120, 0)),
    ClassInfo("Straße", (200, 90, 0)),
)
#: Half a metre a pixel, north up, in UTM zone 33 N.
PLACE = Affine(0.5, 0.0, 390000.0, 0.0, -0.5, 5820000.0)


def blobs(height: int, width: int, seed: int = 0, bands: int = 3) -> NDArray[np.uint8]:
    """Return ``[bands, height, width]`` uint8 of smooth random colours."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, bands, height // 8 + 2, width // 8 + 2)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    pixels: NDArray[np.uint8] = smooth[0].round().to(torch.uint8).numpy()
    return pixels


def write_scene(path: Path, pixels: NDArray[Any], **profile: Any) -> Path:
    """Write ``[bands, height, width]`` as a GeoTIFF of their type; ``PLACE`` and UTM unless told otherwise."""
    bands, height, width = pixels.shape
    settings = {"crs": "EPSG:32633", "transform": PLACE, **profile}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=pixels.dtype, **settings
    ) as file:
        file.write(pixels)
    return path


class _Colors(Encoder):
    """The pixels themselves, averaged over ``stride``, then convolved: it sees ``radius`` pixels of ``stride`` far."""

    def __init__(self, stride: int, radius: int) -> None:
        super().__init__()
        self.maps = (MapSpec(6, stride),)
        self.mean, self.std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
        self.pool = nn.AvgPool2d(stride)
        self.mix = nn.Conv2d(3, 6, 2 * radius + 1, padding=radius)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        return [torch.tanh(self.mix(self.pool(image_B3HW)))]


class _Head(Decoder):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, maps_BDhw: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return nn.functional.interpolate(self.head(maps_BDhw[0]), size=size, mode="nearest")


def _identity(crop_px: int, encoder: str = "timm:mobilenetv3_small_050", decoder: str = "fpn") -> RunIdentity:
    recipe = Recipe.model_validate({
        "name": "tiny", "data": "nowhere", "crop_px": crop_px, "method": "supervised", "targets": "none",
        "distill": False, "fuse": False, "student": {"encoder": encoder, "decoder": decoder, "channels": 16},
    })  # fmt: skip
    return RunIdentity(recipe, None, CLASSES, 255, ())


def local_segmenter(stride: int = 1, radius: int = 0, crop_px: int = 32) -> Segmenter:
    """Return a student of random weights that sees no farther than ``radius * stride`` pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        student = Student(_Colors(stride, radius), _Head(len(CLASSES)), len(CLASSES))
        for weights in student.parameters():
            nn.init.normal_(weights)
    model = FusedStudent(student, None).eval().requires_grad_(False)
    return Segmenter(model, _identity(crop_px), "0" * 64)


def save_run(root: Path, seed: int = 0, crop_px: int = 64, **student: str) -> Path:
    """Write a run folder as training leaves it, with a seeded student, of stride 32 by default; return it."""
    identity = _identity(crop_px, **student)
    recipe = identity.recipe.model_copy(update={"seed": seed})
    identity = RunIdentity(recipe, None, CLASSES, 255, ())
    folder = RunFolder(root)
    root.mkdir()
    folder.recipe.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    model = build_fused_student(recipe, len(CLASSES), (), load_weights=False)
    _spread(model, crop_px if student else 256)
    save_deployed(folder.deployed("ema"), model, identity, "ema", 1)
    return root


@torch.no_grad()
def _spread(model: FusedStudent, side: int) -> None:
    """Fit statistics and the last bias to an image: a network as it is born says one class everywhere."""
    image = torch.from_numpy(blobs(256, 256, seed=9))[None, :, :side, :side].float() / 255
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    model(image)
    model.eval()
    head = [m for m in model.student.decoder.modules() if isinstance(m, nn.Conv2d)][-1]
    assert head.bias is not None and head.out_channels == len(CLASSES)
    head.bias -= model(image).mean((0, 2, 3))
