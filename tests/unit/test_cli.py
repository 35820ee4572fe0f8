"""The command line: exit codes, streams, signals, events as text."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from rsmtdf_cache.errors import (
    DataError,
    FindingsError,
    Interrupted,
    MismatchError,
    ResourceError,
    RsmtdfError,
    TileError,
    UsageError,
)
from rsmtdf_cache.events import Progress, ProgressEnd, ProgressStart, Warned
from rsmtdf_cli.app import COMMANDS, app
from rsmtdf_cli.console import command, emit_json, progress
from rsmtdf_cli.lazy import load


def _end_of(error: BaseException) -> int:
    """Return the exit code that a command ends with when ``error`` is raised in it."""

    @command
    def failing() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        failing()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no such key"), 2),
        (DataError("no such folder"), 3),
        (TileError("t1", "truncated"), 3),
        (MismatchError("another store"), 4),
        (Interrupted("stopped"), 5),
        (ResourceError("no weights"), 6),
        (FindingsError("3 findings"), 7),
        (RsmtdfError("a bug of ours"), 1),
        (KeyboardInterrupt(), 5),
        (OSError(errno.ENOSPC, "No space left on device", "shard.bin"), 6),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "missing.png"), 6),
        (PermissionError(errno.EACCES, "Permission denied", "locked"), 6),
        (MemoryError(), 6),
        (ZeroDivisionError("division by zero"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_ends_with_its_exit_code(error: BaseException, code: int) -> None:
    assert _end_of(error) == code


def test_every_error_class_is_in_the_table_above() -> None:
    classes = [RsmtdfError]
    for known in classes:
        classes += known.__subclasses__()
    codes = {c.exit_code for c in classes if c.__module__ == "rsmtdf_cache.errors"}
    assert codes == {1, 2, 3, 4, 5, 6, 7}


def test_a_users_error_is_one_message_on_stderr_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    _end_of(UsageError("teacher 'dino[v2]': unknown. [bold]Did you mean[/bold]?"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: teacher 'dino[v2]': unknown. [bold]Did you mean[/bold]?\n"


def test_a_bug_says_so_and_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    _end_of(ZeroDivisionError("division by zero"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "ZeroDivisionError: division by zero" in err
    assert "bug" in err.splitlines()[-1]


def test_file_errors_name_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    _end_of(PermissionError(errno.EACCES, "Permission denied", "masks/a.png"))
    assert "masks/a.png" in capsys.readouterr().err


def test_a_full_disk_is_recognised_inside_another_error() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "last.pt")
        except OSError as full:
            raise RuntimeError("could not write the archive") from full
    except RuntimeError as wrapped:
        assert _end_of(wrapped) == 6


def test_a_guarded_command_keeps_its_signature_and_result() -> None:
    @command
    def twice(number: int, *, loud: bool = False) -> int:
        """Return the double."""
        return number * 2

    assert twice(21, loud=True) == 42
    alone = typer.Typer()
    alone.command()(twice)
    assert "--loud" in CliRunner().invoke(alone, ["--help"]).stdout
    assert CliRunner().invoke(alone, ["x"]).exit_code == 2


SLEEPER = """
import time
from rsmtdf_cli.console import command
@command
def sleeper():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Exception:
        print("swallowed", flush=True)
sleeper()
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_5_even_through_except_exception(sent: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert out == ""
    assert "same command continues" in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    script = (
        "from rsmtdf_cli.console import command, emit_json\n"
        "@command\ndef much():\n    for _ in range(1000):\n        emit_json(list(range(1000)))\nmuch()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 5


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert _end_of(DataError("x")) == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_is_strict_and_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"nan": float("nan"), "path": Path("a/b"), "array": np.array([1.5, np.inf]), "count": np.int64(3)})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"nan": None, "path": "a/b", "array": [1.5, None], "count": 3}
    assert err == ""


EVENTS = (
    ProgressStart("a", "teacher [lite0]", total=10, done=2),
    Progress("a", 8, nbytes=1000),
    Warned("tile 'x[1]': quarantined"),
    ProgressEnd("a"),
)


def test_quiet_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as sink:
        for event in EVENTS:
            sink(event)
    assert capsys.readouterr() == ("", "warning: tile 'x[1]': quarantined\n")


def test_a_log_gets_one_line_at_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    from rsmtdf_cli.progress import lines

    sink = lines()
    for event in EVENTS:
        sink(event)
    out, err = capsys.readouterr()
    first, warning, last = err.splitlines()
    assert out == ""
    assert first == "start: teacher [lite0]: 10 tiles, 2 there already"
    assert warning == "warning: tile 'x[1]': quarantined"
    assert last.startswith("done: teacher [lite0]: 10 of 10 tiles in ")


def test_bars_show_label_count_and_warning() -> None:
    from io import StringIO

    from rich.console import Console

    from rsmtdf_cli.progress import bars

    text = StringIO()
    with bars(Console(file=text, force_terminal=True, width=120, color_system=None)) as sink:
        for event in EVENTS:
            sink(event)
    assert "teacher [lite0]" in text.getvalue()
    assert "10/10" in text.getvalue()
    assert "tile 'x[1]': quarantined" in text.getvalue()


def test_every_command_of_the_help_can_be_loaded() -> None:
    """The static table of the help and the real commands cannot drift apart."""
    for name in COMMANDS:
        assert load(name, COMMANDS[name]).name == name
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0, shown.output


def test_unknown_commands_and_options_end_with_2() -> None:
    unknown = CliRunner().invoke(app, ["trian"])
    assert unknown.exit_code == 2
    assert "train" in unknown.output
    assert CliRunner().invoke(app, ["version", "--no-such-option"]).exit_code == 2


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    shown = CliRunner().invoke(app, ["version", "--json"])
    assert json.loads(shown.stdout)["rsmtdf"] == version("rsmtdf")
    assert CliRunner().invoke(app, ["version", "-q"]).stdout.strip() == version("rsmtdf")


def test_the_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rsmtdf_cli", "version", "-q"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


LOSSY = """
import signal, weakref
from rsmtdf_cache.events import Progress
from rsmtdf_cli.console import command, progress
class Thing: pass
@command
def lossy():
    with progress(quiet=True) as sink:
        thing = Thing()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
        del thing  # what the callback raises is printed and dropped by the interpreter
        print("went on", flush=True)
        sink(Progress("task", 1))
        print("never reached")
lossy()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_whose_exception_was_lost_stops_the_command_at_the_next_event(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOSSY.format(name=name)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "went on\n", done.stderr
    assert done.returncode == 5 and "continues" in done.stderr


def test_a_ctrl_c_out_of_executed_code_ends_with_5(tmp_path: Path) -> None:
    """Python would die of SIGINT at its end, after the exit code was set: torch executes code that it wrote."""
    (tmp_path / "stopped.py").write_text(
        "from rsmtdf_cli.console import guard\nwith guard():\n    exec('raise KeyboardInterrupt')\n"
    )
    found = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 5 and "interrupted (Ctrl-C)" in found.stderr, found.stderr
