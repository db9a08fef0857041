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
    from icmlora.generator.limits import Limits


class Codec(Decoder):
    """Encode and decode the adapters of one generator. Works on the CPU in float32."""

    # Under a tolerance near 1 the code of an adapter that is predicted well is condition and latent, without integers.

    @torch.no_grad()
    def encode(
        self,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None = None,
        limits: Limits | None = None,
        *,
        keep_decoded: bool = False,
    ) -> Encoded:
        """Encode one adapter with the coarsest quantiser step found that keeps the limits of its errors.

        Args:
            adapter: The adapter, as its trainer wrote it.
            vectors: Its task vectors by view, each of shape (size,).
            initial: Where its initial A was drawn, if that is known.
            limits: By default the generator's own tolerance. Under a size, the code is the most accurate of at most so
                many bytes, or the smallest found if none has so few.
            keep_decoded: Whether the result holds what the code decodes to.

        Raises:
            NotCovered: The generator has no place for one of the modules or ranks.
            GeneratorError: No code keeps the limits.
        """
        from icmlora.generator.encoding import encode_adapter, encode_within  # most commands only decode
        from icmlora.generator.limits import Limits

        if limits is None:
            limits = Limits(tolerance=self.config.tolerance)
        if limits.size is not None:
            return encode_within(self, adapter, vectors, initial, limits.size, keep_decoded=keep_decoded)
        return encode_adapter(self, adapter, vectors, initial, limits, keep_decoded=keep_decoded)

    @torch.no_grad()
    def measure(self, adapter: Adapter, code: bytes) -> Encoded:
        """Decode a code and compare the result with the adapter that was encoded."""
        from icmlora.generator.encoding import measure

        return measure(self, adapter, code)
