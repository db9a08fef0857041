"""Where an initial A was drawn, as bytes of a code's head: seed (u4) | ranks (K*L x u1) | offsets (K*L x i8).

A rank of 0 says that a module's is not known. Offsets are stored as second differences along the layers, which are zero
where layers are alike, so that all of it takes some tens of bytes once it is compressed.
"""

from __future__ import annotations

import struct

import numpy as np

from icmlora.errors import CodeError
from icmlora.generator.config import GeneratorConfig
from icmlora.initial_a import InitialA, InitialModule
from icmlora.layout import ModuleShape

MADE_ELSEWHERE = "icm writes no such code: get it again from where it came, or make it anew with `icm encode`"


def initial_size(config: GeneratorConfig) -> int:
    """Return how many bytes `initial_to_bytes` writes."""
    return 4 + 9 * len(config.kinds) * config.layers


def initial_to_bytes(initial: InitialA | None, config: GeneratorConfig) -> bytes:
    """Serialise; None is all zeros.

    Raises:
        NotCovered: The generator does not cover one of the modules.
    """
    shape = len(config.kinds), config.layers
    ranks, offsets = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.int64)
    for module in () if initial is None else initial.modules:
        place = config.place_of(module.shape)
        ranks[place], offsets[place] = module.shape.rank, module.offset
    for _ in range(2):
        offsets = np.diff(offsets, axis=1, prepend=0)
    seed = struct.pack("<I", 0 if initial is None else initial.seed)
    return seed + ranks.tobytes() + offsets.astype("<i8").tobytes()


def initial_from_bytes(data: bytes, config: GeneratorConfig) -> InitialA | None:
    """Read back what `initial_to_bytes` wrote.

    Raises:
        CodeError: Draws that no adapter of the generator's layout begins with.
    """
    (seed,) = struct.unpack_from("<I", data)
    shape = len(config.kinds), config.layers
    count = shape[0] * shape[1]
    ranks = np.frombuffer(data, dtype=np.uint8, offset=4, count=count).reshape(shape)
    offsets = np.frombuffer(data, dtype="<i8", offset=4 + count, count=count).reshape(shape)
    for _ in range(2):
        offsets = np.cumsum(offsets, axis=1)
    places = np.argwhere(ranks).tolist()
    if not config.are_modules(places):
        raise CodeError("the code's initial A names a module twice, or one that there cannot be", hint=MADE_ELSEWHERE)
    modules = []
    for kind, layer in places:
        place = config.kinds[kind]
        where = ModuleShape(place.module(layer), int(ranks[kind, layer]), place.inputs, place.outputs)
        modules.append(InitialModule(int(offsets[kind, layer]), where))
    modules.sort(key=lambda module: module.offset)
    _check(modules, config)
    return InitialA(seed, tuple(modules)) if modules else None


def _check(modules: list[InitialModule], config: GeneratorConfig) -> None:
    """Refuse draws that overlap, and a stream so long that reading it would take for ever."""
    # For each module PEFT draws A twice, and B once.
    most = 2 * config.slots * config.layers * sum(kind.inputs + kind.outputs for kind in config.kinds)
    begins = [module.offset for module in modules] + [most]
    ends = [0] + [module.end for module in modules]
    if any(module.shape.rank > config.slots for module in modules) or any(
        begin < end for begin, end in zip(begins, ends, strict=True)
    ):
        raise CodeError("the code's initial A is out of its generator's range")
