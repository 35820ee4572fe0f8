"""What a store from elsewhere cannot do: leave its folder, fill memory or disk, run code; and what nobody may see."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, MismatchError, ResourceError, RsmtdfError, UsageError
from rsmtdf_cache.files import read_json, replace_json
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.address import Address, redact
from rsmtdf_cache.share.names import checked_name, safe_place
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.specs import digest_of
from rsmtdf_cache.store import FeatureStore
from tests.datasets import write_dataset
from tests.servers import WebFolder, s3_server, web_folder
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("quick_and_at_home")

ROOT = Path(__file__).parents[2]
SECRETS = ("hunter2hunter2", "SIGNATURE0123456789", "alice-the-user")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secure")
    data = write_dataset(root / "data", tiles=6, splits={"train": range(4), "val": [4], "test": [5]})
    values = {"data": data, "out": root / "store", "teachers": ["mean"], "group_rows": 2, "threads": 1}
    build_store(BuildRequest.of({**values, "micro_batch": 2}), load_teacher=load_mean_teacher)
    return root / "store"


@pytest.fixture
def hostile(store: Path, tmp_path: Path) -> Path:
    """A copy of a sound store, to be made hostile."""
    shutil.copytree(store, tmp_path / "hostile")
    return tmp_path / "hostile"


@pytest.fixture
def served(hostile: Path) -> Iterator[WebFolder]:
    with web_folder(hostile) as web:
        yield web


def rewrite(root: Path, change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Change a record and make every checksum fit again: what an attacker does."""
    body = read_json(path)
    change(body)
    replace_json(path, body)
    relist(root, path)


def relist(root: Path, *paths: Path) -> None:
    head = read_json(StorePaths(root).head)
    for path in paths:
        data = path.read_bytes()
        name = path.relative_to(root).as_posix()
        head["files"][name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replace_json(StorePaths(root).head, head)


def one(root: Path, pattern: str) -> Path:
    return sorted((root / "ledger").glob(pattern))[0]


def refused(web: WebFolder, tmp_path: Path) -> RsmtdfError:
    """Pull and open; both must end in one error of ours and leave nothing outside the target."""
    before = {p for p in tmp_path.rglob("*") if "copy" not in p.parts and "home" not in p.parts}
    with pytest.raises((FindingsError, MismatchError)) as pulled:
        pull_store(web.url, tmp_path / "copy")
    with pytest.raises((FindingsError, MismatchError)):
        remote = FeatureStore.open(web.url)
        for key in remote.keys():
            remote.read(key, range(len(remote.tiles)))
    assert {p for p in tmp_path.rglob("*") if "copy" not in p.parts and "home" not in p.parts} == before
    assert not list((tmp_path / "copy").glob("zarr/*/*/*/features/c/*/0/0/0"))
    assert web.url in str(pulled.value) or "the store names" in str(pulled.value), "it says which store is at fault"
    return pulled.value


BAD_NAMES = [
    "../outside.json", "ledger/../../outside.json", "/etc/passwd", "ledger\\sets\\x.json", "zarr/../x/zarr.json",
    "ledger/tiles/0000000000.pkl", "ledger/sets/0123456789abcdef.json\0", "zarr//zarr.json", "zarr/.hidden/zarr.json",
    "pins/mine.json", "ledger/build.lock", "tmp/x", "zarr/a/b/c/features/c/0/0/0/0/../0", "manifest.json/", "",
    "zarr/a/b/c/features/c/99999999999999/0/0/0", "ledger/commits/0123456789abcdef/1.json", "zarr/" + "a" * 900,
]  # fmt: skip


@pytest.mark.parametrize("name", [*BAD_NAMES, 7, None, ["manifest.json"]])
def test_names_that_no_store_has_are_refused(name: object) -> None:
    with pytest.raises(FindingsError, match="names a file that no store has"):
        checked_name(name)


def test_every_file_of_a_real_store_has_an_allowed_name(store: Path) -> None:
    names = [p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file()]
    assert all(checked_name(n) == n for n in names if n != "ledger/build.lock")


@pytest.mark.parametrize("name", BAD_NAMES[:10])
def test_a_head_that_names_such_files_is_refused(served: WebFolder, tmp_path: Path, name: str) -> None:
    head = StorePaths(served.root).head
    body = read_json(head)
    body["files"][name] = {"nbytes": 3, "sha256": hashlib.sha256(b"bad").hexdigest()}
    replace_json(head, body)
    assert "no store has" in str(refused(served, tmp_path))


def _shard(body: dict[str, Any], **values: object) -> None:
    body["shards"][0] |= values


COMMITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a path out of the store": lambda b: _shard(b, path="../../../outside"),
    "another shard's path": lambda b: _shard(b, path=b["shards"][1]["path"]),
    "a huge size": lambda b: _shard(b, nbytes=2**60),
    "a negative size": lambda b: _shard(b, nbytes=-5),
    "a size that is a text": lambda b: _shard(b, nbytes="12"),
    "no hash": lambda b: _shard(b, sha256="zz"),
    "an unknown layer": lambda b: _shard(b, layer="other"),
    "a layer twice": lambda b: b["shards"].append(b["shards"][0]),
    "no shard": lambda b: b.update(shards=[]),
    "rows beyond the table": lambda b: b.update(stop=10**9),
    "rows of another group": lambda b: b.update(start=b["start"] + 1),
    "statistics of other arrays": lambda b: b["shards"][0]["stats"].update(sums=[1.0] * 10**5),
    "deep nesting": lambda b: b.update(profile=_nested(400)),
}


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("what", COMMITS)
def test_a_hostile_commit_ends_in_one_error(served: WebFolder, tmp_path: Path, what: str) -> None:
    rewrite(served.root, COMMITS[what], one(served.root, "commits/*/00000000.json"))
    if what == "statistics of other arrays":  # met when the unit is committed, or when they are asked for
        with pytest.raises(FindingsError, match="statistics"):
            pull_store(served.url, tmp_path / "copy")
        return
    refused(served, tmp_path)
    assert not [path for path, _, _ in served.requests if "features/c/" in path]


