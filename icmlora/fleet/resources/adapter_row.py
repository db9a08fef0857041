"""The row of an adapter, from the summary that its format made of it. Never imports torch."""

from __future__ import annotations

from icmlora.formats.format import AdapterSummary
from registry.records import NewAdapter


def new_adapter(summary: AdapterSummary, *, weights: str, config: str, card: str | None, source: str) -> NewAdapter:
    """Return the row of a final adapter in PEFT's format; weights, configuration and card are digests."""
    return NewAdapter(
        weights=weights,
        config=config,
        card=card,
        step=None,
        is_final=True,
        dtype=summary.dtype,
        rank_max=summary.rank_max,
        parameters=summary.parameters,
        target_modules=summary.target_modules,
        layout=summary.layout,
        source=source,
        original_only=summary.original_only,
        does_nothing=summary.does_nothing,
        template=summary.template,
    )
