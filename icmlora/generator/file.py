"""The frames of a generator file: which versions it has, what codes call each, and where its bytes are. Without torch.

    one version     ICMG 2 | length of header (4) | header: JSON, zlib | range-coded words | check (8)
    several         ICMG 3 | version | version | ...
    each of them    kind (1) | base (2) | length of content (4) | content | check (8)

A file grows at its end and nowhere else. The first version is a file of one version as it was; a further one is a
network of its own (the content is such a file again), or the differences of its parameters to those of the version
`base`. The check is the beginning of the SHA-256 of everything before it, from the beginning of the file.

A version is called by the SHA-256 of the file of which it was the last. The file that has grown still tells that
digest, so a code goes on naming the very bytes it was made under, and they go on giving the same network.

A network as bytes: its configuration as JSON, and its parameters rounded and range-coded.

    ICMG 2 | length of header (4) | header: JSON, zlib | range-coded words | check (8)

Alone it is a generator file of one version (see :mod:`icmlora.generator.versions`). Codes are made under the network as
it is read back. The check is the beginning of the SHA-256 of everything before it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.code import inflate
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import CVAE, VIEWS
from icmlora.generator.parameters import parameters_to_words, words_to_parameters
from icmlora.generator.scales import tables_digest
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


# A parameter of an ordinary row takes half a byte; rows of zeros, which a fresh network has, take next to nothing.
_VALUES_PER_BYTE = 1000


@dataclass(frozen=True, eq=False)
class TrainedGenerator:
    """A trained network as it lies on disk."""

    net: CVAE
    digest: str
    """SHA-256 of the file whose last version it is, in hexadecimal: what its codes name."""


def generator_to_bytes(net: CVAE, notes: Mapping[str, str] | None = None) -> bytes:
    """Serialise a network; the same parameters give the same bytes.

    Args:
        net: The network, in any dtype, on any device.
        notes: Further header text, such as the seed and the number of steps.

    Raises:
        GeneratorError: A parameter is not finite.
    """
    own = {"config": net.config.to_json(), "shapes": _shapes_digest(net), "tables": tables_digest()}
    header = {**(notes or {}), **own}
    packed = zlib.compress(json.dumps(header, sort_keys=True).encode(), 9)
    return add_checksum(MAGIC + struct.pack("<I", len(packed)) + packed + parameters_to_words(net.state_dict()))


def generator_from_bytes(data: bytes) -> TrainedGenerator:
    """Open a generator file of one version.

    Raises:
        GeneratorError: Not a generator file, of a newer format, with tensors that are not its configuration's, or
            made on a machine whose coding tables differ from this one's.
    """
    header, words = split_network(data)
    if header.get("tables") != tables_digest():
        message = "the coding tables computed here differ from those of the machine that trained this generator"
        raise GeneratorError(message, hint="decode on a machine with the same C library, or train again here")
    net = _network(config_in(header), str(header.get("shapes")), words)
    return TrainedGenerator(net.eval(), hashlib.sha256(data).hexdigest())


def _network(config: GeneratorConfig, shapes_digest: str, words: bytes) -> CVAE:
    # A configuration that claims far more than the file can hold is refused before anything is allocated.
    if _least_values(config) > _VALUES_PER_BYTE * len(words):
        raise GeneratorError("the generator's parameters are not those of its configuration")
    try:
        with torch.random.fork_rng(devices=[]):  # the initial values are thrown away; the caller's stream stays
            net = CVAE(config)
        if _shapes_digest(net) != shapes_digest:
            raise ValueError("other shapes")
        net.load_state_dict(words_to_parameters(words, _shapes(net)))
    except (CodeError, RuntimeError, TypeError, ValueError) as error:
        raise GeneratorError("the generator's parameters are not those of its configuration") from error
    return net


def _shapes(net: CVAE) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def _shapes_digest(net: CVAE) -> str:
    """Name the order and shapes of the parameters: the words themselves do not say where one ends."""
    text = json.dumps([[name, list(shape)] for name, shape in _shapes(net).items()])
    return hashlib.sha256(text.encode()).hexdigest()


def _least_values(config: GeneratorConfig) -> int:
    """Count the values of the parts of a network that grow with its configuration."""
    sides = sum(kind.inputs + kind.outputs for kind in config.kinds)
    places = len(config.kinds) * config.layers * config.slots
    task = config.condition + config.latent
    embedded = config.layers + config.slots + 2 * len(config.kinds) + len(VIEWS) * config.condition_size
    return (config.width + config.sketch) * sides + places + config.width * task + config.embedding * embedded
