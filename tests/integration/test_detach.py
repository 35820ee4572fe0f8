"""``cache build --detach``: bad input is told at once, good work goes on without its terminal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.watch import Watch
from tests.clusters import until
from tests.datasets import write_dataset

ROOT = Path(__file__).parents[2]
TEACHER = "timm:test_vit,pretrained=none"


def build(folder: Path, *more: object, tiles: int = 8) -> subprocess.Popen[str]:
    data = folder / "data"
    if not data.exists():
        write_dataset(data, tiles=tiles, splits={"train": range(tiles)})
    words = ["cache", "build", data, "--out", folder / "s", "--group-rows", 1, "--threads", 1, "--detach", *more]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "RSMTDF_HOME": str(folder / "home")}
    return subprocess.Popen(
        [sys.executable, "-m", "rsmtdf_cli", *map(str, words)], env=environ, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def ended(pid: int) -> None:
    """Wait for the end of a process that is nobody's child here."""
    with contextlib.suppress(psutil.NoSuchProcess):
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)  # where nobody asks how it ended


def test_a_detached_build_goes_on_when_its_terminal_is_gone_and_can_be_stopped(tmp_path: Path) -> None:
    one = build(tmp_path, "--teacher", TEACHER, "--json", "--micro-batch", 1, tiles=40)
    shown, said = one.communicate(timeout=240)
    assert one.returncode == 0, said
    told = json.loads(shown)
    log = Path(told["log"])
    assert (told["store"], told["runs"], log) == (str(tmp_path / "s"), True, tmp_path / "s.log")
    other = psutil.Process(told["pid"])
    assert os.getsid(other.pid) == other.pid != one.pid, "a hang-up of this terminal does not reach it"
    until(lambda: any((tmp_path / "s").glob("ledger/commits/*/*.json")), log.read_text)
    found = Watch(tmp_path / "s").look()
    assert found.builds and found.builder is not None and found.builder.pid == other.pid
    other.suspend()
    second = build(tmp_path, "--teacher", TEACHER, "--micro-batch", 1)
    _, said = second.communicate(timeout=240)
    assert second.returncode == 6 and f"{log}: another detached command writes it now" in said
    other.resume()
    other.send_signal(signal.SIGTERM)
    ended(other.pid)
    assert "stopped: " in log.read_text() and "the same command continues" in log.read_text()
    assert not Watch(tmp_path / "s").look().builds

    again = build(tmp_path, "--teacher", TEACHER, "--micro-batch", 1)
    shown, said = again.communicate(timeout=240)
    assert again.returncode == 0 and "the build goes on as process" in shown, said
    assert f"rsmtdf cache watch {tmp_path / 's'}" in shown
    until(lambda: "for 40 tiles" in log.read_text(), log.read_text)
    assert len(FeatureStore.open(tmp_path / "s").tiles) == 40


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--teacher", "timm:no_such"), 2, "no_such"),
        (("--teacher", "timm:test_vit,weights=gone.safetensors"), 6, "gone.safetensors"),
        (("--teacher", TEACHER, "--split", "nowhere"), 3, "nowhere"),
        (("--teacher", TEACHER, "--dry-run"), 2, "--dry-run writes nothing"),
    ],
)
def test_what_is_wrong_is_told_before_the_command_returns(
    tmp_path: Path, more: tuple[str, ...], code: int, said: str
) -> None:
    one = build(tmp_path, *more)
    shown, err = one.communicate(timeout=240)
    assert (one.returncode, shown) == (code, ""), err
    assert said in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (tmp_path / "s.log").exists() and not (tmp_path / "s").exists()


def test_a_build_with_nothing_left_to_do_is_over_at_once(tmp_path: Path) -> None:
    words = ("--teacher", TEACHER, "--scales", "1")
    for runs in (True, False):
        one = build(tmp_path, *words, "--json", tiles=2)
        shown, err = one.communicate(timeout=240)
        told = json.loads(shown)
        assert (one.returncode, told["runs"]) == (0, runs), err
        ended(told["pid"])
    assert not told["runs"]
    assert Path(told["log"]).read_text().count('"snapshot"') == 2
