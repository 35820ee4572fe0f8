"""Builds on real workers, and what befalls them: the store is always that of one process, bit by bit."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.backends.cpu import get_cpu_capability

from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.cluster import worker
from rsmtdf_cache.cluster.places import OwnProcesses
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.work import Executor
from tests.clusters import Cluster, Temper, cluster, until
from tests.commands import Command, start
from tests.datasets import write_dataset
from tests.torture.scene import difference_here

UNITS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 tiles to train on, one of which is cut off, and the store that one process makes of the others."""
    root = tmp_path_factory.mktemp("workers")
    data = write_dataset(root / "data", tiles=17, splits={"train": range(17)})
    bad = data / "images" / "t003.png"
    bad.write_bytes(bad.read_bytes()[:200])
    finish(root, root / "whole")
    return root


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "cluster") as here:
        yield here


def finish(root: Path, out: Path, threads: int = 1, executor: Executor | None = None) -> BuildReport:
    """Build, or continue, in this process."""
    request = BuildRequest.of({
        "data": root / "data", "out": out, "teachers": ["timm:test_vit,pretrained=none"], "group_rows": 2,
        "threads": threads, "micro_batch": 2, "device": "cpu",
    })  # fmt: skip
    return build_store(request, executor=executor)


def words(root: Path, out: Path, *more: object, threads: int = 1) -> list[object]:
    return [
        "cache", "build", root / "data", "--out", out, "--teacher", "timm:test_vit,pretrained=none", "--group-rows", 2,
        "--threads", threads, "--micro-batch", 2, "--json", *more,
    ]  # fmt: skip


def build(root: Path, out: Path, crew: Cluster, name: str = "client", patience: float = 60) -> Command:
    """Start a build on the workers of ``crew``."""
    return start(words(root, out, "--scheduler", crew.address, "--patience", patience), crew.folder, name)


def report(client: Command) -> dict[str, Any]:
    assert client.end() == 0, client.stderr.read_text()
    found: dict[str, Any] = json.loads(client.stdout.read_text())
    return found


def ended(client: Command, code: int) -> str:
    """Return what a build said that ends with ``code``; one message, no traceback."""
    assert client.end() == code, client.stderr.read_text()
    said = client.stderr.read_text()
    assert "Traceback" not in said
    return said


def committed(out: Path) -> int:
    return sum(len(units) for units in Ledger.load(StorePaths(out)).commits.values())


def assert_whole(root: Path, out: Path) -> None:
    assert difference_here(out, root / "whole") == ""
    assert not (out / "tmp").exists()


def test_workers_of_a_scheduler_make_the_store_of_one_process(root: Path, crew: Cluster, tmp_path: Path) -> None:
    """They come after the build began, one with four threads; both wait in their first unit while tasks are counted."""
    client = build(root, tmp_path / "s", crew)
    crew.add("a", Temper(hold=True))
    crew.add("b", Temper(hold=True, nthreads=4))
    until(lambda: crew.held("a") and crew.held("b"))
    from distributed import Client

    with Client(crew.address, set_as_default=False) as look:

        def at_rest() -> list[str]:
            return sorted(look.run_on_scheduler(_tasks))

        until(lambda: len(at_rest()) == 4, lambda: str(at_rest()))
        assert all(key.startswith("rsmtdf encode timm_test_vit/s") for key in at_rest()), "two for each, nothing else"
    crew.release()
    found = report(client)
    with Client(crew.address, set_as_default=False) as look:
        until(lambda: set(look.run(_benches).values()) == {0})  # their teachers may go
    assert found["units"] == UNITS and sum(crew.steps(1).values()) == UNITS, "each unit was encoded once"
    assert sorted(t["units"] for t in found["workers"]) == sorted(crew.steps(1).values())
    assert sum(t["tiles"] for t in found["workers"]) == 32 and found["failures"] == []
    assert [q["id"] for q in found["quarantined"]] == ["t003"]
    assert_whole(root, tmp_path / "s")
    again = report(build(root, tmp_path / "s", crew, "again"))
    assert (again["units"], again["units_before"]) == (0, UNITS)


