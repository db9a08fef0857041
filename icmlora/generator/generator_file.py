"""The generator file: one safetensors file with the network in bfloat16 and its configuration as header text.

The file is what codes refer to: their generator is the SHA-256 of its bytes. Parameters are rounded to bfloat16 when
it is written, and codes are made under the rounded network, as it is read back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import CVAE, VIEWS
from icmlora.generator.scales import tables_digest
from icmlora.torch_tensors import decode_torch, encode_torch

FORMAT = "icm generator 1"


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained network as it lies on disk."""

    net: CVAE
    digest: str
    """SHA-256 of the file, in hexadecimal."""


def generator_to_bytes(net: CVAE, notes: Mapping[str, str] | None = None) -> bytes:
    """Serialise a network; the same parameters give the same bytes.

    Args:
        net: The network, in any dtype, on any device.
        notes: Further header text, such as the seed and the number of steps.

    Raises:
        GeneratorError: A parameter is not finite.
    """
    header = {**(notes or {}), "format": FORMAT, "config": net.config.to_json(), "tables": tables_digest()}
    try:
        return encode_torch(net.state_dict(), header, dtype="bfloat16")
    except AdapterRefused as error:
        raise GeneratorError("training has diverged", hint="train again with a lower learning rate") from error


def generator_from_bytes(data: bytes) -> Generator:
    """Open a generator file.

    Raises:
        GeneratorError: Not a generator file, of a newer format, with tensors that are not its configuration's, or
            made on a machine whose coding tables differ from this one's.
    """
    try:
        header, tensors = decode_torch(data)
    except AdapterRefused as error:
        raise GeneratorError(f"not a whole generator file ({error.message})") from error
    if header.get("format") != FORMAT:
        raise GeneratorError(f"not a generator file, or of another format ({header.get('format', 'none')[:40]})")
    if header.get("tables") != tables_digest():
        message = "the coding tables computed here differ from those of the machine that trained this generator"
        raise GeneratorError(message, hint="decode on a machine with the same C library, or train again here")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise GeneratorError("the generator holds values that are not finite")
    net = _network(GeneratorConfig.from_json(header.get("config", "")), tensors)
    return Generator(net.eval(), hashlib.sha256(data).hexdigest())


def _network(config: GeneratorConfig, tensors: Mapping[str, torch.Tensor]) -> CVAE:
    # A configuration that claims more than the file holds is refused before anything is allocated.
    if _least_values(config) > sum(tensor.numel() for tensor in tensors.values()):
        raise GeneratorError("the generator's tensors are not those of its configuration")
    try:
        with torch.random.fork_rng(devices=[]):  # the initial values are thrown away; the caller's stream stays
            net = CVAE(config)
        net.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise GeneratorError("the generator's tensors are not those of its configuration") from error
    return net


def _least_values(config: GeneratorConfig) -> int:
    """Count the values of the parts of a network that grow with its configuration."""
    sides = sum(kind.inputs + kind.outputs for kind in config.kinds)
    places = len(config.kinds) * config.layers * config.slots
    task = config.condition + config.latent
    embedded = config.layers + config.slots + 2 * len(config.kinds) + len(VIEWS) * config.condition_size
    return (config.width + config.sketch) * sides + places + config.width * task + config.embedding * embedded
