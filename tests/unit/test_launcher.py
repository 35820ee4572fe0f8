"""Several processes of one command: real ones, of a few lines each, for what becomes of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from rsmtdf_cache.errors import ResourceError, UsageError
from rsmtdf_train import launcher
from rsmtdf_train.launcher import PEER_GONE, Ended, Place, launch, place_of
from tests.clusters import until

ROOT = Path(__file__).parents[2]
START = """
import json, os, signal, sys, time
from pathlib import Path
from rsmtdf_train.launcher import follow_launcher
follow_launcher()
rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
out = Path(os.environ["OUT"])
def note(name, text=""):
    draft = out / f".{name}{rank}"
    draft.write_text(str(text) or "-")
    draft.rename(out / f"{name}{rank}")
def others(name):
    while len(list(out.glob(f"{name}*"))) < count: time.sleep(0.01)
note("pid", os.getpid())
others("pid")
"""


@pytest.fixture(autouse=True)
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def run(script: str, count: int) -> Ended:
    return launch([sys.executable, "-c", START + script], Place(count))


def pids(out: Path, count: int) -> list[int]:
    until(lambda: len(list(out.glob("pid*"))) == count)
    return [int((out / f"pid{rank}").read_text()) for rank in range(count)]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_each_process_is_told_its_place_and_the_first_one_has_the_terminal(
    out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher, "usable_cores", lambda: 7)
    script = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "RSMTDF_MEETING")
note("place", json.dumps([os.environ[n] for n in names]))
print("said by", rank)
"""
    assert run(script, 3) == Ended(0)
    found = [json.loads((out / f"place{rank}").read_text()) for rank in range(3)]
    assert [f[:5] for f in found] == [[str(r), str(r), "3", "3", "2"] for r in range(3)]
    assert len({f[5] for f in found}) == 1 and not Path(found[0][5]).parent.exists(), "one place, gone afterwards"
    assert capfd.readouterr().out == "said by 0\n"


def test_an_error_of_all_is_said_by_the_first_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('error: the recipe', file=sys.stderr); sys.exit(2)", 3) == Ended(2)
    assert capfd.readouterr().err == "error: the recipe\n"


def test_an_error_of_one_process_is_the_error_of_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
if rank == 1:
    print("error: a tile", file=sys.stderr)
    sys.exit(3)
while os.path.exists(f"/proc/{{(out / 'pid1').read_text()}}/fd/0"): time.sleep(0.01)
sys.exit({PEER_GONE})
"""
    assert run(script, 3) == Ended(3, ("error: a tile",))
    assert capfd.readouterr().err == ""


def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(ResourceError, match=r"process 1 of 0 to 1 was ended by SIGKILL.*same command continues"):
        run(f"time.sleep(0.2); os.kill(os.getpid(), 9) if rank == 1 else (time.sleep(0.6), sys.exit({PEER_GONE}))", 2)


def test_when_all_lost_each_other_the_reason_of_one_is_told() -> None:
    told = "another process ended (no such interface: eth7)"
    script = f"print({told!r}, file=sys.stderr) if rank else None; sys.exit({PEER_GONE})"
    with pytest.raises(ResourceError, match=r"2 processes: they lost each other.*\(no such interface: eth7\)"):
        run(script, 2)


def test_a_process_that_hangs_when_the_others_gave_up_is_killed_and_named(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_GRACE_S", 0.3)
    with pytest.raises(ResourceError, match="3 processes: process 2 did not answer"):
        run(f"os.kill(os.getpid(), signal.SIGSTOP) if rank == 2 else sys.exit({PEER_GONE})", 3)
    assert all(gone(pid) for pid in pids(out, 3))


LAUNCH = """
import os, sys
from rsmtdf_train import launcher
from rsmtdf_train.launcher import Place, launch
launcher._GRACE_S = float(os.environ.get("GRACE_S", 20))
from rsmtdf_cli.console import guard
with guard():
    sys.exit(launch([sys.executable, "-c", sys.argv[1]], Place(2)).code)
