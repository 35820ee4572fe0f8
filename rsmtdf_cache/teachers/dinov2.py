"""DINOv2 (Oquab et al. 2024; with registers, Darcet et al. 2024): patch tokens through the final norm.

The distillation target of RS-MTDF is the last layer of ``dinov2_vitb14``: class token dropped, norm applied. A name
that ends in ``_paper`` sees views and positions as that method's released code makes them.
"""

from __future__ import annotations

import torch

from rsmtdf_cache.released_layout import in_timm_layout
from rsmtdf_cache.teachers._dense import PAPER_PIXELS
from rsmtdf_cache.teachers._weights import take_weights
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.teachers.timm_any import TimmTeacher, create, hub_weights

__all__ = ["load"]

_SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}


def load(request: TeacherRequest, device: torch.device) -> Teacher:
    """Return the teacher ``dinov2_SIZE``, ``_SIZE_reg`` or ``_SIZE_paper``; see ``rsmtdf_cache.teachers.load``.

    A weights file may have the layout of the original release (``.pth``) or timm's.
    """
    size, *variant = request.name.removeprefix("dinov2_").split("_")
    paper = variant == ["paper"]
    network = create(f"vit_{_SIZES[size]}_patch14_{'reg4_' if variant == ['reg'] else ''}dinov2.lvd142m")
    origin = take_weights(request, network, lambda: hub_weights(request.name, network), in_timm_layout)
    return TimmTeacher(
        request, network, device, name=request.name, family="dinov2", origin=origin, license="Apache-2.0",
        pixel=PAPER_PIXELS if paper else None, positions="released" if paper else "antialiased",
    )  # fmt: skip
