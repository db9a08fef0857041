"""Two bases per module that many adapters share, fitted by alternating passes over the fleet, one adapter at a time.

    full       dW_i ~ U C_i V^T         U, V orthonormal,  C_i = U^T dW_i V  (r x r)
    diagonal   dW_i ~ U diag(c_i) V^T   columns of length 1, c_i by least squares (r)

Every adapter is weighted by 1 / ||dW||^2, so that a strong one does not take over the basis. dW is never formed: all
products go through the factors B and A.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from icmlora.adapter.metrics import dw_norm
from icmlora.adapter.model import Adapter, LoraModule
from tests.benchmarks.baselines.baseline import NamedAdapters

_SEED = 0
_RIDGE = 1e-6  # share of a Gram matrix's mean diagonal that is added to it, so that it can be solved
_EMPTY = 1e-30  # keeps divisions finite for adapters and modules of zeros


@dataclass(frozen=True, eq=False)
class Bases:
    """The shared bases of one cluster of tasks."""

    outputs: Mapping[str, torch.Tensor]  # module to U, shape (out, r)
    inputs: Mapping[str, torch.Tensor]  # module to V, shape (in, r)
    diagonal: bool  # whether cores are vectors

    def core(self, module: LoraModule) -> torch.Tensor:
        """Return the core of one module of one task: (r, r), or (r,) if diagonal."""
        u, v = self.outputs[module.name], self.inputs[module.name]
        # Through the narrow factors: dW itself would be (out, in).
        projected = (u.mT @ module.b) @ (module.a @ v)  # (r, r)
        if not self.diagonal:
            return projected
        gram = (u.mT @ u) * (v.mT @ v)  # (r, r): inner products of the rank-1 matrices u_i v_i^T
        return _solved(gram, projected.diagonal()[None])[0]

    def explained(self, adapter: Adapter) -> float:
        """Return how much of an adapter's ||dW||^2 the bases keep."""
        total = 0.0
        for module in adapter.modules:
            if module.name in self.outputs:
                total += float(self._energy(module, self.core(module)))
        return total

    def _energy(self, module: LoraModule, core: torch.Tensor) -> torch.Tensor:
        if not self.diagonal:
            return core.square().sum()
        u, v = self.outputs[module.name], self.inputs[module.name]
        return (core * ((u.mT @ module.b) @ (module.a @ v)).diagonal()).sum()


def fit_bases(fleet: NamedAdapters, tasks: Iterable[str], rank: int, *, diagonal: bool, passes: int) -> Bases:
    """Fit the bases of some tasks, with `rank` columns, or fewer where a module is narrower."""
    # Each pass loads every adapter twice.
    names = list(tasks)
    bases = Bases(*_sketched(fleet, names, rank), diagonal=diagonal)
    for _ in range(passes):
        outputs = _improved(fleet, names, bases, side="outputs")
        bases = Bases(outputs, bases.inputs, diagonal)
        inputs = _improved(fleet, names, bases, side="inputs")
        bases = Bases(bases.outputs, inputs, diagonal)
    return bases


def _sketched(
    fleet: NamedAdapters, tasks: list[str], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return first orthonormal bases from random sketches of all dW, as the range finder of a randomised SVD."""
    random = torch.Generator().manual_seed(_SEED)  # the same fleet gives the same bytes
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    for task in tasks:
        adapter = fleet[task]
        weight = _weight(adapter) ** 0.5
        for module in adapter.modules:
            width = min(rank, module.shape.inputs, module.shape.outputs)
            _add(outputs, module.name, weight * module.b @ torch.randn(module.shape.rank, width, generator=random))
            _add(inputs, module.name, weight * module.a.mT @ torch.randn(module.shape.rank, width, generator=random))
    return _orthonormal(outputs), _orthonormal(inputs)


def _improved(fleet: NamedAdapters, tasks: list[str], bases: Bases, *, side: str) -> dict[str, torch.Tensor]:
    """Return one side's bases, fitted to the other side's bases and to the cores under both."""
    sums: dict[str, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    for task in tasks:
        adapter = fleet[task]
        weight = _weight(adapter)
        for module in adapter.modules:
            core = bases.core(module)
            wide, narrow = (module.b, module.a) if side == "outputs" else (module.a.mT, module.b.mT)
            other = (bases.inputs if side == "outputs" else bases.outputs)[module.name]
            seen = wide @ (narrow @ other)  # dW V (out, r), or dW^T U (in, r)
            if bases.diagonal:
                _add(sums, module.name, weight * seen * core)
                _add(grams, module.name, weight * (other.mT @ other) * core[:, None] * core)
            else:  # one step of subspace iteration on sum dW V V^T dW^T
                _add(sums, module.name, weight * seen @ (core.mT if side == "outputs" else core))
    if not bases.diagonal:
        return _orthonormal(sums)
    return {name: _unit(_solved(grams[name], value)) for name, value in sums.items()}


def _solved(gram: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return x with x gram = sums, shapes (n, r) and (r, r)."""
    ridge = _RIDGE * gram.diagonal().mean() + _EMPTY
    solution: torch.Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), sums.mT)
    return solution.mT


def _unit(columns: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(columns, dim=0)


def _orthonormal(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.linalg.qr(value.double())[0].float() for name, value in sums.items()}


def _weight(adapter: Adapter) -> float:
    return 1.0 / max(dw_norm(adapter) ** 2, _EMPTY)


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
