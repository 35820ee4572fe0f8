"""Probe pseudo-labels: a head on stored features of labelled tiles labels unlabelled crops while the student is young.

Teachers know more than a student of a few hundred steps, and their features of every tile are stored: softmax
regression (or one hidden layer) on the labelled tiles takes seconds. Each map enters with its own linear map on its own
grid; a linear map and an interpolation commute, so only classes (or hidden channels) are resampled, to the finest grid
among the maps and from there to pixels. Optional colour channels of the clean crop are one more map.

Every map is standardised by its labelled tokens and divided by the root of its channels: the penalty then weighs maps,
not channels. Colours are multiplied by ``COLOR_GAIN``, for 24 channels can hardly overfit. Fitted by full-batch LBFGS
with an L2 penalty: a function of recipe, store and data, and quick.

Shape legend: B crops, h w tokens of a map, n tokens a side of the finest map, D channels of a map, C classes, H W px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rsmtdf_cache.errors import DataError, UsageError, did_you_mean
from rsmtdf_cache.events import Progress, ProgressEnd, ProgressStart
from rsmtdf_train.alignment import Grid, resample
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import ProbeConfig
from rsmtdf_train.seeds import seed_of

__all__ = ["COLOR", "COLOR_GAIN", "Probe", "ProbeInput", "local_color", "probe_share", "train_probe"]

#: Key of the colour channels among the inputs.
COLOR = "color"
#: Measured on tree crowns: 5 and 20 cost a probe 1 and 2 points of mIoU, 40 costs 8.
COLOR_GAIN = 10.0
#: Cells of local colour: their side in pixels, and how many of them a side each context has.
_CELL_PX, _CONTEXTS = 8, (1, 3, 5, 9)
#: Labelled crops it learns from: as many as show every place of every tile in every orientation once, within bounds.
_LEAST_CROPS, _MOST_CROPS, _MOST_BYTES = 16, 512, 512 * 2**20
_READ = 16  # crops read at once
_FOLDS = 3


@dataclass(frozen=True)
class ProbeInput:
    """One map a probe reads: its key among the targets (or ``COLOR``), its channels and its stride in crop pixels.

    A token is taken to tell of the middle of its cell, which for transformers it does. Convolutions with padding have
    their receptive field up to half a cell aside, but what a network trained on mirrored images describes lies in the
    middle: on EfficientNet-Lite maps, the middle gives a probe 3 mIoU points more than the recorded centres.
    """

    key: str
    channels: int
    stride_px: float

    def grid(self, tokens: int) -> Grid:
        """Return where the ``tokens`` a side of a crop's map lie."""
        return Grid(tokens, self.stride_px, self.stride_px / 2)