"""


def start(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", LAUNCH, START + script], stderr=subprocess.PIPE, text=True)


COUNTS = """
caught = []
signal.signal(signal.SIGINT, lambda n, f: caught.append(n))
signal.signal(signal.SIGTERM, lambda n, f: caught.append(n))
note("ready")
while not caught: time.sleep(0.01)
time.sleep(0.3)
note("caught", json.dumps(caught))
sys.exit(5)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_exit_code_is_theirs(out: Path, number: signal.Signals) -> None:
    process = start(COUNTS)
    until(lambda: len(list(out.glob("ready*"))) == 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (5, "")
    assert [json.loads((out / f"caught{rank}").read_text()) for rank in range(2)] == [[number], [number]]


def assert_stopped(process: subprocess.Popen[str], out: Path) -> None:
    """SIGTERM ends all with one message and 5, before anything was trained."""
    until(lambda: len(list(out.glob("ready*"))) == 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5 and said.startswith("stopped: SIGTERM") and said.count("\n") == 1
    assert all(gone(pid) for pid in pids(out, 2))


def test_a_signal_before_anybody_listens_ends_all_with_5(out: Path) -> None:
    process = start("signal.signal(signal.SIGTERM, signal.SIG_DFL); note('ready'); time.sleep(600)")
    assert_stopped(process, out)


def test_who_waits_for_one_that_a_signal_ended_is_not_waited_for_long(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process does that is inside a library when the signal comes, and never hears of it."""
    monkeypatch.setenv("GRACE_S", "3600")
    process = start("if rank == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('ready'); time.sleep(3600)")
    assert_stopped(process, out)


def test_nobody_outlives_a_launcher_that_is_killed(out: Path) -> None:
    busy = "note('ready')\nwhile True: sum(range(1000))"
    process = start(busy)
    until(lambda: len(list(out.glob("ready*"))) == 2)
    started = pids(out, 2)
    assert not any(gone(pid) for pid in started)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: all(gone(pid) for pid in started))
    until(lambda: not list((out / "tmp").glob("rsmtdf-*")))


TWO = {"CUDA_VISIBLE_DEVICES": "4,GPU-5"}


@pytest.mark.parametrize(
    ("text", "device", "environ", "gpus", "expected"),
    [
        ("3", None, {}, 0, Place(3)),
        ("1", None, {}, 0, Place(1)),
        ("2", None, {}, 4, Place(2, ("0", "1"))),
        ("all", None, {}, 2, Place(2, ("0", "1"))),
        ("0,2", "cuda", {}, 3, Place(2, ("0", "2"))),
        ("all", None, TWO, 2, Place(2, ("4", "GPU-5"))),
        ("GPU-5,4", None, TWO, 2, Place(2, ("GPU-5", "4"))),
        ("5", "cpu", TWO, 2, Place(5)),
    ],
)
def test_devices_become_places(
    text: str, device: str | None, environ: dict[str, str], gpus: int, expected: Place
) -> None:
    assert place_of(text, device, environ, gpus) == expected


@pytest.mark.parametrize(
    ("text", "device", "environ", "gpus", "said"),
    [
        ("3", None, {}, 2, r"--devices 3: torch sees 2 GPUs here \(0, 1\); give --devices all, or --device cpu"),
        ("all", None, {}, 0, "torch sees no GPU here; give the number of processes"),
        ("all", "cpu", {}, 2, "--device cpu asks for none"),
        ("0,3", None, {}, 2, r"there is no GPU 3; torch sees 2 GPUs here \(0, 1\)"),
        ("0,1", None, TWO, 2, r"there is no GPU 0, 1; .*\(4, GPU-5\)"),
        ("0,0", None, {}, 2, "each once"),
        ("0,", None, {}, 2, "each once"),
        ("0", None, {}, 2, "a number of processes, all, or ids"),
        ("two", None, {}, 2, "a number of processes, all, or ids"),
        ("-1", None, {}, 0, "a number of processes, all, or ids"),
        ("2", "cuda:1", {}, 2, "leave --device out"),
        ("2", "cuda", {}, 0, "torch sees no GPU here"),
        ("999999", None, {}, 0, "torch sees no GPU here, and processes on the CPU gain nothing beyond its cores"),
        ("999999", "cpu", {}, 2, "--device cpu asks for none, and processes on the CPU gain nothing"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    text: str, device: str | None, environ: dict[str, str], gpus: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        place_of(text, device, environ, gpus)
