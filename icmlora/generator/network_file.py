"""A trained network <-> a generator file of one version.

    ICMG 2 | length of header (4) | header: JSON, zlib | range-coded words | checksum (8)

The header holds the configuration, and digests of the coding tables and of the parameters' shapes; the words hold the
rounded parameters (icmlora/generator/parameters.py). Codes are made under the network as it is read back, so rounding
the parameters costs no accuracy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.container import write_container
from icmlora.generator.cvae import CVAE, VIEWS
from icmlora.generator.file import MAGIC, config_in, split_network
from icmlora.generator.parameters import parameters_to_words, words_to_parameters
from icmlora.generator.scales import tables_digest

# A parameter of an ordinary row takes half a byte; rows of zeros, which a fresh network has, take next to nothing.
_VALUES_PER_BYTE = 1000


@dataclass(frozen=True, eq=False)
class TrainedGenerator:
    """A trained network as it was read from a file."""

    net: CVAE
    digest: str  # SHA-256, in hexadecimal, of the file that ended with this version: what its codes name


def generator_to_bytes(net: CVAE, notes: Mapping[str, str] | None = None) -> bytes:
    """Serialise a network; the same parameters give the same bytes."""
    own = {"config": net.config.to_json(), "shapes": _shapes_digest(net), "tables": tables_digest()}
    header = json.dumps({**(notes or {}), **own}, sort_keys=True)
    return write_container(MAGIC, header.encode(), parameters_to_words(net.state_dict()))


def generator_from_bytes(data: bytes) -> TrainedGenerator:
    """Read a generator file of one version."""
    header, words = split_network(data)
    if header.get("tables") != tables_digest():
        message = "the coding tables computed here differ from those of the machine that trained this generator"
        raise GeneratorError(message, hint="decode on a machine with the same C library, or train again here")
    net = _network(config_in(header), str(header.get("shapes")), words)
    return TrainedGenerator(net.eval(), hashlib.sha256(data).hexdigest())


def _network(config: GeneratorConfig, shapes_digest: str, words: bytes) -> CVAE:
    mismatch = "the generator's parameters do not fit its configuration"
    # A configuration that claims far more than the file can hold is refused before anything is allocated.
    if _least_values(config) > _VALUES_PER_BYTE * len(words):
        raise GeneratorError(mismatch)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial values are thrown away; the caller's stream stays
            net = CVAE(config)
        if _shapes_digest(net) != shapes_digest:
            raise ValueError("other shapes")
        net.load_state_dict(words_to_parameters(words, _shapes(net)))
    except (CodeError, RuntimeError, TypeError, ValueError) as error:
        raise GeneratorError(mismatch) from error
    return net


def _shapes(net: CVAE) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def _shapes_digest(net: CVAE) -> str:
    """Hash the order and shapes of the parameters: the words themselves do not say where one ends."""
    text = json.dumps([[name, list(shape)] for name, shape in _shapes(net).items()])
    return hashlib.sha256(text.encode()).hexdigest()


def _least_values(config: GeneratorConfig) -> int:
    """Count the values in those parts of a network that grow with its configuration."""
    sides = sum(kind.inputs + kind.outputs for kind in config.kinds)
    places = len(config.kinds) * config.layers * config.slots
    task = config.condition + config.latent
    embedded = config.layers + config.slots + 2 * len(config.kinds) + len(VIEWS) * config.condition_size
    return (config.width + config.sketch) * sides + places + config.width * task + config.embedding * embedded
