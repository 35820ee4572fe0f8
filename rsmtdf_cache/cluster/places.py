"""Where the workers are: processes of this machine that live as long as the build, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rsmtdf_cache.cluster.crew import Crew
from rsmtdf_cache.cluster.fingerprint import fingerprint_of, settled
from rsmtdf_cache.cluster.performance import performance_report, require_renderer
from rsmtdf_cache.cluster.site import site_of
from rsmtdf_cache.errors import ResourceError, UsageError
from rsmtdf_cache.events import EventSink, Warned
from rsmtdf_cache.work import Bench, InProcess, OnTiles, Tally, Unit, UnitDone

if TYPE_CHECKING:
    from distributed import Client, SpecCluster

__all__ = ["CONNECT_S", "OwnProcesses", "RunningCluster"]

_LOOPBACK = "127.0.0.1"
_GUARD = "`if __name__ == '__main__':`"
#: For so long a scheduler is asked for before it counts as absent.
CONNECT_S = 15


class _OnWorkers:
    """What both places share: the units of a build go through a client to the workers of a scheduler."""

    threads: int | None = None

    def __init__(self, patience_s: float, report: Path | None = None) -> None:
        """``report``: the file for dask's performance report, None for none."""
        self.tallies: list[Tally] = []
        self.failures: list[str] = []
        self._patience_s, self._report = patience_s, report

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_quiet())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(
        self, bench: Bench, units: Iterator[Unit], on_tiles: OnTiles, on_event: EventSink
    ) -> Generator[UnitDone, None, None]:
        """See ``work.Executor``."""
        if not bench.profiles:  # nothing is pending: no process is started for that
            if self._report is not None:
                on_event(Warned(f"nothing is left to do, so there is no performance report {self._report}"))
            yield from InProcess().run(bench, units, on_tiles, on_event)
            return
        store, token = bench.destination, uuid.uuid4().hex
        mark = store.open_site(token)
        fingerprint = settled(fingerprint_of(bench), fingerprint_of(bench))
        site = site_of(bench, mark, fingerprint)
        with self._client() as (client, expected):
            labels = {name: bench.ledger.sets[name].arrays.label for name in bench.profiles}
            crew = Crew(
                client, store, token, site, self._patience_s, expected, on_tiles, on_event, self.tallies,
                self.failures, labels,
            )  # fmt: skip
            with (
                performance_report(client, self._report, on_event),
                contextlib.closing(crew.run(units)) as found,
            ):
                yield from found

    @contextlib.contextmanager
    def _client(self) -> Iterator[tuple[Client, int | None]]:
        """Yield a client, and how many workers will come soon; None: those that are there."""
        raise NotImplementedError


class RunningCluster(_OnWorkers):
    """The workers of the scheduler at ``address`` (``tcp://HOST:PORT``, ``tls://…``)."""

    def __init__(self, address: str, patience_s: float, report: Path | None = None) -> None:
        super().__init__(patience_s, report)
        if "://" not in address:
            raise UsageError(f"--scheduler {address}: write tcp://HOST:PORT, as the scheduler says when it starts")
        self._address = address

    def __enter__(self) -> Self:
        from distributed import Client

        super().__enter__()
        try:
            self._open = Client(self._address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            self._stack.close()
            raise ResourceError(
                f"no scheduler answers at {self._address} ({error}); start one, or look for its address in its log"
            ) from None
        self._stack.callback(_close, self._open)
        if self._report is not None:
            try:
                require_renderer(self._open)
            except BaseException:
                self._stack.close()
                raise
        return self

    @contextlib.contextmanager
    def _client(self) -> Iterator[tuple[Client, int | None]]:
        yield self._open, None


class OwnProcesses(_OnWorkers):
    """One process for each of ``environments`` (what it sees in its environment besides that of this process).

    They and their scheduler listen on loopback, and take TLS connections with a certificate of this build alone: other
    users of the machine could run code in them otherwise. Nothing is served but ``dashboard``, dask's page, if asked.
    """

    def __init__(
        self, environments: Sequence[Mapping[str, str]], patience_s: float, dashboard: bool = False,
        report: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(patience_s, report)
        self._environments, self._dashboard = list(environments), dashboard

    def __enter__(self) -> Self:
        import torch

        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that imports the user's script
            raise UsageError(f"a script that builds with workers needs {_GUARD}: its processes import it")
        self.threads = max(1, torch.get_num_threads() // len(self._environments))
        return super().__enter__()

    @contextlib.contextmanager
    def _client(self) -> Iterator[tuple[Client, int | None]]:
        from distributed import Client

        with _same_environment():
            cluster = self._start()
            try:
                client = Client(cluster, security=cluster.security, timeout=CONNECT_S, set_as_default=False)
                try:
                    yield client, len(self._environments)
                finally:
                    _close(client)
            finally:
                self._end(cluster)

    def _start(self) -> SpecCluster:
        import dask
        from distributed import Nanny, Scheduler, SpecCluster
        from distributed.security import Security

        from rsmtdf_cache.cluster.pageless import PagelessScheduler, PagelessWorker

        security = Security.temporary()
        scheduler = {
            "host": _LOOPBACK, "port": 0, "security": security, "dashboard": self._dashboard,
            "dashboard_address": f"{_LOOPBACK}:8787" if self._dashboard else None,
        }  # fmt: skip
        workers: dict[int, dict[str, Any]] = {
            number: {"cls": Nanny, "options": {
                "host": _LOOPBACK, "nthreads": 1, "memory_limit": 0, "dashboard": False, "security": security,
                "env": dict(environment), "worker_class": PagelessWorker,
            }}
            for number, environment in enumerate(self._environments)
        }  # fmt: skip
        spawn = {"DASK_LOGGING__DISTRIBUTED": "critical"}
        with dask.config.set({"distributed.nanny.pre-spawn-environ": spawn}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s)Port .* is already in use")  # where the page is instead is told
            spec = {"cls": Scheduler if self._dashboard else PagelessScheduler, "options": scheduler}
            try:
                return SpecCluster(workers, spec, security=security, silence_logs=False)
            except (OSError, RuntimeError, TimeoutError) as error:
                raise ResourceError(
                    f"the worker processes did not start ({error}); a script that builds with workers needs {_GUARD}"
                ) from error

    @staticmethod
    def _end(cluster: SpecCluster) -> None:
        """End the processes at once: what they still do may not be committed any more, and nothing else is lost."""
        for nanny in cluster.workers.values():
            nanny.auto_restart = False
            if nanny.pid is not None:
                with contextlib.suppress(OSError):
                    os.kill(nanny.pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            cluster.close(timeout=10)


def _close(client: Client) -> None:
    with contextlib.suppress(Exception):
        client.close(timeout=2)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep dask's log to itself: what a user must know comes as events and errors of the build."""
    import distributed  # sets the levels of its loggers

    names = [n for n in logging.root.manager.loggerDict if n.split(".")[0] == distributed.__name__]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Take back what Nannies write into the environment of their own process, and so of all it starts later."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
