"""A plan says what the build then does, to the byte, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsmtdf_cache import disk_speed, estimate
from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.disk_speed import file_system_of, measure_disk, nearest_folder, scratch_folder
from rsmtdf_cache.errors import Interrupted, MismatchError
from rsmtdf_cache.estimate import BuildPlan, Probe, plan_build
from rsmtdf_cache.events import Event, Progress, ProgressStart, Warned
from rsmtdf_cache.forecast import find_measured
from rsmtdf_cache.plan import plan_teacher
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.upkeep.gc import drop_arrays
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

QUICK = Probe(seconds=0, disk_nbytes=2**22)
TEACHER = "timm:test_resnet,pretrained=none"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("plan") / "data", tiles=14, tile_px=64)


def request(data: Path, out: Path, **more: object) -> BuildRequest:
    return BuildRequest.of({"data": data, "out": out, "teachers": ["mean"], "threads": 1, "micro_batch": 2, **more})


def plan(asked: BuildRequest, measure: bool = False) -> BuildPlan:
    return plan_build(asked, measure=measure, load_teacher=load_mean_teacher, probe=QUICK)


def build(asked: BuildRequest) -> BuildReport:
    return build_store(asked, load_teacher=load_mean_teacher)


def shards(store: Path) -> dict[Path, int]:
    """Return the sizes of all shards: of features and, where a codec has them, of scales."""
    files = (p for part in ("features", "scale") for p in store.glob(f"zarr/*/*/*/{part}/c/**/*"))
    return {p: p.stat().st_size for p in files if p.is_file()}


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(("group_rows", "codec"), [(2, "float16"), (5, "int8"), (64, "float16")])
def test_planned_bytes_are_those_the_build_writes_also_when_it_grows(
    data: Path, tmp_path: Path, group_rows: int, codec: str
) -> None:
    out, before = tmp_path / "s", set[Path]()
    for more in (
        {"scales": (1.0,), "orientations": 2},
        {"scales": (1.0,), "orientations": 2},  # the same again
        {"scales": (1.0, 0.5), "splits": ("train", "val", "test")},
        {"scales": (1.0,), "teachers": ["mean", "other"]},
    ):
        asked = request(data, out, group_rows=group_rows, codec=codec, **more)
        ahead, done = plan(asked), build(asked)
        new = {p: n for p, n in shards(out).items() if p not in before}
        assert ahead.nbytes == sum(new.values()) == done.nbytes_shards == done.planned_nbytes
        for array in ahead.arrays:
            mine = {p: n for p, n in new.items() if p.is_relative_to(out / "zarr" / array["key"])}
            assert array["nbytes"] == sum(mine.values())
        assert sum(w.nbytes for w in ahead.work) == ahead.nbytes
        before |= set(new)
    assert done.nbytes_shards > 0


def test_an_array_that_only_has_to_be_revived_costs_nothing(data: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "s", scales=(1.0,))
    build(asked)
    drop_arrays(tmp_path / "s", ["mean/*/mean16"])
    ahead, done = plan(asked), build(asked)
    assert ahead.nbytes == done.nbytes_shards == 0


def test_a_measured_plan_writes_nothing_into_the_store_or_beside_it(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "home" / "s"
    out.parent.mkdir()
    found = plan(request(data, out), measure=True)
    assert files_below(out.parent) == []
    assert found.disk is not None and found.disk.probed_nbytes == 2**22 and found.measured is not None
    assert {(r.teacher, r.scale) for r in found.measured.rates} == {("mean", "s64"), ("mean", "s32")}
    build(request(data, out))
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files_below(out.parent)}
    plan(request(data, out, splits=("train", "val")), measure=True)
    assert {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files_below(out.parent)} == before


def test_micro_batches_are_counted_as_the_teacher_runs_them(data: Path, tmp_path: Path) -> None:
    teachers: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        teachers.append(load_mean_teacher(*args, **kwargs))
        return teachers[-1]

    out = tmp_path / "s"
    for more in ({"orientations": 4}, {"splits": ("train", "val", "test")}, {"codec": "int8", "teachers": ["second"]}):
        asked = request(data, out, group_rows=4, scales=(1.0,), **more)
        ahead = plan(asked)
        build_store(asked, load_teacher=load)
        passes = sum(w.batches + w.extra_batches for w in ahead.work)
        # Calibration and held-out sample each end with a micro-batch that need not be full.
        assert passes <= teachers[-1].calls <= passes + 1
        assert sum(w.batches for w in ahead.work) > 0


def test_the_build_finds_the_plan_of_the_same_command_and_reports_the_ratio(data: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "s", scales=(1.0,))
    ahead = plan(asked, measure=True)
    assert ahead.forecast is not None
    other = build(request(data, tmp_path / "other", scales=(1.0,))).to_json()
    assert other["planned"]["seconds"] is None and other["ratio"] == {"nbytes": 1, "seconds": None}
    report = build(asked).to_json()
    assert report["planned"] == {"nbytes": ahead.nbytes, "seconds": round(ahead.forecast.seconds, 3)}
    assert report["actual"]["nbytes"] == ahead.nbytes and report["ratio"]["nbytes"] == 1
    assert report["ratio"]["seconds"] == pytest.approx(report["actual"]["seconds"] / ahead.forecast.seconds, rel=0.01)


def test_a_build_that_goes_on_is_compared_with_what_was_left(data: Path, tmp_path: Path) -> None:
    asked = request(data, tmp_path / "s", scales=(1.0,), group_rows=2)
    whole = plan(asked, measure=True)
    assert whole.forecast is not None
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "mean":
            seen.append(event)
            if len(seen) == 5:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        build_store(asked, stop, load_teacher=load_mean_teacher)
    done = sum(shards(tmp_path / "s").values())
    rest = build(asked)
    assert rest.planned_nbytes == rest.nbytes_shards == whole.nbytes - done and done > 0
    assert rest.planned_seconds is not None and rest.planned_seconds < whole.forecast.seconds


def test_a_damaged_memory_of_a_plan_is_no_plan(data: Path, tmp_path: Path) -> None:
    home = Path(os.environ["RSMTDF_HOME"]) / "cache" / "plans"
    asked = request(data, tmp_path / "s")
    specs = plan_teacher(asked.teachers[0], asked, 64, load_mean_teacher).specs
    before = set(home.glob("*.json"))
    assert find_measured(asked, specs) is None
    found = plan(asked, measure=True)
    assert found.measured is not None and find_measured(asked, specs) == found.measured
    (memo,) = set(home.glob("*.json")) - before
    memo.write_bytes(memo.read_bytes().replace(b"rates", b"ratez", 1))
    assert find_measured(asked, specs) is None


def test_of_many_tiles_a_sample_is_looked_at_and_the_rest_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_LOOK_AT_MOST", 3)
    asked = request(data, tmp_path / "s", group_rows=4)
    found = plan(asked, measure=True)
    assert found.unread == 6 and found.tiles == 9 and found.measured is not None and found.measured.look_seconds > 0
    assert found.nbytes == build(asked).nbytes_shards
    assert plan(asked).nbytes == 0  # what the store has is known by its ids


def test_a_plan_refuses_what_the_build_would(data: Path, tmp_path: Path) -> None:
    build(request(data, tmp_path / "s"))
    for measure in (False, True):
        with pytest.raises(MismatchError, match="micro_batch"):
            plan(request(data, tmp_path / "s", splits=("train", "val"), micro_batch=3), measure)
        with pytest.raises(MismatchError, match=r"teacher\.weights"):
            plan(request(data, tmp_path / "s", teachers=["mean,seed=1"]), measure)


def test_a_disk_too_small_is_a_warning_of_the_plan(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_nbytes", lambda out: 1000)
    events: list[Event] = []
    found = plan_build(request(data, tmp_path / "s"), events.append, measure=False, load_teacher=load_mean_teacher)
    assert not found.fits and found.to_json()["plan"]["disk"]["fits"] is False
    assert any(isinstance(e, Warned) and "needs" in e.text for e in events)


# -- the disk


def test_the_probe_has_no_name_while_it_is_written_and_is_gone_when_it_is_interrupted(tmp_path: Path) -> None:
    seen: list[list[Path]] = []

    def look(event: Event) -> None:
        seen.append(files_below(tmp_path))
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, seconds=0, nbytes_max=2**23, on_event=look)
    assert seen == [[], []] and files_below(tmp_path) == []


def test_where_files_need_a_name_the_probe_gives_its_own_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    seen: list[list[Path]] = []
    speed = measure_disk(tmp_path, 0, 2**22, lambda event: seen.append(files_below(tmp_path)))
    assert speed is not None and speed.probed_nbytes == 2**22 and seen and not any(seen)


def test_the_probe_syncs_every_piece_and_takes_a_part_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed, "_PIECE_NBYTES", 2**22)
    sizes: list[int] = []
    real = os.fsync

    def synced(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        real(file)

    monkeypatch.setattr(os, "fsync", synced)
    speed = measure_disk(tmp_path, seconds=60, nbytes_max=3 * 2**22)
    assert speed is not None and sizes == [2**22, 2 * 2**22, 3 * 2**22] and speed.probed_nbytes == sizes[-1]
    assert speed.write_nbytes_per_s > 0 and speed.read_nbytes_per_s > 0
    monkeypatch.setattr(disk_speed, "free_nbytes", lambda folder: 5 * 2**22)
    small = measure_disk(tmp_path, seconds=60)
    assert small is not None and small.probed_nbytes == 2**22
    monkeypatch.setattr(disk_speed, "free_nbytes", lambda folder: 2**20)
    assert measure_disk(tmp_path) is None


def test_memory_is_not_taken_for_a_disk() -> None:
    shm = Path("/dev/shm")
    if file_system_of(shm) != "tmpfs" or not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    speed = measure_disk(shm, 0, 2**22)
    assert speed is not None and speed.in_memory and speed.to_json()["in_memory"] is True


def test_scratch_lies_on_the_disk_of_the_store_beside_it(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert scratch_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "a").mkdir()
    assert scratch_folder(tmp_path / "a") == tmp_path
    assert scratch_folder(Path("/proc")) == Path("/proc")  # a mount of its own: beside it is another disk


# -- the commands


def run(capture: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capture.readouterr()
    with pytest.raises(SystemExit) as end:
        app([str(a) for a in args], prog_name="rsmtdf")
    out, err = capture.readouterr()
    return int(end.value.code or 0), out, err


def shape(value: Any) -> Any:
    """Return the keys of nested JSON, without values."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands measure for an instant."""
    real = plan_build
    monkeypatch.setattr(
        estimate, "plan_build", lambda request, sink, measure: real(request, sink, measure, probe=QUICK)
    )


