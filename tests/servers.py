"""Real servers on loopback for tests of sharing: a web server with ranges, an S3 server, a proxy that cuts lines."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

__all__ = ["CuttingProxy", "WebFolder", "cutting_proxy", "make_bucket", "s3_server", "web_folder"]


@dataclass
class WebFolder:
    """A served folder and what was asked of it. The knobs may be turned while it runs."""

    root: Path
    url: str = ""
    ranges: bool = True  # False: ignores Range, as plain servers do
    page: bytes = b""  # answer everything with this and 200
    endless: str = ""  # a path whose answer never ends
    cut_after: int = 0  # bytes of a body after which the connection is cut; 0 = never
    cuts_left: int = 0
    cut_on: str = ""  # only where this is in the path
    stubborn: bool = False  # a request from the middle of a file gets nothing
    status: int = 0  # answer everything with this
    fail_on: str = ""  # answer 503 where this is in the path
    pause_s: float = 0.0  # before each answer
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # path, Authorization, first byte
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_cut(self, nbytes: int) -> bool:
        """Whether the answer of ``nbytes`` now is to be cut."""
        with self.lock:
            if not self.cuts_left or nbytes <= self.cut_after:
                return False
            self.cuts_left -= 1
            return True


@contextmanager
def web_folder(root: Path) -> Iterator[WebFolder]:
    """Serve ``root`` read only on a free port of loopback."""
    folder = WebFolder(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = urlsplit(self.path).path.lstrip("/")
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            with folder.lock:
                folder.requests.append(
                    (self.path, self.headers.get("Authorization", ""), int(asked[1]) if asked else 0)
                )
            time.sleep(folder.pause_s)
            failing = 503 if folder.fail_on and folder.fail_on in self.path else 0
            if folder.status or failing or (folder.stubborn and asked and int(asked[1])):
                self._head(folder.status or failing or 503, 0)
                return
            if folder.page:
                self._head(200, len(folder.page))
                self.wfile.write(folder.page if body else b"")
                return
            if folder.endless and path == folder.endless:
                self._endless()
                return
            place = folder.root / path
            if not place.is_file():
                self._head(404, 0)
                return
            data = place.read_bytes()
            if asked and folder.ranges:
                start, last = int(asked[1]), int(asked[2]) if asked[2] else len(data) - 1
                if start >= len(data):
                    self._head(416, 0)
                    return
                part = data[start : last + 1]
                self._head(206, len(part), f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            else:
                part = data
                self._head(200, len(part))
            if not body:
                return
            if folder.cut_on in path and folder.take_cut(len(part)):
                part = part[: folder.cut_after]
                self.close_connection = True
            with suppress(OSError):
                self.wfile.write(part)
                self.wfile.flush()
            folder.sent += len(part)
            if self.close_connection:
                time.sleep(0.05)  # the client takes what was sent before it notices
                self.connection.shutdown(socket.SHUT_RDWR)

        def _head(self, status: int, nbytes: int, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(nbytes))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

        def _endless(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 2**16)
                    folder.sent += 2**16

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    folder.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield folder
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run moto's S3 server on a free port and point this process (and its children) to it; yield its endpoint."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testkeytestkey",
        "AWS_SECRET_ACCESS_KEY": "verysecretsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()  # its buckets belong to the process
    try:
        yield endpoint
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> None:
    """Make an empty bucket."""
    import boto3

    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=name)


@dataclass
class CuttingProxy:
    """A TCP proxy that cuts a connection once so many bytes came back through it.

    ``swallow``: what came back last is not passed on, so that an answer is lost. ``busy_left``: so many connections get
    503 instead of the server.
    """

    endpoint: str = ""
    cut_after: int = 0
    cuts_left: int = 0
    cuts_done: int = 0
    swallow: bool = False
    busy_left: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cut_now(self, passed: int) -> bool:
        """Whether a connection that has brought ``passed`` bytes is to be cut."""
        with self.lock:
            if not self.cuts_left or passed < self.cut_after:
                return False
            self.cuts_left -= 1
            self.cuts_done += 1
            return True


@contextmanager
def cutting_proxy(endpoint: str) -> Iterator[CuttingProxy]:
    """Run a proxy in front of ``endpoint`` (``http://host:port``)."""
    upstream = urlsplit(endpoint)
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = CuttingProxy(f"http://127.0.0.1:{listener.getsockname()[1]}")

    def pump(source: socket.socket, sink: socket.socket, count: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(2**14):
                passed += len(data)
                cut = count and proxy.cut_now(passed)
                if not (cut and proxy.swallow):
                    sink.sendall(data)
                if cut:
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        if proxy.busy_left > 0:
            proxy.busy_left -= 1
            with closing(client):
                client.recv(2**16)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        with closing(client), socket.create_connection((str(upstream.hostname), upstream.port or 80)) as server:
            back = threading.Thread(target=pump, args=(server, client, True), daemon=True)
            back.start()
            pump(client, server, False)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.close()
