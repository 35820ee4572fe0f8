"""Who works, on what, and what happens when a worker fails: the client's side of a build on a cluster.

Units are pinned to workers by this class, two for each, so that the scheduler never holds more than those, and a unit
is given to another worker only after the first one's permission was taken back (``Destination.revoke``).
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rsmtdf_cache.cluster.task import Task
from rsmtdf_cache.cluster.worker import NotAdmittedError, admit, compute_unit, leave, topic
from rsmtdf_cache.destination import Destination, Permit
from rsmtdf_cache.errors import MismatchError, ResourceError, RsmtdfError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned
from rsmtdf_cache.records import Commit
from rsmtdf_cache.work import OnTiles, Tally, Unit, UnitDone

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Crew"]

#: Units in flight for each worker: one that it computes, one that waits there.
IN_FLIGHT = 2
#: A unit that was lost with so many workers is their death, not their misfortune.
LOSSES_MAX = 4
#: So many workers in a row (or twice those there are) that die while they set up, and nobody comes any more.
_STILLBORN_MAX = 4
#: A worker that loads weights gives no signs, so it has at least so long, however short the patience.
_SET_UP_S = 300.0
#: So long after a loss another process may take the lost one's place: a Nanny starts one.
_RETURN_S = 30.0
_LOOK_S = 0.5


@dataclass
class _Member:
    """A worker. ``coming``: it sets up its bench; ``out``: it gets no (more) units of this build."""

    address: str
    tally: Tally
    state: Literal["coming", "ready", "out"] = "coming"
    last_sign: float = field(default_factory=time.monotonic)
    attempts: list[_Attempt] = field(default_factory=list)


@dataclass
class _Attempt:
    """A unit given to a worker. ``told``: tiles and bytes that were reported of it."""

    unit: Unit
    member: _Member
    permit: Permit
    task: Task
    begun: bool = False
    told: tuple[int, int] = (0, 0)


class Crew:
    """The workers of a scheduler while they compute the units of one build."""

    def __init__(
        self, client: Client, store: Destination, token: str, site: dict[str, Any], patience_s: float,
        expected: int | None, on_tiles: OnTiles, on_event: EventSink, tallies: list[Tally], failures: list[str],
        labels: Mapping[str, str],
    ) -> None:  # fmt: skip
        """``labels``: what people read on dask's page of the units of an array set."""
        self._client, self._store, self._token, self._site = client, store, token, site
        self._labels = labels
        self._patience_s, self._on_tiles, self._on_event = patience_s, on_tiles, on_event
        self._tallies, self._failures = tallies, failures
        self._members: dict[str, _Member] = {}
        self._attempts: dict[str, _Attempt] = {}  # by the name of the permit
        self._coming: dict[str, Task] = {}  # by address
        self._back: deque[Unit] = deque()  # units that were lost
        self._losses: dict[Unit, int] = {}
        self._news: queue.SimpleQueue[Task] = queue.SimpleQueue()  # tasks that ended
        self._signs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._looked, self._last_loss, self._alone_since = 0.0, float("-inf"), time.monotonic()
        self._last_fault: RsmtdfError | None = None
        self._arriving, self._stillborn = True, 0
        self._expected = expected = len(self._here()) if expected is None else expected
        page = client.cluster.dashboard_link if client.cluster is not None else ""
        on_event(ProgressStart("workers", f"cluster ({page})" if page else "cluster", expected, unit="workers"))

    def run(self, units: Iterator[Unit]) -> Generator[UnitDone, None, None]:
        """Have ``units`` computed and yield each as it is committed. Raises what the build ends with."""
        self._client.subscribe_topic(topic(self._token), lambda event: self._signs.put(event[1]))
        try:
            yield from self._loop(units)
        finally:
            self._end()

    def _end(self) -> None:
        """Take every permission back and let everybody go. No events: a sink that stops the build raises at each."""
        from distributed import fire_and_forget

        for attempt in self._attempts.values():
            with contextlib.suppress(OSError, ResourceError):  # whoever leaves or holds the store does it again
                self._store.revoke(attempt.permit)
        for task in [*self._coming.values(), *(a.task for a in self._attempts.values())]:
            task.give_up()
        with contextlib.suppress(Exception):  # a scheduler that is gone; workers that are
            self._client.unsubscribe_topic(topic(self._token))
            for member in self._members.values():
                if member.state != "out":
                    fire_and_forget(self._submit(leave, member.address, "leave", self._token))

    def _loop(self, units: Iterator[Unit]) -> Generator[UnitDone, None, None]:
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._sign(self._signs.get_nowait())
            self._look()
            more = self._hand_out(units)
            if not more and not self._attempts:
                return
            with contextlib.suppress(queue.Empty):
                task = self._news.get(timeout=0.1)
                if (attempt := self._attempts.get(task.name)) is not None:
                    if (done := self._ended(attempt)) is not None:
                        yield done
                elif self._coming.get(task.name) is task:
                    self._admitted(task)

    # -- workers come and go

    def _look(self) -> None:
        """See who is there: admit new ones, give up those that went or show no sign. A moment for Ctrl-C too."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._on_event(Progress("workers", 0))
        here = self._here()
        if now - self._looked > self._patience_s / 2:  # this process stood still, so nobody else is to blame
            self._alone_since = now
            for member in self._members.values():
                member.last_sign = now
        self._looked = now
        for address in here - self._members.keys():
            self._welcome(address)
        for address in self._members.keys() - here:
            self._last_loss = now
            member = self._members.pop(address)
            self._stillborn += member.state == "coming"
            self._on_event(Progress("workers", -(member.state == "ready")))
            self._gone(member, "was lost")
        for member in self._members.values():
            silent = now - member.last_sign
            if member.state == "coming" and silent > max(self._patience_s, _SET_UP_S):
                self._out(member, f"was not set up after {silent:.0f} s")
            elif member.state == "ready" and member.attempts and silent > self._patience_s:
                self._out(member, f"gave no sign for {self._patience_s:g} s")
        if self._members:
            self._alone_since = now
        elif now - self._alone_since > self._patience_s:
            raise ResourceError(
                f"the scheduler has had no worker for {self._patience_s:g} s; start some, run the same command again"
            )
        if self._stillborn >= max(_STILLBORN_MAX, 2 * self._expected) and not self._ready:
            raise ResourceError(
                f"{self._stillborn} workers in a row were lost before they could begin: {self._failures[-1]}; they may "
                "be out of memory (fewer workers a machine, a smaller teacher). The same command continues"
            )
        returning = now - self._last_loss < min(self._patience_s, _RETURN_S)
        if self._members and all(m.state == "out" for m in self._members.values()) and not returning:
            raise self._nobody_left()

    def _here(self) -> set[str]:
        lost = ResourceError(
            "the connection to the scheduler was lost; what is committed stays, the same command continues"
        )
        if self._client.status != "running" or self._client.scheduler is None:
            raise lost
        try:
            return set(self._client.sync(self._client.scheduler.ncores, callback_timeout=self._patience_s))
        except (OSError, TimeoutError):
            raise lost from None

    @property
    def _ready(self) -> list[_Member]:
        return [m for m in self._members.values() if m.state == "ready"]

    def _welcome(self, address: str) -> None:
        self._members[address] = _Member(address, Tally(address))
        future = self._submit(admit, address, "set up", self._token, self._site)
        self._coming[address] = Task(self._client, future, address, self._news.put)

    def _admitted(self, task: Task) -> None:
        del self._coming[task.name]
        member = self._members[task.name]
        try:
            facts = task.result()
        except Exception as error:
            if _is_lost(error):  # whether it is gone shows at the next look; if not, it is asked again
                del self._members[task.name]
                self._stillborn += 1
                self._failures.append(f"worker {task.name} was not set up: {_said(error)}")
                return
            self._out(member, f"is left out: {_said(error)}", error)
            return
        member.state, member.last_sign, self._stillborn = "ready", time.monotonic(), 0
        if facts["gpus"]:
            member.tally.name = f"{task.name} (GPU {facts['gpus']})"
        self._tallies.append(member.tally)
        self._on_event(Progress("workers", 1))

    def _unknown(self, member: _Member) -> None:
        """Have a worker set up again: another process answers at its address, or it forgot a build that was idle."""
        self._on_event(Progress("workers", -1))
        del self._members[member.address]
        for attempt in [a for a in member.attempts if not a.task.arrived]:
            self._take_back(attempt)
            self._back.append(attempt.unit)

    def _out(self, member: _Member, why: str, error: Exception | None = None) -> None:
        """Give the worker no more units; those it has go to others."""
        self._on_event(Progress("workers", -(member.state == "ready")))
        member.state = "out"
        self._last_fault = error if isinstance(error, RsmtdfError) else ResourceError(f"worker {member.address} {why}")
        self._gone(member, why)

    def _gone(self, member: _Member, why: str) -> None:
        if member.state == "out" and not member.attempts and why == "was lost":
            return  # it was told already
        self._failures.append(f"worker {member.address} {why}")
        self._on_event(Warned(f"worker {member.address} {why}"))
        if (coming := self._coming.pop(member.address, None)) is not None:
            coming.give_up()
        left = [a for a in member.attempts if not a.task.arrived]
        for attempt in left:
            self._lost(attempt, attempt.begun or attempt is left[0])

    def _nobody_left(self) -> RsmtdfError:
        told = "; ".join(self._failures[-3:])
        kind = MismatchError if isinstance(self._last_fault, MismatchError) else ResourceError
        return kind(f"no worker is left that could build: {told}. What is committed stays, the same command continues")

    # -- units come and go

    def _hand_out(self, units: Iterator[Unit]) -> bool:
        """Give units to workers that have room, idle ones first; return whether any are left to give."""
        while True:
            ready = self._ready
            if self._arriving and ready and not self._coming:
                self._arriving = False
                self._on_event(ProgressEnd("workers"))
            free = min(ready, key=lambda m: len(m.attempts), default=None)
            if free is None:
                return self._any_left(units)
            if len(free.attempts) >= IN_FLIGHT:
                return True
            unit = self._back.popleft() if self._back else next(units, None)
            if unit is None:
                return self._even_out(free)
            self._give(unit, free)

    def _any_left(self, units: Iterator[Unit]) -> bool:
        """Whether there is a unit to give, now that nobody is there who takes one."""
        if not self._back and (unit := next(units, None)) is not None:
            self._back.append(unit)
        return bool(self._back)

    def _even_out(self, idle: _Member) -> bool:
        """Move a unit that waits behind another one to a worker without any, now that no more are left."""
        behind = [a for a in self._attempts.values() if len(a.member.attempts) > 1]
        waiting = [a for a in behind if not a.begun and not a.task.arrived]
        if idle.attempts or not waiting:
            return False
        attempt = waiting[-1]
        if not self._store.withdraw(attempt.permit):
            attempt.begun = True  # and has not said so yet
            return False
        self._take_back(attempt)
        self._give(attempt.unit, idle)
        return False

    def _give(self, unit: Unit, member: _Member) -> None:
        permit = self._store.grant(unit.set_id, unit.group)
        told = (self._token, unit.set_id, unit.group, unit.tiles, permit.told)
        future = self._submit(compute_unit, member.address, f"encode {self._labels[unit.set_id]}", *told)
        task = Task(self._client, future, permit.name, self._news.put)
        attempt = self._attempts[permit.name] = _Attempt(unit, member, permit, task)
        if not member.attempts:
            member.last_sign = time.monotonic()
        member.attempts.append(attempt)

    def _submit(self, function: Any, address: str, label: str, *told: Any) -> Future[Any]:
        key = f"rsmtdf {label.replace('-', '_')}-{uuid.uuid4().hex}"  # dask's page counts by what is before the first -
        return self._client.submit(function, *told, key=key, workers=[address], allow_other_workers=False, pure=False)

    def _sign(self, said: dict[str, Any]) -> None:
        attempt = self._attempts.get(said["attempt"])
        if attempt is not None:
            attempt.begun, attempt.member.last_sign = True, time.monotonic()
            self._tell(attempt, said["tiles"], said["nbytes"])

    def _tell(self, attempt: _Attempt, tiles: int, nbytes: int) -> None:
        more = tiles - attempt.told[0], nbytes - attempt.told[1]
        attempt.told = tiles, nbytes
        if any(more):
            self._on_tiles(attempt.unit, *more)

    def _ended(self, attempt: _Attempt) -> UnitDone | None:
        unit, member = attempt.unit, attempt.member
        try:
            found = attempt.task.result()
        except Exception as error:
            if isinstance(error, NotAdmittedError):
                self._unknown(member)
            elif _is_lost(error) or self._store.clear(error):
                self._lost(attempt, attempt.begun or member.attempts[0] is attempt)
            elif _is_of_the_worker(error):
                self._out(member, f"gets no more work: {_said(error)}", error)
            else:  # of the data, or a bug: it would come again anywhere
                raise
            return None
        member.last_sign = time.monotonic()
        commit = self._store.accept(Commit.from_json(found["commit"]))
        member.tally.add(unit, found["seconds"])
        self._tell(attempt, unit.tiles, found["nbytes"])
        self._forget(attempt)
        return UnitDone(unit, commit, found["nbytes"], member.tally.name)

    def _lost(self, attempt: _Attempt, begun: bool) -> None:
        """Have the unit done again. ``begun``: and count that; a worker may die before it can say what it began."""
        self._take_back(attempt)
        self._back.append(attempt.unit)
        losses = self._losses[attempt.unit] = self._losses.get(attempt.unit, 0) + begun
        if losses >= LOSSES_MAX:
            raise ResourceError(
                f"row group {attempt.unit.group} of {attempt.unit.set_id} was lost with {losses} workers; they may be "
                "out of memory (smaller --micro-batch, fewer workers a machine). The same command continues"
            )

    def _take_back(self, attempt: _Attempt) -> None:
        """After this the attempt cannot commit, whatever its worker does."""
        self._store.revoke(attempt.permit)
        attempt.task.give_up()
        self._tell(attempt, 0, 0)
        self._forget(attempt)

    def _forget(self, attempt: _Attempt) -> None:
        del self._attempts[attempt.permit.name]
        attempt.member.attempts.remove(attempt)


def _is_lost(error: Exception) -> bool:
    """Whether nobody knows what became of a task: its worker died, or does not answer."""
    from asyncio import CancelledError as TaskCancelled
    from concurrent.futures import CancelledError

    from distributed import CancelledError as DaskCancelled
    from distributed import KilledWorker
    from distributed.comm.core import CommClosedError

    lost = (CancelledError, TaskCancelled, DaskCancelled, KilledWorker, CommClosedError, TimeoutError)
    return isinstance(error, lost)


def _is_of_the_worker(error: Exception) -> bool:
    """Whether another worker may well do what this one could not: its disk, memory, network."""
    return isinstance(error, (ResourceError, OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, RsmtdfError) else f"{type(error).__name__}: {error}"