class Probe(nn.Module):
    """``softmax`` of what linear maps of all inputs, or one hidden layer on them, say of each pixel."""

    def __init__(self, inputs: Sequence[ProbeInput], classes: int, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        if not inputs:
            raise ValueError("a probe needs at least one input")
        self.inputs = tuple(inputs)
        #: Index of the input whose grid is the finest.
        self.finest = min(range(len(inputs)), key=lambda i: (inputs[i].stride_px, i))
        wide = sum(i.channels for i in inputs)
        draw = torch.Generator().manual_seed(seed)
        width = hidden or classes
        self.weights = nn.ParameterList()
        for number, entry in enumerate(self.inputs):
            start = torch.randn(width, entry.channels, generator=draw) * math.sqrt(len(inputs) / wide)
            self.weights.append(nn.Parameter(start if hidden else torch.zeros_like(start)))
            self.register_buffer(f"mean{number}", torch.zeros(entry.channels))
            self.register_buffer(f"gain{number}", torch.ones(entry.channels))
        self.bias = nn.Parameter(torch.zeros(width))
        self.last: nn.Parameter | None = None
        self.last_bias: nn.Parameter | None = None
        if hidden:
            self.last = nn.Parameter(torch.randn(classes, hidden, generator=draw) / math.sqrt(hidden))
            self.last_bias = nn.Parameter(torch.zeros(classes))

    @torch.no_grad()
    def forward(self, targets: Targets, image_B3HW: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities ``[B, C, *size]`` float32 of square crops, without a gradient.

        ``targets``: decoded, of the clean crops; a token of weight 0 counts as one nothing is known of. ``image_B3HW``:
        the clean crops, float 0..1.
        """
        with torch.autocast(image_B3HW.device.type, enabled=False):
            maps = self.standardize(self.maps(targets, image_B3HW))
            logits, grid = self.logits(maps)
            side = image_B3HW.shape[-1]
            pixels = Grid(size[0], side / size[0], side / size[0] / 2)
            return resample(logits, grid, pixels).softmax(1)

    def maps(self, targets: Targets, image_B3HW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return ``[B, D, h, w]`` and weights ``[B, 1, h, w]`` of every input, as they come.

        Raises ``UsageError`` when the targets lack one.
        """
        found = []
        for entry in self.inputs:
            if entry.key == COLOR:
                colors = local_color(image_B3HW.float())
                found.append((colors, torch.ones_like(colors[:, :1])))
                continue
            if entry.key not in targets.features:
                raise UsageError(
                    f"probe: a batch has no features of {entry.key}, which it was trained on; it reads stored features"
                )
            values = targets.features[entry.key].float().permute(0, 3, 1, 2)
            found.append((values, targets.weights[entry.key].float().unsqueeze(1)))
        return found

    def standardize(self, maps: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return ``maps`` with the standardisation of ``measure`` applied."""
        return [((x - self._buffer("mean", i)) * self._buffer("gain", i), weight) for i, (x, weight) in enumerate(maps)]

    def measure(self, maps: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take means and deviations of every channel from ``maps``, over tokens that count."""
        for number, (x, weight) in enumerate(maps):
            count = weight.sum().clamp_min(1)
            mean = (x * weight).sum((0, 2, 3)) / count
            variance = ((x - mean.view(1, -1, 1, 1)).square() * weight).sum((0, 2, 3)) / count
            # A floor, so that a channel that hardly varies is not blown up.
            floor = 1e-4 * float(variance.mean()) or 1.0
            gain = (variance.clamp_min(floor) * len(mean)).rsqrt()
            self._buffer("mean", number).copy_(mean.view(1, -1, 1, 1))
            self._buffer("gain", number).copy_(
                (gain * (COLOR_GAIN if self.inputs[number].key == COLOR else 1)).view(1, -1, 1, 1)
            )

    def logits(self, maps: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Grid]:
        """Return logits ``[B, C, n, n]`` of standardised ``maps`` and where they lie in the crop."""
        fine = self.inputs[self.finest].grid(maps[self.finest][0].shape[-1])
        total = self.bias.view(1, -1, 1, 1)
        for entry, weights, (x, known) in zip(self.inputs, self.weights, maps, strict=True):
            here = entry.grid(x.shape[-1])
            said = torch.matmul(weights, x.flatten(2)).view(len(x), -1, *x.shape[2:])
            # Means of the tokens that are known: 0, the mean of everything, where there is none around.
            share = resample(known, here, fine).clamp_min(1e-6)
            total = total + resample(said * known, here, fine) / share
        if self.last is not None and self.last_bias is not None:
            seen = F.gelu(total)
            total = torch.matmul(self.last, seen.flatten(2)).view(len(seen), -1, *seen.shape[2:])
            total = total + self.last_bias.view(1, -1, 1, 1)
        return total, fine

    def penalized(self) -> list[Tensor]:
        """Return what the L2 penalty is on: all but the biases."""
        return [*self.weights, *([] if self.last is None else [self.last])]

    def _buffer(self, name: str, number: int) -> Tensor:
        found = self.get_buffer(f"{name}{number}")
        return found.view(1, -1, 1, 1)


def local_color(image_B3HW: Tensor) -> Tensor:
    """Return ``[B, 24, H/8, W/8]``: mean and deviation of each colour in squares of 8, 24, 40 and 72 px around a cell.

    ``image_B3HW``: float 0..1. A square that leaves the crop is cut off at its edge.
    """
    mean = F.avg_pool2d(image_B3HW, _CELL_PX)
    square = F.avg_pool2d(image_B3HW.square(), _CELL_PX)
    found = []
    for cells in _CONTEXTS:
        around = [F.avg_pool2d(x, cells, 1, cells // 2, count_include_pad=False) for x in (mean, square)]
        found += [around[0], (around[1] - around[0].square()).clamp_min(1e-6).sqrt()]
    return torch.cat(found, 1)


def probe_share(config: ProbeConfig, step: int, steps: int) -> float:
    """Return the probe's part in the pseudo-labels of ``step`` 0, 1, …: 1 up to ``hold``, 0 from ``until`` on."""
    place = step / steps
    if place >= config.until:
        return 0.0
    if place <= config.hold:
        return 1.0
    return (config.until - place) / (config.until - config.hold)


@dataclass(frozen=True)
class _Pool:
    """Labelled crops as a probe learns them: maps of every input, class shares of cells, and the fold of each crop."""

    maps: dict[str, tuple[Tensor, Tensor]]
    shares: Tensor  # [B, C, m, m]: part of the cell's pixels that are labelled as the class
    cells: Grid
    folds: Tensor  # [B] int64

    def part(self, chosen: Tensor) -> _Pool:
        maps = {key: (x[chosen], weight[chosen]) for key, (x, weight) in self.maps.items()}
        return _Pool(maps, self.shares[chosen], self.cells, self.folds[chosen])


def train_probe(
    loader: BatchLoader,
    recipe: Recipe,
    classes: int,
    ignore_index: int,
    device: torch.device,
    on_event: Callable[[ProgressStart | Progress | ProgressEnd], None] = lambda event: None,
) -> Probe:
    """Return a probe of ``recipe.probe``, fitted to the labelled tiles: a function of recipe, store and data.

    It sees the first labelled crops of the run, in their orientations, and only their labels. ``inputs: auto`` fits on
    two thirds of the tiles and takes what predicts the other third best (mean IoU over three folds together; log-loss
    cannot choose: it is ruled by classes that only one of a few labelled tiles holds). Raises ``UsageError`` for
    patterns that match no target or targets that are not stored, ``DataError`` when no pixel is labelled.
    """
    config = recipe.probe
    if config is None or loader.targets is None:
        raise UsageError("probe: needs `probe` in the recipe and stored features; give a store with --use-cache")
    features = [
        ProbeInput(key, spec.channels, float(spec.stride_px))
        for key, spec in loader.targets.specs.items()
        if key in _matching(config.keys, list(loader.targets.specs))
    ]
    color = ProbeInput(COLOR, 6 * len(_CONTEXTS), float(_CELL_PX))
    choices = {"features": features, "both": [*features, color], "color": [color]}
    asked = list(choices) if config.inputs == "auto" else [config.inputs]
    pool = _pool(loader, recipe, choices["both"], classes, ignore_index, device)
    folds = int(pool.folds.max()) + 1
    judged = asked if len(asked) > 1 and folds > 1 else []
    on_event(ProgressStart("probe", "fitting the probe", len(judged) * folds + 1, unit="fits"))
    scores: dict[str, float] = {}
    for name in judged:
        confusion = torch.zeros(classes, classes, device=device)
        for fold in range(folds):
            confusion += _left_out(choices[name], pool, fold, config, classes, recipe.seed)
            on_event(Progress("probe", 1))
        scores[name] = _mean_iou(confusion)
    chosen = max(scores, key=scores.__getitem__) if scores else ("both" if "both" in asked else asked[0])
    probe = _fit(choices[chosen], pool, config, classes, recipe.seed, config.steps)
    on_event(Progress("probe", 1))
    on_event(ProgressEnd("probe"))
    return probe.eval().requires_grad_(False)


def _matching(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in known):
            raise UsageError(
                f"probe.keys {pattern!r} matches none of the run's targets.{did_you_mean(pattern, known)} "
                f"Targets: {', '.join(known) or 'none'}"
            )
    return [key for key in known if not patterns or any(fnmatchcase(key, p) for p in patterns)]


def _stacked(crops: Sequence[NDArray[Any]]) -> Tensor:
    """Return the crops, which can be turned views of tiles, as one tensor of its own."""
    whole = np.empty((len(crops), *crops[0].shape), crops[0].dtype)
    for place, crop in zip(whole, crops, strict=True):
        place[...] = crop
    return torch.from_numpy(whole)


def _pool(
    loader: BatchLoader,
    recipe: Recipe,
    inputs: Sequence[ProbeInput],
    classes: int,
    ignore_index: int,
    device: torch.device,
) -> _Pool:
    """Return the first labelled crops of the run, decoded on ``device``."""
    tile_ids, tile_px, crop_px = loader.labeled.tile_ids, loader.dataset.source.tile_px, recipe.crop_px
    floats = sum(i.channels * (crop_px / i.stride_px) ** 2 for i in inputs) + classes * (crop_px / _CELL_PX) ** 2
    places = math.ceil(tile_px / crop_px) ** 2 * _orientations(loader)
    most = max(_LEAST_CROPS, min(_MOST_CROPS, int(_MOST_BYTES / (4 * floats))))
    draws = [loader.labeled.draw(n) for n in range(min(most, max(_LEAST_CROPS, len(tile_ids) * places)))]
    order = sorted(tile_ids, key=lambda tile_id: seed_of(recipe.seed, f"probe/{tile_id}"))
    fold_of = {tile_id: n % min(_FOLDS, len(order)) for n, tile_id in enumerate(order)}
    reader = Probe(inputs, classes)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {i.key: [] for i in inputs}
    shares = []
    cell_px = _cell_px(crop_px, min(i.stride_px for i in inputs))
    for start in range(0, len(draws), _READ):
        some = draws[start : start + _READ]
        samples = loader.dataset.samples(some, features=False)
        targets = loader.stack_targets(samples, loader.dataset.codes(some)).decoded(device)
        images = _stacked([s.image for s in samples]).to(device).permute(0, 3, 1, 2) / 255
        for entry, read in zip(inputs, reader.maps(targets, images), strict=True):
            found[entry.key].append(read)
        labels = _stacked([s.label for s in samples]).to(device)
        valid = _stacked([s.valid for s in samples]).to(device) & (labels != ignore_index)
        each = torch.stack([((labels == c) & valid).float() for c in range(classes)], 1)
        shares.append(F.avg_pool2d(each, cell_px))
    labelled = torch.cat(shares)
    if not bool(labelled.any()):
        raise DataError(
            f"probe: no pixel of the {len(draws)} crops of the labelled subset {recipe.labeled!r} is labelled; "
            "choose another subset or leave probe out"
        )
    maps = {key: (torch.cat([x for x, _ in read]), torch.cat([w for _, w in read])) for key, read in found.items()}
    cells = Grid(crop_px // cell_px, float(cell_px), cell_px / 2)
    return _Pool(maps, labelled, cells, torch.tensor([fold_of[d.tile_id] for d in draws], device=device))


def _orientations(loader: BatchLoader) -> int:
    turns = getattr(loader.dataset.geometry, "orientations", ())
    return max(1, len(turns)) if loader.recipe.augment.orientations else 1


def _cell_px(crop_px: int, stride_px: float) -> int:
    """Return the largest side up to ``stride_px`` that divides the crop."""
    return max(side for side in range(1, max(1, int(stride_px)) + 1) if crop_px % side == 0)


def _fit(inputs: Sequence[ProbeInput], pool: _Pool, config: ProbeConfig, classes: int, seed: int, steps: int) -> Probe:
    """Return a probe of ``inputs`` fitted to ``pool``: mean cross-entropy of cells, L2 penalty, LBFGS."""
    probe = Probe(inputs, classes, config.hidden, seed_of(seed, "probe")).to(pool.shares.device)
    taken = [pool.maps[i.key] for i in inputs]
    probe.measure(taken)
    maps = probe.standardize(taken)
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=steps, max_eval=2 * steps, tolerance_grad=0, tolerance_change=0,
        history_size=10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = torch.stack([w.square().sum() for w in probe.penalized()]).sum()
        value = _log_loss(probe, maps, pool) + config.weight_decay / 2 * penalty
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return probe


def _log_loss(probe: Probe, maps: Sequence[tuple[Tensor, Tensor]], pool: _Pool) -> Tensor:
    logits, grid = probe.logits(maps)
    said = resample(logits, grid, pool.cells).log_softmax(1)
    return -(pool.shares * said).sum() / pool.shares.sum().clamp_min(1e-6)


@torch.no_grad()
def _left_out(
    inputs: Sequence[ProbeInput], pool: _Pool, fold: int, config: ProbeConfig, classes: int, seed: int
) -> Tensor:
    """Return ``[C, C]`` pixels (label, prediction) of the tiles of ``fold``, by a probe fitted to the others."""
    others, held = pool.part(pool.folds != fold), pool.part(pool.folds == fold)
    probe = _fit(inputs, others, config, classes, seed, max(1, config.steps // 2))
    logits, grid = probe.logits(probe.standardize([held.maps[i.key] for i in inputs]))
    said = F.one_hot(resample(logits, grid, held.cells).argmax(1), classes).float()
    return torch.einsum("bcij,bijd->cd", held.shares, said)


def _mean_iou(confusion_CC: Tensor) -> float:
    """Return the mean over classes that are labelled or predicted anywhere."""
    both = confusion_CC.diagonal()
    union = confusion_CC.sum(0) + confusion_CC.sum(1) - both
    return float((both / union.clamp_min(1e-6))[union > 0].mean())
