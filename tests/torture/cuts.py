"""Connections cut in the middle of a pull, over HTTP and S3 in turn: the copy is complete and equal to the bit."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.share.pull import pull_store
from rsmtdf_cache.share.push import push_store
from tests.servers import cutting_proxy, make_bucket, s3_server, web_folder
from tests.torture.processes import ChildFailed, background, in_child
from tests.torture.scene import Scene, difference_here

__all__ = ["torture_cuts"]

_BUCKET = "torture"
_KEYS = {
    "AWS_ACCESS_KEY_ID": "torturekeytorture", "AWS_SECRET_ACCESS_KEY": "torturesecrettorture",
    "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
}  # fmt: skip


def torture_cuts(
    scene: Scene, folder: Path, count: int, rng: random.Random, tell: Callable[[], None]
) -> dict[str, Any]:
    """Cut ``count`` transfers and return what was seen.

    Most lose one to three connections and go on by themselves. In two of eight the line stays broken until the pull
    gives up; the same call then continues.
    """
    seen: dict[str, Any] = {
        "cuts": 0, "http": 0, "s3": 0, "connections_cut": 0, "given_up": 0, "losses": [], "silent": [], "errors": [],
    }  # fmt: skip
    sizes = [p.stat().st_size for p in scene.whole.rglob("*") if p.is_file()]
    with background(lambda: _bucket(scene.whole)) as endpoint:
        # A transfer in which chance put the cut behind the last byte is none, and is done again.
        for number in range(count * 4):
            if seen["cuts"] == count:
                break
            kind = ("http", "s3")[seen["cuts"] % 2]
            broken = seen["cuts"] % 8 in (3, 6)
            times = 10**6 if broken else rng.randint(1, 3)
            # HTTP: bytes of one answer. S3: bytes of one connection, which brings many objects.
            after = rng.randrange(rng.choice(sizes) if kind == "http" else sum(sizes) // 12)
            after = rng.randrange(400) if broken else after  # less than the first record, which so never arrives
            out = folder / f"c{number}"
            where = f"transfer {number}, {kind}, cut after {after} bytes"
            try:
                found = in_child(lambda: _transfer(kind, scene.whole, endpoint, out, after, times))  # noqa: B023
            except ChildFailed as error:
                seen["errors"].append(f"{where}: {error}")
                seen["cuts"] += 1
                continue
            finally:
                shutil.rmtree(out, ignore_errors=True)
            if not found["cut"]:
                continue
            seen["cuts"] += 1
            seen[kind] += 1
            seen["connections_cut"] += found["cut"]
            seen["given_up"] += found["given_up"]
            if found["difference"]:
                seen["silent"].append(f"{where}: {found['difference']}")
            tell()
    return seen


def _transfer(kind: str, whole: Path, endpoint: str, out: Path, after: int, times: int) -> dict[str, Any]:
    """Pull once over a line that is cut ``times`` times; when the pull gives up, mend the line and pull again."""
    return _over_http(whole, out, after, times) if kind == "http" else _over_s3(whole, endpoint, out, after, times)


def _over_http(whole: Path, out: Path, after: int, times: int) -> dict[str, Any]:
    with web_folder(whole) as server:
        server.cut_after, server.cuts_left = after, times

        def mend() -> int:
            done = times - server.cuts_left
            server.cuts_left = 0
            return done

        return _pull(server.url, whole, out, mend)


def _over_s3(whole: Path, endpoint: str, out: Path, after: int, times: int) -> dict[str, Any]:
    with cutting_proxy(endpoint) as proxy:
        proxy.cut_after, proxy.cuts_left = after, times
        os.environ |= _KEYS | {"AWS_ENDPOINT_URL": proxy.endpoint}

        def mend() -> int:
            proxy.cuts_left = 0
            return proxy.cuts_done

        return _pull(f"s3://{_BUCKET}/store", whole, out, mend)


def _pull(url: str, whole: Path, out: Path, mend: Callable[[], int]) -> dict[str, Any]:
    given_up = False
    try:
        pull_store(url, out)
    except ResourceError:
        given_up = True
    cut = mend()
    if given_up:
        pull_store(url, out)
    return {"cut": cut, "given_up": given_up, "difference": difference_here(out, whole)}


@contextmanager
def _bucket(whole: Path) -> Iterator[str]:
    """Serve the whole store from an S3 server; yield the server's endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as endpoint:
        make_bucket(endpoint, _BUCKET)
        push_store(whole, f"s3://{_BUCKET}/store")
        yield endpoint
