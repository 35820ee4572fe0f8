"""Training runs on real tiny datasets and stores: resume to the bit, the run folder, refusals, no teacher anywhere."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.request import BuildRequest
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.logs import StepLogged
from rsmtdf_train.loop import train
from rsmtdf_train.recipe import Recipe
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

STEPS = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    write_dataset(root / "data", tiles=12, tile_px=64)
    build_store(
        BuildRequest.of({"data": root / "data", "out": root / "store", "teachers": ["mean"], "scales": [1.0]}),
        load_teacher=load_mean_teacher,
    )
    return root


def recipe(root: Path, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "data": str(root / "data"), "steps": STEPS, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8}, "threshold": 0.3,
        "distill": {"hidden": 8}, "checkpoint_every": 3,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def plain(root: Path, **changes: object) -> Recipe:
    return recipe(root, **changes).without_distillation()


def tensors(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_deployed(RunFolder(run), kind, torch.device("cpu"))[0].state_dict()


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    for kind in ("student", "ema"):
        mine, theirs = tensors(a, kind), tensors(b, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in log_of(run)] for run in (a, b)]
    assert logs[0] == logs[1]
    scores = [json.loads((run / "metrics.json").read_text())["scores"] for run in (a, b)]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """An uninterrupted cached run."""
    train(recipe(root), root / "whole", root / "store", device="cpu", tensorboard=False)
    return root / "whole"


def start_cli(root: Path, out: Path, ready: Callable[[int], bool]) -> subprocess.Popen[str]:
    """Start ``rsmtdf train`` of the cached recipe and return when ``ready(lines in the log)``."""
    file = root / f"{out.name}.yaml"
    file.write_text(recipe(root).to_yaml())
    code = "import torch; torch.set_num_threads(1); from rsmtdf_cli.app import main; main()"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", code, "train", str(file), "--use-cache", str(root / "store"), "--out", str(out)),
            *("--device", "cpu", "--no-tensorboard", "-q"),
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    while process.poll() is None and not ready(log.read_text().count("\n") if log.exists() else 0):
        time.sleep(0.002)
    return process


def test_a_run_killed_at_a_random_step_continues_to_the_bits_of_an_uninterrupted_one(root: Path, whole: Path) -> None:
    step = random.SystemRandom().randint(1, STEPS - 4)
    process = start_cli(root, root / "killed", lambda lines: lines >= step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (root / "killed" / "metrics.json").exists(), f"step {step}"
    result = train(recipe(root), root / "killed", root / "store", device="cpu", tensorboard=False)
    assert result.resumed_at == (0 if step < 3 else result.resumed_at) and result.resumed_at % 3 == 0
    assert_same_run(root / "killed", whole)


def test_sigterm_saves_a_checkpoint_and_ends_with_5(root: Path, whole: Path) -> None:
    process = start_cli(root, root / "stopped", lambda lines: lines >= 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 5, errors
    done = len(log_of(root / "stopped"))
    assert "SIGTERM" in errors and f"after step {done} of {STEPS}" in errors
    result = train(recipe(root), root / "stopped", root / "store", device="cpu", tensorboard=False)
    assert result.resumed_at == done
    assert_same_run(root / "stopped", whole)


def test_the_trainer_holds_no_teacher(root: Path) -> None:
    file = root / "alone.yaml"
    file.write_text(recipe(root, steps=2).to_yaml())
    code = f"""
import gc, sys, torch
torch.set_num_threads(1)
sys.argv = ["rsmtdf", "train", {str(file)!r}, "--use-cache", {str(root / "store")!r}, "--out",
            {str(root / "alone")!r}, "--device", "cpu", "--no-tensorboard", "-q"]
from rsmtdf_cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
guilty = [m for m in sys.modules if m.startswith(("rsmtdf_cache.teachers", "open_clip", "efficientnet_lite"))]
assert not guilty, guilty
from rsmtdf_train.fusion import FusedStudent
models = [o for o in gc.get_objects() if isinstance(o, FusedStudent)]
owned = {{id(p) for m in models for p in m.parameters()}}
foreign = [tuple(o.shape) for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and id(o) not in owned]
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (root / "alone" / "metrics.json").is_file()


def test_the_run_folder_holds_what_the_contract_says(root: Path, whole: Path) -> None:
    names = {"recipe.yaml", "store.json", "metrics.json", "log.jsonl", "checkpoints", "pictures"}
    assert {p.name for p in whole.iterdir()} == names
    assert RunFolder(whole).load_recipe() == recipe(root)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["split"] == "test" and metrics["seed"] == 0 and metrics["classes"] == ["class0", "class1", "class2"]
    assert len(metrics["store"]) == 64
    assert metrics["targets"] == {"mode": "cached", "keys": ["mean/s64/mean16", "mean/s64/mean8"]}
    assert {k: v["checkpoint"] for k, v in metrics["scores"].items()} == {"ema": "ema", "student": "student"}
    lines = log_of(whole)
    assert [line["step"] for line in lines] == list(range(STEPS))
    wanted = {"step", "loss", "loss_labeled", "loss_unlabeled", "loss_distill", "lr", "seconds", "mask_ratio"}
    assert all(wanted <= line.keys() for line in lines)
    assert all(line["loss_distill"] > 0 for line in lines) and any(line["loss_unlabeled"] > 0 for line in lines)
    assert all(line["cosine/mean/s64/mean8"] <= 1 for line in lines)


