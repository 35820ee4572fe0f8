"""A teacher's weights are hashed once per file; what is looked up is always the digest of what was loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsmtdf_cache import teachers
from rsmtdf_cache.teachers import _digests, _weights
from rsmtdf_cache.teachers._dense import DenseTeacher
from rsmtdf_cache.teachers._weights import weights_digest
from rsmtdf_cache.teachers.base import TeacherRequest

NAME = "timm:test_resnet"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every digest that is really computed from here on."""
    seen: list[str] = []
    real = _weights._hash_state

    def counted(network: torch.nn.Module) -> str:
        seen.append(real(network))
        return seen[-1]

    monkeypatch.setattr(_weights, "_hash_state", counted)
    return seen


def load(weights: Path | str) -> DenseTeacher:
    teacher = teachers.load(TeacherRequest(NAME, weights))
    assert isinstance(teacher, DenseTeacher)
    return teacher


def write(path: Path, seed: int, age_s: float = 60.0) -> Path:
    """Write seeded weights; the file looks ``age_s`` old."""
    teacher = teachers.load(TeacherRequest(NAME, "none", seed))
    assert isinstance(teacher, DenseTeacher)
    tensors: dict[str, Tensor] = {n: t.clone().contiguous() for n, t in teacher.network.state_dict().items()}
    save_file(tensors, path)
    then = time.time_ns() - int(age_s * 1e9)
    os.utime(path, ns=(then, then))
    return path


def test_the_second_load_of_a_file_hashes_nothing_and_has_the_same_digest(
    home: Path, tmp_path: Path, hashed: list[str]
) -> None:
    file = write(tmp_path / "w.safetensors", 0)
    hashed.clear()
    first, second = load(file), load(file)
    assert hashed == [first.spec.weights] == [second.spec.weights]
    assert first.spec.weights == weights_digest(second.network)
    assert first.spec.weights == load("none").spec.weights  # which is never looked up


def test_another_content_time_or_inode_is_hashed_again(home: Path, tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "w.safetensors", 0)
    old = load(file).spec.weights
    hashed.clear()
    os.utime(file, ns=(0, 0))
    assert load(file).spec.weights == old and len(hashed) == 1
    write(tmp_path / "other.safetensors", 1)
    os.utime(tmp_path / "other.safetensors", ns=(0, 0))
    (tmp_path / "other.safetensors").replace(file)  # same path, size and time; another inode
    hashed.clear()
    assert load(file).spec.weights not in ("", old) and len(hashed) == 1


def test_a_network_changed_after_loading_is_hashed_as_it_is(home: Path, tmp_path: Path) -> None:
    network = load(write(tmp_path / "w.safetensors", 0)).network
    before = weights_digest(network)
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    assert weights_digest(network) != before
    exchanged = load(tmp_path / "w.safetensors").network
    first = next(exchanged.parameters())
    first.data = first.data + 1.0
    assert weights_digest(exchanged) == weights_digest(network)


def test_a_file_written_a_moment_ago_is_not_remembered(home: Path, tmp_path: Path, hashed: list[str]) -> None:
    file = write(tmp_path / "w.safetensors", 0, age_s=0.0)
    hashed.clear()
    load(file), load(file)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"digests": {}, "order": ["x"], "checksum": "0"}'])
def test_a_damaged_cache_is_ignored_and_replaced(home: Path, tmp_path: Path, hashed: list[str], damage: bytes) -> None:
    file = write(tmp_path / "w.safetensors", 0)
    right = load(file).spec.weights
    cache = _digests.cache_file()
    assert cache == home / "cache" / "weights-digests.json"
    cache.write_bytes(damage)
    hashed.clear()
    assert [load(file).spec.weights for _ in range(2)] == [right, right]
    assert len(hashed) == 1


def test_a_flipped_bit_in_the_cache_never_becomes_a_digest(home: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "w.safetensors", 0)
    right = load(file).spec.weights
    cache = _digests.cache_file()
    sound = cache.read_bytes()
    place = sound.index(right.encode())
    cache.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
    assert load(file).spec.weights == right


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    file = write(tmp_path / "w.safetensors", 0)
    (tmp_path / "home").write_text("a file where a folder should be")
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    hashed.clear()
    assert load(file).spec.weights == load(file).spec.weights
    assert len(hashed) == 2