SETS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a grid of a trillion tokens": lambda b: b["arrays"][0].update(grid=[10**6, 10**6]),
    "more tokens than pixels": lambda b: b["arrays"][0].update(grid=[60000, 60000]),
    "a billion channels": lambda b: b["arrays"][0]["layer"].update(channels=10**9),
    "a name that climbs": lambda b: b["arrays"][0]["layer"].update(name=".."),
    "a name with a slash": lambda b: b["arrays"][0]["teacher"].update(name="a/../../b"),
    "an unknown codec": lambda b: b["arrays"][0]["encoding"].update(codec="os.system"),
}


@pytest.mark.parametrize("what", SETS)
def test_a_hostile_array_set_ends_in_one_error(served: WebFolder, tmp_path: Path, what: str) -> None:
    from rsmtdf_cache.layout import set_id
    from rsmtdf_cache.specs import FeatureSpec

    path = one(served.root, "sets/*.json")
    rewrite(served.root, SETS[what], path)
    try:  # under the name that belongs to its content, where it has one
        name = set_id([FeatureSpec.from_json(s) for s in read_json(path)["arrays"]])
    except ValueError:
        name = path.stem
    renamed = path.with_name(f"{name}.json")
    path.rename(renamed)
    commits = one(served.root, f"commits/{path.stem}")
    head = read_json(StorePaths(served.root).head)
    for old in [f"ledger/sets/{path.name}", *(f"ledger/commits/{path.stem}/{p.name}" for p in commits.glob("*"))]:
        head["files"].pop(old)
    replace_json(StorePaths(served.root).head, head)
    moved = commits.rename(commits.with_name(name))
    for commit in moved.glob("*.json"):
        rewrite(served.root, lambda b: b.update(set=name), commit)
    relist(served.root, renamed)
    refused(served, tmp_path)


