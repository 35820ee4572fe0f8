"""Parts of a build on workers: permissions, fingerprints, which GPU is whose, what options may stand together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rsmtdf_cache import writer
from rsmtdf_cache.build import build_store
from rsmtdf_cache.cluster import ClusterAsked, executor_of, places
from rsmtdf_cache.cluster.asked import gpu_ids
from rsmtdf_cache.cluster.fingerprint import fingerprint_of, settled, unlike
from rsmtdf_cache.cluster.site import set_up, site_of
from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.plan import load_asked
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.work import Bench, InProcess, Unit, compute
from rsmtdf_cache.writer import begin, clear_drafts, grant, revoke, withdraw
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A store of three units of one tile, of which the last is to be done again."""
    data = write_dataset(tmp_path / "data", tiles=3, splits={"train": range(3)})
    request = BuildRequest.of({
        "data": data, "out": tmp_path / "s", "teachers": ["mean"], "scales": [1.0], "group_rows": 1, "threads": 1,
        "micro_batch": 1, "device": "cpu",
    })  # fmt: skip
    build_store(request, load_teacher=load_mean_teacher)
    paths = StorePaths(tmp_path / "s")
    [last] = paths.ledger.glob("commits/*/00000002.json")
    last.unlink()
    for shard in paths.zarr.glob("mean/*/*/features/c/2/0/0/0"):
        shard.unlink()
    return bench_of(request)


def bench_of(request: BuildRequest) -> Bench:
    ledger, source = Ledger.load(StorePaths(Path(request.out))), open_source(request.data)
    [name], [asked] = ledger.sets, request.teachers
    teacher = load_asked(asked, request, load_mean_teacher)
    reader = TileReader(source, ledger.table)
    return Bench(request, source, ledger, 1, {name: asked}, {name: teacher}, {name: ledger.sets[name].profile}, reader)


def shards(bench: Bench) -> int:
    return len(list(bench.ledger.paths.zarr.glob("mean/*/*/features/c/2/0/0/0")))


@pytest.mark.parametrize("everything", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_unit_whose_permission_is_taken_back_is_not_committed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: int, everything: bool
) -> None:
    [name], paths = bench.ledger.sets, bench.ledger.paths
    folder = grant(paths, name, 2)

    def take_back(reached: int) -> None:
        if reached == step:
            clear_drafts(paths) if everything else revoke(folder)

    monkeypatch.setattr(writer, "after_step", take_back)
    with pytest.raises(ResourceError, match="may not be committed any more"):
        compute(bench, Unit(name, 2, 1), lambda nbytes: None, folder)
    assert 2 not in Ledger.load(paths).commits[name] and not folder.exists()
    assert shards(bench) == (2 if step >= 3 else 0), "without a record nobody reads them"
    monkeypatch.undo()
    compute(bench_of(bench.request), Unit(name, 2, 1), lambda nbytes: None, grant(paths, name, 2))
    clear_drafts(paths)
    assert verify_store(paths.root, deep=True) == []


def test_a_permission_that_is_taken_back_later_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [name], paths = bench.ledger.sets, bench.ledger.paths
    folder = grant(paths, name, 2)
    monkeypatch.setattr(writer, "after_step", lambda reached: revoke(folder) if reached == 6 else None)
    commit = compute(bench, Unit(name, 2, 1), lambda nbytes: None, folder)
    assert Ledger.load(paths).commits[name][2].to_json() == commit.to_json()
    revoke(folder)
    assert list(paths.tmp.iterdir()) == []


def test_a_permission_is_either_begun_or_withdrawn(bench: Bench) -> None:
    [name], paths = bench.ledger.sets, bench.ledger.paths
    first, second = grant(paths, name, 2), grant(paths, name, 2)
    assert withdraw(first)
    with pytest.raises(ResourceError, match="may not be committed any more"):
        begin(first)
    place = begin(second)
    assert not withdraw(second) and place.is_dir()
    revoke(second)
    assert list(paths.tmp.iterdir()) == [], "what was begun is taken back too"


