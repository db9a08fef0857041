"""The A that an adapter's training began with, drawn again from the seed of that training.

LoRA training begins with B = 0 and a random A, which PEFT draws from torch's CPU generator, module by module, uniform
in +-1 / sqrt(in). Training moves A, but not far: most of what it becomes still lies in the span of these r rows.
Whoever knows the seed, and where in the stream each module's draws begin, has the rows for nothing.

The stream is that of MT19937. numpy's `RandomState` yields it too, and promises to do so for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.layout import ModuleShape

_MANTISSA = (1 << 24) - 1


@dataclass(frozen=True)
class InitialModule:
    """Where one module's A was drawn."""

    offset: int
    """Draws before it."""
    shape: ModuleShape

    @property
    def end(self) -> int:
        """Draws up to its end."""
        return self.offset + self.shape.rank * self.shape.inputs


@dataclass(frozen=True)
class InitialA:
    """Where the A of an adapter's modules was drawn."""

    seed: int
    """Of `torch.manual_seed`, modulo 2^32 as MT19937 takes it."""
    modules: tuple[InitialModule, ...]
    """In the order of drawing; modules of other origin are not among them."""


class UniformStream:
    """What torch's CPU generator yields as uniform float32 numbers after `torch.manual_seed`, read forwards."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._state = np.random.RandomState(self._bits)  # the legacy interface, because its stream is frozen
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin again under another seed: far less work than another stream."""
        self._state.seed(seed)
        self._position = 0

    def read(self, offset: int, count: int) -> NDArray[np.float32]:
        """Return `count` draws that come after `offset` others, uniform in [-1, 1), float32, shape (count,).

        `offset` may not lie before the end of the last draws that were read.
        """
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
