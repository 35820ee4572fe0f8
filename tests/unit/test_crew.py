"""Who is given which unit when workers come, go, forget and return: a real scheduler, with workers in this process.

What they compute is nothing: a unit is held, fails or ends as the scene says. Stores that come of it: ``test_workers``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster, Worker, get_worker

from rsmtdf_cache.build import build_store
from rsmtdf_cache.cluster import crew as crew_module
from rsmtdf_cache.cluster.crew import Crew
from rsmtdf_cache.cluster.task import Task
from rsmtdf_cache.cluster.worker import NotAdmittedError, topic
from rsmtdf_cache.destination import FolderDestination
from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import Event, ignore_events
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.records import Commit
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.work import Unit, UnitDone
from rsmtdf_cache.writer import begin
from tests.clusters import until
from tests.datasets import write_dataset
from tests.teachers import load_mean_teacher

UNITS = 6
TOKEN = "build"


@dataclass
class Scene:
    """What befalls workers. ``held``: units that wait for ``go``; ``unknown``: so many calls find no bench."""

    commits: dict[int, Commit]
    set_id: str
    held: frozenset[int] = frozenset()
    go: threading.Event = field(default_factory=threading.Event)
    unknown: int = 0
    admit: Callable[[], None] = lambda: None
    admitted: list[str] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)


_scene: list[Scene] = []


def admit(token: str, site: dict[str, Any]) -> dict[str, Any]:
    [scene] = _scene
    scene.admit()
    scene.admitted.append(get_worker().address)
    return {"gpus": None}


def leave(token: str) -> None:
    """Nothing was set up."""


def compute_unit(token: str, set_id: str, group: int, tiles: int, folder: str) -> dict[str, Any]:
    [scene] = _scene
    if scene.unknown:
        scene.unknown -= 1
        raise NotAdmittedError(token)
    get_worker().log_event(topic(token), {"attempt": Path(folder).name, "tiles": 1, "nbytes": 10})
    scene.begun.append(group)
    if group in scene.held:
        assert scene.go.wait(60)
    return {"commit": scene.commits[group].to_json(), "nbytes": 10, "seconds": 0.1}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crew")
    data = write_dataset(root / "data", tiles=UNITS, splits={"train": range(UNITS)})
    request = BuildRequest.of({
        "data": data, "out": root / "s", "teachers": ["mean"], "scales": [1.0], "group_rows": 1, "threads": 1,
        "micro_batch": 1, "device": "cpu",
    })  # fmt: skip
    build_store(request, load_teacher=load_mean_teacher)
    return root / "s"


@pytest.fixture
def scene(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    [(set_id, commits)] = Ledger.load(StorePaths(built)).commits.items()
    scene = Scene(dict(commits), set_id)
    _scene[:] = [scene]
    for function in (admit, leave, compute_unit):
        monkeypatch.setattr(crew_module, function.__name__, function)
    yield scene
    _scene.clear()


@dataclass
class Workers:
    """Those of a scheduler in this process. ``client``: of the scheduler."""

    cluster: LocalCluster
    client: Client
    here: list[Worker] = field(default_factory=list)

    def add(self, count: int = 1) -> None:
        async def start() -> list[Worker]:
            return [await Worker(self.cluster.scheduler_address, nthreads=1, dashboard=False) for _ in range(count)]

        self.here += self.cluster.sync(start)
        until(lambda: {w.address for w in self.here} == self._known())

    def die(self) -> None:
        """Take all away, whatever they do."""
        for worker in self.here:
            self.cluster.sync(worker.close, executor_wait=False, timeout=1)
        self.here.clear()
        until(lambda: not self._known())

    def _known(self) -> set[str]:
        return set(self.client.scheduler_info(n_workers=-1)["workers"])


@pytest.fixture
def workers(scene: Scene) -> Iterator[Workers]:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        here = Workers(cluster, client)
        yield here
        scene.go.set()
        here.die()


def crew_of(
    client: Client, root: Path, patience: float = 60, on_event: Callable[[Event], None] = ignore_events,
    on_tiles: Callable[[Unit, int, int], None] = lambda unit, tiles, nbytes: None,
) -> Crew:  # fmt: skip
    [scene] = _scene
    return Crew(
        client, FolderDestination(root), TOKEN, {}, patience, 1, on_tiles, on_event, [], [], {scene.set_id: "mean"}
    )


def units(count: int = UNITS) -> Iterator[Unit]:
    [scene] = _scene
    return (Unit(scene.set_id, group, 1) for group in range(count))


def groups(done: list[UnitDone]) -> list[int]:
    return sorted(d.unit.group for d in done)


def test_a_build_that_is_stopped_takes_all_permissions_back(scene: Scene, workers: Workers, tmp_path: Path) -> None:
    """The sink raises at every event from then on, as that of a command does after a signal."""
    stopped = threading.Event()
    told: list[Unit] = []

    def sink(event: Event) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def on_tiles(unit: Unit, tiles: int, nbytes: int) -> None:
        sink(None)  # type: ignore[arg-type]
        told.append(unit)
        if len(told) == 3:
            stopped.set()

    scene.held = frozenset(range(UNITS))
    workers.add(3)
    with pytest.raises(KeyboardInterrupt):
        list(crew_of(workers.client, tmp_path, on_event=sink, on_tiles=on_tiles).run(units()))
    assert len(told) == 3, "three units were under way, each with a tile"
    assert list(StorePaths(tmp_path).tmp.iterdir()) == []


def test_who_leaves_a_store_takes_permissions_back_before_it_reads_the_ledger(built: Path) -> None:
    store, [set_id] = FolderDestination(built), Ledger.load(StorePaths(built)).commits
    permit = store.grant(set_id, 0)
    store.leave(load_manifest(store.paths), [])
    with pytest.raises(ResourceError, match="may not be committed any more"):
        begin(Path(permit.told))


def test_results_that_arrived_count_though_all_workers_are_gone(
    scene: Scene, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is busy with a unit while the last ones end and the job of the workers is over."""
    monkeypatch.setattr(crew_module, "_LOOK_S", 0.0)
    workers.add()
    crew = crew_of(workers.client, tmp_path, patience=1.5)
    build = crew.run(units(2))
    done = [next(build)]
    until(lambda: all(a.task.arrived for a in crew._attempts.values()) and len(scene.begun) == 2)
    workers.die()
    done += build
    assert groups(done) == [0, 1] and scene.begun == [0, 1]
    assert [f.endswith("was lost") for f in crew._failures] in ([], [True])


