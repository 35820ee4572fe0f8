"""Where a store is: a folder, or a URL of any file system that fsspec knows; and how to speak of it without secrets.

An ``Address`` may hold credentials (``https://user:password@…``, ``?sig=…``). They are used to connect and nowhere
else: ``str``, ``repr``, messages, records and folder names carry ``shown`` only.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from rsmtdf_cache.errors import UsageError, did_you_mean

__all__ = ["Address", "redact", "redact_typed"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SNAPSHOT = re.compile(r"@([0-9a-f]{8,64})$")
#: ``http://host:8000@SNAPSHOT``: no user, for the host would be a bare hex number.
_HOST_ONLY = re.compile(r"([\w.-]+(?::\d{1,5})?)@[0-9a-f]{8,64}")
#: A URL in a text. A password may hold blanks, quotes and slashes: with ``user:…`` all up to the line's last @ counts.
_URL = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/\s@:\[]*@|[^/\s@:\[]*:(?!\s|\d+(?:[/?#\s:@]|$)|\d*$)[^\n]*@)?[^\s'\"<>]*",
    re.MULTILINE,
)
_PAIR = re.compile(
    r"""((?:x-amz-[a-z-]+ | awsaccesskeyid | sig | signature | credential | authorization
        | [a-z_-]*(?:token | secret | password | passwd | api[_-]?key | access[_-]?key(?:[_-]?id)?))
        ['"]? \s* [=:] \s* ['"]? (?:(?:bearer|basic)\s+)?)
        [^\s&'",;<>)]+""",
    re.IGNORECASE | re.VERBOSE,
)
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|CREDENTIAL|SAS")
#: In these a name before ``@`` is a container, no user.
_CONTAINER_FIRST = {"abfs", "abfss", "adl", "az", "wasb", "wasbs"}
_HTTP = {"http", "https"}
_NO_USER = {"s3", "s3a", "gs", "gcs", "hf"}
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s:@\[\]]+)(?::\d*)?")
_HIDDEN = "***"


