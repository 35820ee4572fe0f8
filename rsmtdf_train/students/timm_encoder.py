"""Encoders from timm: CNNs and hierarchical nets by their stages, ViTs by four of their blocks.

``dinov2_vits14`` (and b, l, g, ``_reg``) are short names for timm's DINOv2 models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError, did_you_mean
from rsmtdf_cache.positions import use_positions
from rsmtdf_cache.receptive import map_geometry, meta_copy
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import Encoder, MapSpec

__all__ = ["StageEncoder", "TokenEncoder", "load_encoder", "resolve_name"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DINOV2 = {"s": "small", "b": "base", "l": "large", "g": "giant"}


class StageEncoder(Encoder):
    """The stages of a CNN or hierarchical transformer from stride 4 on (stride 2 costs much and tells little)."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        channels, strides = net.feature_info.channels(), net.feature_info.reduction()
        self.net = net
        self.kept = tuple(i for i, s in enumerate(strides) if s >= 4)
        side = 4 * max(strides)  # sides are multiples of the deepest stride, so padding is the same for all of them
        _, places = map_geometry(meta_copy(net).eval(), side)
        self.maps = tuple(MapSpec(channels[i], strides[i], places[i].centre + 0.5) for i in self.kept)
        self.mean, self.std = _statistics(net)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return the maps of the kept stages, ``[B, D, h, w]``."""
        outputs = self.net(image_B3HW)
        return [_channels_first(outputs[i], m.channels) for i, m in zip(self.kept, self.maps, strict=True)]


class TokenEncoder(Encoder):
    """Patch tokens after four evenly spaced blocks of a ViT (depth 12: 2, 5, 8, 11), each through the final norm."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        depth = len(net.blocks)
        self.net = net
        self.blocks = [depth * (i + 1) // 4 - 1 for i in range(4)]
        stride = int(net.patch_embed.patch_size[0])
        self.maps = tuple(MapSpec(int(net.embed_dim), stride) for _ in self.blocks)
        self.mean, self.std = _statistics(net)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return four maps ``[B, D, h, w]``; class and register tokens are dropped."""
        maps: list[Tensor] = self.net.forward_intermediates(
            image_B3HW, indices=self.blocks, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps


def resolve_name(encoder: str) -> str:
    """Return timm's name of ``encoder``; raises ``UsageError`` with "did you mean" when timm does not know it."""
    found = re.fullmatch(r"dinov2_vit([sblg])14(_reg)?", encoder)
    name = (
        f"vit_{_DINOV2[found[1]]}_patch14{'_reg4' if found[2] else ''}_dinov2"
        if found
        else encoder.removeprefix("timm:")
    )
    if not name or not timm.is_model(name):
        known = [*timm.list_models(), *(f"dinov2_vit{size}14" for size in _DINOV2)]
        raise UsageError(
            f"student.encoder {encoder!r}: timm has no encoder {name!r}."
            f"{did_you_mean(name.split('.')[0], known)} timm.list_models() lists the names; dinov2_vits14 is known too"
        )
    return name


def load_encoder(config: StudentConfig, *, load_weights: bool = True) -> Encoder:
    """Return the encoder that ``config`` names; see ``build_student`` for the errors."""
    name = resolve_name(config.encoder)
    net, tokens = _create(name)
    if load_weights and (config.weights is not None or config.pretrained):
        state = _read_weights(config.weights) if config.weights is not None else None
        _load_into(net, name, config, state)
    use_positions(net, config.positions, f"student.encoder {config.encoder!r}")
    return TokenEncoder(net) if tokens else StageEncoder(net)


def _create(name: str, **pretrained: Any) -> tuple[Any, bool]:
    """Return timm's net, and whether it is a ViT that gives tokens (else it gives stages)."""
    if name.split(".")[0].startswith(("vit_", "deit", "eva", "beit")):
        try:
            net = timm.create_model(name, num_classes=0, dynamic_img_size=True, **pretrained)
        except TypeError:  # a family without resampled position embeddings
            net = timm.create_model(name, num_classes=0, **pretrained)
        if hasattr(net, "blocks") and hasattr(net, "patch_embed") and hasattr(net, "forward_intermediates"):
            return net, True
    try:
        return timm.create_model(name, features_only=True, **pretrained), False
    except (RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        if pretrained:
            raise
        raise UsageError(f"student.encoder {name!r}: timm has no feature maps of it ({error}); take another") from None


def _load_into(net: Any, name: str, config: StudentConfig, state: dict[str, Tensor] | None) -> None:
    """Load published weights into ``net``, through a whole model: timm renames keys when it cuts a model to stages."""
    if state is not None:
        state = _checked(name, config, state)
    try:
        overlay = {"pretrained_cfg_overlay": {"state_dict": state}} if state is not None else {}
        donor, _ = _create(name, pretrained=True, **overlay)
    except Exception as error:  # hubs raise many kinds; all of them mean that the weights are out of reach
        raise ResourceError(
            f"student.encoder {config.encoder!r}: its published weights cannot be had ({error}). On a machine "
            f"with a network run: python -c \"import timm, torch; torch.save(timm.create_model('{name}', "
            "pretrained=True).state_dict(), 'encoder.pt')\" and set student.weights=FILE; or set "
            "student.pretrained=false"
        ) from None
    net.load_state_dict(donor.state_dict())


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file; never unpickles objects. Raises ``ResourceError``."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data: Any = load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResourceError(
            f"student.weights={path}: cannot be read as weights ({error}); give a safetensors or torch file of tensors"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ResourceError(f"student.weights={path}: holds no state dict; save model.state_dict()")
    return data


def _checked(name: str, config: StudentConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` without the classifier; raises ``MismatchError`` unless it fills every encoder tensor."""
    whole = timm.create_model(name, num_classes=0).state_dict()
    missing = [k for k in whole if k not in state]
    wrong = [k for k in whole if k in state and state[k].shape != whole[k].shape]
    if missing or wrong:
        lines = [f"{k}: missing" for k in missing] + [
            f"{k}: {tuple(state[k].shape)} (file) != {tuple(whole[k].shape)} (encoder)" for k in wrong
        ]
        raise MismatchError(
            f"student.weights={config.weights} does not fit {config.encoder!r}; {len(lines)} tensors differ: "
            + "; ".join(lines[:5])
        )
    return {k: state[k] for k in whole}


def _statistics(net: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    settings = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
    mean, std = settings.get("mean", _IMAGENET[0]), settings.get("std", _IMAGENET[1])
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _channels_first(x: Tensor, channels: int) -> Tensor:
    """Return ``[B, D, h, w]``; some hierarchical transformers of timm give channels last."""
    return x if x.shape[1] == channels else x.permute(0, 3, 1, 2).contiguous()
