"""Every kind of student, small and seeded, for the tests of what all of them keep."""

from __future__ import annotations

from functools import cache

import torch

from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import Student, build_student

__all__ = ["KINDS", "build", "student_of"]

_SMP = ("unet", "unetplusplus", "linknet", "manet", "fpn", "pan", "deeplabv3", "deeplabv3plus", "pspnet", "upernet",
        "segformer", "dpt")  # fmt: skip

#: Encoder, decoder and strides of the maps, by a short name. ``cnn`` has a map of stride 2, ``stages`` has none.
#: Of the ViTs, the second has a norm and the third an attention for its pooled token alone, which a student drops.
KINDS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "cnn-fpn": ("timm:test_efficientnet", "fpn", (4, 8, 16, 32)),
    "cnn-dpt": ("timm:test_efficientnet", "dpt", (4, 8, 16, 32)),
    "stages-fpn": ("timm:test_convnext", "fpn", (4, 8, 16, 32)),
    "stages-dpt": ("timm:test_convnext", "dpt", (4, 8, 16, 32)),
    "vit-fpn": ("timm:test_vit2", "fpn", (16,) * 4),
    "vit-dpt": ("timm:test_vit3", "dpt", (16,) * 4),
    "dinov3-dpt": ("timm:vit_tiny_patch16_dinov3_qkvb", "dpt", (16,) * 4),
    "stages-smp:unet": ("timm:test_convnext", "smp:unet", (4, 8, 16, 32)),
    "stages-smp:linknet": ("timm:test_convnext", "smp:linknet", (4, 8, 16, 32)),
    **{f"cnn-smp:{name}": ("timm:test_efficientnet", f"smp:{name}", (4, 8, 16, 32)) for name in _SMP},
    **{f"cnn-smp:{name}": ("timm:test_efficientnet", f"smp:{name}", (2, 4, 8, 16, 32)) for name in _SMP[:4]},
    **{
        f"cnn-smp:{name}": ("timm:test_efficientnet", f"smp:{name}", (4, 8, 16, 16))
        for name in ("pan", "deeplabv3plus")
    },
    **{f"cnn-smp:{name}": ("timm:test_efficientnet", f"smp:{name}", (4, 8, 8, 8)) for name in ("deeplabv3", "pspnet")},
    **{
        f"vit-smp:{name}": ("timm:test_vit", f"smp:{name}", (16,) * 4)
        for name in ("unet", "pan", "deeplabv3plus", "dpt")
    },
}


def build(kind: str, seed: int = 0) -> Student:
    """Return a fresh student of ``kind`` with 5 classes, its weights a function of ``seed``."""
    encoder, decoder, _ = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_student(StudentConfig(encoder=encoder, decoder=decoder, channels=16), 5)


@cache
def student_of(kind: str) -> Student:
    """Return ``build(kind)``, shared by the tests of a process: they may switch its mode, and change nothing else."""
    return build(kind)
