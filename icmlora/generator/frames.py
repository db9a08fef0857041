"""The frames of a generator file: which versions it has, what codes call each, and where its bytes are. Without torch.

    one version     ICMG 2 | length of header (4) | header: JSON, zlib | range-coded words | check (8)
    several         ICMG 3 | version | version | ...
    each of them    kind (1) | base (2) | length of content (4) | content | check (8)

A file grows at its end and nowhere else. The first version is a file of one version as it was; a further one is a
network of its own (the content is such a file again), or the differences of its parameters to those of the version
`base`. The check is the beginning of the SHA-256 of everything before it, from the beginning of the file.

A version is called by the SHA-256 of the file of which it was the last. The file that has grown still tells that
digest, so a code goes on naming the very bytes it was made under, and they go on giving the same network.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.code import inflate
from icmlora.generator.config import GeneratorConfig
from icmlora.io.checksum import CHECKSUM_SIZE, add_checksum, checked

MAGIC, MAGIC_OF_VERSIONS = b"ICMG\x02", b"ICMG\x03"
_START = len(MAGIC) + 4
_HEADER_LIMIT = 1 << 20
_FRAME = struct.Struct("<BHI")
_NETWORK, _DIFFERENCES = 0, 1
_MOST = 1 << 16
_DAMAGED = "the generator file is damaged or cut short"


@dataclass(frozen=True)
class StoredVersion:
    """One version of a generator file."""

    digest: str
    """SHA-256 of the file of which it was the last, in hexadecimal: what its codes name."""
    config: GeneratorConfig
    base: int | None
    """Number of the version that its parameters are stored as differences to; None where it is a network of its own."""
    content: bytes
    """A file of one version, or the range-coded words of the differences."""


def versions_of(data: bytes) -> tuple[StoredVersion, ...]:
    """Take a generator file apart, oldest version first. No network is opened.

    Raises:
        GeneratorError: Not a generator file, of a newer format, damaged or cut short.
    """
    if not data.startswith(MAGIC_OF_VERSIONS):
        return (StoredVersion(hashlib.sha256(data).hexdigest(), config_in(split_network(data)[0]), None, data),)
    versions: list[StoredVersion] = []
    for digest, base, content in _frames(data):
        if base is None:
            config = config_in(split_network(content)[0])
            # The first version was a file of one version once, and is called as that was.
            digest = digest if versions else hashlib.sha256(content).hexdigest()
        elif base < len(versions):
            config = versions[base].config
        else:
            raise GeneratorError("a version of the generator is stored as differences to a later one")
        if versions and config.base_model != versions[0].config.base_model:
            raise GeneratorError("the versions of the generator are of different base models")
        versions.append(StoredVersion(digest, config, base, content))
    if len(versions) < 2:
        raise GeneratorError(_DAMAGED)
    return tuple(versions)


def append_version(data: bytes, content: bytes, base: int | None) -> bytes:
    """Return a generator file with one version more; all it had stays as it is.

    Args:
        data: The file.
        content: A file of one version, or with `base` the words of the differences to that version.
        base: Number of a version of the file.

    Raises:
        GeneratorError: The file has as many versions as there can be.
    """
    if len(versions_of(data)) >= _MOST:
        raise GeneratorError("the generator has too many versions", hint="`icm train` makes one version of them")
    before = data if data.startswith(MAGIC_OF_VERSIONS) else _framed(MAGIC_OF_VERSIONS, data, None)
    return _framed(before, content, base)


def split_network(data: bytes) -> tuple[dict[str, object], bytes]:
    """Take a file of one version apart into its header and its words.

    Raises:
        GeneratorError: Not a generator file, of a newer format, damaged or cut short.
    """
    if not data.startswith(MAGIC):
        raise GeneratorError("not a generator file, or of another format")
    content = checked(data)
    if content is None or len(content) < _START:
        raise GeneratorError(_DAMAGED)
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    try:
        header = dict(json.loads(inflate(content[_START : _START + length], 2, _HEADER_LIMIT)))
    except (CodeError, ValueError, TypeError, RecursionError) as error:
        raise GeneratorError("the generator's header is damaged") from error
    return header, content[_START + length :]


def config_in(header: dict[str, object]) -> GeneratorConfig:
    """Return the configuration that the header of a file of one version holds.

    Raises:
        GeneratorError: It holds none.
    """
    return GeneratorConfig.from_json(str(header.get("config", "")))


def _framed(before: bytes, content: bytes, base: int | None) -> bytes:
    kind = _NETWORK if base is None else _DIFFERENCES
    return add_checksum(before + _FRAME.pack(kind, base or 0, len(content)) + content)


def _frames(data: bytes) -> Iterator[tuple[str, int | None, bytes]]:
    """Yield digest of the file up to here, base and content of each version."""
    sofar, at = hashlib.sha256(MAGIC_OF_VERSIONS), len(MAGIC_OF_VERSIONS)
    while at < len(data):
        if at + _FRAME.size > len(data):
            raise GeneratorError(_DAMAGED)
        kind, base, length = _FRAME.unpack_from(data, at)
        content = data[at + _FRAME.size : at + _FRAME.size + length]
        end = at + _FRAME.size + length + CHECKSUM_SIZE
        sofar.update(data[at : end - CHECKSUM_SIZE])
        if end > len(data) or data[end - CHECKSUM_SIZE : end] != sofar.digest()[:CHECKSUM_SIZE]:
            raise GeneratorError(_DAMAGED)
        if kind not in (_NETWORK, _DIFFERENCES) or (kind == _NETWORK and base):
            raise GeneratorError("a version of the generator is of a newer kind")
        sofar.update(data[end - CHECKSUM_SIZE : end])
        yield sofar.hexdigest(), base if kind == _DIFFERENCES else None, content
        at = end
