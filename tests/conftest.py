"""What every test process needs before its first test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell that starts the tests in the background makes them ignore Ctrl-C, and so every process they start; tests of
# interruption need the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers of pytest inherit a terminal's width, which would fold what tests read.
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def own_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own catalogue out of the tests: stores and runs register in a folder of this session.

    It stands in the environment, so that the processes that tests start see it too.
    """
    before = os.environ.get("RSMTDF_HOME")
    os.environ["RSMTDF_HOME"] = str(tmp_path_factory.mktemp("rsmtdf-home"))
    yield
    if before is None:
        del os.environ["RSMTDF_HOME"]
    else:
        os.environ["RSMTDF_HOME"] = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run the test with one torch thread, as the test processes beside it do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_and_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test a catalogue and a cache of its own, and let what failed on the line be tried again at once."""
    from rsmtdf_cache.share import transport

    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transport, "PAUSE_S", 0.01)
