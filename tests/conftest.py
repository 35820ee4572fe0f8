"""What every test process needs before its first test."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background makes them ignore Ctrl-C, and so every process they start; tests of
# interruption need the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
