"""The configuration of a generator: its base model, the module kinds that it covers, and the sizes of its network."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import GeneratorError, NotCovered

# A layer number has no leading zero, so a module's name can be rebuilt from it, and at most four digits, so a name
# cannot demand tables of millions of layers. Other digits are part of the name.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,3})(?=\.)")
# In an image model's names (`down_blocks.1.attentions.0.transformer_blocks.5.attn1`) the number after
# `transformer_blocks` counts layers: SDXL then has 120 kinds instead of 350.
_INNER_NUMBER = re.compile(r"(?<=[._]transformer_blocks\.)(?:0|[1-9]\d{0,3})(?=\.)")

# quality -> share of |dW|^2 that a code may lose.
# 1 - retained gain is a quarter to a tenth of it (docs/results/LOG.md).
_TOLERANCES = (0.35, 0.25, 0.17, 0.11, 0.07, 0.045, 0.025, 0.012)
# quality -> share of an adapter's effect that a code keeps, where its base model is available.
_KEEPS = (0.9, 0.94, 0.965, 0.98, 0.987, 0.992, 0.996, 0.998)
# Number of tasks -> sizes of the network. A larger network makes each code smaller and is paid for once
# (docs/results/LOG.md).
_SIZES = (
    (32, {"width": 4, "embedding": 16, "latent": 4, "condition": 4, "sketch": 2}),
    (64, {"width": 8, "embedding": 16, "latent": 8, "condition": 8, "sketch": 4}),
)


@dataclass(frozen=True, order=True)
class ModuleKind:
    """One kind of target module: all layers' modules that share a name pattern and a shape."""

    pattern: str  # dotted name with `{}` for the layer number, or the whole name if it has no number
    inputs: int
    outputs: int

    def module(self, layer: int) -> str:
        """Return the dotted module name in one layer."""
        return self.pattern.replace("{}", str(layer), 1)


def kind_of(shape: ModuleShape) -> tuple[ModuleKind, int]:
    """Split a module into its kind and its layer number (0 if the name has no number)."""
    match = _INNER_NUMBER.search(shape.module) or _NUMBER.search(shape.module)
    if match is None:
        return ModuleKind(shape.module, shape.inputs, shape.outputs), 0
    pattern = f"{shape.module[: match.start()]}{{}}{shape.module[match.end() :]}"
    return ModuleKind(pattern, shape.inputs, shape.outputs), int(match.group())