def _tasks(dask_scheduler: Any) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks]


def _benches() -> int:
    return len(worker._desks)


def test_workers_that_are_killed_in_a_commit_lose_nothing(root: Path, crew: Cluster, tmp_path: Path) -> None:
    for step in (1, 4, 6):
        crew.add(f"dies{step}", Temper(kill=True, step=step, unit=2))
    crew.add("lives", Temper(hold=True))
    client = build(root, tmp_path / "s", crew)
    until(lambda: not any(p.is_alive() for n, p in crew.workers.items() if n != "lives"))
    crew.release()
    found = report(client)
    assert len(found["failures"]) == 3 and all("was lost" in f for f in found["failures"])
    assert sum(crew.steps(1).values()) == UNITS + 2, "of the three units under way one was committed"
    assert_whole(root, tmp_path / "s")


def test_when_all_workers_die_the_build_ends_and_can_be_continued(root: Path, crew: Cluster, tmp_path: Path) -> None:
    for name in "ab":
        crew.add(name, Temper(kill=True, step=3, unit=2))
    said = ended(build(root, tmp_path / "s", crew, patience=8), 6)
    assert "has had no worker for 8 s" in said
    assert committed(tmp_path / "s") == 2
    crew.add("c")
    report(build(root, tmp_path / "s", crew, "again"))
    assert crew.steps(1)["c"] == UNITS - 2
    assert_whole(root, tmp_path / "s")


def test_a_unit_that_no_worker_survives_ends_the_build(root: Path, crew: Cluster, tmp_path: Path) -> None:
    """Each worker dies in the first unit it is given, which is the one that the last one died in."""
    client = build(root, tmp_path / "s", crew)
    for name in "abcd":
        crew.add(name, Temper(kill=True))
        until(lambda: not crew.workers[name].is_alive())  # noqa: B023 - called at once
    assert "row group 0 of " in (said := ended(client, 6)) and "was lost with 4 workers" in said
    assert sum(crew.steps(1).values()) == 4 and committed(tmp_path / "s") == 0


def test_a_scheduler_that_dies_ends_the_build_which_can_be_continued(root: Path, crew: Cluster, tmp_path: Path) -> None:
    crew.add("a", Temper(hold=True, unit=3))
    client = build(root, tmp_path / "s", crew)
    until(lambda: crew.held("a"))
    crew.scheduler.kill()
    assert "connection to the scheduler was lost" in ended(client, 6)
    crew.release()
    finish(root, tmp_path / "s")
    assert_whole(root, tmp_path / "s")


@pytest.mark.parametrize("step", [2, 5])
def test_workers_whose_client_died_write_nothing_into_the_next_build(
    root: Path, crew: Cluster, tmp_path: Path, step: int
) -> None:
    """They wait inside a commit while another build finishes the store, and go on when it is over."""
    for name in "ab":
        crew.add(name, Temper(hold=True, unit=2, step=step))
    client = build(root, tmp_path / "s", crew)
    until(lambda: crew.held("a") and crew.held("b"))
    os.kill(client.pid, signal.SIGKILL)
    assert client.end() == -signal.SIGKILL
    assert committed(tmp_path / "s") == 2
    finish(root, tmp_path / "s")
    done = crew.steps(7)
    crew.release()
    assert _serves(crew, 2)
    assert crew.steps(7) == done == {"a": 1, "b": 1}, "nothing was published"
    assert_whole(root, tmp_path / "s")


def _serves(crew: Cluster, workers: int) -> bool:
    """Whether all workers are free: each answers a task, behind what it was doing."""
    from distributed import Client

    with Client(crew.address, set_as_default=False) as look:
        here = list(look.scheduler_info()["workers"])
        asked = [look.submit(os.getpid, workers=[w], pure=False, allow_other_workers=False) for w in here]
        return len(set(look.gather(asked))) == workers


