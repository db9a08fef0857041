"""Translate between the manifest of an adapter and its files. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection

from icmlora.adapter.layout import ModuleShape
from icmlora.formats.extras import unpack
from icmlora.formats.format import AdapterBytes, AdapterSummary, Template
from registry.manifests import File, StoredAdapter


def new_adapter(
    summary: AdapterSummary, *, weights: File, config: File, card: File | None, source: str
) -> StoredAdapter:
    """Return the manifest of an adapter whose files are in the store."""
    return StoredAdapter(
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


def template_of(final: StoredAdapter, config: bytes) -> Template:
    """Return the form of an original with a configuration."""
    return Template(config, tuple(ModuleShape(*entry) for entry in final.layout), final.dtype, final.template)


def read_companions(
    read: Callable[[str], bytes], final: StoredAdapter, names: Collection[str] | None = None
) -> dict[str, bytes]:
    """Read the extra files of an adapter, or only those with some names."""
    files = ((extra.file, extra.blob) for extra in final.extras)
    return {name: unpack(read(blob)) for name, blob in files if name is not None and (names is None or name in names)}


def original_files(read: Callable[[str], bytes], final: StoredAdapter, weights: bytes | None = None) -> AdapterBytes:
    """Read the files of an original without the card; given weights are not read again."""
    weights = read(final.weights) if weights is None else weights
    return AdapterBytes(weights, read(final.config), None, read_companions(read, final))
