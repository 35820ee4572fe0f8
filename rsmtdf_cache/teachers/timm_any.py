"""Any timm encoder as a teacher: ``timm:NAME``. Also the engine of the families whose networks timm builds.

A network whose layers all have one stride is a plain transformer with layers ``block0 ..``; any other has
``stage1 ..`` from fine to coarse. What the layers look like is asked of the network, not of a table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError, did_you_mean
from rsmtdf_cache.positions import PositionRule, use_positions
from rsmtdf_cache.receptive import map_geometry, meta_copy
from rsmtdf_cache.specs import LayerSpec, PixelSpec, TeacherSpec
from rsmtdf_cache.teachers._dense import DenseTeacher, build_quietly, spread_layers
from rsmtdf_cache.teachers._weights import hub_file, take_weights, weights_digest
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest

__all__ = ["TimmTeacher", "create", "hub_weights", "load"]

#: A fully convolutional net has no size of its own: so large that the tile's side always decides (``base_size_px``).
ANY_SIZE_PX = 4096


def load(request: TeacherRequest, device: torch.device) -> Teacher:
    """Return the timm encoder ``request.name`` (``timm:NAME``) as a teacher; see ``rsmtdf_cache.teachers.load``."""
    name = request.name.removeprefix("timm:")
    network = create(name)
    origin = take_weights(
        request,
        network,
        lambda: hub_weights(request.name, network),
        lambda tensors: _in_own_layout(network, tensors, request.name),
        _heads(network),
    )
    safe_name = "timm-" + re.sub(r"[^A-Za-z0-9_.+-]", "-", name)
    return TimmTeacher(request, network, device, name=safe_name, family="timm", origin=origin)


def create(name: str) -> nn.Module:
    """Return the timm network ``name`` without its classifier and with its initial weights.

    Raises ``UsageError`` for a name timm does not know, or a network that does not give intermediate maps.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(
            f"timm has no encoder {name!r}.{did_you_mean(architecture, timm.list_models())} "
            f"List them: python -c \"import timm; print(timm.list_models('*resnet*'))\""
        )
    if "." in name and name not in timm.list_pretrained(f"{architecture}.*"):
        raise UsageError(f"timm has no weights {name!r}; known: {', '.join(timm.list_pretrained(architecture + '.*'))}")

    def build() -> nn.Module:
        try:
            return timm.create_model(name, num_classes=0, dynamic_img_size=True)
        except TypeError:  # only transformers with resizable position embeddings take the argument
            return timm.create_model(name, num_classes=0)

    network = build_quietly(build)
    if not hasattr(network, "forward_intermediates"):
        raise UsageError(f"timm encoder {name!r} gives no intermediate maps; choose another encoder")
    return network


def hub_weights(teacher: str, network: nn.Module) -> tuple[Path, str]:
    """Return the file of a timm network's published weights and where it came from. Raises ``ResourceError``."""
    cfg = _cfg(network)
    repository, url = cfg.get("hf_hub_id"), cfg.get("url")
    if repository:
        own = cfg.get("hf_hub_filename")
        names = [own] if own else ["model.safetensors", "pytorch_model.bin"]
        return hub_file(teacher, repository, names), f"hub {repository}"
    if url:
        raise ResourceError(
            f"teacher {teacher}: its weights are not on the Hugging Face hub; run: curl -LO {url} ; then give that "
            f"file as weights=FILE"
        )
    raise ResourceError(
        f"teacher {teacher}: timm knows no published weights of it; give weights=FILE (pretrained=none,seed=N makes "
        f"random weights, for tests)"
    )


