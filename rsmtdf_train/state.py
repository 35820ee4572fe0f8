"""Everything that changes while a run goes on: student, EMA, optimiser, step. Nothing else does."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rsmtdf_cache.errors import UsageError
from rsmtdf_train.fused_student import FusedStudent, build_fused_student
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sections import OptimConfig

__all__ = [
    "Best", "TrainState", "build_state", "learning_rates", "lr_factor", "require_finite", "set_learning_rates",
    "update_ema",
]  # fmt: skip

#: Exponent of the polynomial schedule (RS-MTDF and most of segmentation).
_POWER = 0.9


@dataclass
class Best:
    """The best score on the validation split so far (mean IoU in 0..1), its step, and scores since without a better."""

    miou: float = -1.0
    step: int = 0
    since: int = 0


@dataclass
class TrainState:
    """The mutable things of a run. ``step`` counts finished steps; ``stopped``: early, for want of better scores."""

    student: FusedStudent
    ema: FusedStudent
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0
    best: Best = field(default_factory=Best)
    stopped: bool = False


def build_state(
    recipe: Recipe,
    classes: int,
    targets: Sequence[TargetShape],
    device: torch.device,
    *,
    load_weights: bool = True,
) -> TrainState:
    """Return the state before the first step: a seeded student, its copy as EMA, a fresh optimiser."""
    student = build_fused_student(recipe, classes, targets, load_weights=load_weights).to(device)
    if recipe.channels_last:
        student = student.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    encoder = list(student.student.encoder.parameters())
    inside = {id(p) for p in encoder}
    rest = [p for p in student.parameters() if id(p) not in inside]
    rates = learning_rates(recipe.optim)
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": rates[0]}, {"params": rest, "lr": rates[1]}],
        weight_decay=recipe.optim.weight_decay,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    return TrainState(student.train(), ema, optimizer, scaler)


def require_finite(state: TrainState) -> None:
    """Raise ``UsageError`` unless all weights and running statistics are finite.

    A finite loss can have an infinite gradient, and a clipped one of that is NaN.
    """
    known = [t for t in state.student.state_dict().values() if t.is_floating_point()]
    if not bool(torch.stack([t.isfinite().all() for t in known]).all()):
        raise UsageError(
            f"step {state.step}: weights are not finite numbers any more, though the loss is; the last checkpoint is "
            "kept. Lower optim.lr, or set precision=float32; the gradient was too large for a number"
        )


def learning_rates(config: OptimConfig) -> tuple[float, float]:
    """Return the top learning rates of encoder and rest."""
    return (config.encoder_lr if config.encoder_lr is not None else config.lr, config.lr)


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Return the factor of the learning rate at ``step`` (0-based) of ``steps``: linear warm-up, then the schedule.

    ``schedule_lag``: the decay is that of so many steps before, for code that sets the rate after a step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = max(step - config.schedule_lag, 0) / steps
    if config.schedule == "poly":
        return float((1 - progress) ** _POWER)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set the rates of ``step`` and return that of everything but the encoder."""
    factor = lr_factor(config, step, steps)
    for group, rate in zip(optimizer.param_groups, learning_rates(config), strict=True):
        group["lr"] = rate * factor
    return config.lr * factor


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """Move ``ema`` towards ``student`` after ``step`` (0-based): ``d = min(1 - 1 / (step + 1), decay)``.

    Float parameters and buffers are averaged, counters are copied. At step 0 the EMA becomes the student.
    """
    share = 1 - min(1 - 1 / (step + 1), decay)
    mine, theirs = list(ema.state_dict().values()), list(student.state_dict().values())
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], share)
    for a, b in zip(mine, theirs, strict=True):
        if not a.is_floating_point():
            a.copy_(b)
