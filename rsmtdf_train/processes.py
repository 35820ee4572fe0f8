"""One run on several processes: who this one is, and the sums that make them act as one.

Gradients are averaged here, by hand, rather than by a wrapper around the student: a step may pass through encoder,
decoder and fusion several times, leaves some parameters without a gradient, and is cut into parts. Small students make
the one flat all-reduce cheap. Started by ``torchrun``; without it there is one process and nothing is communicated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsmtdf_cache.errors import ResourceError, UsageError

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """This process is ``rank`` of ``count``. ``local_rank`` picks its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """Return this process's place among those ``torchrun`` started, and join them; one alone without torchrun.

        CPU processes talk through gloo, GPUs through NCCL. Raises ``UsageError`` for an environment that is half
        there.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"WORLD_SIZE is set, {error} is not right: start several processes with torchrun"
            ) from None
        if count > 1 and not dist.is_initialized():
            cpu = device is not None and device.startswith("cpu")
            gpu = torch.cuda.is_available() and not cpu
            if gpu:
                torch.cuda.set_device(local)  # NCCL talks through the current GPU
            dist.init_process_group("nccl" if gpu else "gloo")
        return cls(rank, count, local)

    @property
    def first(self) -> bool:
        """Whether this process writes files, speaks, and keeps the books."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Return the device of this process: of several on one machine each takes the GPU of its local rank."""
        if self.count > 1 and name in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return name

    def add_up(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over all processes of each scalar of ``values``, as float64; one message."""
        if not values:
            return []
        flat = torch.stack([v.detach().double().reshape(()) for v in values])
        if self.count > 1:
            _sum(flat)
        return list(flat.unbind())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; a parameter that no process touched keeps None."""
        if self.count == 1:
            return
        some = [p for p in parameters if p.requires_grad]
        touched = torch.tensor([p.grad is not None for p in some], dtype=torch.int32, device=some[0].device)
        _sum(touched)
        used = [p for p, n in zip(some, touched.tolist(), strict=True) if n]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in used if p.grad is not None]
        self._average(gradients, torch.cat([g.reshape(-1) for g in gradients]))

    def average_buffers(self, module: nn.Module) -> None:
        """Replace the running statistics of ``module`` by their mean over the processes."""
        if self.count == 1:
            return
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        if not buffers:
            return
        # float64: equal ones stay as they are
        self._average(buffers, torch.cat([b.reshape(-1).double() for b in buffers]))

    def _average(self, tensors: Sequence[Tensor], flat: Tensor) -> None:
        """Replace ``tensors`` by their mean over the processes; ``flat`` holds their values, and is used up."""
        _sum(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true in any process: all of them stop, or none."""
        if self.count == 1:
            return flag
        value = torch.tensor([int(flag)], device=device)
        _sum(value)
        return bool(value.item())

    def sum_(self, counts: Tensor, device: torch.device) -> Tensor:
        """Return the sum over all processes of an integer tensor, on its own device."""
        if self.count == 1:
            return counts
        moved = counts.to(device)
        _sum(moved)
        return moved.to(counts.device)

    def wait(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            with _company():
                dist.barrier()

    def leave(self) -> None:
        """End the group; nothing to do for one process."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _sum(values: Tensor) -> None:
    """Replace ``values`` by their sum over all processes."""
    with _company():
        dist.all_reduce(values)


@contextmanager
def _company() -> Iterator[None]:
    """Say so when another process is gone: what happened to it is for its own message to say."""
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(
            "another process of this run ended, so this one cannot go on; its message says why. The same command "
            "continues from the last checkpoint"
        ) from error
