"""The deployed student as one graph for any image: what an exporter is given, and what it could not express.

An exporter turns Python's ``if``, ``int()`` and ``max()`` on sizes into constants of the one size it sees, in silence.
So sides are padded and resized by arithmetic alone here, the size it sees is one at which nothing is left out as
superfluous (``example_px``), and what comes out is compared with the student at other sizes (``agreement``).

Shape legend: B batch, C classes, H W image side in pixels, h w input grid, p q output grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rsmtdf_train.fused_student import FusedStudent

__all__ = ["DeployedStudent", "PortableOperators", "adaptive_average", "antialiased_bicubic", "example_px", "least_px"]


class DeployedStudent(nn.Module):
    """Float RGB ``[B, 3, H, W]`` in 0..1, any side, to probabilities ``[B, C, H, W]``.

    What ``FusedStudent.predict`` computes, then softmax: normalisation, translators and fusion are inside, without the
    channels of any teacher (``TeacherFusion.fold``, of a copy).
    """

    def __init__(self, model: FusedStudent) -> None:
        super().__init__()
        self.model = model
        if model.fusion is not None and model.fuses:
            self.model = copy.deepcopy(model)
            assert self.model.fusion is not None
            self.model.fusion.fold()

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Return the probabilities of the classes; they add up to 1 at each pixel."""
        multiple = self.model.student.multiple_px
        height, width = image_B3HW.shape[-2:]
        if self.model.odd_sizes == "resize":
            near = [_nearest(side, multiple) for side in (height, width)]
            resized = _resize(image_B3HW, near)
            return _resize(self.model(resized), [height, width]).softmax(dim=1)
        padded = F.pad(image_B3HW, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        logits: Tensor = self.model(padded)
        return logits[..., :height, :width].softmax(dim=1)


def example_px(model: FusedStudent) -> tuple[int, int]:
    """Return height and width of the image that the exporter sees: two odd numbers of tokens, the last ones cut.

    Resizing to an even grid, padding and resampling of position embeddings are then all there to be recorded; for a
    size that needs none of them they do nothing.
    """
    multiple = model.student.multiple_px
    least = model.student.decoder.least
    tokens = max(5, least + 1 - least % 2)
    cut = multiple // 4
    return tokens * multiple - cut, (tokens + 2) * multiple - cut


def least_px(model: FusedStudent) -> int:
    """Return the least side of an image that ``model`` can read."""
    tokens, multiple = model.student.decoder.least, model.student.multiple_px
    if model.odd_sizes == "resize" and tokens > 1:
        return -(-(2 * tokens - 1) * multiple // 2)
    return (tokens - 1) * multiple + 1


class PortableOperators(TorchFunctionMode):
    """Within it, two operators that exporters lack are written as products with matrices of weights.

    ``adaptive_avg_pool2d`` to grids that depend on the input's, and antialiased bicubic resizing (position embeddings).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what stands for it."""
        given = dict(kwargs or {})
        if func is F.adaptive_avg_pool2d:
            return adaptive_average(*args, **given)
        if func is F.interpolate:
            image, size = (*args, *(given.get(name) for name in ("input", "size")[len(args) :]))[:2]
            if size is not None and given.get("mode") == "area":
                return adaptive_average(image, size)
            if size is not None and given.get("mode") == "bicubic" and given.get("antialias"):
                return antialiased_bicubic(image, size)
        return func(*args, **given)


def adaptive_average(input: Tensor, output_size: Any) -> Tensor:
    """Return ``adaptive_avg_pool2d(input, output_size)``: means of ``floor(i h / p) .. ceil((i + 1) h / p)``."""
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if all(isinstance(size, int) and size == 1 for size in sizes):
        return input.mean(dim=(-2, -1), keepdim=True)
    rows, columns = (
        _cell_means(input.shape[axis], input.shape[axis] if size is None else size, input)
        for axis, size in zip((-2, -1), sizes, strict=True)
    )
    return rows @ input @ columns.transpose(0, 1)


def antialiased_bicubic(input: Tensor, size: Sequence[Any]) -> Tensor:
    """Return ``interpolate(input, size, mode="bicubic", antialias=True)``: Keys' kernel with a = -0.5, widened."""
    rows, columns = (_cubic_weights(input.shape[axis], n, input) for axis, n in zip((-2, -1), size, strict=True))
    return rows @ input @ columns.transpose(0, 1)


def _cell_means(h: Any, p: Any, like: Tensor) -> Tensor:
    """Return ``[p, h]``: the weights of the means of adaptive pooling."""
    cells = torch.arange(p, device=like.device)[:, None]
    places = torch.arange(h, device=like.device)[None]
    first = torch.div(cells * h, p, rounding_mode="floor")
    stop = torch.div((cells + 1) * h + p - 1, p, rounding_mode="floor")
    inside = ((places >= first) & (places < stop)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _cubic_weights(h: Any, p: Any, like: Tensor) -> Tensor:
    """Return ``[p, h]``: the weights of antialiased bicubic resizing, which are wider where it shrinks."""
    wanted = torch.arange(p, device=like.device).to(like.dtype)[:, None]
    places = torch.arange(h, device=like.device).to(like.dtype)[None]
    scale = (torch.ones_like(wanted[:1]) * h) / p
    x = ((places + 0.5 - scale * (wanted + 0.5)) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def _nearest(side: Any, multiple: int) -> Any:
    """Return the multiple that is nearest to ``side``, the larger of two, and at least one, without asking a size."""
    count = (2 * side + multiple) // (2 * multiple)
    return (count + 1 // (count + 1)) * multiple


def _resize(x: Tensor, size: Sequence[Any]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
