"""An adapter as tokens: one pair of scaled singular vectors per (module kind, layer, rank slot).

    dW = sum_i s_i u_i v_i^T        token pair i:  outputs = s_i u_i  (out),   inputs = s_i v_i  (in),   norm = s_i

Both vectors carry the singular value, so an error e in either of them changes dW by about |e|. To first order one
quantiser step means the same distortion everywhere, and a uniform step spends bits where dW has energy (reverse
water-filling). The factors are A = inputs / sqrt(s), B = outputs / sqrt(s).

dW is first weighted by the sensitivity of its channels, so that equal distortion means equal harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused, GeneratorError
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.sensitivity import Sensitivity

_LARGEST = 2.0**50  # largest singular value: the network sums their squares in float32, and quantiser steps end at 2^40
_SMALLEST = 2.0**-50  # and begin at 2^-40


class Pairs(Protocol):
    """Token pairs, of whatever kinds, in whatever unit."""

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
class KindTokens:
    """All token pairs of one module kind of one adapter, ordered by (layer, slot)."""

    kind: int  # index into the generator's kinds
    layer: torch.Tensor  # int64, shape (n,)
    slot: torch.Tensor  # int64, shape (n,)
    norm: torch.Tensor  # singular values of dW, float32, shape (n,), all positive
    inputs: torch.Tensor  # s * v, float32, shape (n, in)
    outputs: torch.Tensor  # s * u, float32, shape (n, out)

    def __getitem__(self, chosen: torch.Tensor) -> KindTokens:
        """Choose token pairs with a mask of shape (n,)."""
        parts = (self.layer, self.slot, self.norm, self.inputs, self.outputs)
        return KindTokens(self.kind, *(part[chosen] for part in parts))


def weighted(adapter: Adapter, config: GeneratorConfig, sensitivity: Sensitivity) -> Adapter:
    """Return an adapter with dW multiplied by the weights of its channels; the same one under even weights."""
    if sensitivity.is_even:
        return adapter
    modules = (sensitivity.weigh(module, *config.place_of(module.shape)) for module in adapter.modules)
    return replace(adapter, modules=tuple(modules))


def tokenize(adapter: Adapter, config: GeneratorConfig, sensitivity: Sensitivity) -> tuple[KindTokens, ...]:
    """Turn an adapter (any gauge) into tokens, (n, in) and (n, out); slots and kinds without energy are left out."""
    from icmlora.adapter.canonical import canonicalize  # needed to encode only

    groups: defaultdict[int, list[tuple[int, LoraModule]]] = defaultdict(list)
    for module in canonicalize(weighted(adapter, config, sensitivity)).modules:
        kind, layer = config.place_of(module.shape)
        groups[kind].append((layer, module))
    stacked = (_stack(kind, sorted(groups[kind], key=lambda pair: pair[0])) for kind in sorted(groups))
    return tuple(group for group in stacked if len(group.norm))


def refuse_overflow(tokens: Sequence[KindTokens], config: GeneratorConfig) -> None:
    """Raise `AdapterRefused` if a norm (n,) of an adapter is above 2^50: the network adds their squares."""
    for group in tokens:
        if (group.norm > _LARGEST).any():
            slot = int(group.norm.argmax())
            name = config.kinds[group.kind].module(int(group.layer[slot]))
            message = f"dW of {name} has the size {float(group.norm[slot]):.0e}, too large to encode"
            hint = "scaled by mistake, or training diverged: ingest it with usual values, or `icm rm` it"
            raise AdapterRefused(message, kind="overflow", hint=hint)


def refuse_underflow(tokens: Sequence[KindTokens]) -> None:
    """Raise `GeneratorError` if no norm (n,) of an adapter reaches 2^-50; training goes by its shape alone."""
    largest = max((float(group.norm.max()) for group in tokens), default=1.0)
    if largest < _SMALLEST:
        hint = "it changes nothing that its base model computes: it keeps its original, or `icm rm` it"
        raise GeneratorError(f"its dW has the size {largest:.0e}, too small to encode", hint=hint)


def _stack(kind: int, modules: list[tuple[int, LoraModule]]) -> KindTokens:
    """Concatenate the tokens of all layers of one kind; modules are (layer, module in canonical gauge)."""
    layers, slots, norms, inputs, outputs = [], [], [], [], []
    for layer, module in modules:
        norm = module.a.norm(dim=1) * module.b.norm(dim=0)  # balanced factors: |a_i| = |b_i| = sqrt(s_i)
        used = int((norm > 0).sum())
        root = norm[:used].sqrt()
        layers.append(torch.full((used,), layer))
        slots.append(torch.arange(used))
        norms.append(norm[:used])
        inputs.append(module.a[:used] * root[:, None])
        outputs.append(module.b[:, :used].T * root[:, None])
    return KindTokens(kind, *(torch.cat(part) for part in (layers, slots, norms, inputs, outputs)))


def detokenize(
    tokens: Iterable[KindTokens],
    config: GeneratorConfig,
    sensitivity: Sensitivity,
    *,
    modules: Sequence[tuple[int, int]],
    task_type: str | None,
) -> Adapter:
    """Turn tokens back into an adapter; see `assembled`."""
    factors = ((group, group.norm.sqrt()[:, None]) for group in tokens)
    parts = (
        modules_of(group.kind, group.layer, group.inputs / root, group.outputs / root, config, sensitivity)
        for group, root in factors
    )
    return assembled(parts, config, modules=modules, task_type=task_type)


def modules_of(
    kind: int, layer: torch.Tensor, a: torch.Tensor, b: torch.Tensor, config: GeneratorConfig, sensitivity: Sensitivity
) -> Iterator[tuple[int, int, LoraModule]]:
    """Yield the modules of a kind, with its number and their layers, from weighted rows of A and columns of B.

    Args:
        kind: Number of the kind.
        layer: Layer of each of the n slots, ascending, shape (n,).
        a: Rows of A, float32, shape (n, in); changed in place.
        b: Columns of B, float32, shape (n, out); changed in place.
        config: What the kind is.
        sensitivity: The weights.
    """
    counts = torch.bincount(layer, minlength=config.layers).tolist()
    for number, (rows, columns) in enumerate(zip(torch.split(a, counts), torch.split(b, counts), strict=True)):
        if len(rows):
            sensitivity.unweigh(kind, number, rows, columns)
            yield kind, number, LoraModule(config.kinds[kind].module(number), rows, columns.T.contiguous())


def assembled(
    parts: Iterable[Iterable[tuple[int, int, LoraModule]]],
    config: GeneratorConfig,
    *,
    modules: Sequence[tuple[int, int]],
    task_type: str | None,
) -> Adapter:
    """Make an adapter of modules (kind, layer); those that are not among the parts are of rank 1, and zero."""
    written = {}
    for kind, layer in modules:
        shape = config.kinds[kind]
        zeros = torch.zeros(1, shape.inputs), torch.zeros(shape.outputs, 1)
        written[kind, layer] = LoraModule(shape.module(layer), *zeros)
    for part in parts:
        written |= {(kind, layer): module for kind, layer, module in part}
    names = target_modules(module.name for module in written.values())
    return Adapter(config.base_model, task_type, names, tuple(written.values()))


def squared_norm(tokens: Sequence[KindTokens]) -> float:
    """Return |dW|^2 summed over all modules, from the norms (n,) of their slots."""
    return sum(float(group.norm.double().square().sum()) for group in tokens)


def slot_errors(left: Pairs, right: Pairs) -> torch.Tensor:
    """Return |s_i u_i v_i^T - s'_i u'_i v'_i^T|^2 of each pair of slots, shape (n,)."""
    return _slot_energy(left) + _slot_energy(right) - 2 * slot_overlaps(left, right)


def slot_overlaps(left: Pairs, right: Pairs) -> torch.Tensor:
    """Return the inner product of s_i u_i v_i^T and s'_i u'_i v'_i^T of each pair of slots, shape (n,)."""
    return (left.inputs * right.inputs).sum(1) * (left.outputs * right.outputs).sum(1) / (left.norm * right.norm)


def _slot_energy(group: Pairs) -> torch.Tensor:
    return (group.inputs.square().sum(1) / group.norm) * (group.outputs.square().sum(1) / group.norm)
