"""Adapter -> tokens: the singular vectors of each module's dW, weighted by the sensitivity of its channels.

Decoding does not import this module. Modules are decomposed a few at a time, and the results go straight to their place
in the tokens: allocating new memory takes longer than filling it.
"""

from __future__ import annotations

from collections import defaultdict

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
        kind, number = config.place_of(module.shape)
        kinds[kind].append((number, module))
    groups: list[KindTokens] = []
    parts: list[tuple[KindTokens, int, list[tuple[int, LoraModule]]]] = []  # with the row where each begins
    for kind, modules in sorted(kinds.items()):
        modules.sort(key=lambda pair: pair[0])
        ranks, shape = [module.shape.rank for _, module in modules], modules[0][1].shape
        layer = torch.tensor([number for number, _ in modules]).repeat_interleave(torch.tensor(ranks))
        slot = torch.cat([torch.arange(rank) for rank in ranks])
        rows = torch.zeros(len(slot)), torch.empty(len(slot), shape.inputs), torch.empty(len(slot), shape.outputs)
        groups.append(KindTokens(kind, layer, slot, *rows))
        begin = first = 0
        for end in range(1, len(ranks) + 1):  # modules of one rank are decomposed together, some at a time
            is_full = end - begin == together(modules[begin][1].shape)
            if end == len(ranks) or is_full or ranks[end] != ranks[begin]:
                parts.append((groups[-1], first, modules[begin:end]))
                first += (end - begin) * ranks[begin]
                begin = end

    def fill(part: tuple[KindTokens, int, list[tuple[int, LoraModule]]]) -> None:
        group, first, modules = part
        rows = stacked_rows([module for _, module in modules])
        sensitivity.weigh_rows(group.kind, torch.tensor([layer for layer, _ in modules]), *rows)
        norm, *vectors = singular_rows(*rows, power=1.0)
        end = first + len(modules) * modules[0][1].shape.rank
        for target, values in zip((group.norm, group.inputs, group.outputs), (norm, *vectors), strict=True):
            target[first:end].view(len(modules), -1, *values.shape[2:])[:, : norm.shape[1]] = values

    with side_by_side() as each:
        for _ in each(fill, parts):
            pass
    # In each module, slots without energy come last.
    found = (group if (group.norm > 0).all() else group[group.norm > 0] for group in groups)
    return tuple(group for group in found if len(group.norm))
