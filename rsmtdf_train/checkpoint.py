"""What of a run is on disk: atomic saves, strict loads, and the folder's layout.

::

    RUN/recipe.yaml                       the resolved recipe
    RUN/store.json                        which content of which store it reads; see ``run_store``
    RUN/metrics.json                      scores, written when the run is complete
    RUN/log.jsonl                         one object per step
    RUN/checkpoints/last.pt               everything mutable; read with ``weights_only=True``
    RUN/checkpoints/student.safetensors   the deployed student after the last step, described by its own header
    RUN/checkpoints/ema.safetensors       its moving average
    RUN/checkpoints/best.safetensors      the one that scored best on the validation split (``validation.keep: best``)
    RUN/validation.jsonl                  one object per score on the validation split
    RUN/pictures/  RUN/tensorboard/
    RUN/.lock                             while a process trains it
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsmtdf_cache.errors import DataError, MismatchError, ResourceError, UsageError
from rsmtdf_cache.files import build_lock, is_locked, replace_file
from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.sources.base import ClassInfo
from rsmtdf_cache.specs import differing_fields
from rsmtdf_train.fused_student import FusedStudent, build_fused_student
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.recipe import Recipe, load_recipe
from rsmtdf_train.state import Best, TrainState

__all__ = [
    "CHECKPOINT_KINDS",
    "RunFolder",
    "RunIdentity",
    "load_checkpoint",
    "load_deployed",
    "save_checkpoint",
    "save_deployed",
]

FORMAT = 1

#: What every run can score and deploy, in the order it is reported.
CHECKPOINT_KINDS = ("ema", "student")


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def validation(self) -> Path:
        return self.root / "validation.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.pt"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def is_taken(self) -> bool:
        """Whether something lies there that is no run."""
        return self.root.is_dir() and not self.recipe.is_file() and any(p != self._lock for p in self.root.iterdir())

    def refuse_held(self) -> None:
        """Raise ``ResourceError`` when another process trains this run now."""
        if is_locked(self._lock):
            who = ""
            with contextlib.suppress(OSError):  # it has just ended
                who = self._lock.read_text()[:200].strip()
            raise ResourceError(
                f"{self.root}: {who or 'another process'} trains this run now; wait for its end, or choose another "
                "--out"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands from training this run meanwhile; the system lets go of it when this process dies.

        Raises ``ResourceError`` when another process holds it. A folder that cannot be written to, or a file system
        without locks, is not held.
        """
        new = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(build_lock(self._lock, self.refuse_held))
                self._lock.write_text(f"process {os.getpid()} on {platform.node()}")
                for folder in (self.root, self.checkpoints):  # what a process that was killed while it wrote has left
                    for draft in folder.glob(".*.tmp"):
                        draft.unlink(missing_ok=True)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    self._lock.unlink()
                    if new:
                        self.root.rmdir()  # if nothing was written to it

    @property
    def _lock(self) -> Path:
        return self.root / ".lock"

    def deployed(self, kind: str) -> Path:
        """Return the path of the deployed ``student``, ``ema`` or ``best``."""
        return self.checkpoints / f"{kind}.safetensors"

    def deployed_kind(self) -> str:
        """Return what the run deploys: ``best`` where its recipe keeps that, else ``ema``."""
        return "best" if self.load_recipe().validation.keep == "best" else "ema"

    def kinds(self) -> tuple[str, ...]:
        """Return all kinds that a complete run has, in the order they are reported."""
        return (*CHECKPOINT_KINDS, "best") if self.deployed_kind() == "best" else CHECKPOINT_KINDS

    def load_recipe(self) -> Recipe:
        """Return the run's recipe. Raises ``UsageError`` when ``root`` is no run."""
        if not self.recipe.is_file():
            raise UsageError(f"{self.root}: not a run folder (no recipe.yaml); give the folder of --out")
        return load_recipe(self.recipe)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is: its recipe, the content of the store it reads, and what it segments into."""

    recipe: Recipe
    snapshot: str | None
    classes: tuple[ClassInfo, ...]
    ignore_index: int
    targets: tuple[TargetShape, ...]
    teachers: tuple[tuple[str, str], ...] = ()  # names and weights digests of live teachers
    pixels: PixelRule | None = None  # how values became the 8-bit RGB it learned from; None: the files held that

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data that ``from_json`` reads back to an equal value."""
        return {
            "format": FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "store": self.snapshot,
            "classes": [{"name": c.name, "color": list(c.color)} for c in self.classes],
            "ignore_index": self.ignore_index,
            "targets": [vars(t) for t in self.targets],
            **({"teachers": dict(self.teachers)} if self.teachers else {}),
            **({"pixels": self.pixels.to_json()} if self.pixels is not None else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunIdentity:
        """Return the value of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']} is not {FORMAT}; use the version of rsmtdf that wrote it")
        classes = tuple(ClassInfo(c["name"], (c["color"][0], c["color"][1], c["color"][2])) for c in data["classes"])
        return cls(
            recipe=Recipe.model_validate(data["recipe"]),
            snapshot=data["store"],
            classes=classes,
            ignore_index=data["ignore_index"],
            targets=tuple(TargetShape(**t) for t in data["targets"]),
            teachers=tuple(sorted(data.get("teachers", {}).items())),
            pixels=PixelRule.from_json(data["pixels"]) if "pixels" in data else None,
        )

    def require_same(self, other: RunIdentity, where: Path) -> None:
        """Raise ``MismatchError`` with the differing fields unless ``other``, found at ``where``, is this run."""
        lines = [
            line.replace(" (store) != ", " (run) != ") for line in differing_fields(other.to_json(), self.to_json())
        ]
        if lines:
            raise MismatchError(
                f"{where} holds another run; a run is continued with its own recipe and store only. Choose another "
                "--out, or delete this one. They differ in:\n" + "\n".join(f"  {line}" for line in lines)
            )


def save_checkpoint(folder: RunFolder, identity: RunIdentity, state: TrainState) -> None:
    """Replace ``last.pt`` atomically and durably: a crash leaves the old checkpoint or the new one."""
    buffer = io.BytesIO()
    torch.save(
        {
            "identity": json.dumps(identity.to_json()),
            "step": state.step,
            "student": state.student.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "best": asdict(state.best),
            "stopped": state.stopped,
        },
        buffer,
    )
    replace_file(folder.last, buffer.getvalue())


def load_checkpoint(folder: RunFolder, identity: RunIdentity, state: TrainState) -> bool:
    """Continue ``state`` from ``last.pt``; return False, with ``state`` untouched, when there is none.

    Raises ``MismatchError`` for another recipe, store or dataset, ``DataError`` for a damaged file.
    """
    if not folder.last.is_file():
        return False
    damaged = (
        f"{folder.last} is damaged or no checkpoint of rsmtdf ({{}}); restore it from a copy, or delete {folder.root} "
        "and train again"
    )
    try:
        data = torch.load(folder.last, map_location="cpu", weights_only=True)
        there = RunIdentity.from_json(json.loads(data["identity"]))
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise DataError(damaged.format(f"{type(error).__name__}: {_first_line(error)}")) from None
    identity.require_same(there, folder.root)
    try:
        state.student.load_state_dict(data["student"], strict=True)
        state.ema.load_state_dict(data["ema"], strict=True)
        state.optimizer.load_state_dict(data["optimizer"])
        state.scaler.load_state_dict(data.get("scaler", {}))
        state.best = Best(**data.get("best", {}))  # checkpoints of earlier versions have none
        state.stopped = bool(data.get("stopped", False))
        state.step = int(data["step"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(damaged.format(_first_line(error))) from None
    return True


def save_deployed(path: Path, model: FusedStudent, identity: RunIdentity, kind: str, step: int) -> None:
    """Write what is deployed, with a header that says all that is needed to build and to use it."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {k: v.detach().cpu().contiguous().clone() for k, v in model.deployed_state().items()}
    header = identity.to_json() | {"targets": [vars(t) for t in model.deployed_targets], "kind": kind, "step": step}
    replace_file(path, save(tensors, metadata={"rsmtdf": json.dumps(header)}))


def load_deployed(folder: RunFolder, kind: str, device: torch.device) -> tuple[FusedStudent, RunIdentity]:
    """Return the deployed ``student``, ``ema`` or ``best`` of a run in eval mode, and what it is.

    Needs neither the dataset nor the store. Raises ``UsageError`` for a folder without it, ``DataError`` for a
    damaged file.
    """
    from safetensors import SafetensorError, safe_open

    path = folder.deployed(kind)
    if not path.is_file():
        if kind == "best" and folder.load_recipe().validation.keep != "best":
            raise UsageError(f"{path}: this run keeps no best weights (validation.keep is not best in its recipe)")
        folder.load_recipe()
        raise UsageError(f"{path}: there is none, the run is not complete; the same `rsmtdf train` again finishes it")
    try:
        with safe_open(path, framework="pt") as file:
            identity = RunIdentity.from_json(json.loads((file.metadata() or {})["rsmtdf"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        model = build_fused_student(identity.recipe, len(identity.classes), identity.targets, load_weights=False)
        model.load_state_dict(tensors, strict=True)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} is damaged or no student of rsmtdf ({_first_line(error)}); train the run again"
        ) from None
    lost = next((n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())), None)
    if lost is not None:
        raise DataError(
            f"{path}: its weights are not finite (NaN or infinity in {lost}), so all it says is chance; the run has "
            "diverged or the file is damaged: train it again, with a lower rate or another precision"
        )
    return model.to(device).eval().requires_grad_(False), identity


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120]
