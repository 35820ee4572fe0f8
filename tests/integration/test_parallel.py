"""A step cut into parts, and a run on several processes, are the step and the run of one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import DataError, Interrupted
from rsmtdf_cache.read_plan import ReadPlan
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.training import one_voice
from rsmtdf_train.checkpoint import RunFolder, load_deployed
from rsmtdf_train.evaluate import evaluate
from rsmtdf_train.fusion import TargetShape
from rsmtdf_train.launcher import PEER_GONE
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.loop import train
from rsmtdf_train.losses import SupervisedLoss
from rsmtdf_train.prepare import Part, StepTools, part_to
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, Targets
from rsmtdf_train.state import TrainState, build_state
from rsmtdf_train.step import train_step
from tests.commands import Command, note_draws, start, start_ranks, torchrun
from tests.stores import write_mean_store

CPU, IGNORE = torch.device("cpu"), 255
TIMES = ("seconds", "data_wait", "samples_per_s")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 tiles: 8 to train on, 2 to validate, and 3 to test, which two processes cannot share evenly."""
    return write_mean_store(tmp_path_factory.mktemp("parallel"), tiles=13)


def recipe(root: Path, **changes: object) -> Recipe:
    """A student without batch norm and without dropout: nothing in a step depends on which crops are side by side."""
    values: dict[str, object] = {
        "data": str(root / "data"), "labeled": "25", "steps": 6, "crop_px": 64, "batch": {"labeled": 4, "unlabeled": 8},
        "student": {"encoder": "timm:test_vit", "decoder": "dpt", "channels": 8}, "threshold": 0.3,
        "distill": {"hidden": 8}, "privileged": True, "optim": {"clip_norm": 1.0}, "checkpoint_every": 2,
        "validation": {"every": 3, "keep": "best"},
    }  # fmt: skip
    return Recipe.model_validate(values | changes)


# --- parts of a step


def spoiled(batch: Batch) -> Batch:
    """Return ``batch`` with labels, validity and token weights that differ from crop to crop, by the pixels of each."""
    a, b = batch.labeled, batch.unlabeled
    assert b is not None

    def some(images: Tensor) -> Tensor:
        bright = images.float().mean((1, 2, 3), keepdim=True)
        return images.float().mean(1) < bright[:, 0] + 40 * torch.sin(bright[:, 0])

    def weighed(targets: Targets, images: Tensor) -> Targets:
        seen = some(images).float().unsqueeze(1)
        kept = {
            k: w * (torch.nn.functional.adaptive_avg_pool2d(seen, (w.shape[1], w.shape[2]))[:, 0] > 0.5)
            for k, w in targets.weights.items()
        }
        return replace(targets, weights=kept)

    labeled = replace(a, label=a.label.masked_fill(~some(a.image), IGNORE), targets=weighed(a.targets, a.image))
    unlabeled = replace(b, valid=b.valid & some(b.image), targets=weighed(b.targets, b.image))
    return replace(batch, labeled=labeled, unlabeled=unlabeled)


def first_steps(
    loader: BatchLoader, of: Recipe, parts: int, steps: int = 1
) -> tuple[TrainState, list[dict[str, float]], list[Tensor]]:
    """Return the state after some steps of spoiled batches in ``parts``, the logs, and the first step's gradients."""
    assert loader.targets is not None
    shapes = [
        TargetShape(key, t.channels, float(t.stride_px), float(t.offset_px)) for key, t in loader.targets.specs.items()
    ]
    state = build_state(of, 3, shapes, CPU)
    weights = torch.tensor([0.5, 1.0, 2.0])
    tools = StepTools(SupervisedLoss(of.supervised, weights, IGNORE), IGNORE, loader.offsets_px)
    logs, gradients = [], []
    for step in range(steps):
        batches = [spoiled(loader.batch(step, p, parts)) for p in range(parts)]
        found = train_step(state, [part_to(b, CPU, of.channels_last) for b in batches], of, tools)
        logs.append({k: float(v) for k, v in found.items()})
        if step == 0:
            gradients = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in state.student.parameters()]
    return state, logs, gradients


