"""Small integers and how likely each is, for the entropy coder; where there are many, several of them are one symbol.

A decoder finds a symbol in its table by bisection, so one among 2,400 takes less time than four among seven. The joint
table is the product of the integers' own ones, so the bits are the same.
"""

from __future__ import annotations

from functools import cached_property, reduce
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

_MANY = 1024  # integers from which on several are one symbol
_LARGEST = 9**4  # symbols of a joint table at most; larger ones outgrow the processor's nearest cache


class Alphabet:
    """K small integers with their probabilities."""

    def __init__(self, integers: NDArray[np.int64], chances: NDArray[np.float64]) -> None:
        """Take the integers, ascending, and how likely each is, both of shape (K,)."""
        self._integers, self._chances = integers.astype(np.int32), chances
        self._together = next((count for count in (4, 2) if len(chances) ** count <= _LARGEST), 1)
        self._single = categorical(chances)

    def symbols(self, values: NDArray[np.signedinteger[Any]]) -> list[tuple[NDArray[np.int32], object]]:
        """Return the symbols of integers (n,), in the order of reading: parts, each with its model."""
        low = self._integers[0]
        symbols = np.zeros(self._integers[-1] - low + 1, dtype=np.int32)
        symbols[self._integers - low] = np.arange(len(self._integers))
        singles = symbols.take(values - low)
        joint = self._joint_count(len(values))
        end = joint * self._together
        digits = singles[:end].reshape(joint, self._together)
        weights = len(self._chances) ** np.arange(self._together - 1, -1, -1)
        several = [((digits @ weights).astype(np.int32), self._joint[0])] if joint else []
        return [*several, (singles[end:], self._single)]

    def read(self, coder: constriction.stream.stack.AnsCoder, count: int) -> NDArray[np.signedinteger[Any]]:
        """Read so many integers, shape (n,)."""
        joint = self._joint_count(count)
        if not joint:
            few: NDArray[np.int32] = self._integers.take(coder.decode(self._single, count))
            return few
        model, digits = self._joint
        found = np.empty(count, dtype=np.int8)
        end = joint * self._together
        digits.take(coder.decode(model, joint), out=found[:end].view(digits.dtype), mode="clip")
        found[end:] = self._integers.take(coder.decode(self._single, count - end))
        return found

    def _joint_count(self, count: int) -> int:
        """Return how many symbols stand for several of so many integers; the rest follow one at a time."""
        return count // self._together if self._together > 1 and count >= _MANY else 0

    @cached_property
    def _joint(self) -> tuple[object, NDArray[np.unsignedinteger[Any]]]:
        """Return the model of several integers, and the integers of each of its symbols, a byte each."""
        chances = reduce(np.multiply.outer, [self._chances] * self._together).ravel()
        digits = np.stack(np.meshgrid(*[self._integers] * self._together, indexing="ij"), axis=-1)
        return categorical(chances), digits.astype(np.int8).reshape(len(chances), -1).view(f"u{self._together}")[:, 0]


def categorical(chances: NDArray[np.float64]) -> object:
    """Return constriction's model of symbols 0, 1, ... with these probabilities."""
    return constriction.stream.model.Categorical(chances, perfect=False, lazy=False)
