"""Push and pull: a copy equals its source bit for bit, whatever cuts, kills or runs beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import FindingsError, Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import Event, Progress, ProgressStart, Warned
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from rsmtdf_cache.share.select import Selection
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from tests.datasets import write_dataset, write_split
from tests.servers import WebFolder, cutting_proxy, make_bucket, s3_server, web_folder
from tests.teachers import load_mean_teacher

pytestmark = pytest.mark.usefixtures("quick_and_at_home")

ROOT = Path(__file__).parents[2]
SMALL = {"train": range(4), "val": [10], "test": [11]}


def build(data: Path, out: Path, **values: object) -> None:
    asked = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 2, "threads": 1, "micro_batch": 2}
    build_store(BuildRequest.of({**asked, **values}), load_teacher=load_mean_teacher)


def shards(root: Path) -> dict[str, bytes]:
    """Return every feature shard of a store by its name."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.glob("zarr/*/*/*/features/c/*/0/0/0"))}


def equal(root: Path, other: Path) -> bool:
    """Whether two stores show the same features, bit for bit."""
    a, b = FeatureStore.open(root), FeatureStore.open(other)
    if a.snapshot != b.snapshot or a.keys() != b.keys():
        return False
    rows = range(len(a.tiles))
    return all(np.array_equal(a.read(k, rows).values, b.read(k, rows).values, equal_nan=True) for k in a.keys())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("share") / "data", tiles=12, tile_px=64)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of two layers; 8 train tiles in row groups of two."""
    out = tmp_path_factory.mktemp("share") / "store"
    build(data, out)
    return out


@pytest.fixture
def web(store: Path) -> Iterator[WebFolder]:
    with web_folder(store) as served:
        yield served


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server(monkeypatch) as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


def test_a_pulled_store_equals_its_source_and_verifies(store: Path, web: WebFolder, tmp_path: Path) -> None:
    report = pull_store(web.url, tmp_path / "copy")
    assert shards(tmp_path / "copy") == shards(store)
    assert equal(store, tmp_path / "copy")
    assert verify_store(tmp_path / "copy", deep=True) == []
    assert report.snapshot == FeatureStore.open(store).snapshot
    assert report.nbytes_moved == report.plan.nbytes == sum(map(len, shards(store).values()))


def test_push_to_s3_then_pull_brings_the_same_store(store: Path, bucket: str, tmp_path: Path) -> None:
    push_store(store, "s3://bucket/deep/store")
    pull_store("s3://bucket/deep/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")
    assert verify_store(tmp_path / "copy", deep=True) == []


def test_push_to_a_folder_makes_a_store_that_verifies(store: Path, tmp_path: Path) -> None:
    push_store(store, str(tmp_path / "disk"))
    push_store(store, f"file://{tmp_path}/again")
    assert equal(store, tmp_path / "disk") and equal(store, tmp_path / "again")
    assert verify_store(tmp_path / "disk", deep=True) == []


def test_a_second_push_or_pull_moves_nothing(store: Path, bucket: str, tmp_path: Path) -> None:
    push_store(store, "s3://bucket/store")
    again = push_store(store, "s3://bucket/store")
    assert (again.nbytes_moved, again.plan.units, again.plan.units_before) == (0, [], 8)
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert pull_store("s3://bucket/store", tmp_path / "copy").nbytes_moved == 0


def test_pixels_and_labels_do_not_travel(store: Path, data: Path, bucket: str) -> None:
    push_store(store, "s3://bucket/store")
    import boto3

    listing = boto3.client("s3", endpoint_url=bucket).list_objects_v2(Bucket="bucket")["Contents"]
    names = {item["Key"].removeprefix("store/") for item in listing}
    assert names <= {p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file()}
    assert not any(name.endswith((".png", ".tif", "build.lock")) for name in names)


@pytest.mark.parametrize("cuts", [1, 4, 9])
def test_a_transfer_cut_in_the_middle_of_shards_still_comes_whole(
    store: Path, web: WebFolder, tmp_path: Path, cuts: int
) -> None:
    web.cut_on, web.cut_after, web.cuts_left = "features/c/", 100, cuts
    pull_store(web.url, tmp_path / "copy", workers=2)
    assert web.cuts_left == 0
    assert any(start for _, _, start in web.requests), "a cut transfer goes on where it was"
    assert equal(store, tmp_path / "copy")


def test_a_server_that_ignores_ranges_does_not_corrupt(store: Path, web: WebFolder, tmp_path: Path) -> None:
    web.ranges, web.cut_on, web.cut_after, web.cuts_left = False, "features/c/", 700, 3
    pull_store(web.url, tmp_path / "copy", workers=1)
    assert any(start for _, _, start in web.requests)
    assert equal(store, tmp_path / "copy")


def test_s3_transfers_that_are_cut_come_whole(
    store: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cutting_proxy(bucket) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.cut_after, proxy.cuts_left = 100, 3
        push_store(store, "s3://bucket/store", workers=2)
        proxy.cut_after, proxy.cuts_left = 1000, 4
        pull_store("s3://bucket/store", tmp_path / "copy", workers=2)
    assert proxy.cuts_done == 7
    assert equal(store, tmp_path / "copy")


def test_a_server_that_stays_away_is_a_resource_error_that_says_how_to_go_on(
    store: Path, web: WebFolder, tmp_path: Path
) -> None:
    web.status = 503
    with pytest.raises(ResourceError, match="same command again, it continues"):
        pull_store(web.url, tmp_path / "copy")
    web.status = 0
    pull_store(web.url, tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


PULL = """
import sys
from pathlib import Path
from rsmtdf_cache.share.pull import pull_store
print("ready", flush=True)
pull_store(sys.argv[1], Path(sys.argv[2]), workers=2)
"""


def test_a_killed_pull_continues_and_fetches_no_committed_unit_again(
    store: Path, web: WebFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    web.pause_s = 0.05
    process = subprocess.Popen(
        [sys.executable, "-c", PULL, web.url, str(copy)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    commits = copy / "ledger" / "commits"
    until = time.monotonic() + 60
    while len(list(commits.glob("*/*.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    committed = {json.loads(p.read_bytes())["shards"][0]["path"] for p in commits.glob("*/*.json")}
    assert 2 <= len(committed) < 8
    web.pause_s = 0.0
    web.requests.clear()
    pull_store(web.url, copy)
    assert not committed & {path.lstrip("/") for path, _, _ in web.requests}
    assert equal(store, copy)
    assert verify_store(copy, deep=True) == []


