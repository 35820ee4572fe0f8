"""One command as several processes of this machine: they begin together, end together, and have one exit code.

What a process is told in its environment is what ``torchrun`` tells it; they meet through a file instead of a port,
and talk over loopback. No torch in here: the launcher itself is small.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rsmtdf_cache.cores import usable_cores
from rsmtdf_cache.errors import Interrupted, ResourceError, UsageError

__all__ = [
    "Ended",
    "MEETING",
    "PEER_GONE",
    "PeerGone",
    "Place",
    "SAME_WISH_S",
    "follow_launcher",
    "is_launched",
    "launch",
    "place_of",
]

#: Where the processes of one launch meet: the path of a file in a folder of this launch alone.
MEETING = "RSMTDF_MEETING"
_LIFELINE = "RSMTDF_LIFELINE"

#: Exit code of a launched process that ends because another one did, as ``EX_TEMPFAIL``; the launcher returns no such.
PEER_GONE = 75

#: After one process ended the others notice at their next sum; who takes longer is killed.
_GRACE_S = 20.0

#: The same after a signal: who ends then ends before training, or when the checkpoint is written, so the others have
#: nothing left to do but wait for one another.
_SIGNALLED_GRACE_S = 3.0

#: A signal again within this time is the same wish: batch systems signal every process, launchers pass theirs on.
SAME_WISH_S = 2.0

_POLL_S = 0.05

#: More processes on the CPU for each of its cores are a slip of the pen: each takes memory for all its libraries.
_MOST_PER_CORE = 4


class PeerGone(ResourceError):
    """Another process of this run ended or hangs, so this one cannot go on."""


@dataclass(frozen=True)
class Place:
    """``count`` processes on the CPU, or one on each of ``gpus`` (as ``CUDA_VISIBLE_DEVICES`` names them)."""

    count: int
    gpus: tuple[str, ...] = ()

    def environment(self, environ: Mapping[str, str], cores: int) -> dict[str, str]:
        """Return what all processes see besides ``environ``; they share ``cores`` unless it says otherwise."""
        found = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(max(1, cores // self.count))}
        if self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        for library in ("GLOO", "NCCL"):
            if loopback is not None and f"{library}_SOCKET_IFNAME" not in environ:
                found[f"{library}_SOCKET_IFNAME"] = loopback
        return found


@dataclass(frozen=True)
class Ended:
    """How a launch ended: its exit code, and what those wrote that failed without the first process saying so."""

    code: int
    said: tuple[str, ...] = ()


def place_of(text: str, device: str | None, environ: Mapping[str, str], gpus: int) -> Place:
    """Return where the processes of ``--devices TEXT`` run: ``all``, a number, or ids of GPUs with commas.

    ``device``: of ``--device``. ``gpus``: how many torch sees. Ids are those of ``CUDA_VISIBLE_DEVICES`` where it is
    set. Without a GPU, and with ``--device cpu``, a number is that of processes on the CPU. Raises ``UsageError``.
    """
    asked = f"--devices {text}"
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"{asked} --device {device}: each process has a device of its own; leave --device out")
    if device == "cpu":
        gpus = 0
    if device == "cuda" and not gpus:
        raise UsageError(f"{asked} --device cuda: torch sees no GPU here; leave --device out for processes on the CPU")
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()][:gpus]
    names = tuple(visible or map(str, range(gpus)))
    seen = f"torch sees {gpus} GPU{'' if gpus == 1 else 's'} here" + (f" ({', '.join(names)})" if gpus else "")
    if text == "all":
        if not names:
            raise UsageError(f"{asked}: {_none(device)}; give the number of processes on the CPU, e.g. --devices 2")
        return Place(len(names), names)
    if "," in text:
        ids = tuple(part.strip() for part in text.split(","))
        if not all(ids) or len(set(ids)) != len(ids):
            raise UsageError(f"{asked}: write ids with commas between, each once, e.g. 0,2")
        if absent := [one for one in ids if one not in names]:
            raise UsageError(f"{asked}: there is no GPU {', '.join(absent)}; {seen if gpus else _none(device)}")
        return Place(len(ids), ids)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{asked}: write a number of processes, all, or ids of GPUs with commas, e.g. 0,2")
    count = int(text)
    if gpus and count > gpus:
        raise UsageError(f"{asked}: {seen}; give --devices all, or --device cpu for processes on the CPU")
    cores = usable_cores()
    if not gpus and count > _MOST_PER_CORE * cores:
        raise UsageError(
            f"{asked}: {_none(device)}, and processes on the CPU gain nothing beyond its cores ({cores} here); "
            f"give {_MOST_PER_CORE * cores} or fewer"
        )
    return Place(count, names[:count])


def _none(device: str | None) -> str:
    return "--device cpu asks for none" if device == "cpu" else "torch sees no GPU here"


def is_launched() -> bool:
    """Whether this process is one of several that ``launch`` started."""
    return MEETING in os.environ


def follow_launcher() -> None:
    """Let this process end with its launcher, however that ends; nothing to do in other processes."""
    lifeline = os.environ.pop(_LIFELINE, "")
    if lifeline.isdecimal():
        folder = Path(os.environ[MEETING]).parent
        threading.Thread(target=_end_after, args=(int(lifeline), folder), name="rsmtdf-lifeline", daemon=True).start()


def _end_after(lifeline: int, folder: Path) -> None:
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)  # nobody writes: it returns when the other end is closed
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(PEER_GONE)


def launch(command: Sequence[str], place: Place) -> Ended:
    """Run ``command`` as the processes of ``place`` and return how they ended.

    The first one has this terminal; the others are heard only where one fails on its own. SIGINT and SIGTERM are
    passed on. Raises ``ResourceError`` when a process was killed or hangs, ``Interrupted`` when a signal ended them
    before they knew what to do with it.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rsmtdf-", ignore_cleanup_errors=True)))
        passed = stack.enter_context(_signals())
        reading, writing = os.pipe()
        stack.callback(os.close, writing)
        crew = stack.enter_context(_Crew.closing())
        try:
            environ = {**os.environ, **place.environment(os.environ, usable_cores())}
            environ |= {MEETING: str(folder / "meeting"), _LIFELINE: str(reading)}
            for rank in range(place.count):
                crew.start(command, environ, rank, place.count, reading)
        finally:
            os.close(reading)
        crew.watch(passed)
        return crew.ended(passed)