def test_two_builds_share_workers(root: Path, crew: Cluster, tmp_path: Path) -> None:
    """The second one begins while each worker, with four threads, is in a unit of the first one."""
    for name in "ab":
        crew.add(name, Temper(hold=True, unit=2, nthreads=4))
    first = build(root, tmp_path / "first", crew, "first")
    until(lambda: crew.held("a") and crew.held("b"))
    second = build(root, tmp_path / "second", crew, "second")
    from distributed import Client

    with Client(crew.address, set_as_default=False) as look:
        until(lambda: sum(key.startswith("rsmtdf set up") for key in look.run_on_scheduler(_tasks)) == 2)
    crew.release()
    for client in (first, second):
        assert report(client)["failures"] == []
    assert sum(crew.steps(1).values()) == 2 * UNITS
    assert_whole(root, tmp_path / "first")
    assert_whole(root, tmp_path / "second")


def test_a_worker_that_hangs_is_given_up_and_harmless_when_it_wakes(root: Path, crew: Cluster, tmp_path: Path) -> None:
    crew.add("hangs", Temper(hold=True, step=4, unit=2))
    crew.add("works")
    found = report(build(root, tmp_path / "s", crew, patience=5))
    assert [f.endswith("gave no sign for 5 s") for f in found["failures"]] == [True]
    assert sum(crew.steps(1).values()) == UNITS + 1
    done = crew.steps(7)
    crew.release()
    assert _serves(crew, 2) and crew.steps(7) == done
    assert_whole(root, tmp_path / "s")


def test_a_unit_that_waits_behind_a_slow_one_goes_to_a_worker_without_any(
    root: Path, crew: Cluster, tmp_path: Path
) -> None:
    crew.add("slow", Temper(hold=True))
    crew.add("quick", Temper(hold=True))
    client = build(root, tmp_path / "s", crew)
    until(lambda: crew.held("slow") and crew.held("quick"))
    crew.release("quick")
    until(lambda: crew.steps(7)["quick"] == UNITS - 1)
    crew.release()
    found = report(client)
    assert crew.steps(1) == {"slow": 1, "quick": UNITS - 1} and found["failures"] == []
    assert_whole(root, tmp_path / "s")


@pytest.mark.skipif(get_cpu_capability() == "DEFAULT", reason="torch has one set of instructions here")
def test_workers_that_would_write_other_bytes_are_left_out(root: Path, crew: Cluster, tmp_path: Path) -> None:
    """One has another timm, one gives other bits at the same versions; a third one does all the work."""
    other = tmp_path / "site" / "timm-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.9.9\n")
    crew.add("versions", Temper(path=other.parent))
    said = ended(build(root, tmp_path / "s", crew), 4)
    assert "versions.timm: '9.9.9' on the worker" in said and "no worker is left" in said
    assert committed(tmp_path / "s") == 0 and crew.steps(1) == {"versions": 0}
    crew.add("bits", Temper(environ={"ATEN_CPU_CAPABILITY": "default"}))  # torch without AVX, as on another machine
    crew.add("same")
    found = report(build(root, tmp_path / "s", crew, "again"))
    assert len(found["failures"]) == 2 and any("bits.timm-test_vit" in f for f in found["failures"])
    assert crew.steps(1) == {"versions": 0, "bits": 0, "same": UNITS}
    assert_whole(root, tmp_path / "s")


def test_a_worker_that_loads_other_weights_is_left_out(root: Path, crew: Cluster, tmp_path: Path) -> None:
    """The file is exchanged after the client has read it, and before the only worker comes."""
    from safetensors.torch import save_file

    from rsmtdf_cache.teachers import load
    from rsmtdf_cache.teachers.base import TeacherRequest

    def weights(seed: int, name: str) -> Path:
        network = load(TeacherRequest("timm:test_vit", "none", seed)).network  # type: ignore[attr-defined]
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / name)
        return tmp_path / name

    file = weights(0, "weights.safetensors")
    asked = [w for w in words(root, tmp_path / "s", "--scheduler", crew.address)]
    asked[asked.index("--teacher") + 1] = f"timm:test_vit,weights={file}"
    client = start(asked, crew.folder, "client")
    until(lambda: any((tmp_path / "s" / "tmp").glob("build-*")), client.stderr.read_text)
    weights(1, "other").replace(file)
    crew.add("other")
    assert "teachers.timm-test_vit.weights:" in ended(client, 4)
    assert committed(tmp_path / "s") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_worker_that_does_not_see_the_dataset_is_told_so(root: Path, crew: Cluster, tmp_path: Path) -> None:
    crew.add("blind", Temper(hidden=root / "data"))
    until(lambda: _serves(crew, 1) or not crew.workers["blind"].is_alive())
    if not crew.workers["blind"].is_alive():
        pytest.skip("mounting is not allowed here")
    said = ended(build(root, tmp_path / "s", crew), 6)
    assert f"does not see the dataset {root / 'data'}" in said and "tcp://127.0.0.1" in said


