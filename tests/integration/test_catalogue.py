"""The catalogue offers what the user registered, survives damage and crowds, and never stands in a build's way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rsmtdf_cache.build import build_store
from rsmtdf_cache.events import Event, Warned
from rsmtdf_cache.home import data_home
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.catalogue import (
    describe_stores,
    forget_store,
    register_run,
    register_store,
    registered_runs,
    registered_stores,
    same_place,
)
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cli.app import app
from tests.datasets import write_dataset
from tests.servers import web_folder
from tests.teachers import load_mean_teacher


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_dataset(folder / "data", tiles=6)
    request = BuildRequest.of({"data": folder / "data", "out": folder / "store", "teachers": ["mean"]})
    build_store(request, load_teacher=load_mean_teacher)
    return folder / "store"


def test_what_is_registered_is_listed_until_it_is_forgotten_and_the_store_stays(built: Path) -> None:
    register_store(built, data=built.parent / "data")
    register_run(built.parent / "run", built, "f" * 64, "r[1]")
    [row] = describe_stores()
    store = FeatureStore.open(built)
    assert (row["path"], row["dataset"], row["status"]) == (str(built.resolve()), "tiny", "ok")
    assert row["data"] == str((built.parent / "data").resolve())
    assert (row["teachers"], row["views"]) == (["mean"], ["s32o0", "s64o0"])
    assert (row["tiles"], row["snapshot"]) == (4, store.snapshot) and row["nbytes"] > 0
    assert [(r["recipe"], r["snapshot"]) for r in row["runs"]] == [("r[1]", "f" * 64)]
    shown = CliRunner().invoke(app, ["cache", "list"], env={"COLUMNS": "250"})
    assert shown.exit_code == 0 and store.snapshot[:12] in shown.stdout
    assert "1, last run" in shown.stdout and "4 of 4" in shown.stdout and row["complete"] == 4
    assert CliRunner().invoke(app, ["cache", "forget", str(built)]).exit_code == 0
    assert registered_stores() == [] and FeatureStore.open(built).snapshot == store.snapshot
    again = CliRunner().invoke(app, ["cache", "forget", str(built)])
    assert again.exit_code == 2 and "is not registered" in again.output


def test_one_store_has_one_entry_whatever_it_is_called_and_keeps_its_data_folder(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(built)
    register_store(built, data=built.parent / "data")
    register_store(tmp_path / "link")
    monkeypatch.chdir(built.parent)
    register_store("store")
    [entry] = registered_stores()
    assert entry.path == str(built.resolve()) and entry.data == str((built.parent / "data").resolve())


def test_missing_and_unreadable_stores_are_shown_with_the_reason(built: Path, tmp_path: Path) -> None:
    gone, bad = (Path(shutil.copytree(built, tmp_path / name)) for name in ("gone", "[b]bad"))
    for store in (gone, bad):
        register_store(store)
    shutil.rmtree(gone)
    (bad / "manifest.json").write_text("{}")
    rows = {Path(row["path"]).name: row for row in describe_stores()}
    assert rows["gone"]["status"] == "missing" and rows["[b]bad"]["status"] == "unreadable"
    assert "manifest.json" in rows["[b]bad"]["reason"]
    shown = CliRunner().invoke(app, ["cache", "list"], env={"COLUMNS": "250"})
    assert shown.exit_code == 0 and "missing" in shown.stdout and "[b]bad" in shown.stdout
    assert f"missing: {gone}: the folder does not exist; `rsmtdf cache forget {gone}` takes it out" in shown.stderr
    assert f"unreadable: {bad}: " in shown.stderr and rows["[b]bad"]["reason"] not in shown.stdout
    as_json = CliRunner().invoke(app, ["cache", "list", "--json"])
    assert {s["status"] for s in json.loads(as_json.stdout)["stores"]} == {"missing", "unreadable"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"path": "/x", "checksum": "0"}', b"\xff\x00"])
def test_a_damaged_entry_is_skipped_with_a_warning_that_names_it(built: Path, home: Path, content: bytes) -> None:
    register_store(built)
    (home / "stores" / "0123456789abcdef.json").write_bytes(content)
    seen: list[Event] = []
    assert [e.path for e in registered_stores(seen.append)] == [str(built.resolve())]
    [warning] = seen
    assert isinstance(warning, Warned) and "0123456789abcdef.json" in warning.text
    shown = CliRunner().invoke(app, ["cache", "list", "-q"])
    assert shown.exit_code == 0 and "0123456789abcdef.json" in shown.stderr


def test_a_catalogue_that_cannot_be_written_warns_and_fails_nothing(built: Path, home: Path) -> None:
    home.write_text("a file where the folder should be")
    seen: list[Event] = []
    register_store(built, on_event=seen.append)
    register_run(built / "run", built, None, "r", on_event=seen.append)
    assert [type(e) for e in seen] == [Warned, Warned]
    assert all("RSMTDF_HOME is " in e.text and str(home) in e.text for e in seen if isinstance(e, Warned))
    assert registered_stores(seen.append) == [] and registered_runs(seen.append) == [] and len(seen) == 4
    for words in (["list"], ["list", "--json"], ["register", str(built)], ["forget", str(built)]):
        shown = CliRunner().invoke(app, ["cache", *words])
        assert shown.exit_code == 6 and "RSMTDF_HOME is " in shown.stderr and shown.stdout == ""


def test_a_store_that_was_moved_is_registered_as_it_is(built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "moved"))
    data = built.parent / "data"
    for words in (["moved"], [f"file://{store}"], [str(store), "--data", str(data)]):
        text = [word if word != "moved" else str(store) for word in words]
        assert CliRunner().invoke(app, ["cache", "register", *text]).exit_code == 0
    [entry] = registered_stores()
    assert (entry.path, entry.dataset, entry.data) == (str(store.resolve()), "tiny", str(data.resolve()))
    assert forget_store(f"file://{store}")


def test_a_store_at_a_url_is_registered_with_the_name_of_its_dataset(built: Path) -> None:
    with web_folder(built.parent) as server:
        assert CliRunner().invoke(app, ["cache", "register", f"{server.url}/store"]).exit_code == 0
        [row] = describe_stores()
    assert (row["path"], row["dataset"], row["status"]) == (f"{server.url}/store", "tiny", "ok")


@pytest.mark.parametrize(("words", "code"), [(["{}/nothing"], None), (["{}/store@0123456789"], 2), (["{}/data"], None),
                                             (["{}/store", "--data", "{}/nothing"], 3)])  # fmt: skip
def test_what_is_no_store_or_no_dataset_is_not_registered(built: Path, words: list[str], code: int | None) -> None:
    shown = CliRunner().invoke(app, ["cache", "register", *(w.format(built.parent) for w in words)])
    assert shown.exit_code == code or (code is None and shown.exit_code > 1)
    assert registered_stores() == []


def test_quiet_listing_and_info_print_nothing(built: Path) -> None:
    register_store(built)
    for words in (["list"], ["info", str(built)]):
        assert CliRunner().invoke(app, ["cache", *words, "-q"]).output == ""
        assert CliRunner().invoke(app, ["cache", *words, "-q", "--json"]).stdout.startswith("{")


def _register_many(names: list[str]) -> None:
    for name in names:
        register_store(f"s3://bucket/{name}", dataset=name)


def test_many_processes_register_at_once_and_nothing_is_lost() -> None:
    context = multiprocessing.get_context("spawn")
    names = [f"store{i}" for i in range(30)]
    workers = [context.Process(target=_register_many, args=(names[i:] + names[:i],)) for i in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {e.dataset for e in registered_stores()} == set(names) and len(registered_stores()) == 30
    assert not [p for p in data_home().rglob("*") if p.name.endswith(".tmp")]


def test_credentials_of_a_url_never_reach_the_catalogue(home: Path) -> None:
    url = "https://user:hunter2@host/path/store/?token=hunter2#hunter2"
    register_store(url, dataset="d")
    register_run(home / "run", url, None, "r")
    assert same_place(url) == "https://host/path/store"
    assert not [p for p in home.rglob("*.json") if b"hunter2" in p.read_bytes()]
    assert forget_store("https://host/path/store")


def test_without_rsmtdf_home_it_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RSMTDF_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home().is_relative_to(tmp_path) and data_home().name == "rsmtdf"
    assert os.listdir(tmp_path) == []
