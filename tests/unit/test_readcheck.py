"""What was compared with its sha256 on this node: the file as it is, and no file that is gone."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest

from rsmtdf_cache.readcheck import has_sha256, is_checked, mark_checked


def test_a_file_that_changed_or_is_gone_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"features")
    digest = sha256(b"features").hexdigest()
    assert not is_checked(path, digest) and has_sha256(path, digest) and is_checked(path, digest)
    assert not is_checked(path, sha256(b"others").hexdigest())
    os.utime(path, ns=(1, 1))
    assert not is_checked(path, digest)
    mark_checked(path, digest)
    assert is_checked(path, digest)
    path.unlink()  # as another process does that makes room in a cache
    mark_checked(path, digest)
    assert not is_checked(path, digest)
    with pytest.raises(FileNotFoundError):
        has_sha256(path, digest)