@pytest.mark.parametrize("change", [{"group_rows": 2**24}, {"group_rows": -1}, {"tile_px": 10**9}, {"tile_px": 32}])
def test_a_hostile_manifest_ends_in_one_error(served: WebFolder, tmp_path: Path, change: dict[str, int]) -> None:
    rewrite(served.root, lambda b: b.update(change), StorePaths(served.root).manifest)
    refused(served, tmp_path)


def test_a_newer_format_is_refused_with_its_version(served: WebFolder, tmp_path: Path) -> None:
    rewrite(served.root, lambda b: b.update(version=99), StorePaths(served.root).manifest)
    assert "version 99" in str(refused(served, tmp_path))


@pytest.mark.parametrize("facts", [{"nbytes": 2**50}, {"nbytes": -1}, {"nbytes": 2**62}, {"sha256": "x"}])
def test_a_head_that_announces_nonsense_is_refused(served: WebFolder, tmp_path: Path, facts: dict[str, object]) -> None:
    head = StorePaths(served.root).head
    body = read_json(head)
    body["files"]["ledger/tiles/0000000000.parquet"] |= facts
    replace_json(head, body)
    refused(served, tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"[" * 10**6, b"{" * 1000, b"\xff\xfe", b"[]", b"null", b'{"files": {}, "snapshot": NaN}', b"1" * 10**5, b""],
    ids=["nested", "open", "bytes", "list", "null", "nan", "number", "empty"],
)
def test_a_head_that_is_no_record_is_refused(served: WebFolder, tmp_path: Path, raw: bytes) -> None:
    StorePaths(served.root).head.write_bytes(raw)
    refused(served, tmp_path)


def test_an_endless_answer_is_cut_off(served: WebFolder, tmp_path: Path) -> None:
    served.endless = "manifest.json"
    assert "larger than" in str(refused(served, tmp_path))
    assert served.sent < 2**27


def test_a_shard_that_never_ends_is_read_to_its_size_only(served: WebFolder, tmp_path: Path) -> None:
    shard = sorted(served.root.glob("zarr/*/*/*/features/c/0/0/0/0"))[0]
    served.endless = shard.relative_to(served.root).as_posix()
    with pytest.raises(FindingsError, match="sha256 differs"):
        pull_store(served.url, tmp_path / "copy", workers=1)
    assert sum(p.stat().st_size for p in (tmp_path / "copy").rglob("*") if p.is_file()) < 10**6


