"""The numbered operations of a build into an object store (``FORMAT.md``, section 6), as tests see them."""

from __future__ import annotations

from collections.abc import Callable

from rsmtdf_cache.files import no_step

__all__ = ["after_step"]

#: Called after each numbered operation. Tests replace it to stop the process right there.
after_step: Callable[[int], None] = no_step
