"""Two bases per module that many adapters share, fitted by alternating passes over the fleet, one adapter at a time.

    full       dW_i ~ U C_i V^T         U, V orthonormal,  C_i = U^T dW_i V  (r x r)
    diagonal   dW_i ~ U diag(c_i) V^T   columns of length 1, c_i by least squares (r)

Every adapter is weighted by 1 / ||dW||^2, so that a strong one does not take the basis for itself. dW is never formed.

Joint diagonalisation with clusters, after Compress-then-Serve (Gabrielsson et al., arXiv 2407.00066).

    shared = clusters (1) | size (4) and bases of each cluster: U and V of every module, as an adapter's factors
    code   = cluster (1) | head of the task's modules | core of each module: r x r, or r on the diagonal

Cores are bfloat16 beside bases in bfloat16, as published, and int8 beside coarser ones.

Tasks are clustered by the cores that one common basis gives them; then bases are fitted and every task goes to the
cluster that keeps most of it, a few times over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from icmlora.adapter.metrics import dw_norm
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.baselines.baseline import NamedAdapters
from icmlora.baselines.factors import factors_from_bytes, factors_to_bytes
from icmlora.baselines.head import ByteReader, Head
from icmlora.baselines.quantizers import Bf16, Int8, ValueQuantizer
from icmlora.errors import CodeError, NotCovered

_SEED = 0
_RIDGE = 1e-6
_EMPTY = 1e-30


@dataclass(frozen=True, eq=False)
class Bases:
    """The shared bases of one cluster of tasks.

    Attributes:
        outputs: Module to U, shape (out, r).
        inputs: Module to V, shape (in, r).
        diagonal: Whether cores are vectors.
    """

    outputs: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    diagonal: bool

    def core(self, module: LoraModule) -> torch.Tensor:
        """Return what stands for one module of one task: (r, r), or (r,) if diagonal."""
        u, v = self.outputs[module.name], self.inputs[module.name]
        projected = (u.mT @ module.b) @ (module.a @ v)  # (r, r)
        if not self.diagonal:
            return projected
        gram = (u.mT @ u) * (v.mT @ v)
        return _solved(gram, projected.diagonal()[None])[0]

    def explained(self, adapter: Adapter) -> float:
        """Return how much of ||dW||^2 the bases keep of an adapter."""
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


def fit_bases(fleet: Mapping[str, Adapter], tasks: Iterable[str], rank: int, *, diagonal: bool, passes: int) -> Bases:
    """Fit the bases of some tasks.

    Args:
        fleet: Where the adapters come from; each pass loads every one of them twice.
        tasks: Which of them.
        rank: Columns of U and V, fewer where a module is narrower.
        diagonal: Whether cores are vectors.
        passes: Alternations after the start.
    """
    names = list(tasks)
    bases = Bases(*_start(fleet, names, rank), diagonal=diagonal)
    for _ in range(passes):
        outputs = _improved(fleet, names, bases, side="outputs")
        bases = Bases(outputs, bases.inputs, diagonal)
        inputs = _improved(fleet, names, bases, side="inputs")
        bases = Bases(bases.outputs, inputs, diagonal)
    return bases


def _start(
    fleet: Mapping[str, Adapter], tasks: list[str], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return orthonormal bases from random sketches of all dW: the range finder of a randomised SVD."""
    random = torch.Generator().manual_seed(_SEED)
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


