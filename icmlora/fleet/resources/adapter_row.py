"""Describe an adapter in PEFT's format by the summary of its files. Never imports torch."""

from __future__ import annotations

from icmlora.formats.format import AdapterSummary
from registry.manifests import Adapter, File


def new_adapter(summary: AdapterSummary, *, weights: File, config: File, card: File | None, source: str) -> Adapter:
    """Return the manifest of an adapter whose files are in the store."""
    return Adapter(
        weights=weights,
        config=config,
        card=card,
        source=source,
        dtype=summary.dtype,
        rank_max=summary.rank_max,
        parameters=summary.parameters,
        target_modules=summary.target_modules,
        layout=summary.layout,
        original_only=summary.original_only,
        does_nothing=summary.does_nothing,
        template=summary.template,
    )