@pytest.fixture(scope="module")
def loader(root: Path) -> BatchLoader:
    return BatchLoader.open(open_source(root / "data"), recipe(root), FeatureStore.open(root / "store"))


def test_a_step_in_parts_has_the_losses_and_gradients_of_the_whole(root: Path, loader: BatchLoader) -> None:
    here = recipe(root, optim={"lr": 1e-3})
    counts = [spoiled(loader.batch(0, p, 4)).labeled.label.ne(IGNORE).sum().item() for p in range(4)]
    assert len(set(counts)) == 4, "the parts weigh differently, or this test shows nothing"
    whole, logs, gradients = first_steps(loader, here, 1, steps=2)
    for parts in (2, 3, 4):  # 3: shares of 1, 1 and 2 labelled crops, 2, 1 and 1 pairs
        state, mine, found = first_steps(loader, here, parts, steps=2)
        for line, expected in zip(mine, logs, strict=True):
            assert line.keys() == expected.keys()
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)
        size = max(float(g.abs().max()) for g in gradients)
        assert max(float((a - b).abs().max()) for a, b in zip(found, gradients, strict=True)) < 1e-5 * size
        apart = torch.cat(
            [(a - b).flatten() for a, b in zip(state.ema.parameters(), whole.ema.parameters(), strict=True)]
        )
        assert apart.abs().mean() < 1e-3 * here.optim.lr, "Adam may turn rounding of a gradient near 0 into a step"


@pytest.mark.parametrize("loss", ["dice", "ohem"])
def test_a_loss_that_looks_at_its_own_share_is_weighted_by_the_crops_of_the_share(
    root: Path, loader: BatchLoader, loss: str
) -> None:
    here = recipe(root, supervised={"loss": loss})
    shares = [len(loader.draws(0, part, 3)[0]) for part in range(3)]
    assert shares == [1, 1, 2]
    assert loader.targets is not None
    shapes = [
        TargetShape(k, t.channels, float(t.stride_px), float(t.offset_px)) for k, t in loader.targets.specs.items()
    ]
    tools = StepTools(SupervisedLoss(here.supervised, None, IGNORE), IGNORE, loader.offsets_px)
    parts = [part_to(loader.batch(0, part, 3), CPU, here.channels_last) for part in range(3)]

    def labeled(*some: Part) -> float:
        return float(train_step(build_state(here, 3, shapes, CPU), some, here, tools)["loss_labeled"])

    mean = sum(n * labeled(part) for n, part in zip(shares, parts, strict=True)) / 4
    assert labeled(*parts) == pytest.approx(mean, rel=1e-5)


def test_processes_read_together_what_one_reads_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[tuple[str, int, int]] = Counter()
    real = FeatureStore.read_planned

    def read_planned(self: FeatureStore, key: FeatureKey, plan: ReadPlan, out: Codes) -> None:
        for group, reads in plan.groups.items():
            read.update((str(key), group, row) for _, row, _, _ in reads)
        real(self, key, plan, out)

    monkeypatch.setattr(FeatureStore, "read_planned", read_planned)
    found = []
    for world in (1, 2, 3):
        read.clear()
        for rank in range(world):  # each with a loader of its own, as a process has it
            own = BatchLoader.open(open_source(root / "data"), recipe(root), FeatureStore.open(root / "store"))
            for _ in own.iterate(0, 4, [rank], world):
                pass
        found.append(dict(read))
    assert found[0] == found[1] == found[2]
    assert sum(found[0].values()) == 4 * 12 * 2, "12 crops a step, two layers"


