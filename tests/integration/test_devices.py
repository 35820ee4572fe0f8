"""``rsmtdf train --devices``: one command, several processes, one voice, one exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rsmtdf_train.loop import train
from rsmtdf_train.recipe import Recipe
from tests.command_line import call
from tests.stores import write_mean_store

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "data_wait", "samples_per_s")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mean_store(tmp_path_factory.mktemp("devices"), tiles=13)


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The same run by one process."""
    train(recipe(root), root / "alone", root / "store", device="cpu", tensorboard=False)
    return root / "alone"


def recipe(root: Path) -> Recipe:
    """A student without batch norm, a batch that two processes cannot share evenly."""
    return Recipe.model_validate({
        "data": str(root / "data"), "labeled": "25", "steps": 8, "crop_px": 64, "batch": {"labeled": 5, "unlabeled": 7},
        "student": {"encoder": "timm:test_vit", "channels": 8}, "threshold": 0.3, "distill": {"hidden": 8},
        "checkpoint_every": 100,
    })  # fmt: skip


def words(root: Path, *more: object) -> list[str]:
    (root / "recipe.yaml").write_text(recipe(root).to_yaml())
    fixed = ["train", root / "recipe.yaml", "--use-cache", root / "store", "--no-tensorboard", "--device", "cpu"]
    return [str(word) for word in [*fixed, *more]]


def start(root: Path, *more: object) -> subprocess.Popen[str]:
    environ = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rsmtdf_cli", *words(root, *more)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(run: Path) -> list[dict[str, Any]]:
    log = run / "log.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def test_a_run_on_devices_is_told_to_stop_and_continues_as_that_of_one(root: Path, alone: Path) -> None:
    out = root / "run"
    process = start(root, "--out", out, "--devices", 2)
    while not (out / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children()
    heard = [c.laddr.ip for worker in workers for c in worker.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(workers) == 2 and set(heard) <= {"127.0.0.1", "::1"}, "nobody else on the network reaches them"
    for one in (*workers, process):  # as batch systems do; the launcher passes its own on, too
        one.send_signal(signal.SIGTERM)
    shown, said = process.communicate(timeout=240)
    done = len(lines(out))
    assert (process.returncode, shown) == (5, ""), said
    assert [line for line in said.splitlines() if not line.startswith("train: ")] == [
        f"stopped: SIGTERM after step {done} of 8; the checkpoint is in {out}/checkpoints/last.pt, the same command "
        "continues"
    ]
    assert not any(worker.is_running() for worker in workers)
    assert torch.load(out / "checkpoints" / "last.pt", weights_only=True)["step"] == done < 8

    process = start(root, "--out", out, "--devices", 2, "--json", "-q")
    shown, said = process.communicate(timeout=240)
    assert (process.returncode, said) == (0, "")
    result = json.loads(shown)
    assert (result["resumed_at"], result["step"], result["run"]) == (done, 8, str(out))
    for mine, expected in zip(lines(out), lines(alone), strict=True):
        assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("devices", "environ", "said"),
    [
        ("0", {}, "--devices 0: write a number of processes"),
        ("all", {}, "--device cpu asks for none"),
        ("2", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "torchrun has started the processes already"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str, environ: dict[str, str], said: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(*words(root, "--out", tmp_path / "run", "--devices", devices))
    assert code == 2 and said in err and not (tmp_path / "run").exists()


def test_one_device_is_this_process(root: Path, alone: Path) -> None:
    """The run is complete already, so that nothing is trained: no process is started to find that out."""
    before = psutil.Process().children(recursive=True)
    code, _, err = call(*words(root, "--out", alone, "--devices", 1))
    assert code == 0 and "is complete already (8 steps)" in err
    assert psutil.Process().children(recursive=True) == before


def test_a_batch_that_cannot_be_shared_is_told_of_before_a_process_starts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*asked: object) -> None:
        raise AssertionError(asked)

    monkeypatch.setattr("rsmtdf_train.launcher.launch", never)
    code, _, err = call(*words(root, "--out", root / "many", "--devices", 6))
    assert code == 2 and "batch.labeled 5 cannot be shared by 6" in err and err.count("error:") == 1
    assert not (root / "many").exists()
