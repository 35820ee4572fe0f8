"""Published split lists: text files that name one tile a line, in their own words.

Which split a file is says its name: ``train.txt``, ``val.txt``, ``test.txt``; labelled subsets are ``labeled.txt`` in a
folder named by the share (``5``, ``5%``), ``labeled_5.txt`` or ``labeled/5.txt``; ``unlabeled`` likewise, the rest of
train. Where there is no ``train.txt``, train is what any labelled and unlabelled list name.

A line is the name of a tile or the path of its image, perhaps followed by the path of its mask. The name without folder
and suffix says which tile it is; folders (``Train/Rural``) tell apart tiles that bear one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rsmtdf_cache.errors import DataError, UsageError, did_you_mean
from rsmtdf_cache.prepare.splitting import Cell

__all__ = ["Lists", "read_lists"]

_SPLIT = re.compile(r"(train|val|test)\.txt")
_BESIDE = re.compile(r"(un)?labell?ed[_-](\d+(?:\.\d+)?)%?\.txt")
_INSIDE = re.compile(r"(un)?labell?ed/(\d+(?:\.\d+)?)%?\.txt")
_BELOW = re.compile(r"(\d+(?:\.\d+)?)%?/(un)?labell?ed\.txt")


@dataclass(frozen=True)
class Lists:
    """Cells of train, val and test, and tile ids of the labelled subsets, in the order of the lists."""

    splits: dict[str, list[Cell]]
    labeled: dict[str, list[str]]


def read_lists(paths: Sequence[Path], cells: Sequence[Cell]) -> Lists:
    """Return what the lists ``paths`` (files, or folders of ``.txt`` files) say of ``cells``.

    Raises ``DataError`` naming list, line and name for a tile that is unknown or ambiguous, stands twice, or is in two
    splits; ``UsageError`` for a file whose name says no split.
    """
    known: dict[str, list[Cell]] = {}
    for cell in cells:
        for name in {cell.id, *(f"{n}_{cell.number}" for n in cell.scene.names)}:
            known.setdefault(name, []).append(cell)
    found: dict[str, list[Cell]] = {}
    origin: dict[str, Path] = {}
    for path in _files(paths):
        role = _role(path)
        listed = _read(path, known)
        if role in found and {c.id for c in found[role]} != {c.id for c in listed}:
            raise DataError(f"lists {origin[role]} and {path} both say {role} and differ; give one of them")
        found.setdefault(role, listed)
        origin.setdefault(role, path)
    return _assembled(found)


def _assembled(found: Mapping[str, list[Cell]]) -> Lists:
    subsets = {role.removeprefix("labeled/"): cells for role, cells in found.items() if role.startswith("labeled/")}
    train = found.get("train")
    if train is None:
        whole = {c.id: c for role, cells in found.items() if "labeled/" in role for c in cells}
        train = list(whole.values())
    if not train:
        raise DataError("the lists name no tile of train; give train.txt, or labelled and unlabelled lists")
    splits = {"train": train, **{name: found[name] for name in ("val", "test") if name in found}}
    home: dict[str, str] = {}
    for name, cells in splits.items():
        for cell in cells:
            if home.setdefault(cell.id, name) != name:
                raise DataError(f"the lists have tile {cell.id!r} in {home[cell.id]} and in {name}; keep one")
    for percent, cells in subsets.items():
        stray = next((c.id for c in cells if home.get(c.id) != "train"), None)
        if stray is not None:
            raise DataError(f"labelled list {percent}: tile {stray!r} is not in train")
    order = sorted(subsets, key=float)
    return Lists(splits, {percent: [c.id for c in subsets[percent]] for percent in order})


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.txt") if not p.name.startswith("."))
            if not inside:
                raise DataError(f"{path}: no .txt file in it; give split lists or the folder they are in")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"list {path}: no such file or folder")
    return files


def _role(path: Path) -> str:
    name = path.name.lower()
    if match := _SPLIT.fullmatch(name):
        return match[1]
    tail = f"{path.absolute().parent.name.lower()}/{name}"
    match = _BESIDE.fullmatch(name) or _INSIDE.fullmatch(tail)
    if match:
        return f"{match[1] or ''}labeled/{_short(match[2])}"
    if match := _BELOW.fullmatch(tail):
        return f"{match[2] or ''}labeled/{_short(match[1])}"
    raise UsageError(
        f"list {path}: its name says no split; call it train.txt, val.txt, test.txt, labeled_5.txt or 5%/labeled.txt "
        "(unlabeled likewise)"
    )


def _short(percent: str) -> str:
    value = float(percent)
    return str(int(value)) if value.is_integer() else str(value)


def _read(path: Path, known: Mapping[str, list[Cell]]) -> list[Cell]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {path}: cannot be read ({error}); write it as UTF-8 text") from None
    listed: dict[str, Cell] = {}
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        where = f"list {path}, line {number}"
        named = [_cell(word, known, where) for word in words]
        if any(cell.id != named[0].id for cell in named):
            raise DataError(f"{where}: {words[0]!r} and {words[-1]!r} are not image and mask of one tile")
        if named[0].id in listed:
            raise DataError(f"{where}: tile {named[0].id!r} stands twice; keep one")
        listed[named[0].id] = named[0]
    if not listed:
        raise DataError(f"list {path}: it is empty; write one tile a line")
    return list(listed.values())


def _cell(word: str, known: Mapping[str, list[Cell]], where: str) -> Cell:
    path = PurePosixPath(word.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".tif", ".tiff"} else path.name
    cells = known.get(stem, [])
    folders = {part.lower() for part in path.parts[:-1]}
    for kind in ("part", "domain"):
        here = [c for c in cells if getattr(c.scene, kind) and getattr(c.scene, kind) in folders]
        cells = here or cells
    if len(cells) == 1:
        return cells[0]
    if not cells:
        raise DataError(f"{where}: {word!r} is no tile of this preparation.{did_you_mean(stem, known)}")
    raise DataError(f"{where}: {word!r} may be {' or '.join(c.id for c in cells)}; write the id itself or its path")
