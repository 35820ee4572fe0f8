"""What every test process needs before its first test."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# A shell that starts the tests in the background makes them ignore Ctrl-C, and so every process they start; tests of
# interruption need the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run the test with one torch thread, as the test processes beside it do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
