"""What a command loads is what it needs: counted in modules and files read, not in seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.cache import COMMANDS as CACHE_COMMANDS
from rsmtdf_cli.lazy import load
from tests.stores import write_mean_store

_HEAVY = {
    "dask",
    "fsspec",
    "matplotlib",
    "pandas",
    "PIL",
    "pyarrow",
    "rasterio",
    "scipy",
    "timm",
    "torch",
    "xarray",
    "zarr",
}


def _loaded(*arguments: str) -> set[str]:
    """Return the top-level modules that a fresh process has after ``rsmtdf ARGUMENTS``."""
    return {name.partition(".")[0] for name in _modules(*arguments)}


def _modules(*arguments: str) -> set[str]:
    """Return all modules that a fresh process has after ``rsmtdf ARGUMENTS``."""
    code = (
        "import sys\nfrom rsmtdf_cli.app import app\n"
        f"app({list(arguments)!r}, standalone_mode=False)\n"
        "print('\\nLOADED', *sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(done.stdout.rpartition("LOADED ")[2].split())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mean_store(tmp_path_factory.mktemp("start"), tiles=6) / "store"


def test_help_loads_neither_numbers_nor_models() -> None:
    loaded = _loaded("--help")
    assert "typer" in loaded
    assert not loaded & (_HEAVY | {"numpy", "pydantic", "rich", "rsmtdf_train"}), sorted(loaded)


def test_help_of_cache_loads_none_of_its_commands_and_one_of_them_no_other(store: Path) -> None:
    commands = {"asked", "audit", "build", "catalogue", "fidelity", "growth", "look", "plan", "share", "tune"}
    assert not _modules("cache", "--help") & {f"rsmtdf_cli.cache.{name}" for name in commands}
    used = {name for name in commands if f"rsmtdf_cli.cache.{name}" in _modules("cache", "info", str(store))}
    assert used == {"look"}


@pytest.mark.parametrize("name", [*CACHE_COMMANDS])
def test_the_line_in_the_help_says_what_the_command_says_of_itself(name: str) -> None:
    command = load(name, CACHE_COMMANDS[name])
    shown, own = (re.findall(r"[a-z]+", text.lower())[:4] for text in (CACHE_COMMANDS[name].help, command.help))
    assert shown == own


@pytest.mark.parametrize("shown", [[], ["--json"]])
def test_cache_info_of_a_small_store_reads_json_alone(store: Path, shown: list[str]) -> None:
    loaded = _loaded("cache", "info", str(store), *shown)
    assert "numpy" in loaded  # the probe sees what is loaded
    assert not loaded & (_HEAVY | {"rsmtdf_train"}), sorted(loaded & _HEAVY)


def test_an_audit_needs_no_network(store: Path) -> None:
    loaded = _loaded("cache", "verify", str(store), "--quiet")
    assert "numpy" in loaded and not loaded & {"torch", "timm", "rasterio", "PIL", "rsmtdf_train"}, sorted(loaded)


def test_opening_and_describing_a_store_leaves_its_tile_table_alone(store: Path, tmp_path: Path) -> None:
    opened, whole = FeatureStore.open(store), FeatureStore.open(store)
    wanted = whole.describe()
    table = StorePaths(store).tile_segment(0).with_suffix(".parquet")
    table.rename(tmp_path / "away")
    try:
        assert opened.describe() == wanted and opened.committed(opened.keys()[0]).all()
        with pytest.raises(FindingsError, match="missing"):
            opened.tiles.row_of("t000")
        with pytest.raises(FindingsError, match="missing"):
            FeatureStore.open(store)
    finally:
        (tmp_path / "away").rename(table)
    assert opened.tiles.row_of("t000") == whole.tiles.row_of("t000")


def test_what_info_says_of_the_snapshot_is_what_the_ledger_amounts_to(store: Path) -> None:
    paths = StorePaths(store)
    assert FeatureStore.open(store).describe()["snapshot"] == Ledger.load(paths).snapshot()
    head = paths.head.read_bytes()
    ledger = Ledger.load(paths)
    key = next(iter(ledger.specs()))
    ledger.drop([(ledger.set_of(key), key.layer)])  # the head is of before
    try:
        assert FeatureStore.open(store).describe()["snapshot"] == Ledger.load(paths).snapshot()
    finally:
        ledger.undrop([(name, layer) for name, layer in ledger.dropped])
        write_head(paths, load_manifest(paths), ledger)
    assert paths.head.read_bytes() != b"" and head
