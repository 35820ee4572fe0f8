"""The command line as others rely on it: commands, files, exit codes; the full disk; a build that is preempted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import Progress
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

TEACHER = "timm:test_resnet,pretrained=none"  # a real residual net of 0.4 M parameters


def rsmtdf(*args: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a store of it and a run, made by the commands of the README."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("contract")
    write_dataset(root / "data", tiles=12, tile_px=64)
    recipe = {
        "data": str(root / "data"), "labeled": "5", "steps": 3, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:test_resnet", "channels": 8}, "distill": {"hidden": 8},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert rsmtdf("cache", "build", root / "data", "--out", root / "store", "--teacher", TEACHER, "-q") == 0
    train = ("train", root / "recipe.yaml", "--use-cache", root / "store", "--out", root / "run", "-q")
    assert rsmtdf(*train) == 0
    return root


def test_a_default_build_holds_several_layers_at_two_scales_and_verifies(root: Path, capsys: object) -> None:
    store = FeatureStore.open(root / "store")
    assert len({k.view for k in store.keys()}) == 2
    assert len({k.layer for k in store.keys()}) >= 3
    assert store.tiles.splits == {"train": 8}
    assert rsmtdf("cache", "verify", root / "store", "--deep", "-q") == 0


def test_info_json_names_arrays_snapshot_and_teachers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert rsmtdf("cache", "info", root / "store", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    store = FeatureStore.open(root / "store")
    assert found["snapshot"] == store.snapshot and found["tiles"] == 8
    assert [a["key"] for a in found["arrays"]] == [str(k) for k in store.keys()]
    assert found["nbytes"] == sum(p.stat().st_size for p in (root / "store").rglob("c/*/0/0/0"))
    assert rsmtdf("cache", "info", root / "store") == 0


def test_a_run_folder_holds_what_later_checks_read(root: Path) -> None:
    run = root / "run"
    assert {"recipe.yaml", "metrics.json", "log.jsonl", "checkpoints", "pictures"} <= {p.name for p in run.iterdir()}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"step", "loss", "loss_labeled", "loss_unlabeled", "loss_distill", "lr", "seconds"} <= set(lines[0])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["store"] == FeatureStore.open(root / "store").snapshot
    assert metrics["split"] == "test" and metrics["seed"] == 0 and len(metrics["classes"]) == 3
    assert metrics["miou"] == metrics["scores"][metrics["checkpoint"]]["miou"]


def test_eval_and_predict_use_the_run_alone(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert rsmtdf("eval", root / "run", "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    for kind, written in json.loads((root / "run" / "metrics.json").read_text())["scores"].items():
        found = scored["scores"].pop(kind)
        assert found.pop("boundary")["tolerance_px"] == 3 and found == written
    assert not scored["scores"]
    image = root / "data" / "images" / "t011.png"
    assert rsmtdf("predict", root / "run", image, "--out", tmp_path / "p", "-q") == 0
    made = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert len(made) == 2
    masks = [Image.open(tmp_path / "p" / name) for name in made]
    assert all(mask.size == (64, 64) for mask in masks)


def test_the_predicted_mask_holds_class_numbers(root: Path, tmp_path: Path) -> None:
    image = root / "data" / "images" / "t010.png"
    assert rsmtdf("predict", root / "run", image, "--out", tmp_path / "p", "-q") == 0
    modes = {p.name: Image.open(p).mode for p in (tmp_path / "p").iterdir()}
    mask = next(name for name, mode in modes.items() if mode in ("P", "L"))
    assert set(np.unique(np.asarray(Image.open(tmp_path / "p" / mask)))) <= {0, 1, 2}


def test_preview_draws_one_column_per_array_and_the_tiles(root: Path, tmp_path: Path) -> None:
    for tiles in (1, 2):
        out = tmp_path / f"{tiles}.png"
        assert rsmtdf("cache", "preview", root / "store", root / "data", "--out", out, "--tiles", tiles, "-q") == 0
    one, two = (Image.open(tmp_path / f"{n}.png").size for n in (1, 2))
    assert one[0] == two[0] and two[1] > one[1]
    assert one[0] > 100 * (1 + sum(k.view.endswith("o0") for k in FeatureStore.open(root / "store").keys()))


def break_data(change: Callable[[Path], object]) -> Callable[[Path, Path], tuple[object, ...]]:
    def command(root: Path, tmp: Path) -> tuple[object, ...]:
        data = Path(shutil.copytree(root / "data", tmp / "data"))
        change(data)
        return ("cache", "build", data, "--out", tmp / "store", "--teacher", TEACHER, "-q")

    return command


def grown_mask(data: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(data / "masks" / "t001.png")


def foreign_label(data: Path) -> None:
    mask = np.asarray(Image.open(data / "masks" / "t001.png")).copy()
    mask[3, 4] = 77
    Image.fromarray(mask).save(data / "masks" / "t001.png")


def append(path: str, text: str) -> Callable[[Path], object]:
    return lambda data: (data / path).write_text((data / path).read_text() + text)


BAD: dict[str, tuple[int, str, Callable[[Path, Path], tuple[object, ...]]]] = {
    "missing folder": (
        3, "nowhere", lambda r, t: ("cache", "build", t / "nowhere", "--out", t / "s", "--teacher", TEACHER),
    ),
    "image without mask": (3, "t001", break_data(lambda d: (d / "masks" / "t001.png").unlink())),
    "mask without image": (3, "t001", break_data(lambda d: (d / "images" / "t001.png").unlink())),
    "sizes that differ": (3, "t001", break_data(grown_mask)),
    "label outside the classes": (3, "77", break_data(foreign_label)),
    "empty split": (3, "empty", break_data(lambda d: (d / "splits" / "train.txt").write_text("\n"))),
    "duplicate ids": (3, "t001", break_data(append("splits/train.txt", "t001\n"))),
    "unknown teacher": (
        2, "Did you mean 'dinov2_vitb14'",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", "dinov2_vitb41"),
    ),
    "unknown split": (
        3, "trian",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", TEACHER, "--split", "trian"),
    ),
    "unknown key": (
        2, "Did you mean 'steps'",
        lambda r, t: ("train", r / "recipe.yaml", "--no-distill", "--out", t / "x", "--set", "stepz=3"),
    ),
    "no store for distillation": (2, "--use-cache", lambda r, t: ("train", r / "recipe.yaml", "--out", t / "x")),
    "another store in the way": (
        4, "no feature store",
        lambda r, t: ("cache", "build", r / "data", "--out", r / "data", "--teacher", TEACHER),
    ),
    "other weights": (
        4, "teacher.weights",
        lambda r, t: ("cache", "build", r / "data", "--out", r / "store", "--teacher", f"{TEACHER},seed=5"),
    ),
    "another recipe for the run": (
        4, "steps",
        lambda r, t: ("train", r / "recipe.yaml", "--use-cache", r / "store", "--out", r / "run", "--set", "steps=4"),
    ),
    "missing weights file": (
        6, "missing.pt",
        lambda r, t: (
            "cache", "build", r / "data", "--out", t / "s", "--teacher", f"dinov2_vits14,weights={t}/missing.pt",
        ),
    ),
    "store among the images": (
        2, "lies among the images",
        lambda r, t: ("cache", "build", r / "data", "--out", r / "data" / "images" / "s", "--teacher", TEACHER),
    ),
    "a layer twice": (
        2, "stands twice",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", f"{TEACHER},layers=stage3+stage3"),
    ),
    "scale that is no number": (
        2, "positive numbers",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", TEACHER, "--scales", "nan"),
    ),
    "empty scales": (
        2, "numbers with commas",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", TEACHER, "--scales", ""),
    ),
    "device that is none": (
        2, "no such kind of device",
        lambda r, t: ("cache", "build", r / "data", "--out", t / "s", "--teacher", TEACHER, "--device", "xyz"),
    ),
    "no store to verify": (2, "does not exist", lambda r, t: ("cache", "verify", t / "nowhere")),
    "no run to score": (2, "nowhere", lambda r, t: ("eval", t / "nowhere")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error_with_its_code_and_nothing_is_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, said, make = BAD[name]
    args = make(root, tmp_path)
    before = sorted(p for p in root.rglob("*"))
    capsys.readouterr()
    assert rsmtdf(*args) == code
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown
    assert sorted(p for p in root.rglob("*")) == before
    assert not (tmp_path / "s").exists() and not (tmp_path / "store").exists()


def test_bad_tiles_are_left_out_reported_and_stop_a_strict_build(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(root / "data", tmp_path / "data"))
    pixels = np.asarray(Image.open(data / "images" / "t001.png"))
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(data / "images" / "t001.png")
    Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(data / "images" / "t002.png")
    Image.fromarray(pixels[..., 0]).save(data / "images" / "t003.png")
    cut = data / "images" / "t004.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    build = ("cache", "build", data, "--out", tmp_path / "s", "--teacher", TEACHER)
    assert rsmtdf(*build, "--strict") == 3
    assert not (tmp_path / "s").exists()
    capsys.readouterr()
    assert rsmtdf(*build, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(q["id"] for q in report["quarantined"]) == ["t001", "t002", "t003", "t004"]
    assert report["tiles"] == 4
    train = ("train", root / "recipe.yaml", "--use-cache", tmp_path / "s", "--out", tmp_path / "run", "-q")
    assert rsmtdf(*train, "--set", f"data={data}", "--set", "labeled=25") == 0
    assert "4 tiles" in capsys.readouterr().err


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_in_the_middle_ends_with_6_and_the_same_build_continues(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=12, tile_px=64)

    def build(out: Path, on_event: Callable[[object], None] = lambda event: None) -> None:
        values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1}
        build_store(BuildRequest.of(values), on_event=on_event, load_teacher=load_mean_teacher)

    with small_disk(tmp_path / "disk", 2 * 2**20) as disk:
        seen = 0

        def fill(event: object) -> None:
            nonlocal seen
            seen += isinstance(event, Progress) and event.task == "mean"
            if seen == 6 and not (disk / "filler").exists():
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        with pytest.raises(ResourceError, match="disk full"):
            build(disk / "s", fill)
        assert sum(len(c) for c in FeatureStore.open(disk / "s").ledger.commits.values()) >= 2
        (disk / "filler").unlink()
        build(disk / "s")
        build(tmp_path / "whole")
        assert FeatureStore.open(disk / "s").snapshot == FeatureStore.open(tmp_path / "whole").snapshot
        assert verify_store(disk / "s", deep=True) == []


def test_sigterm_during_a_build_ends_with_5_and_the_same_command_finishes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=60, tile_px=64)
    command = [sys.executable, "-m", "rsmtdf_cli", "cache", "build", str(data), "--out", str(tmp_path / "s"),
               "--teacher", TEACHER, "--group-rows", "4", "--micro-batch", "1", "--threads", "1"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    commits = tmp_path / "s" / "ledger" / "commits"
    deadline = time.monotonic() + 120
    while not list(commits.glob("*/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5, errors
    assert "continues" in errors
    assert rsmtdf(*command[3:], "-q") == 0
    assert verify_store(tmp_path / "s", deep=True) == []