@dataclass(frozen=True, repr=False)
class Address:
    """A parsed place. ``location``: an absolute or relative path, or the URL without its query string."""

    scheme: str
    location: str
    query: str = ""
    snapshot: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Address:
        """Return the address written as ``text``: a path, ``file://``, or a URL; each may end in ``@SNAPSHOT``.

        A snapshot is 8 to 64 hex digits. A folder whose own name ends like that is taken for the folder.
        Raises ``UsageError`` (which never repeats a secret of ``text``).
        """
        text = str(text)
        if not text or "\0" in text:
            raise UsageError("an empty place for a store; give a folder or a URL such as s3://bucket/store")
        found = _SCHEME.match(text)
        if re.match(r"[^/?]*::", text) and "://" in text:
            raise UsageError(f"{redact_typed(text)}: chained URLs (with '::') are not supported; give the plain URL")
        if found is None or found[1].lower() in ("file", "local"):
            return cls._local(text, found)
        return cls._remote(text, found[1].lower(), redact_typed(text))

    @classmethod
    def _local(cls, text: str, found: re.Match[str] | None) -> Address:
        path = text[found.end() :] if found else text
        if found and not path.startswith("/"):
            raise UsageError(
                f"{redact_typed(text)!r}: write file:// with an absolute path (file:///data/store), or the plain path"
            )
        tail = _SNAPSHOT.search(path)
        if tail is None or tail.start() == 0 or os.path.lexists(path):
            return cls("file", path)
        return cls("file", path[: tail.start()], snapshot=tail[1])

    @classmethod
    def _remote(cls, text: str, scheme: str, shown: str) -> Address:
        _known_scheme(scheme)
        start = text.index("://") + 3
        netloc_end = min((i for i in (text.find(c, start) for c in "/?#") if i >= 0), default=len(text))
        tail = _SNAPSHOT.search(text, netloc_end)
        if tail is None and (short := _HOST_ONLY.fullmatch(text, start)):
            tail = _SNAPSHOT.search(text, short.end(1))
        body = text[: tail.start()] if tail else text
        if scheme in _HTTP and "#" in body:
            raise UsageError(f"{shown}: a store's URL has no fragment; write '#' in a name or password as %23")
        location, _, query = body.partition("?")
        host, _, path = location[start:].partition("/")
        if scheme in _NO_USER and ("@" in host or (":" in host and "@" in path)):
            raise UsageError(f"{shown}: credentials do not belong into a {scheme}:// URL; give them in the environment")
        if query and scheme not in _HTTP:
            raise UsageError(f"{shown}: only http:// and https:// URLs can have a query string")
        if not host:
            raise UsageError(f"{shown}: the URL names no host or bucket")
        if scheme in _HTTP and not _HOST_PORT.fullmatch(host.rpartition("@")[2]):
            raise UsageError(
                f"{shown}: the URL names no host, or the port is no number; a password has %2F %3F %23 %40 for / ? # @"
            )
        return cls(scheme, scheme + location[start - 3 :].rstrip("/"), query, tail[1] if tail else None)

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def is_remote(self) -> bool:
        return not self.is_local

    @property
    def is_http(self) -> bool:
        return self.scheme in _HTTP

    @property
    def path(self) -> Path:
        """The folder of a local address."""
        if not self.is_local:
            raise ValueError(f"{self.shown} is no folder")
        return Path(self.location)

    @property
    def shown(self) -> str:
        """The address for people and records: no user, password or query, with the snapshot."""
        place = self.location if self.is_local else _without_secrets(self.location)
        return place + (f"@{self.snapshot}" if self.snapshot else "")

    @property
    def digest(self) -> str:
        """Name of a cache folder for this store (16 hex digits), the same for every snapshot and every credential."""
        place = os.path.abspath(self.location) if self.is_local else _without_secrets(self.location)
        return hashlib.sha256(place.encode()).hexdigest()[:16]

    def url(self, name: str) -> str:
        """Return the full URL of the file ``name`` below the store. It may hold secrets: never show or keep it."""
        return f"{self.location}/{name}" + (f"?{self.query}" if self.query else "")

    def redact(self, text: str) -> str:
        """Return ``text`` without secrets: the general ones, and those of this address wherever they stand."""
        for secret in self._secrets():
            text = text.replace(secret, _HIDDEN)
        return redact(text)

    def _secrets(self) -> list[str]:
        if self.is_local:
            return []
        user = self.location.partition("://")[2].partition("/")[0].rpartition("@")[0]
        found = {self.query, *(value for _, value in parse_qsl(self.query))}
        found |= {part.partition("=")[2] for part in self.query.split("&")}
        if self.scheme not in _CONTAINER_FIRST:
            found |= {user, user.partition(":")[2]}
        found |= {unquote(s) for s in found}
        return sorted((s for s in found if len(s) >= 3), key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"

    __str__ = __repr__


def redact(text: str) -> str:
    """Return ``text`` (a message, a log line) without credentials: users and queries of URLs, ``token=…`` and the
    like, and the values of environment variables that hold secrets.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name) and not name.endswith(("_FILE", "_PATH", "_URI")):
            text = text.replace(value, _HIDDEN)
    text = _URL.sub(lambda found: _without_secrets(found[0]), text)
    return _PAIR.sub(lambda found: found[1] + _HIDDEN, text)


def redact_typed(text: str) -> str:
    """Return an address as a person typed it, right or wrong, for a message: all from ``://`` to the last ``@`` is
    hidden, and a query. An ``@SNAPSHOT`` stays where the rest cannot hold a secret.
    """
    scheme, found, rest = text.partition("://")
    tail = _SNAPSHOT.search(rest)
    if (
        tail is not None
        and "@" not in rest[: tail.start()]
        and re.fullmatch(r"[^:]*(:\d{1,5}(/[^:]*)?)?", rest[: tail.start()])
    ):
        rest, end = rest[: tail.start()], tail[0]
    else:
        before, at, rest = rest.rpartition("@")
        rest, end = (_HIDDEN + at if before else "") + rest, ""
    return redact(scheme) + found + rest.partition("?")[0] + end if found else redact(text)


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    rest = rest.partition("?")[0]
    if scheme.lower() in _HTTP:
        rest = rest.partition("#")[0]
    host, slash, path = rest.partition("/")
    if "@" not in host and "@" in path and not host.partition(":")[2].isdigit() and ":" in host:
        host, slash, path = rest.rpartition("@")[2].partition("/")  # a slash inside a password
    user, _, name = host.rpartition("@")
    if user and scheme.lower() in _CONTAINER_FIRST:
        name = f"{user.partition(':')[0]}@{name}"
    return f"{scheme}://{name}{slash}{path}"


def _known_scheme(scheme: str) -> None:
    from fsspec.registry import available_protocols

    known = available_protocols()
    if scheme not in known:
        usual = ["s3", "gs", "hf", "http", "https", "file"]
        hint = did_you_mean(scheme, usual)
        raise UsageError(f"{scheme}://: no such file system.{hint} Usual ones: {', '.join(usual)}, or a folder")
