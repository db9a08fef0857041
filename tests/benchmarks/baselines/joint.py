"""Joint diagonalisation with clusters, after Compress-then-Serve (Gabrielsson et al., arXiv 2407.00066).

    shared = clusters (1) | size (4) and bases of each cluster: U and V of every module, as an adapter's factors
    code   = cluster (1) | head of the task's modules | core of each module: r x r, or r on the diagonal

Cores are bfloat16 if the bases are, as published, and int8 otherwise.

Tasks are clustered by the cores that one common basis gives them. Then bases are fitted and every task moves to the
cluster that keeps most of it, a few times over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError, NotCovered
from tests.benchmarks.baselines.baseline import NamedAdapters
from tests.benchmarks.baselines.bases import Bases, fit_bases
from tests.benchmarks.baselines.factors import factors_from_bytes, factors_to_bytes
from tests.benchmarks.baselines.head import ByteReader, Head
from tests.benchmarks.baselines.quantizers import Bf16, Int8, ValueQuantizer


@dataclass(frozen=True)
class Joint:
    """Share bases among all tasks of a cluster; store a small core per task and module."""

    rank: int  # columns of the bases
    clusters: int = 1  # number of bases per module; fewer if there are fewer tasks
    diagonal: bool = False  # whether cores are vectors instead of matrices
    quantizer: ValueQuantizer = field(default_factory=Bf16)  # how the bases are stored

    _PASSES: ClassVar[int] = 10  # alternations of each fit
    _ROUNDS: ClassVar[int] = 4  # how often tasks may move to another cluster

    def prepare(self, fleet: NamedAdapters) -> bytes:
        """Fit and store the bases of every cluster."""
        groups = [list(fleet)] if self.clusters == 1 else self._grouped(fleet)
        parts = [len(groups).to_bytes(1, "little")]
        for tasks in groups:
            part = factors_to_bytes(self._as_adapter(fleet[tasks[0]], self._fit(fleet, tasks)), self.quantizer)
            parts += [len(part).to_bytes(4, "little"), part]
        return b"".join(parts)

    def encode(self, adapter: Adapter, shared: bytes) -> bytes:
        """Store the cores under the cluster that keeps most of the adapter."""
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
            if name not in bases.outputs:
                raise CodeError(f"the code names {name}, for which its cluster has no basis")
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
        """Return the non-empty clusters, each a list of tasks in the fleet's order."""
        common = self._fit(fleet, list(fleet))
        names = list(fleet)
        places = _k_means(torch.stack([_features(common, fleet[task]) for task in names]), self.clusters)
        for _ in range(self._ROUNDS):
            groups = _members(names, places)
            # Loads the fleet again for every round, so that one adapter at a time is in memory.
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
    """Return a task's cores as one vector of length 1, with zeros for modules that it lacks."""
    own = {module.name: module for module in adapter.modules}
    cores = []
    for name, u in bases.outputs.items():
        size = u.shape[1] if bases.diagonal else u.shape[1] ** 2
        cores.append(bases.core(own[name]).reshape(-1) if name in own else torch.zeros(size))
    return torch.nn.functional.normalize(torch.cat(cores), dim=0)


def _k_means(points: torch.Tensor, clusters: int) -> list[int]:
    """Cluster unit vectors (n, d), starting from the point nearest to the mean and then those farthest from all."""
    # Deterministic, unlike random first centres: the same fleet gives the same bytes.
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