@dataclass
class _Crew:
    """The processes of a launch, by rank; ``order`` of those that ended, and which of them were ``killed`` here."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    notes: list[IO[bytes]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def closing(cls) -> Iterator[_Crew]:
        """Yield a crew of nobody; whoever runs at the end is killed."""
        crew = cls()
        try:
            yield crew
        finally:
            crew.kill()
            for process in crew.processes:
                process.wait()
            for note in crew.notes:
                note.close()

    def start(self, command: Sequence[str], environ: Mapping[str, str], rank: int, count: int, lifeline: int) -> None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        note = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when all have ended
        self.notes.append(note)
        stream = None if rank == 0 else note
        # A session of its own: a terminal's Ctrl-C reaches the launcher alone, which passes it on once.
        self.processes.append(
            subprocess.Popen(
                command, env={**environ, **{k: str(v) for k, v in ranks.items()}}, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, pass_fds=(lifeline,), start_new_session=True,
            )
        )  # fmt: skip

    def living(self) -> list[int]:
        """Return who runs; notes who does not any more."""
        running = []
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                running.append(rank)
            elif rank not in self.order:
                self.order.append(rank)
        return running

    def watch(self, passed: list[tuple[float, int]]) -> None:
        """Return when all have ended: signals are passed on, and who does not end after another one did is killed."""
        sent, deadline = 0, float("inf")
        while living := self.living():
            for _, number in passed[sent:]:
                for rank in living:
                    self.processes[rank].send_signal(number)
            sent = len(passed)
            insists = bool(passed) and passed[-1][0] - passed[0][0] > SAME_WISH_S
            if deadline == float("inf") and (insists or any(self.processes[rank].returncode for rank in self.order)):
                deadline = time.monotonic() + (_SIGNALLED_GRACE_S if passed and not insists else _GRACE_S)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(_POLL_S)

    def kill(self) -> None:
        for rank in self.living():
            if rank not in self.killed:
                self.killed.append(rank)
            self.processes[rank].kill()

    def ended(self, passed: list[tuple[float, int]]) -> Ended:
        """Return what all of it comes to: the first that failed on its own decides."""
        codes = {rank: self.processes[rank].returncode for rank in self.order}
        if not any(codes.values()):
            return Ended(0)
        signals = {-number for _, number in passed}
        own = {
            rank: code
            for rank, code in codes.items()
            if code not in {0, PEER_GONE, *signals} and rank not in self.killed
        }
        if passed and not own:
            name = signal.Signals(passed[0][1]).name
            raise Interrupted(
                f"{name} before anything was trained, or while a process hung; the same command continues"
            )
        if not own:
            hung = (
                f"process {', '.join(map(str, self.killed))} did not answer" if self.killed else "they lost each other"
            )
            notes = [self._note(rank) for rank, code in codes.items() if code == PEER_GONE]
            heard = next((f". One of them: {note.splitlines()[-1]}" for note in notes if note), "")
            raise ResourceError(
                f"{len(codes)} processes: {hung}, and the others waited in vain (RSMTDF_PEER_TIMEOUT_S); the same "
                f"command continues from the last checkpoint{heard}"
            )
        rank, code = next(iter(own.items()))
        if code < 0:
            raise ResourceError(
                f"process {rank} of 0 to {len(codes) - 1} was ended by {_signal_name(-code)}, so the run stopped (was "
                "memory short?); the same command continues from the last checkpoint"
            )
        told = {own.get(0)}
        said = []
        for one, its in own.items():
            if its > 0 and its not in told:
                told.add(its)
                said.append(self._note(one))
        return Ended(code, tuple(filter(None, said)))

    def _note(self, rank: int) -> str:
        self.notes[rank].seek(0)
        return self.notes[rank].read().decode(errors="replace").strip()


@contextlib.contextmanager
def _signals() -> Iterator[list[tuple[float, int]]]:
    """Collect times and numbers of SIGINT and SIGTERM; an ignored Ctrl-C stays ignored."""
    passed: list[tuple[float, int]] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def note(number: int, frame: object) -> None:
        passed.append((time.monotonic(), number))

    caught = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
