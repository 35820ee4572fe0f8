"""Encoders from timm: CNNs and hierarchical nets by their stages, ViTs by four of their blocks.

``dinov2_vits14`` (and b, l, g, ``_reg``) and ``dinov3_vits16`` (and s plus, b, l, h plus) are short names for timm's
models; weights files of theirs may have the layout of the original releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError, did_you_mean
from rsmtdf_cache.positions import use_positions
from rsmtdf_cache.receptive import map_geometry, meta_copy
from rsmtdf_cache.released_layout import in_timm_layout
from rsmtdf_train.sections import StudentConfig
from rsmtdf_train.students.base import Encoder, MapSpec

__all__ = ["StageEncoder", "TokenEncoder", "load_encoder", "resolve_name"]

_SIZES = ("small", "base", "large", "giant")
#: Modules of timm whose networks keep one grid of tokens.
_VITS = ("beit", "deit", "eva", "vision_transformer", "vision_transformer_relpos")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SHORT = {
    **{f"dinov2_vit{s}14": f"vit_{size}_patch14_dinov2" for s, size in zip("sblg", _SIZES, strict=True)},
    **{f"dinov2_vit{s}14_reg": f"vit_{size}_patch14_reg4_dinov2" for s, size in zip("sblg", _SIZES, strict=True)},
    **{f"dinov3_vit{s}16": f"vit_{size}_patch16_dinov3" for s, size in zip("sbl", _SIZES, strict=False)},
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3",
}


class StageEncoder(Encoder):
    """The stages of a CNN or hierarchical transformer of stride ``finest`` and more.

    4 by default: what is finer costs much and tells little, but decoders of the U-Net family are made for it.
    """

    def __init__(self, net: Any, finest: int = 4) -> None:
        super().__init__()
        channels, strides = net.feature_info.channels(), net.feature_info.reduction()
        self.net = net
        self.kept = tuple(i for i, s in enumerate(strides) if s >= finest)
        # told by timm: a shape alone does not tell, where a map is as high as it has channels
        self.channels_last = getattr(net, "output_fmt", None) == "NHWC"
        side = 4 * max(strides)  # sides are multiples of the deepest stride, so padding is the same for all of them
        try:
            hollow = meta_copy(net).eval()
            _, places = map_geometry(lambda image: self._channels_first(hollow(image)), side)
        except (AssertionError, RuntimeError) as error:
            raise UsageError(
                f"student.encoder: timm makes this network for images of one size ({error}); take one for all sizes, "
                "such as a ViT, Swin, PVT or a convolutional one"
            ) from None
        self.maps = tuple(MapSpec(channels[i], strides[i], places[i].centre + 0.5) for i in self.kept)
        self.mean, self.std = _statistics(net)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return the maps of the kept stages, ``[B, D, h, w]``."""
        outputs = self._channels_first(self.net(image_B3HW))
        return [outputs[i] for i in self.kept]

    def _channels_first(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return ``[B, D, h, w]`` maps; some hierarchical networks of timm give channels last."""
        return [m.permute(0, 3, 1, 2).contiguous() if self.channels_last else m for m in maps]


class TokenEncoder(Encoder):
    """Patch tokens after four evenly spaced blocks of a ViT (depth 12: 2, 5, 8, 11), each through the final norm.

    A few ViTs normalise their pooled token only; their tokens stay as they are.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        depth = len(net.blocks)
        self.net = net
        self.blocks = [depth * (i + 1) // 4 - 1 for i in range(4)]
        if hasattr(net, "prune_intermediate_layers"):  # what serves the class token alone would have no gradient
            net.prune_intermediate_layers(self.blocks, prune_norm=False, prune_head=True)
        stride = int(net.patch_embed.patch_size[0])
        self.maps = tuple(MapSpec(int(net.embed_dim), stride) for _ in self.blocks)
        self.mean, self.std = _statistics(net)

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """Return four maps ``[B, D, h, w]``; class and register tokens are dropped.

        Raises ``UsageError`` for another size than the one that a few families are made for.
        """
        patches = self.net.patch_embed
        if getattr(patches, "strict_img_size", False) and tuple(image_B3HW.shape[-2:]) != tuple(patches.img_size):
            raise UsageError(
                f"{type(self.net).__name__} reads images of {'x'.join(map(str, patches.img_size))} px only, found "
                f"{'x'.join(map(str, image_B3HW.shape[-2:]))}; set crop_px to that, or take another encoder"
            )
        maps: list[Tensor] = self.net.forward_intermediates(
            image_B3HW, indices=self.blocks, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps


def resolve_name(encoder: str) -> str:
    """Return timm's name of ``encoder``; raises ``UsageError`` with "did you mean" when timm does not know it."""
    name = _SHORT.get(encoder, encoder.removeprefix("timm:"))
    if not name or not timm.is_model(name):
        known = [*timm.list_models(), *_SHORT]
        raise UsageError(
            f"student.encoder {encoder!r}: timm has no encoder {name!r}."
            f"{did_you_mean(name.split('.')[0], known)} timm.list_models() lists the names; "
            "dinov2_vits14 and dinov3_vits16 are known too"
        )
    return name


def load_encoder(
    config: StudentConfig, *, load_weights: bool = True, finest: int = 4, deepest: int | None = None
) -> Encoder:
    """Return the encoder that ``config`` names; see ``build_student`` for the errors.

    ``finest``: least stride of the maps of a CNN. ``deepest``: stride at which a CNN is to end, dilated from there on
    (what DeepLab and PSPNet are made for); a ViT keeps its own.
    """
    name = resolve_name(config.encoder)
    dilated = {} if deepest is None else {"output_stride": deepest}
    net, tokens = _create(name, **dilated)
    if load_weights and config.weights is not None:
        state = _read_weights(config.weights)
        if "mask_token" in state:
            state = in_timm_layout(state)
        if tokens:
            net.load_state_dict(_checked(net, name, config, state))
        else:
            whole = timm.create_model(name, num_classes=0)
            _load_through(net, name, config, dilated, _checked(whole, name, config, state))
    elif load_weights and config.pretrained:
        _load_through(net, name, config, dilated)
    use_positions(net, config.positions, f"student.encoder {config.encoder!r}")
    return TokenEncoder(net) if tokens else StageEncoder(net, finest)


def _create(name: str, output_stride: int | None = None, **pretrained: Any) -> tuple[Any, bool]:
    """Return timm's net, and whether it is a ViT that gives tokens (else it gives stages)."""
    family = timm.model_entrypoint(name.split(".")[0]).__module__.rpartition(".")[2]
    if family in _VITS or name.startswith("vit_"):
        try:
            net = timm.create_model(name, num_classes=0, dynamic_img_size=True, **pretrained)
        except TypeError:  # a family without resampled position embeddings
            net = timm.create_model(name, num_classes=0, **pretrained)
        if hasattr(net, "blocks") and hasattr(net, "patch_embed") and hasattr(net, "forward_intermediates"):
            return net, True
    dilated: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    free: dict[str, Any] = {"strict_img_size": False} if family.startswith("swin_transformer") else {}
    try:
        return timm.create_model(name, features_only=True, **free, **dilated, **pretrained), False
    except (RuntimeError, AttributeError, NotImplementedError, AssertionError, TypeError) as error:
        if pretrained:
            raise
        if dilated:
            raise UsageError(
                f"student.encoder {name!r}: the decoder reads a map of stride {output_stride}, and timm cannot end "
                f"this encoder there ({error}); take a ViT, an encoder of the ResNet, MobileNet or EfficientNet kind, "
                "or another decoder"
            ) from None
        raise UsageError(f"student.encoder {name!r}: timm has no feature maps of it ({error}); take another") from None


def _load_through(
    net: Any, name: str, config: StudentConfig, dilated: dict[str, int], state: dict[str, Tensor] | None = None
) -> None:
    """Load published weights, or ``state``, as timm does: it renames keys when it cuts a model to stages."""
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": {"state_dict": state}} if state is not None else {}
    try:
        donor, _ = _create(name, pretrained=True, **dilated, **overlay)
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


def _checked(net: Any, name: str, config: StudentConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` without the classifier; raises ``MismatchError`` unless it fills every tensor of ``net``."""
    whole = net.state_dict()
    missing = [k for k in whole if k not in state]
    wrong = [k for k in whole if k in state and state[k].shape != whole[k].shape]
    # DINOv3 comes with and without them; biases of 0 are none
    biases = [k for k in state if k not in whole and k.endswith((".q_bias", ".v_bias")) and state[k].any()]
    if missing or wrong or biases:
        lines = [f"{k}: missing" for k in missing] + [
            f"{k}: {tuple(state[k].shape)} (file) != {tuple(whole[k].shape)} (encoder)" for k in wrong
        ]
        lines += [f"{k}: the encoder has none (timm:{name}_qkvb has)" for k in biases]
        raise MismatchError(
            f"student.weights={config.weights} does not fit {config.encoder!r}; {len(lines)} tensors differ: "
            + "; ".join(lines[:5])
        )
    return {k: state[k] for k in whole}


def _statistics(net: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    settings = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
    mean, std = settings.get("mean", _IMAGENET[0]), settings.get("std", _IMAGENET[1])
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
