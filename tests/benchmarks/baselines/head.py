"""An adapter without its values, in about 200 bytes: labels, module names, ranks and widths.

    size (2) | zlib of  [base model, task type, revision, [[pattern, layers, rank, inputs, outputs], ...]]

A safetensors header names every tensor in full: 13 kB for 60 modules, more than a whole adapter at 2 bits and rank 1.
Here modules that differ only in their layer are one entry, such as `model.layers.#.self_attn.q_proj` in layers 0-29.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from icmlora.adapter.layout import ModuleShape, target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError
from icmlora.generator.files.container import inflate
from icmlora.io.safetensors import MAX_DIMENSION, MAX_TENSORS
from registry.names import is_module_name, natural_key


class ByteReader:
    """Read bytes from front to back; missing and left-over bytes are errors."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise CodeError(f"the code ends after {len(self._data)} bytes; {end} were expected")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self, size: int) -> int:
        """Return the next `size` bytes as one integer, lowest byte first."""
        return int.from_bytes(self.take(size), "little")

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data) - self._at)

    def finish(self) -> None:
        """Check that all bytes were read."""
        if self._at != len(self._data):
            raise CodeError(f"the code has {len(self._data) - self._at} bytes too many")


# Stands for the layer number in a pattern; module names cannot contain it.
_LAYER = "#"
_LIMIT = 1 << 20  # largest head once it is decompressed, in bytes


@dataclass(frozen=True)
class Head:
    """An adapter without its values."""

    base_model: str
    task_type: str | None
    revision: str | None
    layout: tuple[ModuleShape, ...]  # modules in natural order

    @classmethod
    def of(cls, adapter: Adapter) -> Head:
        """Return the head of an adapter."""
        return cls(adapter.base_model, adapter.task_type, adapter.revision, adapter.layout)

    def to_bytes(self) -> bytes:
        """Serialise; the same head gives the same bytes."""
        fields = [self.base_model, self.task_type, self.revision, list(_grouped(self.layout))]
        packed = zlib.compress(json.dumps(fields, separators=(",", ":")).encode(), 9)
        return len(packed).to_bytes(2, "little") + packed

    @classmethod
    def read(cls, reader: ByteReader) -> Head:
        """Read a head from the front of a code."""
        packed = reader.take(reader.number(2))
        try:
            base_model, task_type, revision, groups = json.loads(inflate(packed, 2, _LIMIT))
            spread = (shape for group in groups for shape in _spread(*group))
            # A run of layers such as [0, 10^12] is a few bytes long, so modules are counted as they are made.
            shapes = list(islice(spread, MAX_TENSORS + 1))
        except (CodeError, ValueError, TypeError, RecursionError) as error:
            raise CodeError("the code does not begin with a head") from error
        labels = isinstance(base_model, str) and all(isinstance(text, str | None) for text in (task_type, revision))
        names = {shape.module for shape in shapes}
        if not labels or not 1 <= len(shapes) == len(names) <= MAX_TENSORS:
            raise CodeError("the head of the code is not that of an adapter")
        return cls(base_model, task_type, revision, tuple(sorted(shapes, key=lambda shape: natural_key(shape.module))))

    def with_modules(self, modules: Iterable[LoraModule]) -> Adapter:
        """Return an adapter of these modules, with the head's labels."""
        found = tuple(modules)
        targets = target_modules(module.name for module in found)
        return Adapter(self.base_model, self.task_type, targets, found, self.revision)


def _grouped(layout: Iterable[ModuleShape]) -> Iterator[list[object]]:
    """Yield one entry for all modules that differ only in their layer."""
    groups: dict[tuple[str, int, int, int], list[int]] = {}
    for shape in layout:
        parts = shape.module.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdigit() and str(int(part)) == part), None)
        layer = -1 if place is None else int(parts[place])
        pattern = shape.module if place is None else ".".join([*parts[:place], _LAYER, *parts[place + 1 :]])
        groups.setdefault((pattern, *shape[1:]), []).append(layer)
    for (pattern, *sizes), layers in groups.items():
        yield [pattern, _runs(layers), *sizes]


def _runs(layers: list[int]) -> list[list[int]]:
    """Write ascending integers as [first, last] runs."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] + 1 == layer:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return runs


def _spread(pattern: str, runs: list[list[int]], *sizes: int) -> Iterator[ModuleShape]:
    if not isinstance(pattern, str) or not all(type(size) is int and 1 <= size <= MAX_DIMENSION for size in sizes):
        raise ValueError("a name, rank or width is not that of a module")
    for first, last in runs:
        if not -1 <= first <= last:
            raise ValueError("a run of layers is out of range")
        for layer in range(first, last + 1):
            module = pattern.replace(_LAYER, str(layer), 1)
            if not is_module_name(module):
                raise ValueError("a name, rank or width is not that of a module")
            yield ModuleShape(module, *sizes)
