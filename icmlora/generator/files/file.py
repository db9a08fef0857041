"""The frames of a generator file: its versions, their names in codes, and their bytes.

    one version     ICMG 4 | length of header (4) | header: JSON, zlib | words | checksum (8)
    several         ICMG 5 | version | version | ...
    each of them    kind (1) | base (2) | length of content (4) | content | checksum (8)

A file only ever grows at its end. Its first version is a file of one version, unchanged. A further version is either a
full network (its content is again such a file), or the differences of its parameters from version `base`. A version's
checksum covers everything before it, from the beginning of the file.

A version's name is the SHA-256 of the file when this version was its last. The digest can still be computed after the
file has grown, so a code still names the very bytes it was made under, and they decode it as before.

This module does not import torch: listing generators needs no network (`network_file` reads one).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.files.container import CHECKSUM_SIZE, add_checksum, check_magic, inflate, open_container

MAGIC, MAGIC_OF_VERSIONS = b"ICMG\x04", b"ICMG\x05"
_HEADER_LIMIT = 1 << 20  # largest header, in bytes
_FRAME = struct.Struct("<BHI")  # kind, base and length of content in front of each version
_NETWORK, _DIFFERENCES = 0, 1  # kinds of versions
_MAX_VERSIONS = 1 << 16  # the range of `base`
_DAMAGED = "the generator file is damaged or truncated"


@dataclass(frozen=True)
class StoredVersion:
    """One version in a generator file."""

    digest: str  # SHA-256, in hexadecimal, of the file that ended with this version; its codes name it
    config: GeneratorConfig
    # Number of the version that its parameters are stored as differences from; None for a full network.
    base: int | None
    content: bytes  # a file of one version, or the words of the differences


def versions_of(data: bytes) -> tuple[StoredVersion, ...]:
    """Split a generator file into its versions, oldest first; raise `GeneratorError` if it is damaged."""
    if not data.startswith(MAGIC_OF_VERSIONS):
        return (StoredVersion(hashlib.sha256(data).hexdigest(), config_in(split_network(data)[0]), None, data),)
    versions: list[StoredVersion] = []
    for digest, base, content in _frames(data):
        if base is None:
            config = config_in(split_network(content)[0])
            # The first version was a file of its own before the file grew, and keeps its name from then.
            digest = digest if versions else hashlib.sha256(content).hexdigest()
        elif base < len(versions):
            config = versions[base].config
        else:
            raise GeneratorError("a version of the generator is stored as a delta to a later one")
        if versions and config.base_model != versions[0].config.base_model:
            raise GeneratorError("the versions of the generator have different base models")
        versions.append(StoredVersion(digest, config, base, content))
    if len(versions) < 2:
        raise GeneratorError(_DAMAGED)
    return tuple(versions)


def append_version(data: bytes, content: bytes, base: int | None) -> bytes:
    """Return a generator file with one more version; raise `GeneratorError` if it has too many."""
    # content: a file of one version, or with `base` the words of the differences from that version.
    if len(versions_of(data)) >= _MAX_VERSIONS:
        raise GeneratorError(
            "the generator has too many versions", hint="run `icm train` to merge them into one version"
        )
    before = data if data.startswith(MAGIC_OF_VERSIONS) else _framed(MAGIC_OF_VERSIONS, data, None)
    return _framed(before, content, base)


def split_network(data: bytes) -> tuple[dict[str, object], bytes]:
    """Split a file of one version into its header and its words."""
    check_magic(data, MAGIC, "generator", GeneratorError)
    opened = open_container(data, len(MAGIC))
    if opened is None:
        raise GeneratorError(_DAMAGED)
    packed, words = opened
    try:
        return dict(json.loads(inflate(packed, 2, _HEADER_LIMIT))), words
    except (CodeError, ValueError, TypeError, RecursionError) as error:
        raise GeneratorError("the generator's header is damaged") from error


def config_in(header: dict[str, object]) -> GeneratorConfig:
    """Return the configuration in the header of a file of one version."""
    return GeneratorConfig.from_json(str(header.get("config", "")))


def _framed(before: bytes, content: bytes, base: int | None) -> bytes:
    kind = _NETWORK if base is None else _DIFFERENCES
    return add_checksum(before + _FRAME.pack(kind, base or 0, len(content)) + content)


def _frames(data: bytes) -> Iterator[tuple[str, int | None, bytes]]:
    """Yield each version's digest of the file up to its end, its base and its content."""
    # One running SHA-256 gives all digests and checksums in a single pass over the file.
    sha, begin = hashlib.sha256(MAGIC_OF_VERSIONS), len(MAGIC_OF_VERSIONS)
    while begin < len(data):
        if begin + _FRAME.size > len(data):
            raise GeneratorError(_DAMAGED)
        kind, base, length = _FRAME.unpack_from(data, begin)
        content = data[begin + _FRAME.size : begin + _FRAME.size + length]
        end = begin + _FRAME.size + length + CHECKSUM_SIZE
        sha.update(data[begin : end - CHECKSUM_SIZE])
        if end > len(data) or data[end - CHECKSUM_SIZE : end] != sha.digest()[:CHECKSUM_SIZE]:
            raise GeneratorError(_DAMAGED)
        if kind > _DIFFERENCES:
            raise GeneratorError("a version of the generator has a newer kind")
        if kind == _NETWORK and base:
            raise GeneratorError("a version of the generator has a malformed frame")
        sha.update(data[end - CHECKSUM_SIZE : end])
        yield sha.hexdigest(), base if kind == _DIFFERENCES else None, content
        begin = end