def test_a_worker_never_makes_its_permission(bench: Bench) -> None:
    [name], paths = bench.ledger.sets, bench.ledger.paths
    folder = grant(paths, name, 2)
    revoke(folder)
    with pytest.raises(ResourceError, match="may not be committed any more"):
        compute(bench, Unit(name, 2, 1), lambda nbytes: None, folder)
    assert not folder.exists() and shards(bench) == 0


def test_compaction_leaves_the_record_of_a_worker_that_was_not_heard_of_yet(bench: Bench) -> None:
    """The client folds records while workers write others; a unit whose worker died untold is found by its record."""
    [name], paths = bench.ledger.sets, bench.ledger.paths
    before = bench.ledger
    theirs = bench_of(bench.request)
    commit = compute(theirs, Unit(name, 2, 1), lambda nbytes: None, grant(paths, name, 2))
    before.compact(tail_max=0)
    assert [p.name for p in paths.ledger.glob("commits/*/*.json")] == ["00000002.json"]
    assert sorted(Ledger.load(paths).commits[name]) == [0, 1, 2]
    before.adopt(commit)
    before.compact(tail_max=0)
    assert list(paths.ledger.glob("commits/*/*.json")) == []
    assert Ledger.load(paths).snapshot() == before.snapshot()


def test_a_bench_is_set_up_from_plain_data_and_refused_where_anything_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path / "data", tiles=3, splits={"train": range(3)})
    monkeypatch.chdir(tmp_path)
    request = BuildRequest.of({
        "data": data.relative_to(tmp_path), "out": "s", "teachers": ["timm:test_resnet,pretrained=none"],
        "device": "cpu", "threads": 1,
    })  # fmt: skip
    build_store(request)
    ledger, source = Ledger.load(StorePaths(Path(request.out))), open_source(request.data)
    teacher, sets = load_asked(request.teachers[0], request), ledger.sets
    mine = Bench(
        request, source, ledger, 8, dict.fromkeys(sets, request.teachers[0]), dict.fromkeys(sets, teacher),
        {n: s.profile for n, s in sets.items()}, TileReader(source, ledger.table),
    )  # fmt: skip
    print_ = settled(fingerprint_of(mine), fingerprint_of(mine))
    site = site_of(mine, "build-x", print_)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as a worker's folder is
    with pytest.raises(ResourceError, match="does not see the store"):
        set_up(site)
    (tmp_path / "s" / "tmp").mkdir()
    (tmp_path / "s" / "tmp" / "build-x").touch()
    theirs = set_up(site)
    assert theirs.ledger.sets.keys() == sets.keys() and fingerprint_of(theirs) == print_
    assert theirs.teachers[next(iter(sets))] is theirs.teachers[list(sets)[-1]], "one teacher for all its sets"
    [name] = [n for n, s in sets.items() if s.arrays.specs[0].view.size_px == 64]
    site["fingerprint"]["numerics"][name] |= {"device": "NVIDIA H100", "threads": 4}
    site["fingerprint"]["versions"]["torch"] = "2.0.0"
    with pytest.raises(MismatchError) as refused:
        set_up(site)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        f"numerics.{name}.device", f"numerics.{name}.threads", "versions.torch"
    ]  # fmt: skip
    assert lines[0].endswith("'cpu' on the worker, 'NVIDIA H100' here")


def test_bits_that_a_process_does_not_give_twice_are_no_reason_to_refuse() -> None:
    first, second = {"bits": {"a": "1", "b": "2"}, "v": 1}, {"bits": {"a": "1", "b": "3"}, "v": 1}
    mine = settled(first, second)
    assert mine == {"bits": {"a": "1", "b": None}, "v": 1}
    assert unlike(mine, second) == []
    assert unlike(mine, {"bits": {"a": "0", "b": "9"}, "v": 1}) == ["bits.a: '0' on the worker, '1' here"]
    assert unlike({"x": {"y": 1}}, {"x": {}}) == ["x.y: None on the worker, 1 here"]


