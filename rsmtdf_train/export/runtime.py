"""An exported student in use, without torch: windows of scenes and whole images through ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, ResourceError, UsageError
from rsmtdf_cache.files import sha256_file
from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.sources.base import ClassInfo
from rsmtdf_train.export.record import INPUT, OUTPUT, StudentRecord

if TYPE_CHECKING:
    import torch

__all__ = ["OnnxSegmenter", "run_session", "session_of"]


def session_of(model: bytes | Path, threads: int | None = None, provider: str = "CPUExecutionProvider") -> Any:
    """Return an ONNX Runtime session of ``model``. ``threads``: by default ``OMP_NUM_THREADS``, else all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong comes as an exception
    wanted = os.environ.get("OMP_NUM_THREADS", "") if threads is None else str(threads)
    options.intra_op_num_threads = int(wanted) if wanted.isdecimal() else 0
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=[provider]
    )


def run_session(session: Any, image_B3HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities ``[B, C, H, W]`` of float RGB in 0..1."""
    (probabilities,) = session.run([OUTPUT], {INPUT: image_B3HW})
    found: NDArray[np.float32] = probabilities
    if not np.isfinite(found).all():
        raise DataError(
            "the file gives probabilities that are not finite, so all it says is chance; its weights are damaged: "
            "export the run again"
        )
    return found


class OnnxSegmenter:
    """A file of ``rsmtdf export`` in the place of a loaded student: what ``scenes`` asks of one, without torch."""

    def __init__(self, path: Path, device: str | None = None) -> None:
        """Open ``path``. ``device``: cpu (default) or cuda, where ONNX Runtime was built for it.

        Raises ``DataError`` for a file that is no student, ``ResourceError`` without onnxruntime, ``UsageError`` for a
        device that cannot be used.
        """
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; `rsmtdf export RUN --out {path}` writes one")
        self.path = path
        self.digest = sha256_file(path)
        self._session = _opened(path, device)
        try:
            self.record = StudentRecord.from_properties(self._session.get_modelmeta().custom_metadata_map)
            (image,), (output,) = self._session.get_inputs(), self._session.get_outputs()
            fits = (image.name, output.name, image.type, output.type) == (INPUT, OUTPUT, *["tensor(float)"] * 2)
            if not fits or output.shape[1] != len(self.record.classes):
                raise ValueError("inputs, outputs and classes are not those of a student")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path}: is ONNX, but not from `rsmtdf export` ({type(error).__name__}: {error}); export the run again"
            ) from None

    @property
    def name(self) -> str:
        """The run that the student is of."""
        return self.record.run

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return self.record.classes

    @property
    def crop_px(self) -> int:
        return self.record.window_px

    @property
    def multiple_px(self) -> int:
        return self.record.multiple_px

    @property
    def fixed_px(self) -> int | None:
        return self.record.fixed_px

    @property
    def square(self) -> bool:
        return self.record.square

    @property
    def pixels(self) -> PixelRule | None:
        return self.record.pixels

    def probabilities(self, images_B3HW: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return ``[B, C, H, W]`` of uint8 RGB. Raises ``UsageError`` for a size that the file does not read."""
        height, width = images_B3HW.shape[-2:]
        fixed, least = self.record.fixed_px, self.record.least_px
        if fixed is not None and (height, width) != (fixed, fixed):
            raise UsageError(
                f"{self.path} reads images of {fixed} x {fixed} px alone, found {width} x {height}; scenes of any size "
                "are cut into windows (--out MAP.tif)"
            )
        if min(height, width) < least:
            raise UsageError(f"{self.path} reads images of {least} px and more a side, found {width} x {height}")
        return run_session(self._session, images_B3HW.astype(np.float32) / np.float32(255))

    def mask(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return class numbers ``[H, W]`` of a uint8 RGB image, in one pass."""
        found = self.probabilities(np.ascontiguousarray(image_HW3.transpose(2, 0, 1))[None])
        mask: NDArray[np.uint8] = found[0].argmax(axis=0).astype(np.uint8)
        return mask

    def window_probabilities(
        self, windows: Sequence[NDArray[np.uint8]], device: torch.device | None, *, count: int, tta: bool
    ) -> NDArray[np.float32]:
        """Return ``[windows, C, H, W]`` of uint8 RGB ``[3, H, W]``; see ``scenes.blend.window_probabilities``."""
        images = np.stack([*windows, *([windows[-1]] * (count - len(windows)))])
        if not tta:
            return self.probabilities(images)[: len(windows)]
        total: NDArray[np.float32] | None = None
        for turns in range(4):
            for mirrored in (False, True):
                seen = np.rot90(images, turns, (2, 3))
                made = self.probabilities(np.ascontiguousarray(seen[..., ::-1] if mirrored else seen))
                made = np.rot90(made[..., ::-1] if mirrored else made, -turns, (2, 3))
                total = made.copy() if total is None else total + made
        assert total is not None
        mean: NDArray[np.float32] = total[: len(windows)] / np.float32(8)
        return mean


def _opened(path: Path, device: str | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ResourceError(
            f"{path} needs the package onnxruntime ({error}): pip install 'rsmtdf[export]' "
            "(in a clone: pip install -e '.[export]')"
        ) from None
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device or "cpu")
    if provider is None or provider not in onnxruntime.get_available_providers():
        raise UsageError(
            f"--device {device}: ONNX Runtime as it is installed here cannot use it; leave it out or use cpu "
            "(cuda needs the package onnxruntime-gpu)"
        )
    try:
        return session_of(path, provider=provider)
    except Exception as error:  # of ONNX Runtime's own kinds
        reason = str(error).strip().partition("\n")[0][:160]
        raise DataError(f"{path}: ONNX Runtime cannot read it ({reason}); export the run again") from None
