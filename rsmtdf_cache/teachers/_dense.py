"""What all teachers that run a torch network share: freezing, pixels in, checks, layers out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.specs import LayerSpec, PixelSpec, TeacherSpec
from rsmtdf_cache.teachers.base import Teacher

__all__ = ["DenseTeacher", "PAPER_PIXELS", "build_quietly", "spread_layers"]

#: Pixels as the released code of RS-MTDF gives them to every teacher: CLIP too gets ImageNet's statistics.
PAPER_PIXELS = PixelSpec(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="bilinear", antialias=False, align_corners=True
)

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build_quietly(build: Callable[[], nn.Module]) -> nn.Module:
    """Return ``build()``, run on a copy of the global random state: building a teacher changes no later draw."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def spread_layers(depth: int) -> tuple[str, ...]:
    """Return the default layers of a transformer of ``depth`` blocks: the end of its second third, and the last."""
    return tuple(f"block{i}" for i in sorted({max(depth * 2 // 3 - 1, 0), depth - 1}))


class DenseTeacher(Teacher):
    """A network with dense layers. A family says how to run it (``forward_normalised``) and where its tokens lie."""

    def __init__(
        self,
        spec: TeacherSpec,
        network: nn.Module,
        layer_names: Sequence[str],
        default_layers: Sequence[str],
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.device = device
        self.network = network.eval().requires_grad_(False).to(device)
        self._layer_names = tuple(layer_names)
        self._default_layers = tuple(default_layers)
        self._check_layers(default_layers)
        self._mean = torch.tensor(spec.pixel.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.pixel.std, device=device).view(1, 3, 1, 1)

    @property
    def default_layers(self) -> tuple[str, ...]:
        return self._default_layers

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self._layer_names

    @abstractmethod
    def forward_normalised(self, images_B3SS: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return ``{layer: [B, h, w, D]}`` of normalised images, in the dtype the network computes in."""

    @abstractmethod
    def _specs_at(self, size_px: int) -> dict[str, LayerSpec]:
        """Return the layers for views of ``size_px``, a size that ``_check_size`` has accepted."""

    def layer_specs(self, layers: Sequence[str], size_px: int) -> list[LayerSpec]:
        self._check_layers(layers)
        self._check_size(size_px)
        specs = self._specs_at(size_px)
        return [specs[layer] for layer in layers]

    def grid(self, layer: str, size_px: int) -> tuple[int, int]:
        side = size_px // self.layer_specs([layer], size_px)[0].stride_px
        return side, side

    def encode(
        self, tiles_BHW3: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        shape = tuple(tiles_BHW3.shape)
        if tiles_BHW3.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
            raise TypeError(f"tiles must be uint8 [B, H, H, 3], found {tiles_BHW3.dtype} {list(shape)}")
        self._check_call(size_px, layers, precision)
        with torch.inference_mode():
            return self._run(self.normalised(tiles_BHW3, size_px), layers, precision)

    def encode_images(
        self, images_B3HW: Tensor, size_px: int, layers: Sequence[str], precision: str = "float32"
    ) -> dict[str, Tensor]:
        shape = tuple(images_B3HW.shape)
        if not images_B3HW.is_floating_point() or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise TypeError(f"images must be floating point [B, 3, H, H], found {images_B3HW.dtype} {list(shape)}")
        self._check_call(size_px, layers, precision)
        with torch.inference_mode():
            images = self._resized(images_B3HW.to(self.device).float(), size_px, 1.0)
            return self._run((images - self._mean) / self._std, layers, precision)

    def _run(self, images_B3SS: Tensor, layers: Sequence[str], precision: str) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, _AUTOCAST.get(precision), enabled=precision != "float32"):
            maps = self.forward_normalised(images_B3SS, layers)
        return {layer: maps[layer].float().contiguous() for layer in layers}

    def normalised(self, tiles_BHW3: Tensor, size_px: int) -> Tensor:
        """Return ``[B, 3, size, size]`` float32: resized, clamped to 0..255 (bicubic overshoots), normalised."""
        images = self._resized(
            tiles_BHW3.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float(), size_px, 255.0
        )
        return (images / 255 - self._mean) / self._std

    def _resized(self, images_B3HW: Tensor, size_px: int, white: float) -> Tensor:
        if images_B3HW.shape[-1] == size_px:
            return images_B3HW
        pixel = self.spec.pixel
        resized = F.interpolate(
            images_B3HW,
            size=(size_px, size_px),
            mode=pixel.resize,
            antialias=pixel.antialias,
            align_corners=pixel.align_corners,
        )
        return resized.clamp_(0, white)

    def _check_call(self, size_px: int, layers: Sequence[str], precision: str) -> None:
        if precision != "float32" and precision not in _AUTOCAST:
            raise UsageError(f"precision {precision!r}: choose float32, {', '.join(_AUTOCAST)}")
        self._check_layers(layers)
        self._check_size(size_px)

    def _check_layers(self, layers: Sequence[str]) -> None:
        for layer in layers:
            if layer not in self._layer_names:
                raise UsageError(
                    f"teacher {self.spec.name} has no layer {layer!r}.{did_you_mean(layer, self._layer_names)} "
                    f"Known: {', '.join(self._layer_names)}"
                )

    def _check_size(self, size_px: int) -> None:
        patch = self.spec.patch_px
        if size_px <= 0 or size_px % patch:
            lower = max(size_px // patch, 1) * patch
            raise UsageError(
                f"teacher {self.spec.name}: a view of {size_px} px is not a multiple of its {patch}-px patch; "
                f"take {lower} or {lower + patch}"
            )
