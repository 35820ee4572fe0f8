"""The method of RS-MTDF, isolated: translate student features, distil from teachers, fuse back into the decoder.

Everything here is part of the student and is deployed with it when fusion is on; no teacher is.
Shape legend: B batch, h w grid of a student map, n grid of a teacher, D channels of a teacher layer, S channels of a
student map, T targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_train.alignment import Grid, resample
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import DistillConfig, FuseConfig
from rsmtdf_train.seeds import seed_of
from rsmtdf_train.students.base import MapSpec

__all__ = ["Encoded", "Source", "TargetShape", "TeacherFusion", "Translator", "nearest_map"]


@dataclass(frozen=True)
class TargetShape:
    """One distillation target: its key ``teacher/scale/layer``, channels, stride and first centre in tile pixels."""

    key: str
    channels: int
    stride_px: float
    offset_px: float | None = None

    def grid(self, side_px: int) -> Grid:
        """Return the token centres of a crop of ``side_px`` on the lattice."""
        offset = self.stride_px / 2 if self.offset_px is None else self.offset_px
        return Grid(int(side_px / self.stride_px + 1e-6), self.stride_px, offset)


@dataclass(frozen=True)
class Source:
    """The student map a target is translated from: ``index`` into the maps of the pass at ``pass_px`` (None: main)."""

    index: int
    pass_px: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Feature maps of a batch: of the main pass shallow to deep, and of second passes by their side in pixels."""

    side_px: int
    maps: list[Tensor]
    passes: dict[int, list[Tensor]]

    def of(self, source: Source) -> Tensor:
        """Return the map ``[B, S, h, w]`` that ``source`` names."""
        return (self.maps if source.pass_px is None else self.passes[source.pass_px])[source.index]

    def first(self, count: int) -> Encoded:
        """Return the first ``count`` images of the batch."""
        return Encoded(
            self.side_px, [m[:count] for m in self.maps], {s: [m[:count] for m in p] for s, p in self.passes.items()}
        )


class Translator(nn.Module):
    """A small network on tokens, written as convolutions so that it runs on maps.

    ``mlp``: two layers (RS-MTDF: 384 → 1024 → D); ``linear``: one; ``conv``: 3x3, then 1x1.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, kind: str = "mlp", activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.first: nn.Conv2d | None = None
        if kind == "linear":
            self.second: nn.Module = nn.Conv2d(in_channels, out_channels, 1)
        else:
            side = 3 if kind == "conv" else 1
            self.first = nn.Conv2d(in_channels, hidden, side, padding=side // 2)
            self.second = nn.Conv2d(hidden, out_channels, 1)
        self.activation: Callable[[Tensor], Tensor] = F.relu if activation == "relu" else F.gelu

    def forward(self, map_BShw: Tensor) -> Tensor:
        """Return ``[B, D, h, w]`` on the student's own grid."""
        y: Tensor = self.second(self.hidden(map_BShw))
        return y

    def hidden(self, map_BShw: Tensor) -> Tensor:
        """Return what the last, linear layer sees: ``[B, hidden, h, w]``, the map itself in a linear translator."""
        return map_BShw if self.first is None else self.activation(self.first(map_BShw))