def test_each_process_gets_one_of_the_gpus_that_are_visible() -> None:
    assert gpu_ids("all", {}, 2) == ["0", "1"]
    assert gpu_ids("all", {"CUDA_VISIBLE_DEVICES": "5,2"}, 2) == ["5", "2"]
    assert gpu_ids("2, 5", {"CUDA_VISIBLE_DEVICES": "5,2"}, 2) == ["2", "5"]
    assert gpu_ids("GPU-a", {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}, 2) == ["GPU-a"]
    assert gpu_ids("1", {}, 2) == ["1"]
    for text, environ, count, said in (
        ("all", {}, 0, "torch sees no GPU here"),
        ("7", {}, 0, "torch sees no GPU here"),
        ("7", {}, 2, "there is no GPU 7; torch sees 0, 1$"),
        ("0,x", {}, 2, "there is no GPU x; torch sees 0, 1$"),
        ("1", {"CUDA_VISIBLE_DEVICES": "0"}, 1, r"no GPU 1; torch sees 0 \(CUDA_VISIBLE_DEVICES=0\)"),
        ("5", {"CUDA_VISIBLE_DEVICES": "2,5"}, 1, "no GPU 5; torch sees 2 "),  # named, and not there
        ("0,", {}, 2, "ids with commas between"),
        ("0,0", {}, 2, "each once"),
        ("", {}, 2, "write all, or ids"),
    ):
        with pytest.raises(UsageError, match=f"--gpus {text}: .*{said}"):
            gpu_ids(text, environ, count)


@pytest.mark.parametrize(("asked", "said"), [
    (ClusterAsked(workers=2, scheduler="tcp://a:1"), "--scheduler and --workers"),
    (ClusterAsked(workers=2, gpus="all"), "--gpus and --workers: --gpus decides how many"),
    (ClusterAsked(workers=0), "--workers 0: at least 1"),
    (ClusterAsked(workers=1, patience_s=0), "--patience 0"),
    (ClusterAsked(dashboard=True), "--dashboard: goes with"),
    (ClusterAsked(scheduler="localhost"), "write tcp://HOST:PORT"),
    (ClusterAsked(report=Path("r.html")), "--performance-report: goes with"),
    (ClusterAsked(workers=1, report=Path("/")), "--performance-report /: a folder"),
    (ClusterAsked(workers=1, report=Path("no-such-folder/r.html")), "the folder no-such-folder is not there"),
])  # fmt: skip
def test_options_that_contradict_are_refused(asked: ClusterAsked, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        executor_of(asked)


@pytest.mark.parametrize("asked", [
    ClusterAsked(workers=1, dashboard=True), ClusterAsked(workers=1, report=Path("r.html")),
])  # fmt: skip
def test_pages_without_bokeh_are_refused(asked: ClusterAsked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsmtdf_cache.cluster.asked.find_spec", lambda name: None if name == "bokeh" else name)
    with pytest.raises(UsageError, match=r"needs bokeh; run: pip install 'rsmtdf\[dashboard\]'"):
        executor_of(asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU on a machine without one")
def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="--gpus 7: torch sees no GPU here"):
        executor_of(ClusterAsked(gpus="7"))


def test_gpus_and_another_device_contradict_and_nothing_asked_is_this_process() -> None:
    with pytest.raises(UsageError, match="--gpus 0 --device cpu"):
        executor_of(ClusterAsked(gpus="0"), "cpu")
    assert isinstance(executor_of(ClusterAsked()), InProcess)


def test_a_scheduler_that_does_not_answer_ends_a_build_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "CONNECT_S", 1)
    data = write_dataset(tmp_path / "data", tiles=3)
    request = BuildRequest.of({"data": data, "out": tmp_path / "s", "teachers": ["timm:test_resnet,pretrained=none"]})
    with pytest.raises(ResourceError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"):
        build_store(request, executor=executor_of(ClusterAsked(scheduler="tcp://127.0.0.1:9")))
    assert not (tmp_path / "s").exists()
