"""Search for the smallest code of one adapter that meets the limits, or the most accurate one of a size.

share to keep ──a few passes through the base model──▶ coarser step ──refine──▶ code
error or size ──────────────────────────encode────────────────────────────────▶ code
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from icmlora.adapter.model import Adapter
from icmlora.fleet.encode.refiner import Coarse, Finished, Refiner, coarse_for, lost_before, refine_all
from icmlora.fleet.resources.workers import Tell
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.steps import AdapterSteps
from icmlora.generator.initial_a.draw import InitialA
from icmlora.io.text import human_size

_SURELY = 0.8
"""Share of the allowed loss that a code without refinement aims at: the search is this precise."""


@dataclass(frozen=True)
class CodeSearch:
    """Encodes one adapter."""

    codec: Codec
    original: Adapter
    vectors: Mapping[str, torch.Tensor]  # view -> mean over the support sets, float32 of shape (hidden,)
    initial: InitialA | None
    limits: Limits
    refiner: Refiner | None  # None without a share to keep
    tell: Tell

    @property
    def is_refined(self) -> bool:
        """Whether the code is refined."""
        return self.refiner is not None and bool(self.limits.refine)

    def best(self) -> Finished:
        """Return the code; if none meets the limits, the most accurate one, or the smallest if none has the size."""
        if self.refiner is None:
            return self._plain()
        coarse = self.coarse()
        return refine_all([coarse], self.tell)[0] if self.is_refined else Finished.of(coarse, coarse.encoded)

    def coarse(self) -> Coarse:
        """Return the code that refinement begins with."""
        keep, refiner = self.limits.keep, self.refiner
        assert refiner is not None
        assert keep is not None
        self.tell(f"encoding, to keep {keep:g}")
        steps = AdapterSteps(self.codec, self.original, self.vectors, self.initial)
        lost = lost_before(keep, refiner.effect.uncapped_ratio) if self.is_refined else _SURELY * (1 - keep)
        return coarse_for(keep, lost, refiner, self.codec, self.original, steps)

    def _plain(self) -> Finished:
        size = self.limits.size
        self.tell("encoding" if size is None else f"encoding, at most {human_size(size)}")
        encoded = encode_adapter(self.codec, self.original, self.vectors, self.initial, self.limits)
        is_kept = self.limits.keeps(encoded) and (size is None or len(encoded.data) <= size)
        return Finished(encoded, None, misses_limit=not is_kept)