class TeacherFusion(nn.Module):
    """One translator for each target, and, with ``fuse``, a projection of each back into chosen decoder inputs.

    ``fuse=None``: the translators serve the loss alone and are dropped from the deployed student. ``gates`` is the part
    of each teacher in each fused input, ``share / T`` at first; fixed ones are no parameters.
    """

    def __init__(
        self,
        maps: Sequence[MapSpec],
        targets: Sequence[TargetShape],
        distill: DistillConfig,
        fuse: FuseConfig | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.sources = tuple(_source(distill, t, maps) for t in targets)
        self.fused = fuse is not None
        self.share = fuse.share if fuse is not None else 0.0
        self.drop = fuse.drop if fuse is not None else 0.0
        self.at = _inputs(fuse.at, len(maps)) if fuse is not None else ()
        self._maps = tuple(maps)
        self.translators = nn.ModuleList()
        self.projections = nn.ModuleList()  # target by target, for each of ``at``
        for target, source in zip(self.targets, self.sources, strict=True):
            # each target's weights depend on its own key, so adding a teacher leaves the others' start as it was
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, target.key))
                self.translators.append(
                    Translator(
                        maps[source.index].channels,
                        distill.hidden,
                        target.channels,
                        distill.translator,
                        distill.activation,
                    )
                )
                for index in self.at:
                    self.projections.append(nn.Conv2d(target.channels, maps[index].channels, 1))
        self.gate_logits: nn.Parameter | None = None
        if fuse is not None and fuse.gate == "learned" and targets:
            start = min(max(self.share, 1e-4), 1 - 1e-4)  # a gate is sigmoid / T: together they never exceed 1
            self.gate_logits = nn.Parameter(torch.full((len(self.at), len(targets)), math.log(start / (1 - start))))

    @property
    def pass_sides_px(self) -> tuple[int, ...]:
        """Return the sides of the student's second passes, none mostly."""
        return tuple(sorted({s.pass_px for s in self.sources if s.pass_px is not None}))

    def gates(self) -> dict[str, Tensor]:
        """Return ``{key: part in 0..1}`` of each target, the mean over fused inputs; empty without learned gates."""
        if self.gate_logits is None:
            return {}
        means = self.gate_logits.detach().sigmoid().mean(0) / len(self.targets)
        return {t.key: means[i] for i, t in enumerate(self.targets)}

    def translate(self, encoded: Encoded) -> dict[str, Tensor]:
        """Return ``{key: [B, D, h, w]}`` on the grid of the student map that feeds the target."""
        return self.translations(self.hidden(encoded))

    def hidden(self, encoded: Encoded) -> list[Tensor]:
        """Return what each translator's last layer sees, ``[B, hidden, h, w]`` of each target, in their order."""
        return [t.hidden(encoded.of(source)) for t, source in zip(self._translators, self.sources, strict=True)]

    def translations(self, hidden: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the translations ``{key: [B, D, h, w]}`` of ``hidden``."""
        found = zip(self.targets, self._translators, hidden, strict=True)
        return {target.key: translator.second(x) for target, translator, x in found}

    def align(self, translated: Mapping[str, Tensor], side_px: int) -> dict[str, Tensor]:
        """Return ``{key: [B, D, n, n]}``: the translations of a square crop, read at the teachers' token centres."""
        return {
            target.key: resample(translated[target.key], *_as_one(self._grid(source, side_px), target.grid(side_px)))
            for target, source in zip(self.targets, self.sources, strict=True)
        }

    def true_translations(self, targets: Targets, translated: Mapping[str, Tensor], side_px: int) -> dict[str, Tensor]:
        """Return ``translated`` with the teachers' own features in their place wherever those count.

        ``{key: [B, D, h, w]}`` on the student's grids: what a perfect translator would give. A place of the student's
        map that reads a token of weight 0 keeps the translation.
        """
        result = dict(translated)
        for target, source in zip(self.targets, self.sources, strict=True):
            mine = translated[target.key]
            grids = target.grid(side_px), self._grid(source, side_px)
            features = targets.features[target.key].permute(0, 3, 1, 2).float()
            weights = (targets.weights[target.key] > 0).float().unsqueeze(1)
            with torch.autocast(mine.device.type, enabled=False):  # in bfloat16 a third three times is not 1
                # a token without weight may be halfway to one that has it: all of what is read must count
                known = resample(weights, *grids) > 1 - 1e-3
                true = resample(features, *grids).to(mine.dtype)
            result[target.key] = torch.where(known, true, mine)
        return result

    def fuse(self, maps_BShw: Sequence[Tensor], translated: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the decoder's inputs: ``(1 - sum gates) s + sum gates * projections`` at each of ``at``.

        Paper: 0.8 s + 0.1 d' + 0.1 c' is ``share=0.2`` with two targets, at the last input. In training a teacher is
        left out of a crop with probability ``drop``; its part goes to the student's own features. Without fusion the
        maps come back as they are.
        """
        return self._mixed(maps_BShw, lambda t, a: self._projection(t, a)(translated[self.targets[t].key]))

    def fuse_directly(self, maps_BShw: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return what ``fuse`` makes of the translations of ``hidden``, up to rounding, without making them.

        Nothing lies between the last layer of a translator and a projection: they are one linear map, from the hidden
        layer to the decoder's input, of a fraction of the work. Translations are for the loss.
        """

        def project(t: int, a: int) -> Tensor:
            with torch.autocast(hidden[t].device.type, enabled=False):  # weights of weights: not in half precision
                weight, bias = self._folded(t, a)
            return F.conv2d(hidden[t], weight[:, :, None, None], bias)

        return self._mixed(maps_BShw, project)

    def _folded(self, t: int, a: int) -> tuple[Tensor, Tensor]:
        """Return weight ``[S, hidden]`` and bias ``[S]`` of the last layer of translator ``t``, then its projection."""
        projection, last = self._projection(t, a), self._translators[t].second
        into = projection.weight.flatten(1)
        if not isinstance(last, nn.Conv2d):  # folded for good
            return into, _bias(projection)
        return into @ last.weight.flatten(1), _bias(projection) + into @ _bias(last)

    @torch.no_grad()
    def fold(self) -> None:
        """Make each translator's last layer and its projections one, for good: for deployment."""
        folded = [self._folded(t, a) for t in range(len(self.targets)) for a in range(len(self.at))]
        self.projections = nn.ModuleList()
        for weight, bias in folded:
            self.projections.append(conv := nn.Conv2d(weight.shape[1], weight.shape[0], 1).to(weight))
            conv.weight.copy_(weight[:, :, None, None])
            _bias(conv).copy_(bias)
        for translator in self._translators:
            translator.second = nn.Identity()

    @property
    def _translators(self) -> list[Translator]:
        return [t for t in self.translators if isinstance(t, Translator)]

    def _projection(self, target: int, at: int) -> nn.Conv2d:
        found = self.projections[target * len(self.at) + at]
        assert isinstance(found, nn.Conv2d)
        return found

    def _mixed(self, maps_BShw: Sequence[Tensor], project: Callable[[int, int], Tensor]) -> list[Tensor]:
        """Return the decoder's inputs; ``project(t, a)``: the share of target ``t`` in input ``a`` of ``at``."""
        maps = list(maps_BShw)
        if not self.fused or not self.targets:
            return maps
        count = len(self.targets)
        kept: Tensor | None = None
        if self.training and self.drop > 0:
            kept = (torch.rand(count, len(maps[0]), device=maps[0].device) >= self.drop).to(maps[0].dtype)
        for a, index in enumerate(self.at):
            own = maps[index]
            size = (own.shape[-2], own.shape[-1])
            total = torch.zeros_like(own)
            rest: float | Tensor = 1.0
            for t, source in enumerate(self.sources):
                projection = project(t, a)
                gate = self.share / count if self.gate_logits is None else self.gate_logits[a, t].sigmoid() / count
                part = gate if kept is None else gate * kept[t].view(-1, 1, 1, 1)
                total = total + part * _resize(projection, size, align_corners=source.pass_px is not None)
                rest = rest - part
            maps[index] = rest * own + total
        return maps

    def _grid(self, source: Source, side_px: int) -> Grid:
        spec = self._maps[source.index]
        if source.pass_px is None:
            return spec.grid(side_px)
        zoom, grid = side_px / source.pass_px, spec.grid(source.pass_px)
        return Grid(grid.tokens, grid.stride_px * zoom, grid.offset_px * zoom)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def nearest_map(maps: Sequence[MapSpec], stride_px: float) -> int:
    """Return the index of the map whose stride is nearest on a log scale; the deepest of equals."""
    return min(range(len(maps)), key=lambda i: (abs(math.log(maps[i].stride_px / stride_px)), -i))


def _source(distill: DistillConfig, target: TargetShape, maps: Sequence[MapSpec]) -> Source:
    for pattern, pass_px in distill.passes.items():
        if fnmatchcase(target.key, pattern):
            return Source(len(maps) - 1, pass_px)
    return Source(nearest_map(maps, target.stride_px))


def _inputs(at: Sequence[int], count: int) -> tuple[int, ...]:
    from rsmtdf_cache.errors import UsageError

    for index in at:
        if not -count <= index < count:
            raise UsageError(f"fuse.at {index}: the decoder has the inputs 0 to {count - 1} (or -{count} to -1)")
    return tuple(sorted({index % count for index in at}))


def _as_one(source: Grid, target: Grid) -> tuple[Grid, Grid]:
    """Return the grids, equal if they differ by rounding alone: then nothing is interpolated."""
    same = source.tokens == target.tokens and math.isclose(source.stride_px, target.stride_px, rel_tol=1e-6)
    return (target if same and abs(source.offset_px - target.offset_px) < 1e-3 else source), target


def _resize(x_BDhw: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    if (x_BDhw.shape[-2], x_BDhw.shape[-1]) == size:
        return x_BDhw
    if align_corners:  # the second pass of RS-MTDF; it moves patch centres, and that is part of its numbers
        return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=True)
    if size[0] <= x_BDhw.shape[-2] and size[1] <= x_BDhw.shape[-1]:
        return F.adaptive_avg_pool2d(x_BDhw, size)  # bilinear would skip tokens
    return F.interpolate(x_BDhw, size=size, mode="bilinear", align_corners=False)
