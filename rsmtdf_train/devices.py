"""Where a network runs."""

from __future__ import annotations

import torch

from rsmtdf_cache.errors import UsageError

__all__ = ["pick_device"]


def pick_device(name: str | None) -> torch.device:
    """Return the device called ``name``; by default the first GPU, else the CPU. Raises ``UsageError``."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}); leave it out or use cpu") from None
    return device
