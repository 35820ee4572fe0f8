"""The only place that talks to people: errors become exit codes, events become bars, results become text or JSON.

Results go to stdout, everything else to stderr, so that ``rsmtdf ... --json | jq`` always works.
Nothing heavy is imported before it is needed: ``rsmtdf --help`` must be quick.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from rsmtdf_cache.errors import Interrupted, RsmtdfError

if TYPE_CHECKING:
    from rich.console import Console

    from rsmtdf_cache.events import Event, EventSink

__all__ = [
    "JsonOption",
    "QuietOption",
    "command",
    "console",
    "emit_json",
    "guard",
    "json_text",
    "message",
    "new_app",
    "progress",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
QuietOption = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress and no summary; warnings, errors and --json stay.")
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FULL = {errno.ENOSPC, errno.EDQUOT}
_INTERRUPTED = Interrupted.exit_code
_RESOURCE = 6
_BUG = 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C no ``except Exception`` on the way swallows it."""


#: The signal that asked this command to stop. An exception raised by a signal handler is lost when the signal meets a
#: finaliser or a weak reference's callback, so every event looks here again.
_requested: list[KeyboardInterrupt] = []


def new_app(help: str, group: type[TyperGroup] = TyperGroup) -> typer.Typer:
    """Return an empty command group in the project's manner: plain help (rich help costs 0.2 s), bare call = help."""
    return typer.Typer(
        cls=group,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def command(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return ``function`` under ``guard``; its signature stays visible for typer."""

    @functools.wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with guard():
            return function(*args, **kwargs)
        raise AssertionError("guard() never swallows an exception")  # for the type checker

    return guarded


@contextmanager
def guard() -> Iterator[None]:
    """Turn every exception into one message on stderr and ``SystemExit`` with the code of decision 13.

    SIGTERM acts like Ctrl-C while the block runs (a batch system preempts with it), when this is the main thread. A
    signal whose exception gets lost is noticed at the next event.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, _stop) for s in _caught()} if main_thread else {}
    _requested.clear()
    try:
        yield
        sys.stdout.flush()  # a closed pipe shows here, not in a traceback at exit
    except Exception as error:
        if _belongs_to_typer(error):
            raise
        raise SystemExit(_report(error)) from None
    except KeyboardInterrupt as error:
        what = "SIGTERM" if isinstance(error, _Terminated) else "Ctrl-C"
        message(f"interrupted ({what}); what is finished is kept, the same command continues", kind="stopped")
        _forget_ctrl_c()
        raise SystemExit(_INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _forget_ctrl_c() -> None:
    """Keep Python from dying of SIGINT at its very end, whatever the exit code.

    It remembers a Ctrl-C that left code of an ``exec()``, as torch has it; the next string that is executed makes it
    forget.
    """
    exec("")


def _caught() -> list[signal.Signals]:
    """Return the signals that stop a command; an ignored Ctrl-C (``nohup``, a background shell) stays ignored."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]


def _stop(signum: int, frame: object) -> None:
    error = _Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()
    _requested.append(error)
    raise error


def _stopping(sink: EventSink) -> EventSink:
    """Return ``sink``, raising first when a signal asked to stop and its exception was lost on the way."""

    def checked(event: Event) -> None:
        if _requested:
            raise _requested[0]
        sink(event)

    return checked


def _belongs_to_typer(error: Exception) -> bool:
    """Whether typer shows ``error`` itself (usage errors, Exit, Abort); click may be vendored in typer or not."""
    return any(base.__module__.split(".")[0] in ("typer", "click") for base in type(error).__mro__)


def _report(error: Exception) -> int:
    """Print ``error`` and return its exit code."""
    if isinstance(error, RsmtdfError):
        if isinstance(error, Interrupted):
            message(str(error).removeprefix("stopped; "), kind="stopped")  # the kind says it
            _forget_ctrl_c()
        else:
            message(str(error))
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Nobody reads any more: stop like an interruption, and keep the interpreter from flushing into the pipe.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _INTERRUPTED
    full = _disk_full(error)
    if full is not None:
        where = f" while writing {full.filename}" if full.filename else ""
        message(
            f"no space left on the disk or in the quota{where}; make room, then run the same command again, "
            "it continues"
        )
        return _RESOURCE
    if isinstance(error, OSError):
        path = f"{error.filename}: " if error.filename else ""
        message(f"{path}{error.strerror or error}; check that the path exists, and its permissions")
        return _RESOURCE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        message(f"out of memory ({error or 'the system refused more'}); use a smaller batch or fewer workers")
        return _RESOURCE
    trace = traceback.format_exception(type(error), error, error.__traceback__, limit=-6)
    typer.echo("".join(trace).rstrip(), err=True)
    message("this is a bug in rsmtdf; please report it with the lines above and the output of `rsmtdf version`")
    return _BUG


def _disk_full(error: BaseException | None) -> OSError | None:
    """Return the "disk full" that ``error`` is or was caused by: libraries wrap it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def message(text: str, kind: str = "error") -> None:
    """Print ``kind: text`` on stderr, as it is (no markup, no wrapping). ``kind``: error, warning, stopped or note."""
    colors = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "stopped": typer.colors.YELLOW}
    head = typer.style(f"{kind}:", fg=colors.get(kind), bold=True)
    with suppress(BrokenPipeError):
        typer.echo(f"{head} {text}", err=True)


@functools.cache
def console(stderr: bool = False) -> Console:
    """Return the rich console of stdout (results) or stderr (progress, notes); made at the first call."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 1000  # no line or table in a file is folded
    return Console(stderr=stderr, highlight=False, width=width)


def emit_json(result: object) -> None:
    """Print ``json_text(result)`` on stdout."""
    typer.echo(json_text(result))


def json_text(result: object) -> str:
    """Return ``result`` as strict JSON: NaN and infinities become null, paths text, models their data."""
    return json.dumps(_plain(result), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    for method in ("model_dump", "tolist"):  # pydantic models; numpy and torch values
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


@contextmanager
def progress(quiet: bool = False) -> Iterator[EventSink]:
    """Yield an event sink that shows one bar per task on a terminal, or a line at start and end elsewhere.

    ``quiet`` hides both. Warnings are always shown.
    """
    from rsmtdf_cli.progress import bars, lines, warnings_only

    if quiet:
        yield _stopping(warnings_only)
    elif console(stderr=True).is_terminal:
        with bars(console(stderr=True)) as sink:
            yield _stopping(sink)
    else:
        yield _stopping(lines())
