"""Redraw the A that an adapter's training began with, from the seed of that training.

LoRA training begins with B = 0 and a random A. PEFT draws it from torch's CPU generator, module by module, uniform in
+-1 / sqrt(in). Training moves A, but not far: most of the trained A is still in the span of these r rows. The seed, and
where in the stream each module's draws begin, are enough to redraw the rows.

The stream is MT19937 (Matsumoto and Nishimura 1998). numpy's `RandomState` has it too, and guarantees to keep it.

A code's head stores where an initial A was drawn as these bytes:

    seed (u4) | ranks (K*L x u1, or u2 for a generator of more than 254 rank slots) | offsets (K*L x i8)

A rank of 0 means that a module's initial A is unknown. Offsets are stored as second differences along the layers. These
are zero where layers are alike, so all of it takes a few dozen bytes once the head is compressed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import CodeError
from icmlora.generator.config import GeneratorConfig

_MANTISSA = (1 << 24) - 1  # bits of a random word that torch uses for a float32


@dataclass(frozen=True)
class InitialModule:
    """Where one module's A was drawn."""

    offset: int  # draws in the stream before it
    shape: ModuleShape

    @property
    def end(self) -> int:
        """Draws in the stream up to its end."""
        return self.offset + self.shape.rank * self.shape.inputs


@dataclass(frozen=True)
class InitialA:
    """Where an adapter's initial A was drawn."""

    seed: int  # the seed given to `torch.manual_seed`, modulo 2^32 as MT19937 takes it
    modules: tuple[InitialModule, ...]  # in the order of drawing, without modules whose A came from elsewhere


class UniformStream:
    """The uniform float32 stream of torch's CPU generator after `torch.manual_seed`, read forwards."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._state = np.random.RandomState(self._bits)  # the legacy interface, because its stream will not change
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Restart with another seed; far less work than a new stream."""
        self._state.seed(seed)
        self._position = 0

    def read(self, offset: int, count: int) -> NDArray[np.float32]:
        """Return the `count` draws after the first `offset` draws, uniform in [-1, 1), float32, shape (count,)."""
        # `offset` must not be before the end of the previous read.
        if offset > self._position:
            self._bits.random_raw(offset - self._position, output=False)
        self._position = offset + count
        words = self._state.randint(0, 1 << 32, size=count, dtype=np.uint32)
        words &= _MANTISSA  # torch takes the lower 24 bits of each word, which float32 holds exactly
        draws = words.astype(np.float32)
        draws *= np.float32(2.0**-23)
        draws -= np.float32(1)
        return draws


def initial_factors(initial: InitialA) -> dict[str, NDArray[np.float32]]:
    """Return the initial A of each module by name, shape (r, in)."""
    stream = UniformStream(initial.seed)
    factors = {}
    for module in sorted(initial.modules, key=lambda module: module.offset):
        rank, inputs = module.shape.rank, module.shape.inputs
        draws = stream.read(module.offset, rank * inputs)
        draws *= np.float32(inputs**-0.5)
        factors[module.shape.module] = draws.reshape(rank, inputs)
    return factors


MADE_ELSEWHERE = "fetch the code again from its source, or run `icm encode` to encode the task again"


def initial_size(config: GeneratorConfig) -> int:
    """Return the length of the output of `initial_to_bytes`."""
    return 4 + (config.count_bytes + 8) * len(config.kinds) * config.layers


def initial_to_bytes(initial: InitialA | None, config: GeneratorConfig) -> bytes:
    """Serialise; None becomes zeros."""
    shape = len(config.kinds), config.layers
    ranks, offsets = np.zeros(shape, dtype=f"<u{config.count_bytes}"), np.zeros(shape, dtype=np.int64)
    for module in () if initial is None else initial.modules:
        place = config.place_of(module.shape)
        ranks[place], offsets[place] = module.shape.rank, module.offset
    for _ in range(2):
        offsets = np.diff(offsets, axis=1, prepend=0)
    seed = struct.pack("<I", 0 if initial is None else initial.seed)
    return seed + ranks.tobytes() + offsets.astype("<i8").tobytes()


def initial_from_bytes(data: bytes, config: GeneratorConfig) -> InitialA | None:
    """Read the output of `initial_to_bytes`; raise `CodeError` if it is out of the generator's range."""
    (seed,) = struct.unpack_from("<I", data)
    shape = len(config.kinds), config.layers
    count = shape[0] * shape[1]
    ranks = np.frombuffer(data, dtype=f"<u{config.count_bytes}", offset=4, count=count).reshape(shape)
    begin = 4 + config.count_bytes * count
    offsets = np.frombuffer(data, dtype="<i8", offset=begin, count=count).reshape(shape)
    for _ in range(2):  # they were stored as second differences
        offsets = np.cumsum(offsets, axis=1)
    places = np.argwhere(ranks).tolist()
    if not config.are_modules(places):
        raise CodeError("the code's initial A names a module twice, or an impossible module", hint=MADE_ELSEWHERE)
    modules = []
    for kind, layer in places:
        place = config.kinds[kind]
        where = ModuleShape(place.module(layer), int(ranks[kind, layer]), place.inputs, place.outputs)
        modules.append(InitialModule(int(offsets[kind, layer]), where))
    modules.sort(key=lambda module: module.offset)
    # Overlapping draws are refused, as are offsets so large that skipping to them would take forever. PEFT draws A
    # twice and B once for each module.
    most = 2 * config.slots * config.layers * sum(kind.inputs + kind.outputs for kind in config.kinds)
    begins, ends = [module.offset for module in modules], [module.end for module in modules]
    is_in_order = all(end <= begin for end, begin in zip([0, *ends], [*begins, most], strict=True))
    if not is_in_order or any(module.shape.rank > config.slots for module in modules):
        raise CodeError("the code's initial A is out of its generator's range")
    return InitialA(seed, tuple(modules)) if modules else None
