"""An adapter as tokens: one pair of scaled singular vectors per (module kind, layer, rank slot).

    dW = sum_i s_i u_i v_i^T        token pair i:  outputs = s_i u_i  (out),   inputs = s_i v_i  (in),   norm = s_i

Both vectors carry the singular value, so an error e in either of them changes dW by about |e|. To first order one
quantiser step means the same distortion everywhere, and a uniform step spends bits where dW has energy (reverse
water-filling). The factors are A = inputs / sqrt(s), B = outputs / sqrt(s).

dW is first weighted by the sensitivity of its channels, so equal distortion means equal harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule, is_finite
from icmlora.errors import AdapterRefused, CodeError, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.sensitivity import Sensitivity

_MAX_NORM = 2.0**50  # of a slot: the network sums squares in float32, and quantiser steps end at 2^40
_MIN_NORM = 2.0**-50  # of the strongest slot: quantiser steps begin at 2^-40


Modules = dict[tuple[int, int], LoraModule]  # by kind and layer


class Pairs(Protocol):
    """Token pairs of any kinds, in any unit."""

    @property
    def norm(self) -> torch.Tensor:
        """Singular values of dW, shape (n,)."""

    @property
    def inputs(self) -> torch.Tensor:
        """S * v, shape (n, in)."""

    @property
    def outputs(self) -> torch.Tensor:
        """S * u, shape (n, out)."""


@dataclass(frozen=True, eq=False)
class Slots:
    """n rank slots of one kind, ordered by (layer, slot)."""

    kind: int
    layer: NDArray[np.int64]  # shape (n,)
    slot: NDArray[np.int64]  # shape (n,)

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Slots:
        return Slots(self.kind, self.layer[chosen], self.slot[chosen])


@dataclass(frozen=True, eq=False)
class KindTokens:
    """All token pairs of one module kind of one adapter, ordered by (layer, slot)."""

    kind: int  # index into the generator's kinds
    layer: torch.Tensor  # int64, shape (n,)
    slot: torch.Tensor  # int64, shape (n,)
    norm: torch.Tensor  # singular values of dW, float32, shape (n,), all positive
    inputs: torch.Tensor  # s * v, float32, shape (n, in)
    outputs: torch.Tensor  # s * u, float32, shape (n, out)

    def __getitem__(self, chosen: torch.Tensor | slice) -> KindTokens:
        """Choose token pairs with a mask of shape (n,), or a slice."""
        parts = (self.layer, self.slot, self.norm, self.inputs, self.outputs)
        return KindTokens(self.kind, *(part[chosen] for part in parts))

    @property
    def slots(self) -> Slots:
        """The rank slots of the token pairs."""
        return Slots(self.kind, self.layer.numpy(), self.slot.numpy())

    def root_mean_square(self) -> torch.Tensor:
        """Return the root mean square of the values of each token pair, both vectors together, shape (n,)."""
        return self.norm * math.sqrt(2 / (self.inputs.shape[1] + self.outputs.shape[1]))

    def by_layers(self, most: int) -> Iterator[KindTokens]:
        """Split between layers into parts of at most `most` values, or of one layer."""
        values = self.inputs.shape[1] + self.outputs.shape[1]
        ends = torch.unique_consecutive(self.layer, return_counts=True)[1].cumsum(0).tolist()
        begin = 0
        for end, following in zip(ends, [*ends[1:], math.inf], strict=True):
            if (following - begin) * values > most:
                yield self[begin:end]
                begin = end


def refuse_overflow(tokens: Sequence[KindTokens], config: GeneratorConfig) -> None:
    """Raise `AdapterRefused` if a norm (n,) of an adapter is above 2^50: the network adds their squares."""
    for group in tokens:
        if (group.norm > _MAX_NORM).any():
            slot = int(group.norm.argmax())
            name = config.kinds[group.kind].module(int(group.layer[slot]))
            message = f"dW of {name} has the norm {float(group.norm[slot]):.0e}, too large to encode"
            hint = "its scale is wrong or training diverged; ingest a corrected adapter, or remove it with `icm rm`"
            raise AdapterRefused(message, kind="overflow", hint=hint)


def refuse_underflow(tokens: Sequence[KindTokens]) -> None:
    """Raise `GeneratorError` if no norm (n,) of an adapter reaches 2^-50; training accepts such adapters."""
    largest = max((float(group.norm.max()) for group in tokens), default=1.0)
    if largest < _MIN_NORM:
        hint = "it has no effect on its base model; its original is kept, or remove it with `icm rm`"
        raise GeneratorError(f"its dW has the norm {largest:.0e}, too small to encode", hint=hint)


def detokenize(
    tokens: Iterable[KindTokens],
    config: GeneratorConfig,
    sensitivity: Sensitivity,
    *,
    modules: Sequence[tuple[int, int]],
    task_type: str | None,
) -> Adapter:
    """Turn tokens back into an adapter; see `assembled`."""
    parts = []
    for group in tokens:
        a, b = (values / group.norm.sqrt()[:, None] for values in (group.inputs, group.outputs))
        parts.append(modules_of(group.kind, group.layer, a, b, config, sensitivity))
    return assembled(parts, config, modules=modules, task_type=task_type)


def modules_of(
    kind: int, layer: torch.Tensor, a: torch.Tensor, b: torch.Tensor, config: GeneratorConfig, sensitivity: Sensitivity
) -> Modules:
    """Make the modules of a kind from weighted rows of A and columns of B.

    Args:
        kind: Number of the kind.
        layer: Layer of each of the n slots, ascending, shape (n,).
        a: Rows of A, float32, shape (n, in); changed in place.
        b: Columns of B, float32, shape (n, out); changed in place.
        config: Defines the kind.
        sensitivity: The weights.

    Raises:
        CodeError: A value is not finite.
    """
    sensitivity.unweigh(kind, layer, a, b)
    if not (is_finite(a) and is_finite(b)):
        raise CodeError("the code's values are out of float32's range")
    numbers, counts = (part.tolist() for part in torch.unique_consecutive(layer, return_counts=True))
    factors = zip(numbers, torch.split(a, counts), torch.split(b, counts), strict=True)
    name = config.kinds[kind].module
    return {(kind, number): LoraModule(name(number), rows, columns.T) for number, rows, columns in factors}


def assembled(
    parts: Iterable[Modules],
    config: GeneratorConfig,
    *,
    modules: Sequence[tuple[int, int]],
    task_type: str | None,
) -> Adapter:
    """Make an adapter of modules (kind, layer); modules missing from the parts are zero, with rank 1."""
    found = {place: module for part in parts for place, module in part.items()}
    written = tuple(found.get(place) or _nothing(*place, config) for place in modules)
    return Adapter(config.base_model, task_type, target_modules(module.name for module in written), written)


def _nothing(kind: int, layer: int, config: GeneratorConfig) -> LoraModule:
    shape = config.kinds[kind]
    return LoraModule(shape.module(layer), torch.zeros(1, shape.inputs), torch.zeros(shape.outputs, 1))


def squared_norm(tokens: Sequence[KindTokens]) -> float:
    """Return |dW|^2 summed over all modules, from the norms (n,) of their slots."""
    return sum(float(group.norm.double().square().sum()) for group in tokens)


def slot_errors(left: Pairs, right: Pairs) -> torch.Tensor:
    """Return |s_i u_i v_i^T - s'_i u'_i v'_i^T|^2 of each pair of slots, shape (n,)."""
    mine, theirs = (
        (group.inputs.square().sum(1) / group.norm) * (group.outputs.square().sum(1) / group.norm)
        for group in (left, right)
    )
    inner = (left.inputs * right.inputs).sum(1) * (left.outputs * right.outputs).sum(1) / (left.norm * right.norm)
    return mine + theirs - 2 * inner
