"""Weights and images that are formulas: those that the golden numbers of the released RS-MTDF were recorded with."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmtdf_cache import teachers
from rsmtdf_cache.teachers._dense import DenseTeacher
from rsmtdf_cache.teachers.base import TeacherRequest

SIDE = 518


def formula_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the reference weights: a function of the name and the shape alone."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name or ".ln_" in name or name.startswith("ln_"):
        x = 1 + 0.1 * x if leaf == "weight" else 0.1 * x
    elif leaf == "gamma":
        x = 0.5 + 0.1 * x
    elif leaf in ("pos_embed", "cls_token", "class_embedding", "positional_embedding"):
        x = 0.5 * x
    elif leaf == "bias" or leaf.endswith("_bias"):
        x = 0.02 * x
    elif len(shape) > 1:
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.02 * x
    return torch.from_numpy(x.astype(np.float32))


def fill(network: nn.Module, prefix: str) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(formula_weight(prefix + name, tuple(parameter.shape)))


@cache
def formula_images(seed: int, batch: int) -> Tensor:
    """Return the reference images ``[batch, 3, 518, 518]`` uint8: their values are whole numbers."""
    noise = np.random.RandomState(seed).uniform(0, 255, (batch, SIDE // 7, SIDE // 7, 3)).astype(np.float32)
    # With one thread torch rounds a few values to the other side of a half: another image, and logits 2e-4 away.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        image = F.interpolate(torch.from_numpy(noise).permute(0, 3, 1, 2), size=(SIDE, SIDE), mode="bilinear")
    finally:
        torch.set_num_threads(threads)
    return image.round().clamp(0, 255).to(torch.uint8).contiguous()


def dinov2_teacher() -> DenseTeacher:
    teacher = teachers.load(TeacherRequest("dinov2_vitb14_paper", "none", layers=("block11",)))
    assert isinstance(teacher, DenseTeacher)
    fill(teacher.network, "dinov2_vitb14.")
    return teacher


def clip_teacher() -> DenseTeacher:
    from rsmtdf_cache.teachers.clip import ClipTeacher, image_tower

    with torch.device("meta"):  # spares the random start of 304 M parameters
        tower = image_tower("ViT-L-14-quickgelu")
    tower = tower.to_empty(device="cpu")
    fill(tower, "clip_vitl14.visual.")
    request = TeacherRequest("clip_vitl14_paper", layers=("block23",))
    return ClipTeacher(request, tower, "formula", torch.device("cpu"))
