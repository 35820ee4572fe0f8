"""Where and when a number was measured: every number that is reported carries this."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsmtdf_cli.version import versions

__all__ = ["context"]


def context() -> dict[str, Any]:
    """Return date, command, machine (processor, cores, memory, GPU) and versions. No host or user name."""
    import torch

    from rsmtdf_cache.cores import usable_cores
    from rsmtdf_cache.memory import memory_nbytes

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["rsmtdf", *sys.argv[1:]]),
        "machine": {
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_gb": round(memory_nbytes() / 1e9, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
