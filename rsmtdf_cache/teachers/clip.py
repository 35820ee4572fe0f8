"""CLIP image towers (Radford et al. 2021; LAION: Cherti et al. 2023) through open_clip.

Layers are the patch tokens after a block: before ``ln_post`` and the projection, as RS-MTDF distils them. Only the
image tower is ever built. ``clip_vitl14_paper`` sees pixels as that method's released code gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from rsmtdf_cache.positions import resample_positions
from rsmtdf_cache.specs import LayerSpec, PixelSpec, TeacherSpec
from rsmtdf_cache.teachers._dense import PAPER_PIXELS, DenseTeacher, build_quietly, spread_layers
from rsmtdf_cache.teachers._weights import hub_file, take_weights, weights_digest
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest

__all__ = ["ClipTeacher", "image_tower", "load"]

#: Teacher -> open_clip architecture and tag of its published weights. OpenAI trained with QuickGELU, LAION with GELU.
_MODELS = {
    "clip_vitb16": ("ViT-B-16-quickgelu", "openai"),
    "clip_vitb32": ("ViT-B-32-quickgelu", "openai"),
    "clip_vitl14": ("ViT-L-14-quickgelu", "openai"),
    "clip_vitl14_paper": ("ViT-L-14-quickgelu", "openai"),
    "clip_vitl14_336": ("ViT-L-14-336-quickgelu", "openai"),
    "clip_vitb16_laion": ("ViT-B-16", "laion2b_s34b_b88k"),
    "clip_vitb32_laion": ("ViT-B-32", "laion2b_s34b_b79k"),
    "clip_vitl14_laion": ("ViT-L-14", "laion2b_s32b_b82k"),
    "clip_vith14_laion": ("ViT-H-14", "laion2b_s32b_b79k"),
    "clip_vitg14_laion": ("ViT-g-14", "laion2b_s34b_b88k"),
    "clip_vitbigg14_laion": ("ViT-bigG-14", "laion2b_s39b_b160k"),
}


def load(request: TeacherRequest, device: torch.device) -> Teacher:
    """Return the image tower of the CLIP model ``request.name``; see ``rsmtdf_cache.teachers.load``.

    A weights file may hold OpenAI's or open_clip's state dict, whole or the image tower's part, with or without the
    prefix ``visual.``; OpenAI's own downloads are TorchScript archives and must be converted once.
    """
    architecture, tag = _MODELS[request.name]
    network = build_quietly(lambda: image_tower(architecture))

    def from_hub() -> tuple[Path, str]:
        published: str = open_clip.get_pretrained_cfg(architecture, tag)["hf_hub"]
        repository, _, filename = published.rpartition("/")
        names = [filename] if filename else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        return hub_file(request.name, repository, names), f"hub {repository}"

    origin = take_weights(request, network, from_hub, _image_part)
    return ClipTeacher(request, network, origin, device)


def _pixels(name: str) -> PixelSpec:
    if name.endswith("_paper"):
        return PAPER_PIXELS
    published: dict[str, Any] = open_clip.get_pretrained_cfg(*_MODELS[name])
    return PixelSpec(mean=tuple(published["mean"]), std=tuple(published["std"]))


def _image_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    visual = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    return visual or tensors


def image_tower(architecture: str) -> nn.Module:
    """Return the image tower of an open_clip architecture with its initial weights; no text tower is made."""
    config: dict[str, Any] = open_clip.get_model_config(architecture)
    vision = config["vision_cfg"]
    tower: nn.Module = VisionTransformer(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        output_dim=config["embed_dim"],
        act_layer=QuickGELU if config.get("quick_gelu") else nn.GELU,
    )
    return tower


class ClipTeacher(DenseTeacher):
    """A CLIP image tower; its position embedding is resampled for views of another size than it was trained at."""

    def __init__(self, request: TeacherRequest, tower: Any, origin: str, device: torch.device) -> None:
        patch, native = int(tower.patch_size[0]), int(tower.image_size[0])
        spec = TeacherSpec(
            name=request.name,
            family="clip",
            architecture=_MODELS[request.name][0],
            weights=weights_digest(tower),
            weights_origin=origin,
            patch_px=patch,
            native_px=native,
            prefix_tokens=1,
            positions=request.positions or "antialiased",
            norm=False,
            pixel=_pixels(request.name),
            license="MIT",
        )
        depth = len(tower.transformer.resblocks)
        asked = request.layers if request.layers is not None else spread_layers(depth)
        super().__init__(spec, tower, [f"block{i}" for i in range(depth)], asked, device)

    def forward_normalised(self, images_B3SS: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        tower: Any = self.network
        wanted = sorted({self.layer_names.index(layer) for layer in layers})
        patches = tower.conv1(images_B3SS)
        batch, width, rows, columns = patches.shape
        tokens = patches.flatten(2).transpose(1, 2)
        first = tower.class_embedding.to(tokens.dtype).expand(batch, 1, width)
        tokens = torch.cat([first, tokens], dim=1) + self._positions(rows, columns).to(tokens.dtype)
        _, maps = tower.transformer.forward_intermediates(tower.ln_pre(tokens), indices=wanted, stop_early=True)
        return {
            self.layer_names[i]: m[:, 1:].reshape(batch, rows, columns, width)
            for i, m in zip(wanted, maps, strict=True)
        }

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return ``[1 + rows * columns, D]``: the trained position embedding, its grid resampled where sizes differ."""
        tower: Any = self.network
        trained: tuple[int, int] = tuple(tower.grid_size)
        return resample_positions(tower.positional_embedding, trained, (rows, columns), self.spec.positions)

    def _specs_at(self, size_px: int) -> dict[str, LayerSpec]:
        tower: Any = self.network
        channels, patch = int(tower.conv1.out_channels), self.spec.patch_px
        return {
            name: LayerSpec(name=name, channels=channels, stride_px=patch, offset_px=patch / 2)
            for name in self.layer_names
        }
