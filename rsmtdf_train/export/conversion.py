"""A student as an ONNX graph: torch's tracing exporter on the portable student, then only what belongs into the file.

The tracing exporter, not that of ``torch.export``: on our students the latter takes half a minute in place of half a
second, and keeps the size it saw as well, in silence (docs/decisions/0026-export.md). Both are judged by ``agreement``.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rsmtdf_cache.errors import ResourceError, UsageError
from rsmtdf_train.export.portable import DeployedStudent, PortableOperators, example_px
from rsmtdf_train.export.record import INPUT, OUTPUT
from rsmtdf_train.fused_student import FusedStudent

__all__ = ["OPSETS", "convert", "described", "require_packages"]

#: Versions of ONNX's operators that can be asked for; the first is the default.
OPSETS = (18, 17, 19, 20)
#: What a protobuf holds, less what is not weights.
_NBYTES_MAX = 2**31 - 2**26


def require_packages() -> None:
    """Raise ``ResourceError`` when a package of the extra ``export`` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"ONNX needs the packages onnx and onnxruntime ({error}): pip install 'rsmtdf[export]' "
            "(in a clone: pip install -e '.[export]')"
        ) from None


def convert(model: FusedStudent, opset: int, fixed_px: int | None = None) -> bytes:
    """Return ``model`` (in eval mode, on the CPU) as an ONNX file of its own: float images in, probabilities out.

    Batch and sides are free; with ``fixed_px`` the sides are that. Raises ``UsageError`` for a student that cannot be
    expressed so.
    """
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if nbytes > _NBYTES_MAX:
        raise UsageError(f"an ONNX file holds 2 GB, this student has {nbytes / 1e9:.1f} GB of weights")
    sides = (fixed_px, fixed_px) if fixed_px is not None else example_px(model)
    free = {0: "batch"} if fixed_px is not None else {0: "batch", 2: "height", 3: "width"}
    example = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(0))
    _require_size(model, example, fixed_px)
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.inference_mode(), PortableOperators():
            torch.onnx.export(DeployedStudent(model).eval(), (example,), **_tracing(buffer, opset, free))
    except MemoryError:
        raise
    except Exception as error:  # exporters raise many kinds; all of them mean that they cannot
        raise UsageError(
            f"this student cannot be written as ONNX ({type(error).__name__}: {_first_line(error)})"
        ) from None
    return buffer.getvalue()


def described(data: bytes, classes: int, properties: Mapping[str, str]) -> bytes:
    """Return the file with ``properties`` as its metadata, checked; without what the exporter noted of its own code.

    The number of classes, which tracing loses, becomes part of the output's shape.
    Raises ``UsageError`` when ONNX's own checker finds a fault.
    """
    import onnx

    graph = onnx.load_from_string(data)
    for node in graph.graph.node:
        node.doc_string = ""
    graph.graph.name = "rsmtdf"
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = classes
    onnx.helper.set_model_props(graph, dict(properties))
    try:
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # of several kinds, by what is wrong
        raise UsageError(f"this student cannot be written as ONNX (its checker: {_first_line(error)})") from None
    content: bytes = graph.SerializeToString(deterministic=True)
    return content


@torch.inference_mode()
def _require_size(model: FusedStudent, example: torch.Tensor, fixed_px: int | None) -> None:
    """Raise ``UsageError`` for a student that reads another size alone, with the way out."""
    try:
        model.predict(example)
    except UsageError as error:
        why = str(error).partition(";")[0]
        if fixed_px is not None:
            raise UsageError(f"--fixed {fixed_px}: {why}; give the side it reads") from None
        raise UsageError(
            f"this student cannot be exported for images of any size: {why}; --fixed PX writes a file for one side"
        ) from None


def _tracing(buffer: io.BytesIO, opset: int, free: Mapping[int, str]) -> dict[str, Any]:
    """Return what asks this version of torch for the tracing exporter: older ones have no other."""
    choice = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    return choice | {
        "f": buffer,
        "opset_version": opset,
        "input_names": [INPUT],
        "output_names": [OUTPUT],
        "dynamic_axes": {INPUT: free, OUTPUT: free},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says to people: it warns of every ``if`` that ``agreement`` judges by its effect.

    When it gives up, its C++ part prints the whole graph, past Python.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _no_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Point the process's standard output nowhere; what C has buffered goes where it was meant to go."""
    with contextlib.redirect_stdout(io.StringIO()):
        flush = getattr(ctypes.CDLL(None), "fflush", lambda stream: None)
        flush(None)
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]