def test_a_worker_without_room_gets_no_more_and_others_finish(root: Path, crew: Cluster, tmp_path: Path) -> None:
    crew.add("full", Temper(file_nbytes=100))
    said = ended(build(root, tmp_path / "s", crew), 6)
    assert "gets no more work" in said and "File too large" in said
    assert committed(tmp_path / "s") == 0
    crew.add("roomy")
    found = report(build(root, tmp_path / "s", crew, "again"))
    assert len(found["failures"]) == 1
    assert crew.steps(7) == {"full": 0, "roomy": UNITS}
    assert_whole(root, tmp_path / "s")


def test_an_interrupted_build_takes_units_back_and_continues(root: Path, crew: Cluster, tmp_path: Path) -> None:
    crew.add("a", Temper(hold=True, unit=3, step=5))
    client = build(root, tmp_path / "s", crew)
    until(lambda: crew.held("a"))
    os.kill(client.pid, signal.SIGINT)
    assert "2 shard groups" in ended(client, 5)
    assert not (tmp_path / "s" / "tmp").exists()
    assert verify_store(tmp_path / "s", deep=True) == [], "its shards were published, its record was not"
    crew.release()
    found = report(build(root, tmp_path / "s", crew, "again"))
    assert found["units_before"] == 2 and crew.steps(7) == {"a": UNITS}
    assert_whole(root, tmp_path / "s")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes on the CPU stand for processes with a GPU each")
def test_processes_of_this_machine_listen_to_it_alone_die_with_the_build_and_have_a_gpu_each(
    root: Path, tmp_path: Path
) -> None:
    """With two torch threads, whatever a Nanny puts into the environment; no HTTP server of any process."""
    (tmp_path / "data").symlink_to(root / "data")
    finish(tmp_path, tmp_path / "whole", threads=2)
    first = start(words(root, tmp_path / "s", "--workers", 1, threads=2), tmp_path, "first")
    until(lambda: any(tmp_path.glob("s/ledger/commits/*/*.json")), first.stderr.read_text)
    os.kill(first.pid, signal.SIGSTOP)
    client = psutil.Process(first.pid)
    family = [client, *client.children(recursive=True)]
    listening = {c.laddr for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert len(family) > 1 and {a.ip for a in listening} == {"127.0.0.1"}
    assert len(listening) == 3, "scheduler, Nanny, worker"
    os.kill(first.pid, signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    assert psutil.wait_procs(family[1:], timeout=60)[1] == []
    assert "8787" not in first.stderr.read_text()
    gpus = [{"CUDA_VISIBLE_DEVICES": n} for n in "37"]  # what `--gpus 3,7` asks for where they are
    page = tmp_path / "report.html"
    found = finish(tmp_path, tmp_path / "s", threads=2, executor=OwnProcesses(gpus, 60, report=page))
    assert found.units + found.units_before == UNITS and found.units_before > 0
    names = [t.name for t in found.workers]
    assert all(n.startswith("tls://127.0.0.1:") for n in names)
    assert sorted(n.partition(" ")[2] for n in names) == ["(GPU 3)", "(GPU 7)"]
    assert_whole(tmp_path, tmp_path / "s")
    text = page.read_text()
    assert "rsmtdf encode timm_test_vit/s64o0" in text and not re.search("<script[^>]*src=", text)
    assert {p.name for p in tmp_path.glob(".*")} == set()
