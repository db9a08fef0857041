"""Adapters <-> codes of one generator.

    task vectors ──▶ condition ─┐
    adapter ──tokens──▶ latent ─┴──▶ prediction ──rounded difference──▶ integers ──▶ code

The way back is in icmlora/generator/decoder.py, the search for the quantiser step in icmlora/generator/encoding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from icmlora.adapter.model import Adapter
from icmlora.generator.decoder import Decoder
from icmlora.generator.initial_a.draw import InitialA

if TYPE_CHECKING:
    from icmlora.generator.encoding import Encoded


class Codec(Decoder):
    """Encode and decode the adapters of one generator. Works on the CPU in float32."""

    # Under a tolerance near 1 the code of an adapter that is predicted well is condition and latent, without integers.

    @torch.no_grad()
    def encode(
        self,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None = None,
        *,
        tolerance: float | None = None,
        max_squared_error: float | None = None,
        keep_decoded: bool = False,
    ) -> Encoded:
        """Encode one adapter with the coarsest quantiser step found that keeps the limits."""
        # `tolerance` limits the weighted error, `max_squared_error` that of dW. Default: the generator's own tolerance.
        from icmlora.generator.encoding import Limits, encode_adapter  # most commands only decode

        if tolerance is None and max_squared_error is None:
            tolerance = self.config.tolerance
        limits = Limits(tolerance, max_squared_error)
        return encode_adapter(self, adapter, vectors, initial, limits, keep_decoded=keep_decoded)

    @torch.no_grad()
    def encode_within(
        self,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None = None,
        *,
        size: int,
        keep_decoded: bool = False,
    ) -> Encoded:
        """Encode one adapter as accurately as `size` bytes allow; if no code is so small, return the smallest found."""
        from icmlora.generator.encoding import encode_within

        return encode_within(self, adapter, vectors, initial, size, keep_decoded=keep_decoded)

    @torch.no_grad()
    def measure(self, adapter: Adapter, code: bytes) -> Encoded:
        """Decode a code and compare the result with the adapter that was encoded."""
        from icmlora.generator.encoding import measure

        return measure(self, adapter, code)
