"""Builds into an object store, against a real S3 server: the store of a folder, whatever is killed, cut or raced."""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from rsmtdf_cache import writer
from rsmtdf_cache.bucket.destination import BucketDestination
from rsmtdf_cache.bucket.shards import OccupiedError, ShardSender
from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.estimate import plan_build
from rsmtdf_cache.events import Event, Progress, ignore_events
from rsmtdf_cache.files import read_json, record_bytes, sha256_file
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.records import ShardRecord
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share import transport
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.verify import verify_store
from tests.bucket_builds import asked, build, encoded, environment, start_build
from tests.clusters import Temper, cluster, until
from tests.command_line import call
from tests.commands import start
from tests.datasets import write_dataset
from tests.servers import cutting_proxy, make_bucket, s3_server
from tests.teachers import load_mean_teacher
from tests.torture.scene import difference_here

UNITS = 4


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("bucket") / "data", tiles=12, tile_px=64)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a folder."""
    out = tmp_path_factory.mktemp("bucket") / "whole"
    build(data, out)
    return out


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(transport, "PAUSE_S", 0.01)


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    """A place of its own for each test."""
    return f"s3://bucket/{abs(hash(request.node.name))}/store"


@functools.cache
def _client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint)


class Objects:
    """What lies in the bucket below a URL."""

    def __init__(self, endpoint: str, url: str) -> None:
        self._client = _client(endpoint)
        self._prefix = url.removeprefix("s3://bucket/") + "/"

    def names(self, below: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=self._prefix + below)
        return [o["Key"].removeprefix(self._prefix) for page in pages for o in page.get("Contents", ())]

    def read(self, name: str) -> bytes:
        found: bytes = self._client.get_object(Bucket="bucket", Key=self._prefix + name)["Body"].read()
        return found

    def write(self, name: str, body: bytes) -> None:
        self._client.put_object(Bucket="bucket", Key=self._prefix + name, Body=body)

    @property
    def lease(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.read("ledger/lease.json"))
        return found


def assert_named(url: str) -> None:
    """Whatever the head names is there, with its bytes."""
    way = transport.connect(Address.parse(url))
    head = way.get("ledger/head.json", 2**20)
    assert head is not None
    named = json.loads(head)["files"]
    files = {name: way.get(name, 2**20) for name in named}
    assert len(files) > 5 and None not in files.values(), [name for name, data in files.items() if data is None]
    there = {n: {"nbytes": len(b or b""), "sha256": hashlib.sha256(b or b"").hexdigest()} for n, b in files.items()}
    assert there == named


def assert_whole(url: str, whole: Path, folder: Path) -> None:
    """The snapshot is that of the folder's store, and a pull has its bytes, with no findings."""
    assert_named(url)
    pull_store(url, folder)
    assert difference_here(folder, whole) == ""


