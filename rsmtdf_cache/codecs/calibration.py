"""What a calibrated codec must know of an array before the first shard: mean, deviation and covariance of its channels.

Sums are float64, added tile by tile in the order of the sample. The artefact is one safetensors file, named by its own
sha256; a store keeps it next to the ledger, and another build can reuse it, so that independent builds of one dataset
can be merged (codes are never quantised twice).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError

__all__ = ["Calibration", "Moments"]

_FORMAT = "rsmtdf-calibration"
_MOST_CHANNELS = 2**14
_MOST_NBYTES, _MOST_HEADER = 2**28, 2**20
#: Features are half precision at most, so no statistic of them is larger.
_MOST = 65504.0


@dataclass
class Moments:
    """Float64 sums over tokens: count, sum ``[D]``, and sum of outer products ``[D, D]`` about ``origin``."""

    channels: int
    count: int = 0
    origin: NDArray[np.float64] | None = None  # mean of the first map: sums about it lose no digits

    def __post_init__(self) -> None:
        self._sums = np.zeros(self.channels)
        self._products = np.zeros((self.channels, self.channels))

    def add(self, features: NDArray[np.float32]) -> None:
        """Count one map ``[h, w, D]``."""
        tokens = features.reshape(-1, self.channels).astype(np.float64)
        if self.origin is None:
            self.origin = tokens.mean(0)
        tokens -= self.origin
        self.count += len(tokens)
        self._sums += tokens.sum(0)
        self._products += tokens.T @ tokens

    def mean(self) -> NDArray[np.float64]:
        """Return the mean per channel ``[D]``."""
        origin = np.zeros(self.channels) if self.origin is None else self.origin
        return origin + self._sums / max(self.count, 1)

    def covariance(self) -> NDArray[np.float64]:
        """Return the population covariance ``[D, D]``."""
        n = max(self.count, 1)
        shift = self._sums / n
        return self._products / n - np.outer(shift, shift)


@dataclass(frozen=True)
class Calibration:
    """Mean ``[D]`` and covariance ``[D, D]`` of a sample of tokens, and ``about``: of which array, how many tiles.

    ``basis`` ``[D, D]`` and ``variances`` ``[D]``: principal axes of the standardised channels (rows) and the variances
    along them, largest first; None for codecs that do not project.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    basis: NDArray[np.float32] | None = None
    variances: NDArray[np.float32] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, moments: Moments, components: int, about: Mapping[str, Any]) -> Self:
        """Return the calibration of a sample; ``components``: principal axes to keep, 0 for none."""
        covariance = moments.covariance()
        std = np.sqrt(np.maximum(np.diag(covariance), 0))
        bare = cls(moments.mean().astype(np.float32), std.astype(np.float32), about=about)
        if not components:
            return bare
        spread = bare.spread().astype(np.float64)
        variances, axes = np.linalg.eigh(covariance / np.outer(spread, spread))
        variances, axes = variances[::-1][:components], axes[:, ::-1][:, :components].T
        signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # the same axes, whatever LAPACK chose
        return cls(
            bare.mean, bare.std, (axes * signs[:, None]).astype(np.float32),
            np.maximum(variances, 0).astype(np.float32), about,
        )  # fmt: skip

    @property
    def channels(self) -> int:
        return len(self.mean)

    def spread(self) -> NDArray[np.float32]:
        """Return what each channel is divided by ``[D]``: its standard deviation, at least 1 % of the usual one.

        A channel that slept through the sample must not take all levels of a token in which it wakes up.
        """
        usual = float(np.sqrt(np.mean(np.square(self.std, dtype=np.float64))))
        floor = 0.01 * usual if usual > 0 else 1.0
        return np.maximum(self.std, np.float32(floor))

    def components(self, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the first ``count`` principal axes ``[count, D]`` and the deviations along them ``[count]``."""
        if self.basis is None or self.variances is None or len(self.basis) < count:
            found = 0 if self.basis is None else len(self.basis)
            raise FindingsError(f"the calibration has {found} principal axes, {count} are needed")
        deviations = np.sqrt(self.variances[:count])
        return self.basis[:count], np.maximum(deviations, np.float32(1e-3) * max(float(deviations[0]), 1e-6))

    def to_bytes(self) -> bytes:
        """Return the artefact: the same calibration makes the same bytes."""
        from safetensors.numpy import save

        tensors = {"mean": self.mean, "std": self.std}
        if self.basis is not None and self.variances is not None:
            tensors |= {"basis": np.ascontiguousarray(self.basis), "variances": self.variances}
        text = json.dumps({"format": _FORMAT, "about": dict(self.about)}, sort_keys=True)
        return save(tensors, metadata={"calibration": text})

    @property
    def digest(self) -> str:
        """Return the sha256 (64 hex digits) of the artefact."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Return the calibration of an artefact. Raises ``FindingsError`` when it is none or has impossible values."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            length = int.from_bytes(data[:8], "little")
            if length > _MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(data[8 : 8 + length])
            stated = json.loads(header["__metadata__"]["calibration"])
            if stated["format"] != _FORMAT:
                raise ValueError(f"format {stated['format']!r}")
            about = dict(stated["about"])
            found = load(data)
            mean, std = found["mean"], found["std"]
            basis, variances = found.get("basis"), found.get("variances")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FindingsError(f"{where}: not a calibration ({type(error).__name__}: {error})") from None
        shapes = mean.ndim == 1 and mean.shape == std.shape and 0 < len(mean) <= _MOST_CHANNELS
        if basis is not None:
            shapes = shapes and variances is not None and basis.shape == (len(variances), len(mean))
        arrays = [a for a in (mean, std, basis, variances) if a is not None]
        if not shapes or not all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays):
            raise FindingsError(f"{where}: not a calibration (shapes or values are impossible)")
        sound = np.abs(mean).max() <= _MOST and std.min() >= 0 and std.max() <= _MOST
        if basis is not None and variances is not None:
            products = basis.astype(np.float64) @ basis.T.astype(np.float64)
            sound = sound and variances.min() >= 0 and variances.max() <= _MOST * len(mean)
            sound = sound and bool(np.abs(products - np.eye(len(basis))).max() < 1e-3)
        if not sound:
            raise FindingsError(f"{where}: not a calibration (impossible deviations, or axes that are not orthonormal)")
        return cls(mean, std, basis, variances, about)

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> Self:
        """Return the calibration in the file ``path``, whose sha256 is ``digest``, or its own name where that is one.

        Raises ``FindingsError`` when it is missing, too large, damaged or none.
        """
        if not path.is_file() or path.stat().st_size > _MOST_NBYTES:
            raise FindingsError(f"{path}: missing, or too large to be a calibration")
        data, wanted = path.read_bytes(), digest or path.stem
        if re.fullmatch("[0-9a-f]{64}", wanted) and hashlib.sha256(data).hexdigest() != wanted:
            raise FindingsError(f"{path}: damaged (its sha256 is not its name)")
        return cls.from_bytes(data, str(path))
