"""What a disk can hold after a loss of power: recorded file-system operations, replayed with unsynced ones dropped.

The model is the harsh one of POSIX: content is durable when its file was synced, a name (of a file or a folder) when
its folder was synced. Two states can follow any operation: nothing unsynced survives, or every name survives and
unsynced content is empty (delayed allocation).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rsmtdf_cache import files

__all__ = ["PowerRecorder", "State", "write_state"]

#: Relative path → content; None for a folder.
State = dict[str, bytes | None]


@dataclass
class PowerRecorder:
    """Watches the store ``root`` through ``files.observe`` and collects the states a crash can leave."""

    root: Path
    states: list[tuple[str, State]] = field(default_factory=list)
    _content: dict[int, bytes] = field(default_factory=dict)  # inode → durable bytes
    _names: dict[str, dict[str, int | None]] = field(default_factory=dict)  # folder → its durable entries
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(files, "observe", self._observe)
            yield

    def _observe(self, operation: str, *paths: Path) -> None:
        place = paths[-1]
        if not place.is_relative_to(self.root):
            return
        with self._lock:
            self._note(operation, place)

    def _note(self, operation: str, place: Path) -> None:
        if operation == "fsync":
            self._content[place.stat().st_ino] = place.read_bytes()
        elif operation == "fsync_folder":
            self._names[self._name(place)] = self._entries(place)
        label = f"{len(self.states) // 2} {operation} {self._name(place)}"
        self.states.append((f"{label}, unsynced lost", self._durable(".", {})))
        self.states.append((f"{label}, names kept", self._named()))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @staticmethod
    def _entries(folder: Path) -> dict[str, int | None]:
        entries: dict[str, int | None] = {}
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                entries[path.name] = None if path.is_dir() else path.stat().st_ino
        return entries

    def _durable(self, folder: str, state: State) -> State:
        for name, inode in self._names.get(folder, {}).items():
            path = name if folder == "." else f"{folder}/{name}"
            if inode is None:
                state[path] = None
                self._durable(path, state)
            else:
                state[path] = self._content.get(inode, b"")
        return state

    def _named(self) -> State:
        state: State = {}
        for path in sorted(self.root.rglob("*")):
            with suppress(FileNotFoundError):  # a draft of another thread
                state[self._name(path)] = None if path.is_dir() else self._content.get(path.stat().st_ino, b"")
        return state


def write_state(state: State, root: Path) -> None:
    """Make the folder ``root`` hold ``state``."""
    root.mkdir(parents=True)
    for path, content in sorted(state.items()):
        if content is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).write_bytes(content)
