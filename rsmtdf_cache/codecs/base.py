"""The contract of a codec. One file of this folder = one codec.

Shape legend: D channels of the teacher, C stored channels (D, or fewer after a projection), ``...`` any leading axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.calibration import Calibration
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import EncodingSpec

__all__ = ["Affine", "Codec", "Codes"]


@dataclass(frozen=True)
class Codes:
    """Features as stored: numbers ``[..., C]`` and, where the codec has one, a float16 scale per token ``[...]``.

    A token without features has a NaN in one of them.
    """

    values: NDArray[Any]
    scale: NDArray[np.float16] | None = None

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes) + (0 if self.scale is None else int(self.scale.nbytes))

    def __getitem__(self, index: Any) -> Codes:
        """Return a part along the leading axes."""
        return Codes(self.values[index], None if self.scale is None else self.scale[index])

    def tobytes(self) -> bytes:
        """Return all stored bytes, for comparisons."""
        return self.values.tobytes() + (b"" if self.scale is None else self.scale.tobytes())

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Return ``[...]``: False for tokens that have no features."""
        return np.isfinite(self.values).all(-1) if self.scale is None else np.isfinite(self.scale)


@dataclass(frozen=True)
class Affine:
    """How codes times scale, ``z`` ``[..., C]``, become features: ``z * gain + offset`` or ``z @ gain + offset``.

    ``gain``: ``[D]`` (then C = D), ``[C, D]``, or None = 1. ``offset``: ``[D]``, or None = 0. All float32.
    """

    gain: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None


class Codec(ABC):
    """Maps float32 features ``[..., D]`` to ``Codes`` and back to the teacher's own scale."""

    #: Type and value of a missing chunk of ``Codes.values``.
    dtype: ClassVar[np.dtype[Any]]
    fill: ClassVar[float]
    #: Whether tokens have a scale of their own, and whether the codec must see features before it can encode.
    scaled: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    #: Whether the writer sums its values up (``ChannelStats``), and refuses those that are not finite.
    counted: ClassVar[bool] = True
    #: A chunk is at most so many tokens a side (decision 5).
    chunk_side: ClassVar[int] = 32

    def __init__(self, encoding: EncodingSpec, channels: int, calibration: Calibration | None = None) -> None:
        """``calibration`` is needed when ``calibrated``; ``load_codec`` makes sure that it fits."""
        self.encoding, self.channels, self.calibration = encoding, channels, calibration

    @classmethod
    def stored_channels(cls, encoding: EncodingSpec, channels: int) -> int:
        """Return C for features of D = ``channels``. Raises ``UsageError`` for parameters it cannot take."""
        if encoding.parameters:
            raise UsageError(f"codec {encoding.codec} takes no parameters, found {', '.join(encoding.parameters)}")
        return channels

    @abstractmethod
    def encode(self, features: NDArray[np.float32]) -> Codes:
        """Return the stored form. Values the codec cannot hold become non-finite, never wrong numbers."""

    @property
    @abstractmethod
    def affine(self) -> Affine:
        """How codes times scale become features; what decoding on a device needs."""

    @property
    def component_std(self) -> NDArray[np.float32] | None:
        """Return the deviations ``[C]`` along the stored principal components, whose ``z`` is whitened by them.

        The components are along orthonormal axes of the standardised channels. None: channels are stored.
        """
        return None

    def decode(self, codes: Codes) -> NDArray[np.float16]:
        """Return features ``[..., D]`` in the teacher's own scale; shares memory with ``codes`` where it can."""
        affine = self.affine
        if codes.scale is None and affine.gain is None and affine.offset is None:
            values: NDArray[np.float16] = codes.values
            return values
        z: NDArray[Any] = codes.values.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # a token without features has a NaN or infinite scale
            if codes.scale is not None:
                z *= codes.scale[..., None].astype(np.float32)
            if affine.gain is not None and affine.gain.ndim == 2:
                # Sums of a product depend on how many tokens there are; in float64 that is lost in the rounding to
                # half precision, so that a crop is the same bits as the part of the map that it is.
                z = z.astype(np.float64) @ affine.gain
            elif affine.gain is not None:
                z *= affine.gain
            if affine.offset is not None:
                z += affine.offset
            return z.astype(np.float16)
