"""Manifests as JSON, and back.

    State ──encode──▶ canonical JSON, deflated ──▶ manifests/a1/a1c7...      named by the SHA-256 of these bytes
          ◀─decode──  with the values that many tasks share from blobs/

A file reference is the text `DIGEST:SIZE`. Fields with their default value are left out. Keys that this version does
not know are kept in `more`, so that they survive when a newer icm wrote them.
"""

from __future__ import annotations

import json
import re
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from registry.errors import DamagedStore
from registry.manifests import KINDS, File, Json, Part, State, Task

MAX_MANIFEST_BYTES = 1 << 24
_FILE = re.compile(r"([0-9a-f]{64}):(0|[1-9][0-9]{0,18})")
_FORMAT = 1
P = TypeVar("P", bound=Part)


class EncodedManifest(NamedTuple):
    """A manifest to be stored."""

    data: bytes
    documents: dict[str, bytes]  # digest -> bytes of the documents that it shares with other manifests
    body: dict[str, Any]  # its JSON


def encode(state: State) -> EncodedManifest:
    """Encode a manifest."""
    documents: dict[str, bytes] = {}
    body = {"type": f"{state.KIND}/{_FORMAT}", **_written(state, documents)}
    body.pop("manifest", None)
    return EncodedManifest(packed(body), documents, body)


def packed(value: object) -> bytes:
    """Return a JSON value as canonical text, deflated."""
    return zlib.compress(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode(), 9)


