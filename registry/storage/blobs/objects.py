"""Blobs in an object store: S3 and what speaks its protocol, Google Cloud Storage, or Azure.

    s3://BUCKET/PREFIX/blobs/3/3f9a...     named as in a folder, so that one can be copied to the other; manifests/ too
    s3://BUCKET/PREFIX/quarantine/...      damaged blobs that were moved aside
    s3://BUCKET/PREFIX/owner               whose blobs these are
    s3://BUCKET/PREFIX/clock               written to learn the time of the server

    bytes ──▶ one object, whole or not at all ──▶ its MD5 by the server is right, or it is read back ──▶ durable

A name always means the same bytes, so writing needs no condition, and a failed batch deletes nothing: another process
may have written the same object, and refer to it. Unreferenced objects are pruned.

Locks live in the database, whose server may grant a lock to another process while a slow one is still deleting. So
only objects written at least a day ago are deleted, after another look, and writing bytes that exist makes them new
again.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser, Error as ConfigError
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from io import BufferedReader, RawIOBase
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from registry.errors import NotAStore, StoreUnavailable
from registry.files import Bytes, failpoint, store_errors
from registry.manifests import is_digest
from registry.storage.blobs.backend import RECOVER, BlobInfo, Leftover
from registry.storage.paths import Namespace

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ATTEMPTS = 3
_PART = 8 << 20  # bytes that are sent, and sent again, together
_CHUNK = 1 << 20
# Seconds: without a byte; of one request with its answer; of a request with all that repeat it.
_SILENCE, _MAX_REQUEST, _DEADLINE = 30, 900, 60
_ADDRESS = re.compile(r"(?P<scheme>s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._=+-]+)*/?")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_PROFILES = {"config": "AWS_CONFIG_FILE", "credentials": "AWS_SHARED_CREDENTIALS_FILE"}
_OF_PROFILE = ("access_key_id", "secret_access_key", "session_token", "region", "endpoint_url")
_DIGITS = "0123456789abcdef"
_OWNER, _CLOCK = "owner", "clock"
# Of a server's answer: the request that it repeats may hold the number of a key.
_STATUS, _CODE = re.compile(r"status code: (\d{3}[ A-Za-z]*)"), re.compile(r"<Code>(\w+)</Code>")
_RIGHTS_HINT = "check that the credentials allow reading, writing, listing and deleting"
_AWAY_HINT = "run the command again once it can be reached; the store refers to no incomplete file"


_forked: list[int] = []
# The client's threads are not in the copy: any call there would block forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(os.getpid()))


class _Missing(FileNotFoundError):
    """There is no such object, although its bucket is there."""


class _Status(NamedTuple):
    size: int
    modified: float
    mark: str  # what the server calls the content, mostly its MD5


class ObjectBackend:
    """The blobs below one prefix of a bucket.

    Args:
        store: A store of obstore, which begins at the prefix.
        url: What people call it.
        owner: The number of the store whose blobs these are.
        namespace: Blobs, or manifests.
    """

    is_remote = True
    grace = 24 * 3600.0

    def __init__(self, store: Any, url: str, owner: str, namespace: Namespace = "blobs") -> None:
        self._store, self._owner, self._namespace = store, owner, namespace
        self._url = self.home = url.rstrip("/")
        self._is_confirmed = False  # that it is the owner's
        self._ahead: float | None = None  # the server's time less this machine's count of seconds

    def _name(self, digest: str) -> str:
        """Return the name of a file. Only here does a digest become one; raise `ValueError` if it is none."""
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return f"{self._namespace}/{digest[0]}/{digest}"

    def check_free(self) -> None:
        """Raise unless a new store can have its blobs here; this writes the object that `now` writes.

        Raises:
            NotAStore: It is another store's.
        """
        with self._errors(_OWNER):
            is_owned = self._status(_OWNER) is not None
        if is_owned:
            raise self._not_mine()
        self._send(_CLOCK, b"")

    def claim(self) -> None:
        """Make this the place of the store's blobs: two stores that shared it would prune each other's.

        Raises:
            NotAStore: It is another store's.
        """
        with self._errors(_OWNER), suppress(AlreadyExistsError):
            obstore.put(self._store, _OWNER, self._owner.encode(), mode="create", use_multipart=False)
        self._check_owner()

    def now(self) -> float:
        """Return the server's time, to a second; this machine's clock may be wrong, or jump."""
        self._confirm()
        if self._ahead is None:
            self._send(_CLOCK, b"")
            # Servers drop the fraction, and an object written in this second must not be newer than now.
            self._ahead = self._known(_CLOCK).modified + 1 - time.monotonic()
        return self._ahead + time.monotonic()

    @contextmanager
    def batch(self) -> Iterator[ObjectBatch]:
        """Begin a batch; see `BlobBackend.batch`."""
        yield ObjectBatch(self)
        failpoint("blobs-durable")

    def put(self, digest: str, data: Bytes) -> bool:
        """Write an object, and return whether these bytes were not there. They are young afterwards."""
        name, mark = self._name(digest), _mark_of(data)
        self._confirm()
        with self._errors(name):
            found = self._status(name)
            is_there = found is not None and (found.size, found.mark) == (len(data), mark)
            if found is not None and is_there and self.now() - found.modified < self.grace / 2:
                return False
            for _ in range(_ATTEMPTS):
                # Servers that encrypt call it by something else than its MD5.
                if self._send(name, data) == mark or self._holds(name, data):
                    break
            else:
                place = self.place(digest)
                raise StoreUnavailable(
                    f"{place} does not contain the bytes that were sent", path=place, hint=_AWAY_HINT
                )
        failpoint("blob-renamed")
        return not is_there

    def get(self, digest: str) -> BinaryIO:
        """Open an object for reading, as it comes."""
        name = self._name(digest)
        with self._errors(name):
            try:
                answer = obstore.get(self._store, name)
            except FileNotFoundError:
                raise self._missing(name) from None
            body = _Body(answer.stream(min_chunk_size=_CHUNK), answer.meta["size"], partial(self._errors, name))
        return cast(BinaryIO, BufferedReader(body, _CHUNK))

    def exists(self, digest: str) -> bool:
        """Return whether the object exists."""
        name = self._name(digest)
        with self._errors(name):
            if self._status(name) is not None:
                return True
            self._missing(name)
            return False

    def size(self, digest: str) -> int:
        """Return the length of an object."""
        return self._known(self._name(digest)).size

    def all(self) -> Iterator[BlobInfo]:
        """Yield every object that is named by a digest, one complete first digit at a time."""
        self._confirm()
        with ThreadPoolExecutor(len(_DIGITS)) as pool:
            for found in pool.map(self._listed, _DIGITS):
                yield from found

    def delete(self, digest: str, *, newest: float = math.inf) -> int:
        """Delete an object unless it has been written after `newest`."""
        name = self._name(digest)
        self._confirm()
        with self._errors(name):
            found = self._status(name)
            if found is None or found.modified > newest:
                return 0
            obstore.delete(self._store, name)
        failpoint("blob-unlinked")
        return found.size

    def sync_deletions(self, digests: Iterable[str]) -> None:
        """Do nothing: a bucket has deleted an object when it answers."""

    def quarantine(self, digest: str) -> str:
        """Copy an object to the quarantine, then delete it."""
        name, aside = self._name(digest), f"quarantine/{digest}.{uuid4().hex[:8]}"
        with store_errors(self.place(digest)), self._errors(name):
            size = self._known(name).size
            obstore.copy(self._store, name, aside)
            if self._known(aside).size != size:
                raise OSError("the copy is incomplete")
            obstore.delete(self._store, name)
        return f"{self._url}/{aside}"

    def leftovers(self, *, aside: bool = False) -> Iterator[Leftover]:
        """Yield the objects in quarantine; killed writers leave nothing, since objects appear whole."""
        if aside:
            for name, size, modified in self._objects("quarantine"):
                yield Leftover(f"{self._url}/{name}", size, modified, partial(self._remove, name))

    def place(self, digest: str) -> str:
        """Return the address of an object."""
        return f"{self._url}/{self._name(digest)}"

    def _remove(self, name: str) -> None:
        with self._errors(name):
            obstore.delete(self._store, name)

    def _send(self, name: str, data: Bytes) -> str:
        """Write an object and return what the server calls its content."""
        with self._errors(name):
            is_large = len(data) > _PART
            return _unquoted(obstore.put(self._store, name, data, use_multipart=is_large, chunk_size=_PART)["e_tag"])

    def _status(self, name: str) -> _Status | None:
        try:
            found = obstore.head(self._store, name)
        except FileNotFoundError:
            return None
        return _Status(found["size"], found["last_modified"].timestamp(), _unquoted(found["e_tag"]))

    def _known(self, name: str) -> _Status:
        """Return what the server says of an object; raise `FileNotFoundError` if it is not there."""
        with self._errors(name):
            found = self._status(name)
            if found is None:
                raise self._missing(name)
            return found

    def _holds(self, name: str, data: Bytes) -> bool:
        """Read an object back and return whether it has exactly these bytes."""
        with self._errors(name):
            view, at = memoryview(data), 0
            for chunk in obstore.get(self._store, name).stream(min_chunk_size=_CHUNK):
                if bytes(view[at : at + len(chunk)]) != bytes(chunk):
                    return False
                at += len(chunk)
            return at == len(view)

    def _missing(self, name: str) -> _Missing:
        """Return the error for an object that is missing; raise if its bucket is, for which servers say the same."""
        self._check_owner()
        return _Missing(f"{self._url}/{name}")

    def _confirm(self) -> None:
        """Make sure, once, that this is the place of the store's blobs."""
        if not self._is_confirmed:
            self._check_owner()
            self._is_confirmed = True

    def owner(self) -> str:
        """Return the number of the store whose place this is."""
        with self._errors(_OWNER):
            try:
                return bytes(obstore.get(self._store, _OWNER).bytes()).decode(errors="replace")
            except FileNotFoundError:
                hint = "check the address, and that the bucket was not emptied"
                raise StoreUnavailable(f"no icm blobs at {self._url}", path=self._url, hint=hint) from None

    def _check_owner(self) -> None:
        if self.owner() != self._owner:
            raise self._not_mine()

    def _not_mine(self) -> NotAStore:
        return NotAStore(
            f"{self._url} holds the blobs of another store", hint=f"choose another bucket or prefix, or {RECOVER}"
        )

    def _listed(self, digit: str) -> list[BlobInfo]:
        found = (
            BlobInfo(name.rpartition("/")[2], size, modified)
            for name, size, modified in self._objects(f"{self._namespace}/{digit}")
        )
        return sorted((blob for blob in found if is_digest(blob.digest)), key=lambda blob: blob.digest)

    def _objects(self, prefix: str) -> list[tuple[str, int, float]]:
        """Return name, size and time of all objects directly below a prefix."""
        with self._errors(prefix):
            found = [
                (entry["path"], entry["size"], entry["last_modified"].timestamp())
                for page in obstore.list(self._store, prefix)
                for entry in page
            ]
        return [entry for entry in found if entry[0].rpartition("/")[0] == prefix]

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn what obstore raises into errors of the store, but for a missing object."""
        place = f"{self._url}/{name}"
        if _forked:
            fact = f"{place} cannot be used in a forked process after its parent used an object store"
            raise StoreUnavailable(fact, path=place, hint='start the other process with "spawn" instead of "fork"')
        try:
            yield
        except _Missing:
            raise
        except (BaseError, OSError, ValueError) as error:
            text = str(error).partition("\n\nDebug source")[0]
            told = ": ".join(match[1] for match in (_STATUS.search(text), _CODE.search(text)) if match)
            # Without credentials, the answer is of no kind that the client knows.
            is_refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or told[:3] in ("401", "403")
            fact = told or text.partition("<")[0].rpartition(" - ")[2].strip()[:200]
            hint = _RIGHTS_HINT if is_refused else _AWAY_HINT
            raise StoreUnavailable(f"{place}: {fact}", path=place, hint=hint) from None


def connect(url: str, owner: str, namespace: Namespace = "blobs") -> ObjectBackend:
    """Return what keeps blobs at an address such as `s3://BUCKET/PREFIX`. Nothing is sent yet.

    Credentials are those that the environment has, or the machine, or the profile of `AWS_PROFILE` in ~/.aws.

    Raises:
        NotAStore: It is no such address, or holds a password.
    """
    match = _ADDRESS.fullmatch(url)
    if match is None:
        hint = "use s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, without credentials"
        raise NotAStore("this is not the address of an object store", hint=hint)
    config = _profile() if match["scheme"] == "s3" else {}
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS)), config.get("aws_endpoint_url", ""))
    options: Any = {
        "allow_http": endpoint.startswith("http://"),  # only if the user wrote http
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=_SILENCE),
        "timeout": timedelta(seconds=_MAX_REQUEST),
    }
    backoff: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=_DEADLINE), "backoff": backoff}
    given: Any = config or None
    return ObjectBackend(from_url(url, config=given, client_options=options, retry_config=retry), url, owner, namespace)


def _profile() -> dict[str, str]:
    """Return the settings of a profile in ~/.aws that the environment does not set."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    name, found = os.environ.get("AWS_PROFILE") or "default", dict[str, str]()
    sections = {"config": name if name == "default" else f"profile {name}", "credentials": name}
    for file, section in sections.items():
        parser = ConfigParser(interpolation=None)
        with suppress(OSError, ConfigError, RuntimeError):  # no file, none that can be read, no home
            parser.read(os.environ.get(_PROFILES[file]) or Path.home() / ".aws" / file, encoding="utf-8")
            found |= parser[section] if parser.has_section(section) else {}
    asked = {key.removeprefix("aws_"): value for key, value in found.items()}
    return {f"aws_{key}": asked[key] for key in _OF_PROFILE if key in asked and f"AWS_{key.upper()}" not in os.environ}


