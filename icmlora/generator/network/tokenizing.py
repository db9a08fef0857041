"""Adapter -> tokens: the singular vectors of each module's dW, weighted by the sensitivity of its channels.

Decoding does not import this module. Modules are decomposed a few at a time, and the results go straight to their place
in the tokens: allocating new memory takes longer than filling it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from icmlora.adapter.canonical import singular_rows, stacked_rows, together
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.network.tokens import KindTokens
from icmlora.generator.sensitivity import Sensitivity
from icmlora.io.threads import side_by_side


def tokenize(adapter: Adapter, config: GeneratorConfig, sensitivity: Sensitivity) -> tuple[KindTokens, ...]:
    """Turn an adapter (any gauge) into tokens, (n, in) and (n, out); slots and kinds without energy are left out."""
    kinds: defaultdict[int, list[tuple[int, LoraModule]]] = defaultdict(list)
    for module in adapter.modules:
        kind, layer = config.place_of(module.shape)
        kinds[kind].append((layer, module))
    found = [_Slots(kind, sorted(modules, key=lambda pair: pair[0])) for kind, modules in sorted(kinds.items())]
    parts = [(slots, part) for slots in found for part in slots.parts()]
    with side_by_side() as each:
        for _ in each(lambda pair: pair[0].fill(pair[1], sensitivity), parts):
            pass
    return tuple(group for group in (slots.tokens() for slots in found) if len(group.norm))


class _Slots:
    """All slots of one kind, to be filled with tokens some modules at a time."""

    def __init__(self, kind: int, modules: Sequence[tuple[int, LoraModule]]) -> None:
        """Allocate tokens for a kind's modules, given as (layer, module) in order of layers."""
        self._kind, self._modules = kind, modules
        self._ranks = [module.shape.rank for _, module in modules]
        self._ends = list(accumulate(self._ranks))
        shape, rows = modules[0][1].shape, self._ends[-1]
        self._norm = torch.zeros(rows)
        self._inputs, self._outputs = torch.empty(rows, shape.inputs), torch.empty(rows, shape.outputs)

    def parts(self) -> Iterator[range]:
        """Split the modules' numbers into parts of one rank that are decomposed together."""
        begin, size = 0, len(self._ranks)
        for end in range(1, size + 1):
            count = together(self._modules[begin][1].shape)
            if end == size or end - begin == count or self._ranks[end] != self._ranks[begin]:
                yield range(begin, end)
                begin = end

    def fill(self, part: range, sensitivity: Sensitivity) -> None:
        """Write the tokens of some modules of one rank."""
        rows = stacked_rows([self._modules[number][1] for number in part])
        layers = torch.tensor([self._modules[number][0] for number in part])
        sensitivity.weigh_rows(self._kind, layers, *rows)
        norm, *vectors = singular_rows(*rows, power=1.0)
        begin, end = self._ends[part[0]] - self._ranks[part[0]], self._ends[part[-1]]
        for target, values in zip((self._norm, self._inputs, self._outputs), (norm, *vectors), strict=True):
            target[begin:end].view(len(part), -1, *values.shape[2:])[:, : norm.shape[1]] = values

    def tokens(self) -> KindTokens:
        """Return the tokens without slots that have no energy; these come last in each module."""
        ranks = torch.tensor(self._ranks)
        layer = torch.tensor([layer for layer, _ in self._modules]).repeat_interleave(ranks)
        slot = torch.cat([torch.arange(rank) for rank in self._ranks])
        group = KindTokens(self._kind, layer, slot, self._norm, self._inputs, self._outputs)
        is_used = self._norm > 0
        return group if is_used.all() else group[is_used]
