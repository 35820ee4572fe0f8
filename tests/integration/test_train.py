"""Training runs on real tiny datasets and stores: resume to the bit, the run folder, refusals, no teacher anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import DataError, Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import Warned
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_train import loop
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.logs import StepLogged
from rsmtdf_train.loop import train
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.run import count_steps
from rsmtdf_train.sections import OptimConfig
from rsmtdf_train.state import TrainState
from rsmtdf_train.step import train_step
from tests.commands import Command, start
from tests.datasets import write_dataset
from tests.stores import write_mean_store
from tests.teachers import load_mean_teacher

STEPS = 14
TIMES = {"seconds", "data_wait", "samples_per_s"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mean_store(tmp_path_factory.mktemp("train"), tiles=12)


def recipe(root: Path, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "data": str(root / "data"), "steps": STEPS, "crop_px": 64, "batch": {"labeled": 2, "unlabeled": 2},
        "student": {"encoder": "timm:mobilenetv3_small_050", "channels": 8}, "threshold": 0.3,
        "distill": {"hidden": 8}, "checkpoint_every": 3,
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


def everything(root: Path) -> Recipe:
    """All that has a state or draws random numbers in one run."""
    return recipe(
        root, method="unimatch", batch={"labeled": 2, "unlabeled": 4}, privileged=True,
        fuse={"gate": "learned", "drop": 0.3, "at": [-2, -1]}, probe={"hold": 0.2, "until": 0.6, "steps": 20},
        validation={"every": 4, "keep": "best"},
    )  # fmt: skip


def plain(root: Path, **changes: object) -> Recipe:
    return recipe(root, **changes).without_distillation()


def tensors(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_deployed(RunFolder(run), kind, CPU)[0].state_dict()


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return data


def assert_equal(a: Any, b: Any, where: str = "last.pt") -> None:
    """Compare what a checkpoint holds, tensors to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    assert_equal(saved(a), saved(b))
    for kind in ("student", "ema", "best"):
        mine, theirs = (run / "checkpoints" / f"{kind}.safetensors" for run in (a, b))
        assert mine.read_bytes() == theirs.read_bytes()
    logs = [[{k: v for k, v in line.items() if k not in TIMES} for line in log_of(run)] for run in (a, b)]
    assert logs[0] == logs[1]
    for name in ("metrics.json", "validation.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """An uninterrupted run of everything."""
    train(everything(root), root / "whole", root / "store", device="cpu", tensorboard=False)
    return root / "whole"


def start_and_wait(root: Path, out: Path, step: int) -> Command:
    """Start ``rsmtdf train`` of everything, and return when it has logged ``step`` steps of its own."""
    file, log = root / f"{out.name}.yaml", out / "log.jsonl"
    file.write_text(everything(root).to_yaml())
    old = log.stat().st_ino if log.exists() else None  # a run that continues begins its log anew
    command = start(
        ["train", file, "--use-cache", root / "store", "--out", out, "--device", "cpu", "--no-tensorboard", "-q"],
        root, out.name,
    )  # fmt: skip
    while command.runs and not (log.exists() and log.stat().st_ino != old and log.read_text().count("\n") >= step):
        time.sleep(0.002)
    return command


def test_a_run_killed_again_and_again_continues_to_the_bits_of_an_uninterrupted_one(root: Path, whole: Path) -> None:
    """Three times killed at random steps, then asked to stop; while one trains it, another one is told so."""
    out = root / "killed"
    at = sorted(random.SystemRandom().sample(range(1, STEPS - 4), 3))
    for step in at:
        command = start_and_wait(root, out, step)
        if step == at[0]:
            os.kill(command.pid, signal.SIGSTOP)
            with pytest.raises(ResourceError, match=f"process {command.pid} on .* trains this run now"):
                train(everything(root), out, root / "store", device="cpu", tensorboard=False)
        command.process.kill()
        assert command.end() == -signal.SIGKILL, (at, command.stderr.read_text())
        assert not (out / "metrics.json").exists(), at
    command = start_and_wait(root, out, STEPS - 4)
    command.process.terminate()
    assert command.end() == 5, (at, command.stderr.read_text())
    done = len(log_of(out))
    assert done < STEPS and f"SIGTERM after step {done} of {STEPS}" in command.stderr.read_text()
    result = train(everything(root), out, root / "store", device="cpu", tensorboard=False)
    assert result.resumed_at == done
    assert_same_run(out, whole)


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
from rsmtdf_train.fused_student import FusedStudent
models = [o for o in gc.get_objects() if isinstance(o, FusedStudent)]
owned = {{id(p) for m in models for p in m.parameters()}}
foreign = [tuple(o.shape) for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and id(o) not in owned]
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (root / "alone" / "metrics.json").is_file()


def test_the_run_folder_holds_what_the_contract_says(root: Path, whole: Path) -> None:
    names = {"recipe.yaml", "store.json", "metrics.json", "log.jsonl", "validation.jsonl", "checkpoints", "pictures"}
    assert {p.name for p in whole.iterdir()} == names
    assert RunFolder(whole).load_recipe() == everything(root)
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["split"] == "test" and metrics["seed"] == 0 and metrics["classes"] == ["class0", "class1", "class2"]
    assert len(metrics["store"]) == 64
    assert metrics["targets"] == {"mode": "cached", "keys": ["mean/s64/mean16", "mean/s64/mean8"]}
    assert {k: v["checkpoint"] for k, v in metrics["scores"].items()} == {k: k for k in ("ema", "student", "best")}
    lines = log_of(whole)
    assert [line["step"] for line in lines] == list(range(STEPS))
    wanted = {"step", "loss", "loss_labeled", "loss_unlabeled", "loss_distill", "loss_privileged", "lr", "mask_ratio"}
    wanted |= {"pseudo_accuracy", "gate/mean/s64/mean8", "gate/mean/s64/mean16", *TIMES}
    assert all(wanted <= line.keys() for line in lines)
    assert all(0 <= line["data_wait"] <= 1 and line["samples_per_s"] > 0 for line in lines)
    assert all(line["loss_distill"] > 0 for line in lines) and any(line["loss_unlabeled"] > 0 for line in lines)
    assert all(line["cosine/mean/s64/mean8"] <= 1 for line in lines)


def test_checkpoints_load_with_weights_only_and_deployed_ones_without_data_or_store(root: Path, whole: Path) -> None:
    data = saved(whole)
    assert data["step"] == STEPS
    model, identity = load_deployed(RunFolder(whole), "ema", torch.device("cpu"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in data["ema"].items())
    assert [c.name for c in identity.classes] == ["class0", "class1", "class2"]
    assert identity.targets and model.fusion is not None, "the fused student is deployed with its translators"


def test_distillation_without_fusion_deploys_no_translator(root: Path) -> None:
    chosen = recipe(root, fuse=False, steps=2)
    train(chosen, root / "nofuse", root / "store", device="cpu", tensorboard=False)
    assert not [k for k in tensors(root / "nofuse", "student") if k.startswith("fusion")]
    assert [k for k in saved(root / "nofuse")["student"] if k.startswith("fusion.translators")]


def test_the_best_weights_are_those_of_the_best_score_and_are_what_the_run_deploys(root: Path, whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(4, "val"), (8, "val"), (12, "val"), (STEPS, "val")]
    top = max(lines, key=lambda line: line["scores"]["ema"]["miou"])  # the first of equals
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (metrics["validation"]["step"], metrics["validation"]["miou"]) == (top["step"], top["scores"]["ema"]["miou"])
    assert metrics["checkpoint"] == "best" and metrics["miou"] == metrics["scores"]["best"]["miou"]
    model, _ = load_deployed(RunFolder(whole), "best", CPU)
    [again] = evaluate({"best": model}, open_source(root / "data"), "val", CPU).values()
    assert again.miou == top["scores"]["ema"]["miou"]
    assert {c.name: c.iou for c in again.classes} == top["scores"]["ema"]["iou"]
    assert RunFolder(whole).deployed_kind() == "best" and RunFolder(whole).kinds() == ("ema", "student", "best")


def test_a_run_without_better_scores_stops_early_and_is_complete(root: Path) -> None:
    chosen = plain(
        root, method="supervised", optim={"lr": 1e-12},
        validation={"every": 2, "by": "student", "keep": "best", "patience": 2},
        student={"encoder": "timm:test_vit", "channels": 8}, checkpoint_every=1,  # no batch norm: nothing moves
    )  # fmt: skip

    def cut(event: object) -> None:
        if isinstance(event, StepLogged) and event.step == 4:
            raise Interrupted("after the second score")

    with pytest.raises(Interrupted):
        train(chosen, root / "early-stop", device="cpu", tensorboard=False, on_event=cut)
    said: list[object] = []
    result = train(chosen, root / "early-stop", device="cpu", tensorboard=False, on_event=said.append)
    assert result.resumed_at == 4 and result.steps == 6 == len(log_of(root / "early-stop")), (
        "scores after 2, 4 and 6 steps"
    )
    assert result.metrics["stopped_early"] and result.metrics["validation"]["step"] == 2
    [warned] = [e.text for e in said if isinstance(e, Warned)]
    assert "stopped after step 6 of 14: 2 scores on val" in warned and "at step 2" in warned
    again = train(chosen, root / "early-stop", device="cpu", tensorboard=False)
    assert again.resumed_at == 6 and again.metrics == result.metrics


def test_epochs_are_rounds_over_the_tiles_that_the_method_goes_through(root: Path) -> None:
    source = open_source(root / "data")  # 8 train tiles, 2 of them labelled

    def steps(**changes: object) -> int:
        return count_steps(plain(root, steps=None, epochs=1.5, **changes), source).total_steps

    assert steps() == 6 and steps(unlabeled="rest") == 4 and steps(method="supervised") == 2
    assert steps(batch={"labeled": 2, "unlabeled": 3}) == 3, "whole batches: two a round"
    with pytest.raises(UsageError, match=r"epochs 1\.5 of 8 tiles are 6 steps, and steps says 14"):
        count_steps(plain(root, epochs=1.5), source)


def test_a_supervised_epoch_is_one_round_over_the_labelled_tiles_for_validation_too(root: Path) -> None:
    chosen = plain(
        root, method="supervised", steps=None, epochs=2, labeled="10", batch={"labeled": 2, "unlabeled": 8},
        validation={"every": "epoch"},
    )  # fmt: skip
    train(chosen, root / "rounds", device="cpu", tensorboard=False)
    assert [json.loads(line)["step"] for line in (root / "rounds/validation.jsonl").read_text().splitlines()] == [2, 4]


def test_a_class_that_no_labelled_tile_shows_is_named(root: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=6, tile_px=64)
    header = yaml.safe_load((data / "dataset.yaml").read_text())
    header["classes"].append({"name": "glacier", "color": [1, 2, 3]})
    (data / "dataset.yaml").write_text(yaml.safe_dump(header))
    said: list[object] = []
    chosen = plain(root, data=str(data), steps=1, method="supervised")
    train(chosen, tmp_path / "run", device="cpu", tensorboard=False, on_event=said.append)
    [warned] = [e.text for e in said if isinstance(e, Warned)]
    assert "no labelled tile shows glacier:" in warned and "splits/labeled/5.txt" in warned


def test_scores_of_tiles_that_are_trained_on_come_with_a_word(root: Path, tmp_path: Path) -> None:
    said: list[object] = []
    for split in ("val", "5"):
        chosen = plain(root, steps=1, method="supervised", eval_split=split)
        train(chosen, tmp_path / split, device="cpu", tensorboard=False, on_event=said.append)
    [warned] = [e.text for e in said if isinstance(e, Warned)]
    assert "eval_split 5: these tiles are trained on" in warned


def test_live_teachers_are_in_no_checkpoint(root: Path) -> None:
    teacher = "timm:test_vit,pretrained=none,layers=block1"
    chosen = recipe(root, targets="online", teachers=[teacher], steps=2, fuse=True, checkpoint_every=1)
    metrics = train(chosen, root / "online", device="cpu", tensorboard=False).metrics
    assert metrics["targets"]["mode"] == "online" and metrics["store"] is None
    assert all(line["loss_distill"] > 0 for line in log_of(root / "online"))
    data = saved(root / "online")
    assert set(data) == {"identity", "step", "student", "ema", "optimizer", "scaler", "best", "stopped"}
    deployed = tensors(root / "online", "ema")
    assert data["student"].keys() == data["ema"].keys() == deployed.keys(), "all of it is the student's"
    own = sum(v.numel() * v.element_size() for v in deployed.values())
    assert (root / "online" / "checkpoints" / "last.pt").stat().st_size < 4.5 * own, "student, EMA, two moments"


def test_a_complete_run_is_left_alone(root: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    events: list[object] = []
    result = train(everything(root), whole, root / "store", device="cpu", on_event=events.append)
    assert result.resumed_at == STEPS and not events
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_another_recipe_or_store_is_refused_with_the_differing_fields(root: Path, whole: Path) -> None:
    with pytest.raises(MismatchError, match=r"recipe\.optim\.lr: 0\.001 \(run\) != 0\.5 \(asked\)"):
        train(everything(root).model_copy(update={"optim": OptimConfig(lr=0.5)}), whole, root / "store", device="cpu")
    build_store(
        BuildRequest.of({"data": root / "data", "out": root / "other", "teachers": ["mean,seed=1"], "scales": [0.5]}),
        load_teacher=load_mean_teacher,
    )
    with pytest.raises(MismatchError, match=r"store: '[0-9a-f]{64}' \(run\) != '[0-9a-f]{64}' \(asked\)"):
        train(everything(root), whole, root / "other", device="cpu")


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
    assert saved(root / "nan")["step"] == len(lines) - 1


def test_weights_that_are_not_finite_stop_the_run_and_are_never_saved(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a finite loss with an infinite gradient. What a save that was killed left goes with the next command."""
    step = train_step

    def overflow(state: TrainState, *more: Any) -> dict[str, Any]:
        logs = step(state, *more)
        if state.step == 2:
            next(state.student.parameters()).data.view(-1)[0] = float("nan")
        return logs

    chosen, out = plain(root, method="supervised", checkpoint_every=1), root / "overflow"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", overflow)
        with pytest.raises(UsageError, match=r"step 2: weights are not finite.*optim\.lr"):
            train(chosen, out, device="cpu", tensorboard=False)
    assert saved(out)["step"] == 1
    draft = out / "checkpoints" / ".last.pt.0.tmp"
    draft.write_bytes(b"half")
    assert train(chosen, out, device="cpu", tensorboard=False).resumed_at == 1
    assert not draft.exists()


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