def _improved(fleet: Mapping[str, Adapter], tasks: list[str], bases: Bases, *, side: str) -> dict[str, torch.Tensor]:
    """Return one side's bases, fitted to the other side's and to the cores they give."""
    sums: dict[str, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    for task in tasks:
        adapter = fleet[task]
        weight = _weight(adapter)
        for module in adapter.modules:
            core = bases.core(module)
            wide, narrow = (module.b, module.a) if side == "outputs" else (module.a.mT, module.b.mT)
            other = (bases.inputs if side == "outputs" else bases.outputs)[module.name]
            seen = wide @ (narrow @ other)  # dW V, or dW^T U
            if bases.diagonal:
                _add(sums, module.name, weight * seen * core)
                _add(grams, module.name, weight * (other.mT @ other) * core[:, None] * core)
            else:  # one step of subspace iteration on sum dW V V^T dW^T
                _add(sums, module.name, weight * seen @ (core.mT if side == "outputs" else core))
    if not bases.diagonal:
        return _orthonormal(sums)
    return {name: _unit(_solved(grams[name], value)) for name, value in sums.items()}


def _solved(gram: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
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


@dataclass(frozen=True)
class Joint:
    """Shared bases for all tasks of a cluster, a small core per task and module.

    Attributes:
        rank: Columns of the bases.
        clusters: Number of bases per module; fewer where there are fewer tasks.
        diagonal: Whether cores are vectors instead of matrices.
        quantizer: How the bases are stored.
    """

    rank: int
    clusters: int = 1
    diagonal: bool = False
    quantizer: ValueQuantizer = field(default_factory=Bf16)

    _PASSES: ClassVar[int] = 10
    _ROUNDS: ClassVar[int] = 4

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Fit and store the bases of every cluster."""
        groups = [list(fleet)] if self.clusters == 1 else self._grouped(fleet)
        parts = [len(groups).to_bytes(1, "little")]
        for tasks in groups:
            part = factors_to_bytes(self._as_adapter(fleet[tasks[0]], self._fit(fleet, tasks)), self.quantizer)
            parts += [len(part).to_bytes(4, "little"), part]
        return b"".join(parts)

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Store the cores under the cluster that keeps most of the adapter.

        Raises:
            NotCovered: No cluster has a basis for any of its modules.
        """
        choices = self._bases(shared)
        cluster = max(range(len(choices)), key=lambda index: choices[index].explained(adapter))
        bases = choices[cluster]
        modules = tuple(module for module in adapter.modules if module.name in bases.outputs)
        if not modules:
            raise NotCovered("no module of the adapter has a shared basis")
        head = Head.of(Head.of(adapter).with_modules(modules))
        cores = [
            self._cores.encode(bases.core(module).reshape(self._rows(bases, module.name), -1)) for module in modules
        ]
        return b"".join([cluster.to_bytes(1, "little"), head.to_bytes(), *cores])

    def decode(self, code: bytes, shared: bytes) -> Adapter:
        """Multiply cores and bases."""
        reader, choices = ByteReader(code), self._bases(shared)
        cluster = reader.number(1)
        if cluster >= len(choices):
            raise CodeError(f"the code names cluster {cluster} of {len(choices)}")
        bases, head = choices[cluster], Head.read(reader)
        modules = []
        for name, *_ in head.layout:
            u, v = bases.outputs[name], bases.inputs[name]
            shape = self._rows(bases, name), u.shape[1]
            core = self._cores.decode(reader.take(self._cores.size(*shape)), *shape)
            b = u * core if self.diagonal else u @ core
            modules.append(LoraModule(name, v.mT.contiguous(), b))
        reader.finish()
        return head.with_modules(modules)

    @property
    def _cores(self) -> ValueQuantizer:
        return Bf16() if isinstance(self.quantizer, Bf16) else Int8()

    def _rows(self, bases: Bases, module: str) -> int:
        return 1 if self.diagonal else bases.outputs[module].shape[1]

    def _fit(self, fleet: NamedAdapters, tasks: list[str]) -> Bases:
        return fit_bases(fleet, tasks, self.rank, diagonal=self.diagonal, passes=self._PASSES)

    def _grouped(self, fleet: NamedAdapters) -> list[list[str]]:
        """Return the clusters that hold a task, each a list of tasks in the fleet's order."""
        common = self._fit(fleet, list(fleet))
        names = list(fleet)
        places = _k_means(torch.stack([_features(common, fleet[task]) for task in names]), self.clusters)
        for _ in range(self._ROUNDS):
            groups = _members(names, places)
            fitted = [self._fit(fleet, tasks) for tasks in groups]
            moved = [_best(fitted, fleet[task]) for task in names]
            if _members(names, moved) == groups:
                break
            places = moved
        return _members(names, places)

    def _as_adapter(self, first: Adapter, bases: Bases) -> Adapter:
        modules = [LoraModule(name, v.mT.contiguous(), bases.outputs[name]) for name, v in bases.inputs.items()]
        return Head.of(first).with_modules(modules)

    def _bases(self, shared: bytes) -> list[Bases]:
        reader = ByteReader(shared)
        choices = []
        for _ in range(reader.number(1)):
            basis = factors_from_bytes(reader.take(reader.number(4)), self.quantizer)
            outputs = {module.name: module.b for module in basis.modules}
            choices.append(Bases(outputs, {module.name: module.a.mT for module in basis.modules}, self.diagonal))
        reader.finish()
        return choices


def _features(bases: Bases, adapter: Adapter) -> torch.Tensor:
    """Return a task's cores as one vector of length 1; modules that it lacks are zeros."""
    own = {module.name: module for module in adapter.modules}
    cores = []
    for name, u in bases.outputs.items():
        size = u.shape[1] if bases.diagonal else u.shape[1] ** 2
        cores.append(bases.core(own[name]).reshape(-1) if name in own else torch.zeros(size))
    return torch.nn.functional.normalize(torch.cat(cores), dim=0)


def _k_means(points: torch.Tensor, clusters: int) -> list[int]:
    """Cluster unit vectors; the first centres are the point nearest to the mean and then the farthest from all."""
    centres = points[(points @ points.mean(dim=0)).argmax()][None]
    while len(centres) < min(clusters, len(points)):
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(dim=1).argmax()][None]])
    places = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(20):
        centres = torch.stack([_centre(points[places == place], old) for place, old in enumerate(centres)])
        places = torch.cdist(points, centres).argmin(dim=1)
    return [int(place) for place in places]


def _centre(points: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return points.mean(dim=0) if len(points) else otherwise


def _members(names: list[str], places: list[int]) -> list[list[str]]:
    groups: dict[int, list[str]] = {place: [] for place in sorted(set(places))}
    for name, place in zip(names, places, strict=True):
        groups[place].append(name)
    return list(groups.values())


def _best(fitted: list[Bases], adapter: Adapter) -> int:
    kept = [bases.explained(adapter) for bases in fitted]
    return kept.index(max(kept)) if math.isfinite(sum(kept)) else 0
