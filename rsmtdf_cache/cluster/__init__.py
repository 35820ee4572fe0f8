"""Units of a build on many processes, through dask.distributed (extra ``cluster``), imported only when asked for.

Whoever reaches a dask scheduler runs code in its workers: see ``docs/cluster.md`` before one listens on a network.
"""

from __future__ import annotations

from rsmtdf_cache.cluster.asked import ClusterAsked, executor_of

__all__ = ["ClusterAsked", "executor_of"]
