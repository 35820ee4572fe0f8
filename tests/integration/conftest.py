"""The sample dataset, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsmtdf_cache.sources.landcover import build_sample


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the land-cover sample. Copy it before changing anything in it."""
    out = tmp_path_factory.mktemp("landcover")  # an empty folder is taken, like one that is not there
    assert build_sample(out) is True
    return out