def test_a_worker_that_forgot_the_build_is_set_up_again_and_nothing_counts_as_lost(
    scene: Scene, workers: Workers, tmp_path: Path
) -> None:
    scene.unknown = 2 * crew_module.LOSSES_MAX
    workers.add()
    crew = crew_of(workers.client, tmp_path)
    assert groups(list(crew.run(units()))) == list(range(UNITS))
    assert len(scene.admitted) > 1 and crew._losses == {} and crew._failures == []


def test_workers_that_never_get_ready_end_the_build(scene: Scene, workers: Workers, tmp_path: Path) -> None:
    def never() -> None:
        raise TimeoutError("the weights' server")

    scene.admit = never
    workers.add()
    with pytest.raises(ResourceError, match=r"4 workers in a row were lost before they could begin.*weights' server"):
        list(crew_of(workers.client, tmp_path).run(units()))


def test_a_unit_that_waited_behind_another_one_is_not_counted_as_lost(
    scene: Scene, workers: Workers, tmp_path: Path
) -> None:
    scene.held = frozenset(range(UNITS))
    workers.add()
    crew = crew_of(workers.client, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: list(crew.run(units())))
        until(lambda: len(scene.begun) == 1 and len(crew._attempts) == 2)
        workers.die()
        until(lambda: len(crew._back) == 2)
        assert {unit.group: count for unit, count in crew._losses.items() if count} == {0: 1}
        scene.go.set()
        workers.add()
        assert groups(done.result(60)) == list(range(UNITS))


def test_a_command_that_stood_still_blames_nobody(scene: Scene, workers: Workers, tmp_path: Path) -> None:
    """It was away for longer than its patience, after the last sign that it read."""
    seen: list[Unit] = []

    def on_tiles(unit: Unit, tiles: int, nbytes: int) -> None:
        if not seen:
            time.sleep(1.5)
            threading.Timer(0.2, scene.go.set).start()
        seen.append(unit)

    scene.held = frozenset({0})
    workers.add()
    crew = crew_of(workers.client, tmp_path, patience=1, on_tiles=on_tiles)
    assert groups(list(crew.run(units()))) == list(range(UNITS)) and crew._failures == []


class _Slow:
    """A client's line to its scheduler, on which gathering takes until ``go``."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.go = inner, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def gather(self, **told: Any) -> Any:
        while not self.go.is_set():
            await asyncio.sleep(0.005)
        return await self._inner.gather(**told)


def test_giving_up_a_task_keeps_the_results_of_others(workers: Workers) -> None:
    """Those that are fetched with it, and those that come later."""
    workers.add()
    client: Any = workers.client
    client.scheduler = slow = _Slow(client.scheduler)
    ended: list[Task] = []

    def start(number: int) -> Task:
        future = client.submit(_same, number, key=f"same {number}", pure=False)
        return Task(client, future, str(number), ended.append)

    tasks = [start(number) for number in range(12)]  # five requests are on the line, all others wait together
    until(lambda: all(t._future.done() for t in tasks))
    time.sleep(0.1)
    gone = tasks.pop()
    gone.give_up()
    slow.go.set()
    until(lambda: set(tasks) <= set(ended))
    assert [t.result() for t in tasks] == list(range(11))
    late = start(99)
    until(lambda: late in ended)
    assert late.arrived and late.result() == 99
    until(lambda: gone in ended)
    assert not gone.arrived


def _same(number: int) -> int:
    return number