def test_plan_and_dry_run_are_one_and_a_saved_plan_is_compared(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    asked = (data, "--out", tmp_path / "s", "--teacher", TEACHER, "--threads", 1)
    quiet = (*asked, "--json", "-q")
    code, text, _ = run(capsys, "cache", "plan", *quiet)
    assert code == 0 and not (tmp_path / "s").exists()
    planned = json.loads(text)
    code, text, _ = run(capsys, "cache", "build", *quiet, "--dry-run")
    assert code == 0 and not (tmp_path / "s").exists()
    assert shape(json.loads(text)) == shape(planned) and json.loads(text)["arrays"] == planned["arrays"]
    assert set(planned["plan"]["forecast"]) == {
        "seconds", "look_seconds", "load_seconds", "teacher_seconds", "disk_seconds", "bottleneck",
        "online_seconds_per_epoch", "read_seconds_per_epoch", "break_even_epochs",
    }  # fmt: skip
    assert set(planned["plan"]["measured"]) == {
        "rates", "write_nbytes_per_s", "read_nbytes_per_s", "look_seconds", "load_seconds",
    }  # fmt: skip
    code, text, _ = run(capsys, "cache", "plan", *quiet, "--no-measure")
    sizes = json.loads(text)
    assert code == 0 and sizes["arrays"] == planned["arrays"] and sizes["planned"]["seconds"] is None
    saved, bare = tmp_path / "plan.json", tmp_path / "sizes.json"
    planned["plan"]["measured"]["load_seconds"] = 1000.0
    saved.write_text(json.dumps(planned))
    bare.write_text(json.dumps(sizes))
    for wrong in (bare, tmp_path / "missing.json"):
        code, _, err = run(capsys, "cache", "build", *quiet, "--plan", wrong)
        assert code == 2 and wrong.name in err and not (tmp_path / "s").exists()
    code, text, _ = run(capsys, "cache", "build", *quiet, "--plan", saved)
    report = json.loads(text)
    assert code == 0 and report["planned"]["seconds"] > 1000 and report["ratio"]["nbytes"] == 1
    assert set(planned) - {"plan"} <= set(report)  # a plan is a build's report, and more
    code, text, _ = run(capsys, "cache", "plan", *asked)
    assert code == 0 and "nothing left to do" in text


def test_people_read_what_limits_the_build_and_when_it_pays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    asked = (data, "--out", tmp_path / "s", "--teacher", TEACHER, "--threads", 1)
    code, text, _ = run(capsys, "cache", "plan", *asked)
    assert code == 0
    for words in ("tiles/s on cpu", "synced", "bottleneck", "an epoch of these tiles", "free on its disk"):
        assert words in text
    code, text, _ = run(capsys, "cache", "build", *asked)
    assert code == 0 and "planned: " in text and "1 of the bytes" in text


def test_what_is_missing_is_named_and_a_planned_store_needs_no_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, "cache", "plan")
    assert code == 2 and "cache plan: DATA, --teacher NAME missing" in err
    code, _, err = run(capsys, "cache", "build", data)
    assert code == 2 and "cache build: --out STORE, --teacher NAME missing" in err
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    code, text, _ = run(capsys, "cache", "plan", data, "--teacher", TEACHER, "--no-measure", "--json")
    assert code == 0 and json.loads(text)["store"] == "store-2" and not (tmp_path / "store-2").exists()


def test_a_plan_that_is_terminated_leaves_nothing(data: Path, tmp_path: Path) -> None:
    home = tmp_path / "place"
    home.mkdir()
    words = [sys.executable, "-m", "rsmtdf_cli", "cache", "plan", data, "--out", home / "s", "--teacher", TEACHER]
    process = subprocess.Popen([str(w) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "measuring" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 5 and files_below(home) == []


def test_progress_of_measuring_is_told(data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    plan_build(request(data, tmp_path / "s"), events.append, load_teacher=load_mean_teacher, probe=QUICK)
    start = next(e for e in events if isinstance(e, ProgressStart) and e.task == "measure")
    assert start.total == 3 == sum(e.advance for e in events if isinstance(e, Progress) and e.task == "measure")