MAX_SLOTS = 4096
# Up to here codes count a module's rank slots in one byte, whose largest value means "no such module".
_NARROW_SLOTS = 254


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything needed to rebuild the network and read its codes; stored as JSON inside the generator file."""

    base_model: str  # label of the base model, as adapters name it
    kinds: tuple[ModuleKind, ...]  # module kinds, sorted; a code refers to them by index
    layers: int  # layers that may hold target modules
    slots: int  # rank slots of the widest adapter
    # Length of a task vector (the base model's hidden size); 0 where the generator was trained without vectors.
    condition_size: int
    tolerance: float  # share of |dW|^2, weighted by sensitivity, that a code may lose
    width: int = 32  # hidden width of the decoder, also the rank of its predictions over tokens
    embedding: int = 32  # length of the layer, slot and kind embeddings
    latent: int = 16  # length of the task latent z; each value is stored in one byte
    condition: int = 16  # length of the embedded condition; each value is stored in one byte
    sketch: int = 8  # length of the encoder's bilinear sketch u^T P Q v of one rank slot

    def __post_init__(self) -> None:
        """Raise `GeneratorError` if the configuration is invalid."""
        sizes = (self.layers, self.slots, self.width, self.embedding, self.latent, self.condition, self.sketch)
        if not self.kinds or min(sizes) < 1 or self.condition_size < 0 or not 0.0 < self.tolerance < 1.0:
            raise GeneratorError("the generator's configuration is out of range")
        if self.slots > MAX_SLOTS or list(self.kinds) != sorted(set(self.kinds)):
            message = "the generator's configuration has too many rank slots, or its kinds are repeated or out of order"
            raise GeneratorError(message)
        if any(min(kind.inputs, kind.outputs) < 1 for kind in self.kinds):
            raise GeneratorError("the generator's configuration has a module without inputs or outputs")

    @property
    def count_bytes(self) -> int:
        """Bytes per count of rank slots in codes."""
        return 1 if self.slots <= _NARROW_SLOTS else 2

    def place_of(self, shape: ModuleShape) -> tuple[int, int]:
        """Return the index of a module's kind and its layer; raise `NotCovered` if there is no place for it."""
        kind, layer = kind_of(shape)
        number = self._index.get(kind)
        if number is None or layer >= self.layers or shape.rank > self.slots:
            message = f"the generator does not cover {shape.module} with rank {shape.rank}"
            raise NotCovered(message, hint="run `icm train --update` to add a version that covers it")
        return number, layer

    def covers(self, layout: Iterable[ModuleShape]) -> bool:
        """Return whether the generator has all of these modules, with their layers and ranks."""
        try:
            for shape in layout:
                self.place_of(shape)
        except NotCovered:
            return False
        return True

    def are_modules(self, places: Iterable[Sequence[int]]) -> bool:
        """Return whether pairs of kind and layer are possible modules, all different."""
        # A kind without a layer number has layer 0 only, and kinds that differ only in their widths share their names.
        found = [(self.kinds[kind], layer) for kind, layer in places]
        names = {kind.module(layer) for kind, layer in found}
        return len(names) == len(found) and all(not layer or kind.module(0) != kind.module(1) for kind, layer in found)

    @cached_property
    def by_widths(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Indices of the kinds by their numbers of inputs and outputs."""
        found = defaultdict[tuple[int, int], tuple[int, ...]](tuple)
        for number, kind in enumerate(self.kinds):
            found[kind.inputs, kind.outputs] += (number,)
        return dict(found)

    @cached_property
    def _index(self) -> dict[ModuleKind, int]:
        return {kind: number for number, kind in enumerate(self.kinds)}

    def to_json(self) -> str:
        """Serialise with sorted keys, so equal configurations give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GeneratorConfig:
        """Parse the output of `to_json`; raise `GeneratorError` for anything else."""
        try:
            fields = json.loads(text)
            fields["kinds"] = tuple(ModuleKind(**kind) for kind in fields["kinds"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise GeneratorError(f"the generator's configuration cannot be read ({error})") from error


def tolerance_of(quality: int) -> float:
    """Return the weighted squared error of a quality, 1 (smallest) to 8; raise `GeneratorError` for any other."""
    return _TOLERANCES[_place_of(quality)]


def keep_of(quality: int) -> float:
    """Return the share of an adapter's effect of a quality, 1 (smallest) to 8; raise `GeneratorError` for any other."""
    return _KEEPS[_place_of(quality)]


def _place_of(quality: int) -> int:
    if not 1 <= quality <= len(_KEEPS):
        raise GeneratorError(f"invalid quality {quality}; use 1 to {len(_KEEPS)}")
    return quality - 1


def quality_of(tolerance: float) -> int:
    """Return the lowest quality whose plain codes keep a tolerance; the highest if none does."""
    return 1 + sum(limit > tolerance for limit in _TOLERANCES[:-1])


def config_for(
    base_model: str,
    layouts: Iterable[Sequence[ModuleShape]],
    *,
    tasks: int,
    condition_size: int,
    quality: int,
    tolerance: float | None = None,
    width: int | None = None,
    previous: GeneratorConfig | None = None,
) -> GeneratorConfig:
    """Make the configuration for a fleet, or for a grown fleet with the sizes of the `previous` one."""
    # Layouts are read once. `condition_size` is the length of the task vectors, 0 without any; `quality` (1 to 8) sets
    # the tolerance if `tolerance` is None.
    kinds = set(previous.kinds) if previous else set()
    layers, slots = (previous.layers, previous.slots) if previous else (1, 1)
    for layout in layouts:
        for shape in layout:
            kind, layer = kind_of(shape)
            kinds.add(kind)
            layers, slots = max(layers, layer + 1), max(slots, shape.rank)
    covered: dict[str, Any] = {
        "kinds": tuple(sorted(kinds)),
        "layers": layers,
        "slots": slots,
        "condition_size": condition_size,
        "tolerance": tolerance_of(quality) if tolerance is None else tolerance,
    }
    if previous:
        return replace(previous, **covered)
    sizes: dict[str, Any] = next((sizes for below, sizes in _SIZES if tasks < below), {})
    return GeneratorConfig(base_model, **covered, **(sizes if width is None else {**sizes, "width": width}))