def test_a_tile_table_that_unfolds_is_refused(served: WebFolder, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = one(served.root, "tiles/*.parquet")
    rows = 3 * 10**6
    columns = {n: pa.array(["x"] * rows) for n in ("id", "split", "source", "crs")}
    columns["digest"] = pa.array([b"0" * 32] * rows, pa.binary(32))
    columns["affine"] = pa.array([[]] * rows, pa.list_(pa.float64()))
    pq.write_table(pa.table(columns), path, compression="zstd")
    assert path.stat().st_size < rows
    relist(served.root, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(served.root, lambda b: b.update(rows=rows, sha256=digest), one(served.root, "tiles/*.json"))
    refused(served, tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch exploded",))


def test_nothing_is_unpickled(served: WebFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for pattern in ("tiles/*.parquet", "sets/*.json"):
        path = one(served.root, pattern)
        path.write_bytes(pickle.dumps(_Bomb()))
        relist(served.root, path)
    refused(served, tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_links_in_the_target_are_not_followed_out_of_it(served: WebFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = tmp_path / "copy"
    pull_store(served.url, copy)
    shutil.rmtree(copy / "zarr" / "mean")
    shutil.rmtree(copy / "ledger" / "commits")
    (copy / "zarr" / "mean").symlink_to(elsewhere)
    with pytest.raises(FindingsError, match="symbolic link"):
        pull_store(served.url, copy)
    assert not list(elsewhere.iterdir())
    with pytest.raises(FindingsError, match="symbolic link"):
        safe_place(copy, "zarr/mean/zarr.json")


def test_a_folder_with_a_pipe_or_link_in_place_of_a_shard_is_refused(hostile: Path, tmp_path: Path) -> None:
    first, second = sorted(hostile.glob("zarr/*/*/*/features/c/*/0/0/0"))[:2]
    first.unlink()
    os.mkfifo(first)
    second.unlink()
    second.symlink_to("/dev/zero")
    with pytest.raises(FindingsError):
        pull_store(str(hostile), tmp_path / "copy", workers=1)


# -- secrets


def with_secrets(url: str) -> str:
    """Return ``url`` with a user, a password and a signature."""
    return (
        url.replace("http://", f"http://{SECRETS[2]}:{SECRETS[0]}@") + f"?X-Amz-Signature={SECRETS[1]}&sig={SECRETS[1]}"
    )


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def test_credentials_are_used_and_never_shown_or_stored(
    served: WebFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = with_secrets(served.url)
    events: list[object] = []
    pull_store(url, tmp_path / "copy", on_event=events.append)
    remote = FeatureStore.open(url)
    remote.read(remote.keys()[0], [0])
    assert all(SECRETS[1] in path and authorization for path, authorization, _ in served.requests)
    assert clean(repr(events)) and clean(caplog.text) and clean(repr(remote.__dict__))
    assert clean(repr(Address.parse(url))) and clean(f"{Address.parse(url)}")
    for folder in ("copy", "home"):
        for path in (tmp_path / folder).rglob("*"):
            assert clean(str(path))
            assert not path.is_file() or clean(path.read_bytes().decode("latin1")), path


@pytest.mark.parametrize("status", [401, 403, 404, 400, 500])
def test_errors_of_a_server_carry_no_secret(served: WebFolder, tmp_path: Path, status: int) -> None:
    served.status = status
    with pytest.raises((ResourceError, MismatchError)) as caught:
        pull_store(with_secrets(served.url), tmp_path / "copy")
    assert clean(_trace(caught.value))


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)) + repr(error.__cause__)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRETS[2]}:{SECRETS[0]}@127.0.0.1:9/store?token={SECRETS[1]}",
        f"https://{SECRETS[2]}:{SECRETS[0]}@no-such-host.invalid/store?sig={SECRETS[1]}",
        f"s3://{SECRETS[2]}:{SECRETS[0]}@bucket/store",
        f"s3://bucket/store?X-Amz-Signature={SECRETS[1]}",
        f"nosuch://{SECRETS[2]}:{SECRETS[0]}@host/store",
        f"http://{SECRETS[2]}:{SECRETS[0]}/with/slash@host/store",
        f"simplecache::http://{SECRETS[2]}:{SECRETS[0]}@host/store",
    ],
)
def test_the_command_line_shows_no_secret(url: str, tmp_path: Path) -> None:
    for arguments in (
        ["pull", url, str(tmp_path / "copy")],
        ["pull", url, str(tmp_path / "copy"), "--dry-run", "--json"],
    ):
        code = "import sys; from rsmtdf_cache.share import transport; transport.PAUSE_S = 0.01\n"
        code += f"sys.argv = ['rsmtdf', 'cache', *{arguments!r}]\nfrom rsmtdf_cli.app import main\nmain()\n"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode in (2, 4, 6), done.stderr
        assert "Traceback" not in done.stderr
        assert clean(done.stdout + done.stderr)


def test_s3_errors_carry_no_key(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3_server(monkeypatch) as endpoint:
        with pytest.raises(ResourceError, match="bucket or folder does not exist") as caught:
            push_store(store, "s3://not-there/store")
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in _trace(caught.value)
        assert endpoint
    with pytest.raises(ResourceError) as gone:
        pull_store("s3://bucket/store", tmp_path / "copy")
    assert "verysecretsecret" not in _trace(gone.value) and "testkeytestkey" not in _trace(gone.value)


def test_redaction_knows_the_usual_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "envsecretenvsecret")
    text = (
        "GET https://u:p@host/a/b?X-Amz-Credential=AKIA&X-Amz-Signature=abc failed; token=abc123 "
        "Authorization: Bearer abc.def 'aws_secret_access_key': 'wJalr' envsecretenvsecret sig=zzz9"
    )
    shown = redact(text)
    for secret in ("u:p", "AKIA", "abc123", "abc.def", "wJalr", "envsecret", "zzz9"):
        assert secret not in shown
    assert "https://host/a/b" in shown and "failed" in shown


@pytest.mark.parametrize(
    ("text", "shown", "snapshot"),
    [
        ("data/store", "data/store", None),
        ("data/store@0123abcd", "data/store@0123abcd", "0123abcd"),
        ("file:///data/store", "/data/store", None),
        ("https://u:p@host:80/st?sig=1@0123abcdef", "https://host:80/st@0123abcdef", "0123abcdef"),
        ("http://host:8000@0123abcd", "http://host:8000@0123abcd", "0123abcd"),
        ("s3://bucket/deep/store/", "s3://bucket/deep/store", None),
        ("hf://datasets/u/r@main/store", "hf://datasets/u/r@main/store", None),
        ("abfs://container@account.dfs.core.windows.net/store",
         "abfs://container@account.dfs.core.windows.net/store", None),
    ],
)  # fmt: skip
def test_addresses_are_parsed_and_shown(text: str, shown: str, snapshot: str | None) -> None:
    address = Address.parse(text)
    assert (address.shown, address.snapshot) == (shown, snapshot)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:ab/{SECRETS[0]}+ef1@bucket/x",
        f"s3://AKIA:pa'{SECRETS[0]}@bucket/x",
        f"s3://AKIA:pa {SECRETS[0]}@bucket/x",
        f"simplecache::https://user:pa'{SECRETS[0]}@host/x",
        f"http://user:pa'{SECRETS[0]}@127.0.0.1:9/x",
        f"https://to'{SECRETS[0]}@127.0.0.1:9/x#y",
    ],
)
def test_a_password_of_any_letters_is_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(RsmtdfError) as caught:
        pull_store(url, tmp_path / "copy")
    assert clean(_trace(caught.value))
    assert clean(redact(f"while reading {url}: it failed"))
    for command in ("forget", "info"):
        code = "import sys; from rsmtdf_cache.share import transport; transport.PAUSE_S = 0.01\n"
        code += f"sys.argv = ['rsmtdf', 'cache', {command!r}, {url!r}]\nfrom rsmtdf_cli.app import main\nmain()\n"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode in (2, 4, 6)
        assert clean(done.stdout + done.stderr)


