"""The layout of an adapter: its modules with their ranks and widths. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ModuleShape(NamedTuple):
    """One adapted module: its name in the base model, its rank, and the width of its input and output."""

    module: str
    rank: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Number of values in both factors."""
        return self.rank * (self.inputs + self.outputs)


def target_modules(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the `target_modules` of a configuration for some modules, without patterns."""
    # The short form is the last part of each name (`q_proj`). It selects that module in every layer, so it is used
    # only if every short name occurs in all layers 0, 1, 2 ...; otherwise modules are named in full.
    names = tuple(dict.fromkeys(modules))
    # Layer numbers by short name; a name with no number, or several, has no layer.
    layers: dict[str, set[int]] = {}
    numbered = True
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        numbered = numbered and len(numbers) == 1
        layers.setdefault(name.rpartition(".")[2], set()).update(numbers)
    everywhere = set.union(*layers.values()) if layers else set()
    complete = everywhere == set(range(len(everywhere))) and all(found == everywhere for found in layers.values())
    if numbered and complete and len(names) == len(layers) * len(everywhere):
        return tuple(sorted(layers))
    return names
