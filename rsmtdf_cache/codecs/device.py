"""Decoding where the training runs: codes travel as they are stored, and become features in two passes on the device.

Shape legend: C stored channels, D channels of the teacher, ``...`` any leading axes.
"""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.codecs.base import Codec

__all__ = ["DeviceDecoder"]


class DeviceDecoder:
    """Turns codes of one array into float32 features: channels in the teacher's scale or standardised, or components.

    Standardising costs nothing: ``(x - mean) / std`` is folded into the gain and offset of the codec. What is decoded
    stays on the device of the codes. Can be pickled.
    """

    def __init__(
        self, codec: Codec, mean: NDArray[np.float32] | None = None, std: NDArray[np.float32] | None = None
    ) -> None:
        """``mean``, ``std`` ``[D]``: standardise with them; an infinite ``std`` makes a channel 0. None: do not."""
        gain, offset = codec.affine.gain, codec.affine.offset
        self._plain = gain is None  # float16: the same arithmetic as on features, bit for bit
        if gain is not None and offset is not None and mean is not None and std is not None:
            gain, offset = gain / std, (offset - mean) / std
        elif gain is None and mean is not None and std is not None:
            gain, offset = std, mean
        self._held: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        self._gain, self._offset = gain, offset

    @classmethod
    def of_components(cls, codec: Codec) -> Self:
        """Return what makes the principal components of the standardised channels ``[..., C]``, times sqrt(C / D).

        So the mean square over C components is that over D channels, less what the other axes held. Raises
        ``ValueError`` for a codec that stores channels.
        """
        if codec.component_std is None:
            raise ValueError(f"codec {codec.encoding.codec} stores channels, no components")
        made = cls(codec)
        std = codec.component_std
        made._gain = (std * math.sqrt(len(std) / codec.channels)).astype(np.float32)
        made._offset = np.zeros_like(std)
        return made

    def __call__(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return ``[..., D]`` float32 (``[..., C]`` of components) of codes ``[..., C]`` and scales ``[...]``.

        A NaN scale makes a token NaN.
        """
        gain, offset = self._on(values.device)
        # int8 times float32 is one pass, without a copy of the codes in float32.
        z = values.float() if scale is None else torch.mul(values, scale.float().unsqueeze(-1))
        if gain is None or offset is None:
            return z
        if self._plain:
            return z.sub_(offset).div_(gain)
        if gain.ndim == 1:
            return torch.addcmul(offset, z, gain)
        flat = torch.addmm(offset, z.reshape(-1, z.shape[-1]), gain)
        return flat.view(*z.shape[:-1], gain.shape[1])

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if device not in self._held:
            self._held[device] = (
                None if self._gain is None else torch.from_numpy(np.ascontiguousarray(self._gain)).to(device),
                None if self._offset is None else torch.from_numpy(np.ascontiguousarray(self._offset)).to(device),
            )
        return self._held[device]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": {}}
