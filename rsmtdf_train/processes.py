"""One run on several processes: who this one is, and the sums that make them act as one.

Gradients are averaged here, by hand, rather than by a wrapper around the student: a step may pass through encoder,
decoder and fusion several times, leaves some parameters without a gradient, and is cut into parts. Small students make
the one flat all-reduce cheap. Started by ``torchrun`` or ``launcher``; without them there is one process and nothing is
communicated.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_train.launcher import MEETING, PeerGone

__all__ = ["Processes"]

#: A process that another one waited for so long hangs: longer than fetching the first shards over a slow line takes.
PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Processes:
    """This process is ``rank`` of ``count``. ``local_rank`` picks its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str | None) -> Processes:
        """Return this process's place among those that were started with it, and join them; alone by default.

        CPU processes talk through gloo, GPUs through NCCL. Raises ``UsageError`` for an environment that is half
        there, ``ResourceError`` when the processes do not find each other.
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
                if local >= (gpus := torch.cuda.device_count()):
                    raise UsageError(
                        f"LOCAL_RANK={local}, and this process sees {gpus} GPUs: start one process for each GPU, and "
                        "let each see all of its machine's (CUDA_VISIBLE_DEVICES)"
                    )
                torch.cuda.set_device(local)  # NCCL talks through the current GPU
                # A peer that hangs is then an error of the sum that waits for it, and not the end of this process.
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            meeting = os.environ.get(MEETING)
            with _company():
                dist.init_process_group(
                    "nccl" if gpu else "gloo", None if meeting is None else f"file://{meeting}", rank=rank,
                    world_size=count, timeout=timedelta(seconds=_patience_s()),
                )  # fmt: skip
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

    def require_same(self, text: str, device: torch.device) -> None:
        """Raise ``MismatchError`` in all processes unless ``text``, what each has opened, is the same everywhere."""
        if self.count == 1:
            return
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        largest = torch.tensor([number, -number], dtype=torch.int64, device=device)
        with _company():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        if int(largest.sum()):
            raise MismatchError(
                f"the {self.count} processes of this run opened different things: another recipe, snapshot of the "
                "store, dataset or checkpoint. Let all machines see the same folders, give STORE@SNAPSHOT where a "
                "store grows, and run the same command again"
            )

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

    def leave(self, together: bool = True) -> None:
        """End the group; nothing to do for one process.

        ``together``: all processes do so now. NCCL waits for them: one that fails alone would never say why.
        """
        if self.count > 1 and dist.is_initialized() and (together or dist.get_backend() != "nccl"):
            dist.destroy_process_group()


def _sum(values: Tensor) -> None:
    """Replace ``values`` by their sum over all processes."""
    with _company():
        dist.all_reduce(values)


@contextmanager
def _company() -> Iterator[None]:
    """Say so when another process is gone or hangs: what happened to it is for its own message to say."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:200]
        if (waited := time.monotonic() - started) >= _patience_s() - 1:
            raise PeerGone(
                f"another process of this run did not answer for {waited:.0f} s (RSMTDF_PEER_TIMEOUT_S), so this one "
                f"cannot go on; end it, the same command continues from the last checkpoint ({reason})"
            ) from error
        raise PeerGone(
            "another process of this run ended, or is out of reach, so this one cannot go on; its message says why. "
            f"The same command continues from the last checkpoint ({reason})"
        ) from error


def _patience_s() -> float:
    """Return for how long processes wait for each other. Raises ``UsageError`` for a bad ``RSMTDF_PEER_TIMEOUT_S``."""
    text = os.environ.get("RSMTDF_PEER_TIMEOUT_S", "")
    try:
        value = float(text or PATIENCE_S)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise UsageError(f"RSMTDF_PEER_TIMEOUT_S={text!r}: write seconds, 1 or more, e.g. 1800")
    return value