def test_a_draft_of_an_earlier_process_is_continued(store: Path, web: WebFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    web.cut_on, web.cut_after, web.cuts_left = "features/c/", 700, 10**6
    web.stubborn = True  # nothing more after the first part
    with pytest.raises(ResourceError):
        pull_store(web.url, copy, workers=1)
    assert list((copy / "tmp" / "pull").glob("shard-*"))
    web.cuts_left, web.stubborn = 0, False
    web.requests.clear()
    pull_store(web.url, copy, workers=1)
    assert any(start == 700 for _, _, start in web.requests)
    assert equal(store, copy)


def test_ctrl_c_keeps_committed_units_and_the_same_call_continues(store: Path, web: WebFolder, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="same command continues"):
        pull_store(web.url, tmp_path / "copy", on_event=stop, workers=2)
    pull_store(web.url, tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


def test_progress_is_told_in_bytes(store: Path, web: WebFolder, tmp_path: Path) -> None:
    events: list[Event] = []
    report = pull_store(web.url, tmp_path / "copy", on_event=events.append)
    starts = [e for e in events if isinstance(e, ProgressStart)]
    assert [(e.total, e.unit) for e in starts] == [(report.plan.nbytes, "bytes")]
    assert sum(e.nbytes for e in events if isinstance(e, Progress)) == report.plan.nbytes


def test_a_dry_run_says_the_bytes_and_writes_nothing(store: Path, web: WebFolder, tmp_path: Path) -> None:
    report = pull_store(web.url, tmp_path / "copy", dry_run=True)
    assert report.plan.nbytes == sum(map(len, shards(store).values()))
    assert report.plan.shards == 16
    assert not (tmp_path / "copy").exists()
    assert not any("features/c/" in path for path, _, _ in web.requests)


# -- parts


def test_a_partial_pull_reads_like_a_store_of_that_part(store: Path, web: WebFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    pull_store(web.url, copy, Selection(layers=("mean8",), views=("s64*",)))
    part, whole = FeatureStore.open(copy), FeatureStore.open(store)
    assert [str(k) for k in part.keys()] == ["mean/s64o0/mean8"]
    rows = range(len(whole.tiles))
    key = part.keys()[0]
    assert np.array_equal(part.read(key, rows).values, whole.read(key, rows).values)
    assert verify_store(copy, deep=True) == []
    tree: Any = part.to_xarray()
    assert np.array_equal(tree[str(key)]["features"].values, whole.read(key, rows).values)


def test_a_later_pull_of_more_adds_only_that(store: Path, web: WebFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    pull_store(web.url, copy, Selection(layers=("mean8",)))
    web.requests.clear()
    pull_store(web.url, copy)
    fetched = [path for path, _, _ in web.requests if "features/c/" in path]
    assert fetched and all("/mean16/" in path for path in fetched)
    assert equal(store, copy)
    assert verify_store(copy, deep=True) == []


def test_tiles_come_by_whole_row_groups_and_the_report_says_how_many_came_along(
    store: Path, web: WebFolder, tmp_path: Path
) -> None:
    copy, ids = tmp_path / "copy", tmp_path / "ids.txt"
    ids.write_text("t001\nt005\nt004\n")
    report = pull_store(web.url, copy, Selection(tiles=str(ids)))
    assert (report.plan.tiles, report.plan.tiles_along) == (3, 1)
    part = FeatureStore.open(copy)
    key = part.keys()[0]
    there = {part.tiles.ids[row] for row in np.flatnonzero(part.committed(key))}
    assert there == {"t000", "t001", "t004", "t005"}
    pull_store(web.url, copy, Selection(tiles="train"))
    assert equal(store, copy)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(teachers=("maen",)), r"--teacher maen: takes no array.* Did you mean 'mean'\?"),
        (Selection(tiles="trian"), r"neither a split .*\(train\).* Did you mean 'train'\?"),
    ],
)
def test_a_selection_that_takes_nothing_says_what_there_is(
    web: WebFolder, tmp_path: Path, selection: Selection, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pull_store(web.url, tmp_path / "copy", selection)


def test_a_killed_partial_pull_does_not_grow_into_a_whole_one(store: Path, web: WebFolder, tmp_path: Path) -> None:
    copy, wanted = tmp_path / "copy", Selection(layers=("mean8",))
    web.fail_on = "/features/c/"
    with pytest.raises(ResourceError):
        pull_store(web.url, copy, wanted, workers=1)
    web.fail_on = ""
    pull_store(web.url, copy, wanted)
    assert {k.layer for k in FeatureStore.open(copy).keys()} == {"mean8"}
    assert not list(copy.glob("zarr/*/*/mean16/features/c/*"))


def test_parts_pushed_one_after_the_other_make_the_whole(store: Path, bucket: str, tmp_path: Path) -> None:
    push_store(store, "s3://bucket/store", Selection(layers=("mean8",), tiles=None))
    pull_store("s3://bucket/store", tmp_path / "part")
    assert {k.layer for k in FeatureStore.open(tmp_path / "part").keys()} == {"mean8"}
    second = push_store(store, "s3://bucket/store", Selection(layers=("mean16",)))
    assert second.nbytes_moved == sum(len(v) for k, v in shards(store).items() if "/mean16/" in k)
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


# -- growth and conflict


def test_push_of_a_grown_store_adds_only_what_is_new(bucket: str, tmp_path: Path) -> None:
    more, out = write_dataset(tmp_path / "data", tiles=12, splits=SMALL), tmp_path / "store"
    build(more, out)
    first = push_store(out, "s3://bucket/store")
    pull_store("s3://bucket/store", tmp_path / "copy")
    write_split(more, "train", [f"t{i:03}" for i in range(8)])
    build(more, out)
    second = push_store(out, "s3://bucket/store")
    assert (len(first.plan.units), len(second.plan.units), second.plan.units_before) == (4, 4, 4)
    third = pull_store("s3://bucket/store", tmp_path / "copy")
    assert len(third.plan.units) == 4
    assert equal(out, tmp_path / "copy")
    assert verify_store(tmp_path / "copy", deep=True) == []


def test_a_snapshot_can_be_pulled_after_the_store_grew(bucket: str, tmp_path: Path) -> None:
    more, out = write_dataset(tmp_path / "data", tiles=12, splits=SMALL), tmp_path / "store"
    build(more, out)
    then = push_store(out, "s3://bucket/store").snapshot
    write_split(more, "train", [f"t{i:03}" for i in range(8)])
    build(more, out)
    push_store(out, "s3://bucket/store")
    report = pull_store(f"s3://bucket/store@{then[:12]}", tmp_path / "then")
    assert report.snapshot == then
    assert FeatureStore.open(tmp_path / "then").snapshot == then


@pytest.mark.parametrize("change", ["tiles", "weights", "group_rows"])
def test_another_store_at_the_url_is_refused_and_left_as_it_is(
    store: Path, data: Path, bucket: str, tmp_path: Path, change: str
) -> None:
    other = tmp_path / "other"
    if change == "tiles":
        build(write_dataset(tmp_path / "data", tiles=12, tile_px=64, seed=5), other)
    elif change == "weights":
        build(data, other, teachers=["mean,seed=3"])
    else:
        build(data, other, group_rows=4)
    push_store(store, "s3://bucket/store")
    with pytest.raises(
        MismatchError, match={"tiles": "row 0", "weights": "weights", "group_rows": "group_rows"}[change]
    ):
        push_store(other, "s3://bucket/store")
    with pytest.raises(MismatchError):
        pull_store("s3://bucket/store", other)
    assert verify_store(other, deep=True) == []
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


def test_a_damaged_store_is_never_published(store: Path, bucket: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    name = sorted(shards(damaged))[3]
    flipped = bytearray((damaged / name).read_bytes())
    flipped[10] ^= 1
    (damaged / name).write_bytes(flipped)
    with pytest.raises(FindingsError, match=r"not pushed.*verify --deep"):
        push_store(damaged, "s3://bucket/store")
    with pytest.raises(MismatchError, match="no feature store is there"):
        pull_store("s3://bucket/store", tmp_path / "copy")
    push_store(store, "s3://bucket/store")
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


def test_a_push_that_broke_off_is_finished_without_sending_again(store: Path, bucket: str, tmp_path: Path) -> None:
    sent = 0

    def stop(event: Event) -> None:
        nonlocal sent
        sent += isinstance(event, Progress)
        if sent == 6:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        push_store(store, "s3://bucket/store", on_event=stop, workers=1)
    second = push_store(store, "s3://bucket/store")
    assert 0 < second.nbytes_moved < second.plan.nbytes
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


def test_two_pushes_at_once_publish_one_sound_store(store: Path, bucket: str, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def push(layer: str) -> None:
        try:
            push_store(store, "s3://bucket/store", Selection(layers=(layer,)), workers=2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=push, args=(layer,)) for layer in ("mean8", "mean16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    push_store(store, "s3://bucket/store")
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")
    assert verify_store(tmp_path / "copy", deep=True) == []


def test_a_web_server_is_no_place_to_push_to(store: Path, web: WebFolder) -> None:
    with pytest.raises(UsageError, match="can only be read"):
        push_store(store, web.url.replace("http://", "http://someone@") + "/elsewhere")


def test_a_pull_onto_itself_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="is the store itself"):
        pull_store(str(store), store)


def test_the_target_must_be_a_store_or_empty(web: WebFolder, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(MismatchError, match="not empty"):
        pull_store(web.url, tmp_path / "letters")


def test_a_pulled_store_is_built_further_like_any_other(
    data: Path, store: Path, web: WebFolder, tmp_path: Path
) -> None:
    copy, more = tmp_path / "copy", tmp_path / "data"
    pull_store(web.url, copy)
    shutil.copytree(data, more)
    write_split(more, "val", ["t010"])
    write_split(more, "test", ["t011"])
    write_split(more, "train", [f"t{i:03}" for i in range(10)])
    build(more, copy)
    grown = FeatureStore.open(copy)
    assert len(grown.tiles) == 10
    assert grown.committed(FeatureKey.parse("mean/s64o0/mean8")).all()
    assert set(shards(store).items()) <= set(shards(copy).items())
    assert StorePaths(copy).head.is_file()


# -- what is damaged at the target, and what cannot be copied


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)


def damage_bucket(endpoint: str, copy: Path, damage: str) -> None:
    """Delete, cut or flip one shard of the store pushed to ``s3://bucket/store``."""
    import boto3

    client, name = boto3.client("s3", endpoint_url=endpoint), sorted(shards(copy))[2]
    data = bytearray(shards(copy)[name])
    if damage == "deleted":
        client.delete_object(Bucket="bucket", Key=f"store/{name}")
        return
    data[10] ^= 1
    client.put_object(Bucket="bucket", Key=f"store/{name}", Body=bytes(data[:-1] if damage == "cut" else data))


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped"])
def test_a_damaged_published_store_is_healed_by_pushing_again(
    store: Path, bucket: str, tmp_path: Path, damage: str
) -> None:
    push_store(store, "s3://bucket/store")
    damage_bucket(bucket, store, damage)
    with pytest.raises(FindingsError, match="push --deep"):
        pull_store("s3://bucket/store", tmp_path / "copy")
    planned = push_store(store, "s3://bucket/store", deep=True, dry_run=True)
    assert planned.plan.replaced == 1
    assert push_store(store, "s3://bucket/store", deep=damage == "flipped").plan.shards == 1
    assert push_store(store, "s3://bucket/store", deep=True).plan.shards == 0
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["manifest.json", "ledger/commits/", "ledger/tiles/", "ledger/sets/"])
def test_a_damaged_record_of_a_published_store_is_healed_by_a_deep_push(
    store: Path, bucket: str, tmp_path: Path, kind: str
) -> None:
    import boto3

    push_store(store, "s3://bucket/store")
    client = boto3.client("s3", endpoint_url=bucket)
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"store/{kind}")["Contents"]
    client.put_object(Bucket="bucket", Key=found[0]["Key"], Body=b"x" * found[0]["Size"])
    with pytest.raises((FindingsError, MismatchError)):
        pull_store("s3://bucket/store", tmp_path / "copy")
    push_store(store, "s3://bucket/store", deep=True)
    pull_store("s3://bucket/store", tmp_path / "copy")
    assert equal(store, tmp_path / "copy")


@pytest.mark.parametrize("by", ["push", "pull"])
def test_a_damaged_copy_in_a_folder_is_healed_by_copying_again(
    store: Path, web: WebFolder, tmp_path: Path, by: str
) -> None:
    copy = tmp_path / "copy"

    def again(deep: bool = False) -> int:
        report = push_store(store, str(copy), deep=deep) if by == "push" else pull_store(web.url, copy, deep=deep)
        return report.plan.replaced

    again()
    first, second, third = (copy / name for name in sorted(shards(copy))[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    flip(third)
    assert (again(), again(), again(deep=True), again(deep=True)) == (2, 0, 1, 0)
    assert equal(store, copy)
    assert verify_store(copy, deep=True) == []


def test_a_bucket_that_may_not_be_listed_is_asked_file_by_file(store: Path, bucket: str, monkeypatch: Any) -> None:
    from rsmtdf_cache.share.backends import Backend
    from rsmtdf_cache.share.objects import ObjectBackend

    push_store(store, "s3://bucket/store")
    damage_bucket(bucket, store, "deleted")
    monkeypatch.setattr(ObjectBackend, "listing", Backend.listing)
    assert push_store(store, "s3://bucket/store").plan.replaced == 1


def test_a_push_of_a_damaged_store_to_a_folder_leaves_no_store_there(store: Path, tmp_path: Path) -> None:
    damaged, target = tmp_path / "damaged", tmp_path / "new" / "target"
    shutil.copytree(store, damaged)
    flip(damaged / sorted(shards(damaged))[-1])
    with pytest.raises(FindingsError, match=r"damaged/zarr.*nothing was copied.*verify --deep --repair"):
        push_store(damaged, str(target))
    assert not target.parent.exists()


def test_a_stopped_build_is_pulled_from_a_folder_as_far_as_it_came(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    build(data, out)
    paths = StorePaths(out)
    paths.head.unlink()  # as after a kill
    for commit in sorted(paths.ledger.glob("commits/*/*.json"))[:3]:
        commit.unlink()
    pull_store(str(out), tmp_path / "copy")
    assert equal(out, tmp_path / "copy")
    assert len(FeatureStore.open(tmp_path / "copy").keys()) > 0
    with web_folder(out) as served, pytest.raises(MismatchError, match="has not ended"):
        pull_store(served.url, tmp_path / "other")


def test_a_store_that_lists_no_row_group_is_told_of(store: Path, tmp_path: Path) -> None:
    from rsmtdf_cache.head import write_head
    from rsmtdf_cache.ledger import Ledger
    from rsmtdf_cache.manifest import load_manifest

    empty, events = tmp_path / "empty", list[Event]()
    shutil.copytree(store, empty)
    paths = StorePaths(empty)
    shutil.rmtree(paths.ledger / "commits")
    write_head(paths, load_manifest(paths), Ledger.load(paths))
    with web_folder(empty) as served:
        pull_store(served.url, tmp_path / "copy", on_event=events.append)
    assert any("no row group is listed" in e.text for e in events if isinstance(e, Warned))


def test_arrays_that_were_built_here_in_another_grouping_are_not_copied_again(
    data: Path, store: Path, web: WebFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    pull_store(web.url, copy, Selection(layers=("mean8",)))
    build(data, copy)
    assert equal(store, copy)
    assert pull_store(web.url, copy).plan.shards == 0
    assert push_store(copy, str(tmp_path / "other")).plan.shards == 16
    assert push_store(store, str(tmp_path / "other")).plan.shards == 0


def test_arrays_of_another_grouping_that_lack_tiles_are_refused_with_the_way_out(
    data: Path, store: Path, web: WebFolder, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    pull_store(web.url, copy, Selection(layers=("mean8",)))
    build(data, copy)
    for commit in StorePaths(copy).ledger.glob("commits/*/00000003.json"):
        commit.unlink()
    StorePaths(copy).head.unlink()
    with pytest.raises(MismatchError, match=r"row group 3.*rsmtdf cache merge"):
        pull_store(web.url, copy)


def test_stores_of_other_weights_are_not_said_to_be_mergeable(data: Path, web: WebFolder, tmp_path: Path) -> None:
    build(data, tmp_path / "other", teachers=["mean,seed=3"])
    with pytest.raises(MismatchError) as caught:
        pull_store(web.url, tmp_path / "other")
    assert "is another store" in str(caught.value) and "merge" not in str(caught.value)


@pytest.mark.parametrize("target", ["snapshot", "inside", "web"])
def test_a_place_that_a_push_cannot_go_to_is_refused_at_once(store: Path, tmp_path: Path, target: str) -> None:
    url = {"snapshot": f"{tmp_path}/b@0123abcd", "inside": f"{store}/sub", "web": "https://host.invalid/x"}[target]
    for dry_run in (True, False):
        with pytest.raises(UsageError):
            push_store(store, url, dry_run=dry_run)
    assert not list(tmp_path.iterdir()) and not (store / "sub").exists()


@pytest.mark.parametrize("why", ["no store", "unknown teacher", "nothing answers"])
def test_a_pull_that_fails_before_anything_came_leaves_no_folder(web: WebFolder, tmp_path: Path, why: str) -> None:
    web.status = 503 if why == "nothing answers" else 0
    url = web.url + "/elsewhere" if why == "no store" else web.url
    with pytest.raises((MismatchError, UsageError, ResourceError)):
        pull_store(url, tmp_path / "new" / "copy", Selection(teachers=("nobody",)))
    assert not (tmp_path / "new").exists()


def test_progress_reaches_its_end_after_a_resume(store: Path, web: WebFolder, tmp_path: Path) -> None:
    copy, events = tmp_path / "copy", list[Event]()
    web.cut_on, web.cut_after, web.cuts_left = "features/c/", 700, 10**6
    web.stubborn = True
    with pytest.raises(ResourceError):
        pull_store(web.url, copy, workers=1)
    web.cuts_left, web.stubborn = 0, False
    report = pull_store(web.url, copy, workers=1, on_event=events.append)
    assert sum(e.advance for e in events if isinstance(e, Progress)) == report.plan.nbytes
    assert sum(e.nbytes for e in events if isinstance(e, Progress)) == report.nbytes_moved < report.plan.nbytes


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull", "STORE", "s3://bucket/x"),
        ("pull", "STORE", "https://someone:hunter2hunter2@host/x"),
        ("merge", "STORE", "STORE", "--out", "https://someone:hunter2hunter2@host/x"),
    ],
)
def test_a_url_where_a_folder_belongs_is_a_usage_error(store: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code = "from rsmtdf_cli.app import main; main()"
    words = [str(store) if word == "STORE" else word for word in arguments]
    command = [sys.executable, "-c", code, "cache", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "is remote" in done.stderr
    assert "hunter2" not in done.stderr and not list(tmp_path.iterdir())


def test_a_file_url_names_a_folder(store: Path, tmp_path: Path) -> None:
    assert rsmtdf("cache", "pull", str(store), f"file://{tmp_path}/copy", "-q").returncode == 0
    assert equal(store, tmp_path / "copy")


def rsmtdf(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from rsmtdf_cli.app import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_commands_push_and_pull(store: Path, bucket: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "copy")
    pushed = rsmtdf("cache", "push", str(store), "s3://bucket/store", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["snapshot"] == FeatureStore.open(store).snapshot
    planned = rsmtdf("cache", "pull", "s3://bucket/store", copy, "--layer", "mean8", "--dry-run", "--json")
    assert json.loads(planned.stdout)["shards"] == 8
    pulled = rsmtdf("cache", "pull", "s3://bucket/store", copy, "--workers", "2")
    assert pulled.returncode == 0, pulled.stderr
    assert "copied 16 shards" in pulled.stdout and " kB of " in pulled.stderr
    assert equal(store, tmp_path / "copy")
    assert rsmtdf("cache", "pull", "s3://bucket/other", copy).returncode == 4
    assert rsmtdf("cache", "pull", "s3://bucket/store", copy, "--layer", "nix").returncode == 2
