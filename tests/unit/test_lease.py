"""The lease of a URL: one holder at a time, by the server's clock; what is lost is known before anything counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest

from rsmtdf_cache.bucket import lease
from rsmtdf_cache.bucket.lease import Lease, refuse_held
from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.names import LEASE
from rsmtdf_cache.share.transport import Transport, connect
from tests.servers import make_bucket, s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        make_bucket(endpoint, "bucket")
        yield


@pytest.fixture
def there(bucket: None, request: pytest.FixtureRequest) -> Transport:
    return connect(Address.parse(f"s3://bucket/{abs(hash(request.node.name))}"))


def body(there: Transport) -> dict[str, object]:
    found = there.tagged(LEASE)
    assert found is not None
    said: dict[str, object] = json.loads(found.data)
    return said


def test_one_holds_it_until_it_is_released(there: Transport) -> None:
    refuse_held(there)
    with Lease(there, "a") as first:
        first.check()
        with pytest.raises(ResourceError, match=r"a build on .+ writes there; its lease"), Lease(there, "b"):
            pass
        with pytest.raises(ResourceError, match="a build on"):
            refuse_held(there)
        first.check()
    assert body(there)["released"] is True
    refuse_held(there)
    with Lease(there, "b") as second:
        second.check()


def test_of_builders_that_begin_at_once_one_gets_it(there: Transport) -> None:
    held: list[int] = []
    refused: list[int] = []
    go = threading.Barrier(6)

    def take(number: int) -> None:
        go.wait()
        try:
            with Lease(there, f"home{number}"):
                held.append(number)
                over.wait(30)
        except ResourceError:
            refused.append(number)
            if len(refused) == 5:
                over.set()

    over = threading.Event()
    builders = [threading.Thread(target=take, args=(n,)) for n in range(6)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(held) == 1 and len(refused) == 5


def test_it_is_renewed_and_an_expired_one_is_taken_over(there: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    with Lease(there, "a") as first:
        time.sleep(3)
        first.check()
        assert body(there)["renewals"] != 0
        with pytest.raises(ResourceError, match="writes there"), Lease(there, "b"):
            pass
        first._over.set()  # as a process that is stopped: nothing is renewed
        first._thread.join()
        time.sleep(3.1)
        with Lease(there, "b") as second:
            with pytest.raises(ResourceError, match="lost its lease to a build on"):
                first.check()
            second.check()
    assert body(there)["home"] == "b" and body(there)["released"] is True, "who lost it does not release it"


def test_one_that_cannot_be_renewed_stops_counting_before_it_expires(
    there: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(lease, "_clock", lambda: now[0])
    with Lease(there, "a") as held:
        now[0] += 50
        held.check()
        monkeypatch.setattr(there, "replace", lambda *told: (_ for _ in ()).throw(ResourceError("cut")))
        held.check()
        now[0] += 11
        with pytest.raises(ResourceError, match="could not be renewed for 61 s"):
            held.check()
        monkeypatch.undo()
        monkeypatch.setattr(lease, "_clock", lambda: now[0])
        held.check()


def test_the_lease_of_a_build_that_died_on_this_machine_is_taken_at_once(
    there: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Lease(there, "a")
    dead._take()
    with Lease(there, "a") as mine:
        mine.check()
    dead = Lease(there, "a")
    dead._take()
    monkeypatch.setattr("socket.gethostname", lambda: "another")  # the same folder, seen through a network
    with pytest.raises(ResourceError, match="writes there"), Lease(there, "a"):
        pass


def test_one_that_cannot_be_read_holds_like_any_other_and_then_expires(
    there: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.put(LEASE, b"{")
    with pytest.raises(ResourceError, match="an unknown host"), Lease(there, "a"):
        pass
    monkeypatch.setattr(lease, "LEASE_S", 0.5)
    time.sleep(1.1)
    with Lease(there, "a") as mine:
        mine.check()