def test_a_url_gets_the_store_of_a_folder_and_readers_find_it(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    report = build(data, url)
    local, there = FeatureStore.open(whole), FeatureStore.open(url)
    assert report.snapshot == local.snapshot == there.snapshot
    assert (report.store, report.units, report.units_before) == (url, UNITS, 0)
    for key in local.keys():
        assert np.array_equal(there.read(key, range(8)).values, local.read(key, range(8)).values)
    assert_whole(url, whole, tmp_path / "copy")
    assert Objects(bucket, url).lease["released"] is True
    again = build(data, url)
    assert (again.units, again.units_before, again.snapshot) == (0, UNITS, local.snapshot)


def test_file_systems_without_conditional_replacement_hold_the_same_store(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    url = f"memory://{tmp_path.name}/store"
    assert build(data, url).snapshot == FeatureStore.open(whole).snapshot
    assert_whole(url, whole, tmp_path / "copy")
    assert build(data, url, splits=["train", "val"]).units == 1


@pytest.mark.parametrize(
    ("step", "count"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2), (8, 2), (9, 2), (10, 2), (11, 1)],
)
def test_sigkill_after_each_numbered_operation_loses_nothing(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path, step: int, count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Continued on the same machine, where the lease of the dead is free at once, or on another when it has expired."""
    elsewhere = step in (5, 7, 10)
    dead = start_build(
        tmp_path / "dead", asked(data, url), tmp_path / "home", step, count, lease_s=1 if elsewhere else 120
    )
    assert dead.end() == -signal.SIGKILL, dead.said
    commits = Objects(bucket, url).names("ledger/commits/")
    done = {4: 1, 5: 1, 6: 1, 7: 2, 8: 2}.get(step, UNITS if (step, count) in ((9, 2), (10, 2), (11, 1)) else 0)
    assert len(commits) == done
    more = 0

    def note(number: int) -> None:
        nonlocal more
        more += number == 1

    monkeypatch.setattr(writer, "after_step", note)
    if elsewhere:
        monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "elsewhere"))
    report = until_free(lambda: build(data, url))
    assert (report.units_before, report.units) == (done, UNITS - done)
    assert encoded(dead.folder) + more == UNITS + (step in (4, 5, 6)), "only the unit in flight was encoded twice"
    assert report.snapshot == FeatureStore.open(whole).snapshot
    assert_whole(url, whole, tmp_path / "copy")


def until_free(run: Any) -> Any:
    """Return what ``run`` returns once the lease that is in its way has expired."""
    for _ in range(100):
        try:
            return run()
        except ResourceError as error:
            if "its lease holds until" not in str(error):
                raise
            time.sleep(0.2)
    raise TimeoutError


def test_a_second_builder_is_told_who_builds_and_until_when(
    data: Path, whole: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_build(tmp_path / "first", asked(data, url), tmp_path / "elsewhere", 5, hold=True)
    until(lambda: first.held, lambda: first.said)
    with pytest.raises(ResourceError, match=r"a build on .+ writes there; its lease holds until \d\d:\d\d:\d\d UTC"):
        build(data, url)
    with pytest.raises(ResourceError, match=r"a build on .+ writes there"):
        push_store(whole, url)
    beside = start_build(tmp_path / "beside", asked(data, url), tmp_path / "elsewhere", 1, hold=True)
    first.release()
    assert first.end() == 0, first.said
    until(lambda: beside.held, lambda: beside.said)  # on one machine it waited, and has the lease now
    beside.release()
    assert beside.end() == 0 and encoded(beside.folder) == 0, beside.said
    assert build(data, url).units == 0
    assert_whole(url, whole, tmp_path / "copy")


def test_a_builder_that_slept_beyond_its_lease_commits_nothing_more(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """It sleeps before it commits its second unit; another one takes the lease over and finishes."""
    sleeper = start_build(tmp_path / "sleeper", asked(data, url), tmp_path / "elsewhere", 6, 2, hold=True, lease_s=1)
    until(lambda: sleeper.held, lambda: sleeper.said)
    sleeper.send(signal.SIGSTOP)
    report = until_free(lambda: build(data, url))
    assert (report.units_before, report.units) == (1, UNITS - 1)
    before = {name: Objects(bucket, url).read(name) for name in Objects(bucket, url).names()}
    sleeper.release()
    sleeper.send(signal.SIGCONT)
    assert sleeper.end() == ResourceError.exit_code
    assert "lost its lease to a build on" in sleeper.said
    assert {name: Objects(bucket, url).read(name) for name in Objects(bucket, url).names()} == before
    assert_whole(url, whole, tmp_path / "copy")


def test_a_commit_that_somebody_made_otherwise_meanwhile_stops_the_build(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """It is not overwritten, no head names what does not fit, and the same command finds out what is there."""
    commits = [p.relative_to(whole).as_posix() for p in sorted(whole.glob("ledger/commits/*/*.json"))]
    other = json.loads((whole / commits[1]).read_bytes())
    other["shards"][0]["sha256"] = "0" * 64
    body = {k: v for k, v in other.items() if k != "checksum"}

    def meanwhile(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "mean":
            Objects(bucket, url).write(commits[1], record_bytes(body))

    with pytest.raises(MismatchError, match=f"{commits[1]} is there with other content"):
        build_store(BuildRequest.of(asked(data, url)), meanwhile, load_mean_teacher)
    assert Objects(bucket, url).read(commits[1]) == record_bytes(body)
    assert [sum(FeatureStore.open(url).committed(key)) for key in FeatureStore.open(url).keys()] == [2, 2]


@pytest.mark.parametrize("size", ["same", "other"])
def test_an_orphan_with_other_bytes_is_replaced(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path, size: str
) -> None:
    name = "zarr/mean/s64o0/mean8/features/c/1/0/0/0"
    body = b"\1" * ((whole / name).stat().st_size + (size == "other"))
    Objects(bucket, url).write(name, body)
    with pytest.raises(MismatchError, match=r"is not empty and is no feature store \(found zarr\)"):
        build(data, url)
    assert Objects(bucket, url).names() == [name], "nothing is written where others have files"
    dead = start_build(tmp_path / "dead", asked(data, f"{url}2"), tmp_path / "home", 3)
    assert dead.end() == -signal.SIGKILL, dead.said
    Objects(bucket, f"{url}2").write(name, body)
    assert build(data, f"{url}2").units == UNITS
    assert_whole(f"{url}2", whole, tmp_path / "copy")


def test_an_orphan_with_the_same_bytes_is_adopted(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    dead = start_build(tmp_path / "dead", asked(data, url), tmp_path / "home", 5)
    assert dead.end() == -signal.SIGKILL, dead.said
    [orphan, *_] = names = Objects(bucket, url).names("zarr/mean/s64o0/mean8/features/c/0")
    assert len(names) == 1 and not Objects(bucket, url).names("ledger/commits/")
    client = _client(bucket)
    key = {"Bucket": "bucket", "Key": url.removeprefix("s3://bucket/") + "/" + orphan}
    written = client.head_object(**key)["LastModified"]
    time.sleep(1.1)  # its clock counts seconds
    assert build(data, url).units == UNITS
    assert client.head_object(**key)["LastModified"] == written, "it was not sent again"
    assert_whole(url, whole, tmp_path / "copy")


def test_a_shard_that_travels_in_parts_is_created_once_adopted_and_never_written_over(url: str, tmp_path: Path) -> None:
    way = transport.connect(Address.parse(url))
    send, name = ShardSender(way).send, "zarr/mean/s64o0/mean8/features/c/1/0/0/0"
    bytes_of = {"ours": bytes(33 * 2**20), "theirs": b"\1" * (33 * 2**20)}
    drafts = {}
    for who, body in bytes_of.items():
        (tmp_path / who).write_bytes(body)
        record = ShardRecord("mean8", name, len(body), hashlib.sha256(body).hexdigest())
        drafts[who] = {tmp_path / who: record}
    send(drafts["ours"])
    first = way.stat(name)
    send(drafts["ours"])
    with pytest.raises(OccupiedError, match=name) as taken:
        send(drafts["theirs"])
    assert way.stat(name) == first and first is not None and taken.value.tags == {name: first[1]}
    assert not way.remove(name, "another tag") and way.remove(name, first[1])
    send(drafts["theirs"])
    assert way.sha256(name, 33 * 2**20) == drafts["theirs"][tmp_path / "theirs"].sha256


def test_what_lies_in_the_local_folder_counts_for_nothing(data: Path, whole: Path, url: str, tmp_path: Path) -> None:
    """A commit that this machine thinks it has made, and the URL does not have, is made."""
    dead = start_build(tmp_path / "dead", asked(data, url), tmp_path / "home", 3)
    assert dead.end() == -signal.SIGKILL, dead.said
    [work] = (tmp_path / "home" / "cache" / "builds").glob("*/store")
    for commit in whole.glob("ledger/commits/*/*.json"):
        place = work / commit.relative_to(whole)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(commit.read_bytes())
    assert build(data, url).units == UNITS
    assert_whole(url, whole, tmp_path / "copy")


def test_lost_answers_and_busy_servers_are_asked_again(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each put whose answer is lost is done, and finds itself there when it is tried again."""
    with cutting_proxy(bucket) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.cut_after, proxy.cuts_left, proxy.swallow, proxy.busy_left = 1, 12, True, 3
        cuts: list[int] = []

        def more(event: Event) -> None:
            if isinstance(event, Progress) and event.nbytes:
                proxy.cuts_left += 2
                proxy.busy_left += 1
                cuts.append(proxy.cuts_done)

        build_store(BuildRequest.of(asked(data, url)), more, load_mean_teacher)
        assert proxy.cuts_done > 12 and proxy.busy_left < 3
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    assert_whole(url, whole, tmp_path / "copy")


def no_teacher(request: TeacherRequest, device: str = "cpu") -> Teacher:
    raise AssertionError("a teacher was loaded")


def test_what_is_out_of_reach_is_one_error_before_a_teacher_is_loaded(
    data: Path, url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(out: str) -> str:
        with pytest.raises(ResourceError) as error:
            build_store(BuildRequest.of(asked(data, out)), load_teacher=no_teacher)
        return str(error.value)

    assert refused("s3://no-such-bucket/store") == "s3://no-such-bucket/store: the bucket does not exist; make it first"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "the connection failed 5 times in a row" in refused(url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    assert "credentials" in refused(url)
    for out in ("https://host/store", "s3://bucket/store@0123456789", "s4://bucket/store"):
        with pytest.raises(UsageError):
            BuildRequest.of(asked(data, out))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # fsspec's, of a failed connection
def test_places_to_read_from_only_are_refused_and_secrets_stay_hidden(data: Path) -> None:
    for out, code in (("https://someone:hunter2hunter2@host/x", 2), ("ftp://someone:hunter2hunter2@127.0.0.1:9/x", 6)):
        words = ("cache", "build", data, "--teacher", "timm:test_vit,pretrained=none", "--out", out, "-q")
        found, said, warned = call(*words)
        assert found == code and "hunter2" not in said + warned, warned
    assert "can only be read" in call("cache", "plan", data, "--teacher", "x", "--out", "http://host/x")[2]
    assert "write it with two slashes" in call("cache", "build", data, "--teacher", "x", "--out", "s3:/bucket/x")[2]


def test_an_interrupted_build_releases_its_lease_and_continues_anywhere(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = 0

    def stop(event: Event) -> None:
        nonlocal tiles
        tiles += isinstance(event, Progress) and event.task == "mean"
        if tiles == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"2 shard groups of {url} are safe"):
        build_store(BuildRequest.of(asked(data, url)), stop, load_mean_teacher)
    assert Objects(bucket, url).lease["released"] is True
    monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / "elsewhere"))
    part = FeatureStore.open(url)
    assert [sum(part.committed(key)) for key in part.keys()] == [4, 4], "what is committed is read"
    report = build(data, url)
    assert (report.units_before, report.units) == (2, UNITS - 2)
    assert_whole(url, whole, tmp_path / "copy")


def test_a_url_grows_by_tiles_teachers_pixels_and_codecs(
    data: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From several machines, and by a push in between; after each step it is the store of a folder that grew alike."""
    steps: list[dict[str, object]] = [
        {},
        {"splits": ["train", "val"]},
        {"teachers": ["mean", "other"], "splits": ["train", "val"]},
        {"teachers": ["mean,codec=int8,scales=0.5"], "pixels": True},
    ]
    for number, more in enumerate(steps):
        monkeypatch.setenv("RSMTDF_HOME", str(tmp_path / f"home{number}"))
        assert build(data, url, **more).snapshot == build(data, tmp_path / "s", **more).snapshot
        assert_named(url)
    build(data, tmp_path / "s", splits=["test"])
    push_store(tmp_path / "s", url)
    assert build(data, url, splits=["test"]).units == 0
    pull_store(url, tmp_path / "copy")
    assert difference_here(tmp_path / "copy", tmp_path / "s") == ""


def test_another_store_and_a_teacher_that_changed_are_refused(data: Path, url: str, tmp_path: Path) -> None:
    build(data, url)
    with pytest.raises(MismatchError, match=f"{url} holds another mean/s64o0"):
        build(data, url, teachers=["mean,seed=5"])
    other = write_dataset(tmp_path / "other", tiles=12, tile_px=128)
    with pytest.raises(MismatchError, match=f"{url} holds tiles of 64 px"):
        build(other, url)


def test_folded_commits_are_read_from_the_head_alone(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    build(data, url)
    store = BucketDestination(Address.parse(url))
    with store, store.hold(ignore_events):
        ledger = Ledger.load(store.paths)
        ledger.compact(tail_max=0)
        store.write_head(load_manifest(store.paths), ledger)
    head = json.loads(Objects(bucket, url).read("ledger/head.json"))
    assert not [n for n in head["files"] if "/commits/" in n] and [n for n in head["files"] if "/segments/" in n]
    assert build(data, url).units == 0
    assert_whole(url, whole, tmp_path / "copy")


def test_heads_become_rarer_as_a_store_grows(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names all there is: at a fixed number of units between them their cost would grow with the square."""
    monkeypatch.setattr("rsmtdf_cache.build.TAIL_MAX", 1)
    many = write_dataset(tmp_path / "many", tiles=32, tile_px=64)
    units: list[int] = []
    publish = BucketDestination.write_head

    def note(self: BucketDestination, manifest: Manifest, ledger: Ledger, final: bool = True) -> None:
        units.append(sum(map(len, ledger.commits.values())))
        publish(self, manifest, ledger, final)

    monkeypatch.setattr(BucketDestination, "write_head", note)
    done = build(many, url, group_rows=1, splits=["train", "val", "test"])
    during = units[1:-1]  # the first is empty, the last is the end's
    assert units[0] == 0 and units[-1] == done.units == 32 and 4 < len(during) < 16
    assert all(later >= earlier + earlier // 4 for earlier, later in itertools.pairwise(during))


def test_a_dry_run_tells_what_is_left_and_writes_nothing(data: Path, url: str, bucket: str) -> None:
    def plan(**more: object) -> Any:
        return plan_build(BuildRequest.of(asked(data, url, **more)), measure=False, load_teacher=load_mean_teacher)

    first = plan()
    assert Objects(bucket, url).names() == [] and first.nbytes > 0 and first.fits
    built = build(data, url)
    assert built.nbytes_shards == first.nbytes
    before = Objects(bucket, url).names()
    assert plan().nbytes == 0 and 0 < plan(splits=["train", "val"]).nbytes < first.nbytes
    assert Objects(bucket, url).names() == before


# -- what others put there meanwhile


def rewritten(whole: Path, folder: Path) -> tuple[bytes, bytes]:
    """Return the tile table of ``whole`` as another writer would have it, and its record."""
    place = folder / "table.parquet"
    table = StorePaths(whole).tile_segment(0).with_suffix(".parquet")
    pq.write_table(pq.read_table(table), place, use_dictionary=False, compression="none", write_statistics=True)
    assert place.read_bytes() != table.read_bytes()
    body = read_json(StorePaths(whole).tile_segment(0))
    return place.read_bytes(), record_bytes({**body, "sha256": sha256_file(place)})


TILES = "ledger/tiles/0000000000"


def test_a_tile_table_that_a_record_names_is_never_written_over(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """It came after the build had looked at what is there; the same command takes it for its own."""
    builder = start_build(tmp_path / "late", asked(data, url), tmp_path / "elsewhere", 2, hold=True)
    until(lambda: builder.held)
    table, record = rewritten(whole, tmp_path)
    Objects(bucket, url).write(f"{TILES}.parquet", table)
    Objects(bucket, url).write(f"{TILES}.json", record)
    builder.release()
    assert builder.end() == 4 and "nothing was overwritten" in builder.said
    assert Objects(bucket, url).read(f"{TILES}.parquet") == table
    assert build(data, url).snapshot == FeatureStore.open(whole).snapshot == FeatureStore.open(url).snapshot


def test_a_tile_table_without_a_record_is_taken_over_by_the_next_push(
    whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    table, _ = rewritten(whole, tmp_path)
    Objects(bucket, url).write("manifest.json", StorePaths(whole).manifest.read_bytes())
    Objects(bucket, url).write(f"{TILES}.parquet", table)
    push_store(whole, url)
    assert Objects(bucket, url).read(f"{TILES}.parquet") == table
    pull_store(url, tmp_path / "copy")
    assert verify_store(tmp_path / "copy", deep=True) == []
    assert FeatureStore.open(tmp_path / "copy").snapshot == FeatureStore.open(whole).snapshot


def test_a_set_that_a_stopped_push_left_stands_in_nobodys_way(
    data: Path, whole: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """It has the layers of a set that another push has published since."""
    push_store(whole, url)
    assert boto3.client("s3", endpoint_url=bucket).delete_object(
        Bucket="bucket", Key=url.removeprefix("s3://bucket/") + "/ledger/head.json"
    )
    request = asked(data, tmp_path / "part", teachers=["mean,layers=mean8"])
    build_store(BuildRequest.of(request), load_teacher=load_mean_teacher)
    push_store(tmp_path / "part", url)
    published = FeatureStore.open(url).snapshot
    report = build(data, url, teachers=["mean,layers=mean8"])
    assert (report.units, report.snapshot) == (0, published)
    assert_named(url)


def test_a_server_that_does_not_say_which_condition_failed(url: str, bucket: str) -> None:
    """Then s3fs knows no more than that the request was wrong."""
    way = transport.connect(Address.parse(url))
    assert way.put("manifest.json", b"first")
    files: Any = way._backend
    inner, calls = files._send, []

    def send(*told: Any) -> None:
        try:
            inner(*told)
        except FileExistsError as error:
            calls.append(error)
            answer = {"Error": {"Code": "PreconditionFailed", "Message": "At least one condition failed"}}
            raise OSError(errno.EINVAL, "Invalid argument") from ClientError(answer, "PutObject")

    files._send = send
    assert not way.put("manifest.json", b"second") and len(calls) == 1
    assert way.get("manifest.json", 100) == b"first"


# -- workers


def words(data: Path, url: str, *more: object) -> list[object]:
    return [
        "cache", "build", data, "--out", url, "--teacher", "timm:test_vit,pretrained=none", "--group-rows", 2,
        "--threads", 1, "--micro-batch", 2, "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_vit(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes in a folder with the teacher of the command line."""
    out = tmp_path_factory.mktemp("bucket") / "vit"
    build_store(BuildRequest.of({
        "data": data, "out": out, "teachers": ["timm:test_vit,pretrained=none"], "group_rows": 2, "threads": 1,
        "micro_batch": 2, "device": "cpu",
    }))  # fmt: skip
    return out


def test_workers_put_shards_and_the_command_commits_whoever_is_killed(
    data: Path, by_vit: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """One dies before it sends a unit's shards, one when they are there and nobody knows; another one finishes, where a
    shard of the last unit finds an object of nobody in its place. Both die when their first units are committed.
    """
    shared = environment(tmp_path / "home")
    with cluster(tmp_path / "cluster") as crew:
        crew.add("sends", Temper(hold=True, kill=True, step=4, unit=2, environ=shared))
        crew.add("sent", Temper(hold=True, kill=True, step=5, unit=2, environ=shared))
        crew.add("lives", Temper(hold=True, environ=shared))
        client = start(words(data, url, "--scheduler", crew.address, "--patience", 60), crew.folder, "client", shared)
        until(lambda: all(map(crew.held, crew.workers)), client.stderr.read_text)
        until(lambda: len(Objects(bucket, url).names("ledger/commits/")) == 2, client.stderr.read_text)
        for name in ("sends", "sent"):
            crew.release(name)
            crew.workers[name].join()
        last = list(FeatureStore.open(by_vit).ledger.commits.values())[-1][UNITS - 1].shards[0]
        Objects(bucket, url).write(last.path, b"another build's")
        crew.release()
        assert client.end() == 0, client.stderr.read_text()
        found = json.loads(client.stdout.read_text())
        assert len(found["failures"]) == 2 and all("was lost" in f for f in found["failures"])
        again = sum(crew.steps(1).values()) - found["units"]
        assert again == 3, "the two units under way were encoded again, and the one whose place was taken"
        assert list((tmp_path / "cluster" / "lives").rglob("*.features")) == []
    assert found["snapshot"] == FeatureStore.open(by_vit).snapshot
    assert_whole(url, by_vit, tmp_path / "copy")


def test_a_worker_that_dies_before_its_record_is_fetched_costs_two_units_and_no_time(
    data: Path, by_vit: Path, url: str, tmp_path: Path
) -> None:
    """The command stands still while one ends a unit, begins the next and dies; it does not wait for the dead one."""
    shared = environment(tmp_path / "home")
    with cluster(tmp_path / "cluster") as crew:
        crew.add("dies", Temper(hold=True, step=4, environ=shared))
        client = start(words(data, url, "--scheduler", crew.address, "--patience", 90), crew.folder, "client", shared)
        until(lambda: crew.held("dies"), client.stderr.read_text)
        os.kill(client.pid, signal.SIGSTOP)
        crew.add("lives", Temper(environ=shared))
        crew.release("dies")
        until(lambda: crew.steps(1)["dies"] == 2)
        crew.workers["dies"].kill()
        os.kill(client.pid, signal.SIGCONT)
        until(lambda: crew.steps(1)["lives"] > 0, client.stderr.read_text, seconds=20)
        assert client.end() == 0, client.stderr.read_text()
        found = json.loads(client.stdout.read_text())
        assert [f.endswith("was lost") for f in found["failures"]] == [True]
        assert crew.steps(1) == {"dies": 2, "lives": found["units"]}
    assert_whole(url, by_vit, tmp_path / "copy")


def test_a_worker_whose_client_died_commits_nothing(
    data: Path, by_vit: Path, url: str, bucket: str, tmp_path: Path
) -> None:
    """It waits with its drafts while the next build finishes, then finds its shards there, and leaves them alone."""
    shared = environment(tmp_path / "home")
    with cluster(tmp_path / "cluster") as crew:
        crew.add("late", Temper(hold=True, step=4, environ=shared))
        client = start(words(data, url, "--scheduler", crew.address), crew.folder, "client", shared)
        until(lambda: crew.held("late"), client.stderr.read_text)
        client.process.kill()
        assert client.end() == -signal.SIGKILL
        assert Objects(bucket, url).names("ledger/commits/") == []
        again = start(words(data, url), crew.folder, "again", shared)
        assert again.end() == 0, again.stderr.read_text()
        before = {name: Objects(bucket, url).read(name) for name in Objects(bucket, url).names()}
        crew.release()
        until(lambda: crew.steps(5)["late"] == 1)
        assert {name: Objects(bucket, url).read(name) for name in Objects(bucket, url).names()} == before
    assert_whole(url, by_vit, tmp_path / "copy")


@pytest.mark.slow
def test_processes_of_this_machine_build_into_a_url_and_add_to_it(
    data: Path, by_vit: Path, url: str, tmp_path: Path
) -> None:
    """A head that is written while a build adds to a finished store names what is there."""
    shutil.copytree(by_vit, tmp_path / "grown")
    grown = start(words(data, str(tmp_path / "grown"), "--split", "val"), tmp_path, "grown", {})
    assert grown.end() == 0, grown.stderr.read_text()
    for number, (more, expected) in enumerate([([], by_vit), (["--split", "val"], tmp_path / "grown")]):
        asked = words(data, url, "--workers", 2, *more)
        command = start(asked, tmp_path, f"workers{number}", environment(tmp_path / "home"))
        assert command.end() == 0, command.stderr.read_text()
        found = json.loads(command.stdout.read_text())
        assert found["snapshot"] == FeatureStore.open(expected).snapshot and found["failures"] == []
        assert_whole(url, expected, tmp_path / f"copy{number}")