class ObjectBatch:
    """Objects that manifests may refer to once the batch ends; each is durable as soon as it is written."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend, self._lock, self._put = backend, Lock(), set[str]()

    def put(self, digest: str, data: Bytes) -> bool:
        """Write an object, once for a batch."""
        with self._lock:
            if digest in self._put:
                return False
            self._put.add(digest)
        return self._backend.put(digest, data)


class _Body(RawIOBase):
    """The bytes of an object as they come from the network; raise if they end too early."""

    def __init__(self, chunks: Any, size: int, errors: Any) -> None:
        self._chunks, self._left, self._errors = iter(chunks), size, errors
        self._chunk = memoryview(b"")

    def readable(self) -> bool:
        """Return True (hook of `RawIOBase`)."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with the next bytes."""
        if not self._chunk:
            self._chunk = memoryview(self._next())
        target = memoryview(buffer)
        count = min(len(target), len(self._chunk))
        target[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def readall(self) -> bytes:
        """Read the rest without copying it piece by piece."""
        return b"".join([self._chunk, *iter(self._next, b"")])

    def _next(self) -> bytes:
        with self._errors():
            chunk = bytes(next(self._chunks, b""))
            self._left -= len(chunk)
            if not chunk and self._left:
                raise OSError("the response ended early")
        return chunk


def _mark_of(data: Bytes) -> str:
    """Return the ETag that S3 servers give some bytes: their MD5, or the MD5 of the MD5s of their parts."""
    view = memoryview(data)
    parts = [hashlib.md5(view[at : at + _PART], usedforsecurity=False) for at in range(0, max(1, len(view)), _PART)]
    if len(parts) == 1:
        return parts[0].hexdigest()
    whole = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(parts)}"


def _unquoted(mark: str | None) -> str:
    return (mark or "").strip('"')