def test_a_hash_sign_belongs_to_the_name_of_an_object() -> None:
    first, second = Address.parse("s3://bucket/set#1"), Address.parse("s3://bucket/set")
    assert first.shown == first.url("x").removesuffix("/x") == "s3://bucket/set#1"
    assert first.digest != second.digest
    with pytest.raises(UsageError, match="fragment"):
        Address.parse("https://host/set#1")


def test_a_folder_whose_name_ends_like_a_snapshot_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "store@0123abcd").mkdir()
    assert Address.parse(tmp_path / "store@0123abcd").snapshot is None


@pytest.mark.parametrize("text", ["", "s4://bucket/x", "file://relative", "https://", "s3://k:s@b/x", "a\0b"])
def test_an_address_that_cannot_be_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['s3fs'] = None\nsys.modules['aiohttp'] = None\n"
        "from rsmtdf_cache.share.address import Address\nfrom rsmtdf_cache.share.transport import connect\n"
        "for url in ('s3://bucket/x', 'https://host/x'):\n"
        "    try:\n        connect(Address.parse(url))\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "ResourceError" in done.stdout
    assert "pip install 'rsmtdf[s3]'" in done.stdout and "pip install 'rsmtdf[http]'" in done.stdout


def test_an_unfinished_write_of_the_head_is_never_seen_as_a_store(served: WebFolder, tmp_path: Path) -> None:
    StorePaths(served.root).head.unlink()
    with pytest.raises(MismatchError, match="no feature store is there"):
        pull_store(served.url, tmp_path / "copy")


def test_json_digests_do_not_take_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        digest_of(json.loads('{"a": NaN}'))
