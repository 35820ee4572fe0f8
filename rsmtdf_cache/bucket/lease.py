"""The lease of a URL: one object that says who builds there, and for how many seconds that holds.

It is taken, renewed and released by conditional puts, and never removed. How old it is, the server says.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from rsmtdf_cache.errors import ResourceError, RsmtdfError
from rsmtdf_cache.files import record_bytes
from rsmtdf_cache.share.backends import Tagged
from rsmtdf_cache.share.names import LEASE
from rsmtdf_cache.share.transport import Transport

__all__ = ["LEASE_S", "Lease", "RENEWALS", "refuse_held"]

#: So long a lease holds after it was last renewed.
LEASE_S = 120.0
#: So often it is renewed in that time.
RENEWALS = 6
_NBYTES_MAX = 2**16
_ROUNDS = 5


@dataclass(frozen=True)
class _Holder:
    """What a lease says. ``home``: the folder that its build keeps records in."""

    owner: str
    home: str
    host: str
    seconds: float
    released: bool = False

    @classmethod
    def parse(cls, data: bytes) -> _Holder:
        """Return what the object says; one that cannot be read holds as long as any other."""
        try:
            said = json.loads(data)
            seconds = min(max(float(said["seconds"]), 0.0), 86400.0)
            return cls(str(said["owner"]), str(said["home"]), str(said["host"]), seconds, said["released"] is True)
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls("", "", "an unknown host (the lease cannot be read)", LEASE_S)

    def is_at(self, home: str | None) -> bool:
        """Whether its build has the folder ``home`` of this machine."""
        return (self.home, self.host) == (home, socket.gethostname())

    def left_s(self, found: Tagged) -> float:
        """Return for how many seconds it still holds."""
        return 0.0 if self.released else self.seconds - found.age_s


def refuse_held(transport: Transport, home: str | None = None) -> None:
    """Raise ``ResourceError`` while somebody builds there, with another folder than ``home`` of this machine.

    For commands that write without a lease, and for a build before it does what takes long.
    """
    found = transport.tagged(LEASE)
    if found is None:
        return
    holder = _Holder.parse(found.data)
    if holder.left_s(found) > 0 and not holder.is_at(home):
        raise _held(transport.address.shown, holder, holder.left_s(found))


class Lease:
    """The lease of ``transport``'s URL while the block lasts. Renewed in a thread.

    ``home``: names the local folder whose lock the caller holds. The lease of a build that died with it on this machine
    is taken over at once, since its lock is free; anybody else's when it has expired. Raises ``ResourceError`` while it
    holds.
    """

    def __init__(self, transport: Transport, home: str) -> None:
        self._transport, self._home, self._shown = transport, home, transport.address.shown
        self._owner, self._count, self._seconds = uuid.uuid4().hex, 0, LEASE_S
        self._tag, self._renewed, self._lost = "", 0.0, ""
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        self._take()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        with self._lock, contextlib.suppress(RsmtdfError):  # what cannot be released expires
            if not self._lost:
                self._transport.replace(LEASE, self._body(released=True), self._tag)

    def check(self) -> None:
        """Raise ``ResourceError`` unless the lease holds for half its time at least: before everything that counts."""
        with self._lock:
            if not self._lost and _clock() - self._renewed > self._seconds / 2:
                with contextlib.suppress(RsmtdfError):
                    self._renew()
            if self._lost:
                raise ResourceError(
                    f"{self._shown}: this build lost its lease to {self._lost}; what is committed stays. When that "
                    "build has ended, the same command continues"
                )
            if _clock() - self._renewed > self._seconds / 2:
                raise ResourceError(
                    f"{self._shown}: the lease of this build could not be renewed for "
                    f"{_clock() - self._renewed:.0f} s; what is committed stays, the same command continues"
                )

    def _take(self) -> None:
        for _ in range(_ROUNDS):
            asked, found = _clock(), self._transport.tagged(LEASE)
            if found is None:
                self._transport.put(LEASE, self._body())
            else:
                holder = _Holder.parse(found.data)
                left = holder.left_s(found)
                if left > 0 and not holder.is_at(self._home):
                    raise _held(self._shown, holder, left)
                self._transport.replace(LEASE, self._body(), found.tag)
            now = self._transport.tagged(LEASE)  # an answer can be lost, so what is there counts
            if now is not None and _Holder.parse(now.data).owner == self._owner:
                self._tag, self._renewed = now.tag, asked
                return
        raise ResourceError(
            f"{self._shown}: other builds take its lease at the same moment; run the same command again"
        )

    def _keep(self) -> None:
        while not self._over.wait(self._seconds / RENEWALS):
            with self._lock, contextlib.suppress(Exception):  # its age decides, in check()
                if not self._lost:
                    self._renew()

    def _renew(self) -> None:
        asked = _clock()
        self._count += 1
        replaced = self._transport.replace(LEASE, self._body(), self._tag)
        found = self._transport.tagged(LEASE)
        holder = _Holder.parse(found.data) if found is not None else None
        if found is None or holder is None or holder.owner != self._owner:
            self._lost = f"a build on {holder.host}" if holder is not None else "somebody who removed it"
            return
        # Not replaced, and still ours: an earlier renewal whose answer was lost, so it is as old as the server says.
        self._tag, self._renewed = found.tag, asked if replaced else max(self._renewed, asked - found.age_s)

    def _body(self, released: bool = False) -> bytes:
        said: dict[str, Any] = {
            "owner": self._owner, "home": self._home, "host": socket.gethostname(), "pid": os.getpid(),
            "renewals": self._count, "seconds": self._seconds, "released": released,
        }  # fmt: skip
        return record_bytes(said)


def _held(shown: str, holder: _Holder, left_s: float) -> ResourceError:
    until = (datetime.now(UTC) + timedelta(seconds=left_s)).strftime("%H:%M:%S")
    return ResourceError(
        f"{shown}: a build on {holder.host} writes there; its lease holds until {until} UTC ({left_s:.0f} s) and is "
        "renewed while it runs. Wait for it to end; if it died, run the same command again after that"
    )


def _clock() -> float:
    """Return seconds that go on while the machine sleeps, where the system counts those."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
