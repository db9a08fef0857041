"""Tokens of several adapters stacked, so one operation of the network serves all of them.

    adapter 0   q: (n, 576) (n, 576)   v: (n, 576) (n, 192) ─┐      values of (576, 576):  q of 0, q of 1, o of 1
    adapter 1   q: ...   v: ...   o: (n, 576) (n, 576) ──────┴──▶   values of (576, 192):  v of 0, v of 1

Kinds of the same widths share one tensor; within it tokens are ordered by kind, adapter, layer and slot. `places` gives
the kind, layer, slot and adapter of each token, tensor after tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from icmlora.generator.network.tokens import KindTokens

INPUTS, OUTPUTS = 0, 1  # the sides of a token

Counts = tuple[tuple[int, int], ...]  # kinds, each with the number of its tokens, in the order of the tokens


class Places(NamedTuple):
    """Where n tokens are, kind by kind; int64 tensors of shape (n,)."""

    counts: Counts
    kind: torch.Tensor
    layer: torch.Tensor
    slot: torch.Tensor
    owner: torch.Tensor  # which adapter of the stack they belong to


class Values(NamedTuple):
    """The tokens of all kinds that have the same widths."""

    counts: Counts
    norm: torch.Tensor  # shape (n,), all positive
    inputs: torch.Tensor  # shape (n, in)
    outputs: torch.Tensor  # shape (n, out)


class Stack(NamedTuple):
    """The tokens of B adapters."""

    adapters: int  # B
    places: Places
    norm: torch.Tensor  # singular values of dW, of all tokens, shape (n,)
    log_norm: torch.Tensor  # log2 of the norms, in any unit
    energy: torch.Tensor  # share of the adapter's |dW|^2 that a token has, shape (n,)
    values: tuple[Values, ...]

    def by_kind(self, side: int) -> Iterator[torch.Tensor]:
        """Yield the inputs or outputs of the tokens of each kind of `places.counts`, (n, size) each."""
        for values in self.values:
            yield from torch.split((values.inputs, values.outputs)[side], [count for _, count in values.counts])

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum the rows of all tokens, (n, ...), for each adapter; shape (B, ...)."""
        return rows.new_zeros(self.adapters, *rows.shape[1:]).index_add(0, self.places.owner, rows)


def places_of(kind: int, layer: torch.Tensor, slot: torch.Tensor) -> Places:
    """Return the places of tokens of one kind and one adapter, layer (n,) and slot (n,)."""
    return Places(((kind, len(layer)),), torch.full_like(layer, kind), layer, slot, torch.zeros_like(layer))


def stacked(adapters: Sequence[Sequence[KindTokens]], *, by_kind: bool = False) -> Stack:
    """Stack the tokens of adapters, (n, in) and (n, out) of each kind.

    With `by_kind`, kinds of the same widths stay separate, which saves copying a single adapter.
    """
    by_widths: defaultdict[tuple[int, int, int], list[tuple[int, int, KindTokens]]] = defaultdict(list)
    for owner, tokens in enumerate(adapters):
        for group in tokens:
            widths = group.inputs.shape[1], group.outputs.shape[1]
            by_widths[(*widths, group.kind if by_kind else 0)].append((group.kind, owner, group))
    ordered = [sorted(found, key=lambda one: one[:2]) for _, found in sorted(by_widths.items())]
    values = []
    for found in ordered:
        counts: defaultdict[int, int] = defaultdict(int)
        for kind, _, group in found:
            counts[kind] += len(group.norm)
        columns = zip(*((group.norm, group.inputs, group.outputs) for _, _, group in found), strict=True)
        values.append(Values(tuple(counts.items()), *map(joined, columns)))
    groups = [one for found in ordered for one in found]
    places = Places(
        tuple(pair for part in values for pair in part.counts),
        _whole([torch.full_like(group.layer, kind) for kind, _, group in groups]),
        _whole([group.layer for _, _, group in groups]),
        _whole([group.slot for _, _, group in groups]),
        _whole([torch.full_like(group.layer, owner) for _, owner, group in groups]),
    )
    norm = joined([part.norm for part in values]) if values else torch.zeros(0)
    energy = norm.square()
    total = energy.new_zeros(len(adapters)).index_add(0, places.owner, energy)
    share = energy / total.clamp_min(torch.finfo(norm.dtype).tiny).index_select(0, places.owner)
    return Stack(len(adapters), places, norm, norm.log2(), share, tuple(values))


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate rows (n, ...); a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _whole(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return joined(parts) if parts else torch.zeros(0, dtype=torch.int64)