def test_checkpoints_load_with_weights_only_and_deployed_ones_without_data_or_store(root: Path, whole: Path) -> None:
    data = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)
    assert data["step"] == STEPS
    model, identity = load_deployed(RunFolder(whole), "ema", torch.device("cpu"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in data["ema"].items())
    assert [c.name for c in identity.classes] == ["class0", "class1", "class2"]
    assert identity.targets and model.fusion is not None, "the fused student is deployed with its translators"


def test_distillation_without_fusion_deploys_no_translator(root: Path) -> None:
    chosen = recipe(root, fuse=False, steps=2)
    train(chosen, root / "nofuse", root / "store", device="cpu", tensorboard=False)
    assert not [k for k in tensors(root / "nofuse", "student") if k.startswith("fusion")]
    last = torch.load(root / "nofuse" / "checkpoints" / "last.pt", weights_only=True)
    assert [k for k in last["student"] if k.startswith("fusion.translators")]


def test_a_complete_run_is_left_alone(root: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    events: list[object] = []
    result = train(recipe(root), whole, root / "store", device="cpu", on_event=events.append)
    assert result.resumed_at == STEPS and not events
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_another_recipe_or_store_is_refused_with_the_differing_fields(root: Path, whole: Path) -> None:
    with pytest.raises(MismatchError, match=r"recipe\.optim\.lr: 0\.001 \(run\) != 0\.5 \(asked\)"):
        train(recipe(root, optim={"lr": 0.5}), whole, root / "store", device="cpu")
    build_store(
        BuildRequest.of({"data": root / "data", "out": root / "other", "teachers": ["mean,seed=1"], "scales": [0.5]}),
        load_teacher=load_mean_teacher,
    )
    with pytest.raises(MismatchError, match=r"store: '[0-9a-f]{64}' \(run\) != '[0-9a-f]{64}' \(asked\)"):
        train(recipe(root), whole, root / "other", device="cpu")


def test_a_run_stopped_before_its_first_checkpoint_is_not_taken_over_by_another_recipe(root: Path) -> None:
    out = root / "early"
    out.mkdir()
    (out / "recipe.yaml").write_text(plain(root, seed=5).to_yaml())
    with pytest.raises(MismatchError, match=r"recipe\.seed: 5"):
        train(plain(root), out, device="cpu")


def test_a_damaged_checkpoint_is_a_clear_error(root: Path) -> None:
    chosen = plain(root, steps=2, method="supervised", checkpoint_every=1)
    train(chosen, root / "damaged", device="cpu", tensorboard=False)
    last = root / "damaged" / "checkpoints" / "last.pt"
    content = last.read_bytes()
    for bad in (content[: len(content) // 2], b"", b"nothing of the kind"):
        last.write_bytes(bad)
        with pytest.raises(DataError, match=r"last\.pt is damaged"):
            train(chosen, root / "damaged", device="cpu", tensorboard=False)
    student = root / "damaged" / "checkpoints" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"student\.safetensors is damaged"):
        load_deployed(RunFolder(root / "damaged"), "student", torch.device("cpu"))


def test_a_folder_of_other_things_is_refused_and_stays_as_it_was(root: Path) -> None:
    out = root / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MismatchError, match="no run"):
        train(plain(root), out, device="cpu")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(root: Path) -> None:
    chosen = plain(root, method="supervised", optim={"lr": 1e30}, checkpoint_every=1)
    with pytest.raises(UsageError, match=r"loss.* not a finite number.*optim\.lr"):
        train(chosen, root / "nan", device="cpu", tensorboard=False)
    lines = log_of(root / "nan")
    assert lines[-1]["loss"] is None and len(lines) < STEPS
    saved = torch.load(root / "nan" / "checkpoints" / "last.pt", weights_only=True)
    assert saved["step"] == len(lines) - 1


def test_a_crop_the_student_cannot_read_is_refused(root: Path) -> None:
    chosen = plain(root, student={"encoder": "dinov2_vits14", "decoder": "dpt"})
    with pytest.raises(UsageError, match=r"crop_px 64.*multiples of 14 px"):
        train(chosen, root / "odd", device="cpu")


def test_training_learns(root: Path) -> None:
    seen: list[StepLogged] = []
    chosen = plain(
        root, method="supervised", steps=30, labeled="25", optim={"lr": 1e-2}, batch={"labeled": 4},
        student={"encoder": "timm:mobilenetv3_small_050", "channels": 32},
    )  # fmt: skip
    result = train(
        chosen, root / "learned", device="cpu", tensorboard=False,
        on_event=lambda e: seen.append(e) if isinstance(e, StepLogged) else None,
    )  # fmt: skip
    assert seen[-1].values["loss"] < 0.5 * seen[0].values["loss"]
    assert result.metrics["scores"]["student"]["miou"] > 0.7


def test_tensorboard_gets_the_scalars(root: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(plain(root, steps=2), root / "board", device="cpu")
    board = EventAccumulator(str(root / "board" / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == [0, 1]
    assert [e.value for e in board.Scalars("loss")] == pytest.approx([line["loss"] for line in log_of(root / "board")])
