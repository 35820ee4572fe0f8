"""Where the tokens of a network lie, read off the operations that an image runs through.

A map's tokens have their centres at ``centre + i * stride`` input pixels (index 0 is the pixel centre 0.5, see
``specs``). A convolution or pool moves the centre of token 0 by ``dilation * (kernel - 1) / 2 - padding_left`` steps of
its input, and multiplies the stride; a padding before it (TensorFlow's rule depends on the input's side) moves it by
its left width.
All other operations keep the geometry of their first tensor: the trunk of a residual, the queries of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Geometry", "map_geometry", "meta_copy"]


class Geometry(NamedTuple):
    """Tokens of a map along the columns of the image: index of the first centre, distance of neighbours."""

    centre: float
    stride: int

    def moved(self, steps: float, stride: int = 1) -> Geometry:
        """Return the geometry after a move by ``steps`` tokens and a reduction by ``stride``."""
        return Geometry(self.centre + steps * self.stride, self.stride * stride)


def meta_copy(network: nn.Module) -> nn.Module:
    """Return a copy of ``network`` without data: a forward pass through it yields shapes at no cost."""
    empty: dict[int, Any] = {}
    for tensor in [*network.parameters(), *network.buffers()]:
        hollow = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(hollow, False) if isinstance(tensor, nn.Parameter) else hollow
    return copy.deepcopy(network, empty)


def map_geometry(run: Callable[[Tensor], Sequence[Tensor]], side: int) -> tuple[list[Tensor], list[Geometry]]:
    """Return the ``[1, D, h, w]`` meta tensors that ``run`` makes of an image of ``side``, and where their tokens lie.

    A reduction that no convolution or pool made is taken for a grouping of whole cells, as patch merging does.
    """
    image = torch.empty(1, 3, side, side, device="meta")
    follow = _Follow(image)
    with torch.no_grad(), follow:  # not inference_mode: there, composite operations arrive undivided
        maps = list(run(image))
    return maps, [follow.of(m) for m in maps]


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.side = int(image.shape[-1])
        # Tensors are kept with their geometry, so that no id is used twice.
        self.known: dict[int, tuple[Tensor, Geometry]] = {id(image): (image, Geometry(0.0, 1))}

    def of(self, tensor: Tensor) -> Geometry:
        """Return the geometry of a ``[B, D, h, w]`` tensor, reductions by grouping included."""
        geometry = self.known[id(tensor)][1]
        missing = round(self.side / (int(tensor.shape[-1]) * geometry.stride))
        return geometry.moved((missing - 1) / 2, missing) if missing > 1 else geometry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.known), None)
        if source is not None:
            geometry = self._after(func.overloadpacket.__name__, source, args)
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self.known[id(made)] = (made, geometry)
        return out

    def _after(self, name: str, source: Tensor, args: Any) -> Geometry:
        if name == "convolution" and not args[6]:
            kernel, (stride, padding, dilation) = args[1].shape[-1], (a[-1] for a in args[3:6])
        elif name in ("max_pool2d_with_indices", "avg_pool2d"):
            kernel = args[1][-1]
            stride = args[2][-1] if len(args) > 2 and args[2] else kernel
            padding = args[3][-1] if len(args) > 3 else 0
            dilation = args[4][-1] if len(args) > 4 and name.startswith("max") else 1
        elif name in ("constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
            return self.known[id(source)][1].moved(-args[1][0]) if source.ndim == 4 else self.known[id(source)][1]
        else:
            return self.known[id(source)][1]
        return self.of(source).moved(dilation * (kernel - 1) / 2 - padding, stride)
