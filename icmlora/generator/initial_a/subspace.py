"""The row space of the initial A: directions of a task's inputs that the decoder knows at no cost.

    inputs of a slot x  =  Q^T (Q x)              +   the rest, across the subspace
                           r numbers instead of       one number per channel, but smaller ones
                           one per channel

Q is the initial A, weighted as tokens are and made orthonormal, so one quantiser step means the same distortion along
it as along the channels. The code stores once per kind and rank slot how much smaller the rest is (`shifts`).

The rest is where training has moved A, towards the module's real inputs; the subspace is random, and real inputs have
little in it. So the rest does more of the work than its length suggests, and much of it rounds to zero. Refinement may
lengthen the decoded rest, per kind and rank slot (`boosts`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from icmlora.generator.config import GeneratorConfig
from icmlora.generator.initial_a.draw import InitialA, initial_factors
from icmlora.generator.sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class InitialSubspace:
    """The known directions of one task's inputs, on one device; R is the largest rank of a kind's modules."""

    shifts: NDArray[np.int8]  # log2 of the share of the inputs that is across the subspace, in eighths, shape (K, S)
    boosts: NDArray[np.int8]  # log2 of the factor of the decoded rest, in 64ths, shape (K, S)
    layers: int
    # By kind: orthonormal rows, float32, shape (L, R, in); rows of zeros if a module has fewer than R.
    bases: dict[int, torch.Tensor] = field(default_factory=dict)
    # By kind: how many rows each module has, shape (L,).
    ranks: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def rows(self, kind: int) -> int:
        """Return R of a kind."""
        return self.bases[kind].shape[1] if kind in self.bases else 0

    def ranks_of(self, kind: int) -> NDArray[np.int64]:
        """Return how many rows each layer's module of a kind has, shape (L,)."""
        return self.ranks.get(kind, np.zeros(self.layers, dtype=np.int64))

    def knows(self, kind: int) -> NDArray[np.bool_]:
        """Return for each layer's module of a kind whether its initial A is known, shape (L,)."""
        known: NDArray[np.bool_] = self.ranks_of(kind) > 0
        return known

    def project(self, kind: int, layer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return Q x, shape (n, R), of rows of values (n, in); layer (n,) is ascending."""
        if kind not in self.bases:
            return values.new_zeros(len(values), 0)
        basis = self.bases[kind].to(values.dtype)
        return torch.cat([part @ basis[number].T for number, part in _by_layer(layer, values, self.layers)])

    def expand(self, kind: int, layer: torch.Tensor, along: torch.Tensor, size: int) -> torch.Tensor:
        """Return Q^T y of rows y of shape (n, R), as rows of shape (n, size)."""
        if kind not in self.bases:
            return along.new_zeros(len(along), size)
        basis = self.bases[kind].to(along)
        return torch.cat([part @ basis[number] for number, part in _by_layer(layer, along, self.layers)])

    def spread(self, kind: int, layer: torch.Tensor) -> torch.Tensor:
        """Return the root mean square, along each row, of vectors of length 1 in the subspace; (n, R)."""
        ranks = torch.from_numpy(self.ranks_of(kind)).to(layer.device)[layer]  # (n,)
        rows = torch.arange(self.rows(kind), device=layer.device)
        return torch.where(rows < ranks[:, None], ranks.clamp_min(1)[:, None] ** -0.5, 0.0)


class Bases(NamedTuple):
    """The bases of n rows of values that belong to M modules: each row is multiplied by its module's, all at once.

    Codes are decoded with the sums of `InitialSubspace`, layer by layer. The sums here may differ in the last bit.
    """

    matrices: torch.Tensor  # orthonormal rows, zeros where nothing is known, shape (M, R, in)
    place: torch.Tensor  # index of a row among M modules of `slots` slots each, int64, shape (n,)
    slots: int  # per module

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """Return Q x, shape (n, R), of rows of values (n, in)."""
        return self._through(values, self.matrices.mT)

    def expand(self, along: torch.Tensor) -> torch.Tensor:
        """Return Q^T y, shape (n, in), of rows y of shape (n, R)."""
        return self._through(along, self.matrices)

    def _through(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        padded = rows.new_zeros(len(matrices) * self.slots, rows.shape[1]).index_copy(0, self.place, rows)
        product = padded.view(len(matrices), self.slots, rows.shape[1]) @ matrices
        return product.flatten(0, 1).index_select(0, self.place)


def bases_of(parts: Sequence[tuple[InitialSubspace, int, torch.Tensor, torch.Tensor]], inputs: int) -> Bases | None:
    """Collect the bases of rows of the same number of inputs; None where no initial A is known.

    Each part is subspace, kind, layer (n,) and slot (n,) of some of the rows; a module's rows are consecutive and in
    one part.
    """
    rank = max((subspace.rows(kind) for subspace, kind, _, _ in parts), default=0)
    if not rank:
        return None
    slots = 1 + max(int(slot.max()) for _, _, _, slot in parts)
    matrices, places, modules = [], [], 0
    for subspace, kind, layer, slot in parts:
        layers, module = torch.unique_consecutive(layer, return_inverse=True)
        places.append((modules + module) * slots + slot)
        modules += len(layers)
        found = subspace.bases[kind][layers] if kind in subspace.bases else torch.zeros(len(layers), 0, inputs)
        matrices.append(functional.pad(found, (0, 0, 0, rank - found.shape[1])))
    return Bases(torch.cat(matrices), torch.cat(places), slots)


def initial_subspace(initial: InitialA | None, config: GeneratorConfig, sensitivity: Sensitivity) -> InitialSubspace:
    """Redraw an initial A and make its rows orthonormal; shifts and boosts are 0."""
    zeros = np.zeros((len(config.kinds), config.slots), dtype=np.int8)
    subspace = InitialSubspace(zeros, zeros, config.layers)
    if initial is None:
        return subspace
    factors = initial_factors(initial)
    alike: defaultdict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = defaultdict(list)
    for module in initial.modules:
        kind, layer = config.place_of(module.shape)
        if module.shape.rank < module.shape.inputs:  # otherwise all inputs are in the subspace, and nothing is saved
            alike[kind, module.shape.rank].append((layer, factors[module.shape.module]))
    for kind in dict.fromkeys(kind for kind, _ in alike):
        most = max(rank for other, rank in alike if other == kind)
        subspace.ranks[kind] = np.zeros(config.layers, dtype=np.int64)
        subspace.bases[kind] = torch.zeros(config.layers, most, config.kinds[kind].inputs)
    # Modules of one kind and rank go through one batched QR decomposition.
    for (kind, rank), modules in alike.items():
        layers = [layer for layer, _ in modules]
        rows = torch.from_numpy(np.stack([factor for _, factor in modules]))  # (modules, r, in)
        rows.mul_(torch.exp2(sensitivity.inputs[kind][layers])[:, None])
        subspace.ranks[kind][layers] = rank
        # Orthonormal rows by the QR decomposition whose R has a positive diagonal: it is unique, so every machine gets
        # the same rows up to rounding.
        q, r = torch.linalg.qr(rows.double().mT)
        sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)  # (modules, r)
        result: torch.Tensor = (q.mT * sign[:, :, None]).float()
        subspace.bases[kind][layers, :rank] = result
    return subspace


def _by_layer(layer: torch.Tensor, rows: torch.Tensor, layers: int) -> list[tuple[int, torch.Tensor]]:
    """Split rows (n, ...) by their ascending layer (n,); layers without rows are listed too."""
    return list(enumerate(torch.split(rows, torch.bincount(layer, minlength=layers).tolist())))