def test_channels_last_is_a_layout_and_no_other_numbers(root: Path, loader: BatchLoader) -> None:
    student = {"encoder": "timm:test_resnet", "channels": 8}
    plain, other = recipe(root, student=student), recipe(root, student=student, channels_last=True)
    a, b = (first_steps(loader, one, 1) for one in (plain, other))
    assert b[1][0] == pytest.approx(a[1][0], rel=1e-4)
    convolutions = [p for p in b[0].student.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


# --- several processes


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    train(recipe(root), root / "alone", root / "store", device="cpu", tensorboard=False)
    return root / "alone"


def words(root: Path, out: Path, *more: object) -> list[object]:
    file = root / "recipe.yaml"
    file.write_text(recipe(root).to_yaml())
    return ["train", file, "--use-cache", root / "store", "--out", out, "--device", "cpu", "--no-tensorboard", *more]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_nearly_the_same_run(run: Path, other: Path) -> None:
    log, expected = lines(run / "log.jsonl"), lines(other / "log.jsonl")
    assert len(log) == len(expected) == 6
    for mine, theirs in zip(log, expected, strict=True):
        for line in (mine, theirs):
            for name in TIMES:
                del line[name]
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    metrics, expected_metrics = (json.loads((r / "metrics.json").read_text()) for r in (run, other))
    for kind, scores in metrics["scores"].items():
        found, wanted = (torch.tensor(s["confusion"]) for s in (scores, expected_metrics["scores"][kind]))
        assert torch.equal(found.sum(1), wanted.sum(1)), "every pixel once"
        assert int(found.sum()) == 3 * 64 * 64 and int((found - wanted).abs().sum()) < 0.01 * found.sum()
    validations = [lines(r / "validation.jsonl") for r in (run, other)]
    assert [line["step"] for one in validations for line in one] == [3, 6, 3, 6]
    for kind in ("ema", "student"):
        found_miou, wanted_miou = ([line["scores"][kind]["miou"] for line in one] for one in validations)
        assert found_miou == pytest.approx(wanted_miou, abs=0.01)


def test_two_processes_of_torchrun_train_the_run_of_one(root: Path, alone: Path) -> None:
    out = root / "two"
    first, second = torchrun(words(root, out, "--json", "--set", "batch.accumulate=2"), root, 2)
    assert_nearly_the_same_run(out, alone)
    shown = json.loads(first[0])
    assert shown["run"] == str(out) and shown["step"] == 6 and "done: evaluate on test" in first[1]
    assert second == ("", ""), "one process prints"
    model, _ = load_deployed(RunFolder(out), "ema", CPU)
    [score] = evaluate({"ema": model}, open_source(root / "data"), "test", CPU).values()
    apart = torch.tensor(score.confusion) - torch.tensor(shown["scores"]["ema"]["confusion"])
    assert int(apart.abs().sum()) <= 8, "up to rounding, what one process says of the same weights"


def until(ready: Callable[[], bool], commands: Sequence[Command]) -> None:
    while not ready() and all(c.runs for c in commands):
        time.sleep(0.002)


def test_a_run_that_loses_processes_continues_on_other_numbers_as_that_of_one(
    root: Path, alone: Path, loader: BatchLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 2, one of which is killed; on 3, one of which is told to stop; on 1. What each of them drew is noted."""
    out, noted = root / "stopped", root / "draws.jsonl"
    log, draws = out / "log.jsonl", {"NOTED_DRAWS": str(noted)}
    ranks = start_ranks(words(root, out, "-q"), root, 2, draws)
    until((out / "checkpoints" / "last.pt").exists, ranks)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert [c.end() for c in ranks] == [6, -signal.SIGKILL]
    assert "another process of this run ended" in ranks[0].stderr.read_text()
    inode, resumed = log.stat().st_ino, torch.load(out / "checkpoints" / "last.pt", weights_only=True)["step"]
    ranks = start_ranks(words(root, out, "-q"), root, 3, draws)
    until(lambda: log.stat().st_ino != inode and log.read_text().count("\n") > resumed, ranks)
    os.kill(ranks[random.SystemRandom().randrange(3)].pid, signal.SIGTERM)
    assert [c.end() for c in ranks] == [5, 5, 5], [c.stderr.read_text() for c in ranks]
    done = len(lines(log))
    assert f"after step {done} of 6; the checkpoint is in" in ranks[0].stderr.read_text()
    assert ranks[1].stderr.read_text() == ranks[2].stderr.read_text() == "", "said once"
    monkeypatch.setattr(BatchLoader, "_made", BatchLoader._made)  # put back afterwards
    note_draws(noted, 0, 1)
    result = train(recipe(root), out, root / "store", device="cpu", tensorboard=False)
    assert result.resumed_at == done < 6
    assert_nearly_the_same_run(out, alone)
    seen = lines(noted)
    for count, steps in ((2, range(resumed)), (3, range(resumed, done)), (1, range(done, 6))):
        for step in steps:
            mine = sorted((n for n in seen if (n["count"], n["step"]) == (count, step)), key=lambda n: n["rank"])
            assert [n["rank"] for n in mine] == list(range(count))
            labeled, unlabeled = ([[d.epoch, d.tile_id, d.orientation] for d in some] for some in loader.draws(step))
            assert [crop for n in mine for crop in n["crops"][0]] == labeled
            assert sorted(crop for n in mine for crop in n["crops"][1]) == sorted(unlabeled)


def test_a_process_that_hangs_is_not_waited_for_for_ever(root: Path) -> None:
    out = root / "hung"
    ranks = start_ranks(words(root, out, "-q"), root, 2, {"RSMTDF_PEER_TIMEOUT_S": "4"})
    until((out / "checkpoints" / "last.pt").exists, ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    code = ranks[0].end()
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].end()
    said = ranks[0].stderr.read_text()
    assert code == 6 and "did not answer for" in said and "Traceback" not in said, said


def test_processes_that_opened_different_things_are_refused(root: Path, tmp_path: Path) -> None:
    """As on two machines whose folders are not the same: the second process has another recipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        start(words(root, tmp_path / "run", "-q", "--set", f"seed={rank}"), tmp_path, f"rank{rank}",
              place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    assert [c.end() for c in ranks] == [4, 4]
    assert "opened different things" in ranks[0].stderr.read_text()
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_an_error_of_one_process_is_left_to_it_by_those_that_a_launcher_started(root: Path, tmp_path: Path) -> None:
    """``launcher.launch`` tells of it; these are its processes, without it."""
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    run = [word if word != root / "recipe.yaml" else tmp_path / "recipe.yaml" for word in words(root, tmp_path / "run")]
    (tmp_path / "recipe.yaml").write_text(recipe(root, data=str(data), distill=False, targets="none").to_yaml())
    (data / "images" / "t000.png").write_bytes(b"no picture")
    del run[run.index("--use-cache") : run.index("--use-cache") + 2]
    loader = BatchLoader.open(open_source(data), recipe(root, data=str(data), distill=False, targets="none"))
    where = [{d.tile_id for some in loader.draws(0, rank, 2) for d in some} for rank in range(2)]
    ranks = start_ranks(run, tmp_path, 2, {"RSMTDF_MEETING": str(tmp_path / "meeting")})
    codes = [c.end() for c in ranks]
    said = [c.stderr.read_text() for c in ranks]
    assert sum("t000" in one for one in where) in (1, 2)
    for rank, code in enumerate(codes):
        if code == PEER_GONE:
            assert "error" not in said[rank]
        else:
            assert code == 3 and said[rank].count("error: ") == 1 and "t000" in said[rank]
    assert 3 in codes


def test_one_process_of_several_speaks_and_the_others_say_who_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_voice() as speaks:
        assert speaks
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DataError, match=r"^a tile$"), one_voice() as speaks:
        assert speaks
        raise DataError("a tile")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(DataError, match=r"^process 2 \(of 0 to 3\): a tile$"), one_voice() as speaks:
        assert not speaks
        raise DataError("a tile")
    with pytest.raises(SystemExit) as ended, one_voice():
        raise Interrupted("the first process says it")
    assert ended.value.code == 5
