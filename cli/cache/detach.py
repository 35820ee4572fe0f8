"""A build that outlives its terminal: ``cache build --detach``.

The command starts itself again in a session of its own and waits until that one has looked at all it was asked for and
begins its work, so that whatever is wrong is still told here, with its exit code.
"""

from __future__ import annotations

import fcntl
import os
import platform
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import typer

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import Event, EventSink, ProgressStart
from rsmtdf_cli.console import console, emit_json, message

__all__ = ["announcing", "detach_build"]

#: Holds the number of the pipe through which the detached command says that it begins.
_LINE = "RSMTDF_DETACHED_LINE"
_FLAG = "--detach"
_POLL_S = 0.1


def announcing(sink: EventSink) -> EventSink:
    """Return ``sink``; in a detached command it also tells the one that started it when the work begins."""
    number = os.environ.pop(_LINE, None)
    if number is None:
        return sink
    from rsmtdf_cache.index import LOOK

    line = int(number)
    os.set_inheritable(line, False)  # workers do not hold it
    told = False

    def announce(event: Event) -> None:
        nonlocal told
        sink(event)
        if not told and isinstance(event, ProgressStart) and event.task != LOOK and event.done < event.total:
            told = True
            with suppress(OSError):  # nobody waits any more
                os.write(line, b"!")
            os.close(line)

    return announce


def detach_build(out: Path | str, json: bool, quiet: bool) -> None:
    """Start this very command again, without ``--detach``, and return when it works; what it says goes to a log.

    Ends with the other command's exit code where that one ends before its work begins.
    """
    log = _log_of(out)
    with log.open("ab") as stream:
        _hold(log, stream)
        told = _Log(log, stream.tell())
        empty = told.place == 0
        ours, theirs = os.pipe()
        words = [word for word in sys.argv[1:] if word != _FLAG]
        process = subprocess.Popen(
            [sys.executable, "-m", "rsmtdf_cli", *words], env={**os.environ, _LINE: str(theirs)},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, pass_fds=(theirs,), start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
    try:
        works = _wait(process, ours, told)
    except BaseException:  # Ctrl-C: who asked for it does not want it any more
        process.send_signal(signal.SIGTERM)
        process.wait()
        if empty:
            log.unlink()
        raise
    finally:
        os.close(ours)
    if not works and process.returncode != 0:
        if empty:
            log.unlink()
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    if json:
        place = str(out.absolute() if isinstance(out, Path) else out)
        told_json = {"store": place, "runs": works, "host": platform.node(), "pid": process.pid, "log": str(log)}
        emit_json(told_json)
    elif not quiet and works:
        follow = f"rsmtdf cache watch {out}" if isinstance(out, Path) else f"tail -f {log}"
        console().print(
            f"the build goes on as process {process.pid}; follow it: `{follow}`; stop it: `kill {process.pid}`; "
            f"what it says is in {log}",
            markup=False,
        )


def _hold(log: Path, stream: IO[bytes]) -> None:
    """Let nobody else write to the log while the command lives, which has the file open as long."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResourceError(
            f"{log}: another detached command writes it now, so it builds this store; wait for its end, or leave "
            "--detach out to wait here"
        ) from None
    except OSError:
        return  # a file system without locks


def _log_of(out: Path | str) -> Path:
    """Return the log's path: beside a store's folder, or in the working directory for a store at a URL."""
    if isinstance(out, Path):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        return out.absolute().parent / f"{out.absolute().name}.log"
    name = out.partition("?")[0].rstrip("/").rpartition("/")[2] or "store"
    return Path.cwd() / f"{name}.log"


@dataclass
class _Log:
    """What was written to ``path`` from ``place`` on, passed on to stderr."""

    path: Path
    place: int

    def relay(self) -> None:
        with self.path.open("rb") as stream:
            stream.seek(self.place)
            new = stream.read()
        self.place += len(new)
        if new:
            with suppress(BrokenPipeError):
                typer.echo(new.decode(errors="replace"), err=True, nl=False)


def _wait(process: subprocess.Popen[bytes], line: int, told: _Log) -> bool:
    """Return whether the command works: False when it has ended before."""
    while True:
        ready = bool(select.select([line], [], [], _POLL_S)[0])
        ended = process.poll() is not None
        told.relay()
        if ready:
            if os.read(line, 1):
                return True
            process.wait()
            told.relay()
            if process.returncode < 0:
                message(f"the detached command was killed by {signal.Signals(-process.returncode).name}")
            return False
        if ended:  # and a process of its own still holds the line
            return False