def unpacked(data: bytes, limit: int = MAX_MANIFEST_BYTES) -> Any:
    """Return the JSON value of deflated text; raise `DamagedStore` if it is none, or longer than `limit` bytes."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(data, limit)
        if not inflate.eof or inflate.unused_data:
            raise ValueError("truncated, too large, or followed by other bytes")
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, zlib.error, RecursionError) as error:
        raise DamagedStore(f"not a manifest: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


Shared = Callable[[type["Part"], "File"], Mapping[str, Any]]
"""Returns what `read_shared` returns for the document of a file, which has been verified."""


def read_shared(kind: type[Part], data: bytes) -> Mapping[str, Any]:
    """Return the values of the fields that a document has for the parts of a kind that share it."""
    known, body = _readers(kind), unpacked(data)
    return {name: known[name](value, _nothing_shared) for name, value in body.items() if name in kind.SHARED}


def _nothing_shared(kind: type[Part], file: File) -> Mapping[str, Any]:
    raise ValueError("a document refers to another one")


def decode(data: bytes, shared: Shared, digest: str | None = None) -> State:
    """Read a manifest.

    Args:
        data: Its bytes, which have been verified.
        shared: Returns the values that manifests share; see `read_shared`.
        digest: Its digest, which becomes `State.manifest`.

    Raises:
        DamagedStore: It is not a manifest of this format.
    """
    body = unpacked(data)
    try:
        kind, number = body.pop("type").split("/")
        if number != str(_FORMAT):
            raise DamagedStore(f"a manifest has format {number}; this icm reads format {_FORMAT}")
        return cast(State, _read_part(KINDS[kind], body, shared, manifest=digest))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedStore(f"not a manifest: {type(error).__name__} {error}") from error


USES = ("originals", "checkpoints", "generators", "codes", "extras", "vectors", "texts", "training", "manifests")
"""What files are for. A file with several uses counts for the first of them."""


def files_of(body: Any) -> Iterator[tuple[str, File]]:
    """Yield use and file of all bytes that the JSON of a manifest needs, except evicted weights.

    The network of a code is needed too: it has the use `generators`.
    """
    kind = body["type"].split("/")[0]
    if kind == Task.KIND:
        yield from _files_of_task(body)
    single, many = _FILES.get(kind, ((), ()))
    for use, name in single:
        if name in body:
            yield use, _file(body[name])
    for use, name in many:
        for file in body.get(name, ()):
            yield use, _file(file)


_FILES = {  # kind -> use and key of files, and of lists of files
    "task": ((("texts", "samples"), ("texts", "eval_data")), ()),
    "generator": ((("generators", "blob"), ("generators", "start")), ()),
    "run": ((("training", "weights"), ("training", "optimizer")), (("training", "codes"),)),
}


def _files_of_task(body: Any) -> Iterator[tuple[str, File]]:
    adapters = [("originals", body["final"]), *(("checkpoints", one) for one in body.get("checkpoints", ()))]
    for use, adapter in adapters:
        names = ("config", "card") if "evicted_at" in adapter else ("weights", "initial", "config", "card")
        yield from ((use, _file(adapter[name])) for name in names if name in adapter)
        yield from (("extras", _file(extra["blob"])) for extra in adapter.get("extras", ()))
        yield "manifests", _file(adapter["shared"])
    for vector in body.get("vectors", ()):
        yield "vectors", _file(vector["blob"])
        yield "manifests", _file(vector["shared"])
    if "code" in body:
        yield "codes", _file(body["code"]["blob"])
        yield "generators", _file(body["code"]["generator"])


def _file(text: str) -> File:
    match = _FILE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a file reference: {text[:80]!r}")
    return File(match[1], int(match[2]))


def _written(value: Any, documents: dict[str, bytes]) -> Any:
    """Return a value as JSON, without the fields that have their default values."""
    if isinstance(value, File):
        return f"{value}:{value.size}"
    if isinstance(value, Part):
        body = {
            one.name: _written(_as_declared(one, getattr(value, one.name)), documents)
            for one in fields(value)
            if one.name != "more" and getattr(value, one.name) != _default(one)
        }
        if value.SHARED:
            common = packed({name: body.pop(name) for name in value.SHARED if name in body})
            digest = _sha256(common)
            documents[digest] = common
            body["shared"] = f"{digest}:{len(common)}"
        return {**value.more, **body}
    if isinstance(value, (tuple, list)):
        return [_written(one, documents) for one in value]
    if isinstance(value, Mapping):
        return {key: _written(one, documents) for key, one in value.items()}
    return value


def _as_declared(one: Any, value: Any) -> Any:
    """Return a `File` as a plain digest if the field declares one."""
    return str(value) if isinstance(value, File) and "File" not in one.type else value


def written(part: Part) -> dict[str, Any]:
    """Return a part without shared fields as JSON."""
    return cast(dict[str, Any], _written(part, {}))


def read(kind: type[P], body: Json) -> P:
    """Read such a part again; raises `ValueError` or `TypeError` if the JSON does not fit."""
    return cast(P, _read_part(kind, body, _nothing_shared))


def _sha256(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def _default(one: Any) -> Any:
    """Return the default of a field; none that depends on the time counts."""
    if one.default is not MISSING:
        return one.default
    if one.default_factory in (dict, tuple):
        return one.default_factory()
    return MISSING


def _read_part(kind: type[Part], body: Any, shared: Shared, **given: Any) -> Part:
    body = dict(body)
    common = shared(kind, _file(body.pop("shared"))) if kind.SHARED else {}
    known = _readers(kind)
    values = {name: known[name](body.pop(name), shared) for name in list(body) if name in known}
    return kind(**common, **values, **given, more=body)


_Reader = Callable[[Any, Shared], Any]


_READERS: dict[type[Part], dict[str, _Reader]] = {}


def _readers(kind: type[Part]) -> dict[str, _Reader]:
    """Return what reads each field of a part from JSON, and raises `ValueError` or `TypeError` if it does not fit."""
    if kind not in _READERS:
        hints = get_type_hints(kind)
        names = {one.name for one in fields(kind)} - {"more", "manifest"}
        _READERS[kind] = {name: _reader(hints[name]) for name in names}
    return _READERS[kind]


def _reader(hint: Any) -> _Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is File:
        return lambda value, shared: _file(value)
    if isinstance(hint, type) and issubclass(hint, Part):
        return lambda value, shared: _read_part(hint, value, shared)
    if origin in (Union, types.UnionType):  # of a type and None
        (inner,) = (one for one in arguments if one is not type(None))
        read = _reader(inner)
        return lambda value, shared: None if value is None else read(value, shared)
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            readers = [_reader(one) for one in arguments]
            return lambda value, shared: tuple(read(one, shared) for read, one in zip(readers, value, strict=True))
        read_one = _reader(arguments[0])
        return lambda value, shared: tuple([read_one(one, shared) for one in _checked(value, list)])
    if origin is Literal:
        return lambda value, shared: arguments[arguments.index(value)]
    if hint is float:
        return lambda value, shared: float(_checked(value, int, float))
    if origin is not None and issubclass(origin, Mapping):
        return lambda value, shared: _checked(value, dict)
    return lambda value, shared: _checked(value, hint)


def _checked(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:80]!r} is not {kinds[-1].__name__}")
    return value