class TimmTeacher(DenseTeacher):
    """A timm network. A transformer's tokens go through its final norm, where it has one.

    ``pixel``: None = the statistics of its published weights, resized by our own rule. ``positions``: the rule when the
    request names none.
    """

    def __init__(
        self,
        request: TeacherRequest,
        network: nn.Module,
        device: torch.device,
        *,
        name: str,
        family: Literal["dinov2", "timm"],
        origin: str,
        license: str | None = None,
        pixel: PixelSpec | None = None,
        positions: PositionRule = "antialiased",
    ) -> None:
        cfg = _cfg(network)
        positions = request.positions or positions
        use_positions(network, positions, f"teacher {name}")
        native = int(cfg["input_size"][-1])
        self._probes: dict[int, list[tuple[int, int, int, float]]] = {}
        self._meta = meta_copy(network.eval())
        strides = [stride for _, _, stride, _ in self._probe(native)]
        plain = len(set(strides)) == 1
        is_norm = plain and not isinstance(getattr(network, "norm", nn.Identity()), nn.Identity)
        resizes = not cfg.get("fixed_input_size") or bool(getattr(network, "dynamic_img_size", False))
        another = (native // max(strides) + 1) * max(strides)
        self._only_px = None if resizes or self._runs_at(another) else native
        fits = [stride for stride in strides if self._only_px is None or native % stride == 0]
        if plain:
            layer_names = [f"block{i}" for i in range(len(strides))]
            defaults = spread_layers(len(strides))
        else:
            layer_names = [f"stage{i + 1}" for i in range(len(strides))]
            defaults = tuple(n for n, stride in zip(layer_names, strides, strict=True) if stride in (8, 16, 32))
        spec = TeacherSpec(
            name=name,
            family=family,
            architecture=str(cfg.get("architecture", name)),
            weights=weights_digest(network),
            weights_origin=origin,
            patch_px=max(fits),
            native_px=native if plain or self._only_px or cfg.get("fixed_input_size") else ANY_SIZE_PX,
            prefix_tokens=int(getattr(network, "num_prefix_tokens", 0)) if plain else 0,
            positions=positions,
            norm=is_norm,
            pixel=pixel or PixelSpec(mean=tuple(cfg["mean"]), std=tuple(cfg["std"])),
            license=str(cfg.get("license") or "") if license is None else license,
        )
        asked = request.layers if request.layers is not None else defaults or layer_names[-2:]
        # Convolutions are up to twice as fast channels-last; transformers do not care.
        self._format = torch.contiguous_format if plain else torch.channels_last
        super().__init__(spec, network.to(memory_format=self._format), layer_names, asked, device)

    def forward_normalised(self, images_B3SS: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        wanted = sorted({self.layer_names.index(layer) for layer in layers})
        network: Any = self.network
        maps = network.forward_intermediates(
            images_B3SS.contiguous(memory_format=self._format),
            indices=wanted,
            norm=self.spec.norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return {self.layer_names[i]: m.permute(0, 2, 3, 1) for i, m in zip(wanted, maps, strict=True)}

    def grid(self, layer: str, size_px: int) -> tuple[int, int]:
        self.layer_specs([layer], size_px)
        side = self._probe(size_px)[self.layer_names.index(layer)][1]
        return side, side

    def _specs_at(self, size_px: int) -> dict[str, LayerSpec]:
        return {
            name: LayerSpec(name=name, channels=channels, stride_px=stride, offset_px=offset)
            for name, (channels, _, stride, offset) in zip(self.layer_names, self._probe(size_px), strict=True)
        }

    def _probe(self, size_px: int) -> list[tuple[int, int, int, float]]:
        """Return channels, tokens a side, stride and offset of every layer: the network is run on no data."""
        if size_px not in self._probes:
            forward: Any = self._meta.forward_intermediates
            maps, geometries = map_geometry(
                lambda image: forward(image, output_fmt="NCHW", intermediates_only=True), size_px
            )
            self._probes[size_px] = [
                (int(m.shape[1]), int(m.shape[-1]), g.stride, g.centre + 0.5)
                for m, g in zip(maps, geometries, strict=True)
            ]
        return self._probes[size_px]

    def _runs_at(self, size_px: int) -> bool:
        try:
            return bool(self._probe(size_px))
        except (AssertionError, RuntimeError, ValueError):  # how networks of one fixed size refuse another
            return False

    def _check_size(self, size_px: int) -> None:
        super()._check_size(size_px)
        if self._only_px is not None and size_px != self._only_px:
            raise UsageError(
                f"teacher {self.spec.name} takes views of {self._only_px} px only, {size_px} px were asked for; "
                f"choose tiles and scales that give that size, or another encoder"
            )


def _cfg(network: nn.Module) -> dict[str, Any]:
    cfg: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    return cfg


def _heads(network: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of the classifier, which published files hold and a teacher has not."""
    classifier = _cfg(network).get("classifier") or ()
    return tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))


def _in_own_layout(network: nn.Module, tensors: dict[str, Tensor], asked: str) -> dict[str, Tensor]:
    """Return ``tensors`` under timm's names: each of its modules converts the layouts it was published in."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: dict[str, Tensor] = convert(dict(tensors), network)
    except Exception as error:  # converters index keys and reshape at will
        raise MismatchError(f"{asked}: the weights are in no layout that timm knows ({error!r})") from None
    return converted
